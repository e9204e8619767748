"""Commands that look and change nothing: `rustsim-hpc inspect`, `plan` and `doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rustsim_hpc.cli.common import Session, debug_option, job_options, overrides, set_option
from rustsim_hpc.errors import JobError
from rustsim_hpc.job.prediction import ASSUMPTIONS, Network, Prediction, curve, table

if TYPE_CHECKING:
    from rustsim_hpc.job.keys import JobSpec

_LEAST_SAMPLE = 100_000
"""Rows whose steps can be told from a step without rows."""

_POSITIVE = click.FloatRange(min=0, min_open=True)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of text.")


@click.command(
    epilog="\b\nExamples:\n  rustsim-hpc inspect runs/first\n  rustsim-hpc inspect "
    "runs/first/checkpoints/step_0000000150.h5\n"
)
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE|DIR")
@_JSON
@debug_option
@click.pass_obj
def inspect(session: Session, path: Path, as_json: bool) -> int:
    """Show and check a checkpoint, replay log or run folder.

    Exit code 5 if something is damaged: a truncated file, a flipped bit, a missing column.
    """
    from rustsim_hpc.run_folder.inspection import inspect_path

    found = inspect_path(path)
    session.say(json.dumps(found.to_dict()) if as_json else found.text())
    code: int = found.exit_code
    return code


@click.command(
    epilog="\b\nExamples:\n  rustsim-hpc plan jobs/us_flights.toml --ranks 64\n  rustsim-hpc plan "
    "jobs/us_flights.toml --ranks 4096 --agents 1000000000\n  rustsim-hpc plan "
    "jobs/us_flights.toml --ranks 512 --predict --latency 1.5 --bandwidth 25\n"
)
@click.argument("job", type=click.Path(path_type=Path), metavar="JOB.toml")
@click.option(
    "--ranks", type=click.IntRange(min=1), default=1, show_default=True, metavar="R", help="Number of ranks."
)
@job_options("--agents")
@set_option
@click.option(
    "--predict",
    is_flag=True,
    help="Predict the time of a step and the parallel efficiency, from the figures of `rustsim-hpc bench` on "
    "this machine, some steps of a part of the job, and the network figures below.",
)
@click.option(
    "--latency",
    type=_POSITIVE,
    default=2.0,
    show_default=True,
    metavar="µS",
    help="Latency of a message between nodes.",
)
@click.option(
    "--bandwidth",
    type=_POSITIVE,
    default=12.5,
    show_default=True,
    metavar="GB/S",
    help="Network bandwidth of a node.",
)
@click.option(
    "--ranks-per-node",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks on each node (default: the cores of this machine).",
)
@_JSON
@debug_option
@click.pass_obj
def plan(
    session: Session,
    job: Path,
    ranks: int,
    sets: tuple[str, ...],
    agents: int | None,
    predict: bool,
    latency: float,
    bandwidth: float,
    ranks_per_node: int | None,
    as_json: bool,
) -> None:
    """Show rows, memory and bytes of each rank, without running.

    Use it to size a job before it is submitted. With --predict, it needs the figures of `rustsim-hpc bench`.
    """
    from rustsim_hpc.job.launch import plan_job
    from rustsim_hpc.job.spec import read_job

    spec, _ = read_job(job, overrides({"agents": agents}, sets), debug=session.debug)
    made = plan_job(spec, ranks)
    facts, text = made.to_dict(), made.text()
    if predict:
        predictions = _predictions(spec, ranks, latency, bandwidth, ranks_per_node)
        facts["predictions"] = [p.to_dict() for p in predictions]
        text += f"\n\n{table(predictions)}\n\nIt is assumed that\n" + "\n".join(f"- {a}" for a in ASSUMPTIONS)
    session.say(json.dumps(facts) if as_json else text)


def _predictions(
    spec: JobSpec, ranks: int, latency: float, bandwidth: float, ranks_per_node: int | None
) -> list[Prediction]:
    """Return what is predicted for 1, 2, 4 ... and ``ranks`` ranks.

    Raises:
        JobError: there are no figures of this machine, or none of what the job runs on.
    """
    from rustsim_hpc.bench.load import job_load, kept_machine

    if spec.run.backend == "cuda":
        raise JobError(
            "--predict knows the figures of CPUs, and [run] backend is cuda",
            hint="--set run.backend=cpu predicts the same job on CPUs",
        )
    machine = kept_machine()
    network = Network(latency * 1e-6, bandwidth * 1e9, ranks_per_node or machine.cores)
    # The share of one of very many ranks is too small to be timed.
    load = job_load(spec, machine, min(ranks, max(1, spec.run.agents // _LEAST_SAMPLE)))
    counts = [1 << power for power in range(ranks.bit_length()) if 1 << power < ranks]
    return curve(load, machine, network, spec.run.agents, [*counts, ranks])


@click.command(epilog="\b\nExamples:\n  rustsim-hpc doctor\n  rustsim-hpc doctor --json\n")
@_JSON
@debug_option
@click.pass_obj
def doctor(session: Session, as_json: bool) -> None:
    """Show what is installed here, and what needs fixing.

    Versions, cores, memory, disk, MPI and its launcher, HDF5 (parallel or not), Numba's cache, GPUs.
    """
    from rustsim_hpc.doctor import examine, table

    if session.speaks:
        report = examine()
        session.say(json.dumps(report) if as_json else table(report))
