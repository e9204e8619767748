"""Hash everything that a compiled function depends on: its source, all it refers to, all it captured.

Numba's disk cache checks only the time stamp of one source file. It would return stale machine code after a
change of a global that a kernel captured, or of a helper in another file, so generated stages are stored
under a key that covers everything listed in :func:`function_identity`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from rustsim_hpc.modeling.model import _Described

_LIBRARIES = tuple(
    str(Path(sysconfig.get_paths()[name]).resolve())
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


def function_identity(fn: Any) -> str:
    """Return a SHA-256 (hex) over all that the meaning of a function depends on.

    Covers its byte code and constants, the whole source file that defines it, every global and closure value
    it names (numbers, arrays by content, functions and helpers recursively, modules of the user by file
    and by the attributes that are used), but of an installed library only its version.
    """
    digest = hashlib.sha256()
    _add_value(digest, fn, set(), set())
    return digest.hexdigest()


def file_identity(path: str) -> str:
    """Return the SHA-256 (hex) of a file, or of nothing if it cannot be read."""
    try:
        stat = Path(path).stat()
    except OSError:
        return ""
    # The time of modification can be set, and a clock can be; the inode and its change time tell more.
    return _hash_file(path, stat.st_ino, stat.st_ctime_ns, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=256)
def _hash_file(path: str, *_version: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _add_function(digest: Any, fn: Any, seen: set[Any]) -> None:
    if fn in seen:
        return
    seen.add(fn)
    _add_code(digest, fn.__code__)
    _put(digest, "file", file_identity(fn.__code__.co_filename))
    names = names_in(fn.__code__)
    for default in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()):
        _put(digest, "default", "")
        _add_value(digest, default, names, seen)
    for name in sorted(names & set(fn.__globals__)):
        _put(digest, "global", name)
        _add_value(digest, fn.__globals__[name], names, seen)
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        _put(digest, "closure", name)
        with contextlib.suppress(ValueError):  # not set yet
            _add_value(digest, cell.cell_contents, names, seen)


def _add_code(digest: Any, code: CodeType) -> None:
    digest.update(code.co_code)
    _put(digest, "names", repr((code.co_names, code.co_varnames)))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _add_code(digest, constant)
        else:
            _add_value(digest, constant, set(), set())


def names_in(code: CodeType) -> set[str]:
    """Return the names of globals and attributes in a function's code, that of inner functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
    return names


def _add_value(digest: Any, value: Any, names: set[str], seen: set[Any]) -> None:
    value = undecorated(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, ModuleType):
        _add_module(digest, value, names, seen)
    elif isinstance(value, FunctionType):
        _add_function(digest, value, seen)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        _put(digest, "array", f"{value.dtype} {value.shape}")
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, str | bytes | int | float | complex | np.generic | None):
        _put(digest, "value", f"{kind} {value!r}")
    elif inspect.isclass(value) or inspect.isbuiltin(value):
        _put(digest, "name", f"{value.__module__}.{value.__qualname__}")
    else:
        _put(digest, "object", f"{kind} {getattr(value, '__name__', '')}")
        if id(value) not in seen:
            seen.add(id(value))
            for part in _parts(value):
                _add_value(digest, part, names, seen)


def undecorated(value: Any) -> Any:
    """Return the plain function of one decorated by this package, Numba or functools."""
    while not isinstance(value, FunctionType | ModuleType):
        if isinstance(value, _Described):
            value = value.fn
        elif hasattr(value, "py_func") or (callable(value) and hasattr(value, "__wrapped__")):
            value = getattr(value, "py_func", None) or value.__wrapped__
        else:
            break
    return value


def _parts(value: Any) -> Iterable[Any]:
    """Return the parts of an object to hash, because its repr may be shortened or contain an address."""
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, list | tuple | np.ndarray):
        return value
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, MethodType):
        return (value.__func__, value.__self__)
    if _is_library(type(value).__module__) and not is_dataclass(value):
        return ()  # such as a logger: its state is not the model's
    return [part for item in sorted(getattr(value, "__dict__", {}).items()) for part in item]


def _is_library(module: str) -> bool:
    path = getattr(sys.modules.get(module), "__file__", None)
    return path is None or is_installed(path)


def is_installed(path: str) -> bool:
    """Return whether a file belongs to Python or to an installed package."""
    return str(Path(path).resolve()).startswith(_LIBRARIES)


def _add_module(digest: Any, module: ModuleType, names: set[str], seen: set[Any]) -> None:
    _put(digest, "module", module.__name__)
    top = module.__name__.partition(".")[0]
    if top == "rustsim_hpc" or _is_library(module.__name__):
        _put(digest, "version", str(getattr(sys.modules.get(top), "__version__", "")))
        return
    _put(digest, "file", file_identity(module.__file__ or ""))
    for name in sorted(names & set(vars(module))):
        if (module.__name__, name) not in seen:
            seen.add((module.__name__, name))
            _put(digest, "attribute", name)
            _add_value(digest, vars(module)[name], names, seen)


def _put(digest: Any, kind: str, text: str) -> None:
    digest.update(f"{kind}\0{len(text)}\0{text}\0".encode())
