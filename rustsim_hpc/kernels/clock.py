"""A monotonic clock that compiled code can read without leaving it (about 30 ns a call)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numba import njit, types

# POSIX clock_gettime(clockid, struct timespec *); an external symbol, unlike a ctypes pointer, can be cached.
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))
_MONOTONIC = np.int32(time.CLOCK_MONOTONIC)


@njit(nogil=True, error_model="numpy", cache=True)
def now(ticks: Any) -> Any:
    """Return nanoseconds of the monotonic clock; ``ticks`` is scratch: int64 (2,)."""
    _clock_gettime(_MONOTONIC, types.intp(ticks.ctypes.data))
    return ticks[0] * 1_000_000_000 + ticks[1]


def new_ticks() -> Any:
    """Return scratch for :func:`now`: a struct timespec, int64 (2,)."""
    return np.zeros(2, np.int64)
