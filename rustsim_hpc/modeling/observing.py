"""When the reductions of checks and outputs are due: at the steps of each check or output that reads them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from rustsim_hpc.errors import ModelError
from rustsim_hpc.modeling.model import Check, Output, Reduction
from rustsim_hpc.modeling.outputs import Arrays, Series
from rustsim_hpc.modeling.source_identity import is_installed, names_in

Intervals = tuple[int, ...]
"""Numbers of steps, ascending, none of them a multiple of another: due where one divides the step index."""


def observed_reductions(checks: Sequence[Check], outputs: Sequence[Output]) -> dict[Reduction, Intervals]:
    """Return the reductions that checks and outputs ask for, in their order, and when each is due.

    A check or output reads those that it declares. It also reads one that only another declares, if its
    function, or one that it calls, has that reduction or its name: it may look that up at each of its steps.

    Raises:
        ModelError: something declared is not a reduction.
    """
    owners = [owner for owner in (*checks, *outputs) if isinstance(owner, Check | Series | Arrays)]
    every: dict[Reduction, set[int]] = {}
    for owner in owners:
        for reduction in owner.reductions:
            if not isinstance(reduction, Reduction):
                raise ModelError(f"{owner!r}: {reduction!r} is not a reduction")
            every.setdefault(reduction, set()).add(int(owner.every))
    for owner in owners if len({owner.every for owner in owners}) > 1 else ():
        mentioned = _mentioned(_functions(owner))
        for reduction, steps in every.items():
            if reduction.name in mentioned:
                steps.add(int(owner.every))
    return {reduction: _shortest(steps) for reduction, steps in every.items()}


def is_due(every: Intervals, step: int) -> bool:
    """Return whether what has these intervals is due for the state after ``step`` steps."""
    return any(step % steps == 0 for steps in every)


def _shortest(every: set[int]) -> Intervals:
    """Return the intervals without those that another one covers, so that equal demands compare equal."""
    return tuple(n for n in sorted(every) if not any(n % m == 0 for m in every if m < n))


def _functions(owner: Check | Series | Arrays) -> Iterable[Any]:
    if isinstance(owner, Check):
        return (owner.fn,)
    if isinstance(owner, Series):
        return (owner.row,)
    return owner.arrays.values() if isinstance(owner.arrays, Mapping) else (owner.arrays,)


def _mentioned(functions: Iterable[Any]) -> set[str]:
    """Return the strings, and the names of reductions, in functions and in what they name of the model."""
    found: set[str] = set()
    seen: dict[int, Any] = {}
    left = list(functions)
    while left:
        value = left.pop()
        if isinstance(value, str):
            found.add(value)
        elif isinstance(value, Reduction):
            found.add(value.name)
        elif id(value) not in seen:
            seen[id(value)] = value  # kept, so that nothing else gets its id
            left += _parts(value)
    return found


def _parts(value: Any) -> Iterable[Any]:
    """Return what a function refers to: constants, defaults, and what its names stand for in the model."""
    if isinstance(value, tuple | frozenset):
        return value
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, MethodType):
        return (value.__func__,)
    if isinstance(value, CodeType):
        return value.co_consts
    if not isinstance(value, FunctionType):  # what a decorator has made of one?
        return (getattr(value, "__dict__", {}).get("__wrapped__"),)
    if not _of_the_model(value.__module__, value.__code__.co_filename):
        return ()
    names, captured = names_in(value.__code__), []
    for cell in value.__closure__ or ():
        with contextlib.suppress(ValueError):  # not set yet
            captured.append(cell.cell_contents)
    named = [value.__globals__[name] for name in names if name in value.__globals__]
    for module in [part for part in (*named, *captured) if isinstance(part, ModuleType)]:
        if _of_the_model(module.__name__, getattr(module, "__file__", None)):
            named += [vars(module)[name] for name in names if name in vars(module)]
    defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    return (value.__code__, *captured, *named, *defaults)


def _of_the_model(module: str | None, path: str | None) -> bool:
    ours = (module or "").partition(".")[0] == "rustsim_hpc"
    return path is not None and not ours and not is_installed(path)
