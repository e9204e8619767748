"""Launches that take the same arguments every time are recorded once and replayed: the same bits."""

import numpy as np
import pytest
from cuda_planes import Devices, cuda, expected, needs_compiler
from standin_device import StandInDevice
from test_backend import spec_of
from test_cuda_kernels import assert_same, plane_of

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.executors.cuda import CudaPartitionExecutor
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.state.device import COMPUTE

pytestmark = needs_compiler


@pytest.mark.parametrize(("model", "queued"), [("suite_fused", 0), ("suite_kernels", 1)])
@pytest.mark.parametrize("guard", ["rollback", "torn"])
def test_the_same_graph_serves_all_steps(model, queued, guard):
    """Steps, random numbers of each step, digests and reductions: all of it is in what a graph reads.

    One stage of suite_kernels takes the number that a reduction gave, and is queued call by call.
    """
    config = {"model": model, "rows": 90, "fingerprint": "digest", "guard": rs.StepGuard(guard)}
    driven, devices = cuda(parts=2, **config)
    driven.run(6)
    devices.calls.clear()
    driven.run(3)
    for k in range(2):
        asked = [what for device, what in devices.calls if device == k]
        assert asked.count("replay") >= 3
        assert asked.count("launch") == asked.count("replay") + 3 * queued
        assert asked.count("give") == 3 * queued
        assert "capture" not in asked
    assert driven.stream == expected(9, **config)
    driven.plane.close()


def test_steps_made_at_once_and_digests_now_and_then_need_no_other_graph():
    config = {"model": "suite_fused", "rows": 9000, "fingerprint": "digest"}
    driven, devices = cuda(parts=1, replay_mode=rs.ReplayMode.record(4), **config)
    for repeat in (1, 3, 4, 4, 2, 2, 1, 3):
        driven.plane.step_fused(driven.executor, repeat)
    assert devices.made[0].counts["capture"] == 2, "one for each way that the sides stand"
    wanted = [entry for entry in expected(20, **config) if not entry.step_index % 4]
    assert list(driven.plane.recorded_replay()) == wanted
    driven.plane.close()


def test_a_failure_in_a_graph_undoes_the_step():
    config = {"model": "suite_kernels", "rows": 90, "fingerprint": "digest"}
    driven, devices = cuda(parts=2, **config)
    driven.run(7)
    before = driven.everything()
    for what in ("replay", "launch", "kernel", "wait"):
        broken = devices.made[1]
        broken.faults[what] = broken.counts["launch" if what == "kernel" else what] + 1
        with pytest.raises(errors.ExecutorError, match="device 1"):
            driven.run(1)
        assert driven.everything() == before
    driven.run(2)
    assert driven.stream == expected(9, **config)
    driven.plane.close()


# -- what is no graph --------------------------------------------------------------------------------


@rs.reduction("sum")
def total(x):
    return x


@rs.derive
def table(step, total):
    return {"growing": np.full(1 + step // 4, total), "mean": total / 8}


@rs.row_kernel(writes="x")
def by_array(x, growing):
    return x + growing[0] * 1e-3


@rs.column_phase(writes="x", row_local=True, device=True)
def between(context, columns, rows):
    columns["x"] += 1


@rs.row_kernel(writes="x")
def by_number(x, mean):
    return x - mean * 1e-3


def taking_model():
    model = rs.Model(
        columns=[rs.Column("x", "float64")],
        initialise=lambda rows, *_: [np.arange(rows.start, rows.stop, dtype=np.float64)],
        phases=[total, table, by_array, between, by_number],
    )
    return BoundModel(model, {}, seed=1, agents=300)


def on_device(bound, executor, steps):
    there = plane_of(bound, 1, (rs.PartitionWorker.cuda_device("gpu", 0),))
    there.run_partitions_with_executor(steps, executor)
    here = plane_of(bound, 1)
    here.run_partitions_with_executor(steps, rs.InlinePartitionExecutor())
    assert_same(here, there)
    there.close()


def test_values_of_a_step_may_be_arrays_but_no_numbers():
    """`by_number` takes a number, an argument; `by_array` an array, whose place changes now and then."""
    devices = Devices()
    on_device(taking_model(), CudaPartitionExecutor(devices), 12)
    counts = devices.made[0].counts
    # `total` is recorded for both ways that the sides stand; `by_array` never, as its array does not stay in
    # its place for as long as three launches of each.
    assert counts["capture"] == 2
    assert counts["replay"] == 12 - 4


def test_graphs_may_be_left_out():
    devices = Devices()
    on_device(taking_model(), CudaPartitionExecutor(devices, graphs=False), 8)
    assert devices.made[0].counts.get("capture", 0) == 0


def test_without_graphs_of_the_driver_steps_go_on():
    devices = Devices()
    devices(0).faults["capture"] = 1
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: device 0: capture refused"):
        on_device(taking_model(), CudaPartitionExecutor(devices), 9)
    assert devices.made[0].counts["capture"] == 1
    assert devices.made[0].counts.get("replay", 0) == 0


def test_the_key_of_a_job():
    for wanted in (True, False):
        spec, _ = spec_of("random_walk", None, backend="cpu", cuda_graphs=wanted)
        assert spec.run.cuda_graphs is wanted
    spec, _ = spec_of("random_walk", None, backend="cpu")
    assert spec.run.cuda_graphs


def test_the_stand_in_records_and_does_nothing():
    """What the tests above rely on."""
    device = StandInDevice()
    buffer, data, out = device.allocate(16), device.pinned(2), device.pinned(2)
    data[:] = 1, 2

    def queue():
        device.give(data, buffer)
        device.take(buffer, out)

    graph = device.capture(queue)
    device.synchronise()
    assert out.tolist() == [0x5A5A] * 2, "nothing was queued"
    for values in ((3, 4), (5, 6)):
        data[:] = values
        device.replay(graph)
        device.wait(device.mark())
        assert out.tolist() == list(values), "pinned memory as it is now"
    for refused in (
        device.mark,
        device.synchronise,
        lambda: device.allocate(1),
        lambda: device.order(COMPUTE, 1),
    ):
        with pytest.raises(AssertionError, match="not while a graph is recorded"):
            device.capture(refused)
