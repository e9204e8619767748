"""The control plane around a columnar runtime: replay, checkpoints, metrics, partitions, typed failures.

It runs identically on every rank and communicates with other ranks only through the team.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

from rustsim_hpc.control.checkpoint import EngineCheckpoint, PartitionCheckpoint
from rustsim_hpc.control.checkpointing import Checkpointing
from rustsim_hpc.control.config import ControlPlaneConfig, validate_config
from rustsim_hpc.control.failures import StepKind, plane_error
from rustsim_hpc.control.metrics import EngineMetrics, Meter
from rustsim_hpc.control.repeating import collected, repeated
from rustsim_hpc.control.reports import ControlledStep, PartitionedStep, PhaseReports, StepSpent
from rustsim_hpc.control.runtime import ColumnarRuntime, closure_phase
from rustsim_hpc.control.stepper import Stepper, StepReport
from rustsim_hpc.control.stepping import Stepping
from rustsim_hpc.errors import InvalidConfig
from rustsim_hpc.executors.base import Executor
from rustsim_hpc.executors.inline import InlinePartitionExecutor
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model import ColumnPhase, Phase
from rustsim_hpc.proof.fingerprint import ReplayFingerprint
from rustsim_hpc.proof.replay import ReplayRecorder
from rustsim_hpc.proof.state_proof import StateProof
from rustsim_hpc.ranks.meeting import StepFailed
from rustsim_hpc.state.partition import PartitionPlan

_INLINE = InlinePartitionExecutor()
_NO_PHASES = "add phases for this kind of step; docs/python.md has a table of the kinds"


class EngineControlPlane:
    """Steps a :class:`~rustsim_hpc.control.runtime.ColumnarRuntime` completely or not at all.

    It adds replay, checkpoints, partitions and metrics.

    Args:
        runtime: the engine; :meth:`step` runs its phases.
        config: how to run; the defaults if None.

    Raises:
        EngineControlPlaneError: the configuration is invalid (``InvalidConfig``, ``PlanError``,
            ``MissingPartitionWorker``).
    """

    def __init__(self, runtime: ColumnarRuntime, config: ControlPlaneConfig | None = None) -> None:
        if not isinstance(runtime, ColumnarRuntime):
            raise InvalidConfig(f"a control plane needs a ColumnarRuntime, got {type(runtime).__name__}")
        self._runtime = runtime
        self._config = ControlPlaneConfig() if config is None else config
        self._team = runtime.team
        validate_config(self._config, runtime.device_store().total_rows)
        self._partition_phases: list[ColumnPhase] = []
        self._executor_phases: list[Phase] = []
        self._meter = Meter()
        self._replay = ReplayRecorder(self._config.replay_mode, self._config.fingerprint, runtime.step_index)
        self._proof = StateProof(runtime.device_store(), self._team, self._config.fingerprint)
        self._stepping = Stepping(runtime, self._config, self._replay, self._proof)
        self._bindings = self._stepping.bindings
        self._checkpoints = Checkpointing(self._stepping, self._meter)

    @classmethod
    def new(cls, runtime: ColumnarRuntime) -> EngineControlPlane:
        """Build a plane with the default configuration."""
        return cls(runtime)

    @classmethod
    def with_config(cls, runtime: ColumnarRuntime, config: ControlPlaneConfig) -> EngineControlPlane:
        """Build a plane with a configuration (see the class)."""
        return cls(runtime, config)

    # -- what it holds -------------------------------------------------------------------------------

    @property
    def runtime(self) -> ColumnarRuntime:
        """The wrapped runtime."""
        return self._runtime

    def runtime_mut(self) -> ColumnarRuntime:
        """Return the wrapped runtime for modification; remembered sums of its state are dropped."""
        self._runtime.take_back()
        self._proof.forget()
        return self._runtime

    @property
    def config(self) -> ControlPlaneConfig:
        """The active configuration."""
        return self._config

    @property
    def partition_plan(self) -> PartitionPlan:
        """The active partition plan."""
        return self._config.partition_plan

    @property
    def partition_phase_count(self) -> int:
        """Number of partition phases, those for executors included."""
        return len(self._partition_phases) + len(self._executor_phases)

    def metrics(self) -> EngineMetrics:
        """Return a snapshot of the cumulative metrics."""
        store = self._runtime.device_store()
        self._meter.refresh(
            current_step=self._runtime.step_index,
            agent_count=store.total_rows,
            resident_bytes=store.resident_bytes,
            partition_count=self._config.partition_plan.partition_count,
            phases=(self._runtime.phase_count, len(self._partition_phases), len(self._executor_phases)),
        )
        return self._meter.snapshot()

    def checkpoints(self) -> tuple[EngineCheckpoint, ...]:
        """Return the retained checkpoints, oldest first."""
        return tuple(self._checkpoints.retained)

    def latest_checkpoint(self) -> EngineCheckpoint | None:
        """Return the newest retained checkpoint, or None."""
        return self._checkpoints.retained[-1] if self._checkpoints.retained else None

    def recorded_replay(self) -> tuple[ReplayFingerprint, ...]:
        """Return the fingerprints recorded (or verified) so far, in step order."""
        return self._replay.recorded

    # -- phases --------------------------------------------------------------------------------------

    def add_partition_cpu_phase(self, name: str, function: Any) -> None:
        """Add a phase ``fn(context, columns, rows)`` that :meth:`step_partitions` runs on each partition."""
        self._bindings.drop(StepKind.PARTITION)
        self._partition_phases.append(closure_phase(name, function))

    def add_partition_executor_phase(self, name: str, function: Any) -> None:
        """Add a phase for :meth:`step_partitions_with_executor`; it may run on several threads at once."""
        self._bindings.drop(StepKind.EXECUTOR)
        self._executor_phases.append(closure_phase(name, function))

    def add_model(self, model: BoundModel, *, checked: bool = False, tile_rows: int = 0) -> None:
        """Make a bound model's phases the executor phases; its checks run after the steps where they are due.

        Args:
            model: the model; the runtime's store must have its columns.
            checked: compile with bounds checks, and reject the conversion of NaN to an integer.
            tile_rows: rows of a tile (a power of two of at least 4096), 0 to size it from the cache.

        Raises:
            InvalidConfig: there are executor phases already, or the state's columns are not the model's.
        """
        self._bindings.drop(StepKind.EXECUTOR)
        if self._executor_phases:
            raise InvalidConfig("a model's phases cannot be added to other executor phases")
        if model.schema != self._runtime.schema:
            raise InvalidConfig("the runtime's store does not have the model's columns")
        self._executor_phases = list(model.phases)
        self._bindings.model = model
        self._bindings.compile_options = {"checked": checked, "tile_rows": tile_rows}

    def stepper(self, executor: Executor) -> Stepper:
        """Return the stepper of the executor phases, bound to an executor and the current state's memory."""
        self._stepping.ready()
        base = self._phase_base(StepKind.EXECUTOR)
        return self._bindings.stepper(StepKind.EXECUTOR, executor, self._executor_phases, base)

    def fingerprint(self) -> ReplayFingerprint:
        """Return the fingerprint of the current state under the configured scheme."""
        self._stepping.ready(to_restore=True)
        return self._proof.of_current(self._runtime.step_index)

    def known_fingerprint(self) -> ReplayFingerprint | None:
        """Return the fingerprint of the current state if no column must be read, as after a recorded step.

        None on every rank otherwise, and always under "fnv1a".
        """
        self._stepping.ready()
        return self._proof.known(self._runtime.step_index)

    def column_values(self) -> Mapping[str, int]:
        """Return the digest of each column ("ids" for the ids) as last computed; empty under "fnv1a"."""
        return self._proof.column_values()

    def count_checkpoint(self) -> int:
        """Count a checkpoint written to a file, and return its sequence number."""
        return self._meter.checkpoint_created()

    def forget_recorded(self) -> None:
        """Drop the recorded fingerprints from memory, once they are in a log; verification continues."""
        self._replay.forget()

    @property
    def values(self) -> Mapping[str, Any]:
        """Results of reductions and derived values of the last step, by name."""
        return self._stepping.values

    def observe(self, executor: Executor) -> None:
        """Compute the reductions of checks and outputs due at the current step, into :attr:`values`.

        Raises:
            EngineControlPlaneError: a reduction or a worker failed; the same on every rank.
        """
        values, step = dict(self._stepping.values), self._runtime.step_index
        stepper = self.stepper(executor)
        try:
            stepper.observe(step, values, committed=True)
        except StepFailed as failed:
            base = self._phase_base(StepKind.EXECUTOR)
            raise plane_error(StepKind.EXECUTOR, failed, step, base) from None
        self._stepping.values = values

    # -- stepping ------------------------------------------------------------------------------------

    def step(self) -> ControlledStep:
        """Run the runtime phases once over all rows, completely or not at all.

        Raises:
            EngineControlPlaneError: a phase failed, a fingerprint did not verify, or an earlier automatic
                checkpoint could not be made.
        """
        self._begin()
        start = time.perf_counter_ns()
        stepper = self._runtime.stepper(two_sided=self._config.guard.two_sided)
        report, fingerprint = self._stepping.step(StepKind.RUNTIME, stepper, 0)
        timing = self._runtime.timing(stepper, report, start)
        self._count(StepKind.RUNTIME, stepper, report, timing.total_us, captured=fingerprint is not None)
        return ControlledStep(timing, fingerprint, self._checkpoints.make_if_due())

    def step_partitions(self) -> PartitionedStep:
        """Run the partition phases on each partition, one after the other in this thread.

        Raises:
            EngineControlPlaneError: as :meth:`step`; also when there are no partition phases.
        """
        if not self._partition_phases:
            raise InvalidConfig("at least one partition phase must be registered", hint=_NO_PHASES)
        return self._step_partitioned(StepKind.PARTITION, self._partition_phases, _INLINE)

    def step_partitions_with_executor(self, executor: Executor) -> PartitionedStep:
        """Run the executor phases on each partition through an executor.

        A resident executor (all of this package) works on the columns in place; any other gets tasks whose
        payloads are copies, and its results are checked against the request.

        Raises:
            EngineControlPlaneError: as :meth:`step`; also when there are no executor phases.
        """
        if not self._executor_phases:
            raise InvalidConfig("at least one executor partition phase must be registered", hint=_NO_PHASES)
        return self._step_partitioned(StepKind.EXECUTOR, self._executor_phases, executor)

    def step_fused(self, executor: Executor, steps: int) -> PartitionedStep:
        """Make up to ``steps`` steps as one: all of them on each tile of rows before the next tile.

        The steps end at the first one after which something is due (a fingerprint, a check, an observation,
        a checkpoint); a model with phases other than row kernels makes one step. Results are bit-identical to
        single steps. A failure undoes all of the steps; the error names the first of them.
        ``runtime.step_index`` tells how many were made; reports and times are sums over the steps.

        Raises:
            EngineControlPlaneError: as :meth:`step`.
        """
        if not self._executor_phases:
            raise InvalidConfig("at least one executor partition phase must be registered", hint=_NO_PHASES)
        repeatable = self.stepper(executor).work.program.repeatable
        count = self._stepping.steps_between(steps) if repeatable else 1
        policy, before = self._config.checkpoint_policy, self._runtime.step_index
        count = next((k for k in range(1, count) if policy.is_due(before + k)), count)
        return self._step_partitioned(StepKind.EXECUTOR, self._executor_phases, executor, count)

    def run(self, steps: int) -> list[ControlledStep]:
        """Make ``steps`` steps; an error carries the results of those before it as ``results``."""
        return collected(steps, self.step)

    def run_partitions(self, steps: int) -> list[PartitionedStep]:
        """Make ``steps`` partition steps (see :meth:`run`)."""
        return collected(steps, self.step_partitions)

    def run_partitions_with_executor(self, steps: int, executor: Executor) -> list[PartitionedStep]:
        """Make ``steps`` partition steps through an executor (see :meth:`run`)."""
        return collected(steps, partial(self.step_partitions_with_executor, executor))

    def iter_steps(self, steps: int) -> Iterator[ControlledStep]:
        """Make ``steps`` steps, yielding each result and keeping none."""
        return repeated(steps, self.step)

    def iter_partition_steps(self, steps: int, executor: Executor | None = None) -> Iterator[PartitionedStep]:
        """Make ``steps`` partition steps, yielding each result and keeping none."""
        if executor is None:
            return repeated(steps, self.step_partitions)
        return repeated(steps, partial(self.step_partitions_with_executor, executor))

    # -- checkpoints ---------------------------------------------------------------------------------

    def checkpoint(self, label: str | None = None) -> EngineCheckpoint:
        """Copy the whole state (under a team: this rank's rows) with its fingerprint, and retain the copy.

        The fingerprint is computed before this returns; checkpoint files are proved while steps continue.

        Raises:
            CheckpointWriteFailed: no memory for the copy on some rank; raised on all ranks.
            TornState: the state is torn.
        """
        return self._checkpoints.make(label)

    def restore(self, checkpoint: EngineCheckpoint) -> None:
        """Replace the state by a checkpoint's, after verifying its fingerprint; phases and counters stay.

        Raises:
            RestoreError: the fingerprint or the schema does not match; nothing has changed.
            PlanError: its population does not fit the partition plan; nothing has changed.
        """
        self._checkpoints.restore(checkpoint)

    def partition_checkpoints(self) -> list[PartitionCheckpoint]:
        """Return a copy of each of this rank's partitions, each with the fingerprint of its rows.

        Raises:
            PlanError: the plan does not fit the population.
            TornState: the state is torn.
        """
        return self._checkpoints.of_partitions()

    def restore_partitions(self, partitions: Sequence[PartitionCheckpoint]) -> None:
        """Replace the state by assembled partition checkpoints, after verifying their fingerprints.

        Under a team each rank passes its own partitions.

        Raises:
            PartitionCheckpointError: they do not fit each other or the plan; nothing has changed.
            RestoreError: they are of another schema; nothing has changed.
            PlanError: their population does not fit the plan; nothing has changed.
        """
        self._checkpoints.restore_partitions(partitions)

    # -- inside --------------------------------------------------------------------------------------

    def _step_partitioned(
        self, kind: StepKind, phases: Sequence[Phase], executor: Executor, repeat: int = 1
    ) -> PartitionedStep:
        self._begin()
        start = time.perf_counter_ns()
        base = self._phase_base(kind)
        stepper = self._bindings.stepper(kind, executor, phases, base)
        before = self._runtime.step_index
        report, fingerprint = self._stepping.step(kind, stepper, base, repeat)
        total_us = (time.perf_counter_ns() - start) // 1000
        self._count(kind, stepper, report, total_us, repeat, captured=fingerprint is not None)
        work = stepper.work
        reports = PhaseReports(work.tasks, work.program.model_phases, base, report.times)
        checkpoint = self._checkpoints.make_if_due()
        spent = StepSpent(report.executor_ns, report.meeting_ns, report.checks_ns, report.proof_ns)
        return PartitionedStep(before, work.total_rows, reports, fingerprint, checkpoint, total_us, spent)

    def _phase_base(self, kind: StepKind) -> int:
        bases = (0, self._runtime.phase_count, self._runtime.phase_count + len(self._partition_phases))
        return bases[kind]

    def _count(
        self,
        kind: StepKind,
        stepper: Stepper,
        report: StepReport,
        total_us: int,
        steps: int = 1,
        *,
        captured: bool,
    ) -> None:
        """Count a committed step (or several made as one), each phase once per partition."""
        work = stepper.work
        rows = work.memory.rows
        names = work.program.model_phases
        self._meter.step_completed(total_us, kind, names, report.times, rows=rows, steps=steps)
        if captured:
            self._meter.fingerprint_captured()

    def _begin(self) -> None:
        """Check that a step may be made, and raise the failure of the last automatic checkpoint, if any."""
        self._stepping.ready()
        self._checkpoints.raise_late()

    def close(self) -> None:
        """Release what executors hold (threads, processes); the plane stays usable."""
        self._bindings.drop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
