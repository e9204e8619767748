"""What a user writes: a model as columns, parameters, tables and phases.

Nothing here compiles, allocates or runs anything. The decorators turn plain functions into frozen
descriptions that can still be called like the functions;
:class:`~rustsim_hpc.modeling.bound_model.BoundModel` binds a model to parameter values, a seed and a number
of agents; :mod:`rustsim_hpc.modeling.program` turns the phases into a plan.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal, overload

from rustsim_hpc.errors import ModelError, message_of, nearest
from rustsim_hpc.modeling.device_kernel import DeviceKernel, as_device_kernel
from rustsim_hpc.modeling.outputs import Arrays, Picture, Sample, Series, as_reductions
from rustsim_hpc.modeling.params import Param, Params, as_param
from rustsim_hpc.modeling.signatures import Function, argument_names, returned_keys, where
from rustsim_hpc.state.schema import Column, Schema

__all__ = [
    "Check",
    "Column",
    "ColumnPhase",
    "Derive",
    "DeviceFunction",
    "Model",
    "Output",
    "Phase",
    "Reduction",
    "RowKernel",
    "check",
    "column_phase",
    "derive",
    "device_phase",
    "function",
    "reduction",
    "row_kernel",
]

Output = Series | Arrays | Sample | Picture
ReductionKind = Literal["sum", "count", "min", "max", "histogram"]

_KINDS = ("sum", "count", "min", "max", "histogram")


def _is_a(value: object, kind: type) -> bool:
    """Return whether a value that a user gave has its declared type."""
    return isinstance(value, kind)


@dataclass(frozen=True, eq=False)
class _Described:
    """A decorated function, callable like the plain function."""

    fn: Function
    name: str

    def __post_init__(self) -> None:
        if not _is_a(self.name, str) or not self.name or not self.name.isprintable():
            raise ModelError(f"{self.name!r} ({where(self.fn)}) cannot be the name of a phase")
        # Like functools.update_wrapper, which does not work on a frozen class.
        for attribute in (*functools.WRAPPER_ASSIGNMENTS, "__wrapped__"):
            value = self.fn if attribute == "__wrapped__" else getattr(self.fn, attribute, None)
            object.__setattr__(self, attribute, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class DeviceFunction(_Described):
    """A helper that kernels may call (see :func:`function`)."""


@dataclass(frozen=True, eq=False)
class RowKernel(_Described):
    """A scalar function of one row that returns the new values of the columns it writes."""

    writes: tuple[str, ...]
    stream: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ColumnPhase(_Described):
    """A callable ``(context, columns, rows)`` that sees a whole partition at once.

    ``writes`` is None if not declared (then every column counts as written). ``device`` does the same on a
    CUDA device, over CuPy arrays; None if not declared. ``device_only``: there is no function for the CPU.
    """

    writes: tuple[str, ...] | None
    row_local: bool
    stream: str
    device: Function | DeviceKernel | None = None
    device_only: bool = False


@dataclass(frozen=True, eq=False)
class Reduction(_Described):
    """A global number, or one for each key, computed from one value of every row."""

    kind: ReductionKind
    bins: int | Callable[[Params], int] | None
    key: Function | str | None
    arguments: tuple[str, ...]
    key_arguments: tuple[str, ...]
    stream: str

    def bin_count(self, params: Params) -> int:
        """Return the number of bins for these parameters (0: one single value)."""
        if self.bins is None:
            return 0
        try:
            given = self.bins(params) if callable(self.bins) else self.bins
        except (Exception, SystemExit) as error:
            failed = f"bins failed: {message_of(error)}"
            raise ModelError(f"reduction {self.name} ({where(self.fn)}): {failed}") from error
        count = operator.index(given) if hasattr(given, "__index__") else -1
        if count < 1:
            raise ModelError(
                f"reduction {self.name} ({where(self.fn)}): bins must be a positive integer, got {given!r}"
            )
        return count


@dataclass(frozen=True, eq=False)
class Derive(_Described):
    """A small global computation, the same on every rank; ``names`` are the names of its results."""

    names: tuple[str, ...]
    is_mapping: bool
    arguments: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Check(_Described):
    """A condition on the state: ``fn(context) -> bool`` after every ``every`` steps."""

    every: int
    reductions: tuple[Reduction, ...]


Phase = RowKernel | ColumnPhase | Reduction | Derive


def function(fn: Function) -> DeviceFunction:
    """Mark a helper that row functions may call; it is compiled with them."""
    if not isinstance(fn, FunctionType):
        raise ModelError(f"function: {getattr(fn, '__name__', fn)!r} must be a plain Python function")
    return DeviceFunction(fn, fn.__name__)


def row_kernel(
    *, writes: str | Sequence[str], stream: str | None = None, name: str | None = None
) -> Callable[[Function], RowKernel]:
    """Declare a scalar function of one row that writes the columns ``writes``.

    Args:
        writes: the column, or columns, whose new values the function returns (a tuple, in this order).
        stream: name of the random stream that ``rng`` draws from; the phase's name by default.
        name: name of the phase; the function's by default.

    The arguments bind by name: columns, parameters, tables, results of earlier reductions and derived
    values as they are at this row, ``step``, ``row``, ``id``, ``rng`` and ``agents``. Literals are float64
    and int64.
    """
    targets = _targets("row_kernel", writes)
    if not targets:
        raise ModelError("row_kernel: writes must name one or more columns")

    def wrap(fn: Function) -> RowKernel:
        phase = name or fn.__name__
        return RowKernel(fn, phase, targets, stream or phase, argument_names(fn, "row kernel"))

    return wrap


def _targets(what: str, writes: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(writes, str | Sequence):
        raise ModelError(f"{what}: writes must name columns, got {writes!r}")
    targets = (writes,) if isinstance(writes, str) else tuple(writes)
    if not all(_is_a(name, str) for name in targets) or len(set(targets)) != len(targets):
        raise ModelError(f"{what}: writes must name different columns, got {writes!r}")
    return targets


def column_phase(
    *,
    writes: str | Sequence[str] | None = None,
    row_local: bool = False,
    stream: str | None = None,
    name: str | None = None,
    device: Any = False,
) -> Callable[[Function], ColumnPhase]:
    """Declare a phase ``fn(context, columns, rows)`` that works on a whole partition at once.

    Args:
        writes: columns that it changes; the others are read-only views. None: it may change all (and the
            rollback guard has to copy all).
        row_local: promise that each row's new values depend only on that row. The phase is then called for
            one cache-sized chunk of rows after another. Otherwise it gets all rows of the partition; its
            bits then hold for one partition plan only, and the replay log says so.
        stream: name of the random stream of ``context.random``; the phase's name by default.
        name: name of the phase; the function's by default.
        device: what does the same on a CUDA device: a function, for which the columns are CuPy arrays (True:
            the function itself); a CuPy RawKernel or ElementwiseKernel; or CUDA C as text whose entry has the
            phase's name. A kernel's parameters are bound by name: columns, parameters, tables, results,
            ``rows``, ``row_start`` and ``step``.

    Raises:
        ModelError: the kernel's source has no such entry, or a parameter has a type that no column has.
    """
    targets = None if writes is None else _targets("column_phase", writes)

    def wrap(fn: Function) -> ColumnPhase:
        phase = name or fn.__name__
        return ColumnPhase(fn, phase, targets, row_local, stream or phase, _twin(device, phase, fn))

    return wrap


def device_phase(
    name: str, device: Any, *, writes: str | Sequence[str] | None = None, row_local: bool = False
) -> ColumnPhase:
    """Return a column phase for CUDA devices only; raises as :func:`column_phase`, or without ``device``."""

    def nowhere_else(_context: Any, _columns: Any, _rows: int) -> None:
        raise ModelError(f'phase "{name}" runs on CUDA devices alone')

    targets = None if writes is None else _targets("device_phase", writes)
    twin = _twin(device, name, None)
    if twin is None:
        raise ModelError(f'phase "{name}" needs a function or kernel for CUDA devices, got {device!r}')
    return ColumnPhase(nowhere_else, name, targets, row_local, name, twin, device_only=True)


def _twin(device: Any, phase: str, fn: Function | None) -> Function | DeviceKernel | None:
    kernel = as_device_kernel(device, phase)
    if kernel is not None:
        return kernel
    return device if callable(device) else fn if device else None


def reduction(
    kind: ReductionKind,
    *,
    bins: int | Callable[[Params], int] | None = None,
    key: Function | str | None = None,
    stream: str | None = None,
    name: str | None = None,
) -> Callable[[Function], Reduction]:
    """Declare a global reduction over all rows, the same bits for any partitioning.

    Args:
        kind: "sum" (floats: correctly rounded; integers: int64), "count" (rows for which the function is
            true), "min", "max", or "histogram" (the function returns a key in [0, bins)).
        bins: number of bins, or a function of the parameters; needed by "histogram" and with ``key``.
        key: for "sum" and "count": a column's name, or a row function, that gives each row's bin.
        stream: name of the random stream if the function takes ``rng``.
        name: the name that later phases read it by; the function's by default.
    """
    if kind not in _KINDS:
        known = f'write @rs.reduction("KIND") with one of {", ".join(_KINDS)}'
        raise ModelError(f'reduction: unknown kind "{kind}"{nearest(str(kind), _KINDS)}', hint=known)
    if key is not None and kind not in ("sum", "count"):
        raise ModelError(f'reduction: key= goes with "sum" and "count", not with "{kind}"')
    if (bins is not None) != (kind == "histogram" or key is not None):
        raise ModelError('reduction: bins= goes with "histogram" and with key=, and is needed there')

    def wrap(fn: Function) -> Reduction:
        phase = name or fn.__name__
        keyed: tuple[str, ...] = ()
        if isinstance(key, str):
            keyed = (key,)
        elif key is not None:
            keyed = argument_names(key, f"key of reduction {phase}:")
        return Reduction(fn, phase, kind, bins, key, argument_names(fn, "reduction"), keyed, stream or phase)

    return wrap


@overload
def derive(fn: Function) -> Derive: ...
@overload
def derive(
    *, names: Sequence[str] | None = None, name: str | None = None
) -> Callable[[Function], Derive]: ...
def derive(
    fn: Function | None = None, *, names: Sequence[str] | None = None, name: str | None = None
) -> Derive | Callable[[Function], Derive]:
    """Declare a small global computation of reduction results, parameters, tables, ``step`` and ``agents``.

    The function runs identically on every rank. Later phases take its result, an array or a scalar, by
    the function's name; if it returns a dict, by the dict's keys, which are read from its
    ``return {...}`` or given as ``names``.
    """

    def wrap(inner: Function) -> Derive:
        phase = name or inner.__name__
        made = tuple(names) if names is not None else returned_keys(inner)
        arguments = argument_names(inner, "derived value")
        return Derive(inner, phase, made or (phase,), bool(made), arguments)

    return wrap if fn is None else wrap(fn)


@overload
def check(fn: Function) -> Check: ...
@overload
def check(*, every: int = 1, reductions: Sequence[Reduction] = ()) -> Callable[[Function], Check]: ...
def check(
    fn: Function | None = None, *, every: int = 1, reductions: Sequence[Reduction] = ()
) -> Check | Callable[[Function], Check]:
    """Declare a check ``fn(context) -> bool`` of every ``every``-th step's new state.

    A check that is false, or raises, undoes the step and ends the run (exit code 3). ``reductions`` are
    computed from the new state for this check, which reads them as ``context.reductions["NAME"]``.
    """
    if _is_a(every, bool) or not _is_a(every, int) or every < 1:
        raise ModelError(f"check: every must be an integer of at least 1, got {every!r}")

    def wrap(inner: Function) -> Check:
        return Check(inner, inner.__name__, every, as_reductions("check", reductions))

    return wrap if fn is None else wrap(fn)


@dataclass(frozen=True, eq=False)
class Model:
    """A model: columns, their initial values, and the phases of one step.

    Attributes:
        columns: the state, one :class:`Column` each.
        phases: what happens in one step, in this order.
        initialise: ``(rows, params, tables, seed)`` with ``rows.start`` and ``rows.stop`` (global) to one
            array for each column (a dict by name, or a sequence in column order); the values must not depend
            on how the rows are split.
        params: the parameters by name (:class:`Param`, or a bare default).
        tables: ``params -> {name: array}``: read-only arrays, bound by name, one copy for each node.
        checks: conditions that the state must meet.
        outputs: what a run leaves behind (:class:`Series`, :class:`Arrays`, :class:`Sample`,
            :class:`Picture`).
        step_length: time that one step stands for, in ``time_unit``, or a function of the parameters.
        time_unit: unit of ``step_length``.
    """

    columns: Sequence[Column]
    phases: Sequence[Phase | DeviceFunction | Function]
    initialise: Function
    params: Mapping[str, Param | float | int | bool | str] = field(default_factory=dict)
    tables: Callable[[Params], Mapping[str, Any]] | None = None
    checks: Sequence[Check] = ()
    outputs: Sequence[Output] = ()
    step_length: float | Callable[[Params], float] = 1.0
    time_unit: str = "step"

    def schema(self) -> Schema:
        """Return the columns as a schema.

        Raises:
            ModelError: two columns have the same name, or a dtype is unknown.
        """
        try:
            return Schema(tuple(self.columns))
        except (ValueError, TypeError) as error:
            raise ModelError(f"model columns: {error}") from error

    def parameters(self) -> dict[str, Param]:
        """Return the declared parameters, bare defaults turned into :class:`Param`."""
        return {name: as_param(name, value) for name, value in self.params.items()}

    def phase_list(self) -> tuple[Phase, ...]:
        """Return the phases, after checking their types and that their names are unique.

        Raises:
            ModelError: something is not a phase, or two phases have the same name.
        """
        seen: dict[str, Phase] = {}
        for phase in self.phases:
            if not isinstance(phase, RowKernel | ColumnPhase | Reduction | Derive):
                name = getattr(phase, "__name__", repr(phase))
                raise ModelError(
                    f"model phases: {name} is not a phase",
                    hint="decorate it with row_kernel, column_phase, reduction or derive",
                )
            if phase.name in seen:
                raise ModelError(
                    f'model phases: two phases are named "{phase.name}" ({where(seen[phase.name].fn)}, '
                    f"{where(phase.fn)})",
                    hint='give one of them name="…"',
                )
            seen[phase.name] = phase
        return tuple(seen.values())
