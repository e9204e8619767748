"""Start, resume and look at runs: from a validated job to a summary. What the command line calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rustsim_hpc.control.control_plane import EngineControlPlane
from rustsim_hpc.errors import EXIT_FAILED, CheckpointFileError, JobError, RustsimError
from rustsim_hpc.job.keys import JobSpec
from rustsim_hpc.job.loop import JobRun, LoopResult
from rustsim_hpc.job.plan import RunPlan, partition_count, plan_run, worker_count
from rustsim_hpc.job.prepared import (
    Prepared,
    bind,
    executor_of,
    facts,
    first_store,
    plane_of,
    prepare,
    replay_mode,
)
from rustsim_hpc.job.restored import (
    RestoredStore,
    forked_rows,
    last_sequence,
    lineage_of,
    machine_differences,
    rows_for,
    set_aside_later,
)
from rustsim_hpc.job.signals import StopRequests
from rustsim_hpc.job.spec import RunOptions
from rustsim_hpc.job.summary import RunSummary
from rustsim_hpc.job.watchdog import Watchdog, watching
from rustsim_hpc.modeling.program import plan_program
from rustsim_hpc.modeling.reductions import meeting_bytes
from rustsim_hpc.ranks.agreement import on_all, on_first
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.run_folder.crash import write_crash_bundle
from rustsim_hpc.run_folder.environment import mixtures
from rustsim_hpc.run_folder.folder import CHECKPOINTS, RunFolder, fresh_folder
from rustsim_hpc.run_folder.reader import open_run
from rustsim_hpc.state.columns import DeviceSoaStore
from rustsim_hpc.storage.folder import find_checkpoint, move_aside, sweep
from rustsim_hpc.storage.restoring import load_newest
from rustsim_hpc.texts import shown


def run_job(spec: JobSpec, options: RunOptions, team: Team) -> RunSummary:
    """Run a job from its first step. Collective.

    Raises:
        RustsimError: it cannot be started, or ended in a failure; the same on every rank.
    """
    limit = _watchdog_limit(spec, options, team)
    with StopRequests(spec.run.time_limit) as stop, watching(limit, team) as watchdog:
        prepared = prepare(spec, team)
        path = on_first(team, lambda: options.out or fresh_folder(spec.run.name).absolute())
        folder = RunFolder.create(path, spec.to_toml(), facts(prepared), team, force=options.force)
        with _session(folder, team, watchdog) as session:
            return _run(prepared, session, first_store(prepared), 0, options, stop)


def resume_run(
    path: Path, spec: JobSpec, options: RunOptions, team: Team, *, at: int | None = None
) -> RunSummary:
    """Continue a run from its newest proven checkpoint (or the one of step ``at``). Collective.

    Raises:
        RustsimError: as :func:`run_job`; also when no checkpoint can be used.
    """
    limit = _watchdog_limit(spec, options, team)
    with StopRequests(spec.run.time_limit) as stop, watching(limit, team) as watchdog:
        prepared = prepare(spec, team)
        finished = on_all(team, lambda: _finished(path, spec))
        if finished is not None and at is None:
            return finished
        if at is not None:  # before the record is touched: a wrong number is no failure of the run
            on_first(team, lambda: find_checkpoint(path / CHECKPOINTS, at))
        folder = RunFolder.reopen(path, facts(prepared), team)
        with _session(folder, team, watchdog) as session:
            on_first(team, lambda: sweep(folder.checkpoints))
            last = on_first(team, lambda: last_sequence(folder.checkpoints))
            store, step = _newest_store(prepared, folder, at)
            return _run(
                prepared, session, store, step or 0, options, stop, resumed_from=step, last_sequence=last
            )


def _newest_store(prepared: Prepared, folder: RunFolder, at: int | None) -> tuple[DeviceSoaStore, int | None]:
    """Return a store of the newest proven checkpoint (or that of step ``at``) and its step.

    Without any checkpoint the store has the first state, and the step is None.
    """
    team = prepared.team

    def reject(path: Path, reason: str) -> None:
        aside = move_aside(path, reason)
        _say(team, f"warning: {path.name} is damaged and was moved aside ({aside.name}): {reason}")

    restored = RestoredStore(prepared)
    loaded = load_newest(
        folder.checkpoints, team, lambda header: rows_for(prepared, header), at, reject, restored.room_for
    )
    if loaded is None:
        return first_store(prepared), None
    step = loaded.header.step_index
    on_all(team, lambda: folder.update(session={"resumed_from": step}))
    for line in machine_differences(folder):
        _say(team, f"warning: {line}")
    return restored.take(), step


def fork_run(
    parent: Path, spec: JobSpec, options: RunOptions, team: Team, *, at: int | None = None
) -> RunSummary:
    """Run a new job from a checkpoint of another run, with the caller's changes. Collective.

    Args:
        parent: the folder of the run to start from; only read.
        spec: the parent's job with the changes applied.
        at: step of the parent's checkpoint; the newest proven one if None.

    Raises:
        RustsimError: as :func:`run_job`; also when the parent has no such checkpoint or other columns.
    """
    if options.out is None:
        raise JobError("fork needs a folder for the new run", hint="give one with --out")
    if options.out.resolve() == parent.resolve():
        raise JobError("a fork cannot take the folder of its parent", hint="give another one with --out")
    limit = _watchdog_limit(spec, options, team)
    with StopRequests(spec.run.time_limit) as stop, watching(limit, team) as watchdog:
        prepared = prepare(spec, team)
        store, step, lineage = _parents_store(prepared, parent, at)
        folder = RunFolder.create(
            options.out, spec.to_toml(), facts(prepared, lineage), team, force=options.force
        )
        with _session(folder, team, watchdog) as session:
            return _run(prepared, session, store, step, options, stop, forked=True)


def _parents_store(
    prepared: Prepared, parent: Path, at: int | None
) -> tuple[DeviceSoaStore, int, dict[str, Any]]:
    """Return a store of another run's checkpoint, its step, and the lineage of the fork."""
    team = prepared.team

    def reject(path: Path, reason: str) -> None:
        _say(team, f"warning: {path.name} of the parent is damaged and was skipped: {reason}")

    restored = RestoredStore(prepared)
    loaded = load_newest(
        parent / "checkpoints",
        team,
        lambda header: forked_rows(prepared, header),
        at,
        reject,
        restored.room_for,
    )
    if loaded is None:
        raise CheckpointFileError(f"{parent} has no checkpoint to start from", damaged=False)
    lineage = on_all(team, lambda: lineage_of(parent, prepared, loaded))
    return restored.take(), loaded.header.step_index, lineage


