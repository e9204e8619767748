"""`rustsim-hpc bench`: measure the engine on this machine."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click

from rustsim_hpc.cli.common import Session, debug_option

_EXAMPLES = """\b
Examples:
  rustsim-hpc bench --quick
  rustsim-hpc bench --only integrate.one --only empty
  rustsim-hpc bench --workers 8 --json > figures.json
  rustsim-hpc bench --write docs/benchmarks.md
"""


def _table_keys(
    _context: click.Context, _parameter: click.Parameter, keys: tuple[str, ...]
) -> tuple[str, ...]:
    from rustsim_hpc.bench.run import TABLES

    for key in keys:
        if key not in TABLES:
            raise click.BadParameter(f"{key}: there are {', '.join(TABLES)}")
    return keys


@click.command(epilog=_EXAMPLES)
@click.option(
    "--quick", is_flag=True, help="Use a tenth of the rows and few rounds: half a minute, rough figures."
)
@click.option(
    "--only",
    multiple=True,
    callback=_table_keys,
    metavar="TABLE",
    help="Measure only this table. Can be repeated.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=2),
    default=2,
    show_default=True,
    metavar="N",
    help="Number of threads, worker processes or ranks in the parallel cases.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of tables.")
@click.option(
    "--write",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.md",
    help="Write the figures to this page, and to a JSON file beside it.",
)
@debug_option
@click.pass_obj
def bench(
    session: Session, quick: bool, only: tuple[str, ...], workers: int, as_json: bool, write: Path | None
) -> int:
    """Measure the engine on this machine.

    Hand-written loops are measured in the same run for comparison. The tables cover memory bandwidth;
    inline, threads, worker processes and ranks of mpirun; guards, fingerprints, checkpoints, empty steps and
    start-up. It takes a few minutes and 2 GiB; other work on the machine disturbs the figures. They are kept
    in the user's cache folder for `rustsim-hpc plan --predict`.
    """
    from rustsim_hpc.bench.kept import keep
    from rustsim_hpc.bench.run import measure, write_page
    from rustsim_hpc.bench.scaling import curve_figures
    from rustsim_hpc.bench.setting import QUICK, STANDARD

    size = replace(QUICK if quick else STANDARD, workers=workers)
    terminal = sys.stderr.isatty()
    report = measure(
        size, only, lambda key: click.echo(f"measuring {key} ...", err=True) if terminal else None
    )
    if not only:
        keep(report)
    if write is not None:
        write_page(write, report, curve_figures(report, size))
    session.say(report.to_json() if as_json else report.text())
    return 0
