"""Compile generated Python source to PTX for a compute capability, without a device and without contraction.

Numba has no public interface for what is needed here, so this module uses its internals, and is the only one
that does (except for what kernels call, in `cuda_builtins`):

- Functions that a kernel calls are compiled "for the current device"; during a compilation that is a stub
  with a compute capability and nothing else.
- NVVM contracts x * y + z to a single rounding by default. Numba passes a kernel's options on to NVVM, but
  takes none for this from the user. With ``fma=0`` every product and sum is rounded separately; NVVM then
  writes the rounding into the instruction (``mul.rn``), which keeps the driver's assembler from fusing them.
- NVVM's own remainder of floats is not exact; libdevice's is.

Written for Numba 0.61 to 0.68; tests/test_cuda_kernels.py checks the PTX, kernel by kernel.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
from numba import types

from rustsim_hpc.errors import KernelError, message_of
from rustsim_hpc.files import write_atomic
from rustsim_hpc.kernels.cached import own_sources
from rustsim_hpc.kernels.compiling import cache_folder, for_cuda
from rustsim_hpc.kernels.diagnose import reason
from rustsim_hpc.texts import raw_message_of
from rustsim_hpc.version import __version__

OPTIONS: dict[str, int] = {"opt": 3, "fma": 0, "ftz": 0, "prec_div": 1, "prec_sqrt": 1}
"""Options for NVVM: IEEE 754 in every operation, none of them fused."""

_FMOD = "__nv_fmod"
_REMAINDER = re.compile(r"(%\S+) = frem (float|double) ([^,\s]+), ([^,\s]+)")
_compiling = threading.RLock()


@dataclass(frozen=True)
class Image:
    """A compiled kernel: PTX and the name of its entry."""

    ptx: bytes
    entry: str


@lru_cache(maxsize=1)
def why_no_compiler() -> str:
    """Return in one line why kernels cannot be compiled for CUDA here, or "" if they can."""
    from numba.cuda.cudadrv import nvvm

    _find_wheel()
    try:
        nvvm.NVVM()
        nvvm.LibDevice()
    except Exception as error:  # noqa: BLE001 (no library, or not one that Numba knows)
        reason = (raw_message_of(error).strip().splitlines() or ["no reason given"])[-1]
        return f"no libNVVM: pip install nvidia-cuda-nvcc-cu12, or set CUDA_HOME to a CUDA toolkit ({reason})"
    return ""


@lru_cache(maxsize=1)
def libdevice_identity() -> str:
    """Return a hash of libdevice, the library of exp, log and other functions of kernels.

    Call it only if :func:`why_no_compiler` returns "".
    """
    from numba.cuda.cudadrv import nvvm

    return hashlib.blake2b(nvvm.LibDevice().get(), digest_size=8).hexdigest()


def _find_wheel() -> None:
    """Let Numba, which looks only for system toolkits, find one that pip has installed."""
    from numba.cuda.cuda_paths import get_cuda_paths

    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvcc")
    except ModuleNotFoundError:
        return
    if spec is None or "CUDA_HOME" in os.environ:
        return
    known = get_cuda_paths()  # the dict that Numba caches, changed in place
    for place in spec.submodule_search_locations or ():
        for name, file in (("nvvm", "lib64/libnvvm.so"), ("libdevice", "libdevice/libdevice.10.bc")):
            path = Path(place) / "nvvm" / file
            if path.exists():
                known[name] = known[name]._replace(by="wheel", info=str(path))


def compile_ptx(
    function: Callable[..., None],
    signature: Sequence[Any],
    capability: tuple[int, int],
    *,
    identity: str,
    what: str = "a kernel",
    fma: bool = False,
) -> Image:
    """Compile a kernel for Numba types and a compute capability, or take it from the cache on disk.

    Args:
        function: the kernel; its arguments are scalars and 1-D contiguous arrays.
        signature: Numba types of its arguments.
        capability: such as (9, 0).
        identity: text that covers everything that the kernel's meaning depends on.
        what: name of the kernel in error messages.
        fma: allow fused multiply-add.

    Raises:
        KernelError: it does not compile, or there is no compiler.
    """
    options = OPTIONS | {"fma": int(fma)}
    record = [__version__, numba.__version__, own_sources(), identity, str(signature), capability, options]
    key = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:32]
    path = cache_folder() / f"cuda_{key}.ptx"
    try:
        return _image(path.read_bytes())
    except (OSError, ValueError):
        pass
    if problem := why_no_compiler():
        raise KernelError(f"kernels cannot be compiled for CUDA: {problem}")
    image = _image(_compile(function, signature, capability, options, what))
    try:
        write_atomic(path, image.ptx)
    except OSError:
        return image  # not cached: it is compiled again next time
    return image


def _image(ptx: bytes) -> Image:
    found = re.search(rb"\.visible \.entry (\w+)\(", ptx)
    if found is None or not ptx.rstrip(b"\0\n ").endswith(b"}"):
        raise ValueError("not a whole PTX file with a kernel")
    return Image(ptx, found.group(1).decode())


def _compile(
    function: Callable[..., None],
    signature: Sequence[Any],
    capability: tuple[int, int],
    options: dict[str, int],
    what: str,
) -> bytes:
    from numba.core.errors import NumbaError
    from numba.cuda.compiler import compile_cuda
    from numba.cuda.cudadrv.error import NvvmError, NvvmSupportError

    with _compiling, _device_of(capability), for_cuda():
        try:
            made = compile_cuda(function, types.void, tuple(signature), nvvm_options=options, cc=capability)
            code = function.__code__
            library, _ = made.target_context.prepare_cuda_kernel(
                made.library, made.fndesc, False, False, options, code.co_filename, code.co_firstlineno
            )
            library._llvm_strs = _with_exact_remainders(library.llvm_strs)  # noqa: SLF001 (no other way)
            text: str = library.get_asm_str(cc=capability)
        except NumbaError as error:
            raise KernelError(
                f"{what} cannot be compiled for CUDA: {reason(str(error))}",
                hint="docs/gpu.md says what kernels may call there; [run] backend = cpu runs them here",
            ) from error
        except (NvvmError, NvvmSupportError) as error:
            said = message_of(error)
            raise KernelError(
                f"{what} cannot be compiled for compute capability {capability[0]}.{capability[1]}: {said}",
                hint="is the device older than the compiler serves? then install an older "
                "nvidia-cuda-nvcc-cu12, or let CUDA_HOME name an older toolkit",
            ) from error
    # A short name, to make the file readable: Numba's name encodes the types of all arguments.
    return text.replace(_long_name(text), "stage").rstrip("\0").encode()


def _with_exact_remainders(modules: Sequence[str]) -> list[str]:
    """Return LLVM IR that calls libdevice for the remainders of floats, where they are exact.

    NVVM compiles ``frem`` to ``x - trunc(x / y) * y``, whose error can be as large as y. The remainder of two
    float32 is a float32, so it is computed in float64: libdevice's own for float32 uses approximate division.
    """
    made = []
    for text in modules:
        found = _REMAINDER.sub(_remainder, text)
        if found != text and not re.search(rf"^declare .*@{_FMOD}\(", found, re.MULTILINE):
            found += f"\ndeclare double @{_FMOD}(double, double)\n"
        made.append(found)
    return made


def _remainder(found: re.Match[str]) -> str:
    name, kind, one, other = found.groups()
    if kind == "double":
        return f"{name} = call double @{_FMOD}(double {one}, double {other})"
    stem = f'%"rem.{found.start()}'
    return (
        f'{stem}.a" = fpext float {one} to double\n  {stem}.b" = fpext float {other} to double\n'
        f'  {stem}.c" = call double @{_FMOD}(double {stem}.a", double {stem}.b")\n'
        f'  {name} = fptrunc double {stem}.c" to float'
    )


def _long_name(text: str) -> str:
    found = re.search(r"\.visible \.entry (\w+)\(", text)
    if found is None:
        raise KernelError("NVVM has made no kernel")
    return found.group(1)


@contextmanager
def _device_of(capability: tuple[int, int]) -> Iterator[None]:
    """Let Numba's dispatchers find a current device of this capability."""
    from numba.cuda import dispatcher

    before = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = before
