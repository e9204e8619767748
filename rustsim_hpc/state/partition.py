"""Partition plans: which rows form a partition, and which worker runs it on which backend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from rustsim_hpc.errors import (
    CoverageMismatch,
    EmptyRange,
    InvalidConfig,
    InvalidPartitionCount,
    MissingPartitionWorker,
    NonContiguousRange,
    RangeOutOfBounds,
    ReversedRange,
    SingleProcessHasAssignments,
    WorkerCountMismatch,
    whole_number,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    # In the base class a variant's name is the ClassVar; annotations reach the class through the module.
    import rustsim_hpc.state.partition as here  # noqa: PLW0406

_U32_MAX = 2**32 - 1


@dataclass(frozen=True, order=True, repr=False)
class PartitionId:
    """Stable number of a partition, from 0 to 2^32 - 1."""

    value: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", whole_number("a partition id", self.value, _U32_MAX))

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"PartitionId({self.value})"


class PartitionMode(Enum):
    """Kind of a partition plan."""

    SingleProcess = "single_process"
    """One partition owns the whole state."""
    StaticRowRanges = "static_row_ranges"
    """Rows are assigned to fixed ranges."""


@dataclass(frozen=True)
class PartitionAssignment:
    """A range of rows, [row_start, row_end), that belongs to a partition; `worker` is a worker's label."""

    partition_id: PartitionId
    row_start: int
    row_end: int
    worker: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.partition_id, PartitionId):
            raise InvalidConfig(f"partition_id must be a PartitionId, got {self.partition_id!r}")
        object.__setattr__(self, "row_start", whole_number("row_start", self.row_start))
        object.__setattr__(self, "row_end", whole_number("row_end", self.row_end))
        if not (self.worker is None or isinstance(self.worker, str)):
            raise InvalidConfig(f"a worker label must be text, got {self.worker!r}")

    @property
    def rows(self) -> int:
        """Number of rows (`len` cannot count beyond 2^63 - 1)."""
        return max(self.row_end - self.row_start, 0)

    def __len__(self) -> int:
        return self.rows

    def __bool__(self) -> bool:
        # Otherwise __len__ would make an assignment of no rows false.
        return True

    def is_empty(self) -> bool:
        """Return whether no rows are assigned."""
        return self.row_end <= self.row_start


