"""`rustsim-hpc run` and `resume`: read the job, hand it to the engine, print how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rustsim_hpc.cli.common import Session, debug_option, job_options, overrides, set_option
from rustsim_hpc.job.options import RESUME_OPTIONS, RUN_OPTIONS

if TYPE_CHECKING:
    from rustsim_hpc.job.keys import JobSpec
    from rustsim_hpc.job.spec import Override, RunOptions
    from rustsim_hpc.job.summary import RunSummary

_RUN_EXAMPLES = """\b
Examples:
  rustsim-hpc run jobs/us_flights.toml
  rustsim-hpc run jobs/us_flights.toml --executor threads --workers 2
  rustsim-hpc run jobs/us_flights.toml --agents 100000 --set params.beta=0.4
  rustsim-hpc run jobs/us_flights.toml --record --checkpoint-every 30 --out runs/first
  rustsim-hpc run jobs/us_flights.toml --verify runs/first/replay.jsonl --out runs/second
  mpirun -n 4 rustsim-hpc run jobs/us_flights.toml
  rustsim-hpc run jobs/us_flights.toml --executor remote --endpoint tcp://hostA:5555 --keys keys
  rustsim-hpc run jobs/us_flights.toml --dry-run

Every option is also a key of the job file, see docs/job_file.md.
"""

_RESUME_EXAMPLES = """\b
Examples:
  rustsim-hpc resume runs/first
  rustsim-hpc resume runs/first --at 150
  rustsim-hpc resume runs/first --steps 200
  mpirun -n 2 rustsim-hpc resume runs/first
"""


@click.command(epilog=_RUN_EXAMPLES)
@click.argument("job", type=click.Path(path_type=Path), metavar="JOB.toml")
@job_options(*RUN_OPTIONS[:3])
@set_option
@job_options(*RUN_OPTIONS[3:])
@debug_option
@click.pass_obj
def run(session: Session, /, job: Path, sets: tuple[str, ...], **given: Any) -> int:
    """Run a job.

    Under mpirun or srun, the ranks share the work. The folder of the run contains the resolved job, the
    outputs, the checkpoints and the replay log. Ctrl-C stops after the current step and saves a checkpoint;
    `resume` continues.
    """
    from rustsim_hpc.job.spec import read_job

    spec, options = session.on_all(lambda: read_job(job, overrides(given, sets), debug=session.debug))
    if options.dry_run:
        from rustsim_hpc.job.launch import plan_job

        text = session.on_all(lambda: f"{spec.to_toml()}\n{plan_job(spec, session.team.size).text()}")
        session.say(text)
        return 0
    from rustsim_hpc.job.launch import run_job

    return finish(session, options, run_job(spec, options, session.team))


@click.command(epilog=_RESUME_EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--at", type=int, metavar="STEP", help="Continue from the checkpoint of this step (default: the newest)."
)
@job_options(*RESUME_OPTIONS)
@debug_option
@click.pass_obj
def resume(session: Session, /, folder: Path, at: int | None, **given: Any) -> int:
    """Continue a run from its newest checkpoint.

    The result has the same bits as if the run had never stopped, on any number of ranks and partitions.
    A run without checkpoints starts at step 0; a finished run prints its summary. The last step given with
    --steps is remembered.
    """
    spec, options = read_folder_job(session, folder, overrides(given))
    from rustsim_hpc.job.launch import resume_run
    from rustsim_hpc.job.restored import with_last_goal

    if given["steps"] is None:
        spec = session.on_all(lambda: with_last_goal(spec, folder))

    return finish(session, options, resume_run(folder, spec, options, session.team, at=at))


def read_folder_job(session: Session, folder: Path, changes: list[Override]) -> tuple[JobSpec, RunOptions]:
    """Read the job that a run's folder keeps, with what the command line sets over it, on all ranks.

    Raises:
        RunFolderError: it is not the folder of a run.
        JobError: a change cannot be right.
    """
    from rustsim_hpc.job.spec import read_folder_job as read

    return session.on_all(lambda: read(folder, changes, debug=session.debug))


def finish(session: Session, options: RunOptions, summary: RunSummary) -> int:
    """Print how a run ended, and return the exit code."""
    if options.json:
        session.say_last(summary.text(), summary.to_json())
    else:
        session.say(summary.text())
    return summary.exit_code
