"""Parameters of a model: their declaration, their typed values, and the namespace that models read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rustsim_hpc.errors import ModelError, nearest

_NUMERIC = (
    "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool",
)  # fmt: skip


@dataclass(frozen=True)
class Param:
    """A parameter: a number (or text) that is fixed during a run.

    Attributes:
        dtype: a column dtype, or "str" (text is seen by tables, initialise and derived values, not by
            kernels); taken from the default (int64, float64, bool or str) when None.
        default: value if the job file gives none.
        min, max: inclusive bounds, or None.
        unit: unit of the value ("1" for none).
        doc: meaning.
    """

    dtype: str | None = None
    default: Any = None
    min: float | None = None
    max: float | None = None
    unit: str = "1"
    doc: str = ""

    def kind(self) -> str:
        """Return the dtype, taken from the default where none was given."""
        if self.dtype is not None:
            return self.dtype
        if isinstance(self.default, bool | np.bool_):
            return "bool"
        if isinstance(self.default, int | np.integer):
            return "int64"
        if isinstance(self.default, float | np.floating):
            return "float64"
        return "str"

    def typed(self, name: str, value: Any) -> Any:
        """Return ``value`` as a NumPy scalar of this parameter's dtype (text as str).

        Raises:
            ModelError: wrong type, NaN, out of the dtype's range or out of bounds.
        """
        kind = self.kind()
        typed: Any = _text(name, value) if kind == "str" else _number(name, value, kind)
        # Compare the given value: rounded to float32, 0.1 would exceed a bound of 0.1.
        if self.min is not None and value < self.min:
            raise ModelError(f"parameter {name} = {value} must be >= {self.min}")
        if self.max is not None and value > self.max:
            raise ModelError(f"parameter {name} = {value} must be <= {self.max}")
        return typed


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ModelError(f"parameter {name} must be text, got {value!r}")
    return value


def _number(name: str, value: Any, kind: str) -> Any:
    if kind == "bool":
        if not isinstance(value, bool | np.bool_):
            raise ModelError(f"parameter {name} must be true or false, got {value!r}")
        return np.bool_(value)
    if not _is_number(value):
        raise ModelError(f"parameter {name} must be a number ({kind}), got {value!r}")
    if math.isnan(value):
        raise ModelError(f"parameter {name} must be a number ({kind}), got NaN")
    dtype = np.dtype(kind)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            typed = dtype.type(value)
        if math.isfinite(value) and not np.isfinite(typed):
            raise ModelError(f"parameter {name} = {value} does not fit {kind}")
        return typed
    if math.isinf(value) or int(value) != value:
        raise ModelError(f"parameter {name} must be a whole number ({kind}), got {value!r}")
    info = np.iinfo(dtype)
    if not info.min <= int(value) <= info.max:
        raise ModelError(f"parameter {name} = {value} does not fit {kind}")
    return dtype.type(int(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def as_param(name: str, declared: Param | Any) -> Param:
    """Return the declaration of a declared parameter or a bare default, after checking it.

    Raises:
        ModelError: an invalid name or bound, an unknown dtype, no default, or a default outside the bounds.
    """
    param = declared if isinstance(declared, Param) else Param(default=declared)
    if not name.isidentifier():
        raise ModelError(f'parameter "{name}" is not a name that a kernel could take')
    if param.dtype is not None and param.dtype not in (*_NUMERIC, "str"):
        raise ModelError(f'parameter {name}: unknown dtype "{param.dtype}"{nearest(param.dtype, _NUMERIC)}')
    if name in _METHODS:
        raise ModelError(f'parameter "{name}" has the name of a method of params: call it something else')
    for bound in (param.min, param.max):
        if bound is None:
            continue
        if param.kind() in ("str", "bool") or not _is_number(bound) or math.isnan(bound):
            raise ModelError(f"parameter {name} ({param.kind()}) cannot have the bound {bound!r}")
    if param.default is None:
        raise ModelError(f"parameter {name} has no default", hint="give it one: rs.Param(default=...)")
    if not isinstance(param.default, bool | int | float | str | np.bool_ | np.integer | np.floating):
        raise ModelError(
            f"parameter {name} must be a number, true or false, or text, got {param.default!r}",
            hint="return arrays from the function tables(params)",
        )
    param.typed(name, param.default)
    return param


class Params(Mapping[str, Any]):
    """Immutable typed parameter values, read as ``params.NAME`` or ``params["NAME"]``."""

    __slots__ = ("_values",)
    _values: dict[str, Any]

    def __init__(self, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_values", dict(values))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"no parameter {name}{nearest(name, self._values)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"parameters are fixed during a run: cannot set {name}")

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Params({', '.join(f'{k}={v!r}' for k, v in self._values.items())})"

    def __reduce__(self) -> tuple[type[Params], tuple[dict[str, Any]]]:
        return Params, (self._values,)

    def plain(self) -> dict[str, Any]:
        """Return the values as plain Python numbers and text (for TOML and JSON)."""
        return {k: v.item() if isinstance(v, np.generic) else v for k, v in self._values.items()}


_METHODS = frozenset(name for name in dir(Params) if not name.startswith("_"))


def bind_params(declared: Mapping[str, Param], given: Mapping[str, Any]) -> Params:
    """Return the typed values of all declared parameters.

    Raises:
        ModelError: a name is not declared (the message suggests the nearest), or a value is invalid.
    """
    for name in given:
        if name not in declared:
            raise ModelError(f'unknown parameter "{name}"{nearest(name, declared)}')
    return Params({n: p.typed(n, given.get(n, p.default)) for n, p in declared.items()})
