"""A user's kernels of CuPy for phases: parameters bound by name, misfits refused, the CPU's bits over g++."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from cuda_planes import Devices, needs_compiler
from cuda_source import ElementwiseKernel, RawKernel, needs_gxx
from fake_cupy import FakeCupy
from test_backend import fresh, spec_of  # noqa: F401 (a fixture)
from test_cuda_kernels import assert_same, plane_of
from test_gpu_docs import block

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.executors.cuda import CudaPartitionExecutor
from rustsim_hpc.job.backend import choose_backend
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.device_kernel import as_device_kernel
from rustsim_hpc.modeling.device_random import source_with_random
from rustsim_hpc.ranks.team import SoloTeam
from rustsim_hpc.state import cuda_found

SHIFT = """
// shift(float* not_this) {
extern "C" __global__ void shift(
    long long rows, long long row_start, float* __restrict__ x, const float *vx, float dt,
    const double* table, const long long* crowd, long long step /* of the run */) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= rows) return;
    x[i] = x[i] * 0.5f + vx[i] * dt + (float)(table[(row_start + i) % 4] + crowd[step % 4]);
}
"""


@rs.reduction("histogram", bins=4)
def crowd(x):
    return int(abs(x)) % 4


@rs.row_kernel(writes="vx")
def push(vx, x):
    return vx - x * 0.25


def shift(context, columns, rows):
    at = np.arange(context.row_start, context.row_end) % 4
    extra = TABLE[at] + context.reductions["crowd"][context.step_index % 4]
    dt = context.params.dt
    columns["x"] = columns["x"] * np.float32(0.5) + columns["vx"] * dt + extra.astype(np.float32)


TABLE = np.array([0.5, -1.0, 2.25, 3.0])
OPERATION = "x = x * 0.5f + vx * dt + (float)table[i % 4]"


def stretch(context, columns, rows):
    at = np.arange(rows) % 4
    columns["x"] = columns["x"] * np.float32(0.5) + columns["vx"] * context.params.dt + TABLE[at].astype("f4")


ELEMENTWISE = ElementwiseKernel(
    "float32 vx, float32 dt, raw float64 table", "float32 x", OPERATION, "stretch"
)


def bound_model(*phases, rows=700):
    model = rs.Model(
        params={"dt": rs.Param("float32", default=0.1)},
        columns=[rs.Column("x", "float32"), rs.Column("vx", "float32")],
        tables=lambda params: {"table": TABLE},
        initialise=lambda rows, *_: [
            np.linspace(rows.start, rows.stop - 1, rows.stop - rows.start, dtype=np.float32) / 7,
            np.ones(rows.stop - rows.start, np.float32),
        ],
        phases=list(phases),
    )
    return BoundModel(model, {}, seed=1, agents=rows)


def on_devices(bound, executor, parts, steps=5):
    there = plane_of(bound, parts, tuple(rs.PartitionWorker.cuda_device(f"w{k}", 0) for k in range(parts)))
    there.run_partitions_with_executor(steps, executor)
    return there


def phase_of(fn, device, **options):
    return rs.column_phase(writes="x", row_local=True, device=device, **options)(fn)


@needs_compiler
@needs_gxx
@pytest.mark.parametrize(
    ("fn", "device", "parts"),
    [(shift, SHIFT, 3), (shift, RawKernel(SHIFT, "shift"), 1), (stretch, ELEMENTWISE, 1)],
    ids=["text", "RawKernel", "ElementwiseKernel"],
)
def test_a_kernel_stands_for_a_phase(fn, device, parts):
    bound = bound_model(crowd, phase_of(fn, device), push)
    there = on_devices(bound, CudaPartitionExecutor(Devices()), parts)
    here = plane_of(bound, 1)
    here.run_partitions_with_executor(5, rs.InlinePartitionExecutor())
    assert_same(here, there)
    there.close()


@needs_compiler
@needs_gxx
def test_text_is_compiled_by_cupy_without_contraction(fresh, monkeypatch):  # noqa: F811
    fake = FakeCupy(seed=3)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cuda_found.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(cuda_found.ctypes, "CDLL", lambda _: None)
    bound = bound_model(crowd, phase_of(shift, SHIFT), push, rows=90)
    there = on_devices(bound, CudaPartitionExecutor(), 1)
    monkeypatch.undo()
    here = plane_of(bound, 1)
    here.run_partitions_with_executor(5, rs.InlinePartitionExecutor())
    assert_same(here, there)
    there.close()
    [(code, name, options)] = fake.raw_kernels
    assert (code, name, options) == (SHIFT, "shift", ("--fmad=false",))


@needs_compiler
@needs_gxx
def test_a_phase_may_have_no_twin_on_the_cpu():
    alone = rs.device_phase("shift", SHIFT, writes="x", row_local=True)
    there = on_devices(bound_model(crowd, alone, push), CudaPartitionExecutor(Devices()), 2)
    here = plane_of(bound_model(crowd, phase_of(shift, SHIFT), push), 1)
    here.run_partitions_with_executor(5, rs.InlinePartitionExecutor())
    assert_same(here, there)
    there.close()
    here = plane_of(bound_model(crowd, alone, push), 1)
    with pytest.raises(errors.ExecutorError, match='phase "shift" runs on CUDA devices alone'):
        here.run_partitions_with_executor(1, rs.InlinePartitionExecutor())


def test_a_job_of_such_a_phase_is_refused_on_the_cpu(monkeypatch):
    bound = bound_model(crowd, rs.device_phase("shift", SHIFT, writes="x"), push)
    spec, _ = spec_of("particles", None)
    monkeypatch.setattr(cuda_found, "why_no_device", lambda ordinal=0: "CUDA finds no device")
    with pytest.raises(errors.JobError, match="devices alone: CUDA finds no device") as caught:
        choose_backend(spec, bound, SoloTeam())
    assert caught.value.exit_code == 2


@needs_compiler
@needs_gxx
def test_the_example_of_the_page():
    namespace = {}
    exec(compile(block("python", 1), "docs/gpu.md", "exec"), namespace)  # noqa: S102 (the page's own text)
    bound = bound_model(namespace["pull"])
    there = on_devices(bound, CudaPartitionExecutor(Devices()), 2)
    here = plane_of(bound, 1)
    here.run_partitions_with_executor(5, rs.InlinePartitionExecutor())
    assert_same(here, there)
    there.close()
    assert namespace["pull_there"].device_only


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("code", "entry", "fused"),
    [(SHIFT, "shift", False), (SHIFT, "shift", True), (None, "pull", False)],
    ids=["not fused", "fused", "the page's"],
)
def test_nvcc_takes_it_and_fuses_nothing_unless_it_may(tmp_path, code, entry, fused):
    path = tmp_path / "shift.cu"
    path.write_text(code or source_with_random(re.search(r'r"""(.*?)"""', block("python", 1), re.DOTALL)[1]))
    options = [] if fused else ["--fmad=false"]
    command = ["nvcc", "-ptx", *options, "-o", f"{path}.ptx", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "shift.cu.ptx").read_text()
    assert f".entry {entry}(" in text
    assert ("fma.rn" in text) is fused


# -- what does not fit -------------------------------------------------------------------------------


def kernel_of(parameters):
    return f'extern "C" __global__ void shift({parameters}) {{ }}'


@needs_compiler
@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ("double* x", "x is float32, and the kernel takes float64"),
        ("float* x, float vx", "vx is an array: take it by a pointer"),
        ("float* x, float* vx", "vx is not among the columns that its phase writes: take it as const"),
        ("float* x, const float* dt", "dt is one number: take it by value"),
        ("float* x, double dt", "dt is float32, and the kernel takes float64"),
        ("float* x, double* table", "table is no column: take it as const"),
        ("float* x, int rows", "rows is int64, and the kernel takes int32"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(parameters, text):
    bound = bound_model(crowd, phase_of(shift, kernel_of(parameters)), push)
    with pytest.raises(errors.ExecutorError, match=text) as caught:
        on_devices(bound, CudaPartitionExecutor(Devices()), 1)
    assert caught.value.phase == "shift"


@needs_compiler
@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ("float* x, const double* crowd", "takes crowd as float64, and it is int64"),
        ("float* x, long long crowd", "takes crowd as a number"),
        ("float* x, float speed", "takes speed, which is no column, parameter, table or result"),
    ],
)
def test_what_only_a_step_can_tell(parameters, text):
    bound = bound_model(crowd, phase_of(shift, kernel_of(parameters)), push)
    with pytest.raises(errors.ExecutorError, match=text) as caught:
        on_devices(bound, CudaPartitionExecutor(Devices()), 1)
    assert (caught.value.phase, caught.value.step) == ("shift", 0)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ('extern "C" __global__ void shfit(float* x) {}', r'no kernel shift \(did you mean "shfit"\?\)'),
        ("", "no kernel shift"),
        ("__global__ void shift(float* x) {}", 'kernel shift is not extern "C"'),
        (kernel_of("float4* x"), r"takes float4\* x: no column or number is of that type"),
        (kernel_of("float** x"), r"takes float\*\* x"),
    ],
)
def test_what_is_no_kernel(code, text):
    with pytest.raises(errors.ModelError, match=text):
        phase_of(shift, code)


def test_a_kernel_that_does_not_tell_its_source():
    with pytest.raises(errors.ModelError, match="does not tell its source"):
        as_device_kernel(RawKernel(None, "shift"), "shift")
    with pytest.raises(errors.ModelError, match="needs a function or kernel for CUDA devices, got None"):
        rs.device_phase("shift", None)


def test_a_kernel_is_part_of_a_models_identity():
    phases = [phase_of(shift, text) for text in (SHIFT, SHIFT, SHIFT.replace("0.5f", "0.25f"))]
    same, again, other = (bound_model(crowd, phase, push).identity() for phase in phases)
    assert same == again != other
    kernels = [
        ElementwiseKernel("float32 vx", "float32 x", operation, "stretch", **more)
        for operation, more in (("x = vx", {}), ("x = -vx", {}), ("x = vx", {"options": ("--fmad=false",)}))
    ]
    assert len({bound_model(phase_of(stretch, kernel)).identity() for kernel in kernels}) == 3
