"""Counters of a controlled runtime: immutable snapshots, and the meter that makes them.

Durations are whole microseconds, sizes are bytes. A snapshot can be written as JSON or Prometheus text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ColumnarPhaseBackend:
    """Where a phase runs: `cpu` or `cuda_resident`."""

    kind: Literal["Cpu", "CudaResident"] = "Cpu"

    @classmethod
    def cpu(cls) -> Self:
        """Return the backend of phases over columns in host memory."""
        return cls("Cpu")

    @classmethod
    def cuda_resident(cls) -> Self:
        """Return the backend of phases over columns that stay on a CUDA device."""
        return cls("CudaResident")

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True)
class EnginePhaseMetric:
    """Cumulative counters of one phase.

    Attributes:
        phase_index: index in the combined list: runtime, then partition, then executor phases.
        name: its name.
        backend: where it runs.
        executions: number of executions, one per step and partition.
        last_elapsed_us: duration of the latest execution, in microseconds.
        total_elapsed_us: duration of all executions.
    """

    phase_index: int
    name: str
    backend: ColumnarPhaseBackend
    executions: int
    last_elapsed_us: int
    total_elapsed_us: int


@dataclass(frozen=True)
class EngineMetrics:
    """Cumulative counters of a controlled runtime at one moment.

    Attributes:
        current_step: the runtime's step index.
        agent_count: rows.
        phase_count: configured phases of all kinds.
        resident_bytes: bytes of ids and columns, approximately.
        steps_completed: committed steps of every kind.
        last_step_us: duration of the latest step, in microseconds.
        total_step_us: duration of all steps.
        checkpoints_created: number of checkpoints.
        replay_fingerprints: fingerprints captured for a recorded or verified replay.
        partition_count: partitions of the plan.
        partition_steps_completed: committed partition steps.
        partition_rows_processed: rows times phases, summed over partition steps.
        phases: one entry per phase that has run, by phase index.
    """

    current_step: int = 0
    agent_count: int = 0
    phase_count: int = 0
    resident_bytes: int = 0
    steps_completed: int = 0
    last_step_us: int = 0
    total_step_us: int = 0
    checkpoints_created: int = 0
    replay_fingerprints: int = 0
    partition_count: int = 0
    partition_steps_completed: int = 0
    partition_rows_processed: int = 0
    phases: tuple[EnginePhaseMetric, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the counters as JSON types; a backend is its name."""
        counters = asdict(self)
        counters["phases"] = [{**asdict(phase), "backend": phase.backend.kind} for phase in self.phases]
        return counters

    @classmethod
    def from_dict(cls, counters: Mapping[str, Any]) -> Self:
        """Build a snapshot from the result of `to_dict`; unknown keys are ignored.

        Raises:
            TypeError, KeyError: a phase's entry lacks a counter.
        """
        known = {entry.name for entry in fields(cls)} - {"phases"}
        phases = tuple(
            EnginePhaseMetric(**{**phase, "backend": ColumnarPhaseBackend(phase["backend"])})
            for phase in counters.get("phases", ())
        )
        return cls(**{name: int(counters[name]) for name in known if name in counters}, phases=phases)

    def to_json(self) -> str:
        """Return the counters as one line of JSON."""
        return json.dumps(self.to_dict())

    def to_prometheus(self, labels: Mapping[str, str] | None = None) -> str:
        """Return the counters in Prometheus' text exposition format, version 0.0.4, durations in seconds.

        ``labels`` are added to every sample, for example a run's name or a rank.
        """
        lines: list[str] = []
        for kind, name, help_text, samples in _families(self):
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_labels({**(labels or {}), **own})} {value}" for own, value in samples]
        return "\n".join(lines) + "\n"


_Family = tuple[str, str, str, list[tuple[dict[str, str], str]]]


def _families(metrics: EngineMetrics) -> Iterable[_Family]:
    """Yield Prometheus' metric families: type, name, help, samples."""
    for kind, name, help_text, value in (
        ("gauge", "current_step", "Step index.", str(metrics.current_step)),
        ("gauge", "agents", "Agents.", str(metrics.agent_count)),
        ("gauge", "phases", "Configured phases.", str(metrics.phase_count)),
        ("gauge", "resident_bytes", "Bytes of ids and columns.", str(metrics.resident_bytes)),
        ("gauge", "partitions", "Partitions of the plan.", str(metrics.partition_count)),
        ("counter", "steps_total", "Committed steps.", str(metrics.steps_completed)),
        ("gauge", "last_step_seconds", "Duration of the newest step.", _seconds(metrics.last_step_us)),
        ("counter", "step_seconds_total", "Duration of all steps.", _seconds(metrics.total_step_us)),
        ("counter", "checkpoints_total", "Checkpoints created.", str(metrics.checkpoints_created)),
        ("counter", "replay_fingerprints_total", "Fingerprints captured.", str(metrics.replay_fingerprints)),
        ("counter", "partition_steps_total", "Partition steps.", str(metrics.partition_steps_completed)),
        ("counter", "partition_rows_total", "Rows times phases.", str(metrics.partition_rows_processed)),
    ):
        yield kind, f"rustsim_{name}", help_text, [({}, value)]
    if not metrics.phases:
        return
    own = [
        {"phase": phase.name, "phase_index": str(phase.phase_index), "backend": phase.backend.kind}
        for phase in metrics.phases
    ]
    for kind, name, help_text, values in (
        ("counter", "executions_total", "Executions.", [str(p.executions) for p in metrics.phases]),
        ("gauge", "last_seconds", "Newest duration.", [_seconds(p.last_elapsed_us) for p in metrics.phases]),
        ("counter", "seconds_total", "Duration.", [_seconds(p.total_elapsed_us) for p in metrics.phases]),
    ):
        yield kind, f"rustsim_phase_{name}", help_text, list(zip(own, values, strict=True))


