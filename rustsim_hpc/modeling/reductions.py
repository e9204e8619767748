"""Reductions outside compiled code: allocating and merging their states, and their final values.

The layout of a state is that of :mod:`rustsim_hpc.kernels.reduce`. States are allocated before the dtype of
the values is known (that takes compiling), so that of a sum is large enough for a sum of floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from rustsim_hpc.executors.work import Board, Work
from rustsim_hpc.modeling.model import Reduction
from rustsim_hpc.modeling.params import Params
from rustsim_hpc.modeling.program import Program

Array = np.ndarray[Any, Any]

_SUM_WORDS = 70
_EMPTY = {"min": np.iinfo(np.int64).max, "max": np.iinfo(np.int64).min}


def state_shape(reduction: Reduction, bins: int) -> tuple[int, ...]:
    """Return the shape of one partition's state of a reduction (int64), for the widest dtype."""
    if reduction.kind in ("min", "max"):
        return (2,)
    if reduction.kind == "sum":
        return (bins, _SUM_WORDS) if bins else (_SUM_WORDS,)
    return (bins or 1,)


def new_board(work: Work) -> Board:
    """Return a board for a rank's work."""
    return Board(len(work.tasks), work.program, state_shapes(work.program, work.bins))


def state_shapes(program: Program, bins: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the `state_shape` of each reduction slot."""
    return [state_shape(r, b) for r, b in zip(program.reductions, bins, strict=True)]


def meeting_bytes(program: Program, params: Params) -> int:
    """Return the bytes that a rank contributes to the collectives of a step: status, reductions, digests."""
    states = sum(8 * int(np.prod(state_shape(r, r.bin_count(params)))) for r in program.reductions)
    return 16 * len(program.segments) + states + 8 * len(program.schema.columns)


def reset_states(work: Work, board: Board, slots: Sequence[int]) -> None:
    """Reset the states of reductions to those of 0 rows, for all partitions of a rank."""
    for slot in slots:
        kind = work.program.reductions[slot].kind
        board.states[slot][...] = 0
        if kind in _EMPTY:
            board.states[slot][..., 0] = _EMPTY[kind]


def is_additive(reduction: Reduction) -> bool:
    """Return whether a reduction's states merge by adding them element by element."""
    return reduction.kind not in _EMPTY


def merge_states(reduction: Reduction, dtype: str, states: Array) -> Array:
    """Merge several states into one: int64 (states, …) to int64 (…), exactly and independent of order."""
    room = states[..., : _words(dtype)] if reduction.kind == "sum" else states
    return np.asarray(_reduce().merge(reduction.kind, room))


def empty_state(reduction: Reduction, bins: int, dtype: str | None) -> Array:
    """Return the state of 0 rows, of full width if the dtype is None."""
    state = np.zeros(state_shape(reduction, bins), np.int64)
    if reduction.kind in _EMPTY:
        state[0] = _EMPTY[reduction.kind]
    if reduction.kind == "sum" and dtype is not None:
        state = np.ascontiguousarray(state[..., : _words(dtype)])
    return state


def full_state(reduction: Reduction, state: Array) -> Array:
    """Return a state padded to the width of the widest dtype."""
    if reduction.kind != "sum" or state.shape[-1] == _SUM_WORDS:
        return state
    full = np.zeros((*state.shape[:-1], _SUM_WORDS), np.int64)
    full[..., : state.shape[-1]] = state
    return full


def finish_reduction(reduction: Reduction, dtype: str, state: Array) -> Any:
    """Return a reduction's value: a NumPy scalar, or an array (bins,), read-only.

    Raises:
        OverflowError: an integer sum does not fit int64.
    """
    if reduction.kind in _EMPTY and state[0] == _EMPTY[reduction.kind] and not state[1]:
        return _reduce().finish(reduction.kind, dtype, _reduce().new(reduction.kind, dtype))
    if reduction.kind == "sum":
        state = state[..., : _words(dtype)]
    value = _reduce().finish(reduction.kind, dtype, state, keyed=reduction.key is not None)
    if isinstance(value, np.ndarray):
        value.flags.writeable = False
    return value


def _words(dtype: str) -> int:
    return _SUM_WORDS if np.dtype(dtype).kind == "f" else 3


def _reduce() -> ModuleType:
    from rustsim_hpc.kernels import reduce

    return reduce
