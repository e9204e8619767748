"""States and headers for the tests of the storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rustsim_hpc.proof.fingerprint import ReplayFingerprint, StateView, fingerprint_view
from rustsim_hpc.state.schema import DTYPES, Column, Schema
from rustsim_hpc.storage import CheckpointHeader, StorageOptions

SMALL = Schema(
    (Column("x", "float32", "m", "position east"), Column("state", "uint8", codes={0: "S", 1: "I"}))
)
ALL = Schema(tuple(Column(f"c_{dtype}", dtype, doc=f"a {dtype}") for dtype in DTYPES))


def state(
    rows: int, schema: Schema = SMALL, *, step: int = 100, seed: int = 0, custom_ids: bool = False
) -> StateView:
    """Return a whole state of random bits: NaNs with payloads, negative zeros, extremes."""
    random = np.random.default_rng([seed, rows])
    columns = []
    for dtype in schema.dtypes:
        raw = random.integers(0, 256, rows * dtype.itemsize, np.uint8)
        columns.append((raw & 1).astype(bool) if dtype.kind == "b" else raw.view(dtype))
    ids = random.integers(0, 2**64, rows, np.uint64) if custom_ids else None
    return StateView(step, rows, schema.names, ids, tuple(columns), 0, rows)


def header_of(
    view: StateView, schema: Schema = SMALL, scheme: str = "digest", **fields: Any
) -> CheckpointHeader:
    """Return the header of a whole state."""
    value = fingerprint_view(view, scheme).value
    given = {
        "seed": 7,
        "label": "a label",
        "parameters": {"dt": np.float32(0.1), "bins": 8, "on": True},
    } | fields
    return CheckpointHeader(
        view.step_index,
        view.rows,
        schema,
        ReplayFingerprint(view.step_index, value, scheme),
        default_ids=view.ids is None,
        plan={"partitions": 3},
        model={"name": "flock", "sha256": "00ff"},
        **given,
    )


def layout(name: str, compression: Mapping[str, str] | None = None, **more: Any) -> StorageOptions:
    """Return the options of a layout: "auto", "single", "sharded", or "node", a shard for each machine."""
    if name == "node":
        return StorageOptions("sharded", compression or {}, shards="node", **more)
    return StorageOptions(name, compression or {}, **more)


def cut(view: StateView, start: int, stop: int) -> StateView:
    """Return rows [start, stop) of a whole state, without a copy."""
    return replace(
        view,
        ids=None if view.ids is None else view.ids[start:stop],
        columns=tuple(column[start:stop] for column in view.columns),
        row_offset=start,
        local_rows=stop - start,
    )


def bounds(rows: int, size: int, rank: int) -> tuple[int, int]:
    """Return a rank's rows: equal shares, which leaves ranks without any where there are fewer rows."""
    return rank * rows // size, (rank + 1) * rows // size


def same_bits(one: StateView, other: StateView) -> bool:
    """Return whether two views hold the same rows, bit by bit."""
    pairs = list(zip(one.columns, other.columns, strict=True))
    ids = (one.ids is None) == (other.ids is None)
    if ids and one.ids is not None and other.ids is not None:
        pairs.append((one.ids, other.ids))
    return (
        ids
        and (one.step_index, one.rows, one.names) == (other.step_index, other.rows, other.names)
        and (one.row_offset, one.row_stop) == (other.row_offset, other.row_stop)
        and all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)
    )
