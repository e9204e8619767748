"""The columnar runtime: a store, its phases, and one step over all rows.

:class:`ColumnarRuntime` is the plain engine that a control plane wraps; every way to step goes through
:class:`~rustsim_hpc.control.stepper.Stepper`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

from rustsim_hpc.control.metrics import ColumnarPhaseBackend
from rustsim_hpc.control.stepper import Stepper, StepReport
from rustsim_hpc.errors import ColumnarRuntimeError, InvalidConfig
from rustsim_hpc.executors.inline import InlinePartitionExecutor
from rustsim_hpc.executors.work import PhaseFailure, PhaseTrace, Task, Work
from rustsim_hpc.modeling.model import ColumnPhase, Derive, DeviceFunction, Reduction, RowKernel
from rustsim_hpc.modeling.program import plan_program
from rustsim_hpc.ranks.meeting import StepFailed
from rustsim_hpc.ranks.team import SoloTeam, Team
from rustsim_hpc.state.columns import DeviceSoaStore
from rustsim_hpc.state.partition import PartitionAssignment, PartitionExecutionBackend, PartitionId
from rustsim_hpc.state.schema import Schema


@dataclass(frozen=True)
class ColumnarPhaseTiming:
    """How long one phase took in one step; ``elapsed_us`` in whole microseconds."""

    phase_index: int
    name: str
    backend: ColumnarPhaseBackend
    elapsed_us: int


@dataclass(frozen=True)
class ColumnarStepTiming:
    """Timing of one step: its index (before the step), rows, phases, total time in microseconds."""

    step_index: int
    agent_count: int
    phases: tuple[ColumnarPhaseTiming, ...]
    total_us: int


MAX_STEP_INDEX = 2**64 - 1
"""The largest step index (uint64)."""


def closure_phase(name: str, fn: object) -> ColumnPhase:
    """Return a callable as a phase that may change every column; a column phase keeps its declarations.

    Raises:
        InvalidConfig: neither a column phase nor a plain callable, or the name is not one line of text.
    """
    if not isinstance(name, str):
        raise InvalidConfig(f"the name of a phase must be text, got {name!r}")
    if not name or not name.isprintable():
        raise InvalidConfig(f"{name!r} cannot be the name of a phase", hint="use one line of text")
    if isinstance(fn, ColumnPhase):
        return fn if fn.name == name else replace(fn, name=name)
    if isinstance(fn, RowKernel | Reduction | Derive | DeviceFunction):
        kind = type(fn).__name__
        raise InvalidConfig(f'phase "{name}": a {kind} is a phase of a model', hint="use rs.Model")
    if not callable(fn):
        raise InvalidConfig(f'phase "{name}" must be a function of (context, columns, rows), got {fn!r}')
    return _Closure(fn, name, None, row_local=False, stream=name)


def _checked(store: DeviceSoaStore, step_index: int) -> tuple[DeviceSoaStore, int]:
    if not isinstance(store, DeviceSoaStore):
        raise InvalidConfig(f"a runtime needs a DeviceSoaStore, got {type(store).__name__}")
    if (
        isinstance(step_index, bool)
        or not hasattr(step_index, "__index__")
        or not 0 <= step_index <= MAX_STEP_INDEX
    ):
        raise InvalidConfig(f"a step index is a whole number from 0 to 2^64 - 1, got {step_index!r}")
    return store, int(step_index)


class _Closure(ColumnPhase):
    """A phase given as a plain callable, which may be an object without a function's attributes."""


