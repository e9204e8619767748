"""Columns and ids from users, arrays or lists: convert them, and check them against a schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rustsim_hpc.state.schema import Schema

Array = np.ndarray[Any, Any]


def as_array(column: Any, dtype: np.dtype[Any] | None) -> Array:
    """Return an array unchanged, and a list as an array of `dtype` if the conversion is safe.

    Raises:
        ValueError: values of the list's dtype cannot be cast to `dtype` (float to int, for example).
    """
    if isinstance(column, np.ndarray):
        return column
    array = np.asarray(column)
    if dtype is None or array.dtype == dtype:
        return array
    if (
        array.size
        and not np.can_cast(array.dtype, dtype, "same_kind")
        and (array.dtype.kind, dtype.kind) != ("i", "u")
    ):
        raise ValueError(f"values of {array.dtype} cannot become a column of {dtype}")
    # Converted from the list, not the array, so that NumPy checks that each integer fits.
    return np.asarray(column, dtype)


def as_ids(ids: Any) -> Array:
    """Return ids as uint64 (n,).

    Raises:
        ValueError: not a 1-D sequence of integers in [0, 2**64).
    """
    if isinstance(ids, Mapping):
        raise ValueError("the ids come first, then the columns by name; ids of None are the row numbers")
    if not isinstance(ids, np.ndarray):
        ids = list(ids)
        strange = next(
            (one for one in ids if isinstance(one, bool) or not isinstance(one, int | np.integer)), None
        )
        if strange is not None:
            raise ValueError(f"ids must be integers from 0 to 2^64 - 1, got {strange!r}")
        if any(not 0 <= one < 2**64 for one in ids):
            raise ValueError(f"ids must be integers from 0 to 2^64 - 1, got {min(ids)} to {max(ids)}")
        return np.array(ids, dtype=np.uint64)
    if ids.ndim != 1:
        raise ValueError(f"ids have {ids.ndim} dimensions, expected 1")
    if ids.dtype.kind not in "iu" or not ids.dtype.isnative:
        raise ValueError(f"ids have dtype {ids.dtype.str}, expected uint64")
    if ids.dtype.kind == "i" and ids.size and ids.min() < 0:
        raise ValueError(f"ids must not be negative, got {ids.min()}")
    return ids.astype(np.uint64, copy=False)


def misfit(labels: Sequence[str], arrays: Sequence[Array], schema: Schema, rows: int) -> str:
    """Return why columns do not fit a schema and a number of rows, or ""."""
    for label, array, dtype in zip(labels, arrays, schema.dtypes, strict=True):
        if array.ndim != 1:
            return f"{label} has {array.ndim} dimensions, expected 1"
        if array.dtype != dtype:
            found = array.dtype.name if array.dtype.isnative else array.dtype.str
            return f"{label} has dtype {found}, expected {dtype}"
        if len(array) != rows:
            return f"{label} has {len(array)} rows, expected {rows}"
    return ""
