"""Run, resume and fork jobs from Python, as the command line does: `run_job`, `resume_run`, `fork_run`.

::

    done = rs.run_job("jobs/us_flights.toml", agents=100_000, out="runs/first", changes={"params.beta": 0.4})
    rs.open_run(done.folder).series("curve")

Errors are raised, not turned into exit codes. A process that is not one of several ranks is never ended: the
watchdog is off, and signal handlers are installed only during a call. Ranks (a script under mpirun or srun)
must call together, and an error on one of them alone ends all, as with the command.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rustsim_hpc.errors import EXIT_FAILED, EXIT_INTERRUPTED, JobError, RustsimError, named, nearest
from rustsim_hpc.job import launch
from rustsim_hpc.job.options import FORK_OPTIONS, OPTION_KEYS, RESUME_OPTIONS, RUN_OPTIONS
from rustsim_hpc.job.restored import with_last_goal
from rustsim_hpc.job.spec import Override, RunOptions, read_folder_job, read_job, resolve_job
from rustsim_hpc.ranks.agreement import on_all
from rustsim_hpc.ranks.team import Team, open_team

if TYPE_CHECKING:
    from rustsim_hpc.job.keys import JobSpec
    from rustsim_hpc.job.summary import RunSummary

_NOT_A_FILE: Final = Path("job")
_COMMANDS_OWN: Final = ("--dry-run", "--no-progress", "--json")


def run_job(
    job: str | os.PathLike[str] | Mapping[str, Any],
    *,
    changes: Mapping[str, Any] | None = None,
    progress: bool = False,
    **options: Any,
) -> RunSummary:
    """Run a job from its first step, as `rustsim-hpc run` does, and return how it ended.

    Ctrl-C (an interrupted notebook cell, SIGTERM, SIGUSR1, a time limit) stops it after the current step with
    a checkpoint: `stopped` of the result then says why, and `resume_run` continues. A second Ctrl-C raises
    `KeyboardInterrupt`.

    Args:
        job: a job file, or its content as nested dicts (paths in it are relative to the working directory).
        changes: keys of the job file to set, as `--set` does: ``{"params.beta": 0.3}``.
        progress: show a bar if standard error is a terminal.
        options: those of `rustsim-hpc run` by name: ``out``, ``force``, ``agents``, ``steps``, ``seed``,
            ``executor``, ``workers``, ``partitions``, ``guard``, ``backend``, ``endpoint``, ``keys``,
            ``check``, ``time_limit``, ``record``, ``verify``, ``fingerprint``, ``checkpoint_every``,
            ``profile``. ``record`` and ``check`` are true or false; None leaves a key as it is.

    Raises:
        RustsimError: as `rustsim-hpc run` reports it; `exit_code` is the command's exit code.
    """
    with _ranks() as team:

        def read() -> tuple[JobSpec, RunOptions]:
            overrides = _overrides("run_job", options, RUN_OPTIONS, changes, progress=progress)
            if isinstance(job, Mapping):
                _require_names(job, "job")
                return resolve_job(job, _NOT_A_FILE, overrides)
            return read_job(Path(job), overrides)

        spec, run_options = on_all(team, read)
        return launch.run_job(spec, _of_a_call(run_options), team)


def resume_run(
    folder: str | os.PathLike[str], *, at: int | None = None, progress: bool = False, **options: Any
) -> RunSummary:
    """Continue the run in a folder, as `rustsim-hpc resume` does, and return how it ended.

    Args:
        folder: the run's folder.
        at: step of the checkpoint to continue from; the newest proven one if None.
        progress: as for `run_job`.
        options: those of `rustsim-hpc resume` by name: ``steps`` (the step to reach), ``executor``,
            ``workers``, ``partitions``, ``guard``, ``backend``, ``endpoint``, ``keys``, ``check``,
            ``time_limit``, ``checkpoint_every``, ``profile``.

    Raises:
        RustsimError: as for `run_job`; also when no checkpoint can be used.
    """
    path = Path(folder)
    with _ranks() as team:

        def read() -> tuple[JobSpec, RunOptions]:
            overrides = _overrides("resume_run", options, RESUME_OPTIONS, progress=progress)
            spec, run_options = read_folder_job(path, overrides)
            return spec if options.get("steps") is not None else with_last_goal(spec, path), run_options

        spec, run_options = on_all(team, read)
        return launch.resume_run(path, spec, _of_a_call(run_options), team, at=at)


def fork_run(
    folder: str | os.PathLike[str],
    *,
    at: int | None = None,
    changes: Mapping[str, Any] | None = None,
    progress: bool = False,
    **options: Any,
) -> RunSummary:
    """Start a new run from a checkpoint of another, as `rustsim-hpc fork` does, and return how it ended.

    ::

        for beta in (0.2, 0.3, 0.4):
            rs.fork_run("runs/first", at=150, changes={"params.beta": beta}, out=f"runs/beta-{beta}")

    Args:
        folder: the folder of the run to start from; it is only read.
        at: step of the checkpoint to start from; the newest proven one if None.
        changes, progress: as for `run_job`.
        options: those of `rustsim-hpc fork` by name: ``out`` (the new folder; needed), ``force``, ``steps``
            (the step to reach), ``seed``, ``executor``, ``workers``, ``partitions``, ``guard``,
            ``backend``, ``endpoint``, ``keys``, ``check``, ``time_limit``, ``record``, ``fingerprint``,
            ``checkpoint_every``, ``profile``.

    Raises:
        RustsimError: as for `run_job`; also when no checkpoint can be used or the columns are others.
    """
    path = Path(folder)
    with _ranks() as team:

        def read() -> tuple[JobSpec, RunOptions]:
            return read_folder_job(
                path, _overrides("fork_run", options, FORK_OPTIONS, changes, progress=progress)
            )

        spec, run_options = on_all(team, read)
        return launch.fork_run(path, spec, _of_a_call(run_options), team, at=at)


def _of_a_call(options: RunOptions) -> RunOptions:
    if options.dry_run:
        raise JobError(
            "[command] dry_run: a call from Python runs the job", hint="rustsim-hpc plan shows its plan"
        )
    return replace(options, owns_process=False)


@cache
def _team() -> Team:
    return open_team()


@contextmanager
def _ranks() -> Iterator[Team]:
    """Yield this process's team; after an error, end all ranks if the others may wait for it for ever."""
    team = _team()
    try:
        yield team
    except RustsimError as error:
        if team.broken:
            team.abort(error.exit_code, f"rank {team.rank}: {error}")
        raise
    except BaseException as error:
        if team.size > 1:
            code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAILED
            team.abort(code, f"rank {team.rank}: {named(error)}")
        raise


