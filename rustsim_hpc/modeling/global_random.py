"""Refuse row functions that draw from a global random generator of the process, such as numpy.random.

Numba compiles them, but their numbers depend on what other threads have drawn before: runs are not
reproducible.
"""

from __future__ import annotations

import dis
import random
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from rustsim_hpc.errors import ModelError
from rustsim_hpc.modeling.model import Derive, Phase, Reduction, RowKernel
from rustsim_hpc.modeling.signatures import Function, where
from rustsim_hpc.modeling.source_identity import undecorated

_METHODS: dict[str, Any] = {"numpy.random": np.random.rand, "random": random.seed}
_SHARED = {id(method.__self__): name for name, method in _METHODS.items()}
"""The generators that functions like ``numpy.random.rand`` are methods of, by identity."""


def refuse_global_random(phase: Phase) -> None:
    """Check that a phase does not draw from a global random generator.

    Column phases are arbitrary Python and are not checked.

    Raises:
        ModelError: a row function, a derived value, or a helper that it calls does; names the location.
    """
    if not isinstance(phase, RowKernel | Reduction | Derive):
        return
    functions = [phase.fn]
    if isinstance(phase, Reduction) and callable(phase.key):
        functions.append(phase.key)
    for fn in functions:
        for owner, name in _drawn(fn, set()):
            raise ModelError(
                f"{phase.name} draws from {name} ({where(owner)}): its numbers would differ from run to run",
                phase=phase.name,
                hint="take the argument rng, and draw from rs.random (docs/random.md)",
            )


def _drawn(fn: Function, seen: set[Any]) -> Iterator[tuple[Function, str]]:
    """Yield (offending function, name of what it draws from) for a function and those that it calls."""
    function = undecorated(fn)
    if not isinstance(function, FunctionType) or function in seen:
        return
    seen.add(function)
    for value in _named(function, function.__code__):
        shared = _SHARED.get(id(getattr(value, "__self__", None)))
        if shared is not None:
            yield function, f"{shared}.{getattr(value, '__name__', '')}"
        elif not isinstance(value, ModuleType):
            yield from _drawn(value, seen)


def _named(function: FunctionType, code: CodeType) -> Iterator[Any]:
    """Yield the values of the globals and captured names in a function's code, and of modules' attributes."""
    captured = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    value: Any = None
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = function.__globals__.get(name)
        elif instruction.opname == "LOAD_DEREF" and name in captured:
            value = _content(captured[name])
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, ModuleType):
            value = getattr(value, name, None)
        else:
            value = None
        if value is not None:
            yield value
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _named(function, constant)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None
