"""Worker processes: the same bits, every way to die, and nothing left behind."""

import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from executor_suite import ExecutorSuite

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.control.config import StepGuard
from rustsim_hpc.executors.wire import decode_values, encode_values
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model_source import load_model

HERE = Path(__file__).parent
ROWS = 1000


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test there are as many processes, descriptors and shared mappings as before it."""
    if request.cls is not None:  # the suite looks itself
        yield
        return
    gc.collect()
    before = _shared()
    yield
    gc.collect()
    assert not worker_pids()
    assert _shared() == before


def _shared() -> tuple[int, int]:
    mappings = Path("/proc/self/maps").read_text()
    return len(list(Path("/proc/self/fd").iterdir())), mappings.count("memfd:rustsim")


def plane_of(
    path: Path,
    parts: int = 4,
    rows: int = ROWS,
    *,
    guard: StepGuard | None = None,
    fingerprint: str = "fnv1a",
    workers: tuple[rs.PartitionWorker, ...] = (),
    **params: Any,
) -> rs.EngineControlPlane:
    model, reference = load_model(str(path))
    bound = BoundModel(model, params, seed=3, agents=rows, reference=reference)
    plan = rs.PartitionPlan.row_ranges(rows, parts)
    if workers:
        plan = plan.with_workers([worker.label for worker in workers])
    config = rs.ControlPlaneConfig(
        replay_mode=rs.ReplayMode.record(),
        partition_plan=plan,
        partition_workers=workers,
        guard=guard or StepGuard.rollback(),
        fingerprint=fingerprint,
    )
    plane = rs.EngineControlPlane(rs.ColumnarRuntime(bound.new_store(0, rows)), config)
    plane.add_model(bound)
    return plane


def faulty(tmp_path: Path, what: str = "", **options: Any) -> rs.EngineControlPlane:
    return plane_of(HERE / "faulty_model.py", what=what, marker=str(tmp_path / "marker"), **options)


def stream(plane: rs.EngineControlPlane, steps: int, executor: Any) -> list[int]:
    with plane:
        for _ in range(steps):
            plane.step_partitions_with_executor(executor)
    return [entry.value for entry in plane.recorded_replay()]


def worker_pids() -> list[int]:
    """Return this process's children, but for the keeper of a Slurm that other tests have started."""
    return [child.pid for child in psutil.Process().children() if not _keeps_a_cluster(child)]


def _keeps_a_cluster(child: psutil.Process) -> bool:
    try:
        return any("slurm_cluster" in word for word in child.cmdline())
    except psutil.Error:  # it ended meanwhile
        return False


