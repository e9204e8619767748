"""From a request for a step to its commit: bind, advance, observe, check, prove, verify, then one swap."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from rustsim_hpc.control.config import ControlPlaneConfig, validate_plan
from rustsim_hpc.control.failures import StepKind, plane_error
from rustsim_hpc.control.runtime import ColumnarRuntime
from rustsim_hpc.control.stepper import StepFailed, Stepper, StepReport
from rustsim_hpc.errors import (
    CheckFailed,
    ColumnarRuntimeError,
    ExecutorError,
    InvalidConfig,
    Runtime,
    RustsimError,
    TornState,
    Worker,
    message_of,
)
from rustsim_hpc.executors.base import PartitionExecutor, ResidentExecutor
from rustsim_hpc.executors.tasks import TaskSession
from rustsim_hpc.executors.work import Task, Work, require_partitions_that_add_up
from rustsim_hpc.modeling.model import Phase
from rustsim_hpc.modeling.program import plan_program
from rustsim_hpc.proof.fingerprint import ReplayFingerprint
from rustsim_hpc.proof.replay import ReplayRecorder
from rustsim_hpc.proof.state_proof import StateProof
from rustsim_hpc.ranks.agreement import agree
from rustsim_hpc.state.columns import DeviceSoaStore
from rustsim_hpc.state.memory import ColumnMemory
from rustsim_hpc.state.partition import PartitionAssignment, PartitionId, resolve_backend

if TYPE_CHECKING:
    from rustsim_hpc.modeling.bound_model import BoundModel

Executor = PartitionExecutor | ResidentExecutor


class Stepping:
    """Steps a runtime's state by any of the three lists of phases, completely or not at all.

    Args:
        runtime: the state and its step index.
        config: guard, plan, workers.
        replay: records or verifies fingerprints.
        proof: makes fingerprints.
    """

    def __init__(
        self, runtime: ColumnarRuntime, config: ControlPlaneConfig, replay: ReplayRecorder, proof: StateProof
    ) -> None:
        self.runtime = runtime
        self.config = config
        self.replay = replay
        self.proof = proof
        self.values: dict[str, Any] = {}
        self.model: BoundModel | None = None
        self.compile_options: dict[str, Any] = {}
        self._bound: dict[StepKind, _Bound] = {}
        self._torn: str | None = None
        self._seen = self._state_now()

    def ready(self, *, to_restore: bool = False) -> None:
        """Check that the plane may be used now, and notice a state that was changed behind its back.

        Raises:
            InvalidConfig: it is in the middle of a step (a phase calls it, or another thread).
            TornState: a step failed half way under the torn guard, and this is not to restore.
        """
        self.runtime.refuse_in_step()
        if self._torn is not None and not to_restore:
            raise TornState(self._torn, hint="restore a checkpoint")
        seen = self._state_now()
        if seen == self._seen:
            return
        if seen[:2] != self._seen[:2]:
            self._let_go()
            self.proof.replace(seen[0])
        else:
            self.proof.forget()
        self._seen = seen

    def _state_now(self) -> tuple[DeviceSoaStore, ColumnMemory, int]:
        store = self.runtime.device_store()
        return store, store.memory, self.runtime.step_index

    # -- one step ------------------------------------------------------------------------------------

    def step(
        self, kind: StepKind, stepper: Stepper, phase_base: int, repeat: int = 1
    ) -> tuple[StepReport, ReplayFingerprint | None]:
        """Make one step, or ``repeat`` steps between which nothing is due: all of them, or none.

        ::

            advance    every phase, on every partition of every rank, beside the current state
            observe    reductions of checks and outputs, of the new state
            check      the model's promises
            prove      the fingerprint of the new state, verified against the expected one
            commit     swap the columns that were written, count the step, record the fingerprint

        Whatever fails before the last line has changed nothing (under the torn guard: the state is torn, and
        only a restore is accepted).

        Raises:
            EngineControlPlaneError: what failed; the same on every rank.
        """
        self.runtime.begin_steps(repeat)  # not a context manager: one costs a tenth of an empty step
        try:
            return self._step(kind, stepper, phase_base, repeat)
        finally:
            self.runtime.in_step.release()

    def _step(
        self, kind: StepKind, stepper: Stepper, phase_base: int, repeat: int
    ) -> tuple[StepReport, ReplayFingerprint | None]:
        before = self.runtime.step_index
        try:
            after = before + repeat
            due = self.replay.is_due(after)
            proved = due and self.proof.scheme == "digest"
            want_digest = proved and not stepper.choose_apart(repeat)
            report = stepper.advance(before, want_digest=want_digest, repeat=repeat)
            if self.model is not None and self.model.looks_at_steps:
                begun = perf_counter_ns()
                self._observe_and_check(self.model, stepper, report, after)
                report.checks_ns = perf_counter_ns() - begun
            if due:
                begun = perf_counter_ns()
                fingerprint, sums = self._prove(stepper, report, after)
                report.proof_ns = perf_counter_ns() - begun
            else:
                fingerprint, sums = None, self.proof.sums_without(stepper.work.program.written)
            if self._seen != self._state_now():
                raise InvalidConfig("a phase replaced the state of the runtime that runs it")
        except BaseException as error:  # noqa: BLE001 (whatever it is, it is raised typed)
            typed = self._typed(kind, error, before, phase_base)
            if not self.config.guard.two_sided:
                self._torn = f"step {before} failed half way: {message_of(typed)}"
                self.proof.forget()
            raise typed from typed.__cause__
        self.runtime.commit(stepper, repeat)
        self.proof.keep(sums)
        if fingerprint is not None:
            self.replay.accept(fingerprint)
        self.values = report.values
        self._seen = (*self._seen[:2], after)
        return report, fingerprint

    def steps_between(self, most: int) -> int:
        """Return how many steps, from one to ``most``, lead to the next state that somebody wants to see."""
        before = self.runtime.step_index
        for count in range(1, most):
            step = before + count
            if self.replay.is_due(step) or (self.model is not None and self.model.looks_at(step)):
                return count
        return max(1, most)

    def _observe_and_check(self, model: BoundModel, stepper: Stepper, report: StepReport, step: int) -> None:
        """Make the due observations, and raise CheckFailed on all ranks if a due check fails on one."""
        if model.observes_at(step):
            stepper.observe(step, report.values, committed=False)
        due = [check for check in model.checks if step % check.every == 0]
        if not due:
            return
        failure: Exception | None = None
        context = model.context(step, report.values)
        for check in due:
            try:
                holds, why = bool(check.fn(context)), "it is false"
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001 (a check is somebody else's code)
                holds, why = False, message_of(error)
            if not holds:
                failure = CheckFailed(check.name, f"{why} after step {step - 1}", step=step - 1)
                break
        agree(self.runtime.team, failure)

    def _prove(
        self, stepper: Stepper, report: StepReport, step: int
    ) -> tuple[ReplayFingerprint, list[int | None]]:
        """Return the new state's fingerprint, verified, and the sums to remember."""
        program = stepper.work.program
        fingerprint, sums = self.proof.of_next(step, program.final_sides, program.written, report.digests)
        self.replay.check(fingerprint, self.proof.named(sums))
        return fingerprint, sums

    def _typed(self, kind: StepKind, error: BaseException, step: int, phase_base: int) -> BaseException:
        if isinstance(error, StepFailed):
            return self._with_workers(plane_error(kind, error, step, phase_base))
        if isinstance(error, ColumnarRuntimeError):
            return Runtime(error)
        return error.add_facts(step=step) if isinstance(error, RustsimError) else error

    def _with_workers(self, error: RustsimError) -> RustsimError:
        """Tell failures of partitions, as many as there are, which worker ran them."""
        workers = {one.partition_id: one.worker for one in self.config.partition_plan.assignments}
        for failure in (error, *error.others):
            if isinstance(failure, RustsimError) and isinstance(failure.partition, PartitionId):
                failure.add_facts(worker=workers.get(failure.partition))
        return error

    # -- binding -------------------------------------------------------------------------------------

    def stepper(
        self, kind: StepKind, executor: Executor, phases: Sequence[Phase], phase_base: int
    ) -> Stepper:
        """Return the stepper of a list of phases, bound to an executor and the state as it lies now.

        The caller has asked :meth:`ready`.

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
        except Exception as error:  # noqa: BLE001 (told to all ranks)
            failure = error
        try:
            agree(self.runtime.team, failure)  # a rank that cannot start must not be waited for
        except BaseException:
            if stepper is not None:
                stepper.session.close()
            raise
        if stepper is None:
            raise AssertionError("agreed on success without a stepper")
        self._bound[kind] = _Bound(executor, phase_base, stepper)
        return stepper

    def _share_state(self) -> None:
        """Move the state to where worker processes can map it, once; what is bound to the old place goes."""
        if self.runtime.device_store().memory.kind != "shared":
            for kind in StepKind:
                self.drop(kind)
            self.runtime.share_store()
            self._seen = self._state_now()
            self.proof.replace(self._seen[0])

    def _session(self, work: Work, executor: Executor, phase_base: int) -> Any:
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
        """Return this rank's partitions: a contiguous run of the plan's.

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

    def take_back(self) -> None:
        """Let nobody else keep the state, which is to be changed; in the middle of a step it stays."""
        if not self.runtime.in_step.locked():
            self.runtime.device_store().memory.take_back()

    def bound(self, kind: StepKind) -> Stepper | None:
        """Return the stepper that is bound now, if any."""
        bound = self._bound.get(kind)
        return None if bound is None else bound.stepper

    def drop(self, kind: StepKind) -> None:
        """Unbind a list of phases; its executor lets go of threads and processes.

        Raises:
            InvalidConfig: a step is being made.
        """
        self.runtime.refuse_in_step()
        bound = self._bound.pop(kind, None)
        if bound is not None:
            bound.stepper.session.close()

    def replace(self, store: DeviceSoaStore, step_index: int) -> None:
        """Replace the state; everything bound to the old one is let go."""
        self.runtime.device_store().memory.keeper = None  # of the old one nothing has to come back
        self._let_go()
        self.runtime.restore_device_store(store, step_index)
        self._seen = self._state_now()
        self.proof.replace(store)
        self.replay.restored(step_index)
        self._torn = None

    def _let_go(self) -> None:
        for kind in StepKind:
            self.drop(kind)
        self.values = {}


class _Bound(NamedTuple):
    """A list of phases bound to the state."""

    executor: Executor
    phase_base: int
    stepper: Stepper


def _lies_in(assignment: PartitionAssignment, first: int, last: int) -> bool:
    if assignment.is_empty():
        return first == last == assignment.row_start
    return first <= assignment.row_start and assignment.row_end <= last
