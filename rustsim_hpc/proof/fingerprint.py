"""The fingerprint of a state: one 64-bit value after a step, by FNV-1a (a chain) or by the digest (a sum).

`fnv1a` hashes the whole state byte by byte, so its value needs the rows in order. `digest` is a sum over
rows mod 2^64, one for each column and one for the ids: partitions and ranks add up their own rows in any
order. docs/fingerprints.md defines both, with test vectors and the differences that each can miss. Numba is
loaded when the first fingerprint is computed.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rustsim_hpc.compile_clock import CLOCK
from rustsim_hpc.errors import InvalidConfig, SchemeMismatch, nearest
from rustsim_hpc.state.schema import DTYPES

FNV_OFFSET = 0xCBF29CE484222325
DIGEST_VERSION = 1
BLOCK = 4096
SCHEMES = ("fnv1a", "digest")

_U64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_KEY_TAG = int.from_bytes(b"digest:K", "big")
_MULTIPLIER_TAG = int.from_bytes(b"digest:M", "big")
# From this size on, hashing in parallel pieces is worth the second that loading or compiling it takes.
_PARALLEL_BYTES = 1 << 20
_IDS_AT_ONCE = 1 << 17
_PLAIN = frozenset(np.dtype(name) for name in DTYPES)
_PACK_U64 = struct.Struct("<Q").pack

AnyArray = NDArray[Any]


def check_scheme(scheme: str) -> str:
    """Return `scheme` if it is one of `SCHEMES`.

    Raises:
        InvalidConfig: it is not.
    """
    if scheme not in SCHEMES:
        raise InvalidConfig(
            f"unknown fingerprint scheme {scheme!r}{nearest(str(scheme), SCHEMES)}",
            hint=f"use one of {', '.join(SCHEMES)}",
        )
    return scheme


@dataclass(frozen=True, slots=True, eq=False)
class ReplayFingerprint:
    """The fingerprint of a state after a step: step_index, value (64 bits, unsigned), and scheme.

    Fingerprints of one scheme are equal if step and value are. Comparing two schemes raises `SchemeMismatch`,
    because it would say nothing about the states.
    """

    step_index: int
    value: int
    scheme: str = "fnv1a"

    def __post_init__(self) -> None:
        for name in ("step_index", "value"):
            object.__setattr__(self, name, _unsigned(name, getattr(self, name)))
        check_scheme(self.scheme)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ReplayFingerprint):
            return NotImplemented
        self.require_scheme(other.scheme)
        return self.step_index == other.step_index and self.value == other.value

    def __hash__(self) -> int:
        return hash((self.step_index, self.value, self.scheme))

    def __str__(self) -> str:
        return hex64(self.value)

    def require_scheme(self, scheme: str) -> None:
        """Check that this fingerprint is of `scheme`.

        Raises:
            SchemeMismatch: it is of another scheme.
        """
        if self.scheme != scheme:
            raise SchemeMismatch(
                f"cannot compare a {self.scheme} fingerprint with a {scheme} one at step {self.step_index}",
                step=self.step_index,
                hint=f"run both with fingerprint = {self.scheme!r}",
            )


def _unsigned(name: str, value: Any) -> int:
    number = operator.index(value)
    if not 0 <= number <= _U64:
        raise ValueError(f"{name} must be a 64-bit unsigned integer, got {number}")
    return number


def hex64(value: int) -> str:
    """Return a 64-bit value as "0x" and 16 hexadecimal digits."""
    return f"{value:#018x}"


@dataclass(frozen=True, slots=True, eq=False)
class StateView:
    """A view, without copies, of rows [row_offset, row_stop) of a state of `rows` rows.

    ids: uint64 (local_rows,), or None for the default ids, where row i has id i. columns: 1-D arrays
    (local_rows,), in schema order. local_rows is needed only if there are neither ids nor columns.
    """

    step_index: int
    rows: int
    names: tuple[str, ...]
    ids: NDArray[np.uint64] | None
    columns: tuple[AnyArray, ...]
    row_offset: int = 0
    local_rows: int | None = None

    @property
    def row_stop(self) -> int:
        """The global row after the last local one."""
        if self.local_rows is not None:
            return self.row_offset + self.local_rows
        if self.ids is not None:
            return self.row_offset + len(self.ids)
        return self.row_offset + len(self.columns[0]) if self.columns else self.rows


class FingerprintedState(Protocol):
    """A store or checkpoint that holds all rows, as read by `fingerprint_checkpoint`."""

    @property
    def agent_count(self) -> int:
        """Number of rows."""

    @property
    def column_names(self) -> Sequence[str]:
        """Names in schema order."""

    @property
    def columns(self) -> Sequence[AnyArray]:
        """One 1-D array per column."""

    @property
    def ids(self) -> NDArray[np.uint64]:
        """One id per row."""


def fingerprint_checkpoint(
    step_index: int, state: FingerprintedState, scheme: str = "fnv1a"
) -> ReplayFingerprint:
    """Return the fingerprint of a whole state (a store or a checkpoint of one) at a step.

    Raises:
        InvalidConfig: the scheme is unknown.
        ValueError: the step index does not fit 64 bits.
        TypeError: the step index is not a whole number.
    """
    step_index = _unsigned("step_index", step_index)
    # The rows of a partition's fingerprint start at 0, but its default ids at its row_offset.
    default = bool(getattr(state, "default_ids", False)) and getattr(state, "row_offset", 0) == 0
    view = StateView(
        step_index=step_index,
        rows=state.agent_count,
        names=tuple(state.column_names),
        ids=None if default else state.ids,
        columns=tuple(state.columns),
        local_rows=state.agent_count,
    )
    return fingerprint_view(view, scheme)


def fingerprint_view(view: StateView, scheme: str = "fnv1a") -> ReplayFingerprint:
    """Return the fingerprint of a view that holds all rows.

    Raises:
        InvalidConfig: the scheme is unknown.
    """
    if check_scheme(scheme) == "digest":
        sums = digest_sums(view)
        dtypes = [column.dtype for column in view.columns]
        value = digest_value(view.step_index, view.rows, view.names, dtypes, sums[1:], sums[0])
    else:
        value = fnv1a_header(view.step_index, view.rows, len(view.names))
        value = fnv1a_ids(value, view.ids, view.row_offset, view.row_stop)
        value = fnv1a_names(value, view.names)
        for column in view.columns:
            value = fnv1a_bytes(value, column)
    return ReplayFingerprint(view.step_index, value, scheme)


# FNV-1a: every function takes the state of the chain and returns the state after its bytes.


def fnv1a_bytes(state: int, data: bytes | AnyArray) -> int:
    """Return the FNV-1a state after `data`: bytes, or the raw bytes of an array's values in row order."""
    view = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else _bytes_of(data)
    if view.size == 0:
        return state
    if view.size < _PARALLEL_BYTES:
        return int(_kernels().fnv1a_chain(np.uint64(state), view))
    from rustsim_hpc.kernels.fnv_parallel import fnv1a_pieces

    return int(fnv1a_pieces(np.uint64(state), view))


