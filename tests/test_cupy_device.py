"""The device that CuPy gives, line by line, over a CuPy that is none; tests/test_gpu.py has a real one."""

import sys

import numpy as np
import pytest
import test_cuda_graphs as graphs
from cuda_planes import CudaSuite, expected, needs_compiler
from cuda_source import needs_gxx
from executor_suite import Driven
from fake_cupy import FakeCupy
from numba import types
from test_cuda_kernels import assert_same, plane_of

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.kernels import cuda_compile
from rustsim_hpc.state import cuda_found, cupy_device
from rustsim_hpc.state.cupy_device import CupyDevice
from rustsim_hpc.state.device import ASIDE, COMPUTE, TRANSFER

pytestmark = needs_compiler


@pytest.fixture
def cupy(monkeypatch):
    fake = FakeCupy(seed=3)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cuda_found.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(cuda_found.ctypes, "CDLL", lambda _: None)
    cuda_found._found.cache_clear()
    yield fake
    cuda_found._found.cache_clear()


@pytest.mark.parametrize("model", ["suite_model", "suite_kernels", "suite_fused"])
def test_steps_failures_and_restores(cupy, model, tmp_path):
    config = {"model": model, "rows": 90, "fingerprint": "digest"}
    driven = Driven(
        CudaSuite(devices=1), rs.CudaPartitionExecutor(), parts=3, trip=tmp_path / "trip", **config
    )
    driven.run(2)
    kept = driven.plane.checkpoint()
    before = driven.everything()
    for what in ("launch", "download", "wait"):
        if what == "launch" and model == "suite_model":
            what = "wait"  # noqa: PLW2901 (its phases are no kernels)
        cupy.standin.faults[what] = cupy.standin.counts[what] + 1
        with pytest.raises(errors.ExecutorError, match=f"{what} refused"):
            driven.run(1)
        assert driven.everything() == before
    driven.run(2)
    driven.plane.restore(kept)
    driven.run(3)
    assert driven.stream == expected(5, **config)
    driven.plane.close()
    assert not cupy.standin.live


def test_graphs_of_launches(cupy):
    config = {"model": "suite_fused", "rows": 90, "fingerprint": "digest"}
    driven = Driven(CudaSuite(devices=1), rs.CudaPartitionExecutor(), parts=1, **config)
    driven.run(8)
    assert cupy.standin.counts["capture"] == 2
    assert cupy.standin.counts["replay"] == 4
    cupy.standin.faults["replay"] = 5
    with pytest.raises(errors.ExecutorError, match="replay refused"):
        driven.run(1)
    driven.run(1)
    assert driven.stream == expected(9, **config)
    driven.plane.close()


@needs_gxx
def test_graphs_of_stages_and_cuda_c(cupy):
    bound = graphs.whole_steps(graphs.STIR)
    there = plane_of(bound, 1, (rs.PartitionWorker.cuda_device("gpu", 0),))
    there.run_partitions_with_executor(9, rs.CudaPartitionExecutor())
    assert cupy.standin.counts["capture"] == 2 * 2, "each of two segments, for both ways that the sides stand"
    assert cupy.standin.counts["replay"] == 2 * (9 - 4)
    here = plane_of(bound, 1)
    here.run_partitions_with_executor(9, rs.InlinePartitionExecutor())
    assert_same(here, there)
    there.close()
    assert not cupy.standin.live


def test_a_driver_that_makes_no_graphs(cupy):
    config = {"model": "suite_fused", "rows": 90, "fingerprint": "digest"}
    driven = Driven(CudaSuite(devices=1), rs.CudaPartitionExecutor(), parts=1, **config)
    made = CupyDevice(0)
    with pytest.raises(ZeroDivisionError):
        made.capture(lambda: 1 / 0)
    assert made.capture(lambda: None).made == [], "the one before has been ended"
    cupy.standin.faults["capture"] = cupy.standin.counts["capture"] + 1
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: .*capture refused"):
        driven.run(8)
    assert driven.stream == expected(8, **config)
    driven.plane.close()


def test_what_it_says_of_itself(cupy):
    made = CupyDevice(0)
    assert (made.ordinal, made.name, made.compute_capability) == (0, "stand-in", (9, 0))
    assert made.resident_threads == 512
    assert made.free_bytes() == cupy.standin.capacity
    assert cuda_found.visible_devices() == ("01" * 16,)
    with pytest.raises(errors.DeviceError, match="there is no CUDA device 1: this process sees 1"):
        CupyDevice(1)


