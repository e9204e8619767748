"""Where a job's partitions run: on the CPU, or each rank's on its own CUDA device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rustsim_hpc.errors import JobError
from rustsim_hpc.job.keys import JobSpec
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.device_kernel import DeviceKernel
from rustsim_hpc.modeling.model import ColumnPhase
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.state import cuda_found


@dataclass(frozen=True)
class Backend:
    """The chosen backend, the same on every rank.

    ordinals: for each rank the index of its device among those visible to it; empty on the CPU.
    """

    name: Literal["cpu", "cuda"] = "cpu"
    ordinals: tuple[int, ...] = ()


def choose_backend(spec: JobSpec, model: BoundModel, team: Team) -> Backend:
    """Return where a job runs. Collective.

    ``auto`` chooses CUDA if every rank has a device, CuPy and a compiler, and the model's phases can run
    there.

    Raises:
        JobError: CUDA is required but unavailable; device memory is requested without CUDA; or ranks would
            share a device without ``share_devices``.
    """
    run = spec.run
    if run.backend == "cuda" and run.executor == "remote":
        raise JobError(
            "[run] backend = cuda does not go with executor = remote",
            hint="mixed plans are built in Python (docs/gpu.md)",
        )
    if run.backend == "cpu" or run.executor == "remote":
        return _on_the_cpu(spec, model)
    mine = team.host, cuda_found.visible_devices(), _obstacle(model)
    everyone = team.allgather(mine)
    obstacles = [(rank, text) for rank, (_, _, text) in enumerate(everyone) if text]
    if obstacles:
        rank, text = obstacles[0]
        where = f" (rank {rank} on {everyone[rank][0]})" if team.size > 1 else ""
        if run.backend == "cuda":
            raise JobError(f"[run] backend = cuda: {text}{where}")
        if all(found for _, found, _ in everyone) and team.rank == 0:
            sys.stderr.write(f"runs on the CPU, although there are CUDA devices: {text}{where}\n")
        return _on_the_cpu(spec, model, text)
    return Backend("cuda", _ordinals(everyone, share=run.share_devices))


def _on_the_cpu(spec: JobSpec, model: BoundModel, why: str = "") -> Backend:
    for phase in model.phases:
        if isinstance(phase, ColumnPhase) and phase.device_only:
            raise JobError(f'phase "{phase.name}" runs on CUDA devices alone{f": {why}" if why else ""}')
    if spec.run.memory == "device":
        raise JobError("[run] memory = device needs backend = cuda")
    return Backend()


def _obstacle(model: BoundModel) -> str:
    """Return in one line why this rank cannot run a model on CUDA, or "" if it can."""
    if problem := cuda_found.why_no_device():
        return problem
    for phase in model.phases:
        if isinstance(phase, ColumnPhase) and phase.device is None:
            return f'phase "{phase.name}" is a column phase for the CPU: it needs device= (docs/gpu.md)'
        if isinstance(phase, ColumnPhase) and isinstance(phase.device, DeviceKernel):
            kernel = phase.device
            if problem := kernel.problem(model.schema, phase.writes, model.params, model.tables):
                return f'phase "{phase.name}": {problem}'
    from rustsim_hpc.kernels.cuda_compile import why_no_compiler

    return why_no_compiler()


def _ordinals(everyone: Sequence[tuple[str, tuple[str, ...], str]], *, share: bool) -> tuple[int, ...]:
    ordinals = [0] * len(everyone)
    for host in dict.fromkeys(name for name, _, _ in everyone):
        ranks = [rank for rank, (name, _, _) in enumerate(everyone) if name == host]
        visible = [everyone[rank][1] for rank in ranks]
        for place, (rank, found) in enumerate(zip(ranks, one_each(visible), strict=True)):
            if found is None and not share:
                count = len({name for names in visible for name in names})
                raise JobError(
                    f"{len(ranks)} ranks on {host} would share {count} CUDA device{'s' if count > 1 else ''}",
                    hint="start one rank a device, or say [run] share_devices = true",
                )
            ordinals[rank] = place % len(visible[place]) if found is None else found
    return tuple(ordinals)


def one_each(visible: Sequence[Sequence[str]]) -> list[int | None]:
    """Assign each rank of a machine its own device among those visible to it; None where none is left.

    Ranks that see the same devices take them in order. A rank that sees few (Slurm binds tasks to devices)
    makes one that sees more take another.

    Args:
        visible: for each rank the devices that it sees, by names that are unique on the machine.
    """
    owner: dict[str, int] = {}

    def take(rank: int, tried: set[str]) -> bool:
        for name in visible[rank]:
            if name not in owner:
                owner[name] = rank
                return True
        for name in visible[rank]:
            if name not in tried:
                tried.add(name)
                if take(owner[name], tried):
                    owner[name] = rank
                    return True
        return False

    for rank in range(len(visible)):
        take(rank, set())
    taken = {rank: name for name, rank in owner.items()}
    return [list(names).index(taken[k]) if k in taken else None for k, names in enumerate(visible)]
