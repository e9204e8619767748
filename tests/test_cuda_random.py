"""Random numbers in kernels that users write in CUDA C: the same bits as on the CPU."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from cuda_planes import Devices, needs_compiler
from cuda_source import needs_gxx
from ptx_machine import Machine

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.executors.cuda import CudaPartitionExecutor
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.device_kernel import as_device_kernel
from rustsim_hpc.modeling.device_random import source_with_random
from rustsim_hpc.random import DRAWS, MAX_STEP

NAMES = ("a", "b", "c", "d", "e")
DTYPES = ("float64", "float32", "float64", "float64", "int64")
SOME = 0x5555_5555_5555_5557  # of which one attempt in three is rejected
DRAW_ALL = r"""
extern "C" __global__ void draw_all(
    long long rows, double* a, float* b, double* c, double* d, long long* e, long long draw, long long many,
    const rs_rng* rng) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= rows) return;
    a[i] = rs_uniform(rng, i, draw); b[i] = rs_uniform32(rng, i, draw);
    c[i] = rs_normal(rng, i, draw); d[i] = rs_exponential(rng, i, draw);
    e[i] = rs_integers(rng, i, draw, many);
}
"""


@rs.column_phase(writes=NAMES, row_local=True, stream="its own", device=DRAW_ALL)
def draw_all(context, columns, rows):
    random, draw, many = context.random, context.params.draw, int(context.params.many)
    columns["a"], columns["b"] = random.uniform(draw), random.uniform32(draw)
    columns["c"], columns["d"] = random.normal(draw), random.exponential(draw)
    columns["e"] = random.integers(draw, many)


def run(draw, many, ids, steps, executor=None, step_index=0):
    params = {"draw": rs.Param("int64", default=draw), "many": rs.Param("int64", default=many)}
    model = rs.Model(
        params=params,
        columns=[rs.Column(name, dtype) for name, dtype in zip(NAMES, DTYPES, strict=True)],
        initialise=lambda rows, *_: [np.zeros(rows.stop - rows.start, dtype) for dtype in DTYPES],
        phases=[draw_all],
    )
    bound = BoundModel(model, {}, seed=7, agents=len(ids))
    columns = {name: np.zeros(len(ids), dtype) for name, dtype in zip(NAMES, DTYPES, strict=True)}
    plan, workers = rs.PartitionPlan.row_ranges(len(ids), 2), ()
    if executor is not None:
        plan, workers = plan.with_workers(["gpu"] * 2), (rs.PartitionWorker.cuda_device("gpu", 0),)
    given = None if np.array_equal(ids, np.arange(len(ids))) else ids
    plane = rs.EngineControlPlane(
        rs.ColumnarRuntime(rs.DeviceSoaStore.from_columns(given, columns), step_index=step_index),
        rs.ControlPlaneConfig(partition_plan=plan, partition_workers=workers),
    )
    plane.add_model(bound)
    plane.run_partitions_with_executor(steps, executor or rs.InlinePartitionExecutor())
    state = plane.runtime.device_store().checkpoint()
    plane.close()
    return state


@needs_compiler
@needs_gxx
@pytest.mark.parametrize(
    ("draw", "many"), [(0, 1), (1, 1000), (2, SOME), (3, 2**63 - 1), (DRAWS["integers"] - 1, 6)]
)
@pytest.mark.parametrize("default_ids", [True, False])
def test_a_kernel_draws_what_the_cpu_draws(draw, many, default_ids):
    ids = np.arange(600, dtype=np.uint64)
    if not default_ids:
        ids = np.random.default_rng(5).permutation(ids) * np.uint64(2**64 // 601) + np.uint64(17)
    there = run(draw, many, ids, 5, CudaPartitionExecutor(Devices()))
    assert there == run(draw, many, ids, 5)
    assert len(np.unique(there.columns[0])) == 600


@needs_compiler
@needs_gxx
def test_numbers_end_where_they_end_on_the_cpu():
    executor, ids = CudaPartitionExecutor(Devices()), np.arange(40)
    assert run(0, 9, ids, 1, executor, MAX_STEP) == run(0, 9, ids, 1, step_index=MAX_STEP)
    with pytest.raises(errors.ExecutorError, match="random numbers reach up to step 4294967295") as caught:
        run(0, 9, ids, 2, executor, MAX_STEP)
    assert (caught.value.phase, caught.value.step) == ("draw_all", MAX_STEP + 1)


@needs_compiler
@needs_gxx
def test_draws_and_counts_out_of_range_give_what_no_number_is():
    state = run(DRAWS["uniform32"], 0, np.arange(40), 1, CudaPartitionExecutor(Devices()))
    assert all(np.isnan(column).all() for column in state.columns[:4])
    assert (state.columns[4] == -1).all()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_what_nvcc_makes_of_it_gives_the_cpus_bits(tmp_path):
    """PTX, executed instruction by instruction: nothing is fused or approximate, or it would be refused."""
    path = tmp_path / "draw.cu"
    path.write_text(source_with_random(DRAW_ALL))
    command = ["nvcc", "-ptx", "--fmad=false", "-o", f"{path}.ptx", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    machine = Machine((tmp_path / "draw.cu.ptx").read_text())
    rows, base, key, step, many = 300, 2**40, rs.random.key_of(7, "its own"), 3, SOME
    memory = np.zeros(8 * (5 * rows + 8), np.uint8)
    words = memory.view(np.uint64)
    places = [base + 8 * rows * k for k in range(5)]
    rng = base + 8 * 5 * rows
    words[5 * rows :][:5] = key, 1000, 0, rng + 32, step
    numbers = [np.uint64(place) for place in places]
    machine.run(memory, base, 2, 256, [np.int64(rows), *numbers, np.int64(2), np.int64(many), np.uint64(rng)])
    random = rs.random.RowRandom(key, 1000, rows, step)
    wanted = [random.uniform(2), random.uniform32(2), random.normal(2), random.exponential(2)]
    for k, numbers in enumerate([*wanted, random.integers(2, many)]):
        assert memory[8 * rows * k :][: numbers.nbytes].tobytes() == numbers.tobytes(), NAMES[k]


def test_how_a_kernel_takes_its_stream():
    schema = rs.Schema(tuple(rs.Column(name, dtype) for name, dtype in zip(NAMES, DTYPES, strict=True)))
    kernel = as_device_kernel(DRAW_ALL, "draw_all")
    assert kernel.problem(schema, NAMES, {}, {}) == ""
    for wrong in ("rs_rng* rng", "rs_rng rng"):
        kernel = as_device_kernel(DRAW_ALL.replace("const rs_rng* rng", wrong), "draw_all")
        assert "rng is const rs_rng*: take it so" in kernel.problem(schema, NAMES, {}, {})
    plain = re.sub(r"rs_\w+", "x", DRAW_ALL)
    assert source_with_random(plain) == plain
