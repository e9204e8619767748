"""A model bound to parameter values, a seed and a number of agents, ready to be stepped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rustsim_hpc.errors import ModelError, NoSuchName, message_of, nearest
from rustsim_hpc.executors.work import Work
from rustsim_hpc.modeling.device_kernel import DeviceKernel
from rustsim_hpc.modeling.global_random import refuse_global_random
from rustsim_hpc.modeling.model import Check, Model, Output, Phase, Reduction
from rustsim_hpc.modeling.outputs import Arrays, Picture, Series, check_outputs
from rustsim_hpc.modeling.params import Params, bind_params
from rustsim_hpc.modeling.signatures import where
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.state.backing import Kind
from rustsim_hpc.state.columns import DeviceSoaStore
from rustsim_hpc.state.memory import ColumnMemory
from rustsim_hpc.state.schema import DTYPES, Schema

Array = np.ndarray[Any, Any]

_CHUNK_ROWS = 1 << 18


@dataclass(frozen=True)
class Rows:
    """A range of global rows, [start, stop), passed to ``initialise``; ``total``: rows of all ranks."""

    start: int
    stop: int
    total: int

    def __len__(self) -> int:
        return self.stop - self.start


class Results(dict[str, Any]):
    """Results of reductions and derived values by name; the error for a missing one lists them all."""

    def __missing__(self, name: str) -> Any:
        has = ", ".join(self) or "none"
        raise NoSuchName(
            f"there is no result {name} here, only: {has}; results of phases exist after the first step, "
            "others where reductions=[...] names them"
        )


@dataclass(frozen=True)
class ModelContext:
    """What checks and outputs see after a step.

    Attributes:
        step_index: steps made.
        time: ``step_index`` times the model's step length, in its time unit.
        agent_count: rows of the whole population.
        params: parameter values.
        tables: the model's tables.
        reductions: results of reductions and derived values, by name: those of the phases in the last step
            (none at the start of a run), and the reductions of the new state that checks and outputs which
            are due read.
    """

    step_index: int
    time: float
    agent_count: int
    params: Params
    tables: Mapping[str, Array]
    reductions: Mapping[str, Any]


class BoundModel:
    """A model with its parameters, tables and seed.

    Args:
        model: the model.
        params: values that differ from the defaults.
        seed: seed of all random streams.
        agents: rows of the whole population.
        reference: by which a worker process loads the model (see
            :mod:`rustsim_hpc.modeling.model_source`), or None.
        tables: the model's tables, if another process has already made them.

    Raises:
        ModelError: the model, a parameter or a table is invalid.
    """

    def __init__(
        self,
        model: Model,
        params: Mapping[str, Any],
        *,
        seed: int,
        agents: int,
        reference: Any = None,
        tables: Mapping[str, Array] | None = None,
    ) -> None:
        _require_kinds(model)
        self.model = model
        self.schema: Schema = model.schema()
        self.phases: tuple[Phase, ...] = model.phase_list()
        self.params = bind_params(model.parameters(), params)
        self.seed = seed
        self.agents = agents
        self.reference = reference
        self.checks: tuple[Check, ...] = tuple(model.checks)
        self.outputs: tuple[Output, ...] = tuple(model.outputs)
        _require(agents >= 0, f"a population cannot have {agents} agents")
        self.step_length = _step_length(model, self.params)
        for name, given in (("initialise", model.initialise), ("tables", model.tables or model.initialise)):
            _require(callable(given), f"{name} of a model must be a function, got {given!r}")
        for check in self.checks:
            _require(isinstance(check, Check), f"checks: {check!r} is not a check")
        check_outputs(self.outputs, self.schema.names)
        self.tables = _tables(model, self.params) if tables is None else dict(tables)
        for phase in (*self.phases, *self._reductions()):
            refuse_global_random(phase)
        for reduction in self._reductions():
            reduction.bin_count(self.params)

    # -- the state -----------------------------------------------------------------------------------

    def new_store(self, start: int, stop: int, kind: Kind = "heap") -> DeviceSoaStore:
        """Return a store of rows [start, stop), initialised.

        Raises:
            ModelError: ``initialise`` failed, returned arrays with wrong names, dtypes or lengths, or
                returned different values for another split of the rows.
        """
        memory = ColumnMemory(self.schema, stop - start, kind)
        for first in range(start, stop, _CHUNK_ROWS):
            last = min(first + _CHUNK_ROWS, stop)
            for column, values in enumerate(self.initialise(first, last)):
                memory.current(column)[first - start : last - start] = values
        self._require_same_cut(memory, start, stop)
        return DeviceSoaStore(memory, row_offset=start, total_rows=self.agents)

    def initialise(self, start: int, stop: int) -> list[Array]:
        """Return one array for each column for rows [start, stop), checked.

        Raises:
            ModelError: see :meth:`new_store`.
        """
        fn = self.model.initialise
        try:
            made = fn(Rows(start, stop, self.agents), self.params, self.tables, self.seed)
        except (ModelError, KeyboardInterrupt):
            raise
        except BaseException as error:
            message = f"initialise ({where(fn)}) failed for rows {start}..{stop}: {message_of(error)}"
            raise ModelError(message) from error
        arrays = self._by_column(made, fn)
        for column, array in zip(self.schema.columns, arrays, strict=True):
            if array.shape != (stop - start,):
                vector = array.ndim > 1 and len(array) == stop - start
                raise ModelError(
                    f'initialise ({where(fn)}): column "{column.name}" has shape {array.shape} for rows '
                    f"{start}..{stop}, expected ({stop - start},)",
                    hint="a column has one number a row: make a vector several columns, such as x, y, z"
                    if vector
                    else "return the values of these rows alone, one for each",
                )
            if array.dtype != np.dtype(column.dtype):
                raise ModelError(
                    f'initialise ({where(fn)}): column "{column.name}" is {array.dtype}, not {column.dtype}',
                    hint=f"convert it with .astype(np.{column.dtype})",
                )
        return arrays

    def _by_column(self, made: Any, fn: Any) -> list[Array]:
        names = self.schema.names
        if isinstance(made, Mapping):
            for name in made:
                _require(
                    name in names, f'initialise ({where(fn)}): no column "{name}"{nearest(str(name), names)}'
                )
            missing = [name for name in names if name not in made]
            _require(not missing, f"initialise ({where(fn)}) gives no values for {', '.join(missing)}")
            return [np.asarray(made[name]) for name in names]
        if isinstance(made, Sequence | np.ndarray) and len(made) == len(names):
            return [np.asarray(array) for array in made]
        raise ModelError(f"initialise ({where(fn)}) must return one array for each of {', '.join(names)}")

    def _require_same_cut(self, memory: ColumnMemory, start: int, stop: int) -> None:
        """Initialise a small range inside the rows again, and compare bits."""
        if stop - start < 2:
            return
        first = start + (stop - start) // 3
        last = min(stop, first + 1000)
        for column, values in enumerate(self.initialise(first, last)):
            kept = memory.current(column)[first - start : last - start]
            if kept.tobytes() != values.tobytes():
                raise ModelError(
                    f"initialise ({where(self.model.initialise)}) gives column "
                    f'"{self.schema.names[column]}" other values for rows {first}..{last} alone than as '
                    "a part of more rows",
                    hint="make each row's values from its global row number alone",
                )

    def share_tables(self, team: Team) -> None:
        """Share the tables of each node's first rank, read-only for the node's other ranks. Collective.

        Raises:
            TeamError: a node has no memory for them.
        """
        if team.size > 1:
            self.tables = {name: team.node_shared_array(table) for name, table in sorted(self.tables.items())}

    # -- the program ---------------------------------------------------------------------------------

    def program_options(self) -> dict[str, Any]:
        """Return the model's arguments of :func:`~rustsim_hpc.modeling.program.plan_program`."""
        numeric = [name for name, value in self.params.items() if not isinstance(value, str)]
        return {
            "params": numeric,
            "texts": [name for name in self.params if name not in numeric],
            "tables": self.tables,
            "checks": self.checks,
            "outputs": self.outputs,
        }

    def bind_work(self, work: Work) -> None:
        """Give a rank's work the model's parameters, tables, seed and reference."""
        work.params, work.tables, work.seed, work.model = self.params, self.tables, self.seed, self.reference

    @cached_property
    def looks_at_steps(self) -> bool:
        """Whether there is any check, or any reduction of checks and outputs."""
        return bool(self.checks) or any(owner.reductions for owner in self._observers)

    def looks_at(self, step: int) -> bool:
        """Return whether a check or an output is due for the state after ``step`` steps."""
        owners = (*self.checks, *(output for output in self.outputs if not isinstance(output, Picture)))
        return any(step % owner.every == 0 for owner in owners)

    def _reductions(self) -> list[Reduction]:
        found = [phase for phase in self.phases if isinstance(phase, Reduction)]
        return [
            *found,
            *(r for owner in self._observers for r in owner.reductions if isinstance(r, Reduction)),
        ]

    @cached_property
    def _observers(self) -> tuple[Any, ...]:
        outputs = (output for output in self.outputs if isinstance(output, Series | Arrays))
        return (*self.checks, *outputs)

    def context(self, step: int, values: Mapping[str, Any]) -> ModelContext:
        """Return what checks and outputs see after ``step`` steps."""
        time = step * self.step_length
        return ModelContext(step, time, self.agents, self.params, self.tables, Results(values))

    def identity(self) -> str:
        """Return a SHA-256 (hex) over the model's functions, columns and declarations.

        Runs with equal identity, parameters, seed and agents compute the same.
        """
        from rustsim_hpc.modeling.source_identity import function_identity

        digest = hashlib.sha256()
        for column in self.schema.columns:
            digest.update(f"{column.name}\0{column.dtype}\0".encode())
        functions: list[Any] = [self.model.initialise, *([self.model.tables] if self.model.tables else [])]
        for phase in self.phases:
            declared = {name: value for name, value in vars(phase).items() if not name.startswith("__")}
            facts = [
                (name, value) for name, value in declared.items() if isinstance(value, str | int | tuple)
            ]
            kernels = [value.identity for value in declared.values() if isinstance(value, DeviceKernel)]
            facts += [("device", text) for text in kernels]
            digest.update(f"{type(phase).__name__}\0{facts}\0".encode())
            functions += [value for value in declared.values() if callable(value)]
        for fn in functions:
            digest.update(function_identity(fn).encode())
        for name, table in sorted(self.tables.items()):
            digest.update(f"{name}\0{table.dtype}\0{table.shape}\0".encode())
            digest.update(np.ascontiguousarray(table).tobytes())
        return digest.hexdigest()


