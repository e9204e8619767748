"""Commands that look and change nothing: `rustsim-hpc inspect`, `plan` and `doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rustsim_hpc.cli_common import Session, debug_option, overrides

_JSON = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of text.")


@click.command(
    epilog="\b\nExamples:\n  rustsim-hpc inspect runs/first\n  rustsim-hpc inspect "
    "runs/first/checkpoints/step_0000000100.h5\n"
)
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE|DIR")
@_JSON
@debug_option
@click.pass_obj
def inspect(session: Session, path: Path, as_json: bool) -> int:
    """Show what a checkpoint, replay log or run's folder holds, and prove it.

    Exit code 5 if something in it does not hold: a truncated file, a flipped bit, a missing column.
    """
    from rustsim_hpc.inspection import inspect_path

    found = inspect_path(path)
    session.say(json.dumps(found.to_dict()) if as_json else found.text())
    code: int = found.exit_code
    return code


@click.command(
    epilog="\b\nExamples:\n  rustsim-hpc plan jobs/us_flights.toml --ranks 64\n  rustsim-hpc plan "
    "jobs/us_flights.toml --ranks 4096 --set run.agents=1_000_000_000\n"
)
@click.argument("job", type=click.Path(path_type=Path), metavar="JOB.toml")
@click.option(
    "--ranks", type=click.IntRange(min=1), default=1, show_default=True, metavar="R", help="Number of ranks."
)
@click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Set a key of the job file.")
@_JSON
@debug_option
@click.pass_obj
def plan(session: Session, job: Path, ranks: int, sets: tuple[str, ...], as_json: bool) -> None:
    """Show rows, memory and bytes of each rank for a job, without running it."""
    from rustsim_hpc.job import read_job
    from rustsim_hpc.launch import plan_job

    spec, _ = read_job(job, overrides({}, sets), debug=session.debug)
    made = plan_job(spec, ranks)
    session.say(json.dumps(made.to_dict()) if as_json else made.text())


@click.command(epilog="\b\nExamples:\n  rustsim-hpc doctor\n  rustsim-hpc doctor --json\n")
@_JSON
@debug_option
@click.pass_obj
def doctor(session: Session, as_json: bool) -> None:
    """Show what this machine and installation offer, and what should be mended.

    Versions, cores, memory, disk, MPI and its launcher, HDF5 (parallel or not), Numba's cache, GPU.
    """
    from rustsim_hpc.doctor import examine, table

    if session.speaks:
        report = examine()
        session.say(json.dumps(report) if as_json else table(report))
