"""The CUDA devices visible to this process, their properties, and why there are none."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from rustsim_hpc.errors import DeviceError, message_of
from rustsim_hpc.texts import raw_message_of

HOW_TO_INSTALL: Final = 'CuPy is not installed: pip install "rustsim-hpc[gpu]"'
_DRIVER: Final = "libcuda.so.1"
_MODULE_VERSION: Final = Path("/sys/module/nvidia/version")
"""The version of the loaded NVIDIA kernel module."""


@lru_cache(maxsize=1)
def _found() -> tuple[tuple[str, ...], str]:
    """Return the UUIDs of the visible CUDA devices, and why there are none ("" if there are)."""
    if importlib.util.find_spec("cupy") is None:
        return (), HOW_TO_INSTALL
    try:
        ctypes.CDLL(_DRIVER)  # immediate, while importing CuPy takes a second
    except OSError:
        return (), f"CUDA finds no device: there is no NVIDIA driver here ({_DRIVER})"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    try:
        import cupy

        runtime = cupy.cuda.runtime
        found = [runtime.getDeviceProperties(k)["uuid"] for k in range(runtime.getDeviceCount())]
    except Exception as error:  # noqa: BLE001 (after any error of CuPy or the driver there is no device)
        return (), f"CUDA finds no device{hidden}: {_one_line(error)}"
    # A MIG instance is the only device that its process sees, and may report the UUID of the whole GPU.
    part = f" {visible}" if visible is not None and visible.startswith("MIG-") else ""
    names = tuple(bytes(uuid).hex() + part for uuid in found)
    return names, "" if found else f"CUDA finds no device{hidden}"


def _one_line(error: Exception) -> str:
    """Return an exception's message in one line: for CuPy's long text on a failed import, the first cause."""
    lines = [line.strip() for line in raw_message_of(error).splitlines() if line.strip(" =")]
    if "Original error:" in lines[:-1]:
        return f"CuPy cannot be loaded: {lines[lines.index('Original error:') + 1]}"
    return lines[0] if lines else type(error).__name__


def visible_devices() -> tuple[str, ...]:
    """Return the UUIDs of the devices that this process may use, indexed by ordinal.

    Restrictions by CUDA_VISIBLE_DEVICES or Slurm are already applied.
    """
    return _found()[0]


def why_no_device(ordinal: int = 0) -> str:
    """Return in one line why there is no device of this ordinal, or "" if there is one."""
    found, problem = _found()
    if problem or ordinal < len(found):
        return problem
    return f"there is no CUDA device {ordinal}: this process sees {len(found)}"


def device_facts(ordinal: int) -> dict[str, Any]:
    """Return the properties of a device for a run's record, as JSON types.

    ``ordinal`` (among the visible devices), ``name``, ``compute_capability``, ``uuid``, ``pci_bus_id``,
    ``memory_bytes``, ``driver`` (NVIDIA's version), ``cuda_driver`` and ``cuda_runtime`` (the CUDA versions
    of the driver and of CuPy's runtime), ``cupy``.

    Raises:
        DeviceError: the device cannot be queried.
    """
    import cupy

    runtime = cupy.cuda.runtime
    try:
        facts = runtime.getDeviceProperties(ordinal)
        return {
            "ordinal": ordinal,
            "name": facts["name"].decode(),
            "compute_capability": f"{facts['major']}.{facts['minor']}",
            "uuid": _uuid(bytes(facts["uuid"])),
            "pci_bus_id": str(runtime.deviceGetPCIBusId(ordinal)),
            "memory_bytes": int(facts["totalGlobalMem"]),
            "driver": _driver_version(),
            "cuda_driver": _dotted(runtime.driverGetVersion()),
            "cuda_runtime": _dotted(runtime.runtimeGetVersion()),
            "cupy": str(cupy.__version__),
        }
    except runtime.CUDARuntimeError as error:
        raise DeviceError(f"device {ordinal}: {message_of(error)}") from error


def _uuid(raw: bytes) -> str:
    """Return a UUID as nvidia-smi and CUDA_VISIBLE_DEVICES write it."""
    return f"GPU-{uuid.UUID(bytes=raw[:16])}"


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _driver_version() -> str:
    try:
        return _MODULE_VERSION.read_text().strip()
    except OSError:
        return "unknown"
