"""A safe version of Numba's disk cache: code that cannot be read or written is compiled again, without error.

Numba's own cache raises on a truncated file or a full disk and if no folder is writable, and can return
machine code of another signature after two processes have written at the same time.
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
"""Options of a function that is also called from Python."""

CALLED: dict[str, Any] = {**ENTERED, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Options of a function that only compiled code calls: without wrappers, which take longest to compile.

Calling it from Python would crash.
"""

INLINED: dict[str, Any] = {**CALLED, "forceinline": True}
"""Options of a function that is inlined into the compiled functions that call it."""


@lru_cache(maxsize=1)
def own_sources() -> str:
    """Return a hash of all source from which compiled functions of this package are built."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (*sorted(folder.glob("*.py")), folder.parent / "random.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _Compiling(event.Listener):  # type: ignore[misc]
    """Reports every compilation by Numba to the clock."""

    def on_start(self, _event: Any) -> None:
        CLOCK.begin()

    def on_end(self, _event: Any) -> None:
        CLOCK.end()


event.register("numba:compile", _Compiling())


class SafeCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function, in which every error is a miss."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled function of a signature, or None if it must be compiled."""
        try:
            with CLOCK.counting():
                found = super().load_overload(sig, target_context)
            if found is None or tuple(found.signature.args) == tuple(getattr(sig, "args", sig)):
                return found
        except Exception:  # noqa: BLE001, S110 (the entry is not usable, for whatever reason)
            pass
        with contextlib.suppress(Exception):
            self.flush()
        return None

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        # Numba's key covers only the source file of the function, not those of the functions that it calls.
        return (*super()._index_key(sig, codegen), own_sources())

    def save_overload(self, sig: Any, data: Any) -> None:
        """Store a compiled function, if it can be cached and there is room."""
        if data.library.has_dynamic_globals:  # Numba would warn
            return
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def cache_on_disk(dispatcher: Any) -> Any:
    """Let a Numba dispatcher cache its machine code on disk, if a folder is writable; return it."""
    with contextlib.suppress(RuntimeError, OSError):
        dispatcher._cache = SafeCache(dispatcher.py_func)  # noqa: SLF001 (Numba has no public way)
    return dispatcher


def cached_njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator like ``njit(cache=True, nogil=True, error_model="numpy")``, with a safe cache."""

    def wrap(function: Callable[..., Any]) -> Any:
        return cache_on_disk(njit(**ENTERED, **options)(function))

    return wrap
