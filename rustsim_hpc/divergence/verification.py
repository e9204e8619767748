"""Run a job again against a log, and compare two runs: what `rustsim-hpc verify` and `diff` call.

Neither changes anything in a run's folder, except for the report that it writes there.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rustsim_hpc.control.control_plane import EngineControlPlane
from rustsim_hpc.divergence.causes import causes_of_input, environment_differences
from rustsim_hpc.divergence.report import DivergenceReport
from rustsim_hpc.divergence.search import investigate
from rustsim_hpc.divergence.side import (
    Known,
    RunSide,
    folder_of,
    layout_of,
    learn,
    read_log,
    repeatable,
    side_of_folder,
    side_of_log,
)
from rustsim_hpc.errors import (
    CheckpointFileError,
    EngineControlPlaneError,
    ReplayDivergence,
    ReplayExhausted,
    ReplayStepMismatch,
    RustsimError,
)
from rustsim_hpc.job.keys import JobSpec, ReplayTable
from rustsim_hpc.job.prepared import Prepared, device_of, executor_of, first_store, plane_of, prepare
from rustsim_hpc.job.progress import Progress
from rustsim_hpc.job.restored import restored_store
from rustsim_hpc.job.spec import RunOptions
from rustsim_hpc.job.summary import RunSummary
from rustsim_hpc.job.watchdog import Watchdog, watching
from rustsim_hpc.modeling.model import ColumnPhase
from rustsim_hpc.proof.replay_log import ReplayLog
from rustsim_hpc.ranks.agreement import on_all, on_first
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.run_folder.environment import by_host, host_facts, versions
from rustsim_hpc.run_folder.folder import DIVERGENCE
from rustsim_hpc.state.columns import DeviceSoaStore
from rustsim_hpc.texts import shown

EXIT_DIFFERENT: Final = 4


@dataclass(frozen=True)
class Verification:
    """How a job that was run again compares with a log.

    summary: of the repetition. against: the log. checked: entries that were compared and are equal. failure:
    what ended it, or None. report: where the difference is, if there is one.
    """

    summary: RunSummary
    against: Path
    checked: int
    failure: EngineControlPlaneError | None = None
    report: DivergenceReport | None = None

    def text(self) -> str:
        """Return the outcome for a reader."""
        if self.report is not None:
            return self.report.text()
        what = f"{self.summary.job}: {self.checked:,} fingerprint{'' if self.checked == 1 else 's'}"
        reached = f"up to step {self.summary.step_index:,}"
        return f"{what} {reached} equal to those of {self.against}"

    def to_json(self) -> str:
        """Return the outcome as one line of JSON."""
        report = None if self.report is None else self.report.to_dict()
        more = {
            "verified": self.failure is None,
            "against": str(self.against),
            "checked": self.checked,
            "error": None if self.failure is None else str(self.failure),
            "report": None if self.report is None or self.report.path is None else str(self.report.path),
            "divergence": report,
        }
        return json.dumps(self.summary.to_dict() | more)


def verify_run(
    folder: Path,
    against: Path,
    spec: JobSpec,
    options: RunOptions,
    team: Team,
    *,
    steps: int | None = None,
    out: Path | None = None,
) -> Verification:
    """Run the job of a run's folder again, in memory, each step checked against a log. Collective.

    Args:
        folder: the run's folder; only the report is written there.
        against: the log, or the folder of the run that recorded it.
        spec: the folder's job, with the caller's overrides.
        options: of this start.
        team: the ranks.
        steps: the step to reach; that of the run by default.
        out: where the report goes, instead of ``folder``.

    Raises:
        RustsimError: the log cannot be read, the job cannot be run, or fails for another reason than the log.
    """
    log = on_first(team, lambda: read_log(against))
    own = on_first(team, lambda: side_of_folder(folder))
    prepared = prepare(_spec(spec, own, log, steps), team)
    prepared = _same_cut(prepared, own, log, team)
    left = on_first(team, lambda: _side_of_log(log, own))
    right = _repetition(folder, own, prepared, team)
    lines = [f"the log is of another run: {cause.text}" for cause in causes_of_input(left, right)]
    for line in [*own.notes, *lines, *environment_differences(left.record or own.record, right.record)]:
        _say(team, f"warning: {line}")
    limit = prepared.spec.run.watchdog_seconds
    with watching(limit, team) as watchdog:
        made = _run(prepared, own, log, folder, options, watchdog)
        if not isinstance(made.failure, ReplayDivergence):
            return made
        _learn_from_repetition(left, right, own, made.failure, log)
        try:
            report = investigate(
                left, right, team, say=lambda text: _say(team, text), beat=watchdog.beat,
                columns=made.failure.columns,
            )  # fmt: skip
        except Exception as error:  # the divergence matters more
            if team.size > 1 and not isinstance(error, RustsimError):
                raise  # the other ranks do not know of it
            _say(team, f"warning: the difference was not followed further: {error}")
            return made
    _write(report, out or folder / DIVERGENCE, team)
    return replace(made, report=report)


def diff_runs(
    left: Path, right: Path, team: Team, *, out: Path | None = None, workers: int | None = None
) -> DivergenceReport:
    """Compare two runs as far as both go, and write the report. Collective.

    Args:
        left, right: the runs' folders.
        team: the ranks.
        out: where the report goes; by default into ``left``, if they differ.
        workers: threads of a rank, where runs have to be repeated.

    Raises:
        RustsimError: one is no run's folder, or it is unknown whether they are equal.
    """
    sides = on_first(team, lambda: (side_of_folder(left), side_of_folder(right)))
    for side in sides:
        if workers is not None and side.spec is not None:
            run = side.spec.run.model_copy(update={"workers": workers})
            side.spec = side.spec.model_copy(update={"run": run})
    limit = max(side.spec.run.watchdog_seconds if side.spec else 0.0 for side in sides)
    with watching(limit, team) as watchdog:
        report = investigate(*sides, team, say=lambda text: _say(team, text), beat=watchdog.beat)
    if out is not None or not report.equal:
        _write(report, out or left / DIVERGENCE, team)
    return report


# -- the repetition ------------------------------------------------------------------------------------


def _spec(spec: JobSpec, own: RunSide, log: ReplayLog, steps: int | None) -> JobSpec:
    """Return the job to verify: with the log's scheme and interval, up to the step that the run reached."""
    target = max(spec.run.steps, int(own.record.get("steps") or 0)) if steps is None else steps
    replay = ReplayTable(fingerprint=log.header.scheme, interval=log.header.interval)  # type: ignore[arg-type]
    run = spec.run.model_copy(update={"steps": target})
    return spec.model_copy(update={"run": run, "replay": replay})


