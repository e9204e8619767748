"""Python and NumPy functions that Numba lacks for CUDA, or implements differently than for the CPU.

``min`` and ``max`` take any number of arguments on the CPU and fail on CUDA; ``math.floor``, ``ceil`` and
``trunc`` return integers on the CPU, as in Python, and floats on CUDA; NumPy's functions of scalars are
missing; ``math.copysign`` of some libdevices cannot be compiled.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import lru_cache, reduce
from typing import Any

import numpy as np
from numba import types
from numba.core.typing import signature
from numba.cuda import libdevice
from numba.extending import intrinsic, overload

_MOST = 4
_OF_FLOATS = ("sqrt", "floor", "ceil", "trunc", "rint", "fabs", "exp", "log", "sin", "cos", "tan")
"""Functions that NumPy and libdevice both have under this name; of integers they are float64."""


@lru_cache(maxsize=1)
def register() -> None:
    """Make these functions callable in CUDA kernels; ``min`` and ``max`` with two to four numbers."""
    for face, name in ((min, "_less"), (max, "_more")):
        for count in range(2, _MOST + 1):
            _register_choice(face, name, count)
    for name in ("floor", "ceil", "trunc"):
        _register_whole(getattr(math, name), getattr(libdevice, name))
    _register_copysign()
    for name in _OF_FLOATS:
        _register_float(getattr(np, name), getattr(libdevice, name), getattr(libdevice, f"{name}f"))
    _register_propagating(np.minimum, _less)
    _register_propagating(np.maximum, _more)


def _chooser(compare: Any) -> Any:
    """Return an intrinsic of two numbers: the second if ``compare(second, first)``, as in Python."""

    @intrinsic
    def choose(context: Any, first: Any, second: Any) -> Any:
        kind = context.unify_types(first, second)

        def generate(context: Any, builder: Any, made: Any, arguments: Any) -> Any:
            one, other = (
                context.cast(builder, argument, given, kind)
                for argument, given in zip(arguments, made.args, strict=True)
            )
            holds = context.get_function(compare, signature(types.boolean, kind, kind))
            return builder.select(holds(builder, (other, one)), other, one)

        return kind(first, second), generate

    return choose


_less, _more = _chooser(operator.lt), _chooser(operator.gt)


def _register_choice(face: Any, name: str, count: int) -> None:
    arguments = [f"x{k}" for k in range(count)]
    chosen = reduce(lambda sofar, argument: f"{name}({sofar}, {argument})", arguments)
    namespace: dict[str, Any] = {"_less": _less, "_more": _more}
    listed = ", ".join(arguments)
    # Numba reads the names of an overload's arguments, so each argument count needs its own function.
    text = f"def body({listed}):\n    return {chosen}\ndef typed({listed}):\n    return pick({listed})\n"
    exec(compile(text, "<min and max>", "exec"), namespace)  # noqa: S102 (our own text)
    body: Callable[..., Any] = namespace["body"]
    namespace["pick"] = lambda *kinds: body if all(map(_is_number, kinds)) else None
    overload(face, target="cuda")(namespace["typed"])


def _register_whole(face: Any, body: Any) -> None:
    @overload(face, target="cuda")
    def typed(x):  # type: ignore[no-untyped-def]
        if isinstance(x, types.Float):
            return lambda x: np.int64(body(np.float64(x)))
        return (lambda x: np.int64(x)) if isinstance(x, types.Integer) else None  # noqa: PLW0108 (compiled)


def _register_copysign() -> None:
    # libdevice 12.9's copysign calls an intrinsic that the libNVVM of the same release rejects.
    @overload(math.copysign, target="cuda")
    def typed(x, y):  # type: ignore[no-untyped-def]
        if x == types.float32 and y == types.float32:
            sign, rest = np.uint32(2**31), np.uint32(2**31 - 1)

            def single(x, y):  # type: ignore[no-untyped-def]
                return np.uint32((x.view(np.uint32) & rest) | (y.view(np.uint32) & sign)).view(np.float32)

            return single
        if not (_is_number(x) and _is_number(y)):
            return None
        wide_sign, wide_rest = np.uint64(2**63), np.uint64(2**63 - 1)

        def double(x, y):  # type: ignore[no-untyped-def]
            one, other = np.float64(x).view(np.uint64), np.float64(y).view(np.uint64)
            return ((one & wide_rest) | (other & wide_sign)).view(np.float64)

        return double


def _register_float(face: Any, double: Any, single: Any) -> None:
    @overload(face, target="cuda")
    def typed(x):  # type: ignore[no-untyped-def]
        if x == types.float32:
            return lambda x: single(x)  # noqa: PLW0108 (compiled)
        return (lambda x: double(np.float64(x))) if _is_number(x) else None


def _register_propagating(face: Any, choose: Any) -> None:
    @overload(face, target="cuda")
    def typed(a, b):  # type: ignore[no-untyped-def]
        if isinstance(a, types.Float) and isinstance(b, types.Float):

            def body(a, b):  # type: ignore[no-untyped-def]
                return b if math.isnan(b) and not math.isnan(a) else choose(a, b)

            return body
        return (lambda a, b: choose(a, b)) if _is_number(a) and _is_number(b) else None  # noqa: PLW0108


def _is_number(kind: Any) -> bool:
    return isinstance(kind, types.Number | types.Boolean)
