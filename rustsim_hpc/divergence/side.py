"""One side of a comparison: what a run left behind, what is known of its states, and how to run it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rustsim_hpc.errors import CheckpointFileError, ReplayLogError, RunFolderError, RustsimError
from rustsim_hpc.files import is_folder
from rustsim_hpc.job.keys import JobSpec, ReplayTable
from rustsim_hpc.job.spec import read_job
from rustsim_hpc.proof.replay import differing_columns
from rustsim_hpc.proof.replay_log import IDS, ReplayLog, read_replay_log
from rustsim_hpc.run_folder.folder import CHECKPOINTS, JOB, REPLAY
from rustsim_hpc.run_folder.reader import Run, open_run
from rustsim_hpc.state.schema import Schema
from rustsim_hpc.storage.folder import list_checkpoints, step_of
from rustsim_hpc.storage.header import CheckpointHeader
from rustsim_hpc.storage.reading import read_header

Layout = tuple[tuple[str, str], ...]
"""Name and dtype of each column, in order."""


@dataclass(frozen=True)
class Known:
    """What is known of a state: its fingerprint and, under the digest, one sum for each column and "ids"."""

    value: int
    scheme: str
    columns: Mapping[str, int] = field(default_factory=dict)

    def differs(self, other: Known) -> bool | None:
        """Return whether two states of one layout differ; None if what is known does not decide it."""
        if self.columns and other.columns:
            return bool(differing_columns(self.columns, other.columns))
        return self.value != other.value if self.scheme == other.scheme else None


@dataclass
class RunSide:
    """One side of a comparison.

    Attributes:
        name: what reports call it.
        folder: the run's folder, or None.
        spec: the job as it is run again (digest, threads, the recorded number of partitions), or None.
        record: the run's record (run.json), or a substitute for it.
        model: identity of the model that ran, "" if unknown.
        agents, seed, params, layout: of the run; layout None if it is unknown.
        known: what is known of its states, by step.
        checkpoints: (step, path), oldest first.
        origin: the step that the run began with: that of a fork's state, else 0.
        reached: the last step that is known to be reached.
        why_not: why it cannot be run again, "" if it can.
        notes: anything unusual, for the report.
        strayed: the first step at which a repetition differed from what is known of the run, and the columns.
    """

    name: str
    folder: Path | None = None
    spec: JobSpec | None = None
    record: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    agents: int = 0
    seed: int = 0
    params: dict[str, Any] = field(default_factory=dict)
    layout: Layout | None = None
    known: dict[int, Known] = field(default_factory=dict)
    checkpoints: list[tuple[int, Path]] = field(default_factory=list)
    origin: int = 0
    reached: int = 0
    why_not: str = ""
    notes: list[str] = field(default_factory=list)
    strayed: tuple[int, tuple[str, ...]] | None = None

    def compare(self, step: int, found: Known) -> None:
        """Compare a repetition's state with what is known of a step; note in `strayed` if they differ."""
        stated = self.known.get(step)
        if stated is None or not stated.differs(found):
            return
        if self.strayed is None or self.strayed[0] > step:
            self.strayed = step, differing_columns(stated.columns, found.columns)


def read_log(path: Path) -> ReplayLog:
    """Return a replay log, or that of a run's folder.

    Raises:
        ReplayLogError: it cannot be read.
    """
    if is_folder(path):
        if not (path / REPLAY).exists():
            raise ReplayLogError(f"{path} has no {REPLAY}", hint="run its job with --record")
        path = path / REPLAY
    return read_replay_log(path)


def folder_of(log: Path) -> Path | None:
    """Return the run's folder that a log lies in, or None."""
    return log.parent if log.name == REPLAY and (log.parent / JOB).is_file() else None


def side_of_folder(folder: Path) -> RunSide:
    """Return the side that a run's folder describes.

    Raises:
        RunFolderError: it is no run's folder, or its record is damaged.
    """
    run = open_run(folder)
    try:
        return _read_side(run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, RustsimError):
            raise
        raise RunFolderError(f"the record of {folder} is damaged: {type(error).__name__}: {error}") from error


def _read_side(run: Run) -> RunSide:
    folder = run.path
    side = RunSide(str(folder), folder, record=run.record, params=run.params)
    side.agents, side.seed, side.reached = run.agents, run.seed, run.step_index
    side.model = str(run.record.get("model_hash", ""))
    try:
        side.spec = repeatable(read_job(folder / JOB)[0], run.record)
    except RustsimError as error:
        side.why_not = str(error)
    _learn_from_log(side, run)
    _learn_from_checkpoints(side, folder / CHECKPOINTS)
    value, scheme, end = run.fingerprint, run.record.get("fingerprint_scheme"), run.record.get("step_index")
    if value is not None and isinstance(scheme, str) and isinstance(end, int):
        side.known.setdefault(end, Known(value, scheme))
    _find_origin(side, run)
    return side


