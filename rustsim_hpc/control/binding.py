"""Bind lists of phases to executors and to the state: the steppers of a control plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rustsim_hpc.control.config import ControlPlaneConfig, validate_plan
from rustsim_hpc.control.failures import StepKind
from rustsim_hpc.control.runtime import ColumnarRuntime
from rustsim_hpc.control.stepper import Stepper
from rustsim_hpc.errors import ExecutorError, InvalidConfig, RustsimError, Worker, message_of
from rustsim_hpc.executors.base import Executor, PartitionExecutor, ResidentExecutor, ResidentSession
from rustsim_hpc.executors.tasks import TaskSession
from rustsim_hpc.executors.work import Task, Work, require_partitions_that_add_up
from rustsim_hpc.modeling.model import Phase
from rustsim_hpc.modeling.program import plan_program
from rustsim_hpc.proof.state_proof import StateProof
from rustsim_hpc.ranks.agreement import agree
from rustsim_hpc.state.columns import DeviceSoaStore
from rustsim_hpc.state.partition import PartitionAssignment, PartitionId, resolve_backend

if TYPE_CHECKING:
    from rustsim_hpc.modeling.bound_model import BoundModel


class Bindings:
    """One stepper for each list of phases, kept from step to step until its executor, phases or state change.

    Args:
        runtime: the state and its step index.
        config: guard, plan, workers.
        proof: the sums known of the state's fingerprint; notified when the state is replaced.

    Attributes:
        model: the model that the executor phases belong to, or None.
        compile_options: how its kernels are compiled, as `Work` takes it.
    """

    def __init__(self, runtime: ColumnarRuntime, config: ControlPlaneConfig, proof: StateProof) -> None:
        self.runtime = runtime
        self.config = config
        self.model: BoundModel | None = None
        self.compile_options: dict[str, Any] = {}
        self._proof = proof
        self._bound: dict[StepKind, _Bound] = {}
        self._remember()

    # -- the state that the phases are bound to --------------------------------------------------------

    def up_to_date(self) -> bool:
        """Return whether the state is the one that was last bound, replaced or committed."""
        runtime, store = self.runtime, self.runtime.device_store()
        return store is self._store and store.memory is self._memory and runtime.step_index == self._step

    def committed(self, step_index: int) -> None:
        """Record that a step was committed; the step index is now ``step_index``."""
        self._step = step_index

    def _remember(self) -> None:
        self._store = self.runtime.device_store()
        self._memory = self._store.memory
        self._step = self.runtime.step_index

    def follow(self) -> bool:
        """Detect a state that was changed outside the plane; return whether its store was replaced."""
        if self.up_to_date():
            return False
        store = self.runtime.device_store()
        replaced = store is not self._store or store.memory is not self._memory
        if replaced:
            self.drop_all()
            self._proof.replace(store)
        else:  # only the step index
            self._proof.forget()
        self._remember()
        return replaced

    def replace(self, store: DeviceSoaStore, step_index: int) -> None:
        """Replace the state; everything bound to the old one is released."""
        self.runtime.device_store().memory.keeper = None  # the old values need not be fetched
        self.drop_all()
        self.runtime.restore_device_store(store, step_index)
        self._proof.replace(store)
        self._remember()

    # -- binding -------------------------------------------------------------------------------------

    def stepper(
        self, kind: StepKind, executor: Executor, phases: Sequence[Phase], phase_base: int
    ) -> Stepper:
        """Return the stepper of a list of phases, bound to an executor and to the current state's memory.

        The caller must have called :meth:`follow`.

        Raises:
            InvalidConfig: not an executor; or a partition lies on two ranks.
            PlanError: the plan does not fit the population.
            ExecutorError: the executor does not serve a partition's backend, or cannot start.
        """
        bound = self._bound.get(kind)
        if bound is not None and bound.executor is executor and bound.phase_base == phase_base:
            return bound.stepper
        self.drop(kind)
        stepper: Stepper | None = None
        failure: Exception | None = None
        try:
            if getattr(executor, "needs_shared_memory", False):
                self._share_state()
            work = self._work(kind, phases)
            stepper = Stepper(work, self._session(work, executor, phase_base), self.runtime.team)
        except Exception as error:  # noqa: BLE001 (raised on all ranks)
            failure = error
        try:
            agree(self.runtime.team, failure)  # the others must not wait for a rank that cannot start
        except BaseException:
            if stepper is not None:
                stepper.session.close()
            raise
        if stepper is None:
            raise AssertionError("agreed on success without a stepper")
        self._bound[kind] = _Bound(executor, phase_base, stepper)
        return stepper

    def _share_state(self) -> None:
        """Move the state into shared memory, once; what is bound to the old memory is released."""
        if self.runtime.device_store().memory.kind != "shared":
            self.drop_all()
            self.runtime.share_store()
            self._remember()
            self._proof.replace(self._store)

    def _session(self, work: Work, executor: Executor, phase_base: int) -> ResidentSession:
        resident = isinstance(executor, ResidentExecutor)
        if isinstance(executor, type) or not (resident or isinstance(executor, PartitionExecutor)):
            raise InvalidConfig(f"{executor!r} is not a partition executor: it has no execute(tasks)")
        if not isinstance(executor, ResidentExecutor):
            return TaskSession(work, executor, phase_base, self.config.fingerprint)
        try:
            return executor.attach(work)
        except RustsimError:
            raise
        except Exception as error:
            first = work.tasks[0].assignment.partition_id if work.tasks else PartitionId(0)
            raise ExecutorError(Worker(first, f"cannot start: {message_of(error)}")) from error

    def _work(self, kind: StepKind, phases: Sequence[Phase]) -> Work:
        store, model = self.runtime.device_store(), self.model if kind is StepKind.EXECUTOR else None
        validate_plan(self.config.partition_plan, store.total_rows)
        program = plan_program(
            store.schema,
            phases,
            two_sided=self.config.guard.two_sided,
            **({} if model is None else model.program_options()),
        )
        work = Work(
            program=program,
            memory=store.memory,
            ids=None if store.default_ids else store.ids,
            first_row=store.row_offset,
            total_rows=store.total_rows,
            tasks=self.tasks(),
            **self.compile_options,
        )
        if model is not None:
            model.bind_work(work)
        require_partitions_that_add_up(work)
        return work

    def tasks(self) -> tuple[Task, ...]:
        """Return this rank's partitions, which are contiguous in the plan.

        Raises:
            InvalidConfig: a partition lies on two ranks.
        """
        store, plan = self.runtime.device_store(), self.config.partition_plan
        first, last = store.row_offset, store.row_offset + store.agent_count
        if plan.partition_count == 1 and not plan.assignments and self.runtime.team.size > 1:
            raise InvalidConfig("a single-process plan does not fit several ranks", hint="use row_ranges")
        # Looked up by label: a plan may have as many workers as partitions.
        workers = {worker.label: (worker,) for worker in self.config.partition_workers}
        mine = []
        for assignment in plan.materialized_assignments(store.total_rows):
            if not _lies_in(assignment, first, last):
                continue
            backend = resolve_backend(assignment, workers.get(assignment.worker or "", ()))
            mine.append(Task(assignment, backend, assignment.row_start - first, assignment.row_end - first))
        if sum(len(task.assignment) for task in mine) != store.agent_count:
            raise InvalidConfig(f"a partition of the plan lies across rows {first} and {last} of one rank")
        return tuple(mine)

    def drop(self, kind: StepKind) -> None:
        """Unbind a list of phases; its executor releases threads and processes.

        Raises:
            InvalidConfig: a step is being made.
        """
        self.runtime.refuse_in_step()
        bound = self._bound.pop(kind, None)
        if bound is not None:
            bound.stepper.session.close()

    def drop_all(self) -> None:
        """Unbind every list of phases.

        Raises:
            InvalidConfig: a step is being made.
        """
        for kind in StepKind:
            self.drop(kind)


class _Bound(NamedTuple):
    """A list of phases bound to the state."""

    executor: Executor
    phase_base: int
    stepper: Stepper


def _lies_in(assignment: PartitionAssignment, first: int, last: int) -> bool:
    if assignment.is_empty():
        return first == last == assignment.row_start
    return first <= assignment.row_start and assignment.row_end <= last
