"""The part of the standard set that ranks make together; each is `python -m rustsim_hpc.bench.ranks ASKED`.

ASKED says as JSON what to measure; rank 0 writes the timings to standard output, as a line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rustsim_hpc.bench.engine import Engine, Setup
from rustsim_hpc.bench.loops import hand_cases, rows_beside_hand
from rustsim_hpc.bench.measure import Case, Row, Section, Timing, interleave
from rustsim_hpc.bench.models import integrate
from rustsim_hpc.bench.setting import (
    BYTES,
    MODELS,
    Bandwidth,
    Size,
    columns_of,
    flights_module,
    flights_params,
)
from rustsim_hpc.ranks.team import Team, open_team

_SECONDS = 900


# -- started by mpirun --------------------------------------------------------------------------------


def main(argument: str) -> None:
    """Measure what is asked for, as one of the ranks."""
    asked = json.loads(argument)
    team = open_team()
    what = asked.pop("what")
    made = (_integrate if what == "integrate" else _empty if what == "empty" else _steps)(team, **asked)
    if team.rank == 0:
        sys.stdout.write(json.dumps({key: timing.seconds for key, timing in made.items()}) + "\n")


def _interleave(team: Team, cases: Mapping[str, Case], rounds: int) -> dict[str, Timing]:
    def clock() -> float:
        team.barrier()  # a case begins when all are here, and ends with the slowest
        return time.perf_counter()

    return interleave(cases, rounds, clock)


def _integrate(team: Team, rows: int, rounds: int) -> dict[str, Timing]:
    mine, beside = (columns_of(integrate.model(), rows // team.size) for _ in range(2))
    setup = Setup(MODELS + "integrate", rows)
    setups = {
        "torn": replace(setup, guard="torn"),
        "rollback": setup,
        "digest": replace(setup, replay="digest"),
    }
    with ExitStack() as stack:
        cases = hand_cases(mine, beside)
        for key, made in setups.items():
            cases[key] = Case.steady(partial(stack.enter_context(Engine(made, team)).step, 2), 2)
        return _interleave(team, cases, rounds)


def _empty(team: Team, steps: int, rounds: int) -> dict[str, Timing]:
    one = np.zeros(1, np.int64)

    def allreduce() -> None:
        for _ in range(steps):
            team.sum_int64(one)

    with Engine(Setup(MODELS + "integrate", team.size), team) as engine:
        cases = {"step": Case(partial(engine.step, steps), steps), "allreduce": Case(allreduce, steps)}
        return _interleave(team, cases, rounds)


def _steps(
    team: Team, module: str, rows: int, steps: int, rounds: int, params: Mapping[str, Any]
) -> dict[str, Timing]:
    with Engine(Setup(module, rows, params=params), team) as engine:
        return _interleave(team, {"step": Case(partial(engine.step, steps), steps)}, rounds)


# -- started by the user ------------------------------------------------------------------------------


def mpirun() -> str | None:
    """Return the mpirun to use: the one beside this Python, else the one on PATH; None without mpi4py."""
    from importlib.util import find_spec

    if find_spec("mpi4py") is None:
        return None
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which("mpirun", path=path)


def start(ranks: int, **asked: Any) -> dict[str, Timing]:
    """Measure something on ranks of this machine.

    Raises:
        OSError: there is no mpirun, or it failed; its last words are the message.
    """
    launcher = mpirun()
    if launcher is None:
        raise OSError('there is no mpirun with mpi4py (pip install "rustsim-hpc[mpi]")')
    command = [launcher, "-n", str(ranks), sys.executable, "-m", "rustsim_hpc.bench.ranks", json.dumps(asked)]
    environment = os.environ | {"NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"mpirun took longer than {_SECONDS} s") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        words = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise OSError(f"mpirun ended with {done.returncode}: {words}")
    return {key: Timing(tuple(seconds)) for key, seconds in json.loads(lines[-1]).items()}


def integrate_ranks(size: Size, bandwidth: Bandwidth) -> Section:
    """Measure integrate on ranks, against the same loop by hand on as many ranks."""
    ranks = size.workers
    text = (
        f"As above, {size.rows:,} rows split between {ranks} ranks of mpirun. By hand: mpi4py and Numba; "
        "each rank loops over its rows, and the ranks do not communicate. The engine's ranks meet once a "
        "step."
    )
    section = Section("integrate.ranks", f"Integrate, mpirun -n {ranks}", text)
    names = {
        "hand": "by hand, mpi4py and Numba",
        "hand.beside": "by hand, mpi4py and Numba, keeping the old state",
        "hand.around": "the same, bypassing the cache",
        "torn": "engine, torn",
        "rollback": "engine, rollback",
        "digest": "engine, rollback, digest of each step",
    }
    try:
        timings = start(ranks, what="integrate", rows=size.rows, rounds=size.rounds)
    except OSError as error:
        section.rows.append(Row("hand", names["hand"], note=f"not measured: {error}"))
        return section
    section.rows = rows_beside_hand(names, timings, size.rows * BYTES["integrate"] / bandwidth.all)
    return section


def empty_rows(size: Size) -> list[Row]:
    """Measure an empty step on ranks, and the allreduce that is in it."""
    names = {
        "step": ("ranks", f"mpirun {size.workers}"),
        "allreduce": ("allreduce", "one allreduce, part of that"),
    }
    try:
        timings = start(size.workers, what="empty", steps=size.steps, rounds=size.rounds)
    except OSError as error:
        return [Row(*names["step"], note=f"not measured: {error}")]
    return [Row.of(*names[key], timing) for key, timing in timings.items()]


def weak_scaling(size: Size) -> list[Row]:
    """Measure us_flights on one rank and on several with as many times the agents, in turns."""
    name = f"mpirun 1 to {size.workers}, with the same number of agents a rank"
    module = flights_module()
    if module is None:
        return []
    each = size.agents // size.workers
    seconds: dict[int, list[float]] = {1: [], size.workers: []}
    try:
        for _ in range(3):
            for ranks, kept in seconds.items():
                agents = each * ranks
                asked = {"module": str(module), "rows": agents, "params": flights_params(agents)}
                made = start(ranks, what="steps", steps=size.days, rounds=size.rounds, **asked)
                kept.append(sum(made["step"].seconds))
    except OSError as error:
        return [Row("weak", name, note=f"not measured: {error}")]
    one, several = (statistics.median(kept) for kept in seconds.values())
    rate = each * size.workers * size.rounds / several / 1e6
    row = Row(
        "weak", name, several / size.rounds, rate=rate, unit="million agent-steps/s", times=several / one
    )
    row.note = f"weak efficiency {one / several:.3f}"
    return [row]


if __name__ == "__main__":
    main(sys.argv[1])
