"""Report what is wrong with a row function, in the user's terms, before it is compiled into a stage."""

from __future__ import annotations

import dis
import inspect
import linecache
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numba import types

from rustsim_hpc.errors import KernelError, nearest
from rustsim_hpc.kernels.draws import ready_draws
from rustsim_hpc.kernels.hints import hint_for, plain_types, shortened
from rustsim_hpc.modeling.model import Reduction, RowKernel
from rustsim_hpc.modeling.program import Binding, KernelOp, KernelStage, ReduceOp
from rustsim_hpc.modeling.signatures import where

_UNKNOWN = re.compile(r"name '(\w+)' is not defined|has no attribute '(\w+)'")
_LOCATION = re.compile(r'File "([^"]+)", line (\d+)')


def explain(
    stage: KernelStage, types_by_name: Mapping[str, Any], functions: Mapping[str, Any]
) -> dict[int, str]:
    """Compile each row function of a stage and check what it returns.

    Returns:
        For each reduction slot the dtype of the values that are reduced.

    Args:
        stage: the stage.
        types_by_name: Numba types of the stage function's arguments, by name.
        functions: dispatchers of the row functions by their names in the stage's source.

    Raises:
        KernelError: names the phase, the argument and the line of the user's file.
    """
    dtypes: dict[int, str] = {}
    for op in stage.ops:
        if isinstance(op, KernelOp):
            result = _result(op.phase, op.kernel, op.reads, types_by_name, functions)
            _check_kernel(op, result)
        else:
            result = _result(op.phase, op.reduction, op.reads, types_by_name, functions)
            _check_reduction(op, result)
            _check_key(op, types_by_name, functions)
            dtypes[op.slot] = "bool" if isinstance(result, types.Boolean) else str(result)
    return dtypes


def _result(
    place: int,
    described: RowKernel | Reduction,
    reads: Sequence[Binding],
    types_by_name: Mapping[str, Any],
    functions: Mapping[str, Any],
) -> Any:
    signature = _signature(reads, types_by_name, ready_draws(described))
    return return_type(described.name, functions[f"f{place}"], reads, signature)


def return_type(phase: str, function: Any, reads: Sequence[Binding], signature: tuple[Any, ...]) -> Any:
    """Return a row function's (dispatcher's) Numba return type for arguments of these types.

    Raises:
        KernelError: it does not compile.
    """
    try:
        if signature not in function.overloads:
            function.compile(signature)
    except Exception as error:
        raise _kernel_error(phase, function.py_func, reads, signature, str(error)) from error
    # For `return 1` Numba infers the literal type 1; what is reduced or stored is an int64.
    return types.unliteral(function.overloads[signature].signature.return_type)


def _signature(reads: Sequence[Binding], types_by_name: Mapping[str, Any], ready: int = 0) -> tuple[Any, ...]:
    """Return the argument types of a row function; ``ready`` precomputed draws are appended to its rng."""
    return tuple(
        types.UniTuple(types.uint64, 3 + ready) if read.source == "rng" else _type_of(read, types_by_name)
        for read in reads
    )


def _type_of(read: Binding, types_by_name: Mapping[str, Any]) -> Any:
    if read.source == "column":
        return types_by_name[f"c{read.index}_{read.side}"].dtype
    if read.source in ("step", "row"):
        return types.int64
    if read.source == "id":
        return types.uint64
    return types_by_name[f"{read.source}_{read.argument}"]


def _check_kernel(op: KernelOp, result: Any) -> None:
    kernel = op.kernel
    parts = tuple(result) if isinstance(result, types.BaseTuple) else (result,)
    if isinstance(result, types.BaseTuple) != (len(kernel.writes) > 1) or len(parts) != len(kernel.writes):
        what = f"{len(parts)} values" if isinstance(result, types.BaseTuple) else f"one value ({result})"
        raise KernelError(
            f"row kernel {kernel.name} ({where(kernel.fn)}) declares writes={', '.join(kernel.writes)} "
            f"but returns {what}",
            phase=kernel.name,
            hint="return one value for each column that it writes, on every path",
        )
    for name, part in zip(kernel.writes, parts, strict=True):
        if not isinstance(part, types.Integer | types.Float | types.Boolean):
            raise KernelError(
                f"row kernel {kernel.name} ({where(kernel.fn)}) returns {_said(part)} for column "
                f'"{name}", not a number',
                phase=kernel.name,
                hint="return a number on every path",
            )


