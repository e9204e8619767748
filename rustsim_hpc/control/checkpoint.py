"""Checkpoints as values: when one is due, and what it holds. Files are written by `storage`."""

from __future__ import annotations

from dataclasses import dataclass

from rustsim_hpc.proof.fingerprint import ReplayFingerprint
from rustsim_hpc.state.columns import DeviceSoaCheckpoint
from rustsim_hpc.state.partition import PartitionAssignment


@dataclass(frozen=True)
class CheckpointPolicy:
    """When checkpoints are made automatically.

    ``interval_steps``: steps between two of them; None for never.
    """

    interval_steps: int | None = None

    @classmethod
    def disabled(cls) -> CheckpointPolicy:
        """Make checkpoints only on request."""
        return cls(None)

    @classmethod
    def every_steps(cls, interval_steps: int) -> CheckpointPolicy:
        """Make a checkpoint whenever the step index is positive and divisible by ``interval_steps``."""
        return cls(interval_steps)

    def is_due(self, step_index: int) -> bool:
        """Return whether a checkpoint is due at a step index (the one after the step)."""
        return self.interval_steps is not None and step_index > 0 and step_index % self.interval_steps == 0


@dataclass(frozen=True)
class EngineCheckpoint:
    """The whole state of a control plane at one step (under a team: this rank's rows).

    Attributes:
        sequence: 1 for the plane's first checkpoint; not reset by a restore.
        label: given by the caller, or None.
        step_index: steps completed.
        fingerprint: of the whole state.
        resident_bytes: bytes of ``state``.
        state: an independent copy, compared bit by bit.
    """

    sequence: int
    label: str | None
    step_index: int
    fingerprint: ReplayFingerprint
    resident_bytes: int
    state: DeviceSoaCheckpoint


@dataclass(frozen=True)
class PartitionCheckpoint:
    """One partition's state at one step; ``fingerprint`` is that of ``state`` alone."""

    assignment: PartitionAssignment
    step_index: int
    fingerprint: ReplayFingerprint
    resident_bytes: int
    state: DeviceSoaCheckpoint
