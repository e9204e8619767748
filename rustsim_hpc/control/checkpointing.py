"""Make, retain and restore the checkpoints of a control plane; a restore verifies the fingerprint first."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from rustsim_hpc.control.assembly import assemble_partitions, checkpoint_store, new_store, require_value
from rustsim_hpc.control.checkpoint import EngineCheckpoint, PartitionCheckpoint
from rustsim_hpc.control.config import validate_plan
from rustsim_hpc.control.metrics import Meter
from rustsim_hpc.control.stepping import Stepping
from rustsim_hpc.errors import CheckpointWriteFailed, InvalidConfig, PartitionCheckpointError, message_of
from rustsim_hpc.proof.fingerprint import fingerprint_checkpoint
from rustsim_hpc.proof.state_proof import StateProof
from rustsim_hpc.ranks.agreement import on_all
from rustsim_hpc.state.columns import DeviceSoaCheckpoint, DeviceSoaStore
from rustsim_hpc.state.partition import PartitionAssignment


class Checkpointing:
    """Makes, retains and restores checkpoints of the state that a `Stepping` steps.

    Args:
        stepping: the state, its configuration and its proof.
        meter: counts checkpoints; its count is their sequence number.

    Attributes:
        retained: the checkpoints in memory, oldest first.
    """

    def __init__(self, stepping: Stepping, meter: Meter) -> None:
        self._stepping, self._meter = stepping, meter
        self._runtime, self._config, self._proof = stepping.runtime, stepping.config, stepping.proof
        self._team = stepping.runtime.team
        most = min(int(self._config.max_retained_checkpoints), sys.maxsize)
        self.retained: deque[EngineCheckpoint] = deque(maxlen=most)
        self._late_error: CheckpointWriteFailed | None = None

    def make(self, label: str | None = None) -> EngineCheckpoint:
        """Copy this rank's rows with the fingerprint of the whole population, and retain the copy.

        Raises:
            CheckpointWriteFailed: no memory for the copy on some rank; raised on all ranks.
            TornState: the state is torn.
        """
        self._stepping.ready()
        if not (label is None or isinstance(label, str)):
            raise InvalidConfig(f"the label of a checkpoint must be text, got {label!r}")
        self._runtime.sync_to_host()
        step, store = self._runtime.step_index, self._runtime.device_store()

        def copy() -> DeviceSoaCheckpoint:
            try:
                return store.checkpoint()
            except Exception as error:
                raise self._not_made(error) from error

        state = on_all(self._team, copy)
        fingerprint = self._proof.of_current(step, afresh=True)
        sequence = self._meter.checkpoint_created()
        made = EngineCheckpoint(sequence, label, step, fingerprint, state.resident_bytes, state)
        self.retained.append(made)
        return made

    def make_if_due(self) -> EngineCheckpoint | None:
        """Make the automatic checkpoint of this step; a failure is raised when the next step begins."""
        if not self._config.checkpoint_policy.is_due(self._runtime.step_index):
            return None
        try:
            return self.make()
        except CheckpointWriteFailed as error:
            self._late_error = error
        except Exception as error:  # noqa: BLE001 (the step is committed in any case)
            self._late_error = self._not_made(error)
        return None

    def raise_late(self) -> None:
        """Raise the stored failure of the last automatic checkpoint, if any."""
        if self._late_error is not None:
            late, self._late_error = self._late_error, None
            raise late

    def restore(self, checkpoint: EngineCheckpoint) -> None:
        """Replace the state by a checkpoint's, after verifying its fingerprint.

        Raises:
            RestoreError: the fingerprint or the schema does not match; nothing has changed.
            PlanError: its population does not fit the partition plan; nothing has changed.
        """

        def prepare() -> DeviceSoaStore:
            store = checkpoint_store(checkpoint, self._runtime.device_store(), alone=self._team.size == 1)
            validate_plan(self._config.partition_plan, store.total_rows)
            return store

        self._stepping.ready(to_restore=True)
        store = on_all(self._team, prepare)
        stated = checkpoint.fingerprint
        proof = StateProof(store, self._team, stated.scheme)
        require_value(stated, proof.of_current(stated.step_index).value)
        self._stepping.replace(store, stated.step_index)

    def of_partitions(self) -> list[PartitionCheckpoint]:
        """Return a copy of each of this rank's partitions, each with the fingerprint of its rows.

        Raises:
            PlanError: the plan does not fit the population.
            TornState: the state is torn.
        """
        self._stepping.ready()
        self._runtime.sync_to_host()
        store, step = self._runtime.device_store(), self._runtime.step_index
        validate_plan(self._config.partition_plan, store.total_rows)
        made = []
        for task in self._stepping.bindings.tasks():
            state = store.checkpoint(task.start, task.stop)
            fingerprint = fingerprint_checkpoint(step, state, self._config.fingerprint)
            made.append(PartitionCheckpoint(task.assignment, step, fingerprint, state.resident_bytes, state))
        return made

    def restore_partitions(self, partitions: Sequence[PartitionCheckpoint]) -> None:
        """Replace the state by assembled partition checkpoints, after verifying their fingerprints.

        Raises:
            PartitionCheckpointError: they do not fit each other or the plan; nothing has changed.
            RestoreError: they are of another schema; nothing has changed.
            PlanError: their population does not fit the plan; nothing has changed.
        """
        plan, current, alone = self._config.partition_plan, self._runtime.device_store(), self._team.size == 1
        whatever: Any = partitions
        if not isinstance(whatever, Iterable):
            kind = type(whatever).__name__
            raise PartitionCheckpointError(f"expected partition checkpoints, got {kind}")
        given = list(partitions)

        def expected(stop: int) -> Sequence[PartitionAssignment]:
            if alone:
                return plan.materialized_assignments(stop)
            return [task.assignment for task in self._stepping.bindings.tasks()]

        def prepare() -> DeviceSoaStore:
            store = new_store(assemble_partitions(given, expected, current.row_offset), current, alone=alone)
            validate_plan(plan, store.total_rows)
            return store

        self._stepping.ready(to_restore=True)
        store = on_all(self._team, prepare)
        step = int(given[0].step_index) if given else self._runtime.step_index
        steps = set(self._team.allgather(step))
        if len(steps) > 1:
            raise PartitionCheckpointError(f"the ranks' partitions are of different steps: {sorted(steps)}")
        self._stepping.replace(store, step)

    def _not_made(self, error: Exception) -> CheckpointWriteFailed:
        """Return the error of a checkpoint of this step that could not be made."""
        step = self._runtime.step_index
        failed = CheckpointWriteFailed(f"step {step}: {message_of(error)}", step=step)
        failed.__cause__ = error
        return failed
