"""A small model with every kind of phase that fails on demand: where, how, at which step and for whom.

The demand is the environment variable ``DRILL_FAULT``, ``WHERE:HOW:STEP:WHO``, and not a parameter, so that a
run that failed is resumed as the same run::

    WHERE   first, middle     column phases before and after the kernels; WHO is a row: its partition fails
            kernel            a compiled row kernel; WHO is a row
            derive, check     computed on every rank; WHO is a rank
            initialise        the rows of the first state; WHO is a row
            output            rank 0 writes it; WHO is 0
    HOW     raise, memory, exit (SystemExit), kill (SIGKILL), segv, sleep, spin;
            in a kernel: raise, spin, key (out of a histogram's range)

``DRILL_PACE`` makes each step last so many seconds more.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import Any

import numpy as np

import rustsim_hpc as rs
from rustsim_hpc.ranks.launcher import detect_launcher

KERNEL_FAULTS = {"raise": 1, "spin": 2, "key": 3}


def fault_at(where: str, step: int) -> tuple[str, int] | None:
    """Return how and for whom to fail in this place and step, or None."""
    text = os.environ.get("DRILL_FAULT", "")
    place, _, rest = text.partition(":")
    if place != where:
        return None
    how, at, who = rest.split(":")
    return (how, int(who)) if int(at) == step else None


def fail(how: str) -> None:
    """Do what a broken model, or a broken machine, does."""
    if how == "raise":
        raise RuntimeError("no luck")
    if how == "memory":
        raise MemoryError("no room")
    if how == "exit":
        sys.exit("gone")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "segv":
        ctypes.string_at(0)
    if how == "sleep":
        time.sleep(600)
    while how == "spin":
        pass


def fail_for_row(where: str, step: int, first: int, end: int) -> None:
    """Fail if the demand is for a row in [first, end)."""
    fault = fault_at(where, step)
    if fault is not None and first <= fault[1] < end:
        fail(fault[0])


def fail_on_rank(where: str, step: int) -> None:
    """Fail if the demand is for this rank."""
    fault = fault_at(where, step)
    if fault is not None:
        launcher = detect_launcher(os.environ)
        if fault[1] == (0 if launcher is None else launcher.rank):
            fail(fault[0])


# -- The phases, in the order of a step ---------------------------------------------------------------


@rs.column_phase(writes="x", row_local=True)
def first(context: Any, columns: Any, rows: int) -> None:
    """Go down a little, by an amount of chance."""
    if context.row_start == 0:
        time.sleep(float(os.environ.get("DRILL_PACE", "0")))
    fail_for_row("first", context.step_index, context.row_start, context.row_end)
    columns["x"] -= context.random.uniform(0).astype(np.float32) * context.params.noise


@rs.function
def half(x: float) -> float:
    """Return half of a number."""
    return x * 0.5


@rs.row_kernel(writes="x")
def jostle(x: float, noise: float, rng: Any) -> float:
    """Take a random step, back towards zero."""
    return half(x) + noise * rs.random.normal(rng, 0)


@rs.reduction("histogram", bins=8)
def crowd(x: float) -> int:
    """Count rows by their whole distance from zero."""
    return min(int(abs(x)), 7)


@rs.reduction("sum")
def total(x: float) -> float:
    """Add up a float."""
    return x


@rs.reduction("sum")
def steps(k: int) -> int:
    """Add up an integer."""
    return k


@rs.reduction("sum", key="k", bins=4)
def by_kind(x: float) -> float:
    """Add up a float by kind."""
    return x


@rs.reduction("count")
def above(x: float) -> bool:
    """Count rows above zero."""
    return x > 0


@rs.reduction("min")
def lowest(x: float) -> float:
    """Return the least value."""
    return x


@rs.reduction("max")
def highest(k: int) -> int:
    """Return the greatest kind."""
    return k


@rs.derive
def mean(total: float, above: int, step: int) -> dict[str, Any]:
    """Return values that later phases take; and the kernel's part of the demand, (row, how)."""
    fail_on_rank("derive", int(step))
    how, row = fault_at("kernel", int(step)) or ("raise", -1)
    return {"level": total / max(1, above), "trap": np.array([row, KERNEL_FAULTS[how]])}


@rs.row_kernel(writes=("k", "busy"))
def change(x: float, k: int, crowd: Any, level: float, trap: Any, row: int) -> tuple[int, bool]:
    """Become the next kind; fail if that is asked for."""
    if row == trap[0]:
        if trap[1] == 1:
            raise ValueError("no luck")
        while trap[1] == 2:
            pass
    return (k + 1) % 4, crowd[min(int(abs(x)), 7)] > 100 and x < level


@rs.reduction("histogram", bins=4)
def kinds(k: int, trap: Any, row: int) -> int:
    """Count rows by kind; out of range if that is asked for."""
    return -1 if row == trap[0] and trap[1] == 3 else k


@rs.column_phase(writes="x", row_local=True)
def middle(context: Any, columns: Any, rows: int) -> None:
    """Shrink, by a share of the busy ones."""
    fail_for_row("middle", context.step_index, context.row_start, context.row_end)
    columns["x"] *= np.float32(0.99)
    columns["x"] += np.where(columns["busy"], np.float32(0.125), np.float32(0))


@rs.row_kernel(writes="turns")
def turn(turns: int, k: int, id: int, step: int) -> int:
    """Mix integers."""
    return turns * 3 + k + (id ^ step) % 5


# -- What is promised and kept ------------------------------------------------------------------------


@rs.reduction("sum")
def after(x: float) -> float:
    """Add up the new state."""
    return x


@rs.check(reductions=[after])
def everybody_is_there(context: Any) -> bool:
    """Return whether nobody got lost."""
    fail_on_rank("check", context.step_index - 1)
    return bool(context.reductions["crowd"].sum() == context.agent_count)


def curve(context: Any) -> dict[str, Any]:
    """Return a row of the series."""
    fail_on_rank("output", context.step_index)
    found = context.reductions
    return {"step": context.step_index, "after": float(found["after"]), "kinds": int(found.get("steps", 0))}


def initialise(rows: Any, params: Any, tables: Any, seed: int) -> dict[str, Any]:
    """Return the first state of a range of rows."""
    fail_for_row("initialise", 0, rows.start, rows.stop)
    row = np.arange(rows.start, rows.stop)
    return {
        "x": (row % 1000 / 100 - 5).astype(np.float32),
        "k": (row % 4).astype(np.int8),
        "busy": row % 3 == 0,
        "turns": row.astype(np.int64),
    }


def model() -> rs.Model:
    """Return the model."""
    phases = [first, jostle, crowd, total, steps, by_kind, above, lowest, highest, mean, change, kinds]
    return rs.Model(
        params={"noise": rs.Param("float32", default=0.1, doc="size of random steps")},
        columns=[
            rs.Column("x", "float32", doc="position"),
            rs.Column("k", "int8", doc="kind"),
            rs.Column("busy", "bool", doc="in a crowd"),
            rs.Column("turns", "int64", doc="a mix of integers"),
        ],
        tables=lambda _: {"weights": np.arange(8.0)},
        initialise=initialise,
        phases=[*phases, middle, turn],
        checks=[everybody_is_there],
        outputs=[
            rs.Series("curve.csv", row=curve, columns=("step", "after", "kinds"), reductions=[after]),
            rs.Arrays("crowd.h5", arrays={"crowd": lambda context: context.reductions["after"]}, every=2),
            rs.Sample("sample.h5", columns=("x", "turns"), rows=5, every=3),
        ],
    )
