"""What goes wrong on devices that are none: memory, transfers, launches, phases; and what is refused."""

import numpy as np
import pytest
from cuda_planes import Devices, cuda, expected, needs_compiler
from planes import Plane

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.executors.cuda import CudaPartitionExecutor
from rustsim_hpc.modeling.bound_model import BoundModel

pytestmark = needs_compiler


# -- memory that is not there ------------------------------------------------------------------------


def test_a_device_that_is_too_small_is_refused_before_anything_is_done():
    driven, devices = cuda(given={"capacity": 2**20}, rows=100_000, parts=2)
    before = driven.everything()
    with pytest.raises(errors.ExecutorError, match="CUDA device 0 is out of memory") as caught:
        driven.run(1)
    assert driven.everything() == before
    cause = caught.value.__cause__
    assert isinstance(cause, errors.DeviceMemoryError)
    assert (cause.asked, cause.free) == (50_000 * 2 * 21, 2**20)
    assert not devices.made[0].live
    assert caught.value.partition == rs.PartitionId(0)
    assert "torn guard" in caught.value.hint


@pytest.mark.parametrize("number", [1, 3, 6, 9, 12, 14])
def test_memory_that_runs_out_on_the_way(number):
    """Whichever allocation fails: nothing is lost, and all is well once there is memory again."""
    devices = Devices()
    driven, _ = cuda(devices, model="suite_kernels", rows=100, parts=2)
    before = driven.everything()
    devices(0).faults["memory"] = number
    with pytest.raises(errors.ExecutorError, match="out of memory") as caught:
        driven.run(1)
    assert isinstance(caught.value.source, rs.PartitionExecutorError.Worker)
    assert caught.value.partition == rs.PartitionId(0)
    assert driven.everything() == before
    driven.run(3)
    assert driven.stream == expected(3, model="suite_kernels", rows=100)
    driven.plane.close()
    assert not devices(0).live
    assert not devices(1).live


# -- devices that fail -------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["upload", "give", "take", "launch", "copy", "load", "wait", "kernel"])
@pytest.mark.parametrize("number", [1, 4])
def test_whatever_fails_undoes_the_step(what, number):
    devices = Devices()
    model = "suite_model" if what == "copy" else "suite_kernels"
    driven, _ = cuda(devices, model=model, rows=100, parts=4, fingerprint="digest")
    driven.run(1)
    kept = driven.everything()
    if what == "load":  # loaded at the first step alone
        driven, _ = cuda(devices, model=model, rows=100, parts=4, fingerprint="digest")
        kept = driven.everything()
    devices(1).faults[what] = devices(1).counts[what if what != "kernel" else "launch"] + number
    stepped = len(driven.stream)
    with pytest.raises(errors.ExecutorError) as caught:
        driven.run(9)
    made = len(driven.stream)
    assert isinstance(caught.value.source, rs.PartitionExecutorError.Worker)
    assert caught.value.partition in (rs.PartitionId(1), rs.PartitionId(3))
    assert caught.value.step == made
    assert "device 1" in str(caught.value)
    assert made - stepped < 9
    if made == stepped:
        assert driven.everything() == kept
    driven.run(2)
    assert driven.stream == expected(made + 2, model=model, rows=100, fingerprint="digest")
    driven.plane.close()


def test_a_state_that_cannot_be_fetched_is_lost_and_said_to_be():
    driven, devices = cuda(parts=2, replay_mode=rs.ReplayMode.off())
    driven.run(1)
    kept = driven.plane.checkpoint()
    driven.run(3)
    store, broken = driven.plane.runtime.device_store(), devices(1)
    broken.faults["download"] = broken.counts["download"] + 1
    with pytest.raises(errors.ExecutorError, match="download refused"):
        store.checkpoint()
    broken.faults["download"] = broken.counts["download"] + 1
    driven.plane.close()
    assert not broken.live
    for _ in range(2):
        with pytest.raises(errors.ExecutorError, match="download refused"):
            store.checkpoint()
        with pytest.raises(errors.ExecutorError, match="download refused"):
            driven.run(1)
    driven.plane.restore(kept)
    driven.run(3)
    assert driven.plane.fingerprint() == expected(4)[-1]
    driven.plane.close()


# -- failures of phases, as on the CPU ---------------------------------------------------------------


@rs.row_kernel(writes="small")
def overflow(small, wide, row, step):
    return small + (wide if row % 1000 == 977 and step >= 1 else 0)


@rs.reduction("histogram", bins=10)
def keys(wide, row, step):
    return 3 if row != 5000 or step < 1 else wide


@rs.row_kernel(writes="small")
def later(small, row, step):
    return small if row != 4096 or step < 1 else 1e9


def _three_times(plane, executor, repeat):
    for _ in range(3):
        plane.step_fused(executor, repeat)


