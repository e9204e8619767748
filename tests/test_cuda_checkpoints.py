"""Checkpoints of states on devices: copied within the device, and brought here behind the steps."""

import threading
import warnings

import numpy as np
import pytest
from cuda_planes import cuda, needs_compiler, see, session
from executor_suite import Driven, ExecutorSuite
from test_backend import spec_of

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.executors.device_columns import CopyAside, DeviceColumns
from rustsim_hpc.job.launch import run_job
from rustsim_hpc.ranks.team import SoloTeam

pytestmark = needs_compiler

OFF = rs.ReplayMode.off()
WAIT = 120
"""Seconds after which something hangs."""


def room_for(driven):
    return [np.zeros_like(place) for place in memory_of(driven).places()]


def memory_of(driven):
    return driven.plane.runtime.device_store().memory


def states(model, rows, steps):
    """Return the bytes of all columns after each of some steps on the CPU."""
    driven = Driven(ExecutorSuite(), rs.InlinePartitionExecutor(), model=model, rows=rows, replay_mode=OFF)
    made = []
    for _ in range(steps):
        driven.run(1)
        made.append([column.tobytes() for column in driven.plane.runtime.device_store().columns])
    return made


@pytest.mark.parametrize("model", ["suite_model", "suite_kernels"])
@pytest.mark.parametrize("guard", ["rollback", "torn"])
@pytest.mark.parametrize("mixed", [False, True])
def test_steps_go_on_while_a_copy_is_brought_here(model, guard, mixed):
    driven, devices = cuda(
        mixed=mixed,
        model=model,
        rows=120,
        parts=4,
        replay_mode=OFF,
        guard=rs.StepGuard(guard),
        given={"seed": 5},
    )
    expected = states(model, 120, 6)
    driven.run(2)
    out = room_for(driven)
    devices.calls.clear()
    arrived = memory_of(driven).copy_aside(out)
    driven.run(3)
    assert not [call for call in devices.calls if call[1] in ("download", "synchronise")], "nobody has waited"
    arrived()
    assert [values.tobytes() for values in out] == expected[1]
    names = [what for _, what in devices.calls]
    assert names.index("copy") < names.index("wait") < names.index("download"), (
        "copied, stepped, brought here"
    )
    # Again, into other arrays: the copies on the device are used a second time.
    held = session(driven).resident_bytes
    more = room_for(driven)
    arrived = memory_of(driven).copy_aside(more)
    arrived()
    driven.run(1)
    arrived()
    assert [values.tobytes() for values in more] == expected[4]
    assert [values.tobytes() for values in out] == expected[1]
    assert session(driven).resident_bytes == held
    driven.plane.close()
    assert not any(device.live for device in devices.made.values())


def test_another_thread_may_wait():
    driven, _ = cuda(model="suite_kernels", rows=200, parts=2, replay_mode=OFF)
    expected = states("suite_kernels", 200, 12)
    for step in range(0, 12, 2):
        driven.run(1)
        out = room_for(driven)
        thread = threading.Thread(target=memory_of(driven).copy_aside(out))
        thread.start()
        driven.run(1)
        thread.join(WAIT)
        assert not thread.is_alive()
        assert [values.tobytes() for values in out] == expected[step]
    driven.plane.close()


@pytest.mark.parametrize("how", ["close", "copy", "restore"])
def test_a_copy_that_nobody_waits_for_is_there_when_its_memory_goes(how):
    driven, devices = cuda(rows=100, parts=2, replay_mode=OFF)
    driven.run(1)
    kept = driven.plane.checkpoint()
    driven.run(1)
    out = room_for(driven)
    arrived = memory_of(driven).copy_aside(out)
    driven.run(1)
    if how == "copy":
        memory_of(driven).copy_aside(room_for(driven))
    elif how == "restore":
        driven.plane.restore(kept)
        assert not devices.made[0].live
    else:
        driven.plane.close()
    arrived()
    assert [values.tobytes() for values in out] == states("suite_model", 100, 2)[1]
    driven.plane.close()


def test_without_room_for_the_copies_the_step_waits_and_says_so():
    driven, devices = cuda(rows=2000, parts=2, replay_mode=OFF)
    driven.run(2)
    devices.made[1].capacity = 2000 * 21 + 20_000  # of device 0 there is enough
    out = room_for(driven)
    held = devices.made[1].free_bytes()
    with pytest.warns(RuntimeWarning, match=r"device 1 is out of memory.*; steps wait while checkpoints"):
        arrived = memory_of(driven).copy_aside(out)
    assert devices.made[1].free_bytes() == held, "what was had of it is given back"
    driven.run(1)
    arrived()
    assert [values.tobytes() for values in out] == states("suite_model", 2000, 2)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory_of(driven).copy_aside(out)()  # said once
    assert [values.tobytes() for values in out] == states("suite_model", 2000, 3)[2]
    driven.plane.close()


