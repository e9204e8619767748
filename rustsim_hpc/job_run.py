"""One session of a job: the step loop, and everything that has to happen beside it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rustsim_hpc.agreement import agree
from rustsim_hpc.bound_model import BoundModel
from rustsim_hpc.control_plane import EngineControlPlane
from rustsim_hpc.crash import write_crash_bundle
from rustsim_hpc.errors import CheckpointFileError, CheckpointWriteFailed, RustsimError, TeamError
from rustsim_hpc.fingerprint import StateView
from rustsim_hpc.job import JobSpec
from rustsim_hpc.metrics_log import MetricsLog
from rustsim_hpc.model import ColumnPhase
from rustsim_hpc.output_set import OutputSet
from rustsim_hpc.outputs import Sample
from rustsim_hpc.progress import Progress
from rustsim_hpc.replay_log import ReplayHeader
from rustsim_hpc.replay_writer import ReplayLogWriter
from rustsim_hpc.run_folder import RunFolder
from rustsim_hpc.signals import StopRequests
from rustsim_hpc.stepping import Executor
from rustsim_hpc.storage.header import CheckpointHeader, StorageOptions
from rustsim_hpc.storage.writer import CheckpointWriter
from rustsim_hpc.team import Team
from rustsim_hpc.watchdog import Watchdog

# A vote of one rank is two counters in one number, each wide enough for a million ranks, and what rank 0
# alone says: whether a checkpoint may be made by the clock, and how many steps to make together next.
_STOP, _WRITTEN, _TIME_IS_UP, _TOGETHER = 1, 1 << 20, 1 << 40, 1 << 41
_FIELD = (1 << 20) - 1
_METRICS_SECONDS = 10.0


@dataclass
class LoopResult:
    """How the loop ended: steps made, seconds without compilation, and why it stopped early (or None)."""

    steps: int
    seconds: float
    stopped: str | None


class JobRun:
    """Runs a job's steps on this rank, in concert with the team.

    Args:
        spec: the job as resolved.
        model: the bound model.
        plane: the plane, its state initialised or restored.
        executor: runs this rank's partitions.
        folder: the run's folder, held.
        team: the ranks.
        resumed_from: the restored step, or None.
        forked: the state comes from another run's checkpoint, so this one saves it first.
        progress: show a bar if this is a terminal.
    """

    def __init__(
        self,
        spec: JobSpec,
        model: BoundModel,
        plane: EngineControlPlane,
        executor: Executor,
        folder: RunFolder,
        team: Team,
        *,
        resumed_from: int | None,
        forked: bool,
        progress: bool,
    ) -> None:
        self.spec, self.model, self.plane, self.executor = spec, model, plane, executor
        self.folder, self.team, self.resumed_from, self.forked = folder, team, resumed_from, forked
        self._first = team.rank == 0
        self._bar = Progress(
            spec.run.name,
            done=plane.runtime.step_index,
            total=spec.run.steps,
            agents=model.agents,
            wanted=progress and self._first,
        )
        self.outputs = OutputSet(model.outputs, folder.path, model.agents)
        options = spec.checkpoint
        self.writer = CheckpointWriter(
            folder.checkpoints,
            team,
            storage_options(spec),
            asynchronous=options.asynchronous,
        )
        self._log: ReplayLogWriter | None = None
        self._metrics: MetricsLog | None = None
        self._last_checkpoint_step = resumed_from
        self._last_checkpoint_time = time.monotonic()
        self._last_metrics_time = time.monotonic()
        self._fingerprints: list[tuple[int, int]] = []
        self._opened = False
        self._seconds_a_step = 1.0

    # -- the loop ------------------------------------------------------------------------------------

    def run(self) -> LoopResult:
        """Make the steps that are left.

        ::

            open outputs, replay log, metrics
            while there are steps to make and nobody asked to stop:
                one step of the plane
                its fingerprint to the log, due outputs, a due checkpoint
            a last checkpoint; close everything

        Raises:
            RustsimError: whatever ended the run, the same on every rank; a crash bundle is in the folder.
        """
        watchdog = Watchdog(
            self.spec.run.watchdog_seconds, rank=self.team.rank, host=self.team.host, folder=self.folder.path
        )
        with StopRequests(self.spec.run.time_limit) as stop, self._bar, watchdog, self._bundle_on_failure():
            self._on_first(self._open)
            self._opened = True
            self._record_first()
            if self.forked:
                self._checkpoint()
            result = self._loop(stop, watchdog)
            watchdog.beat("end", self.plane.runtime.step_index)
            self._last_checkpoint()
            self._on_first(self._close)
            return result

    def _loop(self, stop: StopRequests, watchdog: Watchdog) -> LoopResult:
        plane, target = self.plane, self.spec.run.steps
        begun = plane.runtime.step_index
        stepper = plane.stepper(self.executor)
        compiled_before = stepper.session.compile_seconds
        start = time.perf_counter()
        stopped: str | None = None
        together = 1
        self._bar.start()
        while plane.runtime.step_index < target and stopped is None:
            watchdog.beat("step", plane.runtime.step_index)
            stepper.meeting.vote = self._vote(stop)
            before, began = plane.runtime.step_index, time.perf_counter()
            most = min(together, self._steps_to_checkpoint(), target - before)
            step = plane.step_fused(self.executor, most)
            votes, made = stepper.meeting.votes, plane.runtime.step_index - before
            self._seconds_a_step = (time.perf_counter() - began) / made
            together = max(1, votes >> 41)
            self._record(step.fingerprint)
            self._checkpoint_if_due(votes)
            self._bar.advance(made)
            if votes & _FIELD:
                reason = stop.stop_requested()
                stopped = reason.text if reason is not None else "another rank was asked to stop"
        # Ranks wait for the one that compiles.
        compiled = max(self.team.allgather(stepper.session.compile_seconds - compiled_before))
        seconds = max(0.0, time.perf_counter() - start - compiled)
        return LoopResult(plane.runtime.step_index - begun, seconds, stopped)

    def _vote(self, stop: StopRequests) -> int:
        vote = _STOP if stop.stop_requested() is not None else 0
        if self.writer.busy and self.writer.done_here:
            vote += _WRITTEN
        waited = time.monotonic() - self._last_checkpoint_time
        if self._first:
            vote += _TIME_IS_UP if waited >= self.spec.checkpoint.min_seconds else 0
            # Few enough steps at once that a signal is heard within a second.
            vote += _TOGETHER * min(self.spec.run.fuse_steps, int(1 / max(self._seconds_a_step, 1e-6)))
        return vote

    def _steps_to_checkpoint(self) -> int:
        every = self.spec.checkpoint.every
        return every - self.plane.runtime.step_index % every if every else self.spec.run.fuse_steps

    # -- after each step -----------------------------------------------------------------------------

    def _record(self, fingerprint: Any) -> None:
        """Put the step's fingerprint into the log and its due values into the outputs."""
        step = self.plane.runtime.step_index
        failure: Exception | None = None
        if fingerprint is not None:
            self._fingerprints = [*self._fingerprints[-9:], (fingerprint.step_index, fingerprint.value)]
            self.plane.forget_recorded()
        if self._first and self._log is not None and fingerprint is not None:
            try:
                self._log.append(fingerprint, self.plane.column_values())
            except Exception as error:  # noqa: BLE001 (told to all ranks below)
                failure = error
        due = [
            output for output in self.outputs.declarations if step % getattr(output, "every", step + 1) == 0
        ]
        if due:
            self._write_outputs(step, failure)
        elif failure is not None or self._log_can_fail(fingerprint):
            agree(self.team, failure)
        self._write_metrics()

    def _log_can_fail(self, fingerprint: Any) -> bool:
        return fingerprint is not None and self.spec.replay.mode == "record" and self.team.size > 1

    def _write_outputs(self, step: int, failure: Exception | None) -> None:
        samples = self._samples(step)
        if self._first and failure is None:
            try:
                context = self.model.context(step, self.plane.values)
                self.outputs.record(step, context.time, context, samples)
            except Exception as error:  # noqa: BLE001 (told to all ranks below)
                failure = error
        agree(self.team, failure)

    def _samples(self, step: int) -> dict[str, dict[str, Any]]:
        """Gather the sampled rows of all ranks on rank 0."""
        store = self.plane.runtime.device_store()
        made: dict[str, dict[str, Any]] = {}
        for output in self.outputs.declarations:
            if not isinstance(output, Sample) or step % output.every:
                continue
            rows = output.rows_of(self.model.agents)
            mine = rows[(rows >= store.row_offset) & (rows < store.row_offset + store.agent_count)]
            local = mine - store.row_offset
            parts = self.team.gather(
                (mine, [store.column(self.model.schema.index(n))[local] for n in output.columns])
            )
            if parts is not None:
                where = np.concatenate([part[0] for part in parts])
                order = np.argsort(where, kind="stable")[
                    np.argsort(np.argsort(rows, kind="stable"), kind="stable")
                ]
                made[output.file] = {
                    name: np.concatenate([part[1][k] for part in parts])[order]
                    for k, name in enumerate(output.columns)
                }
        return made

    def _write_metrics(self) -> None:
        now = time.monotonic()
        if self._metrics is not None and now - self._last_metrics_time >= _METRICS_SECONDS:
            self._last_metrics_time = now
            self._metrics.append(self.plane.metrics())

    # -- checkpoints ---------------------------------------------------------------------------------

    def _checkpoint_if_due(self, votes: int) -> None:
        if self.writer.busy:
            written = votes >> 20 & _FIELD
            self._published(lambda: self.writer.poll(everybody_done=written == self.team.size))
        step, every = self.plane.runtime.step_index, self.spec.checkpoint.every
        if every and step % every == 0 and votes & _TIME_IS_UP:
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Begin a checkpoint of the current state (or write it, where that is not asynchronous)."""
        plane, store = self.plane, self.plane.runtime.device_store()
        step = plane.runtime.step_index
        self._on_first(self.outputs.flush)
        view = StateView(
            step_index=step,
            rows=store.total_rows,
            names=store.column_names,
            ids=None if store.default_ids else store.ids,
            columns=store.columns,
            row_offset=store.row_offset,
            local_rows=store.agent_count,
        )
        header = CheckpointHeader(
            step_index=step,
            rows=store.total_rows,
            schema=store.schema,
            fingerprint=plane.fingerprint(),
            sequence=plane.count_checkpoint(),
            seed=self.spec.run.seed,
            parameters=self.model.params.plain(),
            plan={"partitions": plane.partition_plan.partition_count, "ranks": self.team.size},
            model={"module": self.spec.model.module, "identity": self.model.identity()},
            default_ids=store.default_ids,
        )
        self._published(lambda: self.writer.submit(header, view))
        self._last_checkpoint_step = step
        self._last_checkpoint_time = time.monotonic()

    def _last_checkpoint(self) -> None:
        self._published(self.writer.finish)
        # No step waits for this one, so it needs no copy of the state.
        self.writer.asynchronous = False
        if self._last_checkpoint_step != self.plane.runtime.step_index:
            self._checkpoint()
            self._published(self.writer.finish)

    def _published(self, action: Any) -> None:
        """Run a step of the writer; what becomes of its failures is for ``on_error`` to say."""
        try:
            action()
        except CheckpointFileError as error:
            if self.spec.checkpoint.on_error == "stop":
                raise CheckpointWriteFailed(str(error), step=error.step, hint=error.hint) from error
            self._warn(f"warning: {error}")

    # -- beginning and end ---------------------------------------------------------------------------

    def _open(self) -> None:
        self.outputs.open(self.resumed_from, self.plane.runtime.step_index)
        self._metrics = MetricsLog(self.folder.path, self.resumed_from)
        if self.spec.replay.mode == "record":
            self._log = ReplayLogWriter(
                self.folder.replay_log,
                replay_header(self.spec, self.model, self.plane),
                resume_step=self.resumed_from,
            )

    def _record_first(self) -> None:
        """Write the outputs of the state that the run begins with, unless they are there."""
        step = self.plane.runtime.step_index
        due = self.team.bcast(bool(self.outputs.due(step)) if self._first else None)
        if not due:
            return
        self.plane.observe(self.executor)
        self._write_outputs(step, None)

    def _close(self) -> None:
        self.outputs.close()
        if self._metrics is not None:
            self._metrics.append(self.plane.metrics())
            self._metrics.close()
        if self._log is not None:
            self._log.sync()
            self._log.close()

    def _on_first(self, action: Any) -> None:
        """Run something on rank 0; its failure is everybody's."""
        failure: Exception | None = None
        if self._first:
            try:
                action()
            except Exception as error:  # noqa: BLE001 (told to all ranks below)
                failure = error
        agree(self.team, failure)

    @contextmanager
    def _bundle_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            write_crash_bundle(
                self.folder.path,
                rank=self.team.rank,
                host=self.team.host,
                error=error,
                step=self.plane.runtime.step_index,
                fingerprints=self._fingerprints,
            )
            self._save_what_is_whole(error)
            raise

    def _save_what_is_whole(self, error: Exception) -> None:
        """Close outputs and, where every rank still has the last complete step, save a checkpoint of it."""
        agreed = isinstance(error, RustsimError) and not isinstance(error, TeamError)
        whole = self.spec.run.guard == "rollback" and agreed and not isinstance(error, CheckpointWriteFailed)
        try:
            if whole and self._opened:
                self._last_checkpoint()
        except Exception as second:  # noqa: BLE001 (the first error matters more)
            self._warn(f"warning: no checkpoint of the last complete step: {second}")
        if self._first and self._opened:
            with suppress(Exception):
                self._close()

    def _warn(self, text: str) -> None:
        if self._first:
            sys.stderr.write(f"{text}\n")


def storage_options(spec: JobSpec) -> StorageOptions:
    """Return how a job's checkpoints are stored."""
    table = spec.checkpoint
    compression: dict[str, str] = {}
    if table.compression != "none":
        compression = dict.fromkeys(table.compression_columns or ["*"], table.compression)
    options = StorageOptions(table.layout, compression, keep=table.keep, keep_every=table.keep_every)
    return options if table.chunk_rows is None else replace(options, chunk_rows=table.chunk_rows)


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
    )
