"""Conversion of a row function's result to a column's dtype: as ``numpy.astype`` does, where that is defined.

NumPy's result for a float that does not fit an integer dtype depends on the machine, and even on whether the
array is long enough for vector instructions. Here it is the same everywhere: the value is truncated toward
zero to an int32 (an int64 for columns of int64, uint32 and uint64); NaN, or a value that does not fit, gives
the lowest int32 or int64; then the low bits are kept. NumPy does so for single values on x86-64. For uint64,
2**63 is subtracted from values of at least 2**63 before the conversion and added again after it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def stored(_context: Any, value: Any, column: Any) -> Any:
    """Return a number converted to the dtype of a column (an array)."""
    dtype = column.dtype

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, number = signature.args[0], arguments[0]
        if isinstance(dtype, types.Boolean):
            return context.is_true(builder, kind, number)
        if isinstance(dtype, types.Integer) and isinstance(kind, types.Float):
            return _float_to_integer(context, builder, number, kind, dtype)
        return context.cast(builder, number, kind, dtype)

    return dtype(value, column), generate


@intrinsic
def fits(_context: Any, value: Any, column: Any) -> Any:
    """Return whether a number, truncated toward zero, fits a column's integer dtype; else true."""
    dtype = column.dtype

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, number = signature.args[0], arguments[0]
        holds = ir.Constant(ir.IntType(1), 1)
        if not isinstance(dtype, types.Integer) or isinstance(kind, types.Boolean):
            return holds
        if isinstance(kind, types.Float):
            return _in_range(builder, context.cast(builder, number, kind, types.float64), dtype)
        compare = builder.icmp_signed if kind.signed else builder.icmp_unsigned
        if kind.minval < dtype.minval:
            holds = builder.and_(holds, compare(">=", number, ir.Constant(number.type, dtype.minval)))
        if kind.maxval > dtype.maxval:
            holds = builder.and_(holds, compare("<=", number, ir.Constant(number.type, dtype.maxval)))
        return holds

    return types.boolean(value, column), generate


def _float_to_integer(context: Any, builder: Any, number: Any, kind: Any, dtype: Any) -> Any:
    through = types.int64 if dtype in {types.int64, types.uint32, types.uint64} else types.int32
    value = _cut(context, builder, number, kind, through)
    if dtype == types.uint64:
        half = ir.Constant(number.type, 2.0**63)
        upper = _cut(context, builder, builder.fsub(number, half), kind, types.int64)
        upper = builder.xor(upper, ir.Constant(upper.type, -(2**63)))
        value = builder.select(builder.fcmp_ordered(">=", number, half), upper, value)
    word = ir.IntType(dtype.bitwidth)
    return value if dtype.bitwidth == through.bitwidth else builder.trunc(value, word)


def _cut(context: Any, builder: Any, number: Any, kind: Any, through: Any) -> Any:
    """Return a float truncated to int32 or int64, or the lowest value of that type if it does not fit."""
    exact = number if through.bitwidth == 64 else context.cast(builder, number, kind, types.float64)
    word = ir.IntType(through.bitwidth)
    # fptosi is undefined for a value out of range; the select then ignores its result.
    fitting = builder.fptosi(number, word)
    return builder.select(_in_range(builder, exact, through), fitting, ir.Constant(word, through.minval))


def _in_range(builder: Any, number: Any, dtype: Any) -> Any:
    """Return whether a float, truncated toward zero, fits an integer type (false for NaN)."""
    # For int64, lowest - 1 is not a float64, but no float64 lies between it and the lowest value either.
    lowest, sign = (dtype.minval, ">=") if dtype == types.int64 else (dtype.minval - 1, ">")
    above = builder.fcmp_ordered(sign, number, ir.Constant(number.type, float(lowest)))
    return builder.and_(
        above, builder.fcmp_ordered("<", number, ir.Constant(number.type, float(dtype.maxval + 1)))
    )
