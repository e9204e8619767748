"""What a rank leaves behind when it fails: a crash bundle in the run's folder.

``crash/rank_00003.json`` for programs and ``crash/rank_00003.txt`` for people: where (rank, host, partition,
phase, step), what (error, traceback, stacks), on what (versions), and the last fingerprints. A later failure
of the same rank replaces it.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rustsim_hpc.errors import RustsimError
from rustsim_hpc.files import read_json, write_atomic
from rustsim_hpc.run_folder.environment import versions
from rustsim_hpc.texts import shown, trace_of

FOLDER = "crash"
FORMAT = "rustsim-hpc crash"
VERSION = 1


def write_crash_bundle(
    folder: Path,
    *,
    rank: int,
    host: str | None = None,
    phase: str | None = None,
    step: int | None = None,
    error: BaseException | None = None,
    stacks: str | None = None,
    fingerprints: Iterable[tuple[int, int]] = (),
    more: Mapping[str, Any] | None = None,
) -> Path | None:
    """Write this rank's bundle into the run's ``folder``, and return the JSON file's path.

    ``fingerprints`` are (step, value) of the last steps; ``more`` goes into the bundle as it is. What is not
    given is taken from ``error`` if it has it. Never raises: the error that is being reported matters more.
    Returns None if the bundle could not be written.
    """
    facts = error if isinstance(error, RustsimError) else None
    partition = None if facts is None else facts.partition
    bundle: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "rank": rank,
        "host": host or socket.gethostname(),
        "pid": os.getpid(),
        "partition": None if partition is None else partition.value,
        "phase": phase or (facts.phase if facts is not None else None),
        "step": step if step is not None or facts is None else facts.step,
        "error": None if error is None else f"{type(error).__name__}: {shown(str(error))}",
        "details": "\n".join(map(shown, facts.details().splitlines())) if facts is not None else "",
        "traceback": "" if error is None else trace_of(error),
        "stacks": stacks or "",
        "fingerprints": [[at, f"{value:#018x}"] for at, value in fingerprints],
        "versions": versions(),
        **(more or {}),
    }
    target = folder / FOLDER / f"rank_{rank:05}.json"
    with suppress(Exception):
        target.parent.mkdir(exist_ok=True)
        write_atomic(target, json.dumps(bundle, indent=1, default=str) + "\n")
        write_atomic(target.with_suffix(".txt"), bundle_text(bundle))
        return target
    return None


def bundle_text(bundle: Mapping[str, Any]) -> str:
    """Return a bundle for a reader."""
    lines = []
    for name, value in bundle.items():
        if name in {"format", "version"} or value in (None, "", []):
            continue
        if isinstance(value, str) and "\n" in value:
            lines += [f"{name}:", *(f"    {line}" for line in value.rstrip().splitlines())]
        elif isinstance(value, Mapping):
            lines.append(f"{name}: " + ", ".join(f"{key} {text}" for key, text in value.items()))
        elif isinstance(value, list):
            rows = [" ".join(map(str, entry)) if isinstance(entry, list) else str(entry) for entry in value]
            lines += [f"{name}:", *(f"    {row}" for row in rows)]
        else:
            lines.append(f"{name}: {value}")
    return "\n".join(lines) + "\n"


def read_crash_bundles(folder: Path) -> list[dict[str, Any]]:
    """Return the bundles of a run's folder by rank; one that cannot be read is left out."""
    bundles = []
    for path in sorted((folder / FOLDER).glob("rank_*.json")):
        with suppress(OSError, ValueError):
            bundle = read_json(path)
            if isinstance(bundle, dict) and bundle.get("format") == FORMAT:
                bundles.append(bundle)
    return bundles
