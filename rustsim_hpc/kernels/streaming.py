"""Write rows around the cache: what a step writes is evicted from the caches before it is read again.

An ordinary store first reads the cache line that it is about to fill. A step under the rollback guard writes
buffers that it does not read, so these reads would be wasted memory traffic. Rows are collected in a scratch
buffer that stays in the cache, and written from there with non-temporal stores, a cache line at a time.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TOGETHER = 64
"""Rows that are written together; columns of any width then fill whole cache lines of 64 bytes.

The number is small so that reading the next rows overlaps with writing these: with 512 rows a step took a
tenth longer.
"""


@intrinsic
def stream_rows(_context: Any, target: Any, _at: Any, source: Any) -> Any:
    """Copy the first :data:`TOGETHER` items of an array around the cache.

    Arguments: target, index in it (uint64), source. Both are contiguous and of one dtype; the target's item
    at the index must be at the start of a cache line, the source need not be.
    Other threads may read the target after :func:`streamed`.
    """
    width = 1 if isinstance(target.dtype, types.Boolean) else target.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line, word = ir.VectorType(ir.IntType(8), TOGETHER), ir.IntType(64)

        def data(number: int) -> Any:
            return context.make_array(signature.args[number])(context, builder, arguments[number]).data

        to = builder.bitcast(builder.gep(data(0), [arguments[1]]), line.as_pointer())
        origin = builder.bitcast(data(2), line.as_pointer())
        around = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        for number in range(width):
            place = [ir.Constant(word, number)]
            value = builder.load(builder.gep(origin, place), align=width)
            store = builder.store(value, builder.gep(to, place), align=TOGETHER)
            store.set_metadata("nontemporal", around)
        return context.get_dummy_value()

    return types.none(target, types.uint64, source), generate


AHEAD = 512
"""Prefetch distance in rows: without prefetching a step took 5 % longer, with digests 10 %."""


@intrinsic
def fetch_rows(_context: Any, source: Any, _at: Any) -> Any:
    """Prefetch the cache lines of :data:`TOGETHER` items from an index (uint64), even one past the array."""
    width = 1 if isinstance(source.dtype, types.Boolean) else source.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        begin = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        to_read, near, is_data = (ir.Constant(word, flag) for flag in (0, 3, 1))
        for line in range(width):  # as many lines of 64 bytes as an item has bytes
            place = builder.gep(begin, [ir.Constant(ir.IntType(64), 64 * line)])
            builder.call(prefetch, [place, to_read, near, is_data])
        return context.get_dummy_value()

    return types.none(source, types.uint64), generate


@intrinsic
def streamed(_context: Any) -> Any:
    """Wait until what was written around the cache is visible to all threads."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), generate
