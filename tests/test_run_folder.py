"""A run's folder: who may have it, what is in it, and reading it while it is written."""

from __future__ import annotations

import json
import os
import pickle
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rustsim_hpc.control.metrics import EngineMetrics
from rustsim_hpc.errors import CheckpointFileError, OutputError, PartitionExecution, RunFolderError
from rustsim_hpc.files import (
    AppendFile,
    NotAFileError,
    keep_lines,
    read_bytes,
    require_regular,
    sweep_temporary,
    temporary_path,
    whole_lines,
    write_atomic,
)
from rustsim_hpc.modeling.outputs import Arrays, Sample, Series
from rustsim_hpc.proof.fingerprint import StateView, fingerprint_checkpoint
from rustsim_hpc.ranks.team import SoloTeam
from rustsim_hpc.run_folder import environment, lock
from rustsim_hpc.run_folder import folder as run_folder
from rustsim_hpc.run_folder.crash import write_crash_bundle
from rustsim_hpc.run_folder.folder import RunFolder, fresh_folder
from rustsim_hpc.run_folder.lock import FolderLock, is_locked, read_holder
from rustsim_hpc.run_folder.metrics_log import MetricsLog, read_metrics
from rustsim_hpc.run_folder.output_set import OutputSet
from rustsim_hpc.run_folder.reader import open_run
from rustsim_hpc.run_folder.record import RunFacts, read_record
from rustsim_hpc.state.columns import DeviceSoaCheckpoint
from rustsim_hpc.state.partition import PartitionId
from rustsim_hpc.state.schema import Column, Schema
from rustsim_hpc.storage import CheckpointHeader, write_checkpoint

ROOT = Path(__file__).parents[1]
FACTS = RunFacts(
    job="flock", seed=7, agents=10, steps=20, params={"dt": 0.5}, model="flock.py", model_hash="ab" * 32
)
JOB = '[model]\nmodule = "flock.py"\n[params]\ndt = 0.5\n[run]\nagents = 10\nsteps = 20\nseed = 7\n'


def create(path: Path, **options: Any) -> RunFolder:
    return RunFolder.create(path, JOB, FACTS, SoloTeam(), **{"wait_seconds": 0.2, **options})


def reopen(path: Path, **options: Any) -> RunFolder:
    return RunFolder.reopen(path, FACTS, SoloTeam(), **{"wait_seconds": 0.2, **options})


# --- files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def broken(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="No space"):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]  # noqa: PTH208 (hidden names, too)
    os.umask(mask := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_device_or_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotAFileError):
        write_atomic(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]  # noqa: PTH208 (hidden names, too)


def test_temporary_files_are_swept_and_others_are_not(tmp_path: Path) -> None:
    left = temporary_path(tmp_path / "a.h5")
    left.write_text("half")
    keep = [tmp_path / name for name in (".hidden", "a.h5", "b.rustsim-tmp")]
    for path in keep:
        path.write_text("x")
    assert sweep_temporary(tmp_path) == [left]
    assert sorted(tmp_path.iterdir()) == sorted(keep)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe, zeros = tmp_path / "pipe", tmp_path / "zeros"
    os.mkfifo(pipe)
    zeros.symlink_to("/dev/zero")
    for path in (pipe, zeros):
        for open_it in (read_bytes, require_regular, AppendFile, lambda p: list(whole_lines(p))):
            with pytest.raises(NotAFileError, match="it is not a regular file") as caught:
                open_it(path)
            copy = pickle.loads(pickle.dumps(caught.value))
            assert (type(copy), str(copy)) == (NotAFileError, str(caught.value))
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)


def test_a_record_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = AppendFile(tmp_path / "log")
    file.append(b"one\n")
    original = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) == 1:
            raise OSError(28, "No space left on device")
        return original(descriptor, data[:1])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            file.append(b"two\n")
    assert (tmp_path / "log").read_bytes() == b"one\n"
    file.append(b"thr", b"ee\n")
    file.sync()
    file.close()
    file.close()
    assert list(whole_lines(tmp_path / "log")) == [b"one", b"three"]


