"""What NVVM makes of every kernel: compiled for two kinds of devices, never fused, and the CPU's bits."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cuda_planes import Devices, needs_compiler
from ptx_machine import Machine

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.executors.cuda import CudaPartitionExecutor
from rustsim_hpc.executors.work import Frame
from rustsim_hpc.kernels.cuda_compile import compile_ptx
from rustsim_hpc.kernels.cuda_stage import DeviceArray, flat_arguments, kind_of
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model_source import load_model

pytestmark = needs_compiler

HERE = Path(__file__).parent
CAPABILITIES = [(8, 0), (9, 0)]
JOBS = ["us_flights", "particles", "random_walk"]
BENCH = ["integrate", "orbit", "tally", "walk"]
SOURCES = [
    *(HERE.parent / "jobs" / f"{name}.py" for name in JOBS),
    *(HERE.parent / "rustsim_hpc/bench/models" / f"{name}.py" for name in BENCH),
    HERE / "suite_kernels.py",
    HERE / "suite_fused.py",
]
# Rounded once, as IEEE 754 has it: what a device's assembler must not touch.
ROUNDED = re.compile(r"\b(?:add|sub|mul|div|rcp|sqrt)(?:\.\w+)*\.f(?:32|64)\b")
FUSED = re.compile(r"\b(?:fma|mad)(?:\.\w+)*\.f(?:32|64)\b")


def plane_of(bound, parts, workers=(), **config):
    plan = rs.PartitionPlan.row_ranges(bound.agents, parts)
    if workers:
        plan = plan.with_workers([worker.label for worker in workers])
    config = {"fingerprint": "digest", "replay_mode": rs.ReplayMode.record(), **config}
    plane = rs.EngineControlPlane(
        rs.ColumnarRuntime(bound.new_store(0, bound.agents)),
        rs.ControlPlaneConfig(partition_plan=plan, partition_workers=workers, **config),
    )
    plane.add_model(bound, checked=config.get("checked", False))
    return plane


def both(bound, steps, *, parts=2, devices=None):
    """Run on the CPU and on stand-ins; return both planes and the stand-ins."""
    devices = devices or Devices()
    workers = tuple(rs.PartitionWorker.cuda_device(f"gpu{k}", 0) for k in range(parts))
    here, there = plane_of(bound, 1), plane_of(bound, parts, workers)
    here.run_partitions_with_executor(steps, rs.InlinePartitionExecutor())
    there.run_partitions_with_executor(steps, CudaPartitionExecutor(devices))
    return here, there, devices


def assert_same(here, there):
    assert there.recorded_replay() == here.recorded_replay()
    mine, theirs = (plane.runtime.device_store().checkpoint() for plane in (here, there))
    assert mine == theirs
    assert set(here.values) == set(there.values)
    for name, value in here.values.items():
        assert np.asarray(value).tobytes() == np.asarray(there.values[name]).tobytes(), name


def assemble(image, capability, folder):
    """Let NVIDIA's assembler make machine code of PTX, as a driver does."""
    (folder / "stage.ptx").write_text(image)
    command = ["ptxas", f"-arch=sm_{capability[0]}{capability[1]}", "stage.ptx", "-o", "stage.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [(3, 0), (4, 0)], ids=str)
def test_a_device_too_old_for_the_compiler_is_told_of(capability):
    bound = drawing_model()
    with pytest.raises(errors.KernelError, match=r"compute capability \d\.0: .*not supported") as caught:
        both(bound, 1, devices=Devices(compute_capability=capability))
    assert "older" in caught.value.hint


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_models_give_the_cpus_bits_and_nothing_is_fused(path, capability, tmp_path):
    model, reference = load_model(str(path))
    params = {"initial_infectious": 5} if path.stem == "us_flights" else {}
    bound = BoundModel(model, params, seed=3, agents=3000, reference=reference)
    here, there, devices = both(bound, 3, devices=Devices(compute_capability=capability))
    assert_same(here, there)
    images = devices(0).images
    assert images
    for image in images:
        assert f".target sm_{capability[0]}{capability[1]}" in image
        assert not FUSED.search(image)
        if shutil.which("ptxas") and path.stem in JOBS:
            assemble(image, capability, tmp_path)
        assert all(".rn." in found for found in ROUNDED.findall(image))
    there.close()
    assert_same(here, there)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_what_is_allowed_to_be_fused_is(capability):
    """The check above can fail: with fma = true the same kernels are fused."""
    model, reference = load_model(str(SOURCES[1]))
    bound = BoundModel(model, {}, seed=3, agents=100, reference=reference)
    workers = (rs.PartitionWorker.cuda_device("gpu", 0),)
    for fma in (True, False):
        devices = Devices(compute_capability=capability)
        plane = plane_of(bound, 1, workers)
        stepper = plane.stepper(CudaPartitionExecutor(devices, fma=fma))
        run, program = stepper.session.runs[0], stepper.work.program
        run._device_stages.get(program.segments[0].items[0], Frame(0))
        [image] = devices(0).images
        assert bool(FUSED.search(image)) is fma
        plane.close()


# -- reductions --------------------------------------------------------------------------------------


def ugly_floats(dtype, count):
    """Every kind of float: of all exponents, zeros, subnormal ones; none that is not finite."""
    kind = np.dtype(dtype)
    bits = np.random.default_rng(11).integers(0, 2 ** (8 * kind.itemsize), count, f"u{kind.itemsize}")
    values = bits.view(kind)
    values = np.where(np.isfinite(values), values, kind.type(0.0)).astype(kind)
    values[:6] = [0.0, -0.0, 1e-45, -1e-45, 1.5, -1.5]
    return values


COLUMNS = {
    "f4": "float32", "f8": "float64", "i1": "int8", "i4": "int32", "i8": "int64", "u1": "uint8",
    "u4": "uint32", "u8": "uint64", "b": "bool",
}  # fmt: skip


def reductions():
    """Return one of each kind for each dtype that it takes."""
    made = []
    for column in COLUMNS:
        for kind in ("sum", "min", "max"):
            if (column, kind) == ("u8", "sum"):
                continue  # beyond int64: the next test
            fn = eval(f"lambda {column}: {column}", {})  # noqa: S307 (our own text)
            made.append(rs.reduction(kind, name=f"{kind}_{column}")(fn))
    for column in ("f4", "f8", "i4", "b"):
        fn = eval(f"lambda {column}: {column}", {})  # noqa: S307 (our own text)
        made.append(
            rs.reduction("sum", key=lambda id: id % 7, bins=7, name=f"keyed_{column}")(fn)  # noqa: A006
        )
    made.append(rs.reduction("count", name="positive")(lambda f8: f8 > 0))
    made.append(rs.reduction("count", key=lambda i4: abs(i4) % 5, bins=5, name="by")(lambda u1: u1 > 99))
    made.append(rs.reduction("histogram", bins=256, name="bytes")(lambda u1: u1))
    return made


def initial(rows, params, tables, seed):
    whole = np.random.default_rng(5)
    columns = {}
    for name, dtype in COLUMNS.items():
        kind = np.dtype(dtype)
        if kind.kind == "f":
            column = ugly_floats(dtype, 3000)
        elif kind.kind == "b":
            column = whole.random(3000) < 0.3
        else:
            limits = np.iinfo(kind)
            column = whole.integers(limits.min // 4096, limits.max // 4096, 3000, kind, endpoint=True)
            if kind.itemsize == 1:
                column = whole.integers(limits.min, limits.max, 3000, kind, endpoint=True)
        columns[name] = column[rows.start : rows.stop]
    return columns


@rs.row_kernel(writes="f4")
def keep(f4):
    return f4


def reducing_model():
    model = rs.Model(
        columns=[rs.Column(name, dtype) for name, dtype in COLUMNS.items()],
        initialise=initial,
        phases=[keep, *reductions()],
    )
    return BoundModel(model, {}, seed=1, agents=3000)


def test_every_reduction_gives_the_cpus_bits():
    here, there, _ = both(reducing_model(), 1, parts=3)
    assert_same(here, there)
    assert len(here.values) == len(reductions())
    there.close()


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, [np.inf, -np.inf], -np.nan])
def test_reductions_of_what_is_no_number(special):
    def start(rows, *_):
        values = np.linspace(-1, 1, 600)
        values[[17, 400]] = special
        return [values[rows.start : rows.stop]]

    model = rs.Model(
        columns=[rs.Column("x", "float64")],
        initialise=start,
        phases=[
            *(rs.reduction(kind, name=f"r_{kind}")(lambda x: x) for kind in ("sum", "min", "max")),
        ],
    )
    here, there, _ = both(BoundModel(model, {}, seed=1, agents=600), 1)
    assert_same(here, there)
    there.close()


