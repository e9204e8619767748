"""Accumulators of reductions: integers only, so that any partitioning of the rows gives the same bits.

A state is an int64 array. States of "sum", "count" and "histogram" are merged by adding them element by
element (over MPI, a sum of int64), those of "min" and "max" by element-wise minimum or maximum, in any order.

================== =========== =============================================================================
kind               shape       elements
================== =========== =============================================================================
sum of floats      (70,)       an exact fixed-point number, see exact_sum.py
sum of integers    (3,)        parts in units of 1, 2**32 and 2**64
count              (1,)        rows that count
min, max           (2,)        the value as an integer that sorts as values do; -1, 1 (min, max) after a NaN
histogram          (bins,)     rows with each key
count by key       (bins,)     rows that count, for each key
sum by key         (bins, …)   a sum's state for each key
================== =========== =============================================================================

The functions `add_…`, `fold_sum` and `settle_sum` are compiled, for calls (and inlining) in compiled loops;
the others are plain Python.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from numpy.typing import DTypeLike, NDArray

from rustsim_hpc.kernels import exact_sum
from rustsim_hpc.kernels.cached import CALLED, ENTERED, INLINED, cached_njit

State = NDArray[np.int64]

KINDS = ("sum", "count", "min", "max", "histogram")
MAX_ADDS = 2**31 - 1
"""Maximum number of values that can be added to a sum before `settle_sum` must be called."""

_INTEGER_WORDS = 3
_U, _I = np.uint64, np.int64
_LOW, _SIGNED_LOW, _32, _SIGNED_32 = _U(2**32 - 1), _I(2**32 - 1), _U(32), _I(32)


# -- Types -------------------------------------------------------------------------------------------------


@intrinsic
def _sort_key(_context: Any, value: Any) -> Any:
    """Return an int64 that sorts as the values do: the compiled `_sort_keys` of one value."""
    signed = getattr(value, "signed", False)
    word = ir.IntType(64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        if isinstance(kind, types.Float):
            bits = builder.bitcast(context.cast(builder, arguments[0], kind, types.float64), word)
            negative = builder.ashr(bits, ir.Constant(word, 63))
            return builder.xor(bits, builder.and_(negative, ir.Constant(word, 2**63 - 1)))
        integer = context.cast(builder, arguments[0], kind, types.int64 if signed else types.uint64)
        return integer if signed else builder.xor(integer, ir.Constant(word, -(2**63)))

    return types.int64(value), generate


# -- In compiled loops -------------------------------------------------------------------------------------


@njit(forceinline=True, **ENTERED)
def _add_integer(state, value):  # type: ignore[no-untyped-def]
    bits = _U(value)
    state[0] += _I(bits & _LOW)
    state[1] += _I(bits >> _32) - (_I(value < 0) << _SIGNED_32)


def add_sum(state: Any, value: Any) -> None:
    """Add a float to a sum of floats, or an integer or bool to a sum of integers."""
    (exact_sum.add if isinstance(value, (float, np.floating)) else _add_integer)(state, value)


@overload(add_sum, jit_options=INLINED)
def _typed_add_sum(state, value):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return (exact_sum.add if isinstance(value, types.Float) else _add_integer).py_func


@njit(**INLINED)
def add_count(state, value):  # type: ignore[no-untyped-def]
    """Count a row if the value is true (not zero)."""
    state[0] += _I(value != 0)


@njit(**INLINED)
def add_min(state, value):  # type: ignore[no-untyped-def]
    """Keep the smallest value, and whether there was a NaN."""
    state[0] = min(state[0], _sort_key(value))
    state[1] = min(state[1], -_I(value != value))  # noqa: PLR0124


@njit(**INLINED)
def add_max(state, value):  # type: ignore[no-untyped-def]
    """Keep the largest value, and whether there was a NaN."""
    state[0] = max(state[0], _sort_key(value))
    state[1] = max(state[1], _I(value != value))  # noqa: PLR0124


@njit(**INLINED)
def add_histogram(state, key):  # type: ignore[no-untyped-def]
    """Count a row under its key, if that is in [0, bins); return whether it is."""
    place = _U(_I(key))
    inside = place < _U(state.shape[0])
    if inside:
        state[place] += 1
    return inside


@njit(**INLINED)
def add_keyed_count(state, key, value):  # type: ignore[no-untyped-def]
    """Count a row under its key if the value is true; return whether the key is in [0, bins)."""
    place = _U(_I(key))
    inside = place < _U(state.shape[0])
    if inside:
        state[place] += _I(value != 0)
    return inside


@njit(**INLINED)
def add_keyed_sum(state, key, value):  # type: ignore[no-untyped-def]
    """Add a value to the sum of its key, if that is in [0, bins); return whether it is."""
    place = _U(_I(key))
    inside = place < _U(state.shape[0])
    if inside:
        add_sum(state[place], value)
    return inside


@cached_njit()
def _fold_integers(state, values):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        _add_integer(state, values[i])


def fold_sum(state: Any, values: Any) -> None:
    """Add an array (1-D, contiguous) to a sum: as `add_sum` of each, for floats several times as fast."""
    (exact_sum.fold if values.dtype.kind == "f" else _fold_integers)(state, values)


@overload(fold_sum, jit_options=CALLED)
def _typed_fold_sum(state, values):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return (exact_sum.fold if isinstance(values.dtype, types.Float) else _fold_integers).py_func


@njit(**INLINED)
def _settle(state):  # type: ignore[no-untyped-def]
    if state.size == _INTEGER_WORDS:
        for j in range(_INTEGER_WORDS - 1):
            state[j + 1] += state[j] >> _SIGNED_32
            state[j] &= _SIGNED_LOW
    else:
        exact_sum.carry(state)


@cached_njit()
def settle_sum(state):  # type: ignore[no-untyped-def]
    """Carry between the parts of a sum, or of each key's sum; the values stay the same.

    Required at least once every `MAX_ADDS` values, and before merging states of more values in total.
    """
    if state.ndim == 1:
        _settle(state)
    else:
        for key in range(state.shape[0]):
            _settle(state[key])


# -- From outside compiled code ----------------------------------------------------------------------------


def shape(kind: str, dtype: DTypeLike, bins: int | None = None) -> tuple[int, ...]:
    """Return the shape of a state.

    Args:
        kind: one of `KINDS`.
        dtype: of the values that are reduced; ignored for "count" and "histogram".
        bins: number of keys, for "histogram" and for "sum" and "count" by key.

    Raises:
        ValueError: there is no such reduction.
    """
    keyed = bins is not None
    if kind not in KINDS or (kind == "histogram" and not keyed) or (kind in {"min", "max"} and keyed):
        raise ValueError(f"no reduction of kind {kind!r} with bins {bins}")
    if kind in {"min", "max"}:
        return (2,)
    if kind != "sum":
        return (1,) if bins is None else (bins,)
    words = exact_sum.WORDS if np.dtype(dtype).kind == "f" else _INTEGER_WORDS
    return (words,) if bins is None else (bins, words)


def new(kind: str, dtype: DTypeLike, bins: int | None = None) -> State:
    """Return the state of 0 rows: int64 of shape `shape(kind, dtype, bins)`.

    Raises:
        ValueError: there is no such reduction.
    """
    state = np.zeros(shape(kind, dtype, bins), np.int64)
    if kind in {"min", "max"}:
        state[0] = _sort_keys(_identity(kind, np.dtype(dtype)))
    return state


def merge(kind: str, states: State) -> State:
    """Merge the states of parts of the rows, int64 (parts, *shape), into one.

    A merged sum can be added to up to 2**31 / parts others.
    """
    if kind == "min":
        return np.asarray(states.min(axis=0))
    if kind == "max":
        return np.asarray(states.max(axis=0))
    if kind == "sum":
        states = np.array(states, np.int64, order="C")
        _settle_all(states.reshape(-1, states.shape[-1]))
    return np.asarray(states.sum(axis=0, dtype=np.int64))


def finish(kind: str, dtype: DTypeLike, state: State, *, keyed: bool = False) -> Any:
    """Return the value of a reduction; the state is not changed.

    Args:
        kind: one of `KINDS`.
        dtype: of the values that were reduced.
        state: the state of all rows, (*shape).
        keyed: whether a "count" is by key; its state does not show that if there is a single key.

    Returns:
        A NumPy scalar, or by key an array (bins,). "sum" of floats: float64, the exact sum correctly rounded,
        as by `math.fsum`, but infinite beyond the largest float64; +0.0 for no rows or only zeros. "sum" of
        integers, "count", "histogram": int64. "min" and "max": dtype; NaN if any value is NaN; the dtype's
        identity over 0 rows; -0.0 is below 0.0.

    Raises:
        OverflowError: a sum of integers does not fit in int64.
    """
    if kind in {"min", "max"}:
        return _finish_extreme(np.dtype(dtype), state)
    if kind != "sum":
        return np.int64(state[0]) if kind == "count" and state.size == 1 and not keyed else state.copy()
    sums = np.array(state, np.int64, order="C").reshape(-1, state.shape[-1])
    values = _finish_floats(sums) if np.dtype(dtype).kind == "f" else _finish_integers(sums)
    return values[0] if state.ndim == 1 else values


def _settle_all(sums: State) -> None:
    if sums.shape[1] == exact_sum.WORDS:
        exact_sum.carry_all(sums)
        return
    for j in range(_INTEGER_WORDS - 1):
        sums[:, j + 1] += sums[:, j] >> 32
        sums[:, j] &= 2**32 - 1


def _finish_floats(sums: State) -> NDArray[np.float64]:
    values = np.empty(len(sums), np.float64)
    exact_sum.round_all(sums, values)
    return values


def _finish_integers(sums: State) -> NDArray[np.int64]:
    _settle_all(sums)
    low, middle, high = sums.T
    fits = ((high == 0) & (middle < 2**31)) | ((high == -1) & (middle >= 2**31))
    if not fits.all():
        key = int(np.argmin(fits))
        exact = int(low[key]) + (int(middle[key]) << 32) + (int(high[key]) << 64)
        where = f" of key {key}" if len(sums) > 1 else ""
        raise OverflowError(f"the sum{where} is {exact}, which does not fit in int64")
    return np.asarray((middle << 32) | low)


def _identity(kind: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the identity element of a minimum or maximum."""
    if dtype.kind == "f":
        return np.array(np.inf if kind == "min" else -np.inf, dtype)
    if dtype.kind == "b":
        return np.array(kind == "min", dtype)
    limits = np.iinfo(dtype)
    return np.array(limits.max if kind == "min" else limits.min, dtype)


def _sort_keys(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return int64 that sort as the values do: float bits, all but the sign inverted if negative."""
    if values.dtype.kind == "f":
        bits = values.astype(np.float64).view(np.int64)
        return np.asarray(bits ^ ((bits >> 63) & (2**63 - 1)))
    if values.dtype.kind == "i":
        return values.astype(np.int64)
    return (values.astype(np.uint64) ^ np.uint64(2**63)).view(np.int64)


def _finish_extreme(dtype: np.dtype[Any], state: State) -> Any:
    key = state[:1]
    if dtype.kind == "f":
        bits = key ^ ((key >> 63) & (2**63 - 1))
        return dtype.type(np.nan) if state[1] else bits.view(np.float64).astype(dtype)[0]
    if dtype.kind == "i":
        return key.astype(dtype)[0]
    return (key.view(np.uint64) ^ np.uint64(2**63)).astype(dtype)[0]
