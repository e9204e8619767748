"""What the commands share: the session of one start, options that are keys of the job file, and `--set`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rustsim_hpc.cli.ending import flush, hush, leave_threads
from rustsim_hpc.job.options import OPTION_KEYS
from rustsim_hpc.terminal import leave_lost_terminal
from rustsim_hpc.texts import shown_lines

if TYPE_CHECKING:
    from rustsim_hpc.job.spec import Override
    from rustsim_hpc.ranks.team import Team

END_SECONDS = 60.0
"""What ranks wait for each other at the end, at most."""

_ARRIVAL_SECONDS = 0.1
T = TypeVar("T")
Command = Callable[..., Any]


class Session:
    """One start of the command line: its ranks, and who of them speaks.

    debug: errors come with a traceback.
    """

    def __init__(self) -> None:
        self.debug = False
        self._team: Team | None = None
        self._has_last_line = False

    @cached_property
    def speaks(self) -> bool:
        """Whether this process prints: rank 0, found out from the launcher's environment alone."""
        from rustsim_hpc.errors import LauncherError
        from rustsim_hpc.ranks.launcher import detect_launcher

        try:
            launcher = detect_launcher(os.environ)
        except LauncherError:
            return True
        return launcher is None or launcher.rank == 0

    def say(self, *texts: str) -> None:
        """Print lines on rank 0; a reader who has gone (`| head`) has seen enough."""
        if not self.speaks:
            return
        leave_lost_terminal()
        try:
            for text in texts:
                click.echo(shown_lines(text))
        except BrokenPipeError:
            # Python's own flush at exit must not meet the broken pipe again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def say_last(self, *texts: str) -> None:
        """Print lines on rank 0 after all that any rank has printed. Collective."""
        self._has_last_line = True
        if self.alone_among_ranks:
            from rustsim_hpc.ranks.launcher import must_end

            flush()
            with must_end("waiting for all ranks at the end", END_SECONDS):
                self.team.barrier()
            # What others have written is on its way through the launcher, by pipes of their own.
            time.sleep(_ARRIVAL_SECONDS if self.speaks else 0)
        self.say(*texts)

    def end_process(self, code: int) -> None:
        """Do what comes before this process ends with an exit code."""
        if self._has_last_line:
            hush()
        if self._team is not None:
            from rustsim_hpc.ranks.team import end_mpi

            end_mpi(END_SECONDS)
        leave_threads(code)

    @property
    def team(self) -> Team:
        """The ranks of this start, opened when first asked for.

        Raises:
            LauncherError: MPI and the launcher do not agree.
        """
        if self._team is None:
            from rustsim_hpc.ranks.team import open_team

            self._team = open_team()
        return self._team

    @property
    def lost(self) -> bool:
        """Whether other ranks may be gone, or wait for this one for ever."""
        return self._team is not None and self._team.broken

    @property
    def alone_among_ranks(self) -> bool:
        """Whether other ranks may be waiting for this one."""
        return self._team is not None and self._team.size > 1

    def on_all(self, make: Callable[[], T]) -> T:
        """Return `make()`, which every rank calls; if it raises on one, the same error is raised on all.

        Raises:
            RustsimError: what `make` raised on the first rank where it did.
        """
        from rustsim_hpc.ranks.agreement import on_all

        return on_all(self.team, make)

    def leave_alone(self, code: int, message: str) -> None:
        """End all ranks: this one has met something that the others know nothing of."""
        if self._team is not None and self._team.size > 1:
            self._team.abort(code, f"rank {self._team.rank}: {message}")

    def stand_by_the_outcome(self) -> None:
        """Ignore signals from here on if there are other ranks: this one's exit code is decided.

        A launcher that ends all ranks as soon as one has left with a code, as `srun --kill-on-bad-exit` does,
        would change 75 of a rank that is just leaving into that of a killed one.
        """
        if self.alone_among_ranks:
            from rustsim_hpc.job.signals import SIGNALS

            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)