def side_of_log(log: ReplayLog, repeatable_as: RunSide | None = None) -> RunSide:
    """Return the side of a log without a folder; another side's job can repeat it, if of the same model."""
    header = log.header
    side = RunSide(str(log.path), params=dict(header.params), agents=header.agents, seed=header.seed)
    side.model, side.layout = header.model, header.columns
    learn(side, log)
    side.reached = max(side.known, default=0)
    side.why_not = "there is no run's folder beside the log"
    if repeatable_as is not None and repeatable_as.spec is not None and repeatable_as.model == header.model:
        spec = repeatable_as.spec
        run = spec.run.model_copy(update={"seed": header.seed, "agents": header.agents})
        side.spec = spec.model_copy(update={"run": run, "params": dict(header.params)})
        side.origin, side.why_not = repeatable_as.origin, ""
    return side


def learn(side: RunSide, log: ReplayLog) -> None:
    """Add what a log says about the states."""
    side.layout = log.header.columns
    for entry in log.entries:
        side.known[entry.step_index] = Known(entry.value, entry.scheme, dict(entry.columns))


def repeatable(spec: JobSpec, record: Mapping[str, Any]) -> JobSpec:
    """Return a job changed to be repeated in this process: it computes the same and writes nothing.

    The number of partitions is the recorded one: a phase may look at whole partitions.
    """
    run = spec.run.model_copy(
        update={
            "partitions": record.get("partitions") or spec.run.partitions,
            "steps": record.get("steps") or spec.run.steps,
            "executor": "threads",
            "backend": "cpu",
            "memory": "auto",
            "guard": "rollback",
        }
    )
    return spec.model_copy(update={"run": run, "replay": ReplayTable()})


def known_of(header: CheckpointHeader) -> Known:
    """Return what a checkpoint's header says about its state."""
    names = (IDS, *header.schema.names)
    columns = dict(zip(names, header.digests, strict=True)) if header.digests else {}
    return Known(header.fingerprint.value, header.fingerprint.scheme, columns)


def layout_of(schema: Schema) -> Layout:
    """Return the names and dtypes of columns."""
    return tuple((column.name, column.dtype) for column in schema.columns)


def _learn_from_log(side: RunSide, run: Run) -> None:
    if not (run.path / REPLAY).exists():
        return
    try:
        log = run.replay()
    except ReplayLogError as error:
        side.notes.append(f"{side.name}: its log cannot be read: {error}")
        return
    learn(side, log)
    side.reached = max(side.reached, *side.known, 0)


def _learn_from_checkpoints(side: RunSide, folder: Path) -> None:
    """Note the checkpoints that agree with the log; they are verified when they are read."""
    for path in reversed(list_checkpoints(folder)):
        step = step_of(path)
        try:
            header = read_header(path)
        except CheckpointFileError as error:
            side.notes.append(f"{side.name}: {path.name} is not used: {error}")
            continue
        side.layout = side.layout or layout_of(header.schema)
        found = known_of(header)
        stated = side.known.setdefault(step, found)
        if layout_of(header.schema) != side.layout or header.rows != side.agents or stated.differs(found):
            side.notes.append(f"{side.name}: {path.name} is not used: it is not the state of its log")
            continue
        if not stated.columns:
            side.known[step] = replace(stated, columns=found.columns)
        side.checkpoints.append((step, path))
        side.reached = max(side.reached, step)


def _find_origin(side: RunSide, run: Run) -> None:
    """Find the state that a fork began with: its own copy, its parent's, or else its first checkpoint."""
    lineage = run.lineage
    if not lineage:
        return
    side.origin = int(lineage["step"])
    if any(step == side.origin for step, _ in side.checkpoints):
        return
    for path in list_checkpoints(Path(lineage["parent"]) / CHECKPOINTS):
        if step_of(path) == side.origin:
            try:
                header = read_header(path)
            except CheckpointFileError:
                continue
            if f"{header.fingerprint.value:#018x}" == lineage["fingerprint"]:
                side.checkpoints.insert(0, (side.origin, path))
                return
    if not side.checkpoints:
        side.why_not = f"the state of step {side.origin}, with which this fork began, is not there any more"
        return
    side.origin = side.checkpoints[0][0]
    side.notes.append(f"{side.name}: its first state is gone; compared from step {side.origin} on")
