"""Run models on a stand-in device whose kernels are executed by Numba's CUDA simulator: a program of its own.

The generated kernels themselves (grid, strides, accumulators, atomic operations) run as Python, a thread for
each of the device's; what they call for a row is compiled for this CPU, as Python's own arithmetic has not
Numba's types. tests/test_cuda_simulator.py starts it with NUMBA_ENABLE_CUDASIM=1, which holds for a whole
process, and reads its lines: a model's path, and what differs from the CPU.
"""

import json
import os
import sys
import threading
import warnings

import numba
import numpy as np
from numba import cuda
from standin_device import BASE, StandInDevice

import rustsim_hpc as rs
from rustsim_hpc.executors.cuda import CudaPartitionExecutor
from rustsim_hpc.kernels import cuda_bodies, cuda_builtins
from rustsim_hpc.kernels.convert import fits, stored
from rustsim_hpc.kernels.cuda_compile import Image
from rustsim_hpc.kernels.cuda_stage import CudaStage, DeviceArray
from rustsim_hpc.kernels.hashing import load_item
from rustsim_hpc.kernels.reduce import _sort_key
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model_source import load_model

ROWS, STEPS, THREADS = 700, 2, 512
KERNELS = {}
_digest_item = cuda_bodies.digest_item
_one_at_a_time = threading.Lock()  # Numba compiles at the first call


def called(function):
    """Return a compiled function as the simulator's threads may call it: with arrays that are arrays."""
    compiled = numba.njit(function, error_model="numpy")

    def call(*arguments):
        with _one_at_a_time:
            return compiled(*map(_plain, arguments))

    return call


def _plain(value):
    return getattr(getattr(value, "_item", value), "_ary", value)


# In functions of their own: these are only good within compiled code.
_digest = called(lambda bits, row, keys, at, wide: _digest_item(bits, row, keys, at, wide))  # noqa: PLW0108
COMPILED = {
    "stored": called(lambda value, column: stored(value, column)),  # noqa: PLW0108
    "fits": called(lambda value, column: fits(value, column)),  # noqa: PLW0108
    "load_item": called(lambda array, i: load_item(array, i)),  # noqa: PLW0108
    "sort_key": called(lambda value: _sort_key(value)),  # noqa: PLW0108
    "digest_item": lambda *arguments: np.uint64(_digest(*arguments) & (2**64 - 1)),
}


def image(stage, values, capability, *, fma=False):
    """Take the place of `CudaStage.image`: the name of a Python function instead of PTX."""
    names = {**cuda_bodies.cuda_names(), **COMPILED}
    names |= {name: called(getattr(fn, "fn", fn)) for name, fn in stage.functions.items()}
    name = f"kernel {len(KERNELS)}"
    KERNELS[name] = cuda.jit(stage.python(names)), values
    return Image(name.encode(), name)


class Simulated(StandInDevice):
    def load(self, image, name):
        return name

    def _execute(self, kernel, blocks, threads, arguments, fails):
        self._made += 1
        function, values = KERNELS[kernel]
        words = iter(arguments)
        given = [
            self._array(value, words) if isinstance(value, DeviceArray) else next(words) for value in values
        ]
        function[blocks, threads](*given)

    def _array(self, value, words):
        """Return the part of the device's memory that the words of an array stand for."""
        _, _, size, itemsize, address, *_ = (int(next(words)) for _ in value.words)
        if not size:
            return np.zeros(value.shape, value.dtype)
        start = address - BASE
        return self._memory[start : start + size * itemsize].view(value.dtype).reshape(value.shape)


def plane_of(bound, workers=()):
    plan = rs.PartitionPlan.row_ranges(bound.agents, 1)
    if workers:
        plan = plan.with_workers([worker.label for worker in workers])
    config = rs.ControlPlaneConfig(
        partition_plan=plan,
        partition_workers=workers,
        fingerprint="digest",
        replay_mode=rs.ReplayMode.record(),
    )
    plane = rs.EngineControlPlane(rs.ColumnarRuntime(bound.new_store(0, bound.agents)), config)
    plane.add_model(bound)
    return plane


def differences(path):
    """Return names of what a model makes otherwise on the simulated device than on the CPU."""
    model, reference = load_model(path)
    flights = path.endswith("us_flights.py")  # its airports need some residents
    params = {"initial_infectious": 5} if flights else {}
    bound = BoundModel(model, params, seed=3, agents=5000 if flights else ROWS, reference=reference)
    here, there = plane_of(bound), plane_of(bound, (rs.PartitionWorker.cuda_device("gpu", 0),))
    here.run_partitions_with_executor(STEPS, rs.InlinePartitionExecutor())
    device = Simulated(resident_threads=THREADS)
    there.run_partitions_with_executor(STEPS, CudaPartitionExecutor(lambda _: device))
    found = [] if here.recorded_replay() == there.recorded_replay() else ["fingerprints"]
    stores = [plane.runtime.device_store() for plane in (here, there)]
    for name, mine, theirs in zip(stores[0].column_names, stores[0].columns, stores[1].columns, strict=True):
        found += [] if mine.tobytes() == theirs.tobytes() else [name]
    found += [] if device.counts["launch"] >= STEPS else ["no launches"]
    there.close()
    return found


if __name__ == "__main__":
    # On several cores the threads hand the interpreter's lock to and fro, which takes minutes now and then.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    warnings.simplefilter("ignore")  # of NumPy's scalars: integers wrap here on purpose
    CudaStage.image = image
    cuda_builtins.register = lambda: None  # what it registers is for the compiler
    for source in sys.argv[1:]:
        print(json.dumps([source, differences(source)]), flush=True)