def _same_cut(prepared: Prepared, own: RunSide, log: ReplayLog, team: Team) -> Prepared:
    """Use the recorded number of partitions, unless the job gives one, if phases look at whole partitions."""
    spec = prepared.spec
    bound = any(isinstance(phase, ColumnPhase) and not phase.row_local for phase in prepared.model.phases)
    if spec.run.partitions is not None or not bound:
        return prepared
    recorded = on_first(team, lambda: _side_of_log(log, own).record.get("partitions"))
    run = spec.run.model_copy(update={"partitions": recorded or own.record.get("partitions")})
    return prepare(spec.model_copy(update={"run": run}), team)


def _run(
    prepared: Prepared, own: RunSide, log: ReplayLog, folder: Path, options: RunOptions, watchdog: Watchdog
) -> Verification:
    """Make the steps; stop at the first that differs from the log."""
    spec, team = prepared.spec, prepared.team
    store, start = _first_state(prepared, own)
    executor = executor_of(prepared)
    failure: EngineControlPlaneError | None = None
    plane: EngineControlPlane | None = None
    try:
        plane = plane_of(prepared, store, start, log.verify_mode())
        stepper = plane.stepper(executor)
        begun, compiled = time.perf_counter(), stepper.session.compile_seconds
        bar = Progress(
            spec.run.name, done=start, total=spec.run.steps, agents=spec.run.agents,
            wanted=options.progress and team.rank == 0,
        )  # fmt: skip
        with bar:
            try:
                while plane.runtime.step_index < spec.run.steps:
                    watchdog.beat("step", plane.runtime.step_index)
                    plane.step_partitions_with_executor(executor)
                    plane.forget_recorded()
                    bar.advance()
            except (ReplayDivergence, ReplayStepMismatch, ReplayExhausted) as error:
                failure = _with_hint(error, log)
        seconds = time.perf_counter() - begun - (stepper.session.compile_seconds - compiled)
        reached = plane.runtime.step_index
        summary = RunSummary(
            job=spec.run.name, folder=folder, steps=reached - start, step_index=reached,
            agents=spec.run.agents, ranks=team.size, executor=prepared.executor,
            workers=prepared.workers, partitions=prepared.partitions, fingerprint=plane.fingerprint().value,
            fingerprint_scheme=spec.replay.fingerprint, seconds=seconds,
        )  # fmt: skip
        checked = sum(start < entry.step_index <= reached for entry in log.entries)
        if failure is None and not checked:
            _say(team, f"warning: {log.path} has no entry for any of the steps; nothing was checked")
        return Verification(summary, log.path, checked, failure)
    finally:
        if plane is not None:
            plane.close()
        store.close()


