"""A job prepared on this rank: model bound, ranks compared, partitions chosen; nothing allocated yet."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rustsim_hpc.control.config import ControlPlaneConfig, StepGuard
from rustsim_hpc.control.control_plane import EngineControlPlane
from rustsim_hpc.control.runtime import ColumnarRuntime
from rustsim_hpc.errors import JobError, nearest
from rustsim_hpc.executors.base import Executor
from rustsim_hpc.executors.cuda import CudaPartitionExecutor
from rustsim_hpc.executors.inline import InlinePartitionExecutor
from rustsim_hpc.executors.threads import LocalThreadedPartitionExecutor
from rustsim_hpc.job.backend import Backend, choose_backend
from rustsim_hpc.job.keys import JobSpec
from rustsim_hpc.job.plan import RankPart, partition_count, rank_part, worker_count
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model_source import load_model
from rustsim_hpc.modeling.program import plan_program
from rustsim_hpc.proof.replay import ReplayMode
from rustsim_hpc.proof.replay_log import read_replay_log
from rustsim_hpc.ranks.agreement import agree_hash, on_all
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.run_folder.environment import versions
from rustsim_hpc.run_folder.record import RunFacts
from rustsim_hpc.state import cuda_found
from rustsim_hpc.state.backing import Kind
from rustsim_hpc.state.columns import DeviceSoaStore
from rustsim_hpc.state.partition import PartitionPlan, PartitionWorker
from rustsim_hpc.storage.collective import check_supported
from rustsim_hpc.storage.header import StorageOptions
from rustsim_hpc.texts import shown

if TYPE_CHECKING:
    from rustsim_hpc.remote.executor import RemotePartitionExecutor


@dataclass(frozen=True)
class Prepared:
    """A job on this rank, checked as far as it can be without allocating or writing anything."""

    spec: JobSpec
    model: BoundModel
    workers: int
    partitions: int
    part: RankPart
    team: Team
    backend: Backend

    @property
    def kind(self) -> Kind:
        """Where the columns live."""
        wanted = self.spec.run.memory
        if wanted in ("heap", "shared"):
            return wanted
        if self.backend.name == "cuda":
            return "heap"  # a mirror of the device's, for this rank alone
        return "shared" if self.team.size > 1 or self.spec.run.executor == "processes" else "heap"

    @property
    def executor(self) -> str:
        """Name of what runs the partitions."""
        return "cuda" if self.backend.name == "cuda" else self.spec.run.executor


def device_of(prepared: Prepared) -> dict[str, Any] | None:
    """Return the facts about this rank's device, None on the CPU.

    They include ``libdevice``, which identifies the device's math library.

    Raises:
        DeviceError: the driver cannot be queried.
    """
    ordinals = prepared.backend.ordinals
    if not ordinals:
        return None
    from rustsim_hpc.kernels.cuda_compile import libdevice_identity

    facts = cuda_found.device_facts(ordinals[prepared.team.rank])
    return {**facts, "libdevice": libdevice_identity()}


def bind(spec: JobSpec) -> BoundModel:
    """Load a job's model and bind it.

    Raises:
        ModelError: the model is invalid.
        JobError: the job names columns that the model does not have.
    """
    model, reference = load_model(spec.model.module)
    bound = BoundModel(model, spec.params, seed=spec.run.seed, agents=spec.run.agents, reference=reference)
    known = ("ids", *bound.schema.names)
    for name in spec.checkpoint.compression_columns or ():
        if name not in known:
            raise JobError(
                f'[checkpoint] compression_columns: there is no column "{name}"{nearest(name, known)}'
            )
    return bound


def prepare(spec: JobSpec, team: Team) -> Prepared:
    """Bind the model on every rank, check what can be checked, and compare the ranks."""

    def bind_here() -> BoundModel:
        model = bind(spec)
        plan_program(model.schema, model.phases, two_sided=True, **model.program_options())
        if spec.run.executor == "remote":
            _remote_executor(spec).require(spec.remote.endpoints)
        return model

    agree_hash(team, "set of package versions", ", ".join(f"{k} {v}" for k, v in versions().items()))
    agree_hash(team, "job file", spec.sha256())
    model = on_all(team, bind_here)
    agree_hash(team, "model source", model.identity())
    check_supported(storage_options(spec), team)
    model.share_tables(team)
    backend = choose_backend(spec, model, team)
    workers = 1 if backend.name == "cuda" else worker_count(spec, _share_of_cores(team), team.size)
    partitions = partition_count(spec, team.size, workers)
    part = rank_part(spec.run.agents, partitions, team.size, team.rank)
    return Prepared(spec, model, workers, partitions, part, team, backend)


def storage_options(spec: JobSpec) -> StorageOptions:
    """Return how a job's checkpoints are stored."""
    table = spec.checkpoint
    compression: dict[str, str] = {}
    if table.compression != "none":
        compression = dict.fromkeys(table.compression_columns or ["*"], table.compression)
    return StorageOptions(
        table.layout,
        compression,
        chunk_rows=table.chunk_rows,
        alignment=table.alignment,
        keep=table.keep,
        keep_every=table.keep_every,
        hints=table.hints,
        shards=table.shards,
    )