def wait_for(holds: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


class TestProcesses(ExecutorSuite):
    own_process = False

    @pytest.fixture
    def make_executor(self) -> Callable[[], Any]:
        return lambda: rs.ProcessPartitionExecutor(2)


# -- the same bits -------------------------------------------------------------------------------------


def test_the_bits_are_those_of_one_process() -> None:
    path = HERE / "mixed_model.py"
    expected = stream(plane_of(path, 1, fingerprint="digest"), 4, rs.InlinePartitionExecutor())
    for parts, workers in ((1, 1), (2, 2), (5, 3)):
        plane = plane_of(path, parts, fingerprint="digest")
        assert stream(plane, 4, rs.ProcessPartitionExecutor(workers)) == expected
        assert plane.values["nearby"].dtype == np.int64
        assert not plane.values["curve"].flags.writeable


def test_a_state_on_the_heap_is_moved_once(tmp_path: Path) -> None:
    plane, twin = faulty(tmp_path), faulty(tmp_path)
    inline, processes = rs.InlinePartitionExecutor(), rs.ProcessPartitionExecutor(2)
    plane.step_partitions_with_executor(inline)
    store = plane.runtime.device_store()
    assert store.memory.kind == "heap"
    plane.step_partitions_with_executor(processes)
    memory = store.memory
    assert memory.kind == "shared"
    plane.run_partitions_with_executor(2, processes)
    plane.step_partitions_with_executor(inline)
    assert plane.runtime.device_store().memory is memory
    twin.run_partitions_with_executor(5, inline)
    assert plane.recorded_replay() == twin.recorded_replay()
    plane.close()


def test_tables_are_made_once_and_parameters_travel(tmp_path: Path) -> None:
    plane = faulty(tmp_path)
    stream(plane, 1, rs.ProcessPartitionExecutor(2))
    assert (tmp_path / "marker.tables").read_text() == f"{os.getpid()}\n"


def test_what_a_phase_prints_is_seen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with faulty(tmp_path, "print", at=0) as plane:
        plane.step_partitions_with_executor(rs.ProcessPartitionExecutor(2))
        assert capfd.readouterr().out == "a phase prints\n"


def test_a_phase_may_fork_processes_of_its_own(tmp_path: Path) -> None:
    """In the child only what is the engine's is closed."""
    with faulty(tmp_path, "child", at=0) as plane:
        plane.step_partitions_with_executor(rs.ProcessPartitionExecutor(2))
        assert (tmp_path / "marker").exists()


# -- failures ------------------------------------------------------------------------------------------


def test_a_phase_that_raises_leaves_its_worker_alive(tmp_path: Path) -> None:
    executor = rs.ProcessPartitionExecutor(2)
    with faulty(tmp_path, "raise", where=3) as plane:
        plane.run_partitions_with_executor(2, executor)
        before, pids = plane.checkpoint().state, worker_pids()
        with pytest.raises(errors.ExecutorError) as caught:
            plane.step_partitions_with_executor(executor)
        error = caught.value
        assert isinstance(error.source, errors.Phase)
        assert str(error.source) == "partition PartitionId(3) phase trouble failed: no luck"
        assert (error.partition, error.phase, error.step) == (rs.PartitionId(3), "trouble", 2)
        assert plane.checkpoint().state == before
        plane.step_partitions_with_executor(executor)
        assert worker_pids() == pids


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("exit", "ended with exit code 7"),
        ("kill", "was killed by SIGKILL (out of memory?)"),
        ("abort", "was killed by SIGABRT"),
        ("fork", "ended with exit code 9"),
        ("c fork", "ended with exit code 9"),
    ],
)
def test_a_worker_that_dies_in_a_phase(tmp_path: Path, what: str, text: str) -> None:
    """The step is undone, named, and made by another worker; what it forked does not hold anything up."""
    executor = rs.ProcessPartitionExecutor(2)
    expected = stream(faulty(tmp_path), 4, rs.InlinePartitionExecutor())
    with faulty(tmp_path, what, where=3) as plane:
        plane.run_partitions_with_executor(2, executor)
        before, pids = plane.checkpoint().state, worker_pids()
        with pytest.raises(errors.ExecutorError) as caught:
            plane.step_partitions_with_executor(executor)
        assert bool(_orphans()) == ("fork" in what)
        error, dead = caught.value, int((tmp_path / "marker").read_text())
        message = f"worker process 1 (pid {dead}) {text}"
        assert isinstance(error.source, errors.Worker)
        assert error.source.message == message
        assert (error.partition, error.phase, error.step) == (rs.PartitionId(3), "trouble", 2)
        assert plane.checkpoint().state == before
        assert plane.metrics().current_step == 2
        plane.run_partitions_with_executor(2, executor)
        assert [entry.value for entry in plane.recorded_replay()] == expected
        assert len(set(worker_pids()) & set(pids)) == 1
    for orphan in _orphans():
        orphan.kill()


def _orphans() -> list[psutil.Process]:
    """Return what workers of this process have forked and left behind."""
    words = {"rustsim_hpc.executors.worker_process", str(os.getpid())}
    everyone = psutil.process_iter(["cmdline", "ppid"])
    theirs = [process for process in everyone if words <= set(process.info["cmdline"] or ())]
    return [process for process in theirs if process.info["ppid"] != os.getpid()]


def test_a_worker_that_dies_between_steps(tmp_path: Path) -> None:
    executor = rs.ProcessPartitionExecutor(2)
    expected = stream(faulty(tmp_path), 4, rs.InlinePartitionExecutor())
    with faulty(tmp_path) as plane:
        plane.run_partitions_with_executor(2, executor)
        before, (first, second) = plane.checkpoint().state, worker_pids()
        os.kill(first, signal.SIGKILL)
        time.sleep(0.1)
        with pytest.raises(errors.ExecutorError, match="SIGKILL") as caught:
            plane.step_partitions_with_executor(executor)
        assert (caught.value.partition, caught.value.phase) == (rs.PartitionId(0), None)
        assert plane.checkpoint().state == before
        plane.run_partitions_with_executor(2, executor)
        assert [entry.value for entry in plane.recorded_replay()] == expected
        assert second in worker_pids()


def test_all_workers_die_at_once(tmp_path: Path) -> None:
    executor = rs.ProcessPartitionExecutor(3)
    with faulty(tmp_path, "kill", where=-1, again=True, at=0) as plane:
        with pytest.raises(errors.ExecutorError) as caught:
            plane.step_partitions_with_executor(executor)
        everyone = [caught.value, *caught.value.others]
        assert [error.partition for error in everyone] == [rs.PartitionId(k) for k in (0, 1, 2)]
        assert plane.runtime.step_index == 0


def test_under_the_torn_guard_only_a_restore_helps(tmp_path: Path) -> None:
    executor = rs.ProcessPartitionExecutor(2)
    with faulty(tmp_path, "kill", guard=StepGuard.torn()) as plane:
        plane.run_partitions_with_executor(2, executor)
        made = plane.checkpoint()
        for kind in (errors.ExecutorError, errors.TornState):
            with pytest.raises(kind):
                plane.step_partitions_with_executor(executor)
        plane.restore(made)
        plane.step_partitions_with_executor(executor)


