"""The command `rustsim-hpc`: its group, and the one place where errors become messages and exit codes.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final, NoReturn

import click

from rustsim_hpc.cli.bench import bench
from rustsim_hpc.cli.common import Session
from rustsim_hpc.cli.compare import diff, verify
from rustsim_hpc.cli.fork import fork
from rustsim_hpc.cli.run import resume, run
from rustsim_hpc.cli.show import doctor, inspect, plan
from rustsim_hpc.cli.slurm import collect, slurm
from rustsim_hpc.cli.worker import worker
from rustsim_hpc.errors import EXIT_FAILED, EXIT_INTERRUPTED, JobError, RustsimError, named
from rustsim_hpc.terminal import leave_lost_terminal
from rustsim_hpc.texts import shown, trace_of
from rustsim_hpc.version import __version__

_EPILOG: Final = """\b
Examples:
  rustsim-hpc run jobs/us_flights.toml
  rustsim-hpc run jobs/us_flights.toml --agents 100000 --executor threads --workers 2
  mpirun -n 4 rustsim-hpc run jobs/us_flights.toml --checkpoint-every 30 --out runs/first
  rustsim-hpc resume runs/first
  rustsim-hpc plan jobs/us_flights.toml --ranks 1024

\b
Exit codes:
  0   done
  2   usage, job file, model or configuration; a log that cannot be read
  3   a phase, check, worker, rank, executor or output failed
  4   replay diverged
  5   checkpoint or restore
  75  stopped by a signal or time limit after saving a checkpoint: run `resume`
"""


class _Commands(click.Group):
    """The commands, listed by what they are for and in the order of use."""

    sections: Final = {
        "Run": (run, resume, fork),
        "Check and compare": (verify, diff, inspect, collect),
        "Machines and clusters": (plan, slurm, worker, bench, doctor),
    }

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list of commands for each section."""
        for title, commands in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([(c.name or "", c.get_short_help_str(80)) for c in commands])


@click.group(
    cls=_Commands,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="rustsim-hpc")
def cli() -> None:
    """Run large agent-based models whose results can be reproduced and checked.

    A job is a TOML file that names a model, its parameters and how to run it. The same job gives the same
    bits in one process, on threads, in worker processes and, started by mpirun or srun, on any number of
    ranks.
    """


for _commands in _Commands.sections.values():
    for _command in _commands:
        cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (`sys.argv` where no arguments are given) and exit with its code."""
    session = Session()
    code = _run(session, None if arguments is None else list(arguments))
    session.stand_by_the_outcome()
    if arguments is None:
        session.end_process(code)
    sys.exit(code)


def _run(session: Session, arguments: list[str] | None) -> int:
    """Run one command; return its exit code, everything that went wrong told on standard error."""
    try:
        code = cli.main(args=arguments, prog_name="rustsim-hpc", standalone_mode=False, obj=session)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        if session.speaks:
            error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        session.leave_alone(EXIT_INTERRUPTED, "interrupted")
        return EXIT_INTERRUPTED
    except RustsimError as error:
        if session.speaks or session.lost:
            _tell(error, session.debug)
        if session.lost:
            session.leave_alone(error.exit_code, str(error))
        return error.exit_code
    except SystemExit as stop:
        # click's answer to a broken pipe. `Session.say` deals with a reader who has gone, so it is another.
        broken = isinstance(stop.__context__, BrokenPipeError)
        return _unexpected(session, BrokenPipeError("a pipe between processes broke") if broken else stop)
    except BaseException as error:  # noqa: BLE001 (the last place: whatever it is, it ends with a message and a code)
        return _unexpected(session, error)
    return code if isinstance(code, int) else 0


def _unexpected(session: Session, error: BaseException) -> int:
    """Tell an error that nobody expected, on whichever rank; end the others, which do not know of it."""
    leave_lost_terminal()
    message = named(error)
    if session.debug:
        click.echo(trace_of(error), err=True, nl=False)
    elif session.speaks or session.alone_among_ranks:
        click.echo(f"Error: {message}\nhint: --debug shows where", err=True)
    session.leave_alone(EXIT_FAILED, message)
    return EXIT_FAILED


def _tell(error: RustsimError, debug: bool) -> None:
    """Print an error: its line, then what else is known; ranks that say the same are one."""
    leave_lost_terminal()
    if debug:
        click.echo(trace_of(error), err=True, nl=False)
    # A job file's mistakes have a line each; any other text is one line, whatever it quotes.
    lines = str(error).split("\n") if isinstance(error, JobError) else [str(error)]
    lines[0] = f"Error: {lines[0]}"
    click.echo("\n".join(map(shown, [*lines, *error.details().splitlines()])), err=True)
