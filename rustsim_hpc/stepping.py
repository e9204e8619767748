"""From a request for a step to its commit: bind, advance, observe, check, prove, verify, and then one swap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rustsim_hpc.agreement import agree
from rustsim_hpc.config import ControlPlaneConfig
from rustsim_hpc.errors import CheckFailed, ColumnarRuntimeError, InvalidConfig, Runtime, RustsimError, TornState
from rustsim_hpc.executors.base import PartitionExecutor, ResidentExecutor
from rustsim_hpc.executors.tasks import TaskSession
from rustsim_hpc.failures import StepKind, plane_error
from rustsim_hpc.fingerprint import ReplayFingerprint
from rustsim_hpc.model import Phase
from rustsim_hpc.partition import PartitionAssignment, resolve_backend
from rustsim_hpc.program import plan_program
from rustsim_hpc.replay import ReplayRecorder
from rustsim_hpc.runtime import ColumnarRuntime
from rustsim_hpc.state_proof import StateProof
from rustsim_hpc.stepper import StepFailed, Stepper, StepReport
from rustsim_hpc.work import Task, Work

if TYPE_CHECKING:
    from rustsim_hpc.bound_model import BoundModel

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
        self._bound: dict[StepKind, tuple[Executor, Stepper]] = {}
        self._torn: str | None = None

    # -- one step ------------------------------------------------------------------------------------

    def step(self, kind: StepKind, stepper: Stepper, phase_base: int) -> tuple[StepReport, ReplayFingerprint | None]:
        """Make one step.

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
        if self._torn is not None:
            raise TornState(self._torn, hint="restore a checkpoint")
        before = self.runtime.step_index
        try:
            due = self.replay.is_due(before + 1)
            report = stepper.advance(before, want_digest=due and self.proof.scheme == "digest")
            self._observe_and_check(stepper, report, before + 1)
            fingerprint, sums = self._prove(stepper, report, before + 1, due=due)
        except BaseException as error:
            if not self.config.guard.two_sided:
                self._torn = f"step {before} failed half way: {error}"
                self.proof.forget()
            raise self._typed(kind, error, before, phase_base) from _cause(error)
        self.runtime.commit(stepper)
        self.proof.keep(sums)
        if fingerprint is not None:
            self.replay.accept(fingerprint)
        self.values = report.values
        return report, fingerprint

    def _observe_and_check(self, stepper: Stepper, report: StepReport, step: int) -> None:
        """Make the due observations, and raise CheckFailed on all ranks if a due check fails on one."""
        model = self.model
        if model is None:
            return
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
            except Exception as error:
                holds, why = False, str(error) or type(error).__name__
            if not holds:
                failure = CheckFailed(check.name, f"{why} after step {step - 1}", step=step - 1)
                break
        agree(self.runtime.team, failure)

    def _prove(
        self, stepper: Stepper, report: StepReport, step: int, *, due: bool
    ) -> tuple[ReplayFingerprint | None, list[int | None]]:
        """Return the new state's fingerprint, verified, if one is due; and the sums to remember."""
        program = stepper.work.program
        if not due:
            return None, self.proof.sums_without(program.written)
        fingerprint, sums = self.proof.of_next(step, program.final_sides, program.written, report.digests)
        self.replay.check(fingerprint, self.proof.named(sums))
        return fingerprint, sums

    def _typed(self, kind: StepKind, error: BaseException, step: int, phase_base: int) -> BaseException:
        if isinstance(error, StepFailed):
            return plane_error(kind, error, step, phase_base)
        if isinstance(error, ColumnarRuntimeError):
            return Runtime(error)
        return error.add_facts(step=step) if isinstance(error, RustsimError) else error

    # -- binding -------------------------------------------------------------------------------------

    def stepper(self, kind: StepKind, executor: Executor, phases: Sequence[Phase], phase_base: int) -> Stepper:
        """Return the stepper of a list of phases, bound to an executor and the state as it lies now."""
        bound = self._bound.get(kind)
        if bound is not None and bound[0] == executor:
            return bound[1]
        self.drop(kind)
        work = self._work(kind, phases)
        if isinstance(executor, ResidentExecutor):
            session: Any = executor.attach(work)
        elif isinstance(executor, PartitionExecutor):
            session = TaskSession(work, executor, phase_base, self.config.fingerprint)
        else:
            raise InvalidConfig(f"{executor!r} is not a partition executor: it has no execute(tasks)")
        stepper = Stepper(work, session, self.runtime.team)
        self._bound[kind] = (executor, stepper)
        return stepper

    def _work(self, kind: StepKind, phases: Sequence[Phase]) -> Work:
        store, model = self.runtime.device_store(), self.model if kind is StepKind.EXECUTOR else None
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
            tasks=self._tasks(),
            **self.compile_options,
        )
        if model is not None:
            model.bind_work(work)
        return work

    def _tasks(self) -> tuple[Task, ...]:
        """Return this rank's partitions: a contiguous run of the plan's.

        Raises:
            InvalidConfig: a partition lies on two ranks.
        """
        store, plan = self.runtime.device_store(), self.config.partition_plan
        first, last = store.row_offset, store.row_offset + store.agent_count
        if plan.partition_count == 1 and not plan.assignments and self.runtime.team.size > 1:
            raise InvalidConfig("a single-process plan does not fit several ranks", hint="use row_ranges")
        mine = []
        for assignment in plan.materialized_assignments(store.total_rows):
            if not _lies_in(assignment, first, last):
                continue
            backend = resolve_backend(assignment, self.config.partition_workers)
            mine.append(Task(assignment, backend, assignment.row_start - first, assignment.row_end - first))
        if sum(len(task.assignment) for task in mine) != store.agent_count:
            raise InvalidConfig(f"a partition of the plan lies across rows {first} and {last} of one rank")
        return tuple(mine)

    def bound(self, kind: StepKind) -> Stepper | None:
        """Return the stepper that is bound now, if any."""
        bound = self._bound.get(kind)
        return None if bound is None else bound[1]

    def drop(self, kind: StepKind) -> None:
        """Unbind a list of phases; its executor lets go of threads and processes."""
        bound = self._bound.pop(kind, None)
        if bound is not None:
            bound[1].session.close()

    def replace(self, store: Any, step_index: int) -> None:
        """Replace the state; everything bound to the old one is let go."""
        for kind in StepKind:
            self.drop(kind)
        self.runtime.restore_device_store(store, step_index)
        self.proof.replace(store)
        self.replay.restored(step_index)
        self._torn = None


def _lies_in(assignment: PartitionAssignment, first: int, last: int) -> bool:
    if assignment.is_empty():
        return first == last == assignment.row_start
    return first <= assignment.row_start and assignment.row_end <= last


def _cause(error: BaseException) -> BaseException | None:
    return None if isinstance(error, StepFailed) else error.__cause__