class ColumnarRuntime:
    """A store and the phases that change it, one step at a time.

    Args:
        store: the state.
        step_index: steps already made.
        team: the ranks of the run; this process alone by default.

    Attributes:
        in_step: lock held while a step is made; the state cannot be replaced meanwhile.

    Raises:
        InvalidConfig: not a store, or not a step index.
    """

    def __init__(self, store: DeviceSoaStore, step_index: int = 0, *, team: Team | None = None) -> None:
        self._store, self._step_index = _checked(store, step_index)
        self._phases: list[ColumnPhase] = []
        self._stepper: Stepper | None = None
        self._two_sided = True
        self.in_step = threading.Lock()
        self.team: Team = team or SoloTeam()

    # -- what it holds -------------------------------------------------------------------------------

    @property
    def step_index(self) -> int:
        """Steps completed."""
        return self._step_index

    @property
    def phase_count(self) -> int:
        """Number of runtime phases."""
        return len(self._phases)

    @property
    def phase_names(self) -> tuple[str, ...]:
        """Names of the runtime phases, in order."""
        return tuple(phase.name for phase in self._phases)

    @property
    def ids(self) -> object:
        """The store's row ids: uint64 (rows,)."""
        return self._store.ids

    @property
    def columns(self) -> object:
        """The store's columns, in order."""
        return self._store.columns

    @property
    def column_names(self) -> tuple[str, ...]:
        """The store's column names, in order."""
        return self._store.column_names

    @property
    def schema(self) -> Schema:
        """The store's schema."""
        return self._store.schema

    @property
    def num_columns(self) -> int:
        """Number of columns."""
        return self._store.num_columns

    @property
    def agent_count(self) -> int:
        """Number of rows (of this rank)."""
        return self._store.agent_count

    @property
    def resident_bytes(self) -> int:
        """Bytes of the store's state."""
        return self._store.resident_bytes

    def device_store(self) -> DeviceSoaStore:
        """Return the store."""
        return self._store

    def sync_to_host(self) -> None:
        """Make this process's copy current; does nothing where the columns live in this process.

        Raises:
            ExecutorError: rows are held by a lost worker and cannot be recomputed.
        """
        self._store.memory.refresh()

    def take_back(self) -> None:
        """Fetch the state from its keeper, if any, before it is modified; does nothing during a step."""
        if not self.in_step.locked():
            self._store.memory.take_back()

    def add_cpu_phase(self, name: str, fn: object) -> None:
        """Add a phase ``fn(context, columns, rows)`` that runs over all rows of this rank.

        Raises:
            InvalidConfig: ``fn`` cannot be called.
        """
        self._phases.append(closure_phase(name, fn))
        self._drop_stepper()

    def restore_device_store(self, store: DeviceSoaStore, step_index: int) -> None:
        """Replace state and step index; phases stay.

        Raises:
            InvalidConfig: not a store or a step index, or a step is being made; nothing has changed.
        """
        self.refuse_in_step()
        self._store, self._step_index = _checked(store, step_index)
        self._drop_stepper()

    def share_store(self) -> None:
        """Move the state into memory that worker processes can map; does nothing if it is there already.

        Raises:
            ColumnMemoryError: the memory cannot be allocated; nothing has changed.
        """
        if self._store.memory.kind != "shared":
            self._drop_stepper()
            self._store.move_to("shared")

    # -- stepping ------------------------------------------------------------------------------------

    def step(self) -> ColumnarStepTiming:
        """Run all phases once over all rows, completely or not at all.

        Raises:
            ColumnarRuntimeError: a phase failed; nothing has changed.
            InvalidConfig: a step is being made already, or there is no step index after this one.
        """
        self.begin_steps(1)
        try:
            start = time.perf_counter_ns()
            stepper = self.stepper(two_sided=True)
            try:
                report = stepper.advance(self._step_index)
            except StepFailed as failed:
                error = runtime_error(failed, self._step_index)
                raise error from error.__cause__
            self.commit(stepper)
            return self.timing(stepper, report, start)
        finally:
            self.in_step.release()

    def refuse_in_step(self) -> None:
        """Raise InvalidConfig while a step is being made."""
        if self.in_step.locked():
            raise _in_a_step()

    def begin_steps(self, steps: int) -> None:
        """Acquire :attr:`in_step` for ``steps`` steps; the caller releases it after them.

        Raises:
            InvalidConfig: a step is being made already, or fewer than ``steps`` step indices are left.
        """
        if not self.in_step.acquire(blocking=False):
            raise _in_a_step()
        if self._step_index + steps > MAX_STEP_INDEX:
            self.in_step.release()
            raise InvalidConfig(f"there is no step after step index {MAX_STEP_INDEX}")

    def stepper(self, *, two_sided: bool) -> Stepper:
        """Return the stepper of the runtime phases, bound to the current state's memory."""
        if self._stepper is None or self._two_sided != two_sided:
            self._drop_stepper()
            self._stepper, self._two_sided = self._bind(two_sided), two_sided
        return self._stepper

    def commit(self, stepper: Stepper, steps: int = 1) -> None:
        """Make the state that a stepper computed the current one, and count the step (or steps)."""
        self._store.memory.swap(stepper.work.program.swapped)
        self._step_index += steps

    def timing(self, stepper: Stepper, report: StepReport, start_ns: int) -> ColumnarStepTiming:
        """Return the timing of the step just committed, which began at ``start_ns`` (perf_counter)."""
        program = stepper.work.program
        micros = report.times.sum(axis=0) // 1000
        phases = tuple(
            ColumnarPhaseTiming(index, name, ColumnarPhaseBackend.cpu(), int(micros[index]))
            for index, name in enumerate(program.phase_names[: program.phase_count])
        )
        total = (time.perf_counter_ns() - start_ns) // 1000
        return ColumnarStepTiming(self._step_index - 1, self.agent_count, phases, total)

    def _bind(self, two_sided: bool) -> Stepper:
        store = self._store
        whole = PartitionAssignment(PartitionId(0), store.row_offset, store.row_offset + store.agent_count)
        task = Task(whole, PartitionExecutionBackend.local_cpu(), 0, store.agent_count)
        program = plan_program(store.schema, self._phases, two_sided=two_sided)
        ids = None if store.default_ids else store.ids
        work = Work(program, store.memory, ids, store.row_offset, store.total_rows, (task,))
        return Stepper(work, InlinePartitionExecutor().attach(work), self.team)

    def _drop_stepper(self) -> None:
        if self._stepper is not None:
            self._stepper.session.close()
            self._stepper = None


def _in_a_step() -> InvalidConfig:
    return InvalidConfig(
        "the control plane is in the middle of a step",
        hint="a phase cannot use the plane that runs it, nor can two threads use one plane",
    )


def runtime_error(failed: StepFailed, step: int) -> ColumnarRuntimeError:
    """Return the error of a step whose runtime phases failed: the first failure, the others attached."""
    first, *others = [_one_error(failure, step) for failure in failed.failures]
    return first.add_facts(others=tuple(others))


def _one_error(failure: PhaseFailure, step: int) -> ColumnarRuntimeError:
    message = failure.message
    if failure.kind == "worker" and failure.trace:
        # Not an Exception, for example SystemExit. No partition worker can have died here.
        message = failure.trace.strip().splitlines()[-1]
    error = ColumnarRuntimeError(
        failure.phase_index or 0, failure.phase, message, step=step, rank=failure.rank, host=failure.host
    )
    if failure.trace:
        error.__cause__ = PhaseTrace(failure.trace)
    return error
