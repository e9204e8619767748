"""The CUDA executor over a device that is none: the suite of all executors, and what devices can do wrong."""

import numpy as np
import pytest
from cuda_planes import CudaSuite, Devices, cuda, expected, needs_compiler, session
from executor_suite import Driven, ExecutorSuite
from standin_device import StandInDevice

import rustsim_hpc as rs
from rustsim_hpc.executors.cuda import CudaPartitionExecutor

pytestmark = needs_compiler

OFF = rs.ReplayMode.off()


class TestCudaPartitionExecutor(ExecutorSuite):
    plan = CudaSuite().plan

    @pytest.fixture
    def make_executor(self):
        return lambda: CudaPartitionExecutor(Devices())

    @pytest.fixture
    def make_other(self):
        return lambda: CudaPartitionExecutor(Devices(seed=1))


@pytest.mark.parametrize("model", ["suite_model", "suite_kernels"])
@pytest.mark.parametrize("scheme", ["fnv1a", "digest"])
def test_devices_and_this_cpu_in_one_plan(model, scheme, tmp_path):
    config = {"model": model, "fingerprint": scheme, "rows": 90}
    driven, devices = cuda(mixed=True, parts=5, trip=tmp_path / "trip", **config)
    driven.run(2)
    kept = driven.plane.checkpoint()
    assert {type(run).__name__ for run in session(driven).runs} == {"DeviceRun", "PartitionRun"}
    driven.run(2)
    assert driven.stream == expected(4, **config)
    if model == "suite_model":
        before = driven.everything()
        for partition in (1, 2):  # of the CPU, and of a device
            driven.tripping("kick", [partition])
            with pytest.raises(rs.errors.ExecutorError, match="tripped in kick") as caught:
                driven.run(1)
            assert caught.value.partition == rs.PartitionId(partition)
            assert driven.everything() == before
        driven.trip.unlink()
    driven.plane.restore(kept)
    driven.run(3)
    assert driven.stream == expected(5, **config)
    driven.plane.close()
    assert not any(device.live for device in devices.made.values())


# -- what moves --------------------------------------------------------------------------------------


def test_columns_move_when_somebody_looks_and_only_those_that_changed():
    driven, _ = cuda(replay_mode=OFF)
    driven.run(2)
    store = driven.plane.runtime.device_store()
    up, down = session(driven).moved_bytes
    # Before the first step: x, vx and kicks, which the phases read before they write; 4 bytes each.
    assert (up, down) == (50 * (4 + 4 + 4 + 1 + 8), 0)
    whole = store.checkpoint()
    assert session(driven).moved_bytes[1] == 50 * (4 + 4 + 4 + 1 + 8)
    assert store.checkpoint() == whole
    driven.plane.runtime.sync_to_host()
    assert session(driven).moved_bytes == (up, 50 * 21), "nothing has changed since"
    driven.run(3)
    assert session(driven).moved_bytes == (up, 50 * 21), "steps move no columns"
    inline = Driven(ExecutorSuite(), rs.InlinePartitionExecutor())
    inline.run(5)
    assert store.checkpoint() == inline.plane.runtime.device_store().checkpoint()
    driven.plane.close()


def test_a_column_that_no_step_writes_never_comes_back():
    driven, _ = cuda(model="suite_kernels", rows=200, replay_mode=OFF)
    driven.run(3)
    store = driven.plane.runtime.device_store()
    store.checkpoint()
    moved = session(driven).moved_bytes
    unwritten = [k for k in range(3) if k not in session(driven).work.program.written]
    sizes = [dtype.itemsize for dtype in store.schema.dtypes]
    assert moved[1] == 200 * sum(size for k, size in enumerate(sizes) if k not in unwritten)
    driven.plane.close()


def test_the_digest_and_reductions_are_made_on_the_device():
    driven, devices = cuda(model="suite_kernels", rows=1000, parts=2, fingerprint="digest")
    driven.run(1)
    before = session(driven).moved_bytes
    driven.run(4)
    assert driven.stream == expected(5, model="suite_kernels", rows=1000, fingerprint="digest")
    assert session(driven).moved_bytes == before, "no column left the device"
    assert not any(device.counts["download"] for device in devices.made.values())
    assert all(device.counts["take"] for device in devices.made.values()), "but what was counted did"
    driven.plane.close()


def test_columns_are_state_again_after_they_were_changed_here():
    driven, _ = cuda(fingerprint="digest")
    driven.run(2)
    driven.plane.run_partitions_with_executor(1, CudaPartitionExecutor(Devices()))
    driven.run(1)
    assert driven.stream == expected(4, fingerprint="digest")
    driven.plane.close()


def test_resident_bytes_are_those_of_the_device():
    torn, one = cuda(parts=1, guard=rs.StepGuard.torn(), rows=10_000, replay_mode=OFF)
    undo, other = cuda(parts=1, rows=10_000, replay_mode=OFF)
    held = []
    for driven, devices in ((torn, one), (undo, other)):
        driven.run(1)
        held.append(sum(buffer.nbytes for buffer in devices.made[0].live.values()))
        assert session(driven).resident_bytes == held[-1]
        driven.plane.close()
        assert not devices.made[0].live, "all of it is given back"
    assert held == [10_000 * 21, 2 * 10_000 * 21]


# -- streams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_no_order_of_the_streams_shows(seed):
    driven, _ = cuda(given={"seed": seed}, model="suite_kernels", rows=300)
    driven.run(2)
    driven.plane.runtime.device_store().checkpoint()
    driven.run(2)
    assert driven.stream == expected(4, model="suite_kernels", rows=300)
    driven.plane.close()


def test_the_stand_in_tells_who_does_not_wait():
    """What the tests above rely on: a download that is not ordered after an upload may come first."""
    seen = set()
    for seed in range(16):
        device = StandInDevice(seed=seed)
        buffer, out = device.allocate(8), np.zeros(1, np.int64)
        device.upload(buffer, np.array([7], np.int64))
        device.download(buffer, out)
        assert out[0] != 7, "nothing has happened yet"
        device.synchronise()
        seen.add(int(out[0]))
    assert 7 in seen
    assert len(seen) == 2
    with pytest.raises(TypeError, match="device memory"):
        np.asarray(buffer)


# -- how many launches -------------------------------------------------------------------------------


def test_a_stage_is_one_launch_however_many_steps():
    driven, devices = cuda(model="suite_fused", rows=9000, parts=1, replay_mode=OFF)
    driven.plane.step_fused(driven.executor, 16)
    assert devices.made[0].counts["launch"] == 1
    assert driven.plane.runtime.step_index == 16
    reference = Driven(ExecutorSuite(), rs.InlinePartitionExecutor(), model="suite_fused", rows=9000)
    reference.run(16)
    assert driven.plane.fingerprint() == reference.stream[-1]
    driven.plane.close()
