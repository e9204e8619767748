"""On a real device: the executors' suite, every kernel against the CPU, and a table. See docs/gpu.md.

::

    python -m pytest -m gpu -s
"""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_cuda_arithmetic as arithmetic
import test_cuda_graphs as graphs
import test_cuda_kernels as kernels
import test_cuda_random as randoms
import test_cuda_source as sources
from cuda_planes import CudaSuite, Devices, needs_compiler
from executor_suite import ExecutorSuite
from gpu_table import measure

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model_source import load_model
from rustsim_hpc.state.cuda_found import device_facts, visible_devices, why_no_device
from rustsim_hpc.state.cupy_device import CupyDevice
from rustsim_hpc.state.device import COMPUTE, TRANSFER

JOBS = Path(__file__).resolve().parent.parent / "jobs"
no_device = why_no_device()


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(bool(no_device), reason=no_device)(needs_compiler(test)))


@gpu
class TestOnADevice(ExecutorSuite):
    plan = CudaSuite(devices=max(1, min(2, len(visible_devices())))).plan

    @pytest.fixture
    def make_executor(self):
        return rs.CudaPartitionExecutor

    @pytest.fixture
    def make_other(self):
        return rs.CudaPartitionExecutor


@gpu
@pytest.mark.parametrize("path", kernels.SOURCES, ids=lambda path: path.stem)
def test_models_give_the_cpus_bits(path):
    model, reference = load_model(str(path))
    bound = BoundModel(model, {}, seed=3, agents=1_000_003, reference=reference)
    here, there, _ = kernels.both(bound, 5, devices=CupyDevice)
    kernels.assert_same(here, there)
    there.close()


@gpu
@pytest.mark.parametrize("name", ["reductions", "stores", "random numbers"])
def test_the_rest_of_the_kernels(name):
    models = {
        "reductions": kernels.reducing_model,
        "stores": kernels.storing_model,
        "random numbers": kernels.drawing_model,
    }
    bound = models[name]()
    here, there, _ = kernels.both(bound, 2, parts=3, devices=CupyDevice)
    kernels.assert_same(here, there)
    there.close()


@gpu
@pytest.mark.parametrize(("text", "dtype"), arithmetic.CASES)
def test_operators_give_the_cpus_bits(text, dtype):
    arithmetic.compare(text, dtype, devices=CupyDevice)


@gpu
def test_a_users_kernel_gives_the_cpus_bits():
    phases = [sources.crowd, sources.phase_of(sources.shift, sources.SHIFT), sources.push]
    here, there, _ = kernels.both(sources.bound_model(*phases, rows=100_003), 5, parts=3, devices=CupyDevice)
    kernels.assert_same(here, there)
    there.close()


@gpu
@pytest.mark.parametrize("kind", ["RawKernel", "ElementwiseKernel"])
def test_kernels_made_with_cupy_give_the_cpus_bits(kind):
    import cupy

    options = ("--fmad=false",)
    if kind == "RawKernel":
        phase = sources.phase_of(sources.shift, cupy.RawKernel(sources.SHIFT, "shift", options=options))
    else:
        takes = "float32 vx, float32 dt, raw float64 table"
        made = cupy.ElementwiseKernel(takes, "float32 x", sources.OPERATION, "stretch", options=options)
        phase = sources.phase_of(sources.stretch, made)
    bound = sources.bound_model(sources.crowd, phase, sources.push, rows=100_003)
    here, there, _ = kernels.both(
        bound, 5, devices=CupyDevice
    )  # a kernel that counts rows from 0 has one part
    kernels.assert_same(here, there)
    there.close()


@gpu
@pytest.mark.parametrize("job", ["us_flights", "particles", "random_walk"])
def test_jobs_by_the_command_line(job, tmp_path):
    """Run, resumed on the other side, verified: each as a user would, in a process of its own."""
    command = [sys.executable, "-m", "rustsim_hpc"]

    def engine(*words):
        done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    ends = {}
    for first, then in (("cpu", "cuda"), ("cuda", "cpu")):
        out = tmp_path / first
        engine("run", JOBS / f"{job}.toml", "--steps", 6, "--backend", first, "--record", "--out", out)
        engine("resume", out, "--steps", 12, "--backend", then)
        ends[first] = rs.open_run(out).fingerprint
    assert ends["cpu"] == ends["cuda"]
    engine("verify", tmp_path / "cuda", "--against", tmp_path / "cpu" / "replay.jsonl")


