"""What a job says of its checkpoints, and what its checkpoints say of the job."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import pytest
from compare_runs import command, make_run, mpirun, needs_mpirun, write_job

from rustsim_hpc.control.control_plane import EngineControlPlane
from rustsim_hpc.errors import JobError
from rustsim_hpc.job.prepared import storage_options
from rustsim_hpc.job.signals import StopReason, StopRequests
from rustsim_hpc.job.spec import Override, read_job
from rustsim_hpc.proof.fingerprint import ReplayFingerprint
from rustsim_hpc.proof.replay_log import read_replay_log
from rustsim_hpc.run_folder import record
from rustsim_hpc.run_folder.reader import open_run
from rustsim_hpc.storage import CheckpointWriter, StorageOptions, hdf5, list_checkpoints, read_header


def told(folder: Path) -> list[tuple[int, int, str | None]]:
    """Return (step, sequence, label) of a run's checkpoints, oldest first."""
    headers = [read_header(path) for path in reversed(list_checkpoints(folder / "checkpoints"))]
    return [(header.step_index, header.sequence, header.label) for header in headers]


def test_the_jobs_keys_are_the_storages(tmp_path: Path) -> None:
    given = {
        "layout": '"sharded"',
        "shards": '"node"',
        "compression": '"gzip"',
        "compression_columns": '["x", "ids"]',
        "chunk_rows": "1000",
        "alignment": "4194304",
        "hints": '{ romio_cb_write = "enable" }',
        "keep": "7",
        "keep_every": "50",
    }
    overrides = [Override.parse(f"checkpoint.{key}={value}") for key, value in given.items()]
    spec, _ = read_job(write_job(tmp_path), overrides, environ={})
    assert storage_options(spec) == StorageOptions(
        "sharded", {"x": "gzip", "ids": "gzip"}, 1000, 4194304, 7, 50, {"romio_cb_write": "enable"}, "node"
    )
    plain, _ = read_job(write_job(tmp_path), environ={})
    assert storage_options(plain) == StorageOptions(keep=3)


def test_a_time_alone_makes_checkpoints(tmp_path: Path) -> None:
    often = make_run(tmp_path / "often", "--set=checkpoint.min_seconds=1e-9")
    assert [step for step, _, _ in told(often)] == list(range(1, 11))
    never = make_run(tmp_path / "never", "--set=checkpoint.min_seconds=1e9")
    assert [step for step, _, _ in told(never)] == [10]


def test_columns_are_compressed_and_aligned_as_the_job_says(tmp_path: Path) -> None:
    options = ("--agents=20000", "--set=checkpoint.alignment=65536", "--set=checkpoint.compression=gzip")
    folder = make_run(tmp_path / "run", *options, '--set=checkpoint.compression_columns=["x"]')
    with h5py.File(folder / "checkpoints" / "step_0000000010.h5") as file:
        assert [file[f"columns/{name}"].compression for name in ("x", "v", "n")] == ["gzip", None, None]
        assert file["columns/v"].id.get_offset() % 65536 == 0


def test_columns_that_are_not_there_and_wide_gaps_are_refused(tmp_path: Path) -> None:
    for given, text in (
        ('compression_columns=["xx"]', 'there is no column "xx" (did you mean "x"?)'),
        (f"alignment={1 << 27}", "must be an integer from 1 to 67108864"),
    ):
        code, _, err = command("run", write_job(tmp_path), f"--set=checkpoint.{given}", "--dry-run")
        assert code == 2
        assert text in err
    with pytest.raises(JobError, match="at most 67108864"):
        StorageOptions(alignment=1 << 27)


