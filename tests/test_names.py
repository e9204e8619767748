"""What arguments of row functions and derived values are bound to, and what is said of one that is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from compare_runs import mpirun, needs_mpirun

import rustsim_hpc as rs
from rustsim_hpc.errors import ModelError

MODEL = """
import numpy as np
import rustsim_hpc as rs


@rs.row_kernel(writes="x")
def place(row, agents):
    return row / agents


@rs.reduction("sum")
def total(x, agents):
    return x * agents


@rs.derive
def mean(total, agents):
    return total / agents


@rs.row_kernel(writes="y")
def keep(mean):
    return mean


def model():
    return rs.Model(
        params={"dt": rs.Param("float32", default=0.01)},
        columns=[rs.Column("x", "float64"), rs.Column("y", "float64")],
        initialise=lambda rows, params, tables, seed: {name: np.zeros(len(rows)) for name in "xy"},
        phases=[place, total, mean, keep],
        outputs=[rs.Series("time.csv", lambda context: [context.time], columns=("t",))],
        step_length=lambda params: params.dt,
        time_unit="s",
    )
"""


def write(folder: Path) -> Path:
    (folder / "counted.py").write_text(MODEL)
    job = folder / "counted.toml"
    job.write_text('[model]\nmodule = "counted.py"\n[run]\nagents = 1000\nsteps = 3\npartitions = 3\n')
    return job


def check(folder: Path) -> None:
    columns = rs.open_run(folder).columns("x", "y")
    assert np.array_equal(columns["x"], np.arange(1000) / 1000)
    assert np.array_equal(columns["y"], np.full(1000, 499.5))


@pytest.mark.parametrize("executor", ["inline", "threads", "processes"])
def test_agents_is_the_size_of_the_whole_population(tmp_path: Path, executor: str) -> None:
    done = rs.run_job(write(tmp_path), out=tmp_path / "run", executor=executor, workers=2)
    check(done.folder)


@needs_mpirun
def test_agents_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    code, _, err = mpirun(2, "run", write(tmp_path), "--out", tmp_path / "run")
    assert code == 0, err
    check(tmp_path / "run")


def test_a_parameter_can_be_the_length_of_a_step(tmp_path: Path) -> None:
    job = write(tmp_path)
    done = rs.run_job(job, out=tmp_path / "run", changes={"params.dt": 0.1})
    run = rs.open_run(done.folder)
    assert run.step_length == 0.1
    assert run.series("time")["t"].tolist() == [0.0, 0.1, 0.2, 3 * 0.1]


def bound(phases: list[object], **fields: object) -> rs.BoundModel:
    model = rs.Model(
        columns=[rs.Column("x", "float64")],
        initialise=lambda rows, params, tables, seed: {"x": np.zeros(len(rows))},
        phases=phases,  # type: ignore[arg-type]
        **fields,  # type: ignore[arg-type]
    )
    made = rs.BoundModel(model, {}, seed=1, agents=4)
    with rs.EngineControlPlane(rs.ColumnarRuntime(made.new_store(0, 4))) as plane:
        plane.add_model(made)
        plane.step_partitions_with_executor(rs.InlinePartitionExecutor())
        assert np.array_equal(plane.runtime.device_store().column("x"), np.full(4, 7.0))
    return made


@rs.row_kernel(writes="x")
def count(agents):
    return agents


def test_a_model_may_use_the_name_agents_itself() -> None:
    bound([count], params={"agents": 7.0})

    @rs.derive
    def agents():
        return 7

    bound([agents, count])
    with pytest.raises(ModelError, match='reads "agents" before'):
        bound([count, agents])


@pytest.mark.parametrize("length", [0, -1.0, "1", None, lambda params: 0.0, lambda params: params.missing])
def test_a_step_has_a_length(length: object) -> None:
    with pytest.raises(ModelError, match="step_length"):
        bound([count], step_length=length)


def test_what_cannot_be_bound_is_told_with_what_can() -> None:
    @rs.row_kernel(writes="x")
    def strange(zzz):
        return zzz

    @rs.derive
    def of_rows(x):
        return x

    with pytest.raises(ModelError, match='argument "zzz"') as caught:
        bound([strange], params={"reach": 1.0})
    assert caught.value.hint == "it may take x, reach, step, row, id, rng, agents"
    with pytest.raises(ModelError, match='takes the column "x"') as caught:
        bound([of_rows])
    assert "@rs.reduction" in str(caught.value.hint)


@pytest.mark.parametrize("line", ["rs.Model(colums=[])", 'rs.Column("x", "float16")', 'rs.reduction("mean")'])
def test_a_mistake_in_a_declaration_has_its_line(tmp_path: Path, line: str) -> None:
    job = write(tmp_path)
    in_model, at_import = f"\ndef model():\n    {line}\n", f"\n\n{line}\n"
    for text, place in ((in_model, "counted.py:4"), (at_import, "counted.py, line 4")):
        (tmp_path / "counted.py").write_text(f"import rustsim_hpc as rs\n{text}")
        with pytest.raises(ModelError) as caught:
            rs.run_job(job, out=tmp_path / "run")
        assert place in f"{caught.value} {caught.value.hint}"


def test_a_bare_decorator_is_told_to_take_arguments(tmp_path: Path) -> None:
    job = write(tmp_path)
    (tmp_path / "counted.py").write_text(
        "import rustsim_hpc as rs\n\n@rs.row_kernel\ndef walk(x):\n    return x\n"
    )
    with pytest.raises(ModelError, match=r"counted\.py, line 3: TypeError") as caught:
        rs.run_job(job, out=tmp_path / "run")
    assert caught.value.hint == 'a decorator of rs takes arguments: @rs.row_kernel(writes="x")'
