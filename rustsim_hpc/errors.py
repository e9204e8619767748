"""Every deliberate error of the package: one root, facts as fields, picklable.

`str(error)` says in one line what is wrong; `error.details()` where, what else failed, and what to do. A
family's variants are attributes of their root too: `PartitionPlanError.EmptyRange is errors.EmptyRange`.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rustsim_hpc.facts import NoSuchName as NoSuchName  # noqa: PLC0414
from rustsim_hpc.facts import PartitionLike
from rustsim_hpc.facts import RustsimError as RustsimError  # noqa: PLC0414
from rustsim_hpc.partition_errors import CoverageMismatch as CoverageMismatch  # noqa: PLC0414
from rustsim_hpc.partition_errors import EmptyRange as EmptyRange  # noqa: PLC0414
from rustsim_hpc.partition_errors import InvalidPartitionCount as InvalidPartitionCount  # noqa: PLC0414
from rustsim_hpc.partition_errors import MissingEndpoint as MissingEndpoint  # noqa: PLC0414
from rustsim_hpc.partition_errors import NonContiguousRange as NonContiguousRange  # noqa: PLC0414
from rustsim_hpc.partition_errors import PartitionExecutorError as PartitionExecutorError  # noqa: PLC0414
from rustsim_hpc.partition_errors import PartitionPlanError as PartitionPlanError  # noqa: PLC0414
from rustsim_hpc.partition_errors import Phase as Phase  # noqa: PLC0414
from rustsim_hpc.partition_errors import RangeOutOfBounds as RangeOutOfBounds  # noqa: PLC0414
from rustsim_hpc.partition_errors import ResultCountMismatch as ResultCountMismatch  # noqa: PLC0414
from rustsim_hpc.partition_errors import ReversedRange as ReversedRange  # noqa: PLC0414
from rustsim_hpc.partition_errors import SingleProcessHasAssignments as SingleProcessHasAssignments  # noqa: PLC0414
from rustsim_hpc.partition_errors import Worker as Worker  # noqa: PLC0414
from rustsim_hpc.partition_errors import WorkerCountMismatch as WorkerCountMismatch  # noqa: PLC0414
from rustsim_hpc.texts import message_of as message_of  # noqa: PLC0414
from rustsim_hpc.texts import named as named  # noqa: PLC0414
from rustsim_hpc.texts import nearest as nearest  # noqa: PLC0414

if TYPE_CHECKING:
    # In a base class a variant's name is the ClassVar; annotations reach the class through the module.
    import rustsim_hpc.errors as here  # noqa: PLW0406


EXIT_FAILED: Final = 3
"""Exit code after an error that is not one of these."""

EXIT_INTERRUPTED: Final = 130
"""Exit code after Ctrl-C, as shells give it."""


class ColumnarRuntimeError(RustsimError, RuntimeError):
    """A runtime phase failed; `message` is the text of what it raised."""

    template = "phase {phase_index} ({phase}) failed: {message}"
    phase_index: int
    phase: str
    message: str


class DeviceSoaRestoreError(RustsimError, ValueError):
    """A checkpoint's payload cannot become a store."""

    exit_code = 5
    message: str


class ColumnMemoryError(RustsimError, MemoryError):
    """Memory for columns cannot be had, or not be reached."""

    message: str


class DeviceError(RustsimError, RuntimeError):
    """A CUDA device cannot be used, or refused what it was asked for."""

    message: str


class DeviceMemoryError(RustsimError, MemoryError):
    """A CUDA device has not enough memory: `asked` bytes, of which `free` could be had."""

    template = "CUDA device {ordinal} is out of memory: {asked:,} bytes asked for, {free:,} free"
    ordinal: int
    asked: int
    free: int


