"""Running jobs from Python: the command's own way, with errors raised and the process left as it was."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from compare_runs import ROOT, command, needs_mpirun, without_launcher

import rustsim_hpc as rs
from rustsim_hpc.errors import CheckpointFileError, ExecutorError, JobError, RunFolderError
from rustsim_hpc.job.signals import SIGNALS

DRILL = ROOT / "drills" / "drill.toml"
MODEL = """
import signal
import numpy as np
import rustsim_hpc as rs

@rs.column_phase(writes="x", row_local=True)
def ask(context, columns, rows):
    if context.step_index == context.params.interrupted:
        signal.raise_signal(signal.SIGINT)
    columns["x"] += 1

def model():
    return rs.Model(
        params={"interrupted": -1},
        columns=[rs.Column("x", "int64")],
        initialise=lambda rows, params, tables, seed: {"x": np.zeros(len(rows), np.int64)},
        phases=[ask],
    )
"""


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, object]]:
    """A job as nested dicts, in a working directory with its model."""
    monkeypatch.chdir(tmp_path)
    Path("counting.py").write_text(MODEL)
    return {"model": {"module": "counting.py"}, "run": {"agents": 8, "steps": 6}}


def test_a_run_is_that_of_the_command(tmp_path: Path) -> None:
    made = tmp_path / "command"
    assert (
        command("run", DRILL, "--out", made, "--steps=5", "--set=params.noise=0.2", "--no-progress")[0] == 0
    )
    done = rs.run_job(DRILL, out=tmp_path / "call", steps=np.int64(5), changes={"params.noise": 0.2})
    assert isinstance(done, rs.RunSummary)
    assert (done.steps, done.step_index, done.stopped, done.folder) == (5, 5, None, tmp_path / "call")
    assert done.fingerprint == rs.open_run(made).fingerprint
    for name in ("job.toml", "curve.csv", "replay.jsonl"):
        assert (made / name).read_bytes() == (done.folder / name).read_bytes()


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = rs.run_job(str(DRILL), out=tmp_path / "whole", steps=5, record=False)
    part = rs.run_job(DRILL, out=tmp_path / "part", steps=5, time_limit=0, executor="threads", workers=2)
    assert part.stopped is not None
    assert part.step_index < 5
    done = rs.resume_run(part.folder, executor="inline", time_limit="1h")
    assert (done.resumed_from, done.step_index, done.stopped) == (part.step_index, 5, None)
    assert done.fingerprint == whole.fingerprint
    assert not (whole.folder / "replay.jsonl").exists()
    assert rs.resume_run(part.folder, at=3, time_limit=600).fingerprint == whole.fingerprint
    assert rs.resume_run(str(part.folder)).steps == 0
    assert rs.resume_run(part.folder, steps=7, time_limit=600).step_index == 7
    assert rs.resume_run(part.folder).step_index == 7


def test_a_fork_is_that_of_the_command(tmp_path: Path) -> None:
    parent = rs.run_job(DRILL, out=tmp_path / "parent", steps=4, checkpoint_every=2).folder
    made = tmp_path / "command"
    options = ("--at=2", "--steps=6", "--seed=9", "--set=params.noise=0.2", "--no-progress")
    assert command("fork", parent, *options, "--out", made)[0] == 0
    changes = {"params.noise": 0.2}
    done = rs.fork_run(parent, at=2, steps=6, seed=9, changes=changes, out=tmp_path / "call")
    assert (done.steps, done.step_index, done.folder) == (4, 6, tmp_path / "call")
    ours, theirs = rs.open_run(done.folder), rs.open_run(made)
    assert ours.fingerprint == theirs.fingerprint != rs.open_run(parent).fingerprint
    assert ours.record["lineage"] == theirs.record["lineage"]
    assert rs.fork_run(parent, out=tmp_path / "newest", steps=5).steps == 1


def test_an_interrupt_stops_with_a_checkpoint_and_leaves_the_handlers(
    counting: dict[str, dict[str, object]],
) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    done = rs.run_job(counting, out="run", changes={"params.interrupted": 2})
    assert (done.step_index, done.stopped) == (3, "SIGINT")
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert rs.resume_run("run").step_index == 6
    assert rs.open_run("run").columns("x").tolist() == [6] * 8


def test_a_changed_model_is_another_one(counting: dict[str, dict[str, object]]) -> None:
    first = rs.run_job(counting, out="one")
    Path("counting.py").write_text(MODEL.replace("+= 1", "+= 2"))
    second = rs.run_job(counting, out="two")
    assert rs.open_run("two").columns("x").tolist() == [12] * 8
    hashes = [rs.open_run(done.folder).record["model_hash"] for done in (first, second)]
    assert hashes[0] != hashes[1]
    with pytest.raises(CheckpointFileError, match="model source"):
        rs.resume_run("one", steps=7)


def test_threads_that_run_the_same_model_at_once(counting: dict[str, dict[str, object]]) -> None:
    text = Path("counting.py").read_text()
    Path("counting.py").write_text(f"import time\ntime.sleep(0.2)\n{text}")
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda name: rs.run_job(counting, out=name), "abc"))
    assert [one.step_index for one in done] == [6, 6, 6]
    assert len({one.fingerprint for one in done}) == 1


def test_the_watchdog_does_not_end_a_callers_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRILL_PACE", "0.5")
    changes = {"run.watchdog_seconds": 0.1}
    assert rs.run_job(DRILL, out=tmp_path / "run", steps=2, changes=changes).step_index == 2


def test_mistakes_are_raised_and_say_what_is_wrong(
    counting: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, said in [
        ({"agnets": 3}, r'run_job has no option "agnets" \(did you mean "agents"\?\)'),
        ({"json": True}, 'run_job has no option "json"'),
        ({"agents": -3}, "agents: must be an integer ≥ 0, not -3"),
        ({"changes": {"beta": 1}}, '"beta" must be TABLE.KEY'),
        ({"changes": {"run.agnets": 1}}, r'changes\["run.agnets"\]: there is no such key'),
        ({"record": "yes"}, 'record: must be "off" | "record"'),
    ]:
        with pytest.raises(JobError, match=said) as caught:
            rs.run_job(counting, **options)  # type: ignore[arg-type]
        assert caught.value.exit_code == 2
    with pytest.raises(JobError, match=r"job: \[model\]: is missing"):
        rs.run_job({"run": {"agents": 1, "steps": 1}})
    with pytest.raises(JobError, match=r"job: \[run\]: 1 is no name of a table or key"):
        rs.run_job({**counting, "run": {1: 2}})
    with pytest.raises(JobError, match="dry_run"):
        rs.run_job({**counting, "command": {"dry_run": True}})
    for resumed in (rs.resume_run, rs.fork_run):
        with pytest.raises(RunFolderError):
            resumed("nowhere")
    with pytest.raises(JobError, match=r'fork_run has no option "agents"'):
        rs.fork_run("nowhere", agents=3)
    assert not Path("runs").exists()
    monkeypatch.setenv("DRILL_FAULT", "middle:raise:1:0")
    with pytest.raises(ExecutorError) as failed:
        rs.run_job(DRILL, out="failed")
    assert (failed.value.phase, failed.value.step, failed.value.exit_code) == ("middle", 1, 3)
    assert rs.open_run("failed").status == "failed"


@needs_mpirun
def test_ranks_call_together(tmp_path: Path) -> None:
    # A file for each rank: mpirun may mix the lines that two ranks print at the same time.
    code = f"""
import os, pathlib
import rustsim_hpc as rs
done = rs.run_job({str(DRILL)!r}, out={str(tmp_path / "run")!r}, steps=4)
done = rs.resume_run(done.folder, steps=5)
said = pathlib.Path({str(tmp_path)!r}, f"{{os.getpid()}}.said")
said.write_text(f"{{done.fingerprint:#x}} on {{done.ranks}}")
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run(
        ["mpirun", "-n", "2", sys.executable, str(script)],
        cwd=ROOT,
        env={**without_launcher(), "PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    alone = rs.run_job(DRILL, out=tmp_path / "alone", steps=5)
    assert done.returncode == 0, done.stderr
    said = [path.read_text() for path in tmp_path.glob("*.said")]
    assert said == [f"{alone.fingerprint:#x} on 2"] * 2