# -- digests and stores ------------------------------------------------------------------------------

ALL = {
    "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool",
}  # fmt: skip


def storing_model(*, nan=False):
    """A float64 of every size into every dtype; out of range, NaN and signed zeros included."""

    def start(rows, *_):
        values = ugly_floats("float64", 5000)
        edges = [
            s * 2.0**k + d for k in (7, 8, 15, 16, 31, 32, 63, 64) for s in (-1, 1) for d in (-1, 0, 0.5)
        ]
        values[100 : 100 + len(edges)] = edges
        values[10:14] = [np.nan if nan else 1.0, np.inf, -np.inf, -0.0]
        return {"source": values[rows.start : rows.stop]} | {
            f"to_{dtype}": np.zeros(rows.stop - rows.start, dtype) for dtype in sorted(ALL)
        }

    spread = eval(f"lambda source: ({', '.join(['source'] * len(ALL))})", {})  # noqa: S307 (our own text)
    model = rs.Model(
        columns=[
            rs.Column("source", "float64"),
            *(rs.Column(f"to_{dtype}", dtype) for dtype in sorted(ALL)),
        ],
        initialise=start,
        phases=[rs.row_kernel(writes=tuple(f"to_{dtype}" for dtype in sorted(ALL)), name="spread")(spread)],
    )
    return BoundModel(model, {}, seed=1, agents=5000)