@pytest.mark.parametrize(
    "phases", [(overflow, keys, later), (keys, later), (later, overflow), (later, later)]
)
@pytest.mark.parametrize("repeat", [1, 5])
def test_the_first_failure_is_the_cpus(phases, repeat):
    phases = tuple(dict.fromkeys(phases))
    texts = []
    for executor, workers in (
        (rs.InlinePartitionExecutor(), ()),
        (CudaPartitionExecutor(Devices()), (rs.PartitionWorker.cuda_device("gpu", 0),)),
    ):
        model = rs.Model(
            columns=[rs.Column("small", "int8"), rs.Column("wide", "int64")],
            initialise=lambda rows, params, tables, seed: [
                np.zeros(rows.stop - rows.start, np.int8), np.arange(rows.start, rows.stop) + 300
            ],
            phases=list(phases),
        )  # fmt: skip
        bound = BoundModel(model, {}, seed=1, agents=20_000)
        plan = rs.PartitionPlan.row_ranges(20_000, 1)
        if workers:
            plan = plan.with_workers(["gpu"])
        runtime = rs.ColumnarRuntime(bound.new_store(0, 20_000))
        plane = rs.EngineControlPlane(
            runtime, rs.ControlPlaneConfig(partition_plan=plan, partition_workers=workers)
        )
        plane.add_model(bound, checked=True, tile_rows=4096)
        with pytest.raises(errors.ExecutorError) as caught:
            _three_times(plane, executor, repeat)
        texts.append((str(caught.value), caught.value.phase, caught.value.step))
        plane.close()
    assert texts[0] == texts[1]


def test_random_numbers_end_where_they_end_on_the_cpu():
    driven, _ = cuda(model="suite_kernels", rows=20, step_index=2**32 - 1)
    driven.run(1)
    with pytest.raises(errors.ExecutorError, match="random numbers reach up to step 4294967295"):
        driven.run(1)
    driven.plane.close()


# -- what cannot be ----------------------------------------------------------------------------------


def one_phase(phase, columns=("x",), rows=10):
    model = rs.Model(
        columns=[rs.Column(name, "float32") for name in columns],
        initialise=lambda rows, *_: [np.zeros(rows.stop - rows.start, np.float32) for _ in columns],
        phases=[phase],
    )
    bound = BoundModel(model, {}, seed=1, agents=rows)
    workers = (rs.PartitionWorker.cuda_device("gpu", 0),)
    plan = rs.PartitionPlan.row_ranges(rows, 1).with_workers(["gpu"])
    runtime = rs.ColumnarRuntime(bound.new_store(0, rows))
    plane = rs.EngineControlPlane(
        runtime, rs.ControlPlaneConfig(partition_plan=plan, partition_workers=workers)
    )
    plane.add_model(bound)
    return plane


@rs.function
def picky(x):
    assert x >= 0
    return x


@rs.row_kernel(writes="x")
def raising(x):
    return picky(x)


def test_a_kernel_that_raises_is_refused():
    plane = one_phase(raising)
    with pytest.raises(errors.KernelError, match=r"picky \(.*\) raises, which a kernel on a CUDA device"):
        plane.step_partitions_with_executor(CudaPartitionExecutor(Devices()))


@rs.column_phase(writes="x", row_local=True)
def for_the_cpu(context, columns, rows):
    columns["x"] += np.float32(1)


def test_a_column_phase_without_a_twin_is_refused():
    plane = one_phase(for_the_cpu)
    with pytest.raises(errors.ExecutorError, match='"for_the_cpu" is a column phase for the CPU') as caught:
        plane.step_partitions_with_executor(CudaPartitionExecutor(Devices()))
    assert "device=" in caught.value.hint
    assert caught.value.phase == "for_the_cpu"


def doubled(context, columns, rows):
    columns["x"] = columns["x"] * np.float32(2) + np.float32(1)


@rs.column_phase(writes="x", row_local=True, device=doubled)
def twice(context, columns, rows):
    raise AssertionError("the CPU's")


def test_a_phase_may_have_a_twin_for_devices():
    plane = one_phase(twice)
    for _ in range(3):
        plane.step_partitions_with_executor(CudaPartitionExecutor(Devices()))
    assert plane.runtime.device_store().column(0).tolist() == [7.0] * 10
    plane.close()


def test_an_endpoint_is_not_a_device():
    plan = rs.PartitionPlan.row_ranges(4, 1).with_workers(["there"])
    workers = (rs.PartitionWorker.external("there", "tcp://127.0.0.1:9"),)
    store = rs.DeviceSoaStore.from_columns(None, {"x": np.zeros(4, np.float32)})
    plane = rs.EngineControlPlane(
        rs.ColumnarRuntime(store), rs.ControlPlaneConfig(partition_plan=plan, partition_workers=workers)
    )
    plane.add_partition_executor_phase("twice", for_the_cpu.fn)
    with pytest.raises(errors.ExecutorError, match="not on the external endpoint"):
        plane.step_partitions_with_executor(CudaPartitionExecutor(Devices()))


class Catch:
    def execute(self, tasks):
        self.tasks = tasks
        return rs.InlinePartitionExecutor().execute(tasks)


def test_self_contained_tasks_are_refused():
    catch = Catch()
    Plane("executor", executor=catch, phases=[("nothing", lambda *_: None)]).run(1)
    with pytest.raises(rs.PartitionExecutorError.Worker, match="not on self-contained tasks"):
        CudaPartitionExecutor(Devices()).execute(catch.tasks)
    assert CudaPartitionExecutor(Devices()).execute([]) == []
