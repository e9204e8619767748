"""Start, resume and look at runs: from a validated job to a summary. What the command line calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rustsim_hpc.agreement import agree, agree_hash
from rustsim_hpc.bound_model import BoundModel
from rustsim_hpc.columns import DeviceSoaStore
from rustsim_hpc.config import ControlPlaneConfig, StepGuard
from rustsim_hpc.control_plane import EngineControlPlane
from rustsim_hpc.errors import CheckpointFileError, JobError, RustsimError
from rustsim_hpc.executors.inline import InlinePartitionExecutor
from rustsim_hpc.executors.threads import LocalThreadedPartitionExecutor
from rustsim_hpc.job import JobSpec, RunOptions
from rustsim_hpc.job_run import JobRun, LoopResult
from rustsim_hpc.memory import ColumnMemory, Kind
from rustsim_hpc.model_source import load_model
from rustsim_hpc.partition import PartitionPlan
from rustsim_hpc.plan import RankPart, RunPlan, partition_count, plan_run, rank_part, worker_count
from rustsim_hpc.program import plan_program
from rustsim_hpc.replay import ReplayMode
from rustsim_hpc.replay_log import read_replay_log
from rustsim_hpc.run_folder import RunFolder, fresh_folder
from rustsim_hpc.run_reader import open_run
from rustsim_hpc.run_record import RunFacts
from rustsim_hpc.runtime import ColumnarRuntime
from rustsim_hpc.stepping import Executor
from rustsim_hpc.storage.reading import LoadedCheckpoint, load_newest
from rustsim_hpc.summary import RunSummary
from rustsim_hpc.team import Team
from rustsim_hpc.version import __version__

T = TypeVar("T")


@dataclass(frozen=True)
class _Prepared:
    """A job on this rank, checked as far as it can be without allocating or writing anything."""

    spec: JobSpec
    model: BoundModel
    partitions: int
    part: RankPart
    team: Team

    @property
    def kind(self) -> Kind:
        """Where the columns live."""
        wanted = self.spec.run.memory
        if wanted == "device":
            raise JobError("[run] memory = device needs backend = cuda")
        if wanted != "auto":
            return wanted
        return "shared" if self.team.size > 1 or self.spec.run.executor == "processes" else "heap"


def run_job(spec: JobSpec, options: RunOptions, team: Team) -> RunSummary:
    """Run a job from its first step. Collective.

    Raises:
        RustsimError: it cannot be started, or ended in a failure; the same on every rank.
    """
    prepared = _prepare(spec, team)
    path = team.bcast(_on_all(team, lambda: _choose_folder(spec, options, team)))
    folder = RunFolder.create(path, spec.to_toml(), _facts(prepared), team, force=options.force)
    part = prepared.part
    store = _on_all(team, lambda: prepared.model.new_store(part.row_start, part.row_stop, prepared.kind))
    return _run(prepared, folder, store, 0, None, options)


def resume_run(
    path: Path, spec: JobSpec, options: RunOptions, team: Team, *, at: int | None = None
) -> RunSummary:
    """Go on with a run from its newest proven checkpoint (or the one of step ``at``). Collective.

    Raises:
        RustsimError: as :func:`run_job`; also when no checkpoint can be used.
    """
    prepared = _prepare(spec, team)
    finished = _on_all(team, lambda: _finished(path, spec))
    if finished is not None and at is None:
        return finished
    folder = RunFolder.reopen(path, _facts(prepared), team)
    try:
        loaded = load_newest(folder.checkpoints, team, lambda header: _rows_for(prepared, header), at=at)
        if loaded is None:
            part = prepared.part
            store = _on_all(team, lambda: prepared.model.new_store(part.row_start, part.row_stop, prepared.kind))
            return _run(prepared, folder, store, 0, None, options)
        for rejected, reason in loaded.rejected:
            _say(team, f"warning: {rejected.name} does not prove itself and was moved aside: {reason}")
        store = _on_all(team, lambda: _restored_store(prepared, loaded))
    except BaseException:
        folder.release()
        raise
    return _run(prepared, folder, store, loaded.header.step_index, loaded, options)


def plan_job(spec: JobSpec, ranks: int) -> RunPlan:
    """Return what each of ``ranks`` ranks of a job will hold.

    Raises:
        ModelError: the model cannot be right.
    """
    model = _bind(spec)
    program = plan_program(
        model.schema, model.phases, two_sided=spec.run.guard == "rollback", **model.program_options()
    )
    from rustsim_hpc.reductions import meeting_bytes

    return plan_run(spec, model.schema, program.swapped, meeting_bytes(program, model.params), ranks)


# -- preparing ---------------------------------------------------------------------------------------


def _bind(spec: JobSpec) -> BoundModel:
    model, reference = load_model(spec.model.module)
    return BoundModel(
        model, spec.params, seed=spec.run.seed, agents=spec.run.agents, reference=reference
    )


def _prepare(spec: JobSpec, team: Team) -> _Prepared:
    """Bind the model on every rank, check what can be checked, and compare the ranks."""

    def bind() -> BoundModel:
        model = _bind(spec)
        plan_program(model.schema, model.phases, two_sided=True, **model.program_options())
        if spec.run.backend == "cuda":
            raise JobError("[run] backend = cuda: there is no CUDA executor in this version")
        return model

    model = _on_all(team, bind)
    agree_hash(team, "package version", __version__)
    agree_hash(team, "job file", spec.sha256())
    agree_hash(team, "model source", model.identity())
    partitions = partition_count(spec, team.size)
    return _Prepared(spec, model, partitions, rank_part(spec.run.agents, partitions, team.size, team.rank), team)


def _choose_folder(spec: JobSpec, options: RunOptions, team: Team) -> Path:
    if options.out is not None:
        return options.out
    return fresh_folder(spec.run.name).absolute() if team.rank == 0 else Path()


def _facts(prepared: _Prepared) -> RunFacts:
    spec, model = prepared.spec, prepared.model
    return RunFacts(
        job=spec.run.name,
        seed=spec.run.seed,
        agents=spec.run.agents,
        steps=spec.run.steps,
        params=model.params.plain(),
        model=spec.model.module,
        model_hash=model.identity(),
        executor=spec.run.executor,
        workers=worker_count(spec),
        partitions=prepared.partitions,
        fingerprint_scheme=spec.replay.fingerprint,
        command=tuple(sys.argv),
    )


def _executor(spec: JobSpec) -> Executor:
    if spec.run.executor == "threads":
        return LocalThreadedPartitionExecutor(worker_count(spec))
    if spec.run.executor == "processes":
        from rustsim_hpc.executors.processes import ProcessPartitionExecutor

        return ProcessPartitionExecutor(worker_count(spec))
    return InlinePartitionExecutor()


def _replay_mode(prepared: _Prepared) -> ReplayMode:
    table = prepared.spec.replay
    if table.verify is None:
        return ReplayMode.record(table.interval) if table.mode == "record" else ReplayMode.off()
    log = _on_all(prepared.team, lambda: read_replay_log(Path(table.verify or "")))
    return ReplayMode.verify(log.entries, log.header.interval)


# -- running -----------------------------------------------------------------------------------------


def _run(
    prepared: _Prepared,
    folder: RunFolder,
    store: DeviceSoaStore,
    step_index: int,
    loaded: LoadedCheckpoint | None,
    options: RunOptions,
) -> RunSummary:
    """Build the plane on a store, run the steps that are left, and record how it ended."""
    spec, team = prepared.spec, prepared.team
    executor = _executor(spec)
    plane: EngineControlPlane | None = None
    resumed_from = None if loaded is None else step_index
    try:
        plane = _on_all(team, lambda: _plane(prepared, store, step_index))
        run = JobRun(
            spec, prepared.model, plane, executor, folder, team,
            resumed_from=resumed_from, progress=options.progress,
        )  # fmt: skip
        result = run.run()
        fingerprint = plane.fingerprint()
        _draw(run, folder, team)
        summary = _summary(prepared, folder, run, plane, result, fingerprint.value, resumed_from)
        _on_all(team, lambda: folder.finish(
            "done" if result.stopped is None else "stopped",
            exit_code=summary.exit_code, step_index=summary.step_index,
            fingerprint=fingerprint.value, reason=result.stopped,
        ))  # fmt: skip
        return summary
    except Exception as error:
        code = error.exit_code if isinstance(error, RustsimError) else 1
        step = plane.runtime.step_index if plane is not None else step_index
        _note_failure(folder, code, step, str(error))
        raise
    finally:
        if plane is not None:
            plane.close()
        folder.release()


def _plane(prepared: _Prepared, store: DeviceSoaStore, step_index: int) -> EngineControlPlane:
    spec = prepared.spec
    config = ControlPlaneConfig(
        replay_mode=_replay_mode(prepared),
        partition_plan=PartitionPlan.row_ranges(spec.run.agents, prepared.partitions),
        guard=StepGuard(spec.run.guard),
        fingerprint=spec.replay.fingerprint,
        max_retained_checkpoints=1,
    )
    runtime = ColumnarRuntime(store, step_index, team=prepared.team)
    plane = EngineControlPlane(runtime, config)
    plane.add_model(prepared.model, checked=spec.run.check, tile_rows=spec.run.tile_rows or 0)
    return plane


def _draw(run: JobRun, folder: RunFolder, team: Team) -> None:
    def draw() -> None:
        if team.rank == 0:
            run.outputs.draw_pictures(open_run(folder.path))

    _on_all(team, draw)


def _summary(
    prepared: _Prepared,
    folder: RunFolder,
    run: JobRun,
    plane: EngineControlPlane,
    result: LoopResult,
    fingerprint: int,
    resumed_from: int | None,
) -> RunSummary:
    spec = prepared.spec
    return RunSummary(
        job=spec.run.name,
        folder=folder.path,
        steps=result.steps,
        step_index=plane.runtime.step_index,
        agents=spec.run.agents,
        ranks=prepared.team.size,
        executor=spec.run.executor,
        workers=worker_count(spec),
        partitions=prepared.partitions,
        fingerprint=fingerprint,
        fingerprint_scheme=spec.replay.fingerprint,
        seconds=result.seconds,
        checkpoints=tuple(path for path in run.writer.paths if path.exists()),
        resumed_from=resumed_from,
        outputs={name: Path(path) for name, path in run.outputs.files().items()},
        stopped=result.stopped,
    )


def _note_failure(folder: RunFolder, code: int, step: int, reason: str) -> None:
    try:
        folder.finish("failed", exit_code=code, step_index=step, reason=reason)
    except RustsimError as error:  # the failure that is being reported matters more
        sys.stderr.write(f"warning: {error}\n")


# -- resuming ----------------------------------------------------------------------------------------


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
        outputs={name: path / name for name in run.outputs},
    )


def _rows_for(prepared: _Prepared, header: Any) -> tuple[int, int]:
    """Return this rank's rows of a checkpoint that is this run's.

    Raises:
        CheckpointFileError: it is of another model, population, seed or parameters.
    """
    spec, model = prepared.spec, prepared.model
    if header.schema != model.schema:
        raise CheckpointFileError(
            f"the checkpoint of step {header.step_index} has other columns than the model", damaged=False
        )
    for what, theirs, ours in (
        ("agents", header.rows, spec.run.agents),
        ("seed", header.seed, spec.run.seed),
        ("parameters", dict(header.parameters), model.params.plain()),
        ("model source", header.model.get("identity"), model.identity()),
    ):
        if theirs != ours:
            raise CheckpointFileError(
                f"the checkpoint of step {header.step_index} is of another run: {what} {theirs}, here {ours}",
                damaged=False,
                hint="use `rustsim-hpc fork` to go on with something changed",
            )
    return prepared.part.row_start, prepared.part.row_stop


def _restored_store(prepared: _Prepared, loaded: LoadedCheckpoint) -> DeviceSoaStore:
    view, part = loaded.rows, prepared.part
    rows = part.row_stop - part.row_start
    memory = ColumnMemory(prepared.model.schema, rows, prepared.kind, with_ids=view.ids is not None)
    for column, values in enumerate(view.columns):
        memory.current(column)[:] = values
    if view.ids is not None and memory.ids is not None:
        memory.ids[:] = view.ids
    return DeviceSoaStore(memory, row_offset=part.row_start, total_rows=prepared.spec.run.agents)


def _on_all(team: Team, make: Callable[[], T]) -> T:
    """Return ``make()``, which every rank calls; if it raises on one, the same error is raised on all."""
    failure: Exception | None = None
    made: list[T] = []
    try:
        made.append(make())
    except Exception as error:  # told to all ranks
        failure = error
    agree(team, failure)
    return made[0]


def _say(team: Team, text: str) -> None:
    if team.rank == 0:
        sys.stderr.write(text + "\n")
