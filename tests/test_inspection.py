"""Looking at runs, checkpoints and logs: what is whole proves itself; what is not is told, whatever it is."""

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rustsim_hpc.errors import JobError, RunFolderError
from rustsim_hpc.job.launch import fork_run, run_job
from rustsim_hpc.job.spec import Override, RunOptions, read_folder_job, read_job
from rustsim_hpc.ranks.team import SoloTeam
from rustsim_hpc.run_folder.inspection import Inspection, inspect_path
from rustsim_hpc.run_folder.reader import open_run

JOB = Path(__file__).parents[1] / "jobs" / "particles.toml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    sets = [
        Override.parse("run.agents=40"),
        Override.parse("run.steps=6"),
        Override.parse("checkpoint.every=3"),
        Override.parse("replay.mode=record"),
    ]
    spec, _ = read_job(JOB, sets, environ={})
    run_job(spec, RunOptions(out=folder, progress=False), SoloTeam())
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step_0000000006.h5"


def test_whole_run(run: Path) -> None:
    found = inspect_path(run)
    assert (found.kind, found.problems, found.exit_code) == ("run", (), 0)
    assert (found.facts["name"], found.facts["status"], found.facts["step_index"]) == ("particles", "done", 6)
    assert list(found.facts["checkpoints"]) == ["step_0000000003.h5", "step_0000000006.h5"]
    assert found.facts["replay"] == "6 entries, digest"
    assert json.loads(json.dumps(found.to_dict()))["proved"] is True
    assert "everything here is valid" in found.text()


@pytest.mark.parametrize("name", ["a" * 5000, "/".join(["b" * 250] * 20), "c\udcff"])
def test_names_that_no_file_can_have(name: str) -> None:
    for look in (inspect_path, open_run, read_folder_job):
        with pytest.raises(RunFolderError):
            look(Path(name))
    with pytest.raises(JobError):
        read_job(Path(name))


def test_parts_of_a_run(run: Path) -> None:
    by_file = inspect_path(checkpoint(run))
    assert (by_file.kind, by_file.exit_code, by_file.facts["rows"]) == ("checkpoint", 0, 40)
    proof = inspect_path(checkpoint(run).with_suffix(".proof.json"))
    assert proof == by_file
    log = inspect_path(run / "replay.jsonl")
    assert (log.kind, log.exit_code, log.facts["entries"]) == ("replay log", 0, 6)
    assert log.facts["last"]["value"] == by_file.facts["fingerprint"]
    folder = inspect_path(run / "checkpoints")
    assert (folder.kind, folder.exit_code, len(folder.facts["checkpoints"])) == (
        "folder of checkpoints",
        0,
        2,
    )