def debug_option(command: Command) -> Command:
    """Add `--debug`, which the session keeps."""

    def keep(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
        context.ensure_object(Session).debug = value

    return click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=keep,
        help="Show the traceback of errors.",
    )(command)


_FLAG: dict[str, Any] = {"is_flag": True, "default": False}
_SETTINGS: dict[str, dict[str, Any]] = {
    "--agents": {"type": int, "metavar": "N", "help": "Number of agents (rows)."},
    "--steps": {"type": int, "metavar": "N", "help": "Step index at which the run ends."},
    "--seed": {"type": int, "metavar": "S", "help": "Seed of all random numbers."},
    "--executor": {
        "type": click.Choice(["inline", "threads", "processes", "remote"]),
        "help": "What runs the partitions of a rank. (Start ranks with mpirun or srun.)",
    },
    "--workers": {"type": int, "metavar": "N", "help": "Threads or worker processes of each rank."},
    "--partitions": {"type": int, "metavar": "P", "help": "Number of partitions, over all ranks."},
    "--guard": {
        "type": click.Choice(["rollback", "torn"]),
        "help": "After a failed step: rollback keeps the old state; torn saves memory, but needs a restore.",
    },
    "--backend": {
        "type": click.Choice(["auto", "cpu", "cuda"]),
        "help": "Where partitions run: CUDA devices or the CPU.",
    },
    "--endpoint": {
        "multiple": True,
        "metavar": "ENDPOINT",
        "help": "A remote worker, as tcp://HOST:PORT. Can be repeated.",
    },
    "--keys": {
        "type": click.Path(file_okay=False),
        "metavar": "DIR",
        "help": "Keys for workers on other machines (made by rustsim-hpc worker --make-keys).",
    },
    "--check": {**_FLAG, "help": "Compile with bounds checks. Use it once for every new model."},
    "--time-limit": {
        "metavar": "TIME",
        "help": "Save a checkpoint and stop after this time, for example 90s or 1h30m.",
    },
    "--record": {**_FLAG, "help": "Record the fingerprint of each step in replay.jsonl."},
    "--verify": {
        "type": click.Path(dir_okay=False),
        "metavar": "LOG",
        "help": "Check each step against a recorded replay.jsonl, and stop at the first difference.",
    },
    "--fingerprint": {"type": click.Choice(["digest", "fnv1a"]), "help": "Fingerprint scheme."},
    "--checkpoint-every": {
        "type": int,
        "metavar": "K",
        "help": "Steps between checkpoints; 0: only at the end.",
    },
    "--out": {
        "type": click.Path(file_okay=False),
        "metavar": "DIR",
        "help": "Folder of the run (default: runs/JOB-TIME).",
    },
    "--force": {**_FLAG, "help": "Use the folder even if it is not empty."},
    "--dry-run": {**_FLAG, "help": "Print the resolved job and its plan without running it."},
    "--no-progress": {**_FLAG, "help": "No progress bar. (There is none without a terminal.)"},
    "--profile": {**_FLAG, "help": "Print where the time went."},
    "--json": {**_FLAG, "help": "Print one line of JSON at the end of standard output."},
}


set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Set any key of the job file, for example params.beta=0.3. Can be repeated.",
)


def job_options(*names: str) -> Callable[[Command], Command]:
    """Add options that set keys of the job file, in this order."""

    def add(command: Command) -> Command:
        for name in reversed(names):
            command = click.option(name, **_SETTINGS[name])(command)
        return command

    return add


def overrides(given: Mapping[str, Any], sets: tuple[str, ...] = ()) -> list[Override]:
    """Return what the command line sets over the job file, from click's values and the texts of `--set`.

    Raises:
        JobError: a `--set` that is not TABLE.KEY=VALUE.
    """
    from rustsim_hpc.job.spec import Override

    made = [Override.parse(text) for text in sets]
    for option, (table, key) in OPTION_KEYS.items():
        value = given.get(option.removeprefix("--").replace("-", "_"))
        if value is None or value is False or value == ():
            continue
        if option == "--record":
            value = "record"
        made.append(Override(table, key, list(value) if isinstance(value, tuple) else value, option))
    return made