def test_what_a_record_says_of_it(cupy, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_found, "_MODULE_VERSION", tmp_path / "version")
    facts = cuda_found.device_facts(0)
    assert facts == {
        "ordinal": 0, "name": "stand-in", "compute_capability": "9.0",
        "uuid": "GPU-01010101-0101-0101-0101-010101010101", "pci_bus_id": "0000:65:00.0",
        "memory_bytes": cupy.standin.capacity, "driver": "unknown", "cuda_driver": "12.4",
        "cuda_runtime": "12.9", "cupy": "14.2.0",
    }  # fmt: skip
    (tmp_path / "version").write_text("550.90.07\n")
    assert cuda_found.device_facts(0)["driver"] == "550.90.07"

    def broken(_):
        raise cupy.cuda.runtime.CUDARuntimeError(100, "cudaErrorNoDevice")

    cupy.cuda.runtime.deviceGetPCIBusId = broken
    with pytest.raises(errors.DeviceError, match="device 0: cudaErrorNoDevice"):
        cuda_found.device_facts(0)


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2000, 5003])
def test_data_larger_than_the_pinned_buffers(cupy, monkeypatch, size):
    monkeypatch.setattr(cupy_device, "_PINNED_BYTES", 1000)
    made = CupyDevice(0)
    data = np.random.default_rng(1).integers(0, 256, (2, size), np.uint8)
    buffers = [made.allocate(size), made.allocate(size), made.allocate(size)]
    out = np.zeros((2, size), np.uint8)
    made.upload(buffers[0], data[0])
    made.upload(buffers[1], data[1])
    made.copy(buffers[0], buffers[2])
    data_then, data[...] = data.copy(), 0  # which may change as soon as an upload has returned
    made.order(COMPUTE, TRANSFER)
    made.download(buffers[2], out[0])
    made.download(buffers[1], out[1])
    made.synchronise()
    assert np.array_equal(out, data_then)
    for buffer in buffers:
        made.release(buffer)
    assert not cupy.standin.live


def test_a_download_beside_the_steps_has_a_stream_of_its_own(cupy, monkeypatch):
    monkeypatch.setattr(cupy_device, "_PINNED_BYTES", 1000)
    made = CupyDevice(0)
    data = np.random.default_rng(1).integers(0, 256, 5003, np.uint8)
    buffer, out = made.allocate(data.nbytes), np.zeros_like(data)
    made.upload(buffer, data)
    made.order(COMPUTE, ASIDE)
    made.upload(made.allocate(8), np.zeros(1))  # queued on, and not waited for
    made.download(buffer, out, ASIDE)
    made.synchronise(ASIDE)
    assert np.array_equal(out, data)


def test_small_uploads_wait_for_none_before_them(cupy):
    made = CupyDevice(0)
    data = np.random.default_rng(1).integers(0, 2**63, (65, 3))
    buffers = [made.allocate(24) for _ in data]
    for row, buffer in zip(data[:64], buffers, strict=False):
        made.upload(buffer, row)
    assert not cupy.standin.counts["wait"]
    made.upload(buffers[64], data[64])
    assert cupy.standin.counts["wait"] == 1, "its piece is the first one's"
    out = made.pinned(3)
    for row, buffer in zip(data, buffers, strict=True):
        made.take(buffer, out)
        made.wait(made.mark())
        assert np.array_equal(out, row)


def test_pinned_memory_goes_there_and_back_behind_what_is_queued(cupy):
    made = CupyDevice(0)
    there, back = made.pinned(4), made.pinned(4)
    buffer = made.allocate(32)
    there[:] = 7
    made.give(there, buffer)
    first = made.mark()
    made.take(buffer, back)
    there[:] = 9, 8, 7, 6  # before the queue has come to it
    then = made.mark()
    made.wait(then)
    assert back.tolist() == [9, 8, 7, 6]
    assert made.nanoseconds(first, then) >= 0