def test_a_stopped_worker_is_waited_for(tmp_path: Path) -> None:
    """A SIGSTOP of two seconds is no death."""
    with faulty(tmp_path, "stop", at=0) as plane:
        executor = rs.ProcessPartitionExecutor(2)
        plane.stepper(executor)
        marker = tmp_path / "marker"

        def wake() -> None:
            wait_for(marker.exists, 10)
            time.sleep(2)
            os.kill(int(marker.read_text()), signal.SIGCONT)

        thread = threading.Thread(target=wake)
        thread.start()
        start = time.monotonic()
        plane.step_partitions_with_executor(executor)
        assert time.monotonic() - start > 1.5
        thread.join()


def test_signals_to_stop_are_for_the_parent(tmp_path: Path) -> None:
    executor = rs.ProcessPartitionExecutor(2)
    with faulty(tmp_path) as plane:
        plane.stepper(executor)
        workers = worker_pids()
        for pid in workers:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(pid, number)
        assert len(plane.run_partitions_with_executor(2, executor)) == 2
        assert set(workers) <= set(worker_pids())


def test_ctrl_c_in_a_step(tmp_path: Path) -> None:
    """What was going on is broken off; the plane can go on, and its workers are new where they have to be."""
    executor = rs.ProcessPartitionExecutor(2)
    with faulty(tmp_path, "wait", at=1) as plane:
        plane.step_partitions_with_executor(executor)
        marker = tmp_path / "marker"

        def interrupt() -> None:
            wait_for(marker.exists, 10)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            plane.step_partitions_with_executor(executor)
        thread.join()
        assert plane.runtime.step_index == 1
        assert not psutil.pid_exists(int(marker.read_text()))
        plane.run_partitions_with_executor(2, executor)
        assert plane.runtime.step_index == 3


# -- what workers cannot run ---------------------------------------------------------------------------


def test_a_closure_is_refused_by_name(tmp_path: Path) -> None:
    plane = rs.EngineControlPlane(rs.ColumnarRuntime(rs.DeviceSoaStore.from_columns(None, {"x": [1.0]})))
    plane.add_partition_executor_phase("drift", lambda context, columns, rows: None)
    with pytest.raises(errors.ExecutorError, match='phase "drift" is not an entry of a model') as caught:
        plane.step_partitions_with_executor(rs.ProcessPartitionExecutor(2))
    assert caught.value.hint


def test_a_closure_beside_a_model_is_refused_by_name(tmp_path: Path) -> None:
    plane = faulty(tmp_path)
    plane.add_partition_executor_phase("drift", lambda context, columns, rows: None)
    with pytest.raises(errors.ExecutorError, match='phase "drift" is not one of the model'):
        plane.step_partitions_with_executor(rs.ProcessPartitionExecutor(2))


def test_a_source_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    shutil.copy(HERE / "faulty_model.py", path)
    plane = plane_of(path, marker=str(tmp_path / "marker"))
    path.write_text(path.read_text() + "\n# another one\n")
    with pytest.raises(errors.ExecutorError, match="its source here is not that of the run"):
        plane.step_partitions_with_executor(rs.ProcessPartitionExecutor(2))
    assert plane.runtime.step_index == 0


def test_other_backends_and_bad_counts_are_refused(tmp_path: Path) -> None:
    plane = faulty(tmp_path, parts=1, workers=(rs.PartitionWorker.cuda_device("gpu", 0),))
    with pytest.raises(errors.ExecutorError, match="runs on the local CPU only"):
        plane.step_partitions_with_executor(rs.ProcessPartitionExecutor(2))
    with pytest.raises(errors.InvalidConfig):
        rs.ProcessPartitionExecutor(0)


def test_tasks_with_plain_functions_are_refused() -> None:
    executor = rs.ProcessPartitionExecutor(2)
    assert isinstance(executor, rs.PartitionExecutor)
    seen: list[Any] = []

    class Recorder:
        def execute(self, tasks: Any) -> Any:
            seen.extend(tasks)
            return executor.execute(tasks)

    plane = rs.EngineControlPlane(rs.ColumnarRuntime(rs.DeviceSoaStore.from_columns(None, {"x": [1.0]})))
    plane.add_partition_executor_phase("drift", lambda context, columns, rows: None)
    with pytest.raises(errors.ExecutorError, match='phase "drift" is a plain function'):
        plane.step_partitions_with_executor(Recorder())
    assert len(seen) == 1


# -- nothing is left behind ----------------------------------------------------------------------------


