"""A job's checkpoints under ranks: what one of them cannot write is known to all before the next step."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from rustsim_hpc.control.control_plane import EngineControlPlane
from rustsim_hpc.errors import CheckpointWriteFailed
from rustsim_hpc.job.launch import run_job
from rustsim_hpc.job.spec import Override, RunOptions, read_job
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.storage import CheckpointWriter, hdf5, list_checkpoints, step_of
from rustsim_hpc.storage.collective import has_parallel_hdf5

pytestmark = pytest.mark.mpi
ROOT = Path(__file__).parents[2]
JOB = f"""
[model]
module = "{ROOT / "drills" / "cost_model.py"}"
[run]
agents = 4000
steps = 6
fuse_steps = 1
[checkpoint]
every = 2
"""


class FailingWriter:
    """Rank `bad` fails in its first write; the others are in the middle of theirs until they hear of it."""

    def __init__(self, team: Team, bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.mine = team.rank == bad
        self.known = threading.Event()
        self.real = EngineControlPlane.step_fused, CheckpointWriter.poll, hdf5.write_at

        # Functions, which become methods of the classes.
        def step(plane: EngineControlPlane, *given: Any) -> Any:
            return self.step(plane, *given)

        def poll(writer: CheckpointWriter, *given: Any, **how: Any) -> Any:
            return self.poll(writer, *given, **how)

        monkeypatch.setattr(EngineControlPlane, "step_fused", step)
        monkeypatch.setattr(CheckpointWriter, "poll", poll)
        monkeypatch.setattr(hdf5, "write_at", self.write_at)

    def step(self, plane: EngineControlPlane, *given: Any) -> Any:
        if plane.runtime.step_index == 2 and self.mine:
            # Only now, in this step, has the writer failed.
            for thread in threading.enumerate():
                if thread.name == "rustsim-checkpoint":
                    thread.join(50)
        made = self.real[0](plane, *given)
        self.steps.append(plane.runtime.step_index)
        return made

    def poll(self, writer: CheckpointWriter, *given: Any, somebody_failed: bool) -> Any:
        if somebody_failed:
            self.known.set()
        return self.real[1](writer, *given, somebody_failed=somebody_failed)

    def write_at(self, *given: Any) -> None:
        if not self.known.is_set():
            if self.mine:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            assert self.known.wait(50)
        self.real[2](*given)


@pytest.mark.parametrize("layout", ["sharded", "single"])
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_rank_that_cannot_write_is_heard_before_the_next_step(
    team: Team, shared_path: Path, layout: str, on_error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "single" and has_parallel_hdf5():
        pytest.skip("parallel HDF5 writes while the steps wait")
    path, out = shared_path / "job.toml", shared_path / "run"
    if team.rank == 0:
        path.write_text(JOB)
    team.barrier()
    set_ = [f"checkpoint.layout={layout}", f"checkpoint.on_error={on_error}"]
    spec, _ = read_job(path, [Override.parse(text) for text in set_], environ={})
    bad = team.size - 1
    failing = FailingWriter(team, bad, monkeypatch)
    options = RunOptions(out=out, progress=False)
    if on_error == "stop":
        with pytest.raises(CheckpointWriteFailed, match=os.strerror(errno.ENOSPC)) as caught:
            run_job(spec, options, team)
        assert caught.value.step == 2
        assert caught.value.rank == (bad if team.size > 1 else None)
        assert failing.steps == [1, 2, 3]
    else:
        assert run_job(spec, options, team).step_index == 6
        assert failing.known.is_set()
    team.barrier()
    kept = [step_of(path) for path in list_checkpoints(out / "checkpoints")]
    assert kept == ([] if on_error == "stop" else [6, 4])
    team.barrier()