def _seconds(microseconds: int) -> str:
    # Exact: a float would lose microseconds in a run that takes years.
    return f"{microseconds // 1_000_000}.{microseconds % 1_000_000:06d}"


def _labels(labels: Mapping[str, str]) -> str:
    escaped = {
        name: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        for name, value in labels.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}" if labels else ""


class PhaseKind(IntEnum):
    """The three lists of phases of a plane, in the order of the combined list."""

    RUNTIME = 0
    PARTITION = 1
    EXECUTOR = 2


_PENDING = 256

_Steps = tuple[PhaseKind, tuple[str, ...], int, int, int, npt.NDArray[np.int64]]
"""Counted steps: kind, names, rows, number of steps, microseconds, nanoseconds of phases."""


class _KindTotals:
    """Counters of one list of phases: arrays by position, in nanoseconds."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.executions = self.last_ns = self.total_ns = np.zeros(0, np.int64)

    def add(self, alike: Sequence[_Steps]) -> None:
        """Add up steps of the same phases."""
        _, self.names, _, steps, _, last = alike[-1]
        count = len(self.names)
        if len(self.executions) < count:
            room = np.zeros(count - len(self.executions), np.int64)
            self.executions, self.last_ns, self.total_ns = (
                np.concatenate([have, room]) for have in (self.executions, self.last_ns, self.total_ns)
            )
        times = np.concatenate([made[-1] for made in alike])[:, :count]
        if len(times):
            self.executions[:count] += steps * len(times)
            self.last_ns[:count] = last[-1, :count] // steps
            self.total_ns[:count] += times.sum(axis=0)


class Meter:
    """Accumulates the counters of a plane; `snapshot` returns an immutable copy.

    Counters are kept by kind and position: adding a phase to an earlier list changes the phase indices in
    snapshots, but assigns no counter to another phase. Only committed steps are counted, so nothing has to
    be undone.
    """

    def __init__(self) -> None:
        self._live = (0, 0, 0, 0, 0)
        self._kinds = (0, 0, 0)
        self._steps = self._last_us = self._total_us = 0
        self._partition_steps = self._partition_rows = 0
        self._checkpoints = self._fingerprints = 0
        self._pending: list[_Steps] = []
        self._totals: dict[PhaseKind, _KindTotals] = {}

    def refresh(
        self,
        *,
        current_step: int,
        agent_count: int,
        resident_bytes: int,
        partition_count: int,
        phases: tuple[int, int, int],
    ) -> None:
        """Set the values that are not cumulative; ``phases``: the number of phases of each `PhaseKind`."""
        # A tuple, not a snapshot, to keep frequent calls cheap.
        self._live = (current_step, agent_count, sum(phases), resident_bytes, partition_count)
        self._kinds = phases

    def step_completed(
        self,
        total_us: int,
        kind: PhaseKind,
        names: tuple[str, ...],
        times: npt.NDArray[np.int64],
        *,
        rows: int = 0,
        steps: int = 1,
    ) -> None:
        """Count a committed step (or several made as one) and its phases' executions, one per partition.

        Args:
            total_us: duration of the step in microseconds.
            kind: which list of phases ran; ``names`` are theirs.
            times: int64 (partitions, at least as many as phases): nanoseconds.
            rows: number of rows over all partitions.
            steps: number of steps made.
        """
        # Added up a few hundred at a time, so that a single step does not pay for the arithmetic.
        self._pending.append((kind, names, rows, steps, total_us, times))
        if len(self._pending) >= _PENDING:
            self._settle()

    def _settle(self) -> None:
        """Add up the pending steps."""
        pending, self._pending = self._pending, []
        for (kind, names, rows, steps), group in groupby(pending, itemgetter(0, 1, 2, 3)):
            alike = list(group)
            made = steps * len(alike)
            self._steps += made
            self._last_us = alike[-1][4] // steps
            self._total_us += sum(one[4] for one in alike)
            if kind is not PhaseKind.RUNTIME:
                self._partition_steps += made
                self._partition_rows += rows * len(names) * made
            self._totals.setdefault(kind, _KindTotals()).add(alike)

    def checkpoint_created(self) -> int:
        """Count one checkpoint, and return its sequence number, from 1."""
        self._checkpoints += 1
        return self._checkpoints

    def fingerprint_captured(self) -> None:
        """Count one fingerprint of a recorded or verified replay."""
        self._fingerprints += 1

    def snapshot(self) -> EngineMetrics:
        """Return the current counters."""
        bases = (0, self._kinds[0], self._kinds[0] + self._kinds[1])
        self._settle()
        phases = [
            EnginePhaseMetric(
                phase_index=bases[kind] + int(position),
                name=totals.names[position],
                backend=ColumnarPhaseBackend.cpu(),
                executions=int(totals.executions[position]),
                last_elapsed_us=int(totals.last_ns[position]) // 1000,
                total_elapsed_us=int(totals.total_ns[position]) // 1000,
            )
            for kind, totals in sorted(self._totals.items())
            for position in np.flatnonzero(totals.executions)
        ]
        current_step, agent_count, phase_count, resident_bytes, partition_count = self._live
        return EngineMetrics(
            current_step=current_step,
            agent_count=agent_count,
            phase_count=phase_count,
            resident_bytes=resident_bytes,
            partition_count=partition_count,
            steps_completed=self._steps,
            last_step_us=self._last_us,
            total_step_us=self._total_us,
            checkpoints_created=self._checkpoints,
            replay_fingerprints=self._fingerprints,
            partition_steps_completed=self._partition_steps,
            partition_rows_processed=self._partition_rows,
            phases=tuple(phases),
        )