class EngineControlPlaneError(RustsimError):
    """Base class of what a control plane raises.

    results: what a `run(n)` that failed had completed before, in order.
    """

    results: tuple[Any, ...] = field(default=(), kw_only=True)
    InvalidConfig: ClassVar[type[here.InvalidConfig]]
    Runtime: ClassVar[type[here.Runtime]]
    RestoreError: ClassVar[type[here.RestoreError]]
    ReplayDivergence: ClassVar[type[here.ReplayDivergence]]
    ReplayStepMismatch: ClassVar[type[here.ReplayStepMismatch]]
    ReplayExhausted: ClassVar[type[here.ReplayExhausted]]
    PlanError: ClassVar[type[here.PlanError]]
    PartitionCheckpointError: ClassVar[type[here.PartitionCheckpointError]]
    MissingPartitionWorker: ClassVar[type[here.MissingPartitionWorker]]
    PartitionExecution: ClassVar[type[here.PartitionExecution]]
    ExecutorError: ClassVar[type[here.ExecutorError]]
    TornState: ClassVar[type[here.TornState]]
    CheckFailed: ClassVar[type[here.CheckFailed]]
    CheckpointWriteFailed: ClassVar[type[here.CheckpointWriteFailed]]
    TeamError: ClassVar[type[here.TeamError]]
    SchemeMismatch: ClassVar[type[here.SchemeMismatch]]
    Restore: ClassVar[type[here.RestoreError]]
    Partition: ClassVar[type[here.PlanError]]
    PartitionCheckpoint: ClassVar[type[here.PartitionCheckpointError]]
    PartitionExecutor: ClassVar[type[here.ExecutorError]]


class _Sourced(EngineControlPlaneError):
    """A plane's error around another one, `source`, whose facts it takes over."""

    source: RustsimError

    def _complete(self) -> None:
        super()._complete()
        self.add_facts(**self.source.all_facts())
        self.__cause__ = self.source


class InvalidConfig(EngineControlPlaneError, ValueError):
    """The configuration, or what a plane is built on, cannot be right."""

    exit_code = 2
    template = "invalid control-plane configuration: {message}"
    message: str


class Runtime(_Sourced, RuntimeError):
    """A runtime phase failed; `source` says which."""

    template = "runtime error: {source}"
    source: ColumnarRuntimeError


class RestoreError(_Sourced, ValueError):
    """A checkpoint failed validation on restore; nothing was changed."""

    exit_code = 5
    template = "checkpoint restore failed: {source}"
    source: DeviceSoaRestoreError


class ReplayDivergence(EngineControlPlaneError, RuntimeError):
    """Verification found another value. `columns`: which ones differ, where the stream knows."""

    exit_code = 4
    template = "replay diverged at step {step_index}: expected {expected:#018x}, got {actual:#018x}"
    step_index: int
    expected: int
    actual: int
    columns: tuple[str, ...] = ()


class ReplayStepMismatch(EngineControlPlaneError, RuntimeError):
    """Verification expected another step index."""

    exit_code = 4
    template = "replay expected step {expected_step} but runtime produced step {actual_step}"
    expected_step: int
    actual_step: int


class ReplayExhausted(EngineControlPlaneError, RuntimeError):
    """Verification ran out of expected fingerprints."""

    exit_code = 4
    template = "replay has no expected fingerprint for step {step_index}"
    step_index: int


class PlanError(_Sourced, ValueError):
    """The partition plan does not fit; `source` is the bare variant."""

    exit_code = 2
    template = "partition plan error: {source}"
    source: PartitionPlanError


class PartitionCheckpointError(EngineControlPlaneError, ValueError):
    """Partition checkpoints cannot be assembled or restored; nothing was changed."""

    exit_code = 5
    template = "partition checkpoint error: {message}"
    message: str


class MissingPartitionWorker(EngineControlPlaneError, ValueError):
    """A partition names a worker label that is not registered."""

    exit_code = 2
    template = "partition {partition!r} references missing worker {worker}"
    partition: PartitionLike
    worker: str


class PartitionExecution(EngineControlPlaneError, RuntimeError):
    """A partition phase failed; `message` is the text of what it raised."""

    template = "partition {partition!r} phase {phase} failed: {message}"
    partition: PartitionLike
    phase: str
    message: str


