"""docs/models.md and docs/python.md: their code runs as it stands, and what they list is what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from compare_runs import command, mpirun, needs_mpirun

import rustsim_hpc as rs
from rustsim_hpc.modeling.model import _KINDS
from rustsim_hpc.modeling.names import AGENTS, RESERVED
from rustsim_hpc.state.schema import DTYPES

DOCS = Path(__file__).parents[1] / "docs"
MODELS, PYTHON = ((DOCS / name).read_text("utf-8") for name in ("models.md", "python.md"))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def first_cells(page: str, heading: str) -> list[str]:
    """Return what the first column of a table under the row ``heading`` names in code."""
    lines = page.split(heading, 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [name for line in lines for name in re.findall(r"`([^`]+)`", line.split("|")[1])]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's model and its job, that the commands are run in."""
    (tmp_path / "patches.py").write_text(blocks(MODELS, "python")[0])
    (tmp_path / "patches.toml").write_text(blocks(MODELS, "toml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def type_in(line: str) -> tuple[int, str, str]:
    words = shlex.split(line)
    if words[0] == "mpirun":
        place = Path.cwd()
        absolute = [str(place / w) if w.startswith("runs/") or w == "patches.toml" else w for w in words]
        return mpirun(int(words[2]), *absolute[4:])
    assert words[0] == "rustsim-hpc"
    return command(*words[1:])


@pytest.mark.slow
@needs_mpirun
def test_the_example_runs_and_is_told_apart_when_it_is_changed(project: Path) -> None:
    ways, change = (script.splitlines() for script in blocks(MODELS, "bash"))
    for line in ways:
        code, out, err = type_in(line)
        assert code == 0, (line, out, err)
    [(fork_code, *told), (code, out, err)] = map(type_in, change)
    assert fork_code == 0, told
    assert code == 4, err
    [sample] = re.findall(r"^```\n(the runs differ.*?)^```", MODELS, re.DOTALL | re.MULTILINE)
    for line in sample.splitlines():
        assert line == "..." or line in out.splitlines()
    names: dict[str, object] = {}
    exec(compile(blocks(PYTHON, "python")[3], "reading", "exec"), names)  # noqa: S102 (the page's own text)
    run = names["run"]
    assert isinstance(run, type(rs.open_run(project / "runs" / "ranks")))
    assert (run.status, run.seed, run.params["beta"]) == ("done", 1, 0.5)
    curve, state = run.series("curve"), run.columns("state", step=50)
    assert [int((state == code).sum()) for code in range(3)] == [int(curve[name][50]) for name in "SIR"]
    assert curve["R"][-1] > 1000
    listed = {name.rstrip("/") for name in first_cells(PYTHON, "| in the folder of a run |")}
    left = {path.name for path in (project / "runs" / "checked").iterdir() if not path.name.startswith(".")}
    assert left - listed == {"curve.csv"}
    assert listed - left == {"crash"}
    assert (run.step_length, run.time_unit) == (1.0, "d")
    assert rs.open_run(project / "runs" / "changed").lineage["changes"] == {"params.beta": [0.5, 0.6]}  # type: ignore[index]
    assert curve["day"][-1] == 100.0


def test_the_control_planes_of_the_page() -> None:
    names: dict[str, object] = {}
    exec(compile(blocks(PYTHON, "python")[0], "plane", "exec"), names)  # noqa: S102 (the page's own text)
    x = np.float32(0)
    for _ in range(25):
        x += np.float32(0.1)
    assert np.array_equal(names["x"], np.full(1000, x))  # type: ignore[arg-type]


def test_the_model_without_a_job_file(tmp_path: Path) -> None:
    path = tmp_path / "walk.py"
    path.write_text(blocks(PYTHON, "python")[1])
    names: dict[str, object] = {}
    exec(compile(path.read_text(), str(path), "exec"), names)  # noqa: S102 (the page's own text)
    assert names["spread"] == pytest.approx(0.5 * 10**0.5, rel=0.1)  # 4 standard deviations: 0.089


def test_the_job_that_is_run_from_python(project: Path) -> None:
    names: dict[str, object] = {}
    exec(compile(blocks(PYTHON, "python")[2], "running", "exec"), names)  # noqa: S102 (the page's own text)
    done, more, curve = names["done"], names["more"], names["curve"]
    assert isinstance(done, rs.RunSummary)
    assert isinstance(more, rs.RunSummary)
    assert (done.step_index, more.resumed_from, more.step_index) == (100, 100, 120)
    assert curve["day"][-1] == 100  # type: ignore[index]
    assert rs.open_run(project / "runs" / "notebook").params["beta"] == 0.4


def test_the_tables_list_what_there_is() -> None:
    assert set(re.findall(r'"(\w+)"', " ".join(first_cells(MODELS, "| reduction |")))) == set(_KINDS)
    assert {name for name in first_cells(MODELS, "| name of |") if name != "derive"} == {*RESERVED, AGENTS}
    outputs = {name.removeprefix("rs.").partition("(")[0] for name in first_cells(MODELS, "| output |")}
    assert outputs == {"Series", "Arrays", "Sample", "Picture"}
    [listed] = re.findall(r"the dtypes are ([\w\s,]+)\.", MODELS)
    assert re.split(r",\s+|\s+and\s+", listed) == list(DTYPES)
    assert all(hasattr(rs, name) for name in re.findall(r"\brs\.([A-Za-z_]\w*)", MODELS + PYTHON))
    assert all(
        hasattr(rs, name.partition("(")[0])
        for name in re.findall(r"`(\w+PartitionExecutor(?:\(\w+\))?)`", PYTHON)
    )


def test_the_page_reads_initial_values_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, shedding = np.arange(9, dtype=np.uint8) % 3, np.linspace(0, 1, 9, dtype=np.float32)
    (tmp_path / "people.csv").write_text("state,age\n" + "".join(f"{state},40\n" for state in states))
    np.save(tmp_path / "shedding.npy", shedding)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    names = {"np": np, "__file__": str(tmp_path / "people.py")}
    exec(compile(blocks(MODELS, "python")[1], "files", "exec"), names)  # noqa: S102 (the page's own text)
    model = rs.Model(
        columns=[rs.Column("state", "uint8"), rs.Column("shedding", "float32")],
        phases=[],
        tables=names["tables"],  # type: ignore[arg-type]
        initialise=names["initialise"],  # type: ignore[arg-type]
    )
    store = rs.BoundModel(model, {}, seed=1, agents=9).new_store(2, 7)
    assert np.array_equal(store.column("state"), states[2:7])
    assert np.array_equal(store.column("shedding"), shedding[2:7])


def test_random_starts_of_the_page_do_not_depend_on_the_cut() -> None:
    [call] = re.findall(r"`(rs\.random\.RowRandom\([^`]*)`", MODELS)

    def start(first: int, last: int) -> np.ndarray:
        rows = type("Rows", (), {"start": first, "stop": last, "__len__": lambda _: last - first})()
        made: np.ndarray = eval(call, {"rs": rs, "rows": rows, "seed": 7})  # noqa: S307 (the page's own text)
        return made

    assert np.array_equal(start(0, 9), np.concatenate([start(0, 4), start(4, 9)]))
    assert len(set(start(0, 9))) == 9