def test_a_wrong_step_to_go_on_from_changes_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "--steps=4", "--checkpoint-every=2")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _, err = command("resume", folder, "--at=3", "--no-progress")
    assert code == 5
    assert "there is no checkpoint of step 3\nhint: there are steps 2, 4" in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_numbers_go_on_and_labels_say_why(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "--steps=5", "--checkpoint-every=2")
    assert told(folder) == [(2, 1, None), (4, 2, None), (5, 3, "end")]
    assert command("resume", folder, "--steps=8", "--no-progress")[0] == 0
    assert told(folder)[3:] == [(6, 4, None), (8, 5, None)]
    assert command("resume", folder, "--at=4", "--steps=6", "--no-progress")[0] == 0
    assert told(folder) == [(2, 1, None), (4, 2, None), (6, 6, None)]
    assert command("fork", folder, "--at=4", "--set=params.dt=0.2", "--out", tmp_path / "fork")[0] == 0
    assert told(tmp_path / "fork")[0] == (4, 1, "fork")


@needs_mpirun
@pytest.mark.parametrize("scheme", ["digest", "fnv1a"])
def test_no_step_waits_for_the_fingerprint_of_a_checkpoint(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where steps are not recorded the writer makes it, of its copy: the one that a record would have."""
    how = ("--steps=7", "--checkpoint-every=2", f"--fingerprint={scheme}", "--no-progress")
    recorded = make_run(tmp_path / "recorded", *how)
    asked: list[int] = []
    real = EngineControlPlane.fingerprint

    def fingerprint(self: EngineControlPlane) -> ReplayFingerprint:
        asked.append(self.runtime.step_index)
        return real(self)

    monkeypatch.setattr(EngineControlPlane, "fingerprint", fingerprint)
    plain = tmp_path / "plain"
    keep = "--set=checkpoint.keep=99"
    code, _, err = command("run", write_job(tmp_path), *how, keep, "--executor=inline", "--out", plain)
    assert code == 0, err
    # At the end, for the summary.
    assert asked == [7]
    values = [read_header(path).fingerprint for path in list_checkpoints(plain / "checkpoints")]
    assert [value.step_index for value in values] == [7, 6, 4, 2]
    assert values == [read_header(path).fingerprint for path in list_checkpoints(recorded / "checkpoints")]
    log = read_replay_log(recorded / "replay.jsonl").entries
    assert values == [log[step - 1] for step in (7, 6, 4, 2)]


@needs_mpirun
@pytest.mark.parametrize("scheme", ["digest", "fnv1a"])
def test_ranks_agree_on_the_fingerprint_of_a_checkpoint(tmp_path: Path, scheme: str) -> None:
    how = ("--steps=4", "--checkpoint-every=2", f"--fingerprint={scheme}")
    alone = make_run(tmp_path / "alone", *how)
    ranks = tmp_path / "ranks"
    mpirun(2, "run", write_job(tmp_path), *how, "--executor=inline", "--no-progress", "--out", ranks)
    kept = [list_checkpoints(folder / "checkpoints") for folder in (alone, ranks)]
    one, two = ([read_header(path).fingerprint for path in paths] for paths in kept)
    assert one == two
    assert len(one) == 2
    assert command("inspect", ranks)[0] == 0


def test_room_for_the_copy_is_there_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(CheckpointWriter, "_room_for", none)
    how = ("--steps=3", "--no-progress", "--set=run.fuse_steps=1")
    code, _, err = command("run", write_job(tmp_path), *how, "--checkpoint-every=2", "--out", tmp_path / "a")
    assert (code, "not enough memory for a checkpoint" in err) == (5, True), err
    assert not list_checkpoints(tmp_path / "a" / "checkpoints")
    # Where none is due behind a step, none is needed.
    code, _, err = command("run", write_job(tmp_path), *how, "--checkpoint-every=4", "--out", tmp_path / "b")
    assert code == 0, err
    assert told(tmp_path / "b") == [(3, 1, "end")]


def test_what_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    for how, why in (
        (["layout=single"], "single file of several ranks need parallel HDF5"),
        (["layout=sharded", "shards=node"], "compressed columns need a shard for each rank"),
    ):
        options = [f"--set=checkpoint.{word}" for word in (*how, "compression=gzip")]
        code, _, err = mpirun(2, "run", job, *options, "--out", tmp_path / "run")
        assert (code, err.count("Error:")) == (2, 1), err
        assert why in err
        assert not (tmp_path / "run").exists()


@needs_mpirun
def test_ranks_of_a_machine_write_one_shard(tmp_path: Path) -> None:
    job, alone = write_job(tmp_path), make_run(tmp_path / "alone")
    code, out, err = mpirun(
        3, "run", job, "--record", "--set=checkpoint.shards=node", "--out", tmp_path / "ranks"
    )
    assert code == 0, out + err
    checkpoints = tmp_path / "ranks" / "checkpoints"
    [shard] = checkpoints.glob("*.shards-*/*")
    assert shard.name == "node_00000.h5"
    [path] = list_checkpoints(checkpoints)
    assert (
        read_header(path).fingerprint == read_header(list_checkpoints(alone / "checkpoints")[0]).fingerprint
    )
    assert command("inspect", path)[0] == 0


def test_a_stop_that_could_not_be_saved_is_not_called_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    # Asked to stop from the first step on.
    monkeypatch.setattr(StopRequests, "stop_requested", lambda self: StopReason("signal", "SIGTERM"))
    folder, how = tmp_path / "run", ("--steps=9", "--no-progress", "--set=checkpoint.on_error=continue")
    with monkeypatch.context() as patch:
        patch.setattr(hdf5, "write_at", full)
        code, _, err = command("run", write_job(tmp_path), *how, "--set=run.fuse_steps=1", "--out", folder)
    assert code == 5, err
    assert "warning:" in err
    assert "the run was stopped at step 1, and that step could not be saved" in err
    assert command("resume", folder, "--no-progress")[0] == 75
    assert told(folder) == [(1, 1, "stopped: SIGTERM")]


def test_a_checkpoint_that_fails_behind_a_step_ends_the_run_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = threading.Event()

    def full(*arguments: object) -> int:
        refused.set()
        raise OSError(28, "No space left on device")

    steps: list[int] = []
    real = EngineControlPlane.step_fused

    def step(self: EngineControlPlane, *arguments: Any) -> Any:
        made = real(self, *arguments)
        steps.append(self.runtime.step_index)
        if steps[-1] == 3:  # by the end of this step the writer has failed
            assert refused.wait(60)
            time.sleep(0.5)
        return made

    monkeypatch.setattr(EngineControlPlane, "step_fused", step)
    monkeypatch.setattr(hdf5, "write_at", full)
    options = ("--checkpoint-every=2", "--set=run.fuse_steps=1", "--no-progress")
    code, _, err = command("run", write_job(tmp_path), *options, "--out", tmp_path / "run")
    assert (code, steps) == (5, [1, 2, 3]), err
    assert "No space left on device" in err


def test_clocks_and_times_of_files_that_go_back_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run(tmp_path / "whole", "--steps=9")
    year = itertools.count(2090, -1)
    monkeypatch.setattr(record, "now", lambda: f"{next(year)}-01-01T00:00:00.000+00:00")
    monkeypatch.setattr(time, "time", lambda: float(next(year)))
    folder = make_run(tmp_path / "run", "--steps=4", "--checkpoint-every=2", "--time-limit=10m")
    for age, path in enumerate(sorted((folder / "checkpoints").iterdir())):
        os.utime(path, (10**9 - age, 10**9 - age))  # the newest checkpoint is the oldest file
    for path in (folder / "run.json", folder / "replay.jsonl", folder / ".lock"):
        os.utime(path, (4 * 10**9, 4 * 10**9))
    code, _, err = command("resume", folder, "--steps=9", "--no-progress")
    assert code == 0, err
    run, same = open_run(folder), open_run(whole)
    assert run.record["sessions"][-1]["resumed_from"] == 4
    assert (run.status, run.fingerprint) == ("done", same.fingerprint)
    assert run.record["ended"] < run.record["started"]
    assert sorted(run.checkpoints()) == [2, 4, 6, 8, 9]
    assert run.replay().entries == same.replay().entries
    assert command("inspect", folder)[0] == 0
    assert command("verify", folder, "--against", whole, "--no-progress")[0] == 0
