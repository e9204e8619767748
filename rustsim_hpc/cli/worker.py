"""`rustsim-hpc worker`: serve partitions of runs on other machines, and make the keys for it."""

from __future__ import annotations

import os
from pathlib import Path

import click

from rustsim_hpc.cli.common import Session, debug_option

_GIB = 2**30
_MOST_GIB = 2**30


def _half_of_the_memory() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 / _GIB, 1)


@click.command(
    epilog="\b\nExamples:\n  rustsim-hpc worker --bind tcp://127.0.0.1:5555 --model jobs/us_flights.py\n"
    "  rustsim-hpc worker --make-keys keys\n"
    "  rustsim-hpc worker --bind tcp://*:5555 --model jobs/us_flights.py --keys keys\n"
)
@click.option(
    "--bind",
    "endpoint",
    metavar="ENDPOINT",
    help="Where to listen: tcp://HOST:PORT, with * for all interfaces or any free port.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODULE",
    help="A model that clients may run, as in a job file. Can be repeated.",
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keys for encryption and for identifying clients; required for clients on other machines.",
)
@click.option(
    "--make-keys",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Make keys for workers and a client in this folder, and exit.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Threads that run the partitions of a client.",
)
@click.option(
    "--memory", type=float, metavar="GIB", help="Memory for columns (default: half of the machine's memory)."
)
@click.option("--once", is_flag=True, help="Exit when the first clients have finished.")
@debug_option
@click.pass_obj
def worker(
    session: Session,
    endpoint: str | None,
    models: tuple[str, ...],
    keys: Path | None,
    make_keys: Path | None,
    threads: int,
    memory: float | None,
    once: bool,
) -> None:
    """Serve partitions to runs on other machines.

    It runs until it gets a signal. Clients can run only the models named here. docs/remote.md explains how a
    run uses workers, and the keys.
    """
    if make_keys is not None:
        from rustsim_hpc.remote.keys import make_keys as make

        session.say(*(str(path) for path in make(make_keys)))
        return
    if endpoint is None or not models:
        raise click.UsageError("a worker needs --bind and --model, or --make-keys alone")
    memory = _half_of_the_memory() if memory is None else memory
    if not 0 < memory < _MOST_GIB:  # nor nan
        raise click.BadParameter(f"{memory:g} is no number of GiB above 0", param_hint="--memory")
    from rustsim_hpc.job.signals import StopRequests
    from rustsim_hpc.remote.installed import InstalledModels
    from rustsim_hpc.remote.keys import read_worker_keys
    from rustsim_hpc.remote.server import WorkerLimits, WorkerServer

    found = None if keys is None else read_worker_keys(keys)
    limits = WorkerLimits(int(memory * _GIB), threads=threads)
    installed = InstalledModels(models)
    server = WorkerServer(endpoint, found, installed, limits, _tell)
    try:
        with StopRequests() as stops:
            how = "encrypted" if found is not None else "plain, for this machine alone"
            session.say(f"worker at {server.endpoint} ({how}), models: {installed}")
            server.serve(lambda: stops.stop_requested() is not None, once=once)
    finally:
        server.close()


def _tell(line: str) -> None:
    click.echo(f"worker: {line}", err=True)