def _check_reduction(op: ReduceOp, result: Any) -> None:
    reduction = op.reduction
    wanted: tuple[type, ...] = (types.Integer, types.Float, types.Boolean)
    what = "a number"
    if reduction.kind == "histogram":
        wanted, what = (types.Integer, types.Boolean), "an integer key"
    elif reduction.kind == "count":
        wanted, what = (types.Integer, types.Boolean), "true or false"
    if not isinstance(result, wanted):
        raise _returns(reduction, "returns", result, what)


def _check_key(op: ReduceOp, types_by_name: Mapping[str, Any], functions: Mapping[str, Any]) -> None:
    key = op.reduction.key
    if key is None:
        return
    if isinstance(key, str):
        result = _type_of(op.key_reads[0], types_by_name)
    else:
        signature = _signature(op.key_reads, types_by_name)
        result = return_type(op.reduction.name, functions[f"f{op.phase}_key"], op.key_reads, signature)
    if not isinstance(result, types.Integer | types.Boolean):
        raise _returns(op.reduction, "has a key that is", result, "an integer")


def _said(kind: Any) -> str:
    """Return what a function returns, for its author."""
    if isinstance(kind, types.NoneType):
        return "nothing"
    if isinstance(kind, types.Optional):
        return "nothing on some path"
    return plain_types(str(kind))


def _returns(reduction: Reduction, verb: str, result: Any, what: str) -> KernelError:
    return KernelError(
        f"reduction {reduction.name} ({where(reduction.fn)}) {verb} {_said(result)}, but a {reduction.kind} "
        f"needs {what}",
        phase=reduction.name,
    )


def _kernel_error(
    phase: str, fn: Callable[..., Any], reads: Sequence[Binding], signature: Sequence[Any], text: str
) -> KernelError:
    """Build the error for a function that Numba rejects: the line, the arguments on it, Numba's reason."""
    plain = inspect.unwrap(fn)
    own = plain.__code__.co_filename
    locations = [(path, int(line)) for path, line in _LOCATION.findall(text)]
    near = ""
    # For an undefined name, Numba does not give the line.
    if (unknown := _UNKNOWN.search(text)) and (named := _line_of(plain, unknown[1] or unknown[2])):
        locations = [(own, named)]
        near = nearest(unknown[1], (*plain.__code__.co_varnames, *plain.__globals__)) if unknown[1] else ""
    matching = [(p, n) for p, n in locations if Path(p).name == Path(own).name]
    path, line = (matching or locations or [(own, plain.__code__.co_firstlineno)])[-1]
    source = linecache.getline(own if matching else path, line).strip()
    used = [
        read.argument if read.source == "rng" else f"{read.argument} ({kind})"
        for read, kind in zip(reads, signature, strict=True)
        if re.search(rf"\b{re.escape(read.argument)}\b", source)
    ]
    arguments = f"; arguments there: {', '.join(used)}" if used else ""
    return KernelError(
        f"{phase} does not compile at {own if matching else path}:{line}: {source}{arguments}: "
        f"{reason(text)}{near}",
        phase=phase,
        hint=None if near else hint_for(text, source, [r.argument for r in reads if r.source == "column"]),
    )


def _line_of(fn: Callable[..., Any], name: str) -> int | None:
    """Return the first line on which a function names a global or an attribute, or None."""
    steps = (step for step in dis.get_instructions(fn) if step.argval == name and step.positions)
    return next((step.positions.lineno for step in steps if step.positions), None)


def reason(text: str) -> str:
    """Return the line of Numba's report that gives the reason."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in text.splitlines()]
    telling = (
        "No implementation", "Unknown attribute", "NameError", "Cannot unify", "Untyped global", "Use of",
    )  # fmt: skip
    for place, line in enumerate(lines):
        if any(word in line for word in telling):
            return shortened(line, lines[place + 1 :])
    skip = ("Failed in", "File ", "During:", "def ", "This error")
    return next((line for line in lines if line and not line.startswith(skip)), "it cannot be compiled")
