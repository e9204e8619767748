"""One program of the comparison on one workload, in a process of its own (or on the ranks of mpirun).

    python benchmarks/serve.py MODULE WORKLOAD ROWS CORES RANKS

compare.py starts it and talks to it: a line of JSON comes when the program is ready (checked on few rows,
then set up with ROWS), or cannot be. Each number N that is then read from standard input is N steps, answered
by their seconds; "check" checks the state of all rows after all those steps. It ends when its input ends.

A module of competitors/ has a class for each workload that it does: `Integrate`, `Walk`, `Sir`. It is made
from the first columns (of this rank) and the number of cores; `step(n)` makes n steps and comes back when
they are done; `columns()` returns the state as NumPy arrays. RANKS is 0 where there is no mpirun.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any, Protocol

import workloads
from workloads import Array


class Program(Protocol):
    """What a class of competitors/ offers."""

    def step(self, steps: int) -> None: ...
    def columns(self) -> tuple[Array, ...]: ...


class Solo:
    """The one process of a program without ranks."""

    rank, size = 0, 1

    def line(self) -> str:
        """Return the next line of standard input, nothing at its end."""
        return sys.stdin.readline().strip()

    def meet(self) -> None:
        """Wait for the other ranks: there are none."""

    def agree(self, word: str) -> str:
        """Return the first rank's word that is not empty."""
        return word

    def abort(self, word: str) -> None:
        """End the other ranks: there are none."""


class Ranks:
    """The ranks of mpirun. Those that wait for their turn sleep: MPI itself would keep a core busy."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD
        self.rank, self.size = self._world.rank, self._world.size

    def line(self) -> str:
        """Return the next line of rank 0's standard input, nothing at its end."""
        if self.rank == 0:
            word = sys.stdin.readline().strip()
            for rank in range(1, self.size):
                self._world.send(word, rank)
            return word
        while not self._world.iprobe(source=0):
            time.sleep(0.0005)
        return str(self._world.recv(source=0))

    def meet(self) -> None:
        """Wait for the other ranks."""
        self._world.barrier()

    def agree(self, word: str) -> str:
        """Return the first rank's word that is not empty."""
        return next(filter(None, self._world.allgather(word)), "")

    def abort(self, word: str) -> None:
        """End all ranks: the others may be waiting for this one."""
        sys.stderr.write(f"rank {self.rank}: {word}\n")
        sys.stderr.flush()
        self._world.Abort(3)


def checked(team: Any, workload: workloads.Workload, before: Any, program: Program, steps: int) -> None:
    """Check the state after ``steps`` steps, each rank its rows; a rank that finds an error tells all."""
    wrong = ""
    try:
        workload.check(before, program.columns(), steps)
    except workloads.CheckError as error:
        wrong = str(error)
    if wrong := team.agree(wrong):
        raise workloads.CheckError(f"its result is wrong: {wrong}")


def main(module: str, key: str, rows: int, cores: int, ranks: int, answers: Any) -> None:
    """Set the program up and answer until the input ends."""
    team = Ranks() if ranks else Solo()

    def answer(**facts: Any) -> None:
        if team.rank == 0:
            answers.write(json.dumps(facts) + "\n")
            answers.flush()

    try:
        # Whatever a library starts, it runs on so many cores, the last of those allowed.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
        workload = workloads.WORKLOADS[key]
        kind = getattr(importlib.import_module(f"competitors.{module}"), key.capitalize())

        def share(of: int) -> tuple[int, int]:
            return of * team.rank // team.size, of * (team.rank + 1) // team.size

        for steps in workloads.SMALL_STEPS:
            before = workload.start(*share(workloads.SMALL))
            program = kind(*(c.copy() for c in before), cores=cores)
            program.step(steps)
            checked(team, workload, before, program, steps)
        program = kind(*workload.start(*share(rows)), cores=cores)
        program.step(1)
        made = 1
        answer(ready=True)
        while word := team.line():
            if word == "check":
                checked(team, workload, workload.start(*share(rows)), program, made)
                answer(good=True)
                continue
            team.meet()
            begun = time.perf_counter()
            program.step(int(word))
            team.meet()
            answer(seconds=time.perf_counter() - begun)
            made += int(word)
    except Exception as error:  # noqa: BLE001 (whatever it is, the table tells it)
        answer(failed=f"{type(error).__name__}: {error}")
        if not isinstance(error, workloads.CheckError):  # that one all ranks have
            team.abort(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    # Libraries greet on standard output; the answers go where it led, the greetings to standard error.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main(*sys.argv[1:3], *map(int, sys.argv[3:6]), replies)