def test_values_are_stored_and_digested_as_on_the_cpu():
    here, there, _ = both(storing_model(nan=True), 2, parts=3)
    assert_same(here, there)
    there.close()


# -- random numbers ----------------------------------------------------------------------------------


@rs.row_kernel(writes=("a", "b", "c", "d", "e", "f", "g"))
def draw_all(rng, row):
    return (
        rs.random.uniform(rng, 0) + rs.random.uniform(rng, row % 50),
        rs.random.uniform32(rng, row % 7),
        rs.random.normal(rng, row % 9),
        rs.random.exponential(rng, row % 3),
        rs.random.integers(rng, 0, 10),
        rs.random.integers(rng, 1, 2**63 - 1 - row),
        rs.random.integers(rng, 2, 3 * 2**61 + 1),
    )


def drawing_model():
    dtypes = {"a": "float64", "b": "float32", "c": "float64", "d": "float64"} | dict.fromkeys("efg", "int64")
    model = rs.Model(
        columns=[rs.Column(name, dtype) for name, dtype in dtypes.items()],
        initialise=lambda rows, *_: [np.zeros(rows.stop - rows.start, dtype) for dtype in dtypes.values()],
        phases=[draw_all],
    )
    return BoundModel(model, {}, seed=2**64 - 1, agents=4000)


def test_random_numbers_are_the_same_integers_and_floats():
    here, there, _ = both(drawing_model(), 2)
    assert_same(here, there)
    there.close()


# -- many rows ---------------------------------------------------------------------------------------


FAR = """
def far(rows, out):
    i = np.int64(cuda.grid(1))
    while i < rows:
        out[i] = i
        i += np.int64(cuda.gridsize(1))
"""


def test_rows_beyond_two_to_the_31():
    """A few blocks in the middle of a huge grid, the column's address such that their rows lie in memory."""
    from numba import cuda

    namespace = {"np": np, "cuda": cuda}
    exec(FAR, namespace)  # noqa: S102 (our own text)
    rows, base, first = 3 * 2**31, 2**40, 2**32 + 512
    memory = np.zeros(8 * 512, np.uint8)
    out = DeviceArray(base - 8 * first, (rows,), np.dtype(np.int64))
    values = [np.int64(rows), out]
    image = compile_ptx(namespace["far"], [kind_of(v) for v in values], (9, 0), identity=FAR)
    machine = Machine(image.ptx.decode())
    machine.run(memory, base, 2, 256, flat_arguments(values), first_block=first // 256, grid=2**25)
    assert memory.view(np.int64).tolist() == list(range(first, first + 512))
