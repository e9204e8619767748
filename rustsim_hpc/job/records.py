"""What a job records during its steps: replay log, outputs, metrics. Only rank 0 writes files."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from rustsim_hpc.control.control_plane import EngineControlPlane
from rustsim_hpc.control.profiling import RunProfile
from rustsim_hpc.executors.base import Executor, ResidentSession
from rustsim_hpc.job.keys import JobSpec
from rustsim_hpc.job.prepared import Prepared
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model import ColumnPhase
from rustsim_hpc.modeling.outputs import Sample
from rustsim_hpc.proof.fingerprint import ReplayFingerprint
from rustsim_hpc.proof.replay_log import ReplayHeader
from rustsim_hpc.proof.replay_writer import ReplayLogWriter
from rustsim_hpc.ranks.agreement import agree, on_all
from rustsim_hpc.run_folder.environment import by_endpoint, differences, machines_of
from rustsim_hpc.run_folder.folder import RunFolder
from rustsim_hpc.run_folder.metrics_log import MetricsLog
from rustsim_hpc.run_folder.output_set import OutputSet

_METRICS_SECONDS = 10.0
_LAST = 10


class JobRecords:
    """The records of one session of a job. A failure on rank 0 is raised on all ranks.

    Args:
        prepared: the job.
        plane: the plane that is stepped.
        folder: the run's folder, held.
        resumed_from: the restored step, or None.

    Attributes:
        outputs: the model's outputs.
        fingerprints: (step, value) of the last ten fingerprints.
        trouble: a failure of rank 0 that the other ranks do not know of yet.
        log_ns: nanoseconds that the last step's entry in the replay log took.
    """

    def __init__(
        self,
        prepared: Prepared,
        plane: EngineControlPlane,
        folder: RunFolder,
        resumed_from: int | None,
    ) -> None:
        self._spec, self._model, self._team = prepared.spec, prepared.model, prepared.team
        self.outputs = OutputSet(self._model.outputs, folder.path, self._model.agents)
        self.fingerprints: list[tuple[int, int]] = []
        self.trouble: Exception | None = None
        self.log_ns = 0
        self._plane, self._folder, self._resumed_from = plane, folder, resumed_from
        self._first = self._team.rank == 0
        self._log: ReplayLogWriter | None = None
        self._metrics: MetricsLog | None = None
        self._last_metrics_time = time.monotonic()

    # -- on rank 0 -----------------------------------------------------------------------------------

    def open(self) -> None:
        """Create all files, or continue them from the restored step.

        Raises:
            OutputError: a file cannot be written, or is not what the run was started with.
            ReplayLogError: the log to continue cannot be read.
        """
        self.outputs.open(self._resumed_from, self._plane.runtime.step_index)
        self._metrics = MetricsLog(self._folder.path, self._resumed_from)
        if self._spec.replay.mode == "record":
            self._log = ReplayLogWriter(
                self._folder.replay_log,
                replay_header(self._spec, self._model, self._plane),
                resume_step=self._resumed_from,
            )

    def flush(self) -> None:
        """Make outputs and log durable: a checkpoint that is published must not be ahead of them.

        Raises:
            OutputError: the disk failed.
        """
        self.outputs.flush()
        if self._log is not None:
            self._log.sync()

    def close(self, profile: RunProfile | None = None) -> None:
        """Make everything durable and close it; the last line of the metrics has the profile, if any.

        Raises:
            OutputError: the disk failed.
        """
        self.outputs.close()
        if self._metrics is not None:
            more = {} if profile is None else {"profile": profile.to_dict()}
            self._metrics.append(self._plane.metrics(), **more)
            self._metrics.close()
        if self._log is not None:
            self._log.sync()
            self._log.close()

    # -- on all ranks --------------------------------------------------------------------------------

    def first_state(self, executor: Executor) -> None:
        """Write the outputs of the state that the run begins with, unless they are there. Collective.

        Raises:
            RustsimError: an output or one of its reductions failed; the same on every rank.
        """
        step = self._plane.runtime.step_index
        due = self._team.bcast(bool(self.outputs.due(step)) if self._first else None)
        if due:
            self._plane.observe(executor)
            self._write_outputs(step, None)

    def note_workers(self, session: ResidentSession) -> list[str]:
        """Write what is known about the remote workers' machines to the run's record. Collective.

        Returns:
            How they differ from the previous session's machines, on rank 0.

        Raises:
            OutputError: the record cannot be written; the same on every rank.
        """
        known = getattr(session, "machines", None)
        if known is None:
            return []
        found = self._team.gather(known)

        def write() -> list[str]:
            if found is None:
                return []
            workers = by_endpoint(found)
            self._folder.update(remote_workers=workers, session={"remote_workers": workers})
            last = self._folder.record["sessions"][-2:]
            return differences(*map(machines_of, last)) if len(last) > 1 else []

        return on_all(self._team, write)

    def after_step(self, fingerprint: ReplayFingerprint | None) -> None:
        """Append a step's fingerprint to the log and its due values to the outputs. Collective.

        Raises:
            RustsimError: rank 0 could not; the same on every rank.
        """
        step = self._plane.runtime.step_index
        failure: Exception | None = None
        self.log_ns = 0
        if fingerprint is not None:
            self.fingerprints = [*self.fingerprints[1 - _LAST :], (fingerprint.step_index, fingerprint.value)]
            self._plane.forget_recorded()
        if self._first and self._log is not None and fingerprint is not None:
            begun = time.perf_counter_ns()
            try:
                self._log.append(fingerprint, self._plane.column_values())
            except Exception as error:  # noqa: BLE001 (raised on all ranks below)
                failure = error
            self.log_ns = time.perf_counter_ns() - begun
        if any(step % getattr(output, "every", step + 1) == 0 for output in self.outputs.declarations):
            self._write_outputs(step, failure)
        elif failure is not None or self._log_can_fail(fingerprint):
            agree(self._team, failure)
        self._write_metrics()

    def _log_can_fail(self, fingerprint: ReplayFingerprint | None) -> bool:
        return fingerprint is not None and self._spec.replay.mode == "record" and self._team.size > 1

    def _write_outputs(self, step: int, failure: Exception | None) -> None:
        samples = self._samples(step)
        if self._first and failure is None:
            try:
                context = self._model.context(step, self._plane.values)
                self.outputs.record(step, context.time, context, samples)
            except Exception as error:  # noqa: BLE001 (raised on all ranks below)
                failure = error
        agree(self._team, failure)

    def _samples(self, step: int) -> dict[str, dict[str, Any]]:
        """Gather the sampled rows of all ranks on rank 0."""
        store = self._plane.runtime.device_store()
        made: dict[str, dict[str, Any]] = {}
        for output in self.outputs.declarations:
            if not isinstance(output, Sample) or step % output.every:
                continue
            rows = output.rows_of(self._model.agents)
            mine = rows[(rows >= store.row_offset) & (rows < store.row_offset + store.agent_count)]
            local = mine - store.row_offset
            parts = self._team.gather(
                (mine, [store.column(self._model.schema.index(n))[local] for n in output.columns])
            )
            if parts is not None:
                where = np.concatenate([part[0] for part in parts])
                by_row = np.argsort(where)
                order = by_row[np.searchsorted(where, rows, sorter=by_row)]
                made[output.file] = {
                    name: np.concatenate([part[1][k] for part in parts])[order]
                    for k, name in enumerate(output.columns)
                }
        return made

    def _write_metrics(self) -> None:
        """Write the counters every few seconds of rank 0's clock; the vote tells the others of a failure."""
        now = time.monotonic()
        if self._metrics is not None and now - self._last_metrics_time >= _METRICS_SECONDS:
            self._last_metrics_time = now
            try:
                self._metrics.append(self._plane.metrics())
            except Exception as error:  # noqa: BLE001 (kept for the next step)
                self.trouble = error


def replay_header(spec: JobSpec, model: BoundModel, plane: EngineControlPlane) -> ReplayHeader:
    """Return the first line of a run's replay log."""
    notes = []
    bound = [p.name for p in model.phases if isinstance(p, ColumnPhase) and not p.row_local]
    if bound:
        count = plane.partition_plan.partition_count
        notes.append(
            f"phases {', '.join(bound)} look at whole partitions: this holds for {count} partitions only"
        )
    return ReplayHeader(
        scheme=spec.replay.fingerprint,
        job=spec.run.name,
        model=model.identity(),
        agents=model.agents,
        seed=spec.run.seed,
        columns=tuple((column.name, column.dtype) for column in model.schema.columns),
        interval=spec.replay.interval,
        params=model.params.plain(),
        notes=tuple(notes),
        first_step=plane.runtime.step_index,
    )