def fnv1a_default_ids(state: int, start: int, stop: int) -> int:
    """Return the FNV-1a state after the ids in [start, stop), eight bytes each, a block at a time."""
    for first in range(start, stop, _IDS_AT_ONCE):
        state = fnv1a_bytes(state, np.arange(first, min(stop, first + _IDS_AT_ONCE), dtype=np.uint64))
    return state


def fnv1a_ids(state: int, ids: NDArray[np.uint64] | None, start: int, stop: int) -> int:
    """Return the FNV-1a state after the ids of rows [start, stop): `ids`, or the default ones for None."""
    return fnv1a_default_ids(state, start, stop) if ids is None else fnv1a_bytes(state, ids)


def fnv1a_header(step_index: int, rows: int, columns: int) -> int:
    """Return the FNV-1a state after a state's first three numbers, from the offset basis."""
    return fnv1a_bytes(FNV_OFFSET, _as_u64(step_index, rows, columns))


def fnv1a_names(state: int, names: Sequence[str]) -> int:
    """Return the FNV-1a state after the column names, each followed by one 0xff."""
    return fnv1a_bytes(state, b"".join(name.encode() + b"\xff" for name in names))


# The digest: sums mod 2^64, so the result does not depend on how the rows are partitioned.


def digest_column(column: AnyArray, row_offset: int, key_index: int) -> int:
    """Return the digest's sum over contiguous rows of one column.

    column: 1-D, any column dtype. row_offset: global row of column[0]. key_index: 0 for the ids, i + 1 for
    column i.
    """
    if not _is_plain(column):
        column = _bits_of(column)
    digest, _keys, keys_address = _digest_of(key_index, column.itemsize)  # _keys: alive during the call
    return digest(column.ctypes.data, column.size, row_offset, keys_address, key_index)


def _is_plain(column: AnyArray) -> bool:
    """Return whether a column can be read without conversion: 1-D, contiguous, aligned, a column dtype."""
    flags = column.flags
    return column.ndim == 1 and column.dtype in _PLAIN and flags.c_contiguous and flags.aligned


@lru_cache(maxsize=512)
def _digest_of(key_index: int, itemsize: int) -> tuple[Callable[..., int], NDArray[np.uint32], int]:
    """Return the compiled digest of a column, its keys and their address."""
    with CLOCK.counting():  # loading Numba can take longer than the proof
        from rustsim_hpc.kernels.digest_call import digest_function

        keys = digest_keys(key_index, itemsize)
        return digest_function(itemsize), keys, int(keys.ctypes.data)


