"""Inspect a checkpoint, a replay log or a run's folder: its content, and whether it is valid.

Whatever the bytes are, the result is an `Inspection`: what cannot be read, or is invalid, is one of its
problems.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from rustsim_hpc.errors import RunFolderError, RustsimError
from rustsim_hpc.files import exists, is_file, is_folder
from rustsim_hpc.job.plan import size
from rustsim_hpc.job.spec import read_folder_job
from rustsim_hpc.modeling.outputs import MANIFEST
from rustsim_hpc.proof.fingerprint import hex64
from rustsim_hpc.proof.replay_log import ReplayLog, read_replay_log
from rustsim_hpc.ranks.team import SoloTeam
from rustsim_hpc.run_folder.folder import JOB, REPLAY
from rustsim_hpc.run_folder.manifest import read_manifest
from rustsim_hpc.run_folder.reader import Run, open_run
from rustsim_hpc.run_folder.record import RECORD
from rustsim_hpc.storage import CheckpointHeader, list_checkpoints, load, manifest_of
from rustsim_hpc.texts import shown

T = TypeVar("T")

_DAMAGED: Final = 5
_PROOF_ENDING: Final = ".proof.json"
# fingerprint values by (scheme, step), each with the place that states it
_Stated = dict[tuple[str, int], tuple[str, int]]


@dataclass(frozen=True)
class Inspection:
    """What was found. kind: "checkpoint", "replay log", "run", "folder of checkpoints" or "file"."""

    path: Path
    kind: str
    facts: Mapping[str, Any]
    problems: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0, or 5 if there are problems."""
        return _DAMAGED if self.problems else 0

    def to_dict(self) -> dict[str, Any]:
        """Return what was found in JSON's types."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "proved": not self.problems,
            "problems": list(self.problems),
            **self.facts,
        }

    def text(self) -> str:
        """Return what was found for a reader."""
        lines = [f"{self.kind} {self.path}"]
        for name, value in self.facts.items():
            if name == "lineage" and value:
                lines += ["  lineage", *_tree(value)]
            elif isinstance(value, list | dict) and value:
                entries = (
                    value.items() if isinstance(value, dict) else ((_plain(entry), "") for entry in value)
                )
                lines.append(f"  {name}")
                lines += [f"    {shown(key)}  {_plain(entry)}".rstrip() for key, entry in entries]
            else:
                lines.append(f"  {name:<12} {_plain(value)}")
        lines += [f"  damaged: {shown(problem)}" for problem in self.problems]
        return "\n".join(lines if self.problems else [*lines, "  everything here is valid"])


def inspect_path(path: Path) -> Inspection:
    """Inspect and verify a file or folder.

    Raises:
        RunFolderError: the path does not exist, or is a folder that is no run's.
    """
    if not exists(path):
        raise RunFolderError(f"{path}: there is no such file or folder")
    if is_folder(path):
        if (path / JOB).exists() or (path / RECORD).exists():
            return _run(path)
        if list_checkpoints(path):
            return _checkpoints(path)
        raise RunFolderError(f"{path}: neither a run's folder (it has no {JOB}) nor one of checkpoints")
    if not is_file(path):
        # Opening a pipe would block.
        return Inspection(path, "file", {}, ("it is not a file",))
    if path.name.endswith(".jsonl"):
        return _log(path)
    return _checkpoint(path)


# -- files ---------------------------------------------------------------------------------------------


def _attempt(problems: list[str], make: Callable[[], T]) -> T | None:
    """Return `make()`; if it fails in any way, add the reason to the problems and return None."""
    try:
        return make()
    except RustsimError as error:
        problems.append(str(error))
    except Exception as error:  # noqa: BLE001 (bytes that are not ours may raise anything; looking must go on)
        problems.append(f"{type(error).__name__}: {error}")
    return None


def _proved(path: Path) -> CheckpointHeader:
    """Verify a checkpoint's bytes, read all of it, and verify its digests and fingerprint.

    Raises:
        CheckpointFileError: it is invalid.
    """
    return load(path, SoloTeam(), lambda header: (0, header.rows)).header


def _checkpoint(path: Path) -> Inspection:
    if path.name.endswith(_PROOF_ENDING):
        path = path.with_name(path.name.removesuffix(_PROOF_ENDING) + ".h5")
    problems: list[str] = []
    header = _attempt(problems, lambda: _proved(path))
    return Inspection(path, "checkpoint", {} if header is None else _header_facts(header), tuple(problems))


def _header_facts(header: CheckpointHeader) -> dict[str, Any]:
    fingerprint = header.fingerprint
    columns = header.schema.columns
    digests = dict(zip(header.schema.names, header.digests[1:], strict=False))
    return {
        "step_index": header.step_index,
        "rows": header.rows,
        "sequence": header.sequence,
        "label": header.label,
        "fingerprint": hex64(fingerprint.value),
        "fingerprint_scheme": fingerprint.scheme,
        "seed": header.seed,
        "parameters": dict(header.parameters),
        "columns": {
            column.name: f"{column.dtype} [{column.unit}] digest {hex64(digests.get(column.name, 0))}"
            for column in columns
        },
    }


def _log(path: Path) -> Inspection:
    problems: list[str] = []
    log = _attempt(problems, lambda: read_replay_log(path))
    if log is not None and (missing := log.missing_step()) is not None:
        problems.append(f"{path} lacks step {missing}")
    return Inspection(path, "replay log", {} if log is None else _log_facts(log), tuple(problems))


def _log_facts(log: ReplayLog) -> dict[str, Any]:
    header, entries = log.header, log.entries
    facts: dict[str, Any] = {
        "scheme": header.scheme,
        "agents": header.agents,
        "seed": header.seed,
        "interval": header.interval,
        "entries": len(entries),
        "parameters": dict(header.params),
        "notes": list(header.notes),
    }
    if entries:
        facts |= {"first": _entry(entries[0]), "last": _entry(entries[-1])}
    return facts


def _entry(entry: Any) -> dict[str, Any]:
    return {"step": entry.step_index, "value": hex64(entry.value)}


# -- folders -------------------------------------------------------------------------------------------


def _checkpoints(folder: Path) -> Inspection:
    problems: list[str] = []
    facts = {"checkpoints": _prove_all(list_checkpoints(folder), problems, {})}
    return Inspection(folder, "folder of checkpoints", facts, tuple(problems))


def _run(folder: Path) -> Inspection:
    named = [folder / name for name in (JOB, RECORD, REPLAY, MANIFEST)]
    problems = [f"{path} is not a file" for path in named if path.exists() and not path.is_file()]
    run = None if problems else _attempt(problems, lambda: open_run(folder))
    if run is None:
        return Inspection(folder, "run", {}, tuple(problems))
    _attempt(problems, lambda: read_folder_job(folder))
    facts: dict[str, Any] = {}
    for name in ("name", "status", "step_index", "steps", "agents", "seed", "params"):
        facts[name] = _attempt(problems, lambda name=name: getattr(run, name))  # type: ignore[misc]
    if devices := _attempt(problems, lambda: _devices(run)):
        facts["devices"] = devices
    facts["lineage"] = _attempt(problems, lambda: _lineage(run))
    stated: _Stated = {}
    facts["replay"] = _run_log(run, problems, stated)
    paths = _attempt(problems, run.checkpoints) or {}
    facts["checkpoints"] = _prove_all(list(paths.values()), problems, stated)
    facts["outputs"] = _outputs(run, problems)
    _attempt(problems, run.metrics)
    _final_state(run, problems, stated)
    return Inspection(folder, "run", facts, tuple(problems))


def _outputs(run: Run, problems: list[str]) -> dict[str, str] | None:
    """Return the outputs, after a look at their files; HDF5 is not opened: damage in one can crash it."""
    kinds = _attempt(problems, run.outputs)
    for file, kind in (kinds or {}).items():
        if kind == "series":
            _attempt(problems, lambda file=file: _require_rows(run, file))  # type: ignore[misc]
        elif kind != "picture" and not is_file(run.path / file):
            problems.append(f"{run.path / file}: there is no such file")
    return kinds


def _require_rows(run: Run, file: str) -> None:
    """Read a series, and require a row for each due step of a finished run.

    Raises:
        RunFolderError: it cannot be read, or has other rows.
    """
    rows = max((len(values) for values in run.series(file).values()), default=0)
    manifest = read_manifest(run.path)
    every = int(manifest.entries[file]["every"])
    due = len(range(-(-manifest.first_step // every) * every, run.step_index + 1, every))
    if run.record.get("status") == "done" and rows != due:
        raise RunFolderError(f"{run.path / file} has {rows} rows, expected {due}")


def _devices(run: Run) -> dict[str, str]:
    """Return the CUDA device that each rank of the newest session has, in words; empty on CPUs."""
    lines = {}
    for host in run.record.get("hosts") or ():
        for facts in host.get("devices", []):
            lines[f"rank {facts['rank']}"] = (
                f"{facts['name']} (compute capability {facts['compute_capability']}), "
                f"{size(facts['memory_bytes'])}, {facts['uuid']} at {facts['pci_bus_id']} of {host['host']}, "
                f"device {facts['ordinal']} there; driver {facts['driver']} (CUDA {facts['cuda_driver']}), "
                f"CuPy {facts['cupy']} (CUDA {facts['cuda_runtime']})"
            )
    return lines


def _lineage(run: Run) -> list[dict[str, Any]]:
    """Return the origins of a run: its parent, then the parent's parent, as far as the folders exist."""
    found: list[dict[str, Any]] = []
    seen = {run.record.get("run_id")}
    origin = run.lineage
    while origin:
        facts = {name: str(origin[name]) for name in ("parent", "run_id", "fingerprint")}
        changes = {str(key): [old, new] for key, (old, new) in origin["changes"].items()}
        found.append({**facts, "step": int(origin["step"]), "changes": changes})
        parent = Path(origin["parent"])
        if origin["run_id"] in seen or not (parent / RECORD).exists():
            break
        seen.add(origin["run_id"])
        ancestor = open_run(parent)
        if ancestor.record.get("run_id") != origin["run_id"]:
            break  # another run has taken the folder since
        origin = ancestor.lineage
    return found


