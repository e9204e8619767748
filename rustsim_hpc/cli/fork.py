"""`rustsim-hpc fork`: a new run from an old state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rustsim_hpc.cli.common import Session, debug_option, job_options, overrides, set_option
from rustsim_hpc.cli.run import finish, read_folder_job
from rustsim_hpc.job.options import FORK_OPTIONS

_EXAMPLES = """\b
Examples:
  rustsim-hpc fork runs/first --at 150 --set params.beta=0.3 --out runs/milder
  rustsim-hpc fork runs/first --set run.seed=2 --steps 200 --out runs/second-seed
  rustsim-hpc inspect runs/milder        # shows where it comes from
"""


@click.command(epilog=_EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--at", type=int, metavar="STEP", help="Start from the checkpoint of this step (default: the newest)."
)
@set_option
@job_options(*FORK_OPTIONS)
@debug_option
@click.pass_obj
def fork(session: Session, /, folder: Path, at: int | None, sets: tuple[str, ...], **given: Any) -> int:
    """Start a new run from a checkpoint of another, with changes.

    The new run has a folder of its own. Its record names the parent, step, fingerprint and changes. The
    columns and the number of agents must stay the same; parameters, seed, steps and phases may change.
    """
    spec, options = read_folder_job(session, folder, overrides(given, sets))
    from rustsim_hpc.job.launch import fork_run

    return finish(session, options, fork_run(folder, spec, options, session.team, at=at))