def _step_length(model: Model, params: Params) -> float:
    """Return the time that a step stands for.

    Raises:
        ModelError: it is not a positive number, or its function failed.
    """
    length: Any = model.step_length
    if callable(length):
        try:
            length = length(params)
        except Exception as error:
            raise ModelError(f"step_length failed: {message_of(error)}") from error
    number = isinstance(length, int | float | np.number)
    _require(
        number, f"step_length of a model must be a number, or a function that returns one, got {length!r}"
    )
    _require(length > 0, f"step_length must be positive, got {length}")
    return float(str(length)) if isinstance(length, np.floating) else float(length)


def _tables(model: Model, params: Params) -> dict[str, Array]:
    """Return the model's tables, contiguous and read-only.

    Raises:
        ModelError: ``tables`` failed, or returned something that kernels cannot index.
    """
    if model.tables is None:
        return {}
    try:
        made = model.tables(params)
    except (ModelError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ModelError(f"tables ({where(model.tables)}) failed: {message_of(error)}") from error
    _require(isinstance(made, Mapping), f"tables ({where(model.tables)}) must return a dict of arrays")
    tables = {}
    for name, value in made.items():
        array = _as_array(name, value, model.tables)
        if array.dtype.name not in DTYPES or not array.dtype.isnative:
            raise ModelError(
                f'table "{name}" ({where(model.tables)}) is {array.dtype}: tables may be {", ".join(DTYPES)}'
            )
        if np.ndim(value) == 0:
            raise ModelError(
                f'table "{name}" ({where(model.tables)}) is a single number, not an array',
                hint="make it a parameter, or an array of one",
            )
        view = array.view()
        view.flags.writeable = False
        tables[str(name)] = view
    return tables


def _as_array(name: Any, value: Any, fn: Any) -> Array:
    try:
        return np.ascontiguousarray(value)
    except ValueError as error:  # rows of different lengths
        raise ModelError(f'table "{name}" ({where(fn)}) is not an array: {error}') from error


def _require_kinds(model: Model) -> None:
    """Raise ModelError if a field of a model does not have its declared type."""
    sequences = ("columns", "phases", "checks", "outputs")
    wanted: list[tuple[str, Any, str]] = [(name, Sequence, "a list") for name in sequences]
    wanted += [("params", Mapping, "a dict")]
    for name, kind, what in wanted:
        value = getattr(model, name)
        _require(isinstance(value, kind), f"{name} of a model must be {what}, got {value!r}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ModelError(message)