def _tree(lineage: list[dict[str, Any]]) -> list[str]:
    lines = []
    for depth, origin in enumerate(lineage):
        changes = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in origin["changes"].items())
        what = f"{origin['parent']} at step {origin['step']} ({origin['fingerprint']})"
        lines.append(f"    {'   ' * depth}└─ from {what}; changed: {changes or 'nothing'}")
    return lines


def _run_log(run: Run, problems: list[str], stated: _Stated) -> str | None:
    if not (run.path / REPLAY).exists():
        return None
    log = _attempt(problems, run.replay)
    if log is None:
        return "damaged"
    for entry in log.entries:
        stated[log.header.scheme, entry.step_index] = (REPLAY, entry.value)
    problems += _log_problems(run, log)
    return f"{len(log.entries)} entries, {log.header.scheme}"


def _log_problems(run: Run, log: ReplayLog) -> list[str]:
    """Return how a run's log does not fit to the run's record, and whether it lacks entries."""
    found = [
        f"{REPLAY} is of another run: {name} {ours} against {theirs} in {RECORD}"
        for name, ours in (("agents", log.header.agents), ("seed", log.header.seed))
        if (theirs := run.record.get(name)) is not None and ours != theirs
    ]
    recorded_all = run.record.get("status") == "done" and run.job.get("replay", {}).get("mode") == "record"
    missing = log.missing_step(run.step_index if recorded_all else None)
    return found if missing is None else [*found, f"{REPLAY} lacks step {missing}"]


