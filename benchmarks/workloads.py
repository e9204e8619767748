"""What is compared: three workloads, their first states, and how a state that a program gives is checked.

Every program gets the same columns, at the first step and for the check, and makes as many steps. Integrate
is checked number by number against NumPy in float64; the others, whose random numbers are each program's own,
against what must be true of any right one, with bounds of five standard deviations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DT, KEEP = np.float32(0.1), np.float32(0.99)
"""Integrate: the time step in s, and the share of the velocity that is kept in a step."""
REACH, WIDTH = np.float32(0.25), np.float32(10.0)
"""Walk: the longest move along an axis and the side of the box, in m."""
BETA, GAMMA = 0.4, 0.1
"""SIR: infectious contacts of an agent, and the chance to recover, in a step."""
S, I, R = 0, 1, 2  # noqa: E741 (the field's own letters)
EVERY = 20
"""SIR: one row in so many is infectious at first."""

SMALL = 20_000
"""Rows of the check that comes before any timing."""
SMALL_STEPS = (3, 30)


class CheckError(Exception):
    """A program's result that cannot be right."""


def _require(true: bool, text: str) -> None:
    if not true:
        raise CheckError(text)


def _near(what: str, found: float, expected: float, bound: float) -> None:
    _require(
        abs(found - expected) <= bound, f"{what} is {found:.6g}, expected {expected:.6g} within {bound:.2g}"
    )


# -- integrate ----------------------------------------------------------------------------------------