@dataclass(frozen=True)
class PartitionPlan:
    """How the rows are divided into partitions. Build one with `single_process`, `row_ranges` or `static`."""

    mode: PartitionMode = PartitionMode.SingleProcess
    assignments: tuple[PartitionAssignment, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.mode, PartitionMode):
            raise InvalidConfig(f"the mode of a plan must be a PartitionMode, got {self.mode!r}")
        assignments: Any = self.assignments
        if not isinstance(assignments, Iterable):
            raise InvalidConfig(f"assignments must be PartitionAssignments, got {assignments!r}")
        object.__setattr__(self, "assignments", tuple(assignments))
        for assignment in self.assignments:
            if not isinstance(assignment, PartitionAssignment):
                raise InvalidConfig(f"assignments must be PartitionAssignments, got {assignment!r}")

    @classmethod
    def single_process(cls) -> PartitionPlan:
        """Build the plan of one partition that owns all rows, for any population."""
        return cls()

    @classmethod
    def static(cls, assignments: Iterable[PartitionAssignment]) -> PartitionPlan:
        """Build a plan of given row ranges; `validate` checks them against a population."""
        given: Any = assignments  # checked, and made a tuple, by the plan itself
        return cls(PartitionMode.StaticRowRanges, given)

    @classmethod
    def row_ranges(cls, agent_count: int, partition_count: int) -> PartitionPlan:
        """Divide rows evenly; the first `agent_count % partition_count` ranges are one row longer.

        With fewer rows than partitions, each row becomes one partition; no rows give one empty partition.

        Raises:
            InvalidPartitionCount: `partition_count` is zero or less.
            InvalidConfig: not whole numbers, negative rows, or more ranges than a PartitionId can number.
        """
        rows, parts = (
            whole_number("agent_count", agent_count),
            whole_number("partition_count", partition_count, signed=True),
        )
        if parts <= 0:
            raise InvalidPartitionCount
        if rows == 0:
            return cls.static([PartitionAssignment(PartitionId(0), 0, 0)])
        # Ranges beyond the last row would be empty and are left out.
        used = min(parts, rows)
        if used > _U32_MAX + 1:
            raise InvalidConfig(f"{used} partitions are more than a partition id can number")
        base, longer = divmod(rows, parts)
        starts = [number * base + min(number, longer) for number in range(used + 1)]
        return cls.static(
            PartitionAssignment(PartitionId(number), starts[number], starts[number + 1])
            for number in range(used)
        )

    def with_workers(self, workers: Sequence[str]) -> PartitionPlan:
        """Return the plan with one worker label for each assignment, in order.

        Raises:
            WorkerCountMismatch: there are more or fewer labels than assignments.
            InvalidConfig: a label is not text.
        """
        if not isinstance(workers, Iterable):
            raise InvalidConfig(f"workers must be labels, got {workers!r}")
        labels = list(workers)
        if len(labels) != len(self.assignments):
            raise WorkerCountMismatch(len(self.assignments), len(labels))
        pairs = zip(self.assignments, labels, strict=True)
        return replace(
            self, assignments=tuple(replace(assignment, worker=label) for assignment, label in pairs)
        )

    @property
    def partition_count(self) -> int:
        """Number of partitions (1 for a single-process plan)."""
        return 1 if self.mode is PartitionMode.SingleProcess else len(self.assignments)

    @property
    def has_worker_assignments(self) -> bool:
        """Whether any assignment names a worker."""
        return any(assignment.worker is not None for assignment in self.assignments)

    def validate(self, agent_count: int) -> None:
        """Check that the plan covers `agent_count` rows exactly, in order and without empty ranges.

        Raises:
            PartitionPlanError: the variant for the first mismatch found.
        """
        if self.mode is PartitionMode.SingleProcess:
            if self.assignments:
                raise SingleProcessHasAssignments
            return
        covered = 0
        for assignment in self.assignments:
            partition, start, end = assignment.partition_id, assignment.row_start, assignment.row_end
            if start != covered:
                raise NonContiguousRange(partition, start, covered)
            if end > agent_count:
                raise RangeOutOfBounds(partition, end, agent_count)
            if end < start:
                raise ReversedRange(partition, start, end)
            if end == start and agent_count > 0:
                raise EmptyRange(partition)
            covered = end
        if covered != agent_count or not self.assignments:
            raise CoverageMismatch(covered, agent_count)

    def materialized_assignments(self, agent_count: int) -> tuple[PartitionAssignment, ...]:
        """Return the assignments; for a single-process plan, one of all `agent_count` rows."""
        if self.mode is PartitionMode.SingleProcess:
            return (PartitionAssignment(PartitionId(0), 0, agent_count),)
        return self.assignments


@dataclass(frozen=True)
class PartitionExecutionBackend:
    """What a partition runs on: one of the variants `LocalCpu`, `CudaDevice`, `External`."""

    LocalCpu: ClassVar[type[here.LocalCpu]]
    CudaDevice: ClassVar[type[here.CudaDevice]]
    External: ClassVar[type[here.External]]

    @staticmethod
    def local_cpu() -> here.LocalCpu:
        """Return the CPU of this process."""
        return LocalCpu()

    @staticmethod
    def cuda_device(device_ordinal: int) -> here.CudaDevice:
        """Return a CUDA device of this machine, by its number."""
        return CudaDevice(device_ordinal)

    @staticmethod
    def external(endpoint: str) -> here.External:
        """Return an external worker, by its endpoint."""
        return External(endpoint)


@dataclass(frozen=True)
class LocalCpu(PartitionExecutionBackend):
    """Run in this process, on the CPU."""


@dataclass(frozen=True)
class CudaDevice(PartitionExecutionBackend):
    """Run on a CUDA device of this machine."""

    device_ordinal: int

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "device_ordinal", whole_number("device_ordinal", self.device_ordinal, _U32_MAX)
        )