def _prove_all(paths: list[Path], problems: list[str], stated: _Stated) -> dict[str, str]:
    """Verify checkpoints, and compare their fingerprints with those stated so far; return a line on each."""
    lines = {}
    for path in paths:
        found = _attempt(problems, lambda path=path: (_proved(path), _bytes_of(path)))  # type: ignore[misc]
        if found is None:
            lines[path.name] = "damaged"
            continue
        header, stored = found
        value = header.fingerprint.value
        _compare(stated, header.fingerprint.scheme, header.step_index, path.name, value, problems)
        lines[path.name] = f"{header.rows:,} rows, {hex64(value)} ({header.fingerprint.scheme}), {stored}"
    return lines


def _bytes_of(path: Path) -> str:
    """Return the size of a checkpoint's files, shards included."""
    return size(sum(file.size for file in manifest_of(path).files))


def _final_state(run: Run, problems: list[str], stated: _Stated) -> None:
    """Compare the fingerprint in a finished run's record with what its log and checkpoints say."""
    value = _attempt(problems, lambda: run.fingerprint)
    scheme = run.record.get("fingerprint_scheme")
    if value is not None and run.record.get("status") == "done" and isinstance(scheme, str):
        _compare(stated, scheme, run.step_index, RECORD, value, problems)


def _compare(stated: _Stated, scheme: str, step: int, place: str, value: int, problems: list[str]) -> None:
    other, expected = stated.setdefault((scheme, step), (place, value))
    if expected != value:
        problems.append(
            f"step {step}: {place} says fingerprint {hex64(value)}, {other} says {hex64(expected)} ({scheme})"
        )


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return shown(value)
    return "none" if value in (None, [], {}) else json.dumps(value)