@pytest.mark.parametrize("tail", [b"", b"torn", b"four\nfive\ntorn"])
def test_lines_are_cut(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\nthree\n" + tail)
    before = path.stat().st_ino
    keep_lines(path, 3)
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    assert (path.stat().st_ino == before) == (tail == b""), "a file that is right is not touched"
    keep_lines(path, 1)
    assert path.read_bytes() == b"one\n"
    keep_lines(path, 0)
    assert path.read_bytes() == b""


# --- lock

HOLD = """
import sys, time, os, subprocess
from pathlib import Path
from rustsim_hpc.proof.fingerprint import StateView, fingerprint_checkpoint
from rustsim_hpc.run_folder.lock import FolderLock
lock = FolderLock.claim(Path(sys.argv[1]), 0.1)
if sys.argv[2:] == ["worker"]:
    # A worker inherits the lock, and outlives its parent.
    worker = subprocess.Popen(["sleep", "60"], pass_fds=lock.descriptors, stdout=subprocess.DEVNULL)
    print(worker.pid, flush=True)
elif sys.argv[2:] == ["other"]:
    other = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    print(other.pid, flush=True)
else:
    print(lock.token, flush=True)
time.sleep(60)
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def start(processes: list[subprocess.Popen[str]], code: str, *arguments: object) -> str:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    processes.append(process)
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_second_claim_waits_and_is_refused(tmp_path: Path) -> None:
    first = FolderLock.claim(tmp_path)
    assert is_locked(tmp_path)
    begin = time.monotonic()
    with pytest.raises(RunFolderError, match=rf"in use by process {os.getpid()} on ") as caught:
        FolderLock.claim(tmp_path, 0.3)
    assert 0.3 <= time.monotonic() - begin < 5
    assert caught.value.exit_code == 2
    assert "--out" in str(caught.value.hint)
    threading.Timer(0.3, first.release).start()
    second = FolderLock.claim(tmp_path, 10)
    assert second.token != first.token
    second.release()
    assert not is_locked(tmp_path)


def test_the_lock_ends_with_its_process(tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    start(processes, HOLD, tmp_path)
    with pytest.raises(RunFolderError, match=f"process {processes[0].pid}"):
        FolderLock.claim(tmp_path, 0.1)
    processes[0].kill()
    FolderLock.claim(tmp_path, 5).release()


def test_a_process_that_a_model_forks_holds_no_lock(tmp_path: Path) -> None:
    hold = FolderLock.claim(tmp_path)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.close(done[1])
        os.read(done[0], 1)
        os._exit(0)
    assert os.read(ready[0], 1) == b"x"
    assert is_locked(tmp_path)
    hold.release()
    assert not is_locked(tmp_path)
    for end in (*ready, *done):
        os.close(end)
    os.waitpid(child, 0)


def test_a_worker_holds_the_lock_when_its_rank_is_dead(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    worker = int(start(processes, HOLD, tmp_path, "worker"))
    try:
        processes[0].kill()
        processes[0].wait()
        with pytest.raises(RunFolderError, match="in use"):
            FolderLock.claim(tmp_path, 0.2)
        assert is_locked(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
    FolderLock.claim(tmp_path, 5).release()


def test_a_child_that_is_no_worker_does_not_hold_it(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    child = int(start(processes, HOLD, tmp_path, "other"))
    try:
        processes[0].kill()
        FolderLock.claim(tmp_path, 5).release()
    finally:
        os.kill(child, signal.SIGKILL)


JOIN = """
import sys, time
from pathlib import Path
from rustsim_hpc.proof.fingerprint import StateView, fingerprint_checkpoint
from rustsim_hpc.run_folder.lock import FolderLock
from rustsim_hpc.errors import RunFolderError
try:
    lock = FolderLock.join(Path(sys.argv[1]), sys.argv[2], 0.2)
    print("joined", flush=True)
    time.sleep(60)
except RunFolderError as error:
    print("refused:", error, flush=True)
"""


def test_any_rank_that_is_left_keeps_a_newcomer_out(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    token = start(processes, HOLD, tmp_path)
    assert start(processes, JOIN, tmp_path, token) == "joined"
    assert start(processes, JOIN, tmp_path, token) == "joined"
    for process in processes:
        with pytest.raises(RunFolderError, match="in use"):
            FolderLock.claim(tmp_path, 0.1)
        assert is_locked(tmp_path)
        process.kill()
        process.wait()
    newcomer = FolderLock.claim(tmp_path, 5)
    assert "refused: the folder" in start(processes, JOIN, tmp_path, token), "a rank of the run before"
    assert start(processes, JOIN, tmp_path, newcomer.token) == "joined"
    newcomer.release()


def test_of_many_that_claim_at_once_one_gets_the_folder(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    code = HOLD.replace("0.1)", "0)")
    processes += [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    deadline = time.monotonic() + 30
    while sum(process.poll() is None for process in processes) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    alive = [process for process in processes if process.poll() is None]
    assert len(alive) == 1
    for process in processes:
        assert process.stderr is not None
        if process is not alive[0]:
            assert "in use by" in process.stderr.read()
        process.stderr.close()
    assert alive[0].stdout is not None
    assert read_holder(tmp_path)["token"] == alive[0].stdout.readline().strip()


def test_a_lock_on_a_folder_that_was_replaced_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    old = FolderLock.claim(folder)
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    new = FolderLock.claim(folder, 0.1)
    assert is_locked(folder)
    old.release()
    assert is_locked(folder)
    new.release()


def test_without_file_locks_a_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(descriptor: int, kind: int) -> None:
        raise OSError(lock.errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    FolderLock.claim(tmp_path, 0.1).release()
    assert "no file locks in" in capsys.readouterr().err


# --- the folder


def test_a_new_folder_has_its_job_and_its_record(tmp_path: Path) -> None:
    folder = create(tmp_path / "a" / "b")
    assert (folder.path / "job.toml").read_text() == JOB
    assert folder.checkpoints.is_dir()
    record = read_record(folder.path)
    assert record["status"] == "running"
    assert record["model_hash"] == "ab" * 32
    assert (record["seed"], record["ranks"], record["lineage"]) == (7, 1, None)
    assert record["versions"]["numpy"] == np.__version__
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["hosts"][0]["ranks"] == [0]
    assert record["cpu_models"] == [environment.cpu_model()]
    assert record["libm"]
    folder.finish("done", exit_code=0, step_index=20, fingerprint=0xAB)
    folder.release()
    record = read_record(folder.path)
    assert (record["status"], record["fingerprint"]) == ("done", "0x00000000000000ab")
    assert record["ended"] >= record["started"]
    again = reopen(folder.path)
    again.update(session={"resumed_from": 20})
    again.finish("stopped", exit_code=75, step_index=25, reason="SIGTERM")
    again.release()
    record = read_record(folder.path)
    assert [(s["status"], s["resumed_from"]) for s in record["sessions"]] == [("done", None), ("stopped", 20)]
    assert record["sessions"][1]["reason"] == "SIGTERM"
    assert record["run_id"] == folder.record["run_id"]


def test_a_folder_that_is_not_empty_is_refused_and_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="is not empty") as caught:
        create(tmp_path)
    assert caught.value.exit_code == 2
    assert "--force" in str(caught.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_force_removes_what_the_run_before_left_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run"
    folder = create(path)
    outputs = OutputSet(
        [Series("old.csv", lambda c: [1], ("a",)), Arrays("old.h5", {"n": lambda c: 1})], path
    )
    outputs.open()
    outputs.record(0, 0.0, None)
    (folder.checkpoints / "step_0000000010.h5").write_text("old")
    (folder.checkpoints / "step_0000000010.shards-ab").mkdir()
    folder.replay_log.write_text("old")
    MetricsLog(path).append(EngineMetrics())
    write_crash_bundle(path, rank=0)
    (path / "notes.txt").write_text("mine")
    (path / "sub").mkdir()
    with pytest.raises(RunFolderError, match="in use"):
        create(path, force=True)
    with pytest.raises(RunFolderError, match="in use"):
        create(path)
    assert (path / "old.csv").exists()
    folder.release()
    with pytest.raises(RunFolderError, match="not empty"):
        create(path)
    create(path, force=True).release()
    names = sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))
    assert names == [
        ".lock",
        ".lock.ranks",
        "checkpoints",
        "crash",
        "job.toml",
        "notes.txt",
        "run.json",
        "sub",
    ]
    assert len(read_record(path)["sessions"]) == 1


def test_force_does_not_overwrite_a_job_file_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("the user's own")
    with pytest.raises(RunFolderError, match=r"is no run's folder, but has job\.toml"):
        create(tmp_path, force=True)
    assert (tmp_path / "job.toml").read_text() == "the user's own"
    (tmp_path / "job.toml").rename(tmp_path / "flock.toml")
    create(tmp_path, force=True).release()
    assert (tmp_path / "flock.toml").read_text() == "the user's own"


def test_force_does_not_leave_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "run"
    create(path).release()
    (tmp_path / "precious").write_text("x")
    entries = [{"file": "../precious"}, {"file": str(tmp_path / "precious")}]
    (path / "outputs.json").write_text(json.dumps({"outputs": entries}))
    create(path, force=True).release()
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize("name", ["a-file", "a-file/run", "/proc/rustsim"])
def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "a-file").write_text("x")
    with pytest.raises(RunFolderError, match=r"not a folder|cannot use the folder") as caught:
        create(tmp_path / name)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_only_a_runs_folder_is_reopened(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"has no job\.toml"):
        reopen(tmp_path)
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "run"
    create(path).release()
    for damage, text in [
        ("{", "is damaged"),
        ("[]", "not the record"),
        ('{"format": "rustsim-hpc run", "version": 99}', "version 99"),
        ('{"format": "rustsim-hpc run", "version": 1, "steps": "x"}', 'damaged: steps is "x"'),
        ('{"format": "rustsim-hpc run", "version": 1, "sessions": [7]}', "damaged: sessions are not"),
        ('{"format": "rustsim-hpc run", "version": 1, "sessions": [{"hosts": 1}]}', "hosts are not a list"),
        ('{"format": "rustsim-hpc run", "version": 1, "hosts": [{"libm": 1}]}', "hosts are not a list"),
        ("[" * 100_000, "nested too deeply"),
    ]:
        (path / "run.json").write_text(damage)
        with pytest.raises(RunFolderError, match=text):
            reopen(path)
        assert not is_locked(path)
    (path / "run.json").unlink()
    reopen(path).release()
    assert read_record(path)["status"] == "running", "killed between job.toml and run.json"


def test_fresh_folders_never_collide(tmp_path: Path) -> None:
    paths = [fresh_folder("flock", tmp_path / "runs") for _ in range(3)]
    assert len(set(paths)) == 3
    assert all(path.is_dir() and path.name.startswith("flock-2") for path in paths)
    assert fresh_folder("a/b\0", tmp_path / "runs").name.startswith("a_b_-2")
    create(paths[0]).release()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot use the folder"):
        fresh_folder("flock", tmp_path / "file")


def test_a_record_that_cannot_be_written_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = create(tmp_path / "run")

    def full(path: Path, record: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_record", full)
    with pytest.raises(OutputError, match="No space left on device"):
        folder.update(step_index=3)
    folder.release()
    assert read_record(folder.path).get("step_index") is None


class FakeTeam(SoloTeam):
    """One of several ranks in threads."""

    def __init__(self, rank: int, size: int, meet: threading.Barrier, board: dict[int, Any]) -> None:
        super().__init__()
        self.rank, self.size, self._meet, self._board = rank, size, meet, board

    def allgather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._meet.wait(10)
        values = [self._board[rank] for rank in range(self.size)]
        self._meet.wait(10)
        return values

    def gather(self, value: Any) -> list[Any] | None:
        values = self.allgather(value)
        return values if self.rank == 0 else None

    def bcast(self, value: Any, root: int = 0) -> Any:
        return self.allgather(value)[root]

    def sum_int64(self, array: Any) -> Any:
        array[:] = sum(self.allgather(array.copy()))
        return array


def on_ranks(size: int, call: Any) -> list[Any]:
    meet, board = threading.Barrier(size), {}
    results: list[Any] = [None] * size

    def rank_main(rank: int) -> None:
        try:
            results[rank] = call(FakeTeam(rank, size, meet, board))
        except Exception as error:  # noqa: BLE001
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_ranks_hold_the_folder_or_none(tmp_path: Path) -> None:
    path = tmp_path / "run"
    folders = on_ranks(3, lambda team: RunFolder.create(path, JOB, FACTS, team, wait_seconds=0.2))
    assert [bool(folder.record) for folder in folders] == [True, False, False]
    record = read_record(path)
    assert (record["ranks"], record["hosts"][0]["ranks"]) == (3, [0, 1, 2])
    folders[1].update(status="nonsense")
    assert read_record(path)["status"] == "running", "only rank 0 writes"
    for folder in folders:
        errors = on_ranks(3, lambda team: RunFolder.reopen(path, FACTS, team, wait_seconds=0.05))
        assert all(isinstance(error, RunFolderError) and "in use" in str(error) for error in errors)
        folder.release()
    folders = on_ranks(3, lambda team: RunFolder.reopen(path, FACTS, team, wait_seconds=0.2))
    for folder in folders:
        folder.release()
    assert not is_locked(path)


def test_a_rank_that_cannot_join_ends_it_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = FolderLock.join

    def join(folder: Path, token: str, wait_seconds: float = 1) -> FolderLock:
        if threading.current_thread().name.endswith("late"):
            raise FileNotFoundError(2, "No such file or directory")
        return original(folder, token, wait_seconds)

    monkeypatch.setattr(FolderLock, "join", join)

    def call(team: FakeTeam) -> RunFolder:
        threading.current_thread().name += "late" if team.rank == 2 else ""
        return RunFolder.create(tmp_path / "run", JOB, FACTS, team, wait_seconds=0.2)

    errors = on_ranks(3, call)
    assert all(isinstance(error, RunFolderError) and error.rank == 2 for error in errors)
    assert not is_locked(tmp_path / "run"), "nobody keeps the lock"


# --- metrics log, crash bundle, environment


@pytest.mark.parametrize("step", ['"10"', "null", "[]"])
def test_a_metrics_log_with_another_step_than_a_number_is_cut_there(tmp_path: Path, step: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{{"step": {step}}}\n{{"step": 2}}\n')
    MetricsLog(tmp_path, resume_step=10).close()
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_the_metrics_log_is_cut_back_on_resume(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (0, 5, 10, 15):
        log.append(EngineMetrics(current_step=step, agent_count=3), rank_seconds=0.5)
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1')
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [0, 5, 10, 15]
    log = MetricsLog(tmp_path, resume_step=10)
    log.append(EngineMetrics(current_step=12))
    log.close()
    entries = read_metrics(tmp_path)
    assert [entry["step"] for entry in entries] == [0, 5, 10, 12]
    assert EngineMetrics.from_dict(entries[1]) == EngineMetrics(current_step=5, agent_count=3)
    assert entries[0]["rank_seconds"] == 0.5
    MetricsLog(tmp_path).close()
    assert read_metrics(tmp_path) == []
    with pytest.raises(OutputError, match="cannot open"):
        MetricsLog(tmp_path / "missing")


def test_a_crash_bundle_says_where_and_what(tmp_path: Path) -> None:
    error = PartitionExecution(PartitionId(4), "move", "no luck", step=17)
    try:
        raise error
    except PartitionExecution as caught:
        path = write_crash_bundle(
            tmp_path, rank=3, host="node7", error=caught, fingerprints=[(16, 0xAB)], more={"plan": [0, 5]}
        )
    assert path == tmp_path / "crash" / "rank_00003.json"
    bundle = json.loads(path.read_text())
    assert (bundle["rank"], bundle["host"], bundle["partition"], bundle["phase"], bundle["step"]) == (
        3, "node7", 4, "move", 17,
    )  # fmt: skip
    assert "no luck" in bundle["error"]
    assert "raise error" in bundle["traceback"]
    assert bundle["fingerprints"] == [[16, "0x00000000000000ab"]]
    assert bundle["versions"]["numpy"] == np.__version__
    assert bundle["plan"] == [0, 5]
    text = path.with_suffix(".txt").read_text()
    assert "phase: move\n" in text
    assert "    16 0x00000000000000ab\n" in text
    (tmp_path / "file").write_text("")
    assert write_crash_bundle(tmp_path / "file", rank=0) is None, "never raises"


def test_other_machines_are_noticed() -> None:
    own = environment.host_facts()
    assert own["libm"]["library"]
    assert environment.differences([own], [own, own]) == []
    other = {**own, "cpu": "Abacus 3", "libm": {"library": "glibc 2.17"}}
    lines = environment.differences([own], [other])
    assert len(lines) == 2
    assert "Abacus 3 now" in lines[0]
    assert "glibc 2.17" in lines[1]
    hosts = environment.by_host([{"host": "a"}, {"host": "b"}, {"host": "a"}])
    assert [(host["host"], host["ranks"]) for host in hosts] == [("a", [0, 2]), ("b", [1])]


def test_remote_workers_of_other_machines_are_noticed() -> None:
    own = environment.worker_facts()
    assert (own["architecture"], own["versions"]["numba"]) == (platform.machine(), version("numba"))
    same, odd = dict(own), {**own, "versions": {**own["versions"], "numba": "0.1"}, "cpu": "Abacus 3"}
    workers = environment.by_endpoint([{"tcp://a:1": same, "tcp://b:1": odd}, {"tcp://b:1": odd}])
    assert [(one["endpoint"], one["ranks"]) for one in workers] == [("tcp://a:1", [0]), ("tcp://b:1", [0, 1])]
    assert environment.mixtures([own, workers[0]], "all have") == []
    cpus, versions = environment.mixtures([own, *workers], "all have")
    assert cpus.startswith("all have different CPU models: ")
    assert "Abacus 3 on tcp://b:1" in cpus
    assert "numba 0.1, llvmlite" in versions
    assert environment.machines_of({"hosts": [own], "remote_workers": []}) == [own]
    assert environment.machines_of({"hosts": [own], "remote_workers": workers}) == workers


def test_other_devices_are_noticed() -> None:
    def on(name: str) -> dict[str, str]:
        return {"name": name, "compute_capability": "9.0", "libdevice": "ab"}

    facts = [
        {"host": "a", "device": on("G1")},
        {"host": "b", "device": on("G2")},
        {"host": "a", "device": on("G1")},
    ]
    hosts = environment.by_host(facts)
    assert [[own["rank"] for own in host["devices"]] for host in hosts] == [[0, 2], [1]]
    assert "device" not in hosts[0]
    [line] = environment.mixtures(hosts)
    kinds = [f"G{k} (compute capability 9.0, libdevice ab) on {host}" for k, host in ((1, "a"), (2, "b"))]
    rows = "a model's own exp or cos may depend on which rows they have"
    assert line == f"the ranks of this run have different CUDA devices: {'; '.join(kinds)}; {rows}"
    assert environment.differences(hosts[:1], hosts[:1]) == []
    assert environment.differences(hosts[1:], environment.by_host([{"host": "b"}])) == [
        "CUDA device: G2 (compute capability 9.0, libdevice ab) then, none now"
    ]


# --- reading


def test_reading_a_run_while_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    folder = create(path)
    declarations = [
        Series("curve.csv", lambda c: {"day": c, "I": c * 2}, ("day", "I")),
        Arrays("counts.h5", {"n": lambda c: np.full(3, c)}, every=2),
        Sample("some.h5", ("x",), 2),
    ]
    outputs = OutputSet(declarations, path, agents=10)
    outputs.open()
    for step in range(5):
        outputs.record(step, step / 2, step, {"some.h5": {"x": np.array([step, -step])}})
    MetricsLog(path).append(EngineMetrics(current_step=4))
    run = open_run(str(path))
    assert (run.name, run.seed, run.agents, run.steps, run.params) == ("flock", 7, 10, 20, {"dt": 0.5})
    assert run.status == "running"
    assert repr(run) == f"<Run {path}: flock, step 0 of 20, running>"
    assert run.job["run"]["seed"] == 7
    assert run.lineage is None
    assert run.fingerprint is None
    assert run.outputs() == {"curve.csv": "series", "counts.h5": "arrays", "some.h5": "sample"}
    assert run.series("curve")["I"].tolist() == [0, 2, 4, 6, 8]
    assert run.series("curve.csv")["day"].tolist() == [0, 1, 2, 3, 4]
    assert run.arrays("counts")["n"].tolist() == [[0] * 3, [2] * 3, [4] * 3]
    assert run.arrays("counts")["time"].tolist() == [0, 1, 2]
    assert run.samples("some")["x"][3].tolist() == [3, -3]
    assert run.samples("some")["rows"].tolist() == [0, 5]
    assert [entry["step"] for entry in run.metrics()] == [4]
    assert run.checkpoints() == {}
    outputs.close()
    assert run.arrays("counts")["step"].tolist() == [0, 2, 4]
    folder.finish("stopped", exit_code=75, step_index=4, fingerprint=5)
    folder.release()
    run.reload()
    assert (run.status, run.step_index, run.fingerprint) == ("stopped", 4, 5)


def test_columns_come_from_proven_checkpoints(tmp_path: Path) -> None:
    folder = create(tmp_path / "run")
    schema = Schema((Column("x", "float32"), Column("alive", "bool")))
    team = SoloTeam()
    for step in (5, 10):
        columns = (np.arange(10, dtype=np.float32) * step, np.arange(10) % 2 == 0)
        ids = np.arange(10, dtype=np.uint64) + np.uint64(100)
        view = StateView(step, 10, schema.names, ids, columns)
        state = DeviceSoaCheckpoint(ids, columns, schema.names, schema)
        fingerprint = fingerprint_checkpoint(step, state, scheme="digest")
        header = CheckpointHeader(step, 10, schema, fingerprint, default_ids=False)
        write_checkpoint(folder.checkpoints, header, view, team)
    run = open_run(folder.path)
    assert list(run.checkpoints()) == [5, 10]
    assert run.step_index == 10
    assert run.columns("x").tolist() == [10.0 * row for row in range(10)]
    assert run.columns("x", step=5).tolist() == [5.0 * row for row in range(10)]
    both = run.columns(step=5)
    assert list(both) == ["x", "alive"]
    assert both["alive"].dtype == np.bool_
    assert run.ids(5).tolist() == list(range(100, 110))
    with pytest.raises(RunFolderError, match="no checkpoint of step 7: there are those of 5, 10"):
        run.columns("x", step=7)
    with pytest.raises(CheckpointFileError, match="no column y"):
        run.columns("y")
    with pytest.raises(TypeError, match="names one by one"):
        run.columns(["x", "alive"])
    path = run.checkpoints()[5]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointFileError):
        run.columns("x", step=5)
    folder.release()


def test_a_killed_run_is_told_from_a_running_one(tmp_path: Path) -> None:
    folder = create(tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.status == "running"
    folder.release()
    assert run.status == "killed"
    (tmp_path / "run" / "run.json").unlink()
    run = open_run(tmp_path / "run")
    assert (run.status, run.seed, run.params) == ("killed", 7, {"dt": 0.5})


def test_crash_bundles_that_are_none_are_left_out(tmp_path: Path) -> None:
    create(tmp_path / "run").release()
    write_crash_bundle(tmp_path / "run", rank=1)
    for rank, text in enumerate(("[1]", "{}", "null", "[" * 100_000, "\0"), start=2):
        (tmp_path / "run" / "crash" / f"rank_{rank:05}.json").write_text(text)
    assert [bundle["rank"] for bundle in open_run(tmp_path / "run").crashes()] == [1]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no such folder"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match=r"has no job\.toml"):
        open_run(tmp_path)
    folder = create(tmp_path / "run")
    outputs = OutputSet([Series("curve.csv", lambda c: [1], ("a",))], folder.path)
    outputs.open()
    run = open_run(folder.path)
    with pytest.raises(
        RunFolderError, match=r'no series "curv".*did you mean "curve.csv".*it has curve\.csv'
    ):
        run.series("curv")
    with pytest.raises(RunFolderError, match=r"no arrays .*it has none"):
        run.arrays("curve")
    with pytest.raises(RunFolderError, match="no checkpoint of step 3: there is none yet"):
        run.columns("x", step=3)
    with pytest.raises(RunFolderError, match=r"has no replay\.jsonl"):
        run.replay()
    (folder.path / "curve.csv").write_text("a\n1,2\n")
    with pytest.raises(RunFolderError, match="line 2 has 2 fields, expected 1"):
        run.series("curve")
    for text in ('{"outputs": [{}]}', "[1, 2]", '{"outputs": 1}', '{"outputs": [1]}'):
        (folder.path / "outputs.json").write_text(text)
        with pytest.raises(RunFolderError, match=r"cannot read .*outputs\.json"):
            run.outputs()
    (folder.path / "job.toml").write_text("=")
    with pytest.raises(RunFolderError, match=r"cannot read .*job\.toml"):
        open_run(folder.path)
    folder.release()
