"""Compile row functions and generated stage functions with Numba once, in a disk cache shared by processes.

Generated source is written to a file named by a hash of everything that its meaning depends on, imported from
there and compiled with Numba's disk cache. A file lock makes the first of many ranks or workers compile
while the others wait and then load.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import llvmlite
import llvmlite.binding
import numba
import numpy as np
from numba import njit, types
from numba.extending import typeof_impl

from rustsim_hpc.files import write_atomic
from rustsim_hpc.kernels import philox
from rustsim_hpc.kernels.cached import INLINED, cache_on_disk, own_sources
from rustsim_hpc.modeling.model import DeviceFunction
from rustsim_hpc.modeling.source_identity import function_identity
from rustsim_hpc.version import __version__

# A loop over n input and m output columns needs about n*m overlap tests before LLVM may vectorise it; its
# default gives up at 8, which a kernel over four columns already exceeds.
llvmlite.binding.set_option("rustsim_hpc", "-runtime-memory-check-threshold=512")

philox.register()

_importing = threading.Lock()

STAGE_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}

_helpers: dict[tuple[int, str, bool], tuple[DeviceFunction, Any]] = {}
_cuda_helpers: dict[tuple[int, str, bool], tuple[DeviceFunction, Any]] = {}
_mode = threading.local()


@typeof_impl.register(DeviceFunction)
def _typeof_device_function(value: DeviceFunction, _context: Any) -> Any:
    """Let a kernel call a helper marked with ``rs.function``, as a global or captured name."""
    # The key recompiles it if what it captured has changed, and with bounds checks if its caller has them.
    checked = getattr(_mode, "checked", False)
    key = id(value), function_identity(value), checked
    if getattr(_mode, "cuda", False):
        return _cuda_helper(key, value)._numba_type_
    if key not in _helpers:
        _helpers[key] = value, compile_row_function(value.fn, checked=checked)
    return types.Dispatcher(_helpers[key][1])


def _cuda_helper(key: tuple[int, str, bool], value: DeviceFunction) -> Any:
    from numba import cuda

    if key not in _cuda_helpers:
        _cuda_helpers[key] = value, cuda.jit(value.fn, device=True)
    return _cuda_helpers[key][1]


@contextlib.contextmanager
def for_cuda() -> Iterator[None]:
    """Compile helpers for CUDA in this thread, within the context."""
    _mode.cuda = True
    try:
        yield
    finally:
        _mode.cuda = False


@contextlib.contextmanager
def checking(*, checked: bool) -> Iterator[None]:
    """Compile helpers with or without bounds checks in this thread, within the context."""
    before = getattr(_mode, "checked", False)
    _mode.checked = checked
    try:
        yield
    finally:
        _mode.checked = before


def compile_row_function(fn: Callable[..., Any], *, checked: bool) -> Any:
    """Return a Numba dispatcher for a scalar row function (nothing is compiled yet)."""
    return njit(fn, boundscheck=checked, **INLINED)


@lru_cache(maxsize=1)
def cache_folder() -> Path:
    """Return a writable folder for generated source and machine code.

    The first writable of ``NUMBA_CACHE_DIR``, the user's cache folder, and a temporary folder that is removed
    at exit.
    """
    import platformdirs

    given = os.environ.get("NUMBA_CACHE_DIR")
    for folder in (given, platformdirs.user_cache_dir("rustsim-hpc")):
        if not folder:
            continue
        path = Path(folder) / "stages"
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                return path
    temporary = Path(tempfile.mkdtemp(prefix="rustsim-hpc-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


@lru_cache(maxsize=1)
def environment_key() -> str:
    """Return a text of the versions, CPU features and sources that machine code depends on."""
    cpu = llvmlite.binding.get_host_cpu_name()
    features = llvmlite.binding.get_host_cpu_features().flatten()
    versions = f"{__version__} {numba.__version__} {llvmlite.__version__} {np.__version__}"
    return f"{versions} {cpu} {features} {own_sources()}"


def load_generated(source: str, identity: str, names: Mapping[str, Any]) -> tuple[ModuleType, Path]:
    """Import generated source from its file in the cache folder.

    Args:
        source: Python source; the same identity must always go with the same source.
        identity: text that covers everything the source's meaning depends on.
        names: globals that the source uses (dispatchers of row functions).

    Returns:
        The module, its globals set, and the path of its file.
    """
    key = hashlib.sha256(f"{environment_key()}\0{identity}\0{source}".encode()).hexdigest()[:32]
    path = cache_folder() / f"stage_{key}.py"
    # Numba's cache looks a function's module up by name, so it must be in sys.modules; a module of the same
    # key has the same meaning, and its compiled code is reused.
    name = f"rustsim_hpc_{path.stem}"
    with _importing:  # two control planes of one process may import the same module at once
        module = sys.modules.get(name)
        if module is None:
            module = _imported(name, path, source, names)
    return module, path


def _imported(name: str, path: Path, source: str, names: Mapping[str, Any]) -> ModuleType:
    if _content(path) != source.encode():
        write_atomic(path, source.encode())
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    module.__dict__.update(names)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    cache_on_disk(module.stage)
    return module


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@contextlib.contextmanager
def one_compiler(path: Path) -> Iterator[dict[str, Any]]:
    """Hold the lock of a generated file while compiling it, so that one process compiles and the others load.

    Yields:
        A dict of notes left by earlier compilations; additions are saved if the block succeeds.
    """
    done = path.with_suffix(".json")
    with path.with_suffix(".lock").open("ab") as file:
        with contextlib.suppress(OSError):  # without file locks, several processes compile the same
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            notes: dict[str, Any] = dict(json.loads(done.read_bytes()))
        except (OSError, ValueError, TypeError):
            notes = {}
        known = set(notes)
        yield notes
        if set(notes) != known:
            write_atomic(done, json.dumps(notes).encode())
