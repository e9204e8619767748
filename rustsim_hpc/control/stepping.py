"""One step from request to commit: advance, observe, check, prove, verify, then one swap."""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from rustsim_hpc.control.binding import Bindings
from rustsim_hpc.control.config import ControlPlaneConfig
from rustsim_hpc.control.failures import StepKind, plane_error
from rustsim_hpc.control.runtime import ColumnarRuntime
from rustsim_hpc.control.stepper import Stepper, StepReport
from rustsim_hpc.errors import (
    CheckFailed,
    ColumnarRuntimeError,
    InvalidConfig,
    Runtime,
    RustsimError,
    TornState,
    message_of,
)
from rustsim_hpc.modeling.signatures import raised_at
from rustsim_hpc.proof.fingerprint import ReplayFingerprint
from rustsim_hpc.proof.replay import ReplayRecorder
from rustsim_hpc.proof.state_proof import StateProof
from rustsim_hpc.ranks.agreement import agree
from rustsim_hpc.ranks.meeting import StepFailed
from rustsim_hpc.state.columns import DeviceSoaStore
from rustsim_hpc.state.partition import PartitionId

if TYPE_CHECKING:
    from rustsim_hpc.modeling.bound_model import BoundModel, ModelContext
    from rustsim_hpc.modeling.model import Check


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
        self.bindings = Bindings(runtime, config, proof)
        self.values: dict[str, Any] = {}
        self._torn: str | None = None

    def ready(self, *, to_restore: bool = False) -> None:
        """Check that the plane may be used now, and detect a state that was changed outside the plane.

        Raises:
            InvalidConfig: a step is being made (called from a phase, or from another thread).
            TornState: a step failed half way under the torn guard, and ``to_restore`` is false.
        """
        self.runtime.refuse_in_step()
        if self._torn is not None and not to_restore:
            raise TornState(self._torn, hint="restore a checkpoint")
        if self.bindings.follow():
            self.values = {}

    def replace(self, store: DeviceSoaStore, step_index: int) -> None:
        """Replace the state by a complete one, as after a restore."""
        self.bindings.replace(store, step_index)
        self.replay.restored(step_index)
        self.values = {}
        self._torn = None

    # -- one step ------------------------------------------------------------------------------------

    def step(
        self, kind: StepKind, stepper: Stepper, phase_base: int, repeat: int = 1
    ) -> tuple[StepReport, ReplayFingerprint | None]:
        """Make one step, or ``repeat`` steps between which nothing is due: all of them, or none.

        ::

            advance    every phase, on every partition of every rank, beside the current state
            observe    reductions of the checks and outputs that are due, of the new state
            check      the model's checks
            prove      the fingerprint of the new state, verified against the expected one
            commit     swap the columns that were written, count the step, record the fingerprint

        A failure before the commit has changed nothing (under the torn guard: the state is torn, and only a
        restore is accepted).

        Raises:
            EngineControlPlaneError: a part of the step failed; the same on every rank.
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
        model = self.bindings.model
        try:
            after = before + repeat
            due = self.replay.is_due(after)
            proved = due and self.proof.scheme == "digest"
            want_digest = proved and not stepper.choose_apart(repeat)
            report = stepper.advance(before, want_digest=want_digest, repeat=repeat)
            if model is not None and model.looks_at_steps:
                begun = perf_counter_ns()
                self._observe_and_check(model, stepper, report, after)
                report.checks_ns = perf_counter_ns() - begun
            if due:
                begun = perf_counter_ns()
                fingerprint, sums = self._prove(stepper, report, after)
                report.proof_ns = perf_counter_ns() - begun
            else:
                fingerprint, sums = None, self.proof.sums_without(stepper.work.program.written)
            if not self.bindings.up_to_date():
                raise InvalidConfig("a phase replaced the state of the runtime that runs it")
        except BaseException as error:  # noqa: BLE001 (any error is raised typed)
            typed = self._typed(kind, error, before, phase_base)
            if not self.config.guard.two_sided:
                self._torn = f"step {before} failed half way: {message_of(typed)}"
                self.proof.forget()
            raise typed from typed.__cause__
        self.runtime.commit(stepper, repeat)
        self.bindings.committed(after)
        self.proof.keep(sums)
        if fingerprint is not None:
            self.replay.accept(fingerprint)
        self.values = report.values
        return report, fingerprint

    def steps_between(self, most: int) -> int:
        """Return the number of steps, 1 to ``most``, to the next state to be proved, checked or observed."""
        before, model = self.runtime.step_index, self.bindings.model
        for count in range(1, most):
            step = before + count
            if self.replay.is_due(step) or (model is not None and model.looks_at(step)):
                return count
        return max(1, most)

    def _observe_and_check(self, model: BoundModel, stepper: Stepper, report: StepReport, step: int) -> None:
        """Make the observations that are due; raise CheckFailed on all ranks if a due check fails on one."""
        stepper.observe(step, report.values, committed=False)
        due = [check for check in model.checks if step % check.every == 0]
        if not due:
            return
        failure: Exception | None = None
        context = model.context(step, report.values)
        for check in due:
            try:
                holds, why, at = bool(check.fn(context)), "it is false", None
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001 (a check is user code)
                holds, why, at = False, message_of(error), raised_at(error, check.fn)
            if not holds:
                hint = at or _values_of(check, context)
                failure = CheckFailed(check.name, f"{why} after step {step - 1}", step=step - 1, hint=hint)
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
        """Add to each failure of a partition the label of its worker."""
        workers = {one.partition_id: one.worker for one in self.config.partition_plan.assignments}
        for failure in (error, *error.others):
            if isinstance(failure, RustsimError) and isinstance(failure.partition, PartitionId):
                failure.add_facts(worker=workers.get(failure.partition))
        return error


def _values_of(check: Check, context: ModelContext) -> str | None:
    """Return the reductions that a check declares, with their values, as a line of text."""
    values = {
        reduction.name: np.asarray(context.reductions[reduction.name]) for reduction in check.reductions
    }
    shown = (f"{name} = {np.array2string(value, threshold=12)}" for name, value in values.items())
    return "; ".join(shown).replace("\n", "") or None