def plan_job(spec: JobSpec, ranks: int) -> RunPlan:
    """Return what each of ``ranks`` ranks of a job will hold.

    Raises:
        ModelError: the model cannot be right.
    """
    model = bind(spec)
    program = plan_program(
        model.schema, model.phases, two_sided=spec.run.guard == "rollback", **model.program_options()
    )
    return plan_run(spec, model.schema, program.swapped, meeting_bytes(program, model.params), ranks)


def _watchdog_limit(spec: JobSpec, options: RunOptions, team: Team) -> float | None:
    """Return the watchdog's limit; None for a single process of the caller's, which must never be ended."""
    return spec.run.watchdog_seconds if options.owns_process or team.size > 1 else None


# -- running -----------------------------------------------------------------------------------------


@dataclass
class _Session:
    """A session that holds a run's folder. step_index: the step reached so far."""

    folder: RunFolder
    watchdog: Watchdog
    plane: EngineControlPlane | None = None
    step_index: int = 0
    reported: bool = False


@contextmanager
def _session(folder: RunFolder, team: Team, watchdog: Watchdog) -> Iterator[_Session]:
    """Hold a run's folder; an error that ends the session early is recorded in it."""
    session = _Session(folder, watchdog)
    watchdog.folder = folder.path
    watchdog.beat("start-up", 0)
    if team.leaving is not None:
        team.leaving.move(folder.path)
    for line in mixtures(folder.record["sessions"][-1]["hosts"] if team.rank == 0 else []):
        _say(team, f"warning: {line}")
    try:
        yield session
    except Exception as error:
        if not session.reported:
            write_crash_bundle(folder.path, rank=team.rank, host=team.host, error=error)
        if session.plane is not None:
            session.step_index = session.plane.runtime.step_index
        code = error.exit_code if isinstance(error, RustsimError) else EXIT_FAILED
        _note_failure(folder, code, session.step_index, shown(str(error)))
        raise
    finally:
        if session.plane is not None:
            session.plane.close()
        folder.release()


