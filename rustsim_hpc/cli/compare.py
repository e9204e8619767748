"""`rustsim-hpc verify` and `diff`: run a job again against a log; find where two runs part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from rustsim_hpc.cli.common import Session, debug_option, job_options, overrides
from rustsim_hpc.cli.run import read_folder_job

_VERIFY_EXAMPLES = """\b
Examples:
  rustsim-hpc verify runs/first --against runs/first/replay.jsonl
  rustsim-hpc verify runs/first --against runs/second --steps 50 --executor processes
  mpirun -n 2 rustsim-hpc verify runs/first --against runs/first/replay.jsonl
"""

_DIFF_EXAMPLES = """\b
Examples:
  rustsim-hpc diff runs/first runs/second
  rustsim-hpc diff runs/first runs/second --out first-second.json
  mpirun -n 4 rustsim-hpc diff runs/first runs/second
"""

_OUT = click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the report to this file, as JSON (default: divergence.json in DIR).",
)


@click.command(epilog=_VERIFY_EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="LOG",
    required=True,
    help="A recorded replay.jsonl, or the folder of the run that recorded it.",
)
@click.option(
    "--steps", type=click.IntRange(min=0), metavar="N", help="Last step to check (default: that of the run)."
)
@job_options("--executor", "--workers", "--partitions", "--guard", "--endpoint", "--keys", "--check")
@_OUT
@job_options("--no-progress", "--json")
@debug_option
@click.pass_obj
def verify(
    session: Session, /, folder: Path, against: Path, steps: int | None, out: Path | None, **given: Any
) -> int:
    """Run a job again, checking each step against a log.

    The job of DIR runs in memory; only the report of a difference is written to DIR. The exit code is 4 at
    the first step that differs from the log, or if the log ends early. If the run of the log can be repeated
    too, the report names the first phase, columns and rows that differ, and likely causes.
    """
    spec, options = read_folder_job(session, folder, overrides(given))
    from rustsim_hpc.divergence.verification import verify_run

    made = verify_run(folder, against, spec, options, session.team, steps=steps, out=out)
    if made.failure is None or made.report is not None:
        session.say(made.text())
    if options.json:
        session.say(made.to_json())
    if made.failure is not None:
        raise made.failure
    return 0


@click.command(epilog=_DIFF_EXAMPLES)
@click.argument("left", type=click.Path(path_type=Path), metavar="DIR1")
@click.argument("right", type=click.Path(path_type=Path), metavar="DIR2")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Threads of each rank.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the report to this file, as JSON (default: divergence.json in DIR1, if they differ).",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the report as one line of JSON at the end of standard output.",
)
@debug_option
@click.pass_obj
def diff(
    session: Session, left: Path, right: Path, workers: int | None, out: Path | None, as_json: bool
) -> int:
    """Compare two runs, and find where they first differ.

    They are compared up to the step that both have reached. Exit code 0 if they are equal, 4 if not. Logs
    and checkpoints give the first step that differs. That step is then repeated phase by phase to find the
    phase, the columns and the rows. Runs without logs are run again. Seeds and parameters may differ: the
    report names them.
    """
    from rustsim_hpc.divergence.verification import EXIT_DIFFERENT, diff_runs

    report = diff_runs(left, right, session.team, out=out, workers=workers)
    session.say(report.text(), *([json.dumps(report.to_dict())] if as_json else []))
    return 0 if report.equal else EXIT_DIFFERENT
