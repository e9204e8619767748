"""The header of a checkpoint, which is all but its columns, and the options of how it is stored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from rustsim_hpc.errors import JobError, nearest
from rustsim_hpc.proof.fingerprint import ReplayFingerprint, digest_value
from rustsim_hpc.state.schema import Column, Schema

FORMAT_NAME = "rustsim-hpc checkpoint"
FORMAT_VERSION = 1
LAYOUTS = ("auto", "single", "sharded")
SHARDS = ("rank", "node")
_FILTERS = ("gzip", "lzf")


@dataclass(frozen=True)
class CheckpointHeader:
    """The metadata of a checkpoint.

    Attributes:
        step_index: steps completed.
        rows: rows of the whole population.
        schema: the columns.
        fingerprint: of the whole state at `step_index`.
        sequence: number of the checkpoint in its run, from 1.
        label: the caller's, or None.
        seed: the run's, or None.
        parameters, plan, model: the model's parameters, the partition plan, and which model this is, as
            values that JSON can hold (NumPy scalars become Python's).
        default_ids: whether row i has id i; /ids holds the numbers all the same.
        digests: the digest's sums over all rows: the ids', then one a column. Filled in when it is written.
        fingerprint_due: the fingerprint's value is not computed yet; the writer computes it from the rows
            that it writes, beside the running steps. For "fnv1a" one rank must have all rows.
    """

    step_index: int
    rows: int
    schema: Schema
    fingerprint: ReplayFingerprint
    sequence: int = 1
    label: str | None = None
    seed: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    default_ids: bool = True
    digests: tuple[int, ...] = ()
    fingerprint_due: bool = False

    def with_sums(self, sums: Sequence[int]) -> CheckpointHeader:
        """Return the header with the digest's sums over all rows, and the digest that is due."""
        fingerprint, due = self.fingerprint, self.fingerprint_due
        if due and fingerprint.scheme == "digest":
            fingerprint, due = self.digest_of(sums), False
        return replace(self, digests=tuple(sums), fingerprint=fingerprint, fingerprint_due=due)

    def digest_of(self, sums: Sequence[int]) -> ReplayFingerprint:
        """Return the fingerprint that the digest's sums over all rows make."""
        names, dtypes = self.schema.names, self.schema.dtypes
        value = digest_value(self.step_index, self.rows, names, dtypes, sums[1:], sums[0])
        return ReplayFingerprint(self.step_index, value, "digest")

    def to_json(self) -> dict[str, Any]:
        """Return the header as JSON's types."""
        names = ["", *self.schema.names]
        return {
            "step_index": self.step_index,
            "rows": self.rows,
            "schema": schema_to_json(self.schema),
            "fingerprint": {"scheme": self.fingerprint.scheme, "value": f"{self.fingerprint.value:#018x}"},
            "sequence": self.sequence,
            "label": self.label,
            "seed": self.seed,
            "parameters": plain_json(self.parameters),
            "plan": plain_json(self.plan),
            "model": plain_json(self.model),
            "default_ids": self.default_ids,
            "digests": [[name, f"{value:#018x}"] for name, value in zip(names, self.digests, strict=False)],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CheckpointHeader:
        """Build a header from what `to_json` returned.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        step_index, rows = _count(data["step_index"]), _count(data["rows"])
        fingerprint = data["fingerprint"]
        return cls(
            step_index=step_index,
            rows=rows,
            schema=schema_from_json(data["schema"]),
            fingerprint=ReplayFingerprint(step_index, int(fingerprint["value"], 16), fingerprint["scheme"]),
            sequence=_count(data["sequence"]),
            label=_of_kind(data["label"], str, None),
            seed=_of_kind(data["seed"], int, None),
            parameters=dict(data["parameters"]),
            plan=dict(data["plan"]),
            model=dict(data["model"]),
            default_ids=_of_kind(data["default_ids"], bool),
            digests=tuple(int(value, 16) for _, value in data["digests"]),
        )


def schema_to_json(schema: Schema) -> list[dict[str, Any]]:
    """Return the columns as JSON's types, in their order."""
    return [
        {
            "name": column.name,
            "dtype": column.dtype,
            "unit": column.unit,
            "doc": column.doc,
            "codes": None
            if column.codes is None
            else {str(code): name for code, name in column.codes.items()},
        }
        for column in schema.columns
    ]


def schema_from_json(data: list[dict[str, Any]]) -> Schema:
    """Build a schema from what `schema_to_json` returned.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    columns = []
    for entry in data:
        codes = entry["codes"]
        named = None if codes is None else {int(code): name for code, name in codes.items()}
        columns.append(Column(entry["name"], entry["dtype"], entry["unit"], entry["doc"], named))
    return Schema(tuple(columns))


def plain_json(value: Any) -> Any:
    """Return `value` with NumPy's numbers and arrays, tuples and mappings as the types that JSON knows."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(entry) for entry in value]
    json.dumps(value)
    return value


def _of_kind(value: Any, kind: type, *others: Any) -> Any:
    """Return a value of exactly a type, or one of ``others``; raise ValueError if it is neither."""
    if type(value) is not kind and value not in others:
        raise ValueError(f"{value!r} is not of type {kind.__name__}")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ValueError(f"{value!r} is not a count")
    return value


MOST_ALIGNMENT: Final = 1 << 26
"""Bytes; limited since the gaps between columns are written, too."""


@dataclass(frozen=True)
class StorageOptions:
    """How checkpoints are stored.

    Attributes:
        layout: "single" writes one file, whatever the number of ranks; "sharded" several, and a small master
            that shows them as whole columns; "auto" is "single" for one rank, else "sharded".
        compression: column name ("ids" for the ids, "*" for all others) to "gzip", "gzip:1" to "gzip:9" or
            "lzf".
        chunk_rows: rows of a chunk of a compressed column; uncompressed ones are contiguous.
        alignment: columns of 64 KiB and more start at multiples of so many bytes in the file: best a multiple
            of the file system's block or stripe size.
        keep: how many of the newest checkpoints are kept; 0 for all.
        keep_every: checkpoints whose step is a multiple of this are kept, too; 0 for none.
        hints: MPI-IO hints for the collective writing of a single file by parallel HDF5.
        shards: what writes a shard: each "rank", or all ranks of a "node" together.

    Raises:
        JobError: a value is invalid.
    """

    layout: str = "auto"
    compression: Mapping[str, str] = field(default_factory=dict)
    chunk_rows: int = 1 << 18
    alignment: int = 4096
    keep: int = 0
    keep_every: int = 0
    hints: Mapping[str, str] = field(default_factory=dict)
    shards: str = "rank"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise JobError(f"checkpoint layout {self.layout!r} is unknown{nearest(self.layout, LAYOUTS)}")
        if self.shards not in SHARDS:
            raise JobError(f"checkpoint shards {self.shards!r} is unknown{nearest(self.shards, SHARDS)}")
        for name in ("chunk_rows", "alignment", "keep", "keep_every"):
            least = 1 if name in {"chunk_rows", "alignment"} else 0
            if getattr(self, name) < least:
                raise JobError(f"checkpoint {name} must be at least {least}, got {getattr(self, name)}")
        if self.alignment > MOST_ALIGNMENT:
            raise JobError(f"checkpoint alignment must be at most {MOST_ALIGNMENT}, got {self.alignment}")
        for column, text in self.compression.items():
            name, _, level = text.partition(":")
            if name not in _FILTERS or (level and (name != "gzip" or level not in set("123456789"))):
                raise JobError(
                    f'compression "{text}" of column "{column}" is unknown: use gzip, gzip:1 to gzip:9 or lzf'
                )

    def filter_of(self, column: str | None) -> tuple[str, int | None] | None:
        """Return h5py's compression and its level for a column (None: the ids), or None for none."""
        text = self.compression.get("ids" if column is None else column)
        if text is None and column is not None:
            text = self.compression.get("*")
        if text is None:
            return None
        name, _, level = text.partition(":")
        return name, int(level) if level else None

    @property
    def compresses(self) -> bool:
        """Whether any column is compressed."""
        return bool(self.compression)
