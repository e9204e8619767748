"""`rustsim-hpc slurm` and `collect`: a batch script for a job, and one table of the runs that it made."""

from __future__ import annotations

from pathlib import Path

import click

from rustsim_hpc.cli.common import Session, debug_option, overrides

_SLURM_EXAMPLES = """\b
Examples:
  rustsim-hpc slurm jobs/us_flights.toml --nodes 4 --time 02:00:00 > flights.sbatch
  rustsim-hpc slurm jobs/us_flights.toml --requeue --partition short --time 01:00:00
  rustsim-hpc slurm jobs/us_flights.toml --array 1-20 --ntasks-per-node 1 --out runs/seeds
  rustsim-hpc slurm jobs/us_flights.toml --gpus-per-node 4 --nodes 2

The scripts are those of slurm/; docs/slurm.md says how to read and adapt them.
"""

_COLLECT_EXAMPLES = """\b
Examples:
  rustsim-hpc collect runs/seeds
  rustsim-hpc collect runs/seeds --table runs/seeds/results.csv
"""

_COUNT = click.IntRange(min=1)


@click.command(epilog=_SLURM_EXAMPLES)
@click.argument("job", type=click.Path(path_type=Path), metavar="JOB.toml")
@click.option("--nodes", type=_COUNT, metavar="N", help="Nodes.")
@click.option("--ntasks-per-node", type=_COUNT, metavar="N", help="Ranks on each node.")
@click.option(
    "--cpus-per-task",
    type=_COUNT,
    metavar="N",
    help="Cores of each rank, and so its workers (default: the job's workers).",
)
@click.option("--time", metavar="TIME", help="Time limit, as sbatch takes it: 02:00:00, 1-12:00:00.")
@click.option("--partition", metavar="NAME", help="Slurm's partition.")
@click.option("--account", metavar="NAME", help="The account that pays.")
@click.option(
    "--requeue", is_flag=True, help="Go back into the queue before the time limit, and go on from there."
)
@click.option(
    "--array",
    metavar="TASKS",
    help="An ensemble: one run a task, for example 1-20 or 1-100%10; the task is the seed, "
    "or the line of the file SWEEP.",
)
@click.option(
    "--gpus-per-node", type=_COUNT, metavar="N", help="GPUs on each node; each has a rank of its own."
)
@click.option(
    "--out",
    metavar="DIR",
    help="The run's folder; with --array, that of the runs' folders (default: by job id).",
)
@click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Set a key of the job file.")
@debug_option
@click.pass_obj
def slurm(
    session: Session,
    /,
    job: Path,
    nodes: int | None,
    ntasks_per_node: int | None,
    cpus_per_task: int | None,
    time: str | None,
    partition: str | None,
    account: str | None,
    requeue: bool,
    array: str | None,
    gpus_per_node: int | None,
    out: str | None,
    sets: tuple[str, ...],
) -> None:
    """Print a batch script for a job, ready for sbatch, with the memory that its ranks will need."""
    from rustsim_hpc.job.launch import plan_job
    from rustsim_hpc.job.spec import Override, read_job
    from rustsim_hpc.slurm import Kind, Request, script, seconds_of, shape, unfit_word

    wanted: dict[Kind, bool] = {
        "requeue": requeue,
        "ensemble": array is not None,
        "gpu": gpus_per_node is not None,
    }
    kinds = [kind for kind, asked in wanted.items() if asked]
    if len(kinds) > 1:
        raise click.UsageError("--requeue, --array and --gpus-per-node each have a script of their own")
    if gpus_per_node is not None and ntasks_per_node not in {None, gpus_per_node}:
        raise click.UsageError("--ntasks-per-node and --gpus-per-node must be equal: each GPU has one rank")
    given = {"--time": time, "--partition": partition, "--account": account, "--array": array}
    unfit = unfit_word(given)
    if unfit is not None:
        raise click.UsageError(f"{unfit} {given[unfit]!r} is nothing that Slurm could take")
    if time is not None and not seconds_of(time):
        raise click.UsageError(
            f"--time {time!r} is no time limit; for example 02:00:00, 1-12:00:00, 90 (minutes)"
        )
    request = Request(
        kinds[0] if kinds else "cpu", nodes, ntasks_per_node, cpus_per_task, gpus_per_node, time, partition,
        account, array, out, sets,
    )  # fmt: skip
    changes = overrides({}, sets)
    spec, _ = read_job(job, changes, debug=session.debug)
    on_nodes, tasks, cores = shape(request, spec)
    there, _ = read_job(job, [*changes, Override("run", "workers", cores, "--cpus-per-task")])
    session.say(script(job, spec, plan_job(there, on_nodes * tasks), request).rstrip("\n"))


@click.command(epilog=_COLLECT_EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--table",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the table to this file, replaced as a whole (default: print it).",
)
@debug_option
@click.pass_obj
def collect(session: Session, folder: Path, table: Path | None) -> None:
    """Put the runs below DIR into one table, as CSV: one line a run.

    Status, step, seed, parameters, fingerprint, and the last value of each column of each series. Runs that
    have not ended are in it as well.
    """
    from rustsim_hpc.run_folder.table import collect_runs, write_table

    if not session.speaks:
        return
    if table is None:
        session.say(collect_runs(folder).to_csv().rstrip("\n"))
        return
    made = write_table(folder, table)
    done = sum(status == "done" for _, status in made.statuses)
    session.say(f"{table}: {len(made.rows)} runs, {done} done")