def test_a_device_that_cannot_copy_is_told_at_once():
    driven, devices = cuda(rows=100, parts=2, replay_mode=OFF)
    driven.run(2)
    devices.made[1].faults["copy"] = devices.made[1].counts["copy"] + 1
    with pytest.raises(errors.ExecutorError, match="device 1: copy refused") as caught:
        memory_of(driven).copy_aside(room_for(driven))
    assert caught.value.partition == rs.PartitionId(1)
    store = driven.plane.runtime.device_store()
    assert [column.tobytes() for column in store.columns] == states("suite_model", 100, 2)[1]
    driven.plane.close()


@pytest.mark.parametrize("what", ["download", "synchronise"])
def test_a_device_that_fails_meanwhile_is_told_to_everyone_who_waits(what):
    driven, devices = cuda(rows=100, parts=2, replay_mode=OFF)
    driven.run(2)
    arrived = memory_of(driven).copy_aside(room_for(driven))
    devices.made[1].faults[what] = devices.made[1].counts[what] + 1
    for _ in range(2):
        with pytest.raises(errors.ExecutorError, match=f"device 1: {what} refused") as caught:
            arrived()
        assert caught.value.partition == rs.PartitionId(1)
    store = driven.plane.runtime.device_store()
    assert [column.tobytes() for column in store.columns] == states("suite_model", 100, 2)[1]
    driven.plane.close()


# -- jobs --------------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch):
    return see(monkeypatch, "ab")


def test_a_jobs_checkpoints_are_brought_here_behind_its_steps(stand_ins, tmp_path, monkeypatch):
    """The writer's thread waits here until a further step was made; nothing else may wait for it."""
    stepped, order = threading.Event(), []
    finish, launch = CopyAside.finish, type(stand_ins(0)).launch

    def late(self):
        if threading.current_thread() is not threading.main_thread():
            assert stepped.wait(WAIT), "a step waits for the copy"
            order.append("brought")
        finish(self)

    def noted(self, *arguments):
        if "copied" in order:
            order.append("launched")
            stepped.set()
        launch(self, *arguments)

    def copied(self, *arguments):
        order.append("copied")
        return copy_aside(self, *arguments)

    copy_aside = DeviceColumns.copy_aside
    monkeypatch.setattr(CopyAside, "finish", late)
    monkeypatch.setattr(type(stand_ins(0)), "launch", noted)
    monkeypatch.setattr(DeviceColumns, "copy_aside", copied)
    runs = []
    for backend in ("cuda", "cpu"):
        folder = tmp_path / backend
        spec, options = spec_of("random_walk", folder, backend=backend, agents=3000, steps=6)
        every = spec.checkpoint.model_copy(update={"every": 3, "keep": 9})
        run_job(spec.model_copy(update={"checkpoint": every}), options, SoloTeam())
        runs.append(rs.open_run(folder))
    assert order[:2] == ["copied", "launched"]
    assert "brought" in order
    for step in (3, 6):
        for name in ("x", "y"):
            assert runs[0].columns(name, step=step).tobytes() == runs[1].columns(name, step=step).tobytes()
    assert stand_ins(0).live == {}


@pytest.mark.parametrize("what", ["download", "synchronise"])
def test_a_device_that_fails_behind_the_steps_ends_the_job(stand_ins, tmp_path, monkeypatch, what):
    def failing(self, *arguments):
        raise errors.DeviceError(f"device 0: {what} refused")

    monkeypatch.setattr(type(stand_ins(0)), what, failing)
    spec, options = spec_of("random_walk", tmp_path / "run", backend="cuda", agents=300, steps=50)
    every = spec.checkpoint.model_copy(update={"every": 2})
    with pytest.raises(errors.ExecutorError, match=f"{what} refused") as caught:
        run_job(spec.model_copy(update={"checkpoint": every}), options, SoloTeam())
    assert caught.value.partition == rs.PartitionId(0)
    assert rs.open_run(tmp_path / "run").status == "failed"
    assert not list((tmp_path / "run" / "checkpoints").glob("*.h5"))
