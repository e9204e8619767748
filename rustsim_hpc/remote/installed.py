"""The models that a worker has installed, and the work that a request asks of them: never a client's code."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rustsim_hpc.errors import RustsimError
from rustsim_hpc.executors.work import Task, Work
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model import Model, Phase
from rustsim_hpc.modeling.model_source import ModelReference, load_model
from rustsim_hpc.modeling.params import Params
from rustsim_hpc.modeling.program import Program, plan_program
from rustsim_hpc.modeling.reductions import state_shapes
from rustsim_hpc.remote.identity import work_identity
from rustsim_hpc.remote.messages import unpacked_params
from rustsim_hpc.state.memory import ColumnMemory
from rustsim_hpc.state.partition import PartitionAssignment, PartitionExecutionBackend, PartitionId
from rustsim_hpc.version import __version__

_KEPT = 4
_SHORT = 12


class NotHere(Exception):
    """A request that this worker cannot serve; ``code`` is that of the refusal."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class InstalledModels:
    """Models by the hash of their source.

    Args:
        modules: paths of Python files, or importable names.

    Raises:
        ModelError: one of them cannot be loaded.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._models: dict[str, tuple[Model, ModelReference]] = {}
        # Making a model's tables may take long: the newest few are kept.
        self._bound: OrderedDict[tuple[Any, ...], BoundModel] = OrderedDict()
        for module in modules:
            found = str(Path(module).resolve()) if module.endswith(".py") else module
            model, reference = load_model(found)
            self._models[reference.sha256] = (model, reference)

    def __str__(self) -> str:
        return ", ".join(f"{ref.module} ({ref.sha256[:_SHORT]}…)" for _, ref in self._models.values())

    def work_for(self, wanted: Mapping[str, Any], room: int) -> Work:
        """Return the work that a request "open" asks for, its columns not loaded yet.

        Args:
            wanted: fields of the request.
            room: bytes that it may take.

        Raises:
            NotHere: another model, version or population than it says, or no room.
        """
        if wanted["package"] != __version__:
            raise NotHere("version", f"rustsim-hpc {__version__} runs here, {wanted['package']} there")
        bound = self._bind(wanted)
        program = _program(bound, wanted)
        tasks = _tasks(wanted)
        memory = _memory(program, wanted, tasks, bound.params, room)
        ids = None if memory.ids is None else memory.ids.view()
        if ids is not None:
            ids.flags.writeable = False  # as at the client: kernels are compiled for one kind or the other
        work = Work(
            program=program,
            memory=memory,
            ids=ids,
            first_row=wanted["first_row"],
            total_rows=wanted["total_rows"],
            tasks=tasks,
            checked=wanted["checked"],
            tile_rows=wanted["tile_rows"],
        )
        bound.bind_work(work)
        if work_identity(work) != wanted["identity"]:
            module = self._models[wanted["model"]][1].module
            text = f"the model {module} is the same file here, but its helpers, tables or parameters are not"
            raise NotHere("model", text)
        return work

    def _bind(self, wanted: Mapping[str, Any]) -> BoundModel:
        found = self._models.get(wanted["model"])
        if found is None:
            text = f"no model with the source {wanted['model'][:_SHORT]}… is installed here, only {self}"
            raise NotHere("model", text)
        model, reference = found
        params, seed, agents = unpacked_params(wanted["params"]), wanted["seed"], wanted["total_rows"]
        key = (reference.sha256, repr(sorted(params.items())))
        known = self._bound.get(key)
        try:
            tables = None if known is None else known.tables
            bound = BoundModel(model, params, seed=seed, agents=agents, reference=reference, tables=tables)
        except RustsimError as error:
            raise NotHere("model", str(error)) from error
        self._bound[key] = bound
        self._bound.move_to_end(key)
        if len(self._bound) > _KEPT:
            self._bound.popitem(last=False)
        return bound


def _program(bound: BoundModel, wanted: Mapping[str, Any]) -> Program:
    options = bound.program_options()
    if not wanted["observers"]:
        options |= {"checks": (), "outputs": ()}
    try:
        phases = chosen_phases(bound, wanted["phases"])
        program = plan_program(bound.schema, phases, two_sided=wanted["two_sided"], **options)
    except (RustsimError, KeyError) as error:
        raise NotHere("model", f"no such phases here: {error}") from error
    if [[column.name, column.dtype] for column in bound.schema.columns] != wanted["columns"]:
        raise NotHere("model", "the model has other columns here")
    return program


def chosen_phases(bound: BoundModel, names: Sequence[str]) -> tuple[Phase, ...]:
    """Return a model's phases by their names, in the order of the names.

    Raises:
        KeyError: it has none of a name.
    """
    if list(names) == [phase.name for phase in bound.phases]:
        return bound.phases
    by_name = {phase.name: phase for phase in bound.phases}
    return tuple(by_name[name] for name in names)


def _tasks(wanted: Mapping[str, Any]) -> tuple[Task, ...]:
    """Return the partitions, which follow one another from the first row to the last."""
    first, row, tasks = wanted["first_row"], wanted["first_row"], []
    backend = PartitionExecutionBackend.external(wanted["endpoint"])
    for partition, worker, start, stop in wanted["tasks"]:
        if start != row or stop < start:
            raise NotHere("limits", f"partition {partition} does not follow the one before it")
        assignment = PartitionAssignment(PartitionId(partition), start, stop, worker)
        tasks.append(Task(assignment, backend, start - first, stop - first))
        row = stop
    if not tasks or row - first != wanted["rows"] or row > wanted["total_rows"]:
        raise NotHere("limits", "the partitions are not the rows that the request speaks of")
    return tuple(tasks)


def _board_bytes(program: Program, shapes: Sequence[tuple[int, ...]]) -> int:
    """Return about what a partition takes on the board, in Python's integers, which never overflow."""
    words = len(program.phase_names) + len(program.schema) + len(program.reductions) + 64
    return 8 * (words + sum(math.prod(shape) for shape in shapes))


def _memory(
    program: Program, wanted: Mapping[str, Any], tasks: Sequence[Task], params: Params, room: int
) -> ColumnMemory:
    """Return memory for the columns, once it is known that they and the reductions fit into ``room``."""
    rows = wanted["rows"]
    try:
        shapes = state_shapes(program, [reduction.bin_count(params) for reduction in program.reductions])
    except RustsimError as error:
        raise NotHere("model", str(error)) from error
    sides = 2 if program.swapped else 1
    need = rows * (program.schema.row_bytes * sides + (8 if wanted["ids"] else 0))
    need += len(tasks) * _board_bytes(program, shapes)
    if need > room:
        raise NotHere("limits", f"{need:,} bytes are asked for, {max(0, room):,} are left here")
    try:
        return ColumnMemory(program.schema, rows, "heap", with_ids=wanted["ids"])
    except RustsimError as error:
        raise NotHere("limits", str(error)) from error
