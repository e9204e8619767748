"""Partition checkpoints put together again, and what a payload must be before it may replace a state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rustsim_hpc.checkpoint import EngineCheckpoint, PartitionCheckpoint
from rustsim_hpc.columns import DeviceSoaCheckpoint, DeviceSoaStore
from rustsim_hpc.errors import DeviceSoaRestoreError, PartitionCheckpointError, RestoreError
from rustsim_hpc.fingerprint import fingerprint_checkpoint
from rustsim_hpc.partition import PartitionPlan
from rustsim_hpc.schema import Schema


def assemble_partitions(partitions: Sequence[PartitionCheckpoint], plan: PartitionPlan) -> DeviceSoaCheckpoint:
    """Return the payload that partition checkpoints make together.

    Raises:
        PartitionCheckpointError: one of them does not follow the ones before it, does not prove itself, or
            together they are not what the plan asks for.
    """
    if not partitions:
        raise PartitionCheckpointError("at least one partition checkpoint is required")
    first, rows = partitions[0], 0
    for partition in partitions:
        problem = _misfit(partition, first, rows)
        if problem:
            identity = partition.assignment.partition_id
            raise PartitionCheckpointError(f"partition {identity!r} {problem}", partition=identity)
        rows += partition.state.agent_count
    expected = plan.materialized_assignments(rows)
    if [partition.assignment for partition in partitions] != list(expected):
        raise PartitionCheckpointError("partition checkpoints do not match the active partition plan")
    return _joined([partition.state for partition in partitions], rows)


def _misfit(partition: PartitionCheckpoint, first: PartitionCheckpoint, rows: int) -> str:
    """Return what is wrong with the partition that should start at row ``rows``, or ''."""
    assignment, state = partition.assignment, partition.state
    if partition.step_index != first.step_index:
        return f"captured step {partition.step_index}, expected {first.step_index}"
    if assignment.row_start != rows:
        return f"starts at row {assignment.row_start}, expected {rows}"
    if len(assignment) != state.agent_count:
        return f"has assignment length {len(assignment)} but checkpoint contains {state.agent_count} rows"
    if state.column_names != first.state.column_names or state.schema != first.state.schema:
        return "schema does not match the first partition"
    if any(column.shape != (state.agent_count,) for column in state.columns):
        return "has columns of different lengths"
    scheme = partition.fingerprint.scheme
    if partition.fingerprint != fingerprint_checkpoint(partition.step_index, state, scheme):
        return "fingerprint mismatch"
    return ""


def _joined(states: Sequence[DeviceSoaCheckpoint], rows: int) -> DeviceSoaCheckpoint:
    first = states[0]
    follow_on = all(state.default_ids for state in states) and first.row_offset == 0
    return DeviceSoaCheckpoint(
        None if follow_on else np.concatenate([state.ids for state in states]),
        [np.concatenate([state.columns[c] for state in states]) for c in range(first.num_columns)],
        first.column_names,
        first.schema,
        rows=rows,
    )


def checked_store(state: DeviceSoaCheckpoint, schema: Schema, total_rows: int | None) -> DeviceSoaStore:
    """Return a new store of a payload, once it is known to be whole and of this schema.

    Raises:
        RestoreError: it is not.
    """
    try:
        store = DeviceSoaStore.from_checkpoint(state, total_rows=total_rows)
    except DeviceSoaRestoreError as error:
        raise RestoreError(error) from error
    if store.schema != schema:
        theirs = ", ".join(f"{c.name} {c.dtype}" for c in store.schema.columns)
        ours = ", ".join(f"{c.name} {c.dtype}" for c in schema.columns)
        detail = f"its columns are {theirs}; the runtime's are {ours}" if theirs != ours else "units or codes differ"
        raise RestoreError(DeviceSoaRestoreError(f"checkpoint has another schema: {detail}"))
    return store


def require_fingerprint(checkpoint: EngineCheckpoint, actual: int) -> None:
    """Raise RestoreError unless a checkpoint's fingerprint is that of its state and step."""
    stated = checkpoint.fingerprint
    if stated.step_index != checkpoint.step_index:
        text = f"checkpoint of step {checkpoint.step_index} carries the fingerprint of step {stated.step_index}"
        raise RestoreError(DeviceSoaRestoreError(text))
    if stated.value != actual:
        text = f"checkpoint does not prove itself: fingerprint {stated.value:#018x}, its state has {actual:#018x}"
        raise RestoreError(DeviceSoaRestoreError(text, step=checkpoint.step_index))
