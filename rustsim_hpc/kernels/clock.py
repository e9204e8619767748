"""A monotonic clock for compiled code (about 30 ns a call)."""

from __future__ import annotations

import time
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_NANOSECONDS = 1_000_000_000


@intrinsic
def now(_context: Any) -> Any:
    """Return nanoseconds of the monotonic clock."""

    def generate(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        # POSIX int clock_gettime(clockid_t, struct timespec *), by symbol, as addresses cannot be cached.
        clock_id, word = ir.IntType(32), ir.IntType(64)
        timespec = cgutils.alloca_once(builder, ir.ArrayType(word, 2))
        kind = ir.FunctionType(clock_id, [clock_id, timespec.type])
        function = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(function, [ir.Constant(clock_id, time.CLOCK_MONOTONIC), timespec])
        seconds, nanoseconds = cgutils.unpack_tuple(builder, builder.load(timespec), 2)
        return builder.add(builder.mul(seconds, ir.Constant(word, _NANOSECONDS)), nanoseconds)

    return types.int64(), generate
