"""What a compiled function depends on, as one hash: its own source, all it reaches, all it captured.

Numba's disk cache looks at one source file's time stamp. That would serve stale machine code after a change
of a global that a kernel captured, or of a helper in another file, so generated stages are stored under a
key that covers everything listed in :func:`function_identity`.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from rustsim_hpc.model import _Described

_LIBRARIES = tuple(
    str(Path(sysconfig.get_paths()[name]).resolve())
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


def function_identity(fn: Any) -> str:
    """Return a SHA-256 (hex) over all that the meaning of a function depends on.

    Covers its byte code and constants, the whole source file it stands in, every global and closure value
    it names (numbers, arrays by content, functions and helpers recursively, modules of the user by file
    and by the attributes that are used), but nothing of an installed library except its version.
    """
    digest = hashlib.sha256()
    _add_function(digest, fn, set())
    return digest.hexdigest()


def file_identity(path: str) -> str:
    """Return the SHA-256 (hex) of a file, or of nothing if it cannot be read."""
    try:
        stat = Path(path).stat()
    except OSError:
        return ""
    return _hash_file(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=256)
def _hash_file(path: str, _mtime_ns: int, _size: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _add_function(digest: Any, fn: Any, seen: set[int]) -> None:
    while isinstance(fn, _Described) or hasattr(fn, "py_func"):
        fn = fn.fn if isinstance(fn, _Described) else fn.py_func
    if not isinstance(fn, FunctionType):
        _put(digest, "callable", f"{type(fn)}{getattr(fn, '__qualname__', '')}")
        return
    if id(fn) in seen:
        return
    seen.add(id(fn))
    _add_code(digest, fn.__code__)
    _put(digest, "file", file_identity(fn.__code__.co_filename))
    _put(digest, "defaults", repr(fn.__defaults__))
    names = _names(fn.__code__)
    for name in sorted(names & set(fn.__globals__)):
        _put(digest, "global", name)
        _add_value(digest, fn.__globals__[name], names, seen)
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        _put(digest, "closure", name)
        _add_value(digest, cell.cell_contents, names, seen)


def _add_code(digest: Any, code: CodeType) -> None:
    digest.update(code.co_code)
    _put(digest, "names", repr((code.co_names, code.co_varnames)))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _add_code(digest, constant)
        else:
            _put(digest, "const", f"{type(constant).__name__} {constant!r}")


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _add_value(digest: Any, value: Any, names: set[str], seen: set[int]) -> None:
    if isinstance(value, ModuleType):
        _add_module(digest, value, names, seen)
    elif isinstance(value, np.ndarray):
        _put(digest, "array", f"{value.dtype} {value.shape}")
        digest.update(np.ascontiguousarray(value).tobytes())
    elif callable(value) and not inspect.isclass(value):
        _add_function(digest, value, seen)
    else:
        _put(digest, "value", f"{type(value).__name__} {value!r}")


def _add_module(digest: Any, module: ModuleType, names: set[str], seen: set[int]) -> None:
    _put(digest, "module", module.__name__)
    path = getattr(module, "__file__", None)
    top = module.__name__.partition(".")[0]
    if path is None or top == "rustsim_hpc" or str(Path(path).resolve()).startswith(_LIBRARIES):
        _put(digest, "version", str(getattr(sys.modules.get(top), "__version__", "")))
        return
    if id(module) in seen:
        return
    seen.add(id(module))
    _put(digest, "file", file_identity(path))
    for name in sorted(names):
        if name in vars(module):
            _put(digest, "attribute", name)
            _add_value(digest, vars(module)[name], names, seen)


def _put(digest: Any, kind: str, text: str) -> None:
    digest.update(f"{kind}\0{len(text)}\0{text}\0".encode())
