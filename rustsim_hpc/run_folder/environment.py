"""What a run's results can depend on besides its job: versions, hosts, CPU models, the math library."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rustsim_hpc.version import __version__

_COMPILING = ("numpy", "numba", "llvmlite")
PACKAGES = ("numpy", "numba", "llvmlite", "h5py", "mpi4py")


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("rustsim-hpc", __version__), ("python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def versions() -> dict[str, str]:
    """Return the versions of the package, Python and the libraries that results depend on, by name."""
    return dict(_versions())


def cpu_model() -> str:
    """Return the CPU's model name, or the architecture if the system does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in {"model name", "Model", "cpu model"}:
            return " ".join(value.split())
    return platform.processor() or platform.machine()


@functools.cache
def _libm() -> tuple[tuple[str, str], ...]:
    name, version = platform.libc_ver()
    facts = [("library", f"{name} {version}".strip() or "unknown")]
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        maps = []
    for line in maps:
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(("libm.", "libm-", "ld-musl")):
            facts.append(("path", path))
            # The version says too little: distributions patch, and CPU-specific variants live in one file.
            facts.append(("blake2b", hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()))
            break
    return tuple(facts)


def libm() -> dict[str, str]:
    """Return this process's math library: ``library``, and where known ``path`` and ``blake2b``."""
    return dict(_libm())


def host_facts(device: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return this machine's host name, CPU model, architecture, cores that may be used, system and libm.

    device: facts about this rank's CUDA device, if it has one; returned as ``device``.
    """
    own = {} if device is None else {"device": dict(device)}
    return {
        **own,
        "host": socket.gethostname(),
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libm": libm(),
    }


def by_host(facts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the facts of ranks 0, 1, … as one entry a host, with the ``ranks`` on it.

    Where ranks have CUDA devices, ``devices`` has one entry a rank: its ``rank`` and its device's facts.
    """
    hosts: dict[str, dict[str, Any]] = {}
    for rank, own in enumerate(facts):
        shared = {name: value for name, value in own.items() if name != "device"}
        host = hosts.setdefault(str(own["host"]), {**shared, "ranks": []})
        host["ranks"].append(rank)
        if "device" in own:
            host.setdefault("devices", []).append({"rank": rank, **own["device"]})
    return list(hosts.values())


def worker_facts() -> dict[str, Any]:
    """Return what a remote worker reports about its machine: `host_facts`, and ``versions``."""
    return {**host_facts(), "versions": versions()}


def by_endpoint(facts: Iterable[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the facts that ranks 0, 1, … have of remote workers by endpoint, with the ``ranks`` of each."""
    workers: dict[str, dict[str, Any]] = {}
    for rank, known in enumerate(facts):
        for endpoint, own in known.items():
            workers.setdefault(endpoint, {"endpoint": endpoint, **own, "ranks": []})["ranks"].append(rank)
    return list(workers.values())


def machines_of(session: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the machines that computed a session or a run: its remote workers, or else its hosts."""
    return list(session.get("remote_workers") or session.get("hosts") or [])


def differences(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines on differences between the hosts of two runs that may change the bits of exp or cos.

    ``then`` and ``now`` are lists that `by_host`, `by_endpoint` or `host_facts` made. The engine's own random
    numbers and reductions do not depend on these.
    """
    lines = []
    for label, of in (("CPU model", _cpu_of), ("math library", _libm_of), ("CUDA device", _devices_of)):
        before, after = ({kind for host in hosts for kind in of(host)} for hosts in (then, now))
        if before != after:
            lines.append(f"{label}: {', '.join(sorted(before))} then, {', '.join(sorted(after))} now")
    return lines


def mixtures(hosts: Sequence[Mapping[str, Any]], whose: str = "the ranks of this run have") -> list[str]:
    """Return lines on differences among the hosts of one run, as `differences` does.

    There exp or cos may give other bits when ranks and rows are distributed differently. Remote workers are
    named by their ``endpoint``; ``whose`` begins each line.
    """
    lines = []
    for label, of in (
        ("CPU models", _cpu_of),
        ("math libraries", _libm_of),
        ("CUDA devices", _devices_of),
        ("versions", _versions_of),
    ):
        found: dict[str, list[str]] = {}
        for host in hosts:
            for kind in of(host):
                found.setdefault(kind, []).append(str(host.get("endpoint") or host.get("host", "unknown")))
        if len(found) > 1:
            parts = (f"{kind} on {_some(names)}" for kind, names in sorted(found.items()))
            rows = "a model's own exp or cos may depend on which rows they have"
            lines.append(f"{whose} different {label}: {'; '.join(parts)}; {rows}")
    return lines


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _versions_of(host: Mapping[str, Any]) -> list[str]:
    """Return the versions that compiled code depends on, in words; ranks with other versions cannot start."""
    known = host.get("versions")
    return [] if known is None else [", ".join(f"{name} {known.get(name, 'none')}" for name in _COMPILING)]


def _cpu_of(host: Mapping[str, Any]) -> list[str]:
    return [str(host.get("cpu", "unknown"))]


def _libm_of(host: Mapping[str, Any]) -> list[str]:
    facts = host.get("libm", {})
    return [f"{facts.get('library', 'unknown')} ({facts.get('blake2b', 'unknown')})"]


def _devices_of(host: Mapping[str, Any]) -> list[str]:
    """Return the kinds of devices that a host's ranks are on, and their math library, in words."""
    names = ("name", "compute_capability", "libdevice")
    kinds = [[facts.get(name, "unknown") for name in names] for facts in host.get("devices", ())]
    words = {f"{name} (compute capability {number}, libdevice {library})" for name, number, library in kinds}
    return sorted(words) or ["none"]
