"""Launches that take the same arguments every time are recorded once and replayed: the same bits."""

import numpy as np
import pytest
from cuda_planes import Devices, cuda, expected, needs_compiler
from cuda_source import needs_gxx
from standin_device import StandInDevice
from test_backend import spec_of
from test_cuda_kernels import assert_same, plane_of

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.executors.cuda import CudaPartitionExecutor
from rustsim_hpc.executors.device_queue import Flight, Piece, Series
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.state.device import COMPUTE

pytestmark = needs_compiler


@pytest.mark.parametrize("model", ["suite_fused", "suite_kernels"])
@pytest.mark.parametrize("guard", ["rollback", "torn"])
def test_the_same_graph_serves_all_steps(model, guard):
    """Steps, random numbers, digests, reductions and numbers made of them: a graph reads what is now."""
    config = {"model": model, "rows": 90, "fingerprint": "digest", "guard": rs.StepGuard(guard)}
    driven, devices = cuda(parts=2, **config)
    driven.run(6)
    devices.calls.clear()
    driven.run(3)
    for k in range(2):
        asked = [what for device, what in devices.calls if device == k]
        # Of suite_kernels: before the meeting; after it up to the phase of CuPy; its digest.
        assert asked.count("replay") == asked.count("launch") == (3 if model == "suite_fused" else 9)
        assert not {"give", "take", "capture"} & set(asked)
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


# -- several launches in one graph -------------------------------------------------------------------

STIR = r"""
extern "C" __global__ void stir(long long rows, float* x, const float* vx, const long long* step, float dt,
                                const double* mean, const rs_rng* rng) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < rows) x[i] = x[i] + (float)(rs_uniform(rng, i, 1) * dt - *mean / 64) + (float)(*step % 3) * vx[i];
}
"""
BY_VALUE = STIR.replace("const long long* step", "long long step").replace("*step", "step")


def stir(context, columns, rows):
    mean, dt, third = context.reductions["mean"], context.params.dt, np.float32(context.step_index % 3)
    moved = (context.random.uniform(1) * np.float64(dt) - mean / 64).astype(np.float32)
    columns["x"] = columns["x"] + moved + third * columns["vx"]


@rs.reduction("sum")
def all_x(x):
    return x


@rs.derive
def mean(all_x, step):
    return all_x / (300 + step)


@rs.row_kernel(writes="vx")
def slow(vx, mean, rng):
    return vx * 0.75 - mean * rs.random.normal(rng, 0) / 512


@rs.reduction("histogram", bins=9)
def crowd(x, step, row, bad_step):
    return 11 if step == bad_step and row == 205 else int(abs(x)) % 9


@rs.row_kernel(writes="x")
def last(x, vx):
    return x - vx * 0.5


def whole_steps(code, bad_step=-1):
    """Return a model of two segments; the second one is stages around a kernel of CUDA C, and no host."""
    model = rs.Model(
        params={"dt": rs.Param("float32", default=0.1), "bad_step": rs.Param("int64", default=bad_step)},
        columns=[rs.Column("x", "float32"), rs.Column("vx", "float32")],
        initialise=lambda rows, *_: [
            np.arange(rows.start, rows.stop, dtype=np.float32) / 7,
            np.ones(rows.stop - rows.start, np.float32),
        ],
        phases=[
            all_x, mean, slow, rs.column_phase(writes="x", row_local=True, device=code)(stir), crowd, last,
        ],
    )  # fmt: skip
    return BoundModel(model, {}, seed=1, agents=300)


@needs_gxx
@pytest.mark.parametrize("code", [STIR, BY_VALUE], ids=["by pointer", "by value"])
def test_all_that_follows_a_meeting_is_one_graph(code):
    """Guard copies, stages, users' kernels, digests: what takes its step by value alone is not in it."""
    devices, bound = Devices(), whole_steps(code)
    there = plane_of(bound, 2, tuple(rs.PartitionWorker.cuda_device(f"w{k}", k) for k in range(2)))
    executor = CudaPartitionExecutor(devices)
    there.run_partitions_with_executor(6, executor)
    devices.calls.clear()
    there.run_partitions_with_executor(4, executor)
    asked = [what for device, what in devices.calls if device == 1]
    assert asked.count("launch") == 4 * 4
    if code is STIR:  # all_x; slow, stir, crowd and last
        assert asked.count("replay") == asked.count("wait") == 4 * 2
        assert not {"give", "take", "copy", "upload", "capture"} & set(asked)
    else:  # all_x; slow; stir by calls; crowd and last
        assert asked.count("replay") == 4 * 3
        assert asked.count("give") == 4
    here = plane_of(bound, 1)
    here.run_partitions_with_executor(10, rs.InlinePartitionExecutor())
    assert_same(here, there)
    there.close()


