"""The start message of a worker process, and how the worker rebuilds its parent's work from it.

Phases are sent as a reference to the model's source, never as code.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rustsim_hpc.errors import ExecutorError, ModelError, Worker
from rustsim_hpc.executors.work import Task, Work
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model_source import ModelReference, load_model
from rustsim_hpc.modeling.params import Params
from rustsim_hpc.modeling.program import Program, plan_program
from rustsim_hpc.state.memory import ColumnMemory, MemoryLayout
from rustsim_hpc.state.shared_arrays import ArraysLayout

RUNNING, COMPILE_NS = 0, 1
"""Fields of a worker's row of words: index of the running task (-1: none), nanoseconds of compiling."""

IDLE = -1

SHOW_STACKS = signal.SIGUSR2
"""Signal that makes a worker print its stacks, even from compiled code, and continue."""


@dataclass(frozen=True)
class WorkerStart:
    """The start message of a worker.

    Attributes:
        number: its index among the session's workers.
        places: its partitions, as indices of ``tasks``.
        reference, params, seed: the model.
        phase_names: names of the phases of the parent's program.
        two_sided: the program is planned for the rollback guard.
        tasks, first_row, total_rows, checked, tile_rows: as in :class:`~rustsim_hpc.executors.work.Work`.
        columns: layout of the columns.
        arrays: layout of the board, a row of int64 words for each worker, and the tables, in this order.
        tables: names of the tables.
        module_paths: the parent's ``sys.path``.
        core: the core to pin to, or None.
        inherited: descriptors that are held open and not used (the lock of the run's folder).
    """

    number: int
    places: range
    reference: ModelReference
    params: Params
    seed: int
    phase_names: tuple[str, ...]
    two_sided: bool
    tasks: tuple[Task, ...]
    first_row: int
    total_rows: int
    checked: bool
    tile_rows: int
    columns: MemoryLayout
    arrays: ArraysLayout
    tables: tuple[str, ...]
    module_paths: tuple[str, ...]
    core: int | None
    inherited: tuple[int, ...]


def worker_starts(
    work: Work, shares: Sequence[range], arrays: ArraysLayout, *, pin: bool, inherited: Sequence[int]
) -> list[WorkerStart]:
    """Return the start messages of a rank's workers, one for each share of the tasks.

    Raises:
        ExecutorError: the phases are not entries of a model that another process can load.
        ColumnMemoryError: the columns are not in shared memory.
    """
    cores = sorted(os.sched_getaffinity(0)) if pin else []
    return [
        WorkerStart(
            number=number,
            places=places,
            reference=_reference(work),
            params=work.params,
            seed=work.seed,
            phase_names=work.program.phase_names,
            two_sided=bool(work.program.swapped),
            tasks=work.tasks,
            first_row=work.first_row,
            total_rows=work.total_rows,
            checked=work.checked,
            tile_rows=work.tile_rows,
            columns=work.memory.handles(),
            arrays=arrays,
            tables=tuple(work.tables),
            module_paths=tuple(sys.path),
            core=cores[number % len(cores)] if cores else None,
            inherited=tuple(inherited),
        )
        for number, places in enumerate(shares)
    ]


def _reference(work: Work) -> ModelReference:
    if not isinstance(work.model, ModelReference):
        name = next(iter(work.program.phase_names), "")
        partition = work.tasks[0].assignment.partition_id
        raise ExecutorError(
            Worker(
                partition,
                f'phase "{name}" is not an entry of a model that a worker process could load',
                phase=name,
                hint="make it a phase of a model in a module of its own, and bind what load_model returns, "
                "its reference included",
            )
        )
    module = work.model.module
    if module.endswith(".py"):
        module = str(Path(module).resolve())
    return ModelReference(module, work.model.sha256)


def rebuild_work(start: WorkerStart, tables: Mapping[str, Any]) -> Work:
    """Plan the parent's program again from the model's source.

    Raises:
        ModelError: the source has changed, or does not have the phases of the run.
    """
    model, reference = load_model(start.reference.module, start.reference.sha256)
    bound = BoundModel(
        model, start.params, seed=start.seed, agents=start.total_rows, reference=reference, tables=tables
    )
    program = plan_program(bound.schema, bound.phases, two_sided=start.two_sided, **bound.program_options())
    _require_same(program, start)
    memory = ColumnMemory.attach(start.columns)
    ids = None if memory.ids is None else memory.ids.view()
    if ids is not None:
        ids.flags.writeable = False  # as in the parent: to Numba, read-only arrays have another type
    work = Work(
        program=program,
        memory=memory,
        ids=ids,
        first_row=start.first_row,
        total_rows=start.total_rows,
        tasks=start.tasks,
        checked=start.checked,
        tile_rows=start.tile_rows,
    )
    bound.bind_work(work)
    return work


def _require_same(program: Program, start: WorkerStart) -> None:
    known, module = set(program.phase_names), start.reference.module
    for name in start.phase_names:
        if name not in known:
            raise ModelError(f'phase "{name}" is not one of the model {module}, so no worker process has it')
    if program.phase_names != start.phase_names or program.schema != start.columns.schema:
        raise ModelError(f"the model {module} has other phases or columns here than in the run")