def _first_state(prepared: Prepared, own: RunSide) -> tuple[DeviceSoaStore, int]:
    """Return the state that the run began with, and its step: initialised, or that of a fork."""
    if not own.origin:
        return first_store(prepared), 0
    path = dict(own.checkpoints).get(own.origin)
    if path is None:
        raise CheckpointFileError(f"{own.name} cannot be run again: {own.why_not}", damaged=False)
    return restored_store(path, prepared), own.origin


def _with_hint(error: EngineControlPlaneError, log: ReplayLog) -> EngineControlPlaneError:
    if isinstance(error, ReplayStepMismatch) and log.entries:
        error.add_facts(hint=f"the log begins with step {log.entries[0].step_index}: is it that of a fork?")
    if isinstance(error, ReplayExhausted):
        last = log.entries[-1].step_index if log.entries else 0
        error.add_facts(
            hint=f"the log ends with step {last}; to check the steps that it has, give --steps {last}"
        )
    return error


# -- the sides -----------------------------------------------------------------------------------------


def _side_of_log(log: ReplayLog, own: RunSide) -> RunSide:
    """Return the side of the log: the run whose folder it lies in, or what its header says about one."""
    folder = folder_of(log.path)
    side = side_of_log(log, own) if folder is None else side_of_folder(folder)
    if folder is not None:
        learn(side, log)
    side.name = str(log.path)
    return side


def _repetition(folder: Path, own: RunSide, prepared: Prepared, team: Team) -> RunSide:
    """Return the side of the run that is repeated here."""
    hosts = team.gather(host_facts(device_of(prepared)))
    record: dict[str, Any] = {
        "versions": versions(),
        # What remote workers are like is told by those who speak to them.
        "hosts": team.bcast(by_host(hosts) if hosts is not None and prepared.executor != "remote" else None),
        "partitions": prepared.partitions,
        "model": prepared.spec.model.module,
    }
    model, spec = prepared.model, prepared.spec
    return RunSide(
        name=f"{folder}, run again",
        folder=folder,
        spec=repeatable(spec, {"partitions": prepared.partitions}),
        record=record,
        model=model.identity(),
        agents=spec.run.agents,
        seed=spec.run.seed,
        params=model.params.plain(),
        layout=layout_of(model.schema),
        origin=own.origin,
    )


def _learn_from_repetition(
    left: RunSide, right: RunSide, own: RunSide, failure: ReplayDivergence, log: ReplayLog
) -> None:
    """Add what the repetition showed: its states are the log's, up to the first that differs."""
    end = failure.step_index
    right.reached = end
    checked = (entry.step_index for entry in log.entries if right.origin < entry.step_index < end)
    right.known = {step: left.known[step] for step in checked}
    right.known[end] = Known(failure.actual, log.header.scheme)
    for step, path in own.checkpoints:
        # A checkpoint of the earlier run serves if its state is known to be this one's, too.
        equal = step in right.known and step < end and own.known[step].differs(right.known[step]) is False
        if equal or step == right.origin:
            right.checkpoints.append((step, path))


# -- telling -------------------------------------------------------------------------------------------


def _write(report: DivergenceReport, path: Path, team: Team) -> None:
    """Write the report on rank 0; it is shown even if it cannot be written."""
    try:
        on_all(team, lambda: report.write(path) if team.rank == 0 else None)
        report.path = path
    except RustsimError as error:
        _say(team, f"warning: {error}")


def _say(team: Team, text: str) -> None:
    if team.rank == 0:
        sys.stderr.write(shown(text) + "\n")