class ExecutorError(_Sourced, RuntimeError):
    """A partition executor failed; `source` is the bare variant."""

    template = "partition executor error: {source}"
    source: PartitionExecutorError


class TornState(EngineControlPlaneError, RuntimeError):
    """A step failed half way under the torn guard: only a restore is accepted."""

    template = "state is torn: {message}"
    message: str


class CheckFailed(EngineControlPlaneError, RuntimeError):
    """A model's check said no; the step was undone."""

    template = "check {check} failed: {message}"
    check: str
    message: str


class CheckpointWriteFailed(EngineControlPlaneError, RuntimeError):
    """A checkpoint could not be written; the step before it stands."""

    exit_code = 5
    template = "checkpoint write failed: {message}"
    message: str


class TeamError(EngineControlPlaneError, RuntimeError):
    """A rank was lost, or ranks disagree."""

    template = "team error: {message}"
    message: str


class ModelError(RustsimError, ValueError):
    """A model's definition or parameters cannot be right."""

    exit_code = 2
    message: str


class KernelError(ModelError, kw_only=True):
    """A kernel cannot be compiled. kernel, argument: their names; file, line: where in the user's source."""

    kernel: str | None = None
    argument: str | None = None
    file: str | None = None
    line: int | None = None

    def text(self) -> str:
        """Return `FILE:LINE: kernel NAME, argument NAME: message`, without what is not known."""
        file = [] if self.file is None else [self.file + ("" if self.line is None else f":{self.line}")]
        kernel = [] if self.kernel is None else [f"kernel {self.kernel}"]
        argument = [] if self.argument is None else [f"argument {self.argument}"]
        names = [", ".join(kernel + argument)] if kernel or argument else []
        return ": ".join([*file, *names, self.message])


class JobError(RustsimError, ValueError):
    """A job file or a command line cannot be right."""

    exit_code = 2
    message: str


class CheckpointFileError(RustsimError, ValueError):
    """A checkpoint file has wrong content (`damaged`), or cannot be reached or written (not `damaged`)."""

    exit_code = 5
    message: str
    damaged: bool = field(default=True, kw_only=True)


class RunFolderError(RustsimError, RuntimeError):
    """A run's folder cannot be used."""

    exit_code = 2
    message: str


class ReplayLogError(RustsimError, ValueError):
    """A replay log cannot be read."""

    exit_code = 2
    message: str


class LauncherError(RustsimError, RuntimeError):
    """The launcher's environment and the MPI library do not agree."""

    exit_code = 2
    message: str


class RemoteError(RustsimError, ValueError):
    """Remote workers cannot be set up: an address, keys, the library."""

    exit_code = 2
    message: str


class OutputError(RustsimError, RuntimeError):
    """A model's output could not be made or written."""

    message: str


class SchemeMismatch(EngineControlPlaneError, ValueError):
    """Two fingerprints of different schemes were compared."""

    exit_code = 2
    message: str


def whole_number(label: str, value: Any, limit: int | None = None, *, signed: bool = False) -> int:
    """Return a whole number from 0 (or any, if signed) to `limit` as an int, whatever integer type it has.

    Raises:
        InvalidConfig: it is none.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidConfig(f"{label} must be a whole number, got {value!r}")
    number = int(value.__index__())
    if (number < 0 and not signed) or (limit is not None and number > limit):
        raise InvalidConfig(f"{label} must lie in 0..{'' if limit is None else limit}, got {number}")
    return number


for _variant in [value for value in globals().values() if isinstance(value, type)]:
    if issubclass(_variant, EngineControlPlaneError) and not _variant.__name__.startswith("_"):
        setattr(EngineControlPlaneError, _variant.__name__, _variant)
EngineControlPlaneError.Restore, EngineControlPlaneError.Partition = RestoreError, PlanError
EngineControlPlaneError.PartitionCheckpoint = PartitionCheckpointError
EngineControlPlaneError.PartitionExecutor = ExecutorError
