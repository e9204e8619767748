"""CUDA C on this CPU: as much of CuPy's RawKernel and ElementwiseKernel as the engine and the tests call.

The source is compiled by g++ with a small shim, and the threads of a launch run one after the other, so a
kernel in which they meet cannot run here. Contraction is off, as the engine asks for it.
"""

import ctypes
import re
import shutil
import subprocess
import tempfile
import types
from ctypes import CDLL
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from rustsim_hpc.modeling.device_kernel import as_device_kernel

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

SHIM = """
#include <cmath>
#include <cstdint>
#include <cstddef>
using namespace std;
#define __global__
#define __device__ static
#define __restrict__
struct uint3_ { unsigned x, y, z; };
struct any { void* p; template <class T> operator T*() const { return (T*)p; } };  // int64_t is no long long
static thread_local uint3_ threadIdx, blockIdx, blockDim = {1, 1, 1}, gridDim = {1, 1, 1};
"""
LAUNCH = """
extern "C" void shim_launch(unsigned blocks, unsigned threads, void** a) {
    gridDim = {blocks, 1, 1}; blockDim = {threads, 1, 1};
    for (unsigned b = 0; b < blocks; ++b) for (unsigned t = 0; t < threads; ++t) {
        blockIdx = {b, 0, 0}; threadIdx = {t, 0, 0};
        %s;
    }
}
"""
CTYPES = {
    "float32": "float", "float64": "double", "int64": "long long", "int32": "int", "uint8": "uint8_t",
    "bool": "bool", "int8": "int8_t", "uint64": "unsigned long long",
}  # fmt: skip


@lru_cache(maxsize=64)
def compiled(source):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cpp"
        path.write_text(SHIM + source)
        command = ["g++", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o", f"{path}.so", str(path)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return CDLL(f"{path}.so")


def launched(library, blocks, threads, values):
    """Call a library's launch: arrays by their address, numbers by value."""
    kept = [np.array(value.ctypes.data if value.ndim else value) for value in map(np.asarray, values)]
    pointers = (ctypes.c_void_p * len(kept))(*(value.ctypes.data for value in kept))
    library.shim_launch(blocks, threads, pointers)


class RawKernel:
    """Launched as a device launches it: `run` with addresses of a device's memory."""

    def __init__(self, code, name, options=()):
        self.code, self.name, self.options = code, name, options
        self._library = None

    def run(self, memory, base, blocks, threads, args):
        parameters = as_device_kernel(self.code, self.name).parameters
        assert len(args) == len(parameters)
        if self._library is None:
            words = [
                f"any{{*(void**)a[{k}]}}" if p.array else f"*({CTYPES[p.dtype]}*)a[{k}]"
                for k, p in enumerate(parameters)
            ]
            self._library = compiled(self.code + LAUNCH % f"{self.name}({', '.join(words)})")
        here = np.uint64(memory.ctypes.data - base)
        values = []
        for parameter, value in zip(parameters, args, strict=True):
            assert value.dtype == (np.uint64 if parameter.array else parameter.dtype)
            if parameter.dtype == "rs_rng":  # its last two words are addresses as well, if not 0
                words = memory[int(value) - base :][:32].view(np.uint64).copy()
                words[2:] += np.where(words[2:] > 0, here, np.uint64(0))
                values.append(words)
            else:
                values.append(value + here if parameter.array else value)
        launched(self._library, blocks, threads, values)


class ElementwiseKernel:
    def __init__(self, in_params, out_params, operation, name="kernel", **kwargs):
        self.in_params, self.out_params = _parameters(in_params, True), _parameters(out_params, False)
        self.operation, self.name, self.kwargs = operation, name, kwargs

    def __call__(self, *values):
        parameters = (*self.in_params, *self.out_params)
        assert len(values) == len(parameters)
        lines, size = [], 1
        for k, (p, value) in enumerate(zip(parameters, values, strict=True)):
            assert value.dtype == p.dtype
            kind = CTYPES[p.dtype.name]
            item = f"(*({kind}**)a[{k}])" if value.ndim else f"*({kind}*)a[{k}]"
            lines.append(f"{kind}* {p.name} = {item}" if p.raw else
                         f"{kind}& {p.name} = {item}{'[i]' if value.ndim else ''}")  # fmt: skip
            size = max(size, len(value) if value.ndim and not p.raw else 1)
        body = f"{{ size_t i = threadIdx.x; {'; '.join([*lines, self.operation])}; }}"
        launched(compiled(LAUNCH % body), 1, size, values)


def _parameters(text, is_const):
    found = re.findall(r"(raw )?(\w+) (\w+)", text)
    return tuple(
        types.SimpleNamespace(name=name, dtype=np.dtype(kind), raw=bool(raw), is_const=is_const)
        for raw, kind, name in found
    )
