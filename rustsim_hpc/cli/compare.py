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
  rustsim-hpc verify runs/first --against runs/elsewhere/replay.jsonl --executor threads --workers 2
  rustsim-hpc verify runs/first --against runs/first/replay.jsonl --steps 50
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
    help="Where the report goes as JSON (default: divergence.json in DIR).",
)


@click.command(epilog=_VERIFY_EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="LOG",
    required=True,
    help="The recorded replay.jsonl, or the folder of the run that recorded it.",
)
@click.option("--steps", type=click.IntRange(min=0), metavar="N", help="Step to reach (default: the run's).")
@job_options("--executor", "--workers", "--partitions", "--guard", "--endpoint", "--keys", "--check")
@_OUT
@job_options("--no-progress", "--json")
@debug_option
@click.pass_obj
def verify(
    session: Session, /, folder: Path, against: Path, steps: int | None, out: Path | None, **given: Any
) -> int:
    """Run the job of DIR again and check each step against a recorded log.

    It runs in memory; in DIR only the report of a difference is written. At the first step that is not as the
    log has it, and where the log ends early, it stops with exit code 4. Where the log's run can be run again
    as well, the report says which phase, columns and rows are the first to differ, and likely causes.
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
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Threads of a rank.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where the report goes as JSON (default: divergence.json in DIR1, if they differ).",
)
@click.option(
    "--json", "as_json", is_flag=True, help="End standard output with the report as a line of JSON."
)
@debug_option
@click.pass_obj
def diff(
    session: Session, left: Path, right: Path, workers: int | None, out: Path | None, as_json: bool
) -> int:
    """Compare two runs as far as both go, and find where they first differ.

    Exit code 0 if they are equal, 4 if not. Logs and checkpoints say after which step; the runs are then
    restored to the step before, taken through it phase by phase, and the rows are bisected. Runs without logs
    are run again. Other seeds and parameters are fine: the report names them.
    """
    from rustsim_hpc.divergence.verification import EXIT_DIFFERENT, diff_runs

    report = diff_runs(left, right, session.team, out=out, workers=workers)
    session.say(report.text(), *([json.dumps(report.to_dict())] if as_json else []))
    return 0 if report.equal else EXIT_DIFFERENT
