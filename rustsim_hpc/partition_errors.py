"""Errors of partition plans and of partition executors: two families of `rustsim_hpc.errors`.

A control plane raises them as the `source` of its `PlanError` and `ExecutorError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rustsim_hpc.facts import PartitionLike, RustsimError

if TYPE_CHECKING:
    # In a base class a variant's name is the ClassVar; annotations reach the class through the module.
    import rustsim_hpc.partition_errors as here  # noqa: PLW0406


class PartitionPlanError(RustsimError, ValueError):
    """A partition plan cannot be built, or does not fit the population."""

    exit_code = 2
    InvalidPartitionCount: ClassVar[type[here.InvalidPartitionCount]]
    SingleProcessHasAssignments: ClassVar[type[here.SingleProcessHasAssignments]]
    WorkerCountMismatch: ClassVar[type[here.WorkerCountMismatch]]
    NonContiguousRange: ClassVar[type[here.NonContiguousRange]]
    RangeOutOfBounds: ClassVar[type[here.RangeOutOfBounds]]
    EmptyRange: ClassVar[type[here.EmptyRange]]
    CoverageMismatch: ClassVar[type[here.CoverageMismatch]]
    ReversedRange: ClassVar[type[here.ReversedRange]]


class InvalidPartitionCount(PartitionPlanError):
    """At least one partition is required."""

    template = "partition_count must be greater than zero"


class SingleProcessHasAssignments(PartitionPlanError):
    """A single-process plan carries row assignments."""

    template = "single-process partition plan must not contain row assignments"


class WorkerCountMismatch(PartitionPlanError):
    """There are more or fewer worker labels than assignments."""

    template = "worker count {workers} does not match assignment count {assignments}"
    assignments: int
    workers: int


class NonContiguousRange(PartitionPlanError):
    """A row range does not start where the one before it ends."""

    template = "partition {partition!r} starts at row {row_start}, expected {expected_start}"
    partition: PartitionLike
    row_start: int
    expected_start: int


class RangeOutOfBounds(PartitionPlanError):
    """A row range ends beyond the population."""

    template = "partition {partition!r} ends at row {row_end}, beyond agent count {agent_count}"
    partition: PartitionLike
    row_end: int
    agent_count: int


class EmptyRange(PartitionPlanError):
    """A row range is empty though there are agents."""

    template = "partition {partition!r} has an empty row range"
    partition: PartitionLike


class CoverageMismatch(PartitionPlanError):
    """The row ranges do not cover the population exactly."""

    template = "static partition plan covers {covered_rows} rows, expected {agent_count}"
    covered_rows: int
    agent_count: int


class ReversedRange(PartitionPlanError):
    """A row range ends before it starts."""

    template = "partition {partition!r} ends at row {row_end}, before its start {row_start}"
    partition: PartitionLike
    row_start: int
    row_end: int


class PartitionExecutorError(RustsimError, RuntimeError):
    """An executor could not run its partitions."""

    Worker: ClassVar[type[here.Worker]]
    Phase: ClassVar[type[here.Phase]]
    MissingEndpoint: ClassVar[type[here.MissingEndpoint]]
    ResultCountMismatch: ClassVar[type[here.ResultCountMismatch]]


class Worker(PartitionExecutorError):
    """A worker failed, or died, before a phase could be named."""

    template = "partition {partition!r} worker failed: {message}"
    partition: PartitionLike
    message: str


class Phase(PartitionExecutorError):
    """A named phase failed on a worker."""

    template = "partition {partition!r} phase {phase} failed: {message}"
    partition: PartitionLike
    phase: str
    message: str


class MissingEndpoint(PartitionExecutorError):
    """An external worker has no endpoint."""

    template = "partition {partition!r} has no external endpoint"
    partition: PartitionLike


class ResultCountMismatch(PartitionExecutorError):
    """An executor returned more or fewer results than it got tasks."""

    template = "partition executor returned {actual} results, expected {expected}"
    expected: int
    actual: int


for _root in (PartitionPlanError, PartitionExecutorError):
    for _variant in _root.__subclasses__():
        setattr(_root, _variant.__name__, _variant)