@dataclass(frozen=True)
class External(PartitionExecutionBackend):
    """Run on an external worker, reached through an endpoint."""

    endpoint: str

    def __post_init__(self) -> None:
        endpoint: Any = self.endpoint
        if not isinstance(endpoint, str):
            raise InvalidConfig(f"an endpoint must be text, got {endpoint!r}")


PartitionExecutionBackend.LocalCpu = LocalCpu
PartitionExecutionBackend.CudaDevice = CudaDevice
PartitionExecutionBackend.External = External


@dataclass(frozen=True)
class PartitionWorker:
    """A worker: the label by which assignments name it, and its backend.

    Raises:
        InvalidConfig: a field of the wrong type.
    """

    label: str
    backend: PartitionExecutionBackend

    def __post_init__(self) -> None:
        label: Any = self.label
        if not isinstance(label, str):
            raise InvalidConfig(f"a worker label must be text, got {label!r}")
        if not isinstance(self.backend, PartitionExecutionBackend):
            raise InvalidConfig(f'backend of worker "{label}" must be a backend, got {self.backend!r}')

    @classmethod
    def local_cpu(cls, label: str) -> PartitionWorker:
        """Build a worker on this process's CPU."""
        return cls(label, LocalCpu())

    @classmethod
    def cuda_device(cls, label: str, device_ordinal: int) -> PartitionWorker:
        """Build a worker on a CUDA device."""
        return cls(label, CudaDevice(device_ordinal))

    @classmethod
    def external(cls, label: str, endpoint: str) -> PartitionWorker:
        """Build a worker behind an endpoint."""
        return cls(label, External(endpoint))


@dataclass(frozen=True)
class PartitionExecutionContext:
    """What is passed to a phase about the partition that it runs on.

    Attributes:
        row_start, row_end: the partition's global rows, [row_start, row_end).
        worker: label of the worker, if the plan names one.
        step_index: step index before the step.
        params: the model's parameters, by attribute; None outside a model.
        reductions: results of reductions and derived values so far, by name; None outside a model.
        random: random numbers for this partition's rows in this phase and step; None outside a model.
    """

    partition_id: PartitionId
    row_start: int
    row_end: int
    worker: str | None
    backend: PartitionExecutionBackend
    step_index: int
    params: Any = field(default=None, compare=False, repr=False)
    reductions: Any = field(default=None, compare=False, repr=False)
    random: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class PartitionPhaseReport:
    """Where one phase ran for one partition, and how long it took.

    Attributes:
        phase_index: index in the plane's combined phase list.
        rows: rows of the partition.
        elapsed_us: wall-clock time in microseconds.
    """

    partition_id: PartitionId
    worker: str | None
    phase_index: int
    name: str
    backend: PartitionExecutionBackend
    rows: int
    elapsed_us: int


def resolve_backend(
    assignment: PartitionAssignment, workers: Iterable[PartitionWorker]
) -> PartitionExecutionBackend:
    """Return the backend of the worker that an assignment names; the local CPU if it names none.

    Raises:
        MissingPartitionWorker: no worker has that label.
    """
    if assignment.worker is None:
        return LocalCpu()
    for worker in workers:
        if worker.label == assignment.worker:
            return worker.backend
    raise MissingPartitionWorker(assignment.partition_id, assignment.worker)


def validate_workers(plan: PartitionPlan, workers: Sequence[PartitionWorker]) -> None:
    """Check that labels are unique and that every label of a plan is registered.

    Raises:
        InvalidConfig: two workers have the same label.
        MissingPartitionWorker: a partition names a label that no worker has.
    """
    labels: set[str] = set()
    for worker in workers:
        if worker.label in labels:
            raise InvalidConfig(f'two partition workers have the label "{worker.label}"')
        labels.add(worker.label)
    for assignment in plan.assignments:
        if assignment.worker is not None and assignment.worker not in labels:
            raise MissingPartitionWorker(assignment.partition_id, assignment.worker)