def test_its_errors_are_typed(cupy):
    made = CupyDevice(0)
    with pytest.raises(errors.DeviceMemoryError) as caught:
        made.allocate(2**40)
    assert (caught.value.asked, caught.value.free) == (2**40, cupy.standin.capacity)
    cupy.standin.faults["allocate"] = cupy.standin.counts["allocate"] + 1
    with pytest.raises(errors.DeviceError, match=r"device 0 \(stand-in\): .*allocate refused"):
        made.allocate(8)
    buffer = made.allocate(8)
    cupy.standin.faults["upload"] = cupy.standin.counts["upload"] + 1
    with pytest.raises(errors.DeviceError, match="upload refused"):
        made.upload(buffer, np.zeros(1))
    cupy.standin.faults["synchronise"] = cupy.standin.counts["synchronise"] + 1
    with pytest.raises(errors.DeviceError, match="synchronise refused"):
        made.synchronise()
    with pytest.raises(errors.DeviceError, match="refuses a kernel: CUDA_ERROR_UNSUPPORTED") as caught:
        made.load(b"not PTX", "stage")
    assert "nvidia-cuda-nvcc-cu12" in caught.value.hint


def test_what_cupy_keeps_is_given_back_before_memory_is_refused(cupy):
    made = CupyDevice(0)
    cupy.pooled.append(made.allocate(cupy.standin.capacity - 64))
    buffer = made.allocate(128)
    assert (buffer.nbytes, cupy.pooled) == (128, [])
    with pytest.raises(errors.DeviceMemoryError):
        made.allocate(cupy.standin.capacity)
    made.release(buffer)


def first_is_one(values):
    values[0] = 1


def test_a_kernel_is_loaded_once_for_all_partitions(cupy):
    made = CupyDevice(0)
    kind = types.Array(types.float32, 1, "C")
    image = cuda_compile.compile_ptx(first_is_one, [kind], (9, 0), identity="a kernel of this test")
    assert made.load(image.ptx, image.entry) is made.load(image.ptx, image.entry)
    assert cupy.standin.counts["load"] == 1
    with pytest.raises(errors.DeviceError) as caught:
        made.load(b"CUDA_ERROR_OUT_OF_MEMORY", "stage")
    assert caught.value.hint is None, "the compiler is not to blame"


def test_a_device_that_is_lost_is_told_of_as_one(cupy):
    made = CupyDevice(0)
    buffer = made.allocate(8)
    cupy.lost = "cudaErrorIllegalAddress: an illegal memory access was encountered"
    for act in (made.free_bytes, made.mark, lambda: made.allocate(8), lambda: made.release(buffer)):
        with pytest.raises(errors.DeviceError, match=r"device 0 \(stand-in\): cudaErrorIllegalAddress"):
            act()


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        (
            ValueError('/some/kern.cu(3): error: identifier "y" is undefined\n    y = 1;\n    ^\n1 error'),
            'line 3: error: identifier "y" is undefined',
            None,
        ),
        (
            RuntimeError('Failure finding "libnvrtc.so.12"\n'),
            'Failure finding "libnvrtc.so.12"',
            cupy_device._HOW_TO_COMPILE,
        ),
    ],
)
def test_cuda_c_that_does_not_compile(cupy, error, said, hint):
    cupy.uncompiled = error
    with pytest.raises(errors.KernelError) as caught:
        CupyDevice(0).raw_kernel('extern "C" __global__ void pull() {}', "pull", fma=False)
    assert (str(caught.value), caught.value.hint) == (
        f"the CUDA C of kernel pull cannot be compiled: {said}",
        hint,
    )
    assert caught.value.exit_code == 2


def test_columns_of_a_phase(cupy):
    made = CupyDevice(0)
    schema = rs.Schema((rs.Column("x", "float32"), rs.Column("n", "int64")))
    parts = [(made.allocate(12), np.dtype("f4")), (made.allocate(24), np.dtype("i8"))]
    made.upload(parts[0][0], np.arange(3, dtype="f4"))
    with made.views(schema, parts, 3, (True, False)) as columns:
        assert len(columns) == 2
        assert columns[0] is columns["x"]
        columns["x"] *= np.float32(2)
        columns["x"] = columns["x"] + np.float32(1)
        with pytest.raises(TypeError, match='column "x" is float32'):
            columns["x"] = np.zeros(3)
        with pytest.raises(ValueError, match='"n" is not among the columns'):
            columns["n"] = np.zeros(3, "i8")
        with pytest.raises(ValueError, match='"n" is not among the columns'):
            columns["n"] += 1
    out = np.zeros(3, "f4")
    made.order(COMPUTE, TRANSFER)
    made.download(parts[0][0], out)
    made.synchronise()
    assert out.tolist() == [1, 3, 5]