def test_close_ends_the_workers_and_the_plane_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They end by themselves, however slow the machine is: none has to be killed.
    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", lambda process, timeout=None: wait(process, 60))
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: pytest.fail("a worker was killed"))
    executor = rs.ProcessPartitionExecutor(2)
    plane = faulty(tmp_path)
    plane.step_partitions_with_executor(executor)
    first = worker_pids()
    plane.close()
    assert not worker_pids()
    plane.close()
    plane.step_partitions_with_executor(executor)
    assert len(worker_pids()) == 2
    assert not set(worker_pids()) & set(first)
    plane.close()


def test_a_dropped_plane_leaves_no_worker(tmp_path: Path) -> None:
    plane = faulty(tmp_path)
    plane.step_partitions_with_executor(rs.ProcessPartitionExecutor(2))
    assert len(worker_pids()) == 2
    del plane
    gc.collect()
    assert not worker_pids()


def test_close_does_not_wait_for_a_stopped_worker(tmp_path: Path) -> None:
    plane = faulty(tmp_path)
    plane.step_partitions_with_executor(rs.ProcessPartitionExecutor(2))
    os.kill(worker_pids()[0], signal.SIGSTOP)
    plane.close()
    assert not worker_pids()


def test_many_steps_do_not_grow(tmp_path: Path) -> None:
    executor = rs.ProcessPartitionExecutor(2)
    with faulty(tmp_path) as plane:
        plane.run_partitions_with_executor(100, executor)
        processes = [psutil.Process(pid) for pid in (os.getpid(), *worker_pids())]

        def sizes() -> list[tuple[int, int]]:
            gc.collect()
            return [(process.memory_info().rss, process.num_fds()) for process in processes]

        before = sizes()
        plane.run_partitions_with_executor(1000, executor)
        for (rss, fds), (rss_after, fds_after) in zip(before, sizes(), strict=True):
            assert fds == fds_after
            assert rss_after - rss < 2 * 2**20


def test_workers_hold_the_lock_that_they_inherit(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file, path.open("w") as other:
        fcntl.flock(file, fcntl.LOCK_EX)
        plane = faulty(tmp_path)
        plane.step_partitions_with_executor(rs.ProcessPartitionExecutor(2, inherit_fds=(file.fileno(),)))
        file.close()
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        plane.close()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_pinned_workers_stay_on_a_core(tmp_path: Path) -> None:
    with faulty(tmp_path) as plane:
        plane.step_partitions_with_executor(rs.ProcessPartitionExecutor(2, pin=True))
        cores = [psutil.Process(pid).cpu_affinity() for pid in worker_pids()]
    assert all(len(core) == 1 for core in cores)


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from test_processes import faulty
from pathlib import Path
import rustsim_hpc as rs, psutil, time
plane = faulty(Path({folder!r}), {what!r})
executor = rs.ProcessPartitionExecutor(2)
plane.run_partitions_with_executor(2, executor)
print(*[child.pid for child in psutil.Process().children()], flush=True)
{then}
"""


def _start_script(tmp_path: Path, what: str, then: str) -> tuple["subprocess.Popen[str]", list[int]]:
    text = SCRIPT.format(tests=str(HERE), root=str(HERE.parent), folder=str(tmp_path), what=what, then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    return process, pids


@pytest.mark.parametrize("what", ["", "wait"])
def test_workers_end_with_a_killed_parent(tmp_path: Path, what: str) -> None:
    """They do, whether they are idle between orders or deep in a phase."""
    then = "while True: plane.step_partitions_with_executor(executor)"
    process, pids = _start_script(tmp_path, what, then)
    if what:
        assert wait_for((tmp_path / "marker").exists, 20)
    process.kill()
    process.communicate()
    assert wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids), 5)


def test_workers_end_with_the_interpreter(tmp_path: Path) -> None:
    process, pids = _start_script(tmp_path, "", "")
    _, problems = process.communicate(timeout=20)
    assert (process.returncode, problems) == (0, "")
    assert not any(psutil.pid_exists(pid) for pid in pids)


# -- values on the wire --------------------------------------------------------------------------------


def test_values_travel_bit_by_bit() -> None:
    values = {
        "mean": np.float64("-0.0"),
        "flag": np.bool_(True),
        "count": np.int64(-(2**63)),
        "table": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "empty": np.zeros((0, 4), np.float32),
        "half": np.array([np.nan, 1], np.float16),
    }
    names = tuple(reversed(values))
    found = decode_values(encode_values(values, names), names)
    assert list(found) == list(values)
    for name, value in values.items():
        other = found[name]
        assert type(other) is type(value)
        assert (other.dtype, other.shape, other.tobytes()) == (value.dtype, value.shape, value.tobytes())
        if isinstance(other, np.ndarray):
            assert not other.flags.writeable
            assert other.flags.aligned