def test_flipped_and_cut_checkpoint(run: Path) -> None:
    path = checkpoint(run)
    whole = path.read_bytes()
    for data in (whole[:-1], whole[: len(whole) // 2], b"", whole[:1000] + b"\0\1" + whole[1002:]):
        path.write_bytes(data)
        assert inspect_path(path).exit_code == 5
        found = inspect_path(run)
        assert found.exit_code == 5
        assert found.facts["checkpoints"][path.name] == "damaged"
        assert found.facts["checkpoints"]["step_0000000003.h5"] != "damaged"
    path.unlink()
    assert inspect_path(path.with_suffix(".proof.json")).exit_code == 5


def test_log_of_another_run(run: Path) -> None:
    """Each part proves itself, and still they do not belong together."""
    sets = [Override.parse(f"run.{key}") for key in ("agents=40", "steps=6")]
    sets += [Override.parse("replay.mode=record"), Override.parse("params.dt=0.2")]
    spec, _ = read_job(JOB, sets, environ={})
    run_job(spec, RunOptions(out=run.with_name("other"), progress=False), SoloTeam())
    shutil.copy(run.with_name("other") / "replay.jsonl", run / "replay.jsonl")
    found = inspect_path(run)
    assert found.exit_code == 5
    assert any("step 6" in problem and "replay.jsonl" in problem for problem in found.problems)


def test_lineage_is_a_tree(run: Path) -> None:
    spec, _ = read_job(run / "job.toml", [Override.parse("params.dt=0.2")], environ={})
    child, grandchild = run.with_name("child"), run.with_name("grandchild")
    fork_run(run, spec, RunOptions(out=child, progress=False), SoloTeam(), at=3)
    fork_run(child, spec, RunOptions(out=grandchild, progress=False), SoloTeam(), at=None)
    [parent, first] = inspect_path(grandchild).facts["lineage"]
    assert (parent["parent"], parent["step"], parent["changes"]) == (str(child), 6, {})
    assert (first["parent"], first["step"]) == (str(run), 3)
    assert first["changes"] == {"params.dt": [pytest.approx(0.1, rel=1e-6), 0.2]}
    text = inspect_path(grandchild).text()
    assert f"    └─ from {child} at step 6" in text
    assert f"       └─ from {run} at step 3" in text
    shutil.rmtree(child)
    assert len(inspect_path(grandchild).facts["lineage"]) == 1
    record = json.loads((grandchild / "run.json").read_text())
    for lineage in ({}, {"parent": 3}, [], "x", {**record["lineage"], "changes": {"a": 1}}):
        (grandchild / "run.json").write_text(json.dumps({**record, "lineage": lineage}))
        found = inspect_path(grandchild)
        assert found.exit_code == (0 if lineage == {} else 5)
        assert found.text()


def test_whatever_the_bytes(run: Path) -> None:
    """Flipped, cut and foreign bytes in any file of a run: always an answer, never an exception."""
    dice = random.Random(5)
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size]
    for path in files:
        whole = path.read_bytes()
        broken = [
            whole[: dice.randrange(len(whole))],
            dice.randbytes(len(whole)),
            b"\x89HDF\r\n\x1a\n",
            b"{}",
            b"\xff",
        ]
        for _ in range(6):
            place = dice.randrange(len(whole))
            broken.append(
                whole[:place] + bytes([whole[place] ^ (1 << dice.randrange(8))]) + whole[place + 1 :]
            )
        for data in broken:
            path.write_bytes(data)
            for target in (run, path):
                found = inspect_path(target)
                assert isinstance(found, Inspection)
                assert found.exit_code in (0, 5)
                json.dumps(found.to_dict())
                found.text()
        path.write_bytes(whole)
    assert inspect_path(run).exit_code == 0


@pytest.mark.parametrize("name", ["job.toml", "run.json", "replay.jsonl", "outputs.json"])
def test_a_pipe_is_not_waited_for(run: Path, name: str) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    for path in (run, run / name):
        found = inspect_path(path)
        assert found.exit_code == 5
        assert "is not a file" in found.problems[0]


def test_nothing_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no such file"):
        inspect_path(tmp_path / "none")
    with pytest.raises(RunFolderError, match="neither a run's folder"):
        inspect_path(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert inspect_path(tmp_path / "notes.txt").exit_code == 5


HOSTILE = [
    None,
    True,
    -1,
    7,
    1e308,
    10**400,
    float("nan"),
    "\x1b[31m\n\0",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    "deep",
]


def changes(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value of a JSON document."""
    yield at
    if isinstance(document, dict | list):
        children = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in children:
            yield from changes(value, (*at, key))


def changed(document: Any, at: tuple[Any, ...], value: Any) -> str:
    """Return the document's text with another value at a path."""
    copy = [json.loads(json.dumps(document))]
    place: Any = copy
    for key in (*(0, *at)[:-1],):
        place = place[key]
    place[(0, *at)[-1]] = value
    return json.dumps(copy[0]).replace('"deep"', "[" * 100_000 + "]" * 100_000)


@pytest.mark.parametrize("name", ["run.json", "outputs.json", "metrics.jsonl", "replay.jsonl"])
def test_whatever_a_json_file_of_a_run_has_is_told_in_harmless_lines(run: Path, name: str) -> None:
    shutil.rmtree(run / "checkpoints")
    path, rng = run / name, random.Random(7)
    line, *lines = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
    document = json.loads(line)
    places = list(changes(document))
    for at, value in [((), value) for value in HOSTILE] + [
        (rng.choice(places), rng.choice(HOSTILE)) for _ in range(150)
    ]:
        path.write_text("\n".join([changed(document, at, value), *lines, ""]))
        found = inspect_path(run)
        text = found.text()
        assert all(c.isprintable() or c == "\n" for c in text), text
        internal = [p for p in found.problems if re.search("(Type|Key|Attribute|Index)Error", p)]
        assert not internal, (at, value)
        if not at:
            assert found.exit_code == 5, (value, text)


def test_a_job_file_that_cannot_be_run_again_is_told(run: Path) -> None:
    job = run / "job.toml"
    text = job.read_text()
    for damage in (text.replace("agents = 40", "agents = -1"), "[" * 5000, text + "[mod"):
        job.write_text(damage)
        assert inspect_path(run).exit_code == 5
    job.write_text(text)
    assert inspect_path(run).exit_code == 0


def test_a_log_of_another_run_or_without_its_entries_is_told(run: Path) -> None:
    log = run / "replay.jsonl"
    head, *lines = log.read_text().splitlines(keepends=True)
    for damage, said in (
        ([head.replace('"seed": ', '"seed": 9'), *lines], "is of another run: seed 9"),
        ([head, *lines[1:]], "lacks step 1"),
        ([head, *lines[:2], *lines[3:]], "lacks step 3"),
        ([head, *lines[:-1]], "lacks step 6"),
        ([head, *lines[:-1], lines[-1][:20]], "lacks step 6"),
    ):
        log.write_text("".join(damage))
        assert any(said in problem for problem in inspect_path(run).problems), said
    log.write_text("".join([head, *lines[:2], *lines[3:]]))
    assert inspect_path(log).problems == (f"{log} lacks step 3",)


def test_a_series_of_a_finished_run_has_a_row_for_each_due_step(tmp_path: Path) -> None:
    sets = [
        Override.parse("run.agents=8"),
        Override.parse("run.steps=3"),
        Override.parse("run.executor='inline'"),
    ]
    spec, _ = read_job(JOB.with_name("random_walk.toml"), sets, environ={})
    folder = tmp_path / "run"
    run_job(spec, RunOptions(out=folder, progress=False), SoloTeam())
    assert inspect_path(folder).problems == ()
    lines = (folder / "spread.csv").read_text().splitlines(keepends=True)
    for rows in (lines[:2] + lines[3:], [*lines, lines[-1]]):
        (folder / "spread.csv").write_text("".join(rows))
        [problem] = inspect_path(folder).problems
        assert problem.endswith(f"has {len(rows) - 1} rows, expected 4")
    (folder / "spread.csv").unlink()
    assert inspect_path(folder).exit_code == 5