def _overrides(
    call: str,
    options: Mapping[str, Any],
    known: Sequence[str],
    changes: Mapping[str, Any] | None = None,
    *,
    progress: bool,
) -> list[Override]:
    """Return the keys of the job file that a call's options and changes set."""
    names = [option.removeprefix("--").replace("-", "_") for option in known if option not in _COMMANDS_OWN]
    made = [Override("command", "no_progress", not progress, "progress")]
    for name, value in options.items():
        if name not in names:
            near = nearest(name, names)
            hint = None if near else 'changes={"TABLE.KEY": value} sets any key of the job file'
            raise JobError(f'{call} has no option "{name}"{near}', hint=hint)
        if value is not None:
            table, key = OPTION_KEYS[f"--{name.replace('_', '-')}"]
            made.append(Override(table, key, _value_of(name, value), name))
    return made + [_override(path, value) for path, value in (changes or {}).items()]


def _require_names(table: Mapping[Any, Any], where: str) -> None:
    for name, value in table.items():
        if not isinstance(name, str):
            raise JobError(f"{where}: {name!r} is no name of a table or key: names are texts")
        if isinstance(value, Mapping):
            _require_names(value, f"{where}: [{name}]")


def _override(path: str, value: Any) -> Override:
    table, dot, key = str(path).partition(".")
    if not (table and dot and key):
        raise JobError(
            f'changes: "{path}" must be TABLE.KEY',
            hint=f'a parameter of the model is "params.NAME": changes={{"params.{path or "beta"}": 0.3}}',
        )
    return Override(table, key, _plain(value), f'changes["{path}"]')


def _value_of(name: str, value: Any) -> Any:
    """Return what an option sets its key to."""
    if name == "record" and isinstance(value, bool):
        return "record" if value else "off"
    return [value] if name == "endpoint" and isinstance(value, str) else _plain(value)


def _plain(value: Any) -> Any:
    """Return a value as a job file holds it: paths as text, tuples as lists, NumPy scalars as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, tuple):
        return list(value)
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value
