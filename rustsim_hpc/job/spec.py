"""Job files: TOML in, a frozen and validated `JobSpec` out; and the command line's overrides."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rustsim_hpc.errors import JobError, RunFolderError, nearest
from rustsim_hpc.files import is_file, is_folder, read_bytes
from rustsim_hpc.job.key_errors import Origin, describe
from rustsim_hpc.job.keys import (
    BACKEND_VARIABLE,
    CommandTable,
    JobSpec,
    ModelTable,
    RemoteTable,
    ReplayTable,
    job_tables,
)


@dataclass(frozen=True)
class RunOptions:
    """Options of one start of a job; none of them changes what is computed.

    out: the run's folder (None: runs/NAME-TIME, chosen by rank 0). progress: show a bar on a terminal.
    profile: measure where the time goes.
    json: the last line of standard output is the summary as JSON. debug: errors come with a traceback.
    owns_process: the process runs only this job, so the watchdog may end it.
    """

    out: Path | None = None
    force: bool = False
    dry_run: bool = False
    progress: bool = True
    profile: bool = False
    json: bool = False
    debug: bool = False
    owns_process: bool = True


@dataclass(frozen=True)
class Override:
    """A key of the job file that the command line overrides; `source` is the option, for error texts."""

    table: str
    key: str
    value: Any
    source: str

    @staticmethod
    def parse(text: str) -> Override:
        """Parse "TABLE.KEY=VALUE"; a value that is not TOML is taken as text (params.airport=JFK).

        Raises:
            JobError: not of this form.
        """
        path, equals, value = text.partition("=")
        table, dot, key = path.strip().partition(".")
        if not (equals and dot and table and key):
            plain = text.strip() if equals and not dot and path.strip() else "beta=0.3"
            hint = f"a parameter of the model is params.NAME: --set params.{plain}"
            raise JobError(f"--set {text}: must be TABLE.KEY=VALUE", hint=hint)
        try:
            typed = tomllib.loads(f"value = {value.strip()}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            typed = value.strip()
        return Override(table, key, typed, f"--set {path.strip()}")


def read_job(
    path: Path,
    overrides: Iterable[Override] = (),
    *,
    environ: Mapping[str, str] = os.environ,
    debug: bool = False,
) -> tuple[JobSpec, RunOptions]:
    """Read a job file and apply the command line's overrides.

    Paths in the file are relative to its folder, paths in `overrides` to the working directory.

    Raises:
        JobError: the file cannot be read, is not TOML, or has an invalid key or value; its text has one line
            for each mistake.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        hint = f"continue a run: rustsim-hpc resume {path}" if is_file(path / "job.toml") else None
        hint = hint or _job_files_beside(path)
        raise JobError(f"{path}: {error.strerror or error}", hint=hint) from error
    except UnicodeDecodeError as error:
        raise JobError(f"{path}: not a TOML file: {error}") from error
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        hint = f'a job file names its model: run a TOML file with [model] module = "{path.name}"'
        raise JobError(f"{path}: not TOML: {error}", hint=hint if path.suffix == ".py" else None) from error
    return resolve_job(raw, path, tuple(overrides), environ=environ, debug=debug)


def read_folder_job(
    folder: Path, overrides: Iterable[Override] = (), *, debug: bool = False
) -> tuple[JobSpec, RunOptions]:
    """Read the job in a run's folder and apply the caller's overrides.

    Raises:
        RunFolderError: it is not the folder of a run.
        JobError: an override is invalid.
    """
    if not is_file(folder / "job.toml"):
        raise RunFolderError(f"{folder}: not the folder of a run: there is no job.toml in it")
    return read_job(folder / "job.toml", overrides, debug=debug)


