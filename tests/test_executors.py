"""The executors of this process, and one that has nothing but ``execute``, through the suite."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from executor_suite import ExecutorSuite
from planes import Plane, TasksOnly, damp, move, reference_stream, stream

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.bench.engine import Engine, Setup
from rustsim_hpc.bench.setting import MODELS
from rustsim_hpc.executors import threads


class TestInline(ExecutorSuite):
    @pytest.fixture
    def make_executor(self):
        return rs.InlinePartitionExecutor


class TestThreads(ExecutorSuite):
    @pytest.fixture(params=[1, 2, 3])
    def make_executor(self, request):
        return lambda: rs.LocalThreadedPartitionExecutor(request.param)


class TestTasksOnly(ExecutorSuite):
    kernels = False

    @pytest.fixture
    def make_executor(self):
        return TasksOnly


# -- threads -----------------------------------------------------------------------------------------


def running():
    """The executors' threads; those that another test left may end at any time."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("rustsim-partitions")}


def test_there_are_no_more_threads_than_partitions():
    before = running()
    made = Plane("executor", executor=rs.LocalThreadedPartitionExecutor(64), parts=3)
    made.run(2)
    assert len(running() - before) == 2, "the calling thread takes a share"
    made.plane.close()
    assert not running() - before


def test_partitions_run_at_the_same_time():
    meet = threading.Barrier(3, timeout=20)
    made = Plane(
        "executor", executor=rs.LocalThreadedPartitionExecutor(3), phases=[("meet", lambda *_: meet.wait())]
    )
    made.run(2)


def test_each_thread_keeps_its_partitions():
    seen = {}

    def look(context, columns, rows):
        seen.setdefault(context.partition_id.value, set()).add(threading.get_ident())

    made = Plane("executor", executor=rs.LocalThreadedPartitionExecutor(2), phases=[("look", look)], parts=5)
    made.run(4)
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert all(len(idents) == 1 for idents in seen.values())
    assert seen[0] == {threading.get_ident()}
    assert seen[0] == seen[1] != seen[2] == seen[4]


def test_threads_are_not_woken_for_next_to_nothing(monkeypatch):
    """Row kernels that take less time than the hand-over are run by the caller, with the same bits."""
    with Engine(Setup(MODELS + "integrate", 1000, "threads", 2, replay="digest")) as engine:
        session = engine.plane.stepper(engine.executor).session
        [worker] = session._workers
        monkeypatch.setattr(threads, "_HAND_OVER_NS", 0)
        engine.step(3)
        assert worker.asked == worker.answered == 3
        monkeypatch.setattr(threads, "_HAND_OVER_NS", 10**12)
        engine.step(3)
        assert worker.asked == 4, "the first of them told how little it is"
        monkeypatch.setattr(threads, "_HAND_OVER_NS", 0)
        engine.step(3)
        assert worker.asked == worker.answered == 6, "and the next one that it is no longer"
        assert engine.plane.fingerprint() == steps_of_integrate(9)
    seen = set()
    phases = [("look", lambda *_: seen.add(threading.get_ident()))]
    monkeypatch.setattr(threads, "_HAND_OVER_NS", 10**12)
    Plane("executor", executor=rs.LocalThreadedPartitionExecutor(2), phases=phases, parts=2).run(3)
    assert len(seen) == 2, "plain functions keep their threads"


def steps_of_integrate(steps):
    with Engine(Setup(MODELS + "integrate", 1000, replay="digest")) as engine:
        engine.step(steps)
        return engine.plane.fingerprint()


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_threads_that_cannot_be(count):
    with pytest.raises(errors.InvalidConfig):
        rs.LocalThreadedPartitionExecutor(count)


def test_the_default_is_one_thread_a_core():
    made = Plane("executor", executor=rs.LocalThreadedPartitionExecutor(), parts=10)
    before = running()
    made.step()
    assert len(running() - before) == min(threads.usable_cores(), 10) - 1


def test_a_system_that_gives_no_threads(monkeypatch):
    before = running()
    given = threading.Thread.start

    def start(thread):
        if running() - before:
            raise RuntimeError("can't start new thread")
        given(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    made = Plane("executor", executor=rs.LocalThreadedPartitionExecutor(3))
    with pytest.raises(
        errors.ExecutorError, match="cannot start 3 threads: can't start new thread"
    ) as caught:
        made.step()
    assert caught.value.hint
    monkeypatch.undo()
    assert not running() - before
    made.step()
    assert made.plane.runtime.step_index == 1


def test_a_step_that_ctrl_c_breaks_off_is_waited_for():
    """The threads of the broken step finish before the next one writes."""
    started, go_on, slow = threading.Event(), threading.Event(), threading.Event()

    def phase(context, columns, rows):
        if not slow.is_set():
            return
        if context.partition_id.value == 0:
            started.wait(20)
            raise KeyboardInterrupt
        started.set()
        go_on.wait(20)

    phases = [("move", move), ("slow", phase), ("damp", damp)]
    made = Plane("executor", executor=rs.LocalThreadedPartitionExecutor(3), phases=phases)
    made.run(2)
    slow.set()
    timer = threading.Timer(0.2, go_on.set)
    timer.start()
    with pytest.raises(errors.ExecutorError):
        made.step()
    timer.join()
    slow.clear()
    made.run(2)
    assert stream(made.plane) == reference_stream(4)


SLOW_STEP = """
import sys, time, numpy as np, rustsim_hpc as rs
def phase(context, columns, rows):
    columns["x"] += np.float32(1)
    if context.partition_id.value == 0:
        print("in", flush=True)
        sys.stdin.readline()  # until the test has sent its signal
        time.sleep(0.3)
store = rs.DeviceSoaStore.from_columns(None, {"x": np.zeros(4, np.float32)})
plan = rs.PartitionPlan.row_ranges(4, 4)
plane = rs.EngineControlPlane(rs.ColumnarRuntime(store), rs.ControlPlaneConfig(partition_plan=plan))
plane.add_partition_executor_phase("phase", phase)
executor = rs.LocalThreadedPartitionExecutor(4)
done = 0
while done < 3:
    before = plane.runtime.step_index
    try:
        plane.step_partitions_with_executor(executor)
        done += 1
    except (KeyboardInterrupt, rs.EngineControlPlaneError) as error:
        print("broken", type(error).__name__, flush=True)
        assert plane.runtime.step_index == before
assert plane.runtime.columns[0].tolist() == [float(plane.runtime.step_index)] * 4
print("end", plane.runtime.step_index, flush=True)
"""


def test_a_real_ctrl_c_hangs_nothing():
    """SIGINT in the middle of steps on threads: each is undone or done, and the process ends."""
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_STEP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    ) as process:
        lines = iter(process.stdout.readline, "")
        for _ in range(2):
            assert next(line for line in lines if line == "in\n")
            process.send_signal(signal.SIGINT)
            process.stdin.write("go on\n")
            process.stdin.flush()
        process.stdin.close()
        rest = list(lines)
        assert process.wait(timeout=30) == 0
    assert "end 3\n" in rest
    assert sum(line.startswith("broken") for line in rest) >= 1