def start_integrate(first: int, last: int) -> tuple[Array, ...]:
    """Return x, y on a grid in m, and vx, vy from -1 to 1 m/s, float32, of rows first to last - 1."""
    row = np.arange(first, last)
    columns = (row % 1000, row // 1000 % 1000, (row * 7919 % 2001 - 1000) / 1000)
    return (
        *(c.astype(np.float32) for c in columns),
        ((row * 104729 % 2001 - 1000) / 1000).astype(np.float32),
    )


def check_integrate(before: Sequence[Array], after: Sequence[Array], steps: int) -> None:
    """Check each of (at most a hundred thousand) rows against the same steps in float64."""
    sample = slice(None, None, max(1, len(before[0]) // 100_000))
    x, y, vx, vy = (c[sample].astype(np.float64) for c in before)
    for _ in range(steps):
        x, y, vx, vy = x + vx * DT, y + vy * DT, vx * KEEP, vy * KEEP
    for name, found, expected in zip(("x", "y", "vx", "vy"), after, (x, y, vx, vy), strict=True):
        _require(found.dtype.kind == "f" and len(found) == len(before[0]), f"{name} is {found.dtype}")
        worst = float(np.max(np.abs(found[sample] - expected) / (1 + np.abs(expected)), initial=0))
        _require(worst < 1e-5, f"{name} is off by {worst:.2g} after {steps} steps")


# -- random walk --------------------------------------------------------------------------------------


def start_walk(first: int, last: int) -> tuple[Array, ...]:
    """Return x, y spread evenly over the box, in an order of their own, float32."""
    row = np.arange(first, last, dtype=np.uint64)
    parts = (row * np.uint64(k) >> np.uint64(40) for k in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03))
    return tuple(part.astype(np.float32) * np.float32(2.0**-24) * WIDTH for part in parts)


def check_walk(before: Sequence[Array], after: Sequence[Array], steps: int) -> None:
    """Check that rows stay in the box, spread over it evenly, and moved as far as they must, freely."""
    rows, reach, width = len(before[0]), float(REACH), float(WIDTH)
    moves = []
    # Nobody that far from the walls has met one.
    free = [np.abs(b - width / 2) < width / 2 - steps * reach for b in before]
    for name, a, b in zip(("x", "y"), after, before, strict=True):
        _require(a.dtype.kind == "f" and len(a) == rows, f"{name} is {a.dtype}")
        a64 = a.astype(np.float64)
        _require(bool((a64 >= 0).all() and (a64 <= width).all()), f"{name} has left the box")
        _near(f"the variance of {name}", a64.var(), width**2 / 12, 5 * width**2 / np.sqrt(180 * rows))
        by_walls = float(np.mean(np.abs(a64 - width / 2) > 0.49 * width))  # 0.1 m of 10 on each side
        _near(f"the share of {name} near a wall", by_walls, 0.02, 5 * np.sqrt(0.02 / rows))
        moves.append(np.where(free[0] & free[1], a64 - b, 0.0))
    count = int(np.sum(free[0] & free[1]))
    if count < 1000:
        return
    mean = steps * reach**2 / 3
    for name, move in zip(("x", "y"), moves, strict=True):
        far = float(np.max(np.abs(move)))
        _require(far <= steps * reach * 1.00001, f"a move along {name} is {far:.4g} after {steps} steps")
        _near(f"the mean square along {name}", np.sum(move**2) / count, mean, 5 * mean * np.sqrt(2 / count))
    bound = 5 * mean / np.sqrt(count)
    _near("what x and y have in common", np.dot(*moves) / count, 0, bound)
    _near("what neighbours have in common", np.dot(moves[0][1:], moves[0][:-1]) / count, 0, bound)


# -- SIR ----------------------------------------------------------------------------------------------


def start_sir(first: int, last: int) -> tuple[Array, ...]:
    """Return the states, uint8: one row in `EVERY` infectious, the others susceptible."""
    return (np.where(np.arange(first, last) % EVERY == 0, I, S).astype(np.uint8),)


def chances(infectious: float, rows: int) -> tuple[float, float]:
    """Return the chance of a susceptible row to be infected in this step, and of an infectious to recover."""
    return 1.0 - float(np.exp(-BETA * infectious / rows)), GAMMA


def check_sir(before: Sequence[Array], after: Sequence[Array], steps: int) -> None:
    """Check that nobody is lost or goes back, and that the shares follow the deterministic epidemic."""
    [old], [new] = before, after
    rows = len(old)
    _require(new.dtype == np.uint8 and len(new) == rows, f"the state is {new.dtype}")
    counts = np.bincount(new, minlength=3)
    _require(len(counts) == 3, f"there is a state {len(counts) - 1}")
    _require(int(counts.sum()) == rows, f"S + I + R is {counts.sum()}, not {rows}")
    _require(bool((new >= old).all()), "somebody has gone back to an earlier state")
    s, i, r = (float(np.mean(old == k)) for k in (S, I, R))
    for _ in range(steps):
        infected, recovered = s * (1.0 - np.exp(-BETA * i)), i * GAMMA
        s, i, r = s - infected, i + infected - recovered, r + recovered
    for name, found, expected in zip("SIR", counts / rows, (s, i, r), strict=True):
        _near(f"the share of {name} after {steps} steps", found, expected, 5 / np.sqrt(rows))


# -- all ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """One workload: its key (the name of a program's class, in lower case), title, and what it is."""

    key: str
    title: str
    text: str
    start: Callable[[int, int], tuple[Array, ...]]
    check: Callable[[Sequence[Array], Sequence[Array], int], None]


WORKLOADS = {
    workload.key: workload
    for workload in (
        Workload(
            "integrate",
            "Integrate",
            f"`x += vx*dt; y += vy*dt; vx *= keep; vy *= keep` over four float32 columns, "
            f"dt {DT:g}, keep {KEEP:g}. Checked row by row against NumPy in float64.",
            start_integrate,
            check_integrate,
        ),
        Workload(
            "walk",
            "Random walk",
            f"In each step a row moves along x and along y by {REACH:g} m times a uniform random number in "
            f"[-1, 1), two draws, between reflecting walls at 0 and {WIDTH:g} m. Two float32 columns, evenly "
            "spread at the start. Checked: the rows are within the walls and still evenly spread, the mean "
            "square of the moves is right, and x, y and neighbouring rows are uncorrelated.",
            start_walk,
            check_walk,
        ),
        Workload(
            "sir",
            "SIR epidemic",
            f"One uint8 column, the state. Each step counts the infectious rows I of all rows N, computes "
            f"p = 1 - exp(-{BETA} I/N), and makes one draw u a row: S becomes I if u < p, I becomes R if "
            f"u < {GAMMA}. One row in {EVERY} is infectious at the start; the timed steps are those of the "
            "epidemic wave. Checked: S + I + R = N, no row returns to an earlier state, and the shares "
            "follow the deterministic epidemic.",
            start_sir,
            check_sir,
        ),
    )
}
