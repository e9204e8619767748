"""Bind the arguments of row functions and derived values by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rustsim_hpc.errors import ModelError, nearest
from rustsim_hpc.modeling.model import ColumnPhase, Derive, Phase, RowKernel
from rustsim_hpc.modeling.signatures import where

RESERVED = ("step", "row", "id", "rng")
"""Names bound in every row function: step index before the step, global row, id, random stream."""

AGENTS = "agents"
"""Bound to the number of agents (int64), unless the model has something else of that name."""

Source = Literal["column", "param", "table", "value", "step", "row", "id", "rng"]

_ROW_SOURCES: dict[str, Source] = {"step": "step", "row": "row", "id": "id", "rng": "rng"}


@dataclass
class Names:
    """The names of one program.

    Attributes:
        columns, params, tables: names of each kind.
        texts: parameters that are text, which kernels cannot take.
        made: every result of a phase, with the phase's name.
        ready: those results that are available so far.

    Raises:
        ModelError: a name is ambiguous.
    """

    columns: tuple[str, ...]
    params: tuple[str, ...]
    texts: tuple[str, ...]
    tables: tuple[str, ...]
    made: dict[str, str]
    ready: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        owner: dict[str, str] = dict.fromkeys(RESERVED, "a name that the engine binds")
        groups = (
            ("a column", self.columns),
            ("a parameter", (*self.params, *self.texts)),
            ("a table", self.tables),
            ("a result", tuple(self.made)),
        )
        for what, names in groups:
            for name in names:
                if name in owner:
                    raise ModelError(
                        f'"{name}" is both {owner[name]} and {what}: give one of them another name'
                    )
                owner[name] = what

    def source(self, phase: Phase, name: str, fn: Callable[..., Any]) -> Source:
        """Return what an argument of a row function is bound to.

        Raises:
            ModelError: the name is unknown, not available yet, or a text.
        """
        if name in self.columns:
            return "column"
        if name in _ROW_SOURCES:
            return _ROW_SOURCES[name]
        if name in self.params:
            return "param"
        if name in self.tables:
            return "table"
        if name in self.ready:
            return "value"
        if name in self.texts:
            raise ModelError(
                f'{phase.name} ({where(fn)}) takes the parameter "{name}", which is text: '
                "row functions take numbers",
                phase=phase.name,
            )
        if name == AGENTS and name not in self.made:
            return "param"
        raise self._unknown(
            phase, name, fn, (*self.columns, *self.params, *self.tables, *RESERVED, AGENTS), "a column, "
        )

    def check_derivable(self, phase: Derive, pending: set[str]) -> None:
        """Check that a derived value's arguments are available; ``pending`` results count as available.

        Raises:
            ModelError: a name is unknown, or not available yet.
        """
        known = (*self.params, *self.texts, *self.tables, "step")
        for name in phase.arguments:
            if name in known or name in self.ready or name in pending:
                continue
            if name != AGENTS or name in self.made:
                raise self._unknown(phase, name, phase.fn, (*known, AGENTS), "")

    def column(self, phase: Phase, name: str) -> int:
        """Return the index of a column that a phase writes.

        Raises:
            ModelError: there is no column of that name.
        """
        if name not in self.columns:
            raise ModelError(
                f'{phase.name} ({where(phase.fn)}) writes "{name}", which is not a column'
                f"{nearest(name, self.columns)}",
                phase=phase.name,
            )
        return self.columns.index(name)

    def _unknown(
        self, phase: Phase, name: str, fn: Callable[..., Any], known: Sequence[str], also: str
    ) -> ModelError:
        if name in self.made:
            return ModelError(
                f'{phase.name} ({where(fn)}) reads "{name}" before phase {self.made[name]} makes it',
                phase=phase.name,
                hint=f"move phase {self.made[name]} before {phase.name}",
            )
        if name in self.columns:
            return ModelError(
                f'{phase.name} ({where(fn)}) takes the column "{name}": a derived value has no rows',
                phase=phase.name,
                hint="reduce the column to a number first (@rs.reduction), and take that by its name",
            )
        near = nearest(name, (*known, *self.made))
        return ModelError(
            f'{phase.name} ({where(fn)}) takes an argument "{name}" that is not {also}a parameter, a table '
            f"or an earlier result{near}",
            phase=phase.name,
            hint=None if near else f"it may take {', '.join(dict.fromkeys((*known, *sorted(self.ready))))}",
        )


def made_names(phases: Sequence[Phase]) -> dict[str, str]:
    """Return the name of every result of the phases, with the name of its phase.

    Raises:
        ModelError: two phases make results of the same name.
    """
    made: dict[str, str] = {}
    for phase in phases:
        if isinstance(phase, RowKernel | ColumnPhase):
            continue
        for name in phase.names if isinstance(phase, Derive) else (phase.name,):
            if name in made:
                raise ModelError(f'two phases, {made[name]} and {phase.name}, make a value named "{name}"')
            made[name] = phase.name
    return made
