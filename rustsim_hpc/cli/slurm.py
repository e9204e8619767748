"""`rustsim-hpc slurm` and `collect`: a batch script for a job, and one table of the runs that it made."""

from __future__ import annotations

from pathlib import Path

import click

from rustsim_hpc.cli.common import Session, debug_option, overrides, set_option

_SLURM_EXAMPLES = """\b
Examples:
  rustsim-hpc slurm jobs/us_flights.toml --nodes 4 --time 02:00:00 > flights.sbatch
  rustsim-hpc slurm jobs/us_flights.toml --requeue --partition short --time 01:00:00
  rustsim-hpc slurm jobs/us_flights.toml --array 1-20 --ntasks-per-node 1 --out runs/seeds
  rustsim-hpc slurm jobs/us_flights.toml --gpus-per-node 4 --nodes 2

docs/slurm.md explains the scripts and how to adapt them to a site.
"""

_COLLECT_EXAMPLES = """\b
Examples:
  rustsim-hpc collect runs/seeds
  rustsim-hpc collect runs/seeds --table runs/seeds/results.csv
"""

_COUNT = click.IntRange(min=1)


@click.command(epilog=_SLURM_EXAMPLES)
@click.argument("job", type=click.Path(path_type=Path), metavar="JOB.toml")
@click.option("--nodes", type=_COUNT, metavar="N", help="Number of nodes.")
@click.option("--ntasks-per-node", type=_COUNT, metavar="N", help="Ranks on each node.")
@click.option(
    "--cpus-per-task",
    type=_COUNT,
    metavar="N",
    help="Cores, and so workers, of each rank (default: the workers of the job).",
)
@click.option("--time", metavar="TIME", help="Time limit in the format of sbatch: 02:00:00, 1-12:00:00.")
@click.option("--partition", metavar="NAME", help="Partition of the cluster.")
@click.option("--account", metavar="NAME", help="Account to charge.")
@click.option("--requeue", is_flag=True, help="Requeue the job before its time limit, and continue the run.")
@click.option(
    "--array",
    metavar="TASKS",
    help="An ensemble with one run for each task, for example 1-20 or 1-100%10. The task number is the seed, "
    "or the line of the file named by SWEEP.",
)
@click.option("--gpus-per-node", type=_COUNT, metavar="N", help="GPUs on each node; one rank for each GPU.")
@click.option(
    "--out",
    metavar="DIR",
    help="Folder of the run; with --array, of all its runs (default: by job id).",
)
@set_option
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
    """Print a batch script for Slurm, ready for sbatch.

    It requests the memory that the ranks of the job need.
    """
    from rustsim_hpc.job.launch import plan_job
    from rustsim_hpc.job.spec import Override, read_job
    from rustsim_hpc.slurm import Kind, Request, script, seconds_of, shape, tasks_of, unfit_word

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
    if array is not None and not tasks_of(array):
        raise click.UsageError(f"--array {array!r} names no tasks; for example 1-20, 1-100%10, 1,4,7")
    if out is not None and not out.strip():
        raise click.UsageError("--out must name a folder")
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
    help="Write the table to this file (default: print it).",
)
@debug_option
@click.pass_obj
def collect(session: Session, folder: Path, table: Path | None) -> None:
    """Print one table of all runs below DIR, as CSV.

    One line for each run, unfinished ones too: status, step, seed, parameters, fingerprint, and the last
    value of each column of each series.
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
