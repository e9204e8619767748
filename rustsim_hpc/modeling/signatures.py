"""Inspect the arguments and return values of users' functions."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

from rustsim_hpc.errors import ModelError

Function = Callable[..., Any]


def where(fn: Function) -> str:
    """Return ``file:line`` of a function, for error messages."""
    code = getattr(inspect.unwrap(fn), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "not a Python function"


def argument_names(fn: Function, what: str) -> tuple[str, ...]:
    """Return the names of a function's arguments, by which the engine binds them.

    Raises:
        ModelError: it is not a plain Python function, or has ``*args``, ``**kwargs``, keyword-only arguments
            or defaults, which cannot be bound.
    """
    if not isinstance(fn, FunctionType):
        raise ModelError(f"{what} {getattr(fn, '__name__', fn)!r} must be a plain Python function")
    names = []
    # The function itself is compiled, not the one that a decorator names as wrapped.
    for parameter in inspect.signature(fn, follow_wrapped=False).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ModelError(
                f"{what} {fn.__name__} ({where(fn)}) takes *{parameter.name}: arguments are bound by name, "
                "and passed by position",
                hint="name each column and parameter that it needs",
            )
        if parameter.default is not parameter.empty:
            raise ModelError(
                f"{what} {fn.__name__} ({where(fn)}) gives its argument {parameter.name} a default",
                hint="declare it as a parameter of the model instead",
            )
        names.append(parameter.name)
    return tuple(names)


def raised_at(error: BaseException, fn: Function) -> str | None:
    """Return where in the file of a user's function an exception was raised, or None."""
    import traceback

    code = getattr(inspect.unwrap(fn), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__) if code else ()
    found = [frame for frame in frames if code and frame.filename == code.co_filename]
    return f"raised at {found[-1].filename}:{found[-1].lineno}: {found[-1].line}" if found else None


def returned_keys(fn: Function) -> tuple[str, ...]:
    """Return the keys of the dict literal that a function returns, or () for anything else."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    except (OSError, SyntaxError, TypeError):
        return ()
    open_nodes: list[ast.AST] = list(tree.body[0].body) if isinstance(tree.body[0], ast.FunctionDef) else []
    while open_nodes:
        node = open_nodes.pop(0)
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue  # ignore the return statements of inner functions
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict):
            keys = node.value.keys
            if keys and all(isinstance(k, ast.Constant) and isinstance(k.value, str) for k in keys):
                return tuple(str(k.value) for k in keys if isinstance(k, ast.Constant))
        open_nodes += ast.iter_child_nodes(node)
    return ()
