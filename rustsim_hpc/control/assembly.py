"""Check a checkpoint before it replaces the state, and assemble a state from partition checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rustsim_hpc.control.checkpoint import EngineCheckpoint, PartitionCheckpoint
from rustsim_hpc.errors import (
    ColumnMemoryError,
    DeviceSoaRestoreError,
    PartitionCheckpointError,
    RestoreError,
    message_of,
)
from rustsim_hpc.proof.fingerprint import ReplayFingerprint, fingerprint_checkpoint
from rustsim_hpc.state.columns import DeviceSoaCheckpoint, DeviceSoaStore
from rustsim_hpc.state.partition import PartitionAssignment
from rustsim_hpc.state.schema import Schema


def checkpoint_store(checkpoint: Any, current: DeviceSoaStore, *, alone: bool) -> DeviceSoaStore:
    """Validate a checkpoint, except its fingerprint's value, and return its state as a new store.

    Args:
        checkpoint: what the caller wants restored.
        current: the store to replace.
        alone: whether this rank holds the whole population; otherwise its row count must not change.

    Raises:
        RestoreError: not a checkpoint of the whole state, another schema, or columns of unequal length.
    """
    if not isinstance(checkpoint, EngineCheckpoint):
        raise _refused(f"restore takes an EngineCheckpoint, got {type(checkpoint).__name__}")
    state: Any = checkpoint.state
    stated: Any = checkpoint.fingerprint
    if not (isinstance(state, DeviceSoaCheckpoint) and isinstance(stated, ReplayFingerprint)):
        raise _refused("checkpoint holds no state, or no fingerprint of it")
    if not _is_step(checkpoint.step_index) or stated.step_index != checkpoint.step_index:
        raise _refused(
            f"checkpoint of step {checkpoint.step_index} carries the fingerprint of step {stated.step_index}"
        )
    if state.row_offset != current.row_offset:
        raise _refused(f"checkpoint starts at row {state.row_offset}, expected {current.row_offset}")
    if not alone and state.agent_count != current.agent_count:
        ours = current.agent_count
        raise _refused(f"checkpoint holds {state.agent_count} rows of this rank, expected {ours}")
    return new_store(state, current, alone=alone)


def require_value(stated: ReplayFingerprint, actual: int) -> None:
    """Raise RestoreError unless a checkpoint's fingerprint has the value of its state."""
    if stated.value != actual:
        raise _refused(
            f"checkpoint does not prove itself: it states {stated.value:#018x}, its state has {actual:#018x}"
        )


def new_store(state: DeviceSoaCheckpoint, current: DeviceSoaStore, *, alone: bool) -> DeviceSoaStore:
    """Return a new store of a payload, to replace ``current``; both must have the same schema.

    Raises:
        RestoreError: the payload is invalid or of another schema, or memory cannot be allocated.
    """
    try:
        total_rows = None if alone else current.total_rows
        store = DeviceSoaStore.from_checkpoint(state, kind=current.memory.kind, total_rows=total_rows)
    except DeviceSoaRestoreError as error:
        raise RestoreError(error) from error
    except (ColumnMemoryError, MemoryError) as error:
        raise _refused(message_of(error)) from error
    if store.schema != current.schema:
        raise _refused(f"checkpoint has another schema: {_difference(store.schema, current.schema)}")
    return store


def _difference(theirs: Schema, ours: Schema) -> str:
    schemas = (theirs, ours)
    texts = [", ".join(f"{column.name} {column.dtype}" for column in one.columns) for one in schemas]
    if texts[0] == texts[1]:
        return "units, meanings or codes differ"
    return f"its columns are {texts[0]}; the runtime's are {texts[1]}"


def _refused(text: str) -> RestoreError:
    return RestoreError(DeviceSoaRestoreError(text))


def _is_step(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


# -- partitions --------------------------------------------------------------------------------------


def assemble_partitions(
    partitions: Sequence[PartitionCheckpoint],
    expected: Callable[[int], Sequence[PartitionAssignment]],
    first_row: int,
) -> DeviceSoaCheckpoint:
    """Return the partition checkpoints joined into one payload.

    Args:
        partitions: in the order of their rows.
        expected: returns the required assignments, given the global row where the last partition ends.
        first_row: global row where the first partition starts.

    Raises:
        PartitionCheckpointError: a partition does not start where the previous one ends, its fingerprint
            does not match its state, or the assignments are not those of the plan.
    """
    if not partitions:
        raise PartitionCheckpointError("at least one partition checkpoint is required")
    first, row = partitions[0], first_row
    for partition in partitions:
        _require_kind(partition)
        if problem := _misfit(partition, first, row):
            identity = partition.assignment.partition_id
            raise PartitionCheckpointError(f"partition {identity!r} {problem}", partition=identity)
        row += partition.state.agent_count
    found = [partition.assignment for partition in partitions]
    if found != list(expected(row)):
        raise PartitionCheckpointError("partition checkpoints do not match the active partition plan")
    return _joined([partition.state for partition in partitions], first_row)


def _require_kind(partition: Any) -> None:
    kinds = (
        (partition, PartitionCheckpoint),
        (getattr(partition, "assignment", None), PartitionAssignment),
        (getattr(partition, "state", None), DeviceSoaCheckpoint),
        (getattr(partition, "fingerprint", None), ReplayFingerprint),
    )
    for value, kind in kinds:
        if not isinstance(value, kind):
            raise PartitionCheckpointError(f"expected a {kind.__name__}, got {type(value).__name__}")
    if not _is_step(partition.step_index) or partition.step_index < 0:
        raise PartitionCheckpointError(f"{partition.step_index!r} is not a step index")


def _misfit(partition: PartitionCheckpoint, first: PartitionCheckpoint, row: int) -> str:
    """Return the problem of the partition that should start at global row ``row``, or ''."""
    assignment, state = partition.assignment, partition.state
    if partition.step_index != first.step_index:
        return f"captured step {partition.step_index}, expected {first.step_index}"
    if assignment.row_start != row:
        return f"starts at row {assignment.row_start}, expected {row}"
    if len(assignment) != state.agent_count:
        return f"has assignment length {len(assignment)} but checkpoint contains {state.agent_count} rows"
    if state.column_names != first.state.column_names or state.schema != first.state.schema:
        return "schema does not match the first partition"
    if len(state.columns) != len(state.schema) or state.column_names != state.schema.names:
        return f"has {len(state.columns)} columns, its schema {len(state.schema)}"
    for name, dtype, column in zip(state.column_names, state.schema.dtypes, state.columns, strict=True):
        if column.dtype != dtype or column.shape != (state.agent_count,):
            return f"column {name} is {column.dtype} {column.shape}, expected {dtype} ({state.agent_count},)"
    stated = partition.fingerprint
    if stated != fingerprint_checkpoint(partition.step_index, state, stated.scheme):
        return "fingerprint mismatch"
    return ""


def _joined(states: Sequence[DeviceSoaCheckpoint], first_row: int) -> DeviceSoaCheckpoint:
    rows, follow_on = first_row, True
    for state in states:
        follow_on = follow_on and state.default_ids and (state.row_offset == rows or state.rows == 0)
        rows += state.rows
    return DeviceSoaCheckpoint(
        None if follow_on else np.concatenate([np.asarray(state.ids, np.uint64) for state in states]),
        [np.concatenate([state.columns[c] for state in states]) for c in range(states[0].num_columns)],
        states[0].column_names,
        states[0].schema,
        row_offset=first_row,
        rows=rows - first_row,
    )
