"""Numba's disk cache, made safe: what it cannot read or write is compiled again, and never fails a run.

By itself it raises on a truncated file or a full disk, refuses to work where no folder can be written, and
can hand out machine code of another signature after two processes have written at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event
from numba.core.caching import FunctionCache

from rustsim_hpc.compile_clock import CLOCK

ENTERED: dict[str, Any] = {"error_model": "numpy", "nogil": True}
"""Options of a function that Python calls too."""

CALLED: dict[str, Any] = {**ENTERED, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Options of a function that only compiled code calls: without wrappers, which take longest to compile.

Called from Python it would crash.
"""

INLINED: dict[str, Any] = {**CALLED, "forceinline": True}
"""Options of a function that vanishes into the compiled functions that call it."""


@lru_cache(maxsize=1)
def own_sources() -> str:
    """Return a hash of all source that compiled functions of this package are made of."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (*sorted(folder.glob("*.py")), folder.parent / "random.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _Compiling(event.Listener):  # type: ignore[misc]
    """Tells the clock when Numba compiles, whoever asked for it."""

    def on_start(self, _event: Any) -> None:
        CLOCK.begin()

    def on_end(self, _event: Any) -> None:
        CLOCK.end()


event.register("numba:compile", _Compiling())


class SafeCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function, in which every trouble is a miss."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled function of a signature, or None if it must be compiled."""
        try:
            with CLOCK.counting():
                found = super().load_overload(sig, target_context)
            if found is None or tuple(found.signature.args) == tuple(getattr(sig, "args", sig)):
                return found
        except Exception:  # noqa: BLE001, S110 (whatever lies there, it is not a usable cache)
            pass
        with contextlib.suppress(Exception):
            self.flush()
        return None

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        # Numba looks at the source file of the function alone, not at those of the functions that it calls.
        return (*super()._index_key(sig, codegen), own_sources())

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function, if there is room and it can be kept at all."""
        if data.library.has_dynamic_globals:  # Numba would warn of it
            return
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def cache_on_disk(dispatcher: Any) -> Any:
    """Let a Numba dispatcher keep its machine code on disk, where there is a folder for it; return it."""
    with contextlib.suppress(RuntimeError, OSError):
        dispatcher._cache = SafeCache(dispatcher.py_func)  # noqa: SLF001 (Numba has no public way)
    return dispatcher


def cached_njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator as ``njit(cache=True, nogil=True, error_model="numpy")``, with a safe cache."""

    def wrap(function: Callable[..., Any]) -> Any:
        return cache_on_disk(njit(**ENTERED, **options)(function))

    return wrap
