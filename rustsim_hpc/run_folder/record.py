"""A run's record, ``run.json``: what runs, on what, how far it came, and every session that worked on it.

::

    format, version, run_id
    job, seed, agents, steps, step_length, time_unit,
    params, model, model_hash, executor, workers,
    partitions, fingerprint_scheme, command            the newest session's job
    ranks, versions, hosts, cpu_models, libm           the newest session's machines; where ranks are on CUDA
                                                       devices, a host has ``devices``: one entry a rank
    remote_workers                                     its remote workers' machines, once they were spoken to
    lineage                                            null, or parent, run_id, step, fingerprint, changes
    status ("running" | "done" | "stopped" | "failed"), step_index, fingerprint, started, ended
    sessions                                           one entry a process (team) that ran or resumed it
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, get_args

from rustsim_hpc.errors import RunFolderError
from rustsim_hpc.files import read_json, write_atomic
from rustsim_hpc.run_folder.environment import versions

RECORD = "run.json"
FORMAT = "rustsim-hpc run"
VERSION = 1

Status = Literal["running", "done", "stopped", "failed"]

_KINDS: Final = {
    "run_id": str, "job": str, "seed": int, "agents": int, "steps": int, "step_length": (int, float),
    "time_unit": str, "params": dict, "model": str, "model_hash": str, "executor": str, "workers": int,
    "partitions": int, "fingerprint_scheme": str, "command": list, "ranks": int, "versions": dict,
    "hosts": list, "cpu_models": list, "libm": list, "remote_workers": list, "status": str,
    "step_index": int, "fingerprint": str, "lineage": dict, "started": str, "ended": str, "sessions": list,
    "resumed_from": int, "exit_code": int, "reason": str,
}  # fmt: skip
"""Types that values of the record and its sessions must have, where they are present."""

_COUNTS: Final = ("agents", "steps", "step_index", "resumed_from")
_HEX64: Final = re.compile(r"0x[0-9a-f]{16}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run's record says about the job; the folder itself adds the facts about the machines.

    Attributes:
        job: the job's name.
        seed, agents, steps: as resolved; ``steps`` is the step to reach.
        step_length, time_unit: the time that a step stands for, and its unit.
        params: the model's parameters by name, as plain numbers, truth values and strings.
        model: name of the model's module, or its path.
        model_hash: hex digest of the model's source.
        executor, workers, partitions, fingerprint_scheme: how it runs.
        device: this rank's CUDA device (see `cuda_found.device_facts`), None on the CPU.
        command: the command line.
        lineage: for a fork: parent (folder), run_id, step, fingerprint, changes; else None.
    """

    job: str
    seed: int
    agents: int
    steps: int
    step_length: float = 1.0
    time_unit: str = "step"
    params: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    model_hash: str = ""
    executor: str = "inline"
    workers: int = 1
    partitions: int = 1
    fingerprint_scheme: str = "digest"
    device: Mapping[str, Any] | None = None
    command: tuple[str, ...] = ()
    lineage: Mapping[str, Any] | None = None


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a run's ``run.json``.

    Raises:
        RunFolderError: it is not there, damaged, or of another version.
    """
    try:
        record = read_json(path / RECORD)
    except OSError as error:
        raise RunFolderError(f"cannot read {path / RECORD}: {error.strerror}") from error
    except ValueError as error:
        raise RunFolderError(f"{path / RECORD} is damaged: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RunFolderError(f"{path / RECORD} is not the record of a run")
    if record.get("version") != VERSION:
        raise RunFolderError(f"{path / RECORD} has version {record.get('version')}, expected {VERSION}")
    sessions = record.setdefault("sessions", [])
    if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
        raise RunFolderError(f"{path / RECORD} is damaged: sessions are not a list of objects")
    for table in (record, *sessions):
        for name in ("hosts", "remote_workers"):
            if not _are_machines(table.get(name) or []):
                raise RunFolderError(f"{path / RECORD} is damaged: {name} are not a list of machines")
        for name in _KINDS:
            if not _is_right(name, table.get(name)):
                raise RunFolderError(f"{path / RECORD} is damaged: {name} is {json.dumps(table[name]):.40}")
    return record


def _is_right(name: str, value: Any) -> bool:
    """Return whether a value of the record can be right; None stands for no value."""
    if value is None:
        return True
    kind = _KINDS[name]
    if type(value) not in (kind if isinstance(kind, tuple) else (kind,)):  # True is no number here
        return False
    match name:
        case "fingerprint":
            return _HEX64.fullmatch(value) is not None
        case "status":
            return value in get_args(Status)
        case "step_length":
            return math.isfinite(value)
        case "params":
            return all(isinstance(one, bool | int | float | str) for one in value.values())
        case "lineage":
            return not value or _is_lineage(value)
    return name not in _COUNTS or value >= 0


def _is_lineage(value: dict[str, Any]) -> bool:
    changes = value.get("changes")
    return (
        all(isinstance(value.get(name), str) for name in ("parent", "fingerprint"))
        # A parent that was killed before it wrote its record has no id.
        and isinstance(value.get("run_id"), str | None)
        and type(value.get("step")) is int
        and isinstance(changes, dict)
        and all(isinstance(change, list) and len(change) == 2 for change in changes.values())
    )


def _are_machines(value: Any) -> bool:
    """Return whether a value has the form of a result of `environment.by_host` or `by_endpoint`."""
    return isinstance(value, list) and all(
        isinstance(machine, dict)
        and isinstance(machine.get("libm", {}), dict)
        and isinstance(machine.get("versions") or {}, dict)
        and isinstance(machine.get("devices", []), list)
        and all(isinstance(device, dict) for device in machine.get("devices", []))
        for machine in value
    )


def new_record() -> dict[str, Any]:
    """Return the record of a run that has not begun."""
    return {"format": FORMAT, "version": VERSION, "run_id": secrets.token_hex(8), "sessions": []}


def begin_session(
    record: dict[str, Any],
    facts: RunFacts,
    hosts: list[dict[str, Any]],
    ranks: int,
) -> None:
    """Update the record for a process that begins or continues the run."""
    known = asdict(facts)
    del known["device"]  # of one rank; `hosts` has those of all
    lineage = known.pop("lineage") or record.get("lineage")
    machine = {
        "ranks": ranks,
        "versions": versions(),
        "hosts": hosts,
        "cpu_models": sorted({host["cpu"] for host in hosts}),
        "libm": sorted({" ".join(host["libm"].values()) for host in hosts}),
        "remote_workers": [],
    }
    time = now()
    record.update(known | machine | {"lineage": lineage, "status": "running", "ended": None})
    record.setdefault("started", time)
    how = {name: known[name] for name in ("executor", "workers", "partitions", "command")}
    record["sessions"].append({"started": time, "resumed_from": None, "status": "running", **how, **machine})


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Replace the ``run.json`` of the folder ``path``.

    Raises:
        OSError: it cannot be written; the file is as before.
    """
    write_atomic(path / RECORD, json.dumps(record, indent=1, default=str) + "\n")


def now() -> str:
    """Return the time as an ISO 8601 text in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