@gpu
def test_graphs_of_launches():
    """As many steps as it takes to replay them, with random numbers and reductions of each step."""
    here, there, _ = kernels.both(kernels.drawing_model(), 9, parts=2, devices=CupyDevice)
    kernels.assert_same(here, there)
    there.close()


@gpu
def test_graphs_of_all_that_follows_a_meeting():
    here, there, _ = kernels.both(graphs.whole_steps(graphs.STIR), 11, parts=2, devices=CupyDevice)
    kernels.assert_same(here, there)
    there.close()


@gpu
@pytest.mark.parametrize("draw", [0, 3])
def test_random_numbers_of_cuda_c(draw):
    ids = np.random.default_rng(5).permutation(100_003).astype(np.uint64)
    there = randoms.run(draw, randoms.SOME, ids, 5, rs.CudaPartitionExecutor())
    assert there == randoms.run(draw, randoms.SOME, ids, 5)


@gpu
def test_copies_beside_the_steps():
    model, reference = load_model(str(kernels.SOURCES[2]))
    bound = BoundModel(model, {}, seed=3, agents=1_000_003, reference=reference)
    here, there, _ = kernels.both(bound, 4, devices=CupyDevice)
    memory = there.runtime.device_store().memory
    out = [np.zeros_like(place) for place in memory.places()]
    executor = rs.CudaPartitionExecutor()
    there.run_partitions_with_executor(1, executor)
    arrived = memory.copy_aside(out)
    there.run_partitions_with_executor(5, executor)
    arrived()
    here.run_partitions_with_executor(1, rs.InlinePartitionExecutor())
    columns = here.runtime.device_store().columns
    assert [values.tobytes() for values in out] == [column.tobytes() for column in columns]
    there.close()


@gpu
def test_memory_copies_and_what_is_too_much():
    device = CupyDevice(0)
    free = device.free_bytes()
    data = np.random.default_rng(2).integers(0, 2**63, 2**23)
    first, second = device.allocate(data.nbytes), device.allocate(data.nbytes)
    device.upload(first, data)
    device.copy(first, second)
    out = np.zeros_like(data)
    device.order(COMPUTE, TRANSFER)
    device.download(second, out)
    device.synchronise()
    assert np.array_equal(out, data)
    with pytest.raises(errors.DeviceMemoryError) as caught:
        device.allocate(free * 2)
    assert caught.value.asked == free * 2
    device.release(first)
    device.release(second)
    assert math.isclose(device.free_bytes(), free, rel_tol=0.1)


@gpu
def test_the_table():
    rows = min(50_000_000, CupyDevice(0).free_bytes() // 200)
    print("\n" + "\n".join([str(device_facts(0)), *measure(CupyDevice, rows)]))


@needs_compiler
def test_the_table_can_be_made():
    """Over a stand-in: the numbers mean nothing, but nothing is missing."""
    lines = measure(Devices(), 300, steps=1)
    assert lines[0].startswith("device stand-in, sm_90")
    assert [line.split(" | ")[0].strip("| ") for line in lines[3:-1]] == [
        "integrate",
        "orbit",
        "walk",
        "random_walk",
    ]
    assert lines[-1].startswith("a step of one row: ")


def test_without_a_device_the_command_says_so():
    if not no_device:
        pytest.skip("there is a device")
    words = [
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__)),
        "-k",
        "memory_copies",
    ]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 1, done.stdout
    assert f"GPU: NOT RUN ({no_device})" in done.stdout


@pytest.mark.parametrize(
    ("passed", "failed", "skipped", "said"),
    [
        (5, 0, 0, "GPU: PASSED, 5 tests"),
        (5, 0, 2, "GPU: PASSED, 5 tests, 2 skipped (no nvcc)"),
        (5, 1, 2, "GPU: FAILED, 1 of 6 tests"),
        (0, 0, 2, "GPU: NOT RUN (no nvcc)"),
        (0, 0, 0, "GPU: NOT RUN (no tests were selected)"),
    ],
)
def test_verdict(request, passed, failed, skipped, said):
    [conftest] = [p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "verdict")]
    counts = {"passed": passed, "failed": failed, "error": 0, "skipped": skipped}
    assert conftest.verdict(counts, ["Skipped: no nvcc"] * skipped) == said