@needs_gxx
def test_a_row_that_fails_in_a_graph_is_named_as_on_the_cpu():
    bound = whole_steps(STIR, bad_step=8)
    texts = []
    for executor, workers in (
        (CudaPartitionExecutor(Devices()), [rs.PartitionWorker.cuda_device(f"w{k}", k) for k in range(2)]),
        (rs.InlinePartitionExecutor(), ()),
    ):
        plane = plane_of(bound, 2, tuple(workers))
        plane.run_partitions_with_executor(8, executor)
        before = plane.fingerprint()
        with pytest.raises(errors.ExecutorError, match="key 11 of row 205 is outside") as caught:
            plane.run_partitions_with_executor(1, executor)
        texts.append((str(caught.value), caught.value.phase, caught.value.step, caught.value.partition))
        assert plane.fingerprint() == before
        plane.close()
    assert texts[0] == texts[1]
    assert texts[0][1:] == ("crowd", 8, rs.PartitionId(1))


@needs_gxx
def test_what_a_device_tells_of_a_graph_names_all_that_is_in_it():
    devices, bound = Devices(), whole_steps(STIR)
    plane = plane_of(bound, 1, (rs.PartitionWorker.cuda_device("gpu", 0),))
    executor = CudaPartitionExecutor(devices)
    plane.run_partitions_with_executor(7, executor)
    before, broken = plane.fingerprint(), devices.made[0]
    broken.faults["kernel"] = broken.counts["launch"] + 3
    with pytest.raises(
        errors.ExecutorError, match=r"illegal memory .*in one of the phases slow, stir, crowd, last\)"
    ) as caught:
        plane.run_partitions_with_executor(1, executor)
    assert (caught.value.phase, caught.value.step) == ("slow", 7)
    assert plane.fingerprint() == before
    plane.run_partitions_with_executor(2, executor)
    here = plane_of(bound, 1)
    here.run_partitions_with_executor(9, rs.InlinePartitionExecutor())
    assert_same(here, plane)
    plane.close()


def test_the_time_of_a_graph_is_shared_as_it_was_without():
    pieces = tuple(Piece(phases, lambda: None, k) for k, phases in enumerate([(0,), (1, 2), (3,)]))
    series = Series(pieces, [0, 0, 0])
    together = Flight((0, 1, 2, 3), (), None, series)
    assert together.share(300) == [(0, 100), (1, 50), (2, 50), (3, 100)]
    for k, spent in enumerate((10, 60, 30)):
        alone = Flight(pieces[k].phases, (), None, series, k)
        assert sum(part for _, part in alone.share(spent)) == spent
    assert together.share(1000) == [(0, 100), (1, 300), (2, 300), (3, 300)]


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


def test_values_of_a_step():
    """`by_number` reads a number where it was told; that of `by_array` moves now and then."""
    devices = Devices()
    on_device(taking_model(), CudaPartitionExecutor(devices), 13)
    counts = devices.made[0].counts
    # Each way that the sides stand comes every second step, and is recorded the third time. `by_array` never
    # is, as its array does not stay in its place for so long.
    assert counts["capture"] == 2 * 2
    assert counts["replay"] == 2 * (13 - 4)


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
        lambda: device.upload(buffer, data),
        lambda: device.download(buffer, out),
        lambda: device.release(buffer),
        lambda: device.array(data),
        lambda: device.pinned(1),
        lambda: device.load(b"", "stage"),
        lambda: device.replay(graph),
    ):
        with pytest.raises(AssertionError, match="not while a graph is recorded"):
            device.capture(refused)
    device.release(buffer)
    with pytest.raises(AssertionError, match="memory that was given back"):
        device.replay(graph)
