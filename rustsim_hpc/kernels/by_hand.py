"""Hand-written Numba loops: the baselines that the engine is measured against.

Each does in one pass what a model of :mod:`rustsim_hpc.bench.models` does, and nothing else: no reports, no
proof; a second buffer only in ``integrate_beside`` and ``integrate_around``. Functions whose names end in
``_cores`` divide the rows among Numba's threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import config, njit, prange, set_num_threads

# Imported for the LLVM option that it sets, which lets loops over many columns vectorise, here as in stages.
from rustsim_hpc.kernels import compiling as _compiling  # noqa: F401
from rustsim_hpc.kernels.hashing import mix
from rustsim_hpc.kernels.streaming import AHEAD, TOGETHER, fetch_rows, stream_rows, streamed

_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}
_U = np.uint64
_GOLDEN = _U(0x9E3779B97F4A7C15)
_UNIT = 2.0**-53


@njit(**_OPTIONS)
def copy(source, target):  # type: ignore[no-untyped-def]
    """Copy one array to another."""
    for i in range(source.size):
        target[i] = source[i]


@njit(**_OPTIONS)
def triad(target, one, two, factor):  # type: ignore[no-untyped-def]
    """Set target to one + factor * two, as STREAM does."""
    for i in range(target.size):
        target[i] = one[i] + factor * two[i]


@njit(**_OPTIONS)
def update(target, factor):  # type: ignore[no-untyped-def]
    """Multiply an array by a factor, in place."""
    for i in range(target.size):
        target[i] *= factor


@njit(**_OPTIONS)
def integrate(x, y, vx, vy, dt, keep):  # type: ignore[no-untyped-def]
    """Move and slow down particles: four float32 columns in one pass."""
    for i in range(x.size):
        x[i] += vx[i] * dt
        y[i] += vy[i] * dt
        vx[i] *= keep
        vy[i] *= keep


@njit(**_OPTIONS)
def integrate_beside(x, y, vx, vy, next_x, next_y, next_vx, next_vy, dt, keep):  # type: ignore[no-untyped-def]
    """Do what `integrate` does, from one set of columns to another, which keeps the previous state."""
    for i in range(x.size):
        next_x[i] = x[i] + vx[i] * dt
        next_y[i] = y[i] + vy[i] * dt
        next_vx[i] = vx[i] * keep
        next_vy[i] = vy[i] * keep


@njit(**_OPTIONS)
def integrate_around(x, y, vx, vy, next_x, next_y, next_vx, next_vy, dt, keep):  # type: ignore[no-untyped-def]
    """Do what `integrate_beside` does, with non-temporal stores, which do not read a line before filling it.

    The fastest known way to keep the previous state; Numba alone has no such stores. The new columns must
    start at the same offset within a cache line.
    """
    some_x, some_y = np.empty(TOGETHER, x.dtype), np.empty(TOGETHER, x.dtype)
    some_vx, some_vy = np.empty(TOGETHER, x.dtype), np.empty(TOGETHER, x.dtype)
    first = _U(min(-next_x.ctypes.data % 64 // x.itemsize, x.size))  # in front of the first whole line
    stop = _U(x.size) - (_U(x.size) - first) % _U(TOGETHER)
    for begin, end in ((_U(0), first), (stop, _U(x.size))):
        old = (x[begin:end], y[begin:end], vx[begin:end], vy[begin:end])
        new = (next_x[begin:end], next_y[begin:end], next_vx[begin:end], next_vy[begin:end])
        integrate_beside(*old, *new, dt, keep)
    at = first
    while at < stop:
        for column in (x, y, vx, vy):
            fetch_rows(column, at + _U(AHEAD))
        for k in range(_U(TOGETHER)):
            i = at + k
            some_x[k] = x[i] + vx[i] * dt
            some_y[k] = y[i] + vy[i] * dt
            some_vx[k] = vx[i] * keep
            some_vy[k] = vy[i] * keep
        stream_rows(next_x, at, some_x)
        stream_rows(next_y, at, some_y)
        stream_rows(next_vx, at, some_vx)
        stream_rows(next_vy, at, some_vy)
        at += _U(TOGETHER)
    streamed()


@njit(parallel=True, **_OPTIONS)
def integrate_cores(x, y, vx, vy, dt, keep):  # type: ignore[no-untyped-def]
    """Move and slow down particles: four float32 columns in one pass."""
    for i in prange(x.size):
        x[i] += vx[i] * dt
        y[i] += vy[i] * dt
        vx[i] *= keep
        vy[i] *= keep


@njit(parallel=True, **_OPTIONS)
def pull_cores(x, vx, k):  # type: ignore[no-untyped-def]
    """Accelerate along one axis towards 0."""
    for i in prange(x.size):
        vx[i] -= k * x[i]


@njit(parallel=True, **_OPTIONS)
def drag_cores(vx, vy, vz, keep):  # type: ignore[no-untyped-def]
    """Slow down along three axes."""
    for i in prange(vx.size):
        vx[i] *= keep
        vy[i] *= keep
        vz[i] *= keep


@njit(parallel=True, **_OPTIONS)
def move_cores(x, vx, dt):  # type: ignore[no-untyped-def]
    """Move along one axis."""
    for i in prange(x.size):
        x[i] += vx[i] * dt


@njit(parallel=True, **_OPTIONS)
def clamp_cores(x, y, z, width):  # type: ignore[no-untyped-def]
    """Keep positions in a box."""
    for i in prange(x.size):
        x[i] = min(max(x[i], -width), width)
        y[i] = min(max(y[i], -width), width)
        z[i] = min(max(z[i], -width), width)


def orbit_cores(columns: Sequence[Any], dt: Any, k: Any, keep: Any, width: Any) -> None:
    """Run the eight kernels of ``orbit``, each in its own loop, as separate functions.

    columns: x, y, z, vx, vy, vz.
    """
    x, y, z, vx, vy, vz = columns
    pull_cores(x, vx, k)
    pull_cores(y, vy, k)
    pull_cores(z, vz, k)
    drag_cores(vx, vy, vz, keep)
    move_cores(x, vx, dt)
    move_cores(y, vy, dt)
    move_cores(z, vz, dt)
    clamp_cores(x, y, z, width)


@njit(inline="always", **_OPTIONS)
def reflect(position, width):  # type: ignore[no-untyped-def]
    """Fold a position back into [0, width]."""
    if position < np.float32(0.0):
        return -position
    return np.float32(2.0) * width - position if position > width else position


@njit(**_OPTIONS)
def walk(x, y, first, seed, step, reach, width):  # type: ignore[no-untyped-def]
    """Walk at random between reflecting walls: two float32 columns, two draws for each row.

    Random numbers are from splitmix64, the fastest counter-based generator known. first: global row of row 0.
    """
    start = mix(_U(seed) + _U(step) * _GOLDEN)
    for i in range(x.size):
        z = start + _U(2) * (_U(first) + _U(i)) * _GOLDEN
        u = np.float64(mix(z) >> _U(11)) * _UNIT
        v = np.float64(mix(z + _GOLDEN) >> _U(11)) * _UNIT
        x[i] = reflect(x[i] + reach * np.float32(2.0 * u - 1.0), width)
        y[i] = reflect(y[i] + reach * np.float32(2.0 * v - 1.0), width)


@njit(**_OPTIONS)
def histogram(keys, counts):  # type: ignore[no-untyped-def]
    """Count keys (int32), each within the bins of ``counts`` (int64)."""
    counts[:] = 0
    for i in range(keys.size):
        counts[keys[i]] += 1


def use_threads(count: int) -> None:
    """Let prange loops run on ``count`` threads, or fewer if Numba has fewer."""
    set_num_threads(min(count, config.NUMBA_NUM_THREADS))
