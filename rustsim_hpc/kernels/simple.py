"""Decide which row kernels can share a loop: those that only compute, in a way that vectorises.

Rows are independent, so a loop that applies several kernels to each row gives the same bits as one loop for
each kernel, and keeps intermediate values in registers. But a kernel that cannot be vectorised would prevent
its neighbours from being so, and a failure of a kernel that may raise could not be attributed to it.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import math
import textwrap
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from rustsim_hpc.modeling.model import DeviceFunction
from rustsim_hpc.modeling.program import KernelOp, KernelStage, ReduceOp

_REFUSED = (
    ast.For, ast.While, ast.Try, ast.Raise, ast.Assert, ast.With, ast.Subscript, ast.Lambda, ast.Starred,
    ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.NamedExpr, ast.Yield, ast.Import,
    ast.ImportFrom, ast.Delete, ast.Global, ast.Nonlocal, ast.FloorDiv, ast.Mod,
)  # fmt: skip
_BUILTINS = ("abs", "bool", "float", "int", "max", "min")
_NUMPY = (
    "abs", "bool_", "fabs", "float32", "float64", "int8", "int16", "int32", "int64", "maximum", "minimum",
    "sqrt", "uint8", "uint16", "uint32", "uint64",
)  # fmt: skip
_MATH = ("fabs", "sqrt")


def is_one_loop(stage: KernelStage, *, checked: bool) -> bool:
    """Return whether a stage is a single loop over its rows (``checked``: compiled with checks)."""
    return all(shares_loop(op, checked=checked) for op in stage.ops)


def shares_loop(op: KernelOp | ReduceOp, *, checked: bool) -> bool:
    """Return whether an op of a stage can share a loop with its neighbours."""
    if checked or not isinstance(op, KernelOp) or any(read.source == "rng" for read in op.reads):
        return False
    return is_simple(op.kernel.fn)


@lru_cache(maxsize=256)
def is_simple(fn: Callable[..., Any]) -> bool:
    """Return whether a row function has no loops or indexing, cannot fail, and calls only such functions."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
        outer = inspect.getclosurevars(fn)
        names = {**outer.globals, **outer.nonlocals, **dict.fromkeys(fn.__code__.co_varnames)}
    except (OSError, SyntaxError, TypeError, ValueError):
        return False
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return False
    nodes = [node for part in tree.body[0].body for node in ast.walk(part)]
    return all(_harmless(node, names) for node in nodes)


def _harmless(node: ast.AST, names: dict[str, Any]) -> bool:
    if isinstance(node, _REFUSED):
        return False
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return isinstance(node.right, ast.Constant)
    return not isinstance(node, ast.Call) or _known(node.func, names)


def _known(called: ast.expr, names: dict[str, Any]) -> bool:
    """Return whether the callee is a conversion, a single instruction, or itself a simple function."""
    if isinstance(called, ast.Name):
        found = names[called.id] if called.id in names else getattr(builtins, called.id, None)
        if isinstance(found, DeviceFunction):
            return is_simple(found.fn)
        return called.id in _BUILTINS and found is getattr(builtins, called.id)
    if not (isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)):
        return False
    owner = names.get(called.value.id)
    if not isinstance(owner, ModuleType):
        return False
    return called.attr in (_NUMPY if owner is np else _MATH if owner is math else ())