def resolve_job(
    raw: Mapping[str, Any],
    path: Path,
    overrides: Sequence[Override] = (),
    *,
    environ: Mapping[str, str] = os.environ,
    debug: bool = False,
) -> tuple[JobSpec, RunOptions]:
    """Validate a job given as nested dicts; `path` is where it is from, for relative paths and errors.

    Raises:
        JobError: as `read_job`.
    """
    sources: Origin = {}
    tables: dict[str, Any] = {name: dict(t) if isinstance(t, dict) else t for name, t in raw.items()}
    for override in overrides:
        table = tables.setdefault(override.table, {})
        if isinstance(table, dict):
            table[override.key] = override.value
            sources[override.table, override.key] = override.source
    _apply_environment(tables, environ, sources)
    run = tables.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", path.stem)
    try:
        command = CommandTable.model_validate(tables.pop("command", {}))
        spec = JobSpec.model_validate(tables)
    except ValidationError as error:
        raise JobError("\n".join(describe(error, path, sources, job_tables()))) from None
    _require_endpoints(spec, path, sources)
    base = path.absolute().parent
    spec = spec.model_copy(
        update={
            "model": _resolved_module(spec.model, path, base, sources),
            "replay": _resolved_log(spec.replay, base, sources),
            "remote": _resolved_keys(spec.remote, base, sources),
        }
    )
    return spec, _options(command, base, sources, debug)


def _apply_environment(tables: dict[str, Any], environ: Mapping[str, str], sources: Origin) -> None:
    """Take the backend from RUSTSIM_BACKEND if the job's is unset or "auto"."""
    run = tables.get("run")
    wanted = environ.get(BACKEND_VARIABLE)
    if wanted and isinstance(run, dict) and run.get("backend", "auto") == "auto":
        run["backend"] = wanted
        sources["run", "backend"] = BACKEND_VARIABLE


def _resolved_module(model: ModelTable, path: Path, base: Path, sources: Origin) -> ModelTable:
    if not model.module.endswith(".py"):
        return model
    source = sources.get(("model", "module"))
    file = ((Path.cwd() if source else base) / model.module).resolve()
    if not is_file(file):
        others = (other.name for other in file.parent.glob("*.py")) if is_folder(file.parent) else ()
        where = source or f"{path}: [model] module"
        raise JobError(f"{where}: there is no file {file}{nearest(file.name, others)}")
    return model.model_copy(update={"module": str(file)})


def _resolved_log(replay: ReplayTable, base: Path, sources: Origin) -> ReplayTable:
    if replay.verify is None:
        return replay
    start = Path.cwd() if ("replay", "verify") in sources else base
    return replay.model_copy(update={"verify": str((start / replay.verify).absolute())})


def _require_endpoints(spec: JobSpec, path: Path, sources: Origin) -> None:
    """Raise JobError if a remote job has no endpoints, or fewer partitions than endpoints."""
    run, endpoints = spec.run, spec.remote.endpoints
    if run.executor != "remote":
        return
    if not endpoints:
        where = sources.get(("run", "executor")) or f"{path}: [run] executor"
        raise JobError(
            f"{where}: no remote workers are given",
            hint='--endpoint tcp://HOST:PORT for each, or [remote] endpoints = ["tcp://HOST:PORT", ...]',
        )
    if run.partitions is not None and run.partitions < len(endpoints):
        where = sources.get(("run", "partitions")) or f"{path}: [run] partitions"
        raise JobError(f"{where}: {run.partitions} are too few for {len(endpoints)} endpoints")


def _resolved_keys(remote: RemoteTable, base: Path, sources: Origin) -> RemoteTable:
    if remote.keys is None:
        return remote
    start = Path.cwd() if ("remote", "keys") in sources else base
    return remote.model_copy(update={"keys": str((start / remote.keys).absolute())})


def _options(command: CommandTable, base: Path, sources: Origin, debug: bool) -> RunOptions:
    start = Path.cwd() if ("command", "out") in sources else base
    return RunOptions(
        out=None if command.out is None else (start / command.out).absolute(),
        force=command.force,
        dry_run=command.dry_run,
        progress=not command.no_progress,
        profile=command.profile,
        json=command.json_line,
        debug=debug,
    )


def _job_files_beside(path: Path) -> str | None:
    """Return a hint with the job files that a wrong path may have meant."""
    folder = path.parent if is_folder(path.parent) else Path("jobs")
    names = sorted(str(file) for file in folder.glob("*.toml") if file.name != "pyproject.toml")
    return f"job files here: {', '.join(names[:8])}" if names else None
