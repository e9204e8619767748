"""A job's checkpoints: when one is due, its header, and what happens when one fails."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rustsim_hpc.control.control_plane import EngineControlPlane
from rustsim_hpc.errors import CheckpointFileError, CheckpointWriteFailed
from rustsim_hpc.job.prepared import Prepared, storage_options
from rustsim_hpc.proof.fingerprint import ReplayFingerprint, StateView
from rustsim_hpc.proof.state_proof import view_of
from rustsim_hpc.run_folder.folder import RunFolder
from rustsim_hpc.storage.folder import step_of
from rustsim_hpc.storage.header import CheckpointHeader
from rustsim_hpc.storage.writer import CheckpointWriter
from rustsim_hpc.texts import shown


class JobCheckpoints:
    """Writes the checkpoints of one session of a job, beside its steps. All methods are collective.

    Args:
        prepared: the job.
        plane: the plane whose state is saved.
        folder: the run's folder, held.
        flush: makes durable on all ranks what a checkpoint must not be ahead of: outputs and log.
        resumed_from: the restored step, or None.
        last_sequence: sequence number of the last checkpoint of earlier sessions.

    Attributes:
        writer: the checkpoint writer.
    """

    def __init__(
        self,
        prepared: Prepared,
        plane: EngineControlPlane,
        folder: RunFolder,
        flush: Callable[[], None],
        *,
        resumed_from: int | None,
        last_sequence: int,
    ) -> None:
        self._spec, self._model, self._team = prepared.spec, prepared.model, prepared.team
        self._plane = plane
        self.writer = CheckpointWriter(
            folder.checkpoints,
            self._team,
            storage_options(self._spec),
            asynchronous=self._spec.checkpoint.asynchronous,
        )
        self._flush, self._resumed_from, self._sequence = flush, resumed_from, last_sequence
        self._last_step = resumed_from
        self._last_time = time.monotonic()

    @property
    def time_is_up(self) -> bool:
        """Whether ``min_seconds`` have passed since the last checkpoint, by this rank's clock."""
        return time.monotonic() - self._last_time >= self._spec.checkpoint.min_seconds

    @property
    def _by_time(self) -> bool:
        """Whether checkpoints are made by ``min_seconds`` alone, after whatever step is the first."""
        return not self._spec.checkpoint.every and self._spec.checkpoint.min_seconds > 0

    def steps_to_due(self) -> int | None:
        """Return the number of steps to the next step that may be saved by ``every``; None without it."""
        every = self._spec.checkpoint.every
        return every - self._plane.runtime.step_index % every if every else None

    def reserve(self, last_step: int) -> None:
        """Allocate the copy of the state now, if a checkpoint is due up to a step, so that no step waits.

        Raises:
            CheckpointWriteFailed: there is not enough memory, and ``on_error`` is not "continue".
        """
        first = 1 if self._by_time else self.steps_to_due()
        if first is not None and self._plane.runtime.step_index + first <= last_step:
            self._run(lambda: self.writer.reserve(self._view()))

    def after_step(self, *, everybody_done: bool, somebody_failed: bool, time_is_up: bool) -> None:
        """Advance the checkpoint being written, and begin the one that is due after this step.

        everybody_done: whether all ranks have done their part of the checkpoint being written.
        somebody_failed: whether one of them failed. time_is_up: `time_is_up` of rank 0.

        Raises:
            CheckpointWriteFailed: one could not be written, and ``on_error`` is not "continue".
        """
        if self.writer.busy:
            self._run(lambda: self.writer.poll(everybody_done, somebody_failed=somebody_failed))
        step, every = self._plane.runtime.step_index, self._spec.checkpoint.every
        if time_is_up and (step % every == 0 if every else self._by_time):
            self.begin()

    def begin(self, label: str | None = None) -> None:
        """Begin a checkpoint of the current state (or write it, if not asynchronous).

        Raises:
            CheckpointWriteFailed: as :meth:`after_step`.
        """
        self._sequence += 1
        plane, store = self._plane, self._plane.runtime.device_store()
        plane.count_checkpoint()
        step = plane.runtime.step_index
        self._flush()
        fingerprint, due = self._fingerprint()
        header = CheckpointHeader(
            step_index=step,
            rows=store.total_rows,
            schema=store.schema,
            fingerprint=fingerprint,
            fingerprint_due=due,
            sequence=self._sequence,
            label=label,
            seed=self._spec.run.seed,
            parameters=self._model.params.plain(),
            plan={"partitions": plane.partition_plan.partition_count, "ranks": self._team.size},
            model={"module": self._spec.model.module, "identity": self._model.identity()},
            default_ids=store.default_ids,
        )
        self._run(lambda: self.writer.submit(header, self._view(), store.memory))
        self._last_step = step
        self._last_time = time.monotonic()

    def finish(self) -> None:
        """Wait for the checkpoint being written.

        Raises:
            CheckpointWriteFailed: as :meth:`after_step`.
        """
        self._run(self.writer.finish)

    def make_last(self, label: str) -> None:
        """Write a checkpoint of the current state, unless there is one; its label says why.

        Raises:
            CheckpointWriteFailed: as :meth:`after_step`.
        """
        self.finish()
        # No step waits for this one, so it needs no copy of the state.
        self.writer.asynchronous = False
        if self._last_step != self._plane.runtime.step_index:
            self.begin(label)
            self.finish()

    def check_saved(self) -> None:
        """Check that the current state was saved, as a run that is asked to stop reports.

        Raises:
            CheckpointWriteFailed: it was not, whatever ``on_error`` is.
        """
        step = self._plane.runtime.step_index
        saved = step_of(self.writer.paths[-1]) if self.writer.paths else self._resumed_from
        if saved != step:
            raise CheckpointWriteFailed(
                f"the run was stopped at step {step}, and that step could not be saved",
                step=step,
                hint="make room, then resume: it continues from the previous checkpoint"
                if saved is not None
                else "make room, then resume: it starts again at step 0",
            )

    def _fingerprint(self) -> tuple[ReplayFingerprint, bool]:
        """Return a checkpoint's fingerprint, and whether the writer has to compute it in the background.

        Several ranks cannot compute FNV-1a there: each rank's hash starts from that of the rank before.
        """
        plane, scheme = self._plane, self._spec.replay.fingerprint
        known = plane.known_fingerprint()
        if known is not None:
            return known, False
        if scheme == "fnv1a" and self._team.size > 1:
            return plane.fingerprint(), False
        return ReplayFingerprint(plane.runtime.step_index, 0, scheme), True

    def _view(self) -> StateView:
        """Return this rank's rows, as the columns' own arrays: a keeper may have their current values."""
        store = self._plane.runtime.device_store()
        return view_of(store, self._plane.runtime.step_index, store.memory.places())

    def _run(self, action: Callable[[], object]) -> None:
        """Call a method of the writer; ``on_error`` says whether a failure is raised or only reported."""
        try:
            action()
        except CheckpointFileError as error:
            if self._spec.checkpoint.on_error == "stop":
                raise CheckpointWriteFailed(str(error), **error.all_facts()) from error
            if self._team.rank == 0:
                sys.stderr.write(f"warning: {shown(str(error))}\n")
