"""Compile row functions and generated stage functions with Numba, once, cached on disk, shared by all.

Generated source is written to a file named after everything that its meaning depends on, imported from
there and compiled with Numba's disk cache. A file lock makes the first of many ranks or workers compile
while the others wait and then load.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
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
from rustsim_hpc.model import DeviceFunction
from rustsim_hpc.source_identity import file_identity
from rustsim_hpc.version import __version__

# A loop over n input and m output columns needs about n*m overlap tests before LLVM may vectorise it; its
# default gives up at 8, which a kernel over four columns already exceeds.
llvmlite.binding.set_option("rustsim_hpc", "-runtime-memory-check-threshold=512")

philox.register()

ROW_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "forceinline": True}
STAGE_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "cache": True}

_helpers: dict[int, tuple[DeviceFunction, Any]] = {}


@typeof_impl.register(DeviceFunction)
def _typeof_device_function(value: DeviceFunction, context: Any) -> Any:
    """Let a kernel call a helper marked with ``rs.function`` wherever it names it."""
    if id(value) not in _helpers:
        _helpers[id(value)] = (value, njit(value.fn, **ROW_OPTIONS))
    return types.Dispatcher(_helpers[id(value)][1])


def compile_row_function(fn: Callable[..., Any], *, checked: bool) -> Any:
    """Return a Numba dispatcher for a scalar row function (nothing is compiled yet)."""
    return njit(fn, boundscheck=checked, **ROW_OPTIONS)


@lru_cache(maxsize=1)
def cache_folder() -> Path:
    """Return a writable folder for generated source and machine code.

    ``NUMBA_CACHE_DIR``, then the user's cache folder, then a temporary one that goes with the process.
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
    return Path(tempfile.mkdtemp(prefix="rustsim-hpc-"))


@lru_cache(maxsize=1)
def environment_key() -> str:
    """Return what of this installation and CPU the machine code depends on."""
    cpu = llvmlite.binding.get_host_cpu_name()
    features = llvmlite.binding.get_host_cpu_features().flatten()
    versions = f"{__version__} {numba.__version__} {llvmlite.__version__} {np.__version__}"
    own = "".join(file_identity(str(path)) for path in sorted(Path(__file__).parent.glob("*.py")))
    return f"{versions} {cpu} {features} {hashlib.sha256(own.encode()).hexdigest()}"


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
    # Numba's cache finds a function's module again by name, so it must stand in sys.modules; a module of the
    # same key has the same meaning, and what it has compiled already can be used again.
    name = f"rustsim_hpc_{path.stem}"
    module = sys.modules.get(name)
    if module is None:
        if not path.exists():
            write_atomic(path, source.encode())
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.__dict__.update(names)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return module, path


@contextlib.contextmanager
def one_compiler(path: Path) -> Iterator[dict[str, Any]]:
    """Hold the lock of a generated file while compiling it, so that one process compiles and the others load.

    Yields:
        Notes that those who compiled it have left, and that may be added to; kept if the block succeeds.
    """
    done = path.with_suffix(".json")
    with open(path.with_suffix(".lock"), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            notes: dict[str, Any] = json.loads(done.read_bytes())
        except (OSError, ValueError):
            notes = {}
        known = set(notes)
        yield notes
        if set(notes) != known:
            write_atomic(done, json.dumps(notes).encode())
