"""One session of a job: the step loop, and the records, checkpoints and votes that go with it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from rustsim_hpc.control.control_plane import EngineControlPlane
from rustsim_hpc.control.profiling import Profiler, RunProfile, row_bytes
from rustsim_hpc.control.stepper import Stepper
from rustsim_hpc.errors import CheckpointWriteFailed, ReplayDivergence, RustsimError
from rustsim_hpc.executors.base import Executor
from rustsim_hpc.job.checkpoints import JobCheckpoints
from rustsim_hpc.job.prepared import Prepared
from rustsim_hpc.job.progress import Progress
from rustsim_hpc.job.records import JobRecords
from rustsim_hpc.job.signals import StopRequests
from rustsim_hpc.job.watchdog import FIRST_STEP, Watchdog
from rustsim_hpc.ranks.agreement import agree, on_all
from rustsim_hpc.run_folder.crash import write_crash_bundle
from rustsim_hpc.run_folder.folder import RunFolder
from rustsim_hpc.texts import shown

# A rank's vote is one number that packs two counters, each wide enough for a million ranks, and three fields
# of rank 0. The counters: ranks that have something to report (a request to stop, or a failed write), and
# ranks that have finished writing. The fields: whether enough time has passed for a checkpoint, whether
# rank 0 has a failure that the others do not know of, and how many steps to make at once next.
_TELL, _WRITTEN, _TIME_IS_UP, _TROUBLE, _TOGETHER = 1, 1 << 20, 1 << 40, 1 << 41, 1 << 42
_FIELD = (1 << 20) - 1


@dataclass
class LoopResult:
    """How the loop ended.

    steps: number made. seconds: without compilation. stopped: why it ended early, or None. profile: if
    requested.
    """

    steps: int
    seconds: float
    stopped: str | None
    profile: RunProfile | None = None


class JobRun:
    """Runs a job's steps on this rank, in concert with the team.

    Args:
        prepared: the job.
        plane: the plane, its state initialised or restored.
        executor: runs this rank's partitions.
        folder: the run's folder, held.
        stop: requests to stop, collected since before the run began.
        watchdog: watches this rank, and is already running.
        resumed_from: the restored step, or None.
        last_sequence: sequence number of the last checkpoint of earlier sessions.
        forked: the state comes from another run's checkpoint, so it is saved first.
        progress: show a bar if this is a terminal.
        profile: measure where the time goes.
    """

    def __init__(
        self,
        prepared: Prepared,
        plane: EngineControlPlane,
        executor: Executor,
        folder: RunFolder,
        stop: StopRequests,
        watchdog: Watchdog,
        *,
        resumed_from: int | None,
        last_sequence: int = 0,
        forked: bool,
        progress: bool,
        profile: bool = False,
    ) -> None:
        self.spec, self.team, self.plane, self.executor = prepared.spec, prepared.team, plane, executor
        self.folder, self.resumed_from, self.forked = folder, resumed_from, forked
        self._stop, self._watchdog = stop, watchdog
        self._stepper: Stepper | None = None
        self._first = self.team.rank == 0
        self._bar = Progress(
            self.spec.run.name,
            done=plane.runtime.step_index,
            total=self.spec.run.steps,
            agents=self.spec.run.agents,
            wanted=progress and self._first,
        )
        self.records = JobRecords(prepared, plane, folder, resumed_from)
        self.checkpoints = JobCheckpoints(
            prepared, plane, folder, lambda: self._on_first(self.records.flush),
            resumed_from=resumed_from, last_sequence=last_sequence,
        )  # fmt: skip
        self._opened = False
        # Whether the records include the plane's current state.
        self._recorded = True
        self._seconds_a_step = 1.0
        self._profile = profile

    # -- the loop ------------------------------------------------------------------------------------

    def run(self) -> LoopResult:
        """Make the remaining steps.

        ::

            open outputs, replay log, metrics
            while there are steps to make and nobody asked to stop:
                one step of the plane
                its fingerprint to the log, due outputs, a due checkpoint
            a last checkpoint; close everything

        Raises:
            RustsimError: whatever ended the run, the same on every rank; a crash bundle is in the folder.
        """
        watchdog = self._watchdog
        watchdog.phase, watchdog.show_more = self._phases_begun, self._show_workers
        watchdog.has_workers = self.spec.run.executor in ("processes", "remote")
        with self._bar, self._bundle_on_failure():
            self._on_first(self.records.open)
            self._opened = True
            self.checkpoints.reserve(self.spec.run.steps)
            self.records.first_state(self.executor)
            if self.forked:
                self.checkpoints.begin("fork")
            result = self._loop()
            self._note_workers(tell=False)  # one may have been restarted on another machine
            watchdog.beat("end", self.plane.runtime.step_index)
            self.checkpoints.make_last("end" if result.stopped is None else f"stopped: {result.stopped}")
            if result.stopped is not None:
                self.checkpoints.check_saved()
            self._on_first(lambda: self.records.close(result.profile))
            return result

    def _phases_begun(self) -> str:
        """Return the names of the phases that this rank's partitions began last."""
        if self._stepper is None:
            return ""
        names = self._stepper.work.program.phase_names
        return ", ".join(dict.fromkeys(names[k] for k in self._stepper.session.board.status[:, 1]))

    def _show_workers(self) -> None:
        show = getattr(getattr(self._stepper, "session", None), "show_stacks", None)
        if show is not None:
            show()

    def _loop(self) -> LoopResult:
        plane, target, stop, watchdog = self.plane, self.spec.run.steps, self._stop, self._watchdog
        begun = plane.runtime.step_index
        self._stepper = stepper = plane.stepper(self.executor)
        compiled_before = stepper.session.compile_seconds
        profiler = Profiler(stepper, self.team) if self._profile else None
        start = time.perf_counter()
        stopped: str | None = None
        stepper.meeting.vote = self._vote
        together = 1
        while plane.runtime.step_index < target and stopped is None:
            before, began = plane.runtime.step_index, time.perf_counter()
            watchdog.beat("step" if before > begun else FIRST_STEP, before)
            due = self.checkpoints.steps_to_due() or together
            most = min(together, due, target - before)
            step = plane.step_fused(self.executor, most)
            self._recorded = False
            votes, made = stepper.meeting.votes, plane.runtime.step_index - before
            self._seconds_a_step = (time.perf_counter() - began) / made
            together = max(1, votes // _TOGETHER)
            if votes & _TROUBLE:
                agree(self.team, self.records.trouble)
            if before == begun:
                self._on_first(self.folder.begin)
                self._note_workers(tell=self.resumed_from is not None)
            stepped = time.perf_counter_ns()
            self.records.after_step(step.fingerprint)
            self._recorded = True
            recorded = time.perf_counter_ns()
            watchdog.beat("checkpoint", plane.runtime.step_index)
            stop_asked, write_failed = self._decoded(votes)
            self.checkpoints.after_step(
                everybody_done=self._all_written(votes),
                somebody_failed=write_failed,
                time_is_up=bool(votes & _TIME_IS_UP),
            )
            if profiler is not None:
                log = self.records.log_ns
                pause = time.perf_counter_ns() - recorded
                profiler.add(step, stepper.session.compile_seconds, log, recorded - stepped - log, pause)
            self._bar.advance(made)
            if stop_asked:
                reason = stop.stop_requested()
                stopped = reason.text if reason is not None else "another rank was asked to stop"
        # Ranks wait for the one that compiles.
        compiled = max(self.team.allgather(stepper.session.compile_seconds - compiled_before))
        loop, made = time.perf_counter() - start, plane.runtime.step_index - begun
        profile = None
        if profiler is not None:
            profile = RunProfile(profiler.gather(loop), made, row_bytes(stepper.work.program))
        return LoopResult(made, max(0.0, loop - compiled), stopped, profile)

    def _vote(self) -> int:
        """Return this rank's vote; called just before the collective that carries it."""
        writer = self.checkpoints.writer
        vote = _TELL if self._stop.stop_requested() is not None or writer.failed_here else 0
        if writer.busy and writer.done_here:
            vote += _WRITTEN
        if self._first:
            vote += _TIME_IS_UP if self.checkpoints.time_is_up else 0
            vote += _TROUBLE if self.records.trouble is not None else 0
            # Few enough steps at once that a signal is noticed within a second.
            vote += _TOGETHER * min(self.spec.run.fuse_steps, int(1 / max(self._seconds_a_step, 1e-6)))
        return vote

    def _decoded(self, votes: int) -> tuple[bool, bool]:
        """Return whether a rank was asked to stop, and whether one could not write a checkpoint."""
        if not votes & _FIELD:
            return False, False
        mine = [self._stop.stop_requested() is not None, self.checkpoints.writer.failed_here]
        stops, failed = self.team.sum_int64(np.array(mine, np.int64))
        return bool(stops), bool(failed)

    def _all_written(self, votes: int) -> bool:
        # A single rank needs no vote: a failure since then is raised before the next step.
        alone, written = self.team.size == 1, votes >> 20 & _FIELD
        return self.checkpoints.writer.done_here if alone else written == self.team.size

    def _note_workers(self, *, tell: bool) -> None:
        assert self._stepper is not None  # noqa: S101 (the loop has made it)
        for line in self.records.note_workers(self._stepper.session):
            if tell:
                self._warn(f"warning: {line}")

    # -- beginning and end ---------------------------------------------------------------------------

    def _on_first(self, action: Any) -> None:
        """Call a function on rank 0; its failure is raised on all ranks."""
        on_all(self.team, lambda: action() if self._first else None)

    @contextmanager
    def _bundle_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._stop.interrupted:
                raise KeyboardInterrupt from error
            if isinstance(error, ReplayDivergence) and self.spec.replay.verify:
                search = f"rustsim-hpc verify {self.folder.path} --against {self.spec.replay.verify}"
                error.add_facts(hint=f"{search} finds phase and rows")
            write_crash_bundle(
                self.folder.path,
                rank=self.team.rank,
                host=self.team.host,
                error=error,
                step=self.plane.runtime.step_index,
                fingerprints=self.records.fingerprints,
            )
            self._save_what_is_whole(error)
            raise

    def _save_what_is_whole(self, error: Exception) -> None:
        """Close outputs and, if every rank still has the last complete step, save a checkpoint of it.

        A step that the outputs or the log lack is not saved: a run resumed from it would lack it, too.
        """
        alone = self.team.size == 1
        agreed = alone or (isinstance(error, RustsimError) and not self.team.broken)
        whole = self.spec.run.guard == "rollback" and agreed and not isinstance(error, CheckpointWriteFailed)
        try:
            if whole and self._opened:
                self.checkpoints.make_last("failure") if self._recorded else self.checkpoints.finish()
        except Exception as second:  # noqa: BLE001 (the first error matters more)
            self._warn(f"warning: no checkpoint of the last complete step: {second}")
        if self._first and self._opened:
            with suppress(Exception):
                self.records.close()

    def _warn(self, text: str) -> None:
        if self._first:
            sys.stderr.write(f"{shown(text)}\n")