def _share_of_cores(team: Team) -> int:
    """Return the number of cores per rank on rank 0's machine; the same on every rank.

    A launcher that binds ranks to cores gives each its own; without binding the ranks share all cores.
    """
    mine = (team.host, frozenset(os.sched_getaffinity(0)))
    everyone = team.allgather(mine)
    here = [cores for host, cores in everyone if host == everyone[0][0]]
    return max(1, len(frozenset().union(*here)) // len(here))


def facts(prepared: Prepared, lineage: dict[str, Any] | None = None) -> RunFacts:
    """Return what a run's record says about the job."""
    spec, model = prepared.spec, prepared.model
    return RunFacts(
        job=spec.run.name,
        seed=spec.run.seed,
        agents=spec.run.agents,
        steps=spec.run.steps,
        step_length=model.step_length,
        time_unit=model.model.time_unit,
        params=model.params.plain(),
        model=spec.model.module,
        model_hash=model.identity(),
        executor=prepared.executor,
        workers=prepared.workers,
        partitions=prepared.partitions,
        fingerprint_scheme=spec.replay.fingerprint,
        command=tuple(sys.argv),
        device=device_of(prepared),
        lineage=lineage,
    )


def executor_of(prepared: Prepared, inherit: tuple[int, ...] = ()) -> Executor:
    """Return the executor of a rank's partitions; worker processes inherit the descriptors ``inherit``."""
    executor, workers = prepared.executor, prepared.workers
    if executor == "cuda":
        return CudaPartitionExecutor(fma=prepared.spec.run.fma, graphs=prepared.spec.run.cuda_graphs)
    if executor == "threads":
        return LocalThreadedPartitionExecutor(workers)
    if executor == "processes":
        from rustsim_hpc.executors.processes import ProcessPartitionExecutor

        return ProcessPartitionExecutor(workers, inherit_fds=inherit)
    if executor == "remote":
        return _remote_executor(prepared.spec)
    return InlinePartitionExecutor()


def _remote_executor(spec: JobSpec) -> RemotePartitionExecutor:
    from rustsim_hpc.remote.executor import RemotePartitionExecutor

    table = spec.remote
    return RemotePartitionExecutor(
        table.keys,
        connect_seconds=table.connect_seconds,
        answer_seconds=table.answer_seconds,
        retries=table.retries,
        rejoin_seconds=table.rejoin_seconds,
        keep_steps=table.keep_steps,
        tell=_tell,
    )


def _tell(line: str) -> None:
    sys.stderr.write(f"warning: {shown(line)}\n")


def cut_of(prepared: Prepared) -> tuple[PartitionPlan, tuple[PartitionWorker, ...]]:
    """Return the partitions of all ranks, and the workers that hold them unless they stay on the CPU.

    Partitions are assigned to the endpoints in order, so each rank talks to a few consecutive endpoints.
    With CUDA, all partitions of a rank are on its device.
    """
    spec, count = prepared.spec, prepared.partitions
    plan = PartitionPlan.row_ranges(spec.run.agents, count)
    if ordinals := prepared.backend.ordinals:
        workers = tuple(PartitionWorker.cuda_device(f"gpu-{k}", number) for k, number in enumerate(ordinals))
        parts = [rank_part(spec.run.agents, count, len(ordinals), rank) for rank in range(len(ordinals))]
        owners = [
            worker.label
            for worker, part in zip(workers, parts, strict=True)
            for _ in range(part.start, part.stop)
        ]
        return plan.with_workers(owners), workers
    if spec.run.executor != "remote":
        return plan, ()
    endpoints = spec.remote.endpoints
    workers = tuple(PartitionWorker.external(f"remote-{k}", name) for k, name in enumerate(endpoints))
    owners = [workers[place * len(workers) // count].label for place in range(count)]
    return plan.with_workers(owners), workers


def first_store(prepared: Prepared) -> DeviceSoaStore:
    """Return a store of this rank's rows of the model's first state. Collective.

    Raises:
        RustsimError: it cannot be made; the same on every rank.
    """
    model, part = prepared.model, prepared.part
    return on_all(prepared.team, lambda: model.new_store(part.row_start, part.row_stop, prepared.kind))


def plane_of(
    prepared: Prepared, store: DeviceSoaStore, step_index: int, mode: ReplayMode
) -> EngineControlPlane:
    """Return the plane that makes the job's steps from a state on. Collective.

    Raises:
        RustsimError: it cannot be configured so; the same on every rank.
    """
    run = prepared.spec.run

    def make() -> EngineControlPlane:
        partitions, workers = cut_of(prepared)
        config = ControlPlaneConfig(
            replay_mode=mode,
            partition_plan=partitions,
            partition_workers=workers,
            guard=StepGuard(run.guard),
            fingerprint=prepared.spec.replay.fingerprint,
            max_retained_checkpoints=1,
        )
        plane = EngineControlPlane(ColumnarRuntime(store, step_index, team=prepared.team), config)
        plane.add_model(prepared.model, checked=run.check, tile_rows=run.tile_rows or 0)
        return plane

    return on_all(prepared.team, make)


def replay_mode(prepared: Prepared) -> ReplayMode:
    """Return the job's replay mode. Collective.

    Raises:
        ReplayLogError: the log to verify against cannot be read.
    """
    table = prepared.spec.replay
    if table.verify is None:
        return ReplayMode.record(table.interval) if table.mode == "record" else ReplayMode.off()
    return on_all(prepared.team, lambda: read_replay_log(Path(table.verify or ""))).verify_mode()