def digest_default_ids(start: int, stop: int) -> int:
    """Return the digest's sum over the default ids of rows [start, stop), without an array of them."""
    return int(_kernels().digest_counting(np.uint64(start), np.uint64(max(start, stop)), digest_keys(0, 8)))


def digest_sums(view: StateView) -> list[int]:
    """Return the digest's sums over the view's rows: the ids' first, then one per column."""
    ids = (
        digest_default_ids(view.row_offset, view.row_stop)
        if view.ids is None
        else digest_column(view.ids, view.row_offset, 0)
    )
    return [ids, *(digest_column(column, view.row_offset, 1 + i) for i, column in enumerate(view.columns))]


def digest_value(
    step_index: int,
    rows: int,
    names: Sequence[str],
    dtypes: Sequence[Any],
    column_values: Sequence[int],
    ids_value: int,
) -> int:
    """Return the digest of a state: FNV-1a over a record of its columns' names, dtypes and sums."""
    record = _as_u64(DIGEST_VERSION, step_index, rows, len(names), ids_value)
    labels = _record_labels(tuple(names), tuple(dtypes))
    parts = (label + _PACK_U64(value) for label, value in zip(labels, column_values, strict=True))
    return fnv1a_bytes(FNV_OFFSET, record + b"".join(parts))


@lru_cache(maxsize=64)
def _record_labels(names: tuple[str, ...], dtypes: tuple[Any, ...]) -> tuple[bytes, ...]:
    # Cached because NumPy takes longer to name a dtype than the record takes to hash.
    return tuple(
        name.encode() + b"\xff" + np.dtype(dtype).name.encode() + b"\xff"
        for name, dtype in zip(names, dtypes, strict=True)
    )


@lru_cache(maxsize=512)
def digest_keys(key_index: int, itemsize: int) -> NDArray[np.uint32]:
    """Return K, the digest's keys of one column: uint32 (4096, words), C order, read-only, 64-byte aligned.

    words is 2 for items of 8 bytes (the low word first), else 1. The keys of a word are distinct and never 0.
    """
    words = 2 if itemsize == 8 else 1
    buffer = np.empty(BLOCK * words + 16, np.uint32)
    start = -(buffer.ctypes.data // 4) % 16
    keys = buffer[start : start + BLOCK * words].reshape(BLOCK, words)
    for word in range(words):
        keys[:, word] = _key_stream(_mix(_KEY_TAG + (2 * key_index + word + 1) * _GOLDEN))
    keys.flags.writeable = False
    return keys


def block_multiplier(block: int, key_index: int, word: int) -> int:
    """Return M, the odd 64-bit multiplier of a block of 4096 rows for one word of one column."""
    seed = _mix(_MULTIPLIER_TAG + (2 * key_index + word + 1) * _GOLDEN)
    return _mix(seed + (block + 1) * _GOLDEN) | 1


def _key_stream(seed: int) -> NDArray[np.uint32]:
    """Return the first 4096 distinct non-zero high halves of splitmix64's outputs from `seed`."""
    # 64 spare candidates: among 4,096 draws from 2^32 a repeat is rare, and 64 repeats are negligible.
    z = np.uint64(seed) + np.arange(1, BLOCK + 65, dtype=np.uint64) * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    drawn = ((z ^ (z >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)
    first = np.sort(np.unique(drawn, return_index=True)[1])
    kept = drawn[first]
    keys: NDArray[np.uint32] = kept[kept != 0][:BLOCK]
    return keys


def _as_u64(*numbers: int) -> bytes:
    return b"".join(map(_PACK_U64, numbers))


def _mix(z: int) -> int:
    z &= _U64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _U64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _U64
    return z ^ (z >> 31)


def _bits_of(column: AnyArray) -> AnyArray:
    """Return a column's raw bits as a read-only contiguous array of unsigned integers of the same width.

    Always read-only, aligned and in native order, so that there is one compiled function per item size.
    """
    if column.ndim != 1 or column.dtype.kind not in "fiub" or column.itemsize > 8:
        raise TypeError(f"cannot hash an array of dtype {column.dtype} and {column.ndim} dimensions")
    native = column.astype(column.dtype.newbyteorder("="), copy=False)
    bits = np.require(native, requirements=("C", "ALIGNED")).view(f"u{column.itemsize}")
    bits.flags.writeable = False
    return bits


def _bytes_of(column: AnyArray) -> NDArray[np.uint8]:
    view = _bits_of(column).view(np.uint8)
    view.flags.writeable = False
    return view


@lru_cache(maxsize=1)
def _kernels() -> Any:
    with CLOCK.counting():
        from rustsim_hpc.kernels import hashing

    return hashing