def _run(
    prepared: Prepared,
    session: _Session,
    store: DeviceSoaStore,
    step_index: int,
    options: RunOptions,
    stop: StopRequests,
    *,
    resumed_from: int | None = None,
    last_sequence: int = 0,
    forked: bool = False,
) -> RunSummary:
    """Build the plane on a store, run the remaining steps, and record how the run ended."""
    team, folder = prepared.team, session.folder
    session.step_index = step_index
    session.watchdog.beat("start-up", step_index)
    executor = executor_of(prepared, folder.lock.descriptors)
    session.plane = plane = plane_of(prepared, store, step_index, replay_mode(prepared))
    run = JobRun(
        prepared, plane, executor, folder, stop, session.watchdog,
        resumed_from=resumed_from, last_sequence=last_sequence, forked=forked,
        progress=options.progress, profile=options.profile,
    )  # fmt: skip
    if resumed_from is not None:
        on_first(team, lambda: _take_back(folder, step_index))
    session.reported = True
    result = run.run()
    session.reported = False
    session.watchdog.beat("end", plane.runtime.step_index)
    fingerprint = plane.fingerprint()
    on_first(team, lambda: run.records.outputs.draw_pictures(open_run(folder.path)))
    summary = _summary(prepared, run, result, fingerprint.value)
    on_all(team, lambda: folder.finish(
        "done" if result.stopped is None else "stopped",
        exit_code=summary.exit_code, step_index=summary.step_index,
        fingerprint=fingerprint.value, reason=result.stopped,
    ))  # fmt: skip
    return summary


def _take_back(folder: RunFolder, step: int) -> None:
    """Move aside checkpoints of steps that will be repeated; a finished run's record is updated first."""
    if folder.takes_back(step):
        folder.begin()
    set_aside_later(folder.checkpoints, step)


def _summary(prepared: Prepared, run: JobRun, result: LoopResult, fingerprint: int) -> RunSummary:
    spec = prepared.spec
    return RunSummary(
        job=spec.run.name,
        folder=run.folder.path,
        steps=result.steps,
        step_index=run.plane.runtime.step_index,
        agents=spec.run.agents,
        ranks=prepared.team.size,
        executor=prepared.executor,
        workers=prepared.workers,
        partitions=prepared.partitions,
        fingerprint=fingerprint,
        fingerprint_scheme=spec.replay.fingerprint,
        seconds=result.seconds,
        checkpoints=tuple(path for path in run.checkpoints.writer.paths if path.exists()),
        resumed_from=run.resumed_from,
        outputs={name: Path(path) for name, path in run.records.outputs.files().items()},
        stopped=result.stopped,
        profile=result.profile,
    )


def _finished(path: Path, spec: JobSpec) -> RunSummary | None:
    """Return the summary of a run that has reached its last step, or None."""
    run = open_run(path)
    if run.status != "done" or run.step_index < spec.run.steps:
        return None
    return RunSummary(
        job=spec.run.name,
        folder=path,
        steps=0,
        step_index=run.step_index,
        agents=run.agents,
        ranks=1,
        executor=spec.run.executor,
        workers=worker_count(spec),
        partitions=partition_count(spec, 1),
        fingerprint=run.fingerprint or 0,
        fingerprint_scheme=spec.replay.fingerprint,
        seconds=0.0,
        checkpoints=tuple(run.checkpoints().values()),
        outputs={name: path / name for name in run.outputs()},
    )


def _note_failure(folder: RunFolder, code: int, step: int, reason: str) -> None:
    try:
        folder.finish("failed", exit_code=code, step_index=step, reason=reason)
    except RustsimError as error:  # the failure that is being reported matters more
        sys.stderr.write(f"warning: {shown(str(error))}\n")


def _say(team: Team, text: str) -> None:
    if team.rank == 0:
        sys.stderr.write(shown(text) + "\n")
