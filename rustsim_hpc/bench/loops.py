"""Memory and models of a few loops: the engine in its ways, against loops by hand; a table a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from rustsim_hpc.bench.engine import Engine, Setup
from rustsim_hpc.bench.measure import Case, Row, Section, Timing, added, interleave
from rustsim_hpc.bench.models import integrate, orbit, tally, walk
from rustsim_hpc.bench.setting import BYTES, FUSED, MODELS, Bandwidth, Size, columns_of, shared_out
from rustsim_hpc.proof.fingerprint import digest_column, fnv1a_bytes, fnv1a_default_ids

Array = np.ndarray[Any, Any]
Columns = Sequence[Array]

# -- memory -------------------------------------------------------------------------------------------


def memory(size: Size) -> tuple[Section, Bandwidth]:
    """Measure what memory gives: copy, triad and update, float64, on one core and on the workers'."""
    from rustsim_hpc.kernels import by_hand

    one, two, three = (np.full(size.rows, 1.0 + k) for k in range(3))
    factor = 1.0 + 2.0**-50
    loops = {
        "copy": (by_hand.copy, (one, two), ()),
        "triad": (by_hand.triad, (three, one, two), (factor,)),
        "update": (by_hand.update, (one,), (factor,)),
    }
    with shared_out(size.workers) as run:
        cases = {}
        for kind, (loop, arrays, rest) in loops.items():
            cases[f"{kind}.one"] = Case(partial(loop, *arrays, *rest))
            cases[f"{kind}.all"] = Case(partial(run, loop, arrays, *rest))
        timings = interleave(cases, size.rounds)
    rows, best = [], {"one": 0.0, "all": 0.0}
    for key, timing in timings.items():
        kind, cores = key.split(".")
        rate = size.rows * (24 if kind == "triad" else 16) / timing.median
        best[cores] = max(best[cores], rate)
        name = f"{kind}, {'one core' if cores == 'one' else f'{size.workers} cores'}"
        rows.append(Row.of(key, name, timing, rate=rate / 1e9, unit="GB/s"))
    text = (
        f"Numba loops over float64 arrays of {size.rows:,} items: the copy and triad of the STREAM "
        "benchmark, and an update in place (`a *= f`), where no cache line is read only to be overwritten. "
        "An item counts as 16, 24 and 16 bytes. In the tables below, the share of bandwidth refers to the "
        "best of the three on the same number of cores; each column of a model counts once if it is read "
        "and once if it is written."
    )
    return Section("memory", "Memory bandwidth", text, rows), Bandwidth(best["one"], best["all"])


# -- integrate ----------------------------------------------------------------------------------------

_INTEGRATE = (
    "`x += vx*dt; y += vy*dt; vx *= keep; vy *= keep` over four float32 columns, {rows:,} rows. By hand: one "
    "Numba loop that does all four in place, {who}. A loop that keeps the old state reads one set of columns "
    "and writes another, with plain stores or with stores that bypass the cache. The engine: two row "
    "kernels, with everything that a step promises. The guard `torn` works in place too; `rollback` keeps "
    "the old state until the step is complete. Before each timed call the same case makes one that is not "
    "timed, so that it finds the caches as it does in the middle of a long run."
)

_ONE_CORE = {
    "hand": "by hand",
    "hand.beside": "by hand, keeping the old state",
    "hand.around": "the same, bypassing the cache",
    "numpy": "NumPy, in place",
    "torn": "engine, torn",
    "rollback": "engine, rollback",
    "torn.fused": f"engine, torn, {FUSED} steps fused",
    "rollback.fused": f"engine, rollback, {FUSED} steps fused",
    "digest": "engine, rollback, digest of each step",
    "fnv1a": "engine, rollback, fnv1a of each step",
    "hash": "fnv1a of the state alone, without steps",
}


def _here(loop: Callable[..., object], columns: Columns, *rest: Any) -> object:
    return loop(*columns, *rest)


def hand_cases(hand: Columns, beside: Columns, run: Callable[..., object] = _here) -> dict[str, Case]:
    """Return the cases by hand: in place, and keeping the old state with both kinds of stores.

    hand, beside: columns of their own. run: calls a loop on columns, with further arguments.
    """
    from rustsim_hpc.kernels import by_hand

    turns = ([*hand, *beside], [*beside, *hand])
    rest = integrate.DT, integrate.KEEP
    return {
        "hand": Case.steady(lambda: [run(by_hand.integrate, hand, *rest) for _ in range(2)], 2),
        "hand.beside": Case.steady(lambda: [run(by_hand.integrate_beside, both, *rest) for both in turns], 2),
        "hand.around": Case.steady(lambda: [run(by_hand.integrate_around, both, *rest) for both in turns], 2),
    }


def integrate_one(size: Size, bandwidth: Bandwidth) -> Section:
    """Measure integrate on one core: by hand, NumPy, the engine inline in its ways."""
    hand, beside, plain = (columns_of(integrate.model(), size.rows) for _ in range(3))
    setup = Setup(MODELS + "integrate", size.rows)
    with ExitStack() as stack:
        rollback, torn, digest, fnv = (
            stack.enter_context(Engine(made))
            for made in (
                setup,
                replace(setup, guard="torn"),
                replace(setup, replay="digest"),
                replace(setup, replay="fnv1a"),
            )
        )
        timings = interleave(
            {
                **hand_cases(hand, beside),
                "numpy": Case.steady(lambda: _numpy_integrate(*plain)),
                "torn": Case.steady(lambda: torn.step(2), 2),
                "rollback": Case.steady(lambda: rollback.step(2), 2),
                "torn.fused": Case.steady(lambda: torn.step_fused(FUSED), FUSED),
                "rollback.fused": Case.steady(lambda: rollback.step_fused(FUSED), FUSED),
                "digest": Case.steady(lambda: digest.step(2), 2),
                "fnv1a": Case(lambda: fnv.step(1)),
                "hash": Case(lambda: _bare_hash(plain)),
            },
            size.rounds,
        )
    least = size.rows * BYTES["integrate"] / bandwidth.one
    rows = rows_beside_hand(_ONE_CORE, timings, least, without=("hash", "fnv1a"))
    rows += [
        Row.of(
            "fused.gain",
            "rollback, fused compared to one by one",
            timings["rollback.fused"],
            timings["rollback"],
        ),
        added("digest.added", "added by the digest", timings, "digest", "rollback", "hand"),
        added(
            "fnv1a.added",
            "added by fnv1a, as a multiple of the hash alone",
            timings,
            "fnv1a",
            "rollback",
            "hash",
        ),
    ]
    text = _INTEGRATE.format(rows=size.rows, who="on one core")
    return Section("integrate.one", "Integrate, one core", text, rows)


def integrate_all(size: Size, bandwidth: Bandwidth) -> Section:
    """Measure integrate on the workers' cores: by hand with threads and prange, the engine's executors."""
    from rustsim_hpc.kernels import by_hand

    hand, beside = (columns_of(integrate.model(), size.rows) for _ in range(2))
    dt, keep = integrate.DT, integrate.KEEP
    setup = Setup(MODELS + "integrate", size.rows, "threads", size.workers)
    setups = {
        "threads.torn": replace(setup, guard="torn"),
        "threads.rollback": setup,
        "threads.digest": replace(setup, replay="digest"),
        "processes.torn": replace(setup, executor="processes", guard="torn"),
        "processes.rollback": replace(setup, executor="processes"),
    }
    by_hand.use_threads(size.workers)
    with ExitStack() as stack:
        engines = {key: stack.enter_context(Engine(made)) for key, made in setups.items()}
        run = stack.enter_context(shared_out(size.workers))
        cases = {
            **hand_cases(hand, beside, run),
            "prange": Case.steady(lambda: [by_hand.integrate_cores(*hand, dt, keep) for _ in range(2)], 2),
            **{key: Case.steady(partial(engine.step, 2), 2) for key, engine in engines.items()},
            "threads.fused": Case.steady(lambda: engines["threads.rollback"].step_fused(FUSED), FUSED),
        }
        timings = interleave(cases, size.rounds)
    names = {
        "hand": f"by hand, {size.workers} threads",
        "hand.beside": f"by hand, {size.workers} threads, keeping the old state",
        "hand.around": "the same, bypassing the cache",
        "prange": "by hand, prange",
        "threads.torn": "engine, threads, torn",
        "threads.rollback": "engine, threads, rollback",
        "threads.fused": f"engine, threads, rollback, {FUSED} steps fused",
        "threads.digest": "engine, threads, rollback, digest of each step",
        "processes.torn": "engine, processes, torn",
        "processes.rollback": "engine, processes, rollback",
    }
    rows = rows_beside_hand(names, timings, size.rows * BYTES["integrate"] / bandwidth.all)
    rows.append(
        added("digest.added", "added by the digest", timings, "threads.digest", "threads.rollback", "hand")
    )
    text = _INTEGRATE.format(
        rows=size.rows, who=f"with the rows split between {size.workers} threads, or with prange"
    )
    return Section("integrate.all", f"Integrate, {size.workers} workers", text, rows)


def _numpy_integrate(x: Array, y: Array, vx: Array, vy: Array) -> None:
    x += vx * integrate.DT
    y += vy * integrate.DT
    vx *= integrate.KEEP
    vy *= integrate.KEEP


def _bare_hash(columns: Sequence[Array]) -> int:
    value = fnv1a_default_ids(0xCBF29CE484222325, 0, len(columns[0]))
    for column in columns:
        value = fnv1a_bytes(value, column)
    return value


def rows_beside_hand(
    names: dict[str, str], timings: dict[str, Timing], least: float, without: Sequence[str] = ()
) -> list[Row]:
    """Return a row for each case, as a multiple of "hand"; least: seconds that its bytes take at least."""
    return [
        Row.of(
            key,
            name,
            timings[key],
            timings["hand"],
            share=None if key in without else least / timings[key].median,
        )
        for key, name in names.items()
    ]


# -- what a step is made of ---------------------------------------------------------------------------


def digests(size: Size) -> Section:
    """Measure how fast the digest reads a column, against np.sum."""
    rows, rng = [], np.random.default_rng(1)
    for dtype in ("float32", "float64", "int32", "int64"):
        column = rng.integers(0, 1 << 20, size.rows).astype(dtype)
        timings = interleave(
            {"sum": Case(column.sum), "digest": Case(partial(digest_column, column, 0, 1))}, size.rounds
        )
        for key, name in (("sum", "np.sum"), ("digest", "digest")):
            rate = column.nbytes / timings[key].median / 1e9
            row = Row.of(
                f"{dtype}.{key}", f"{name}, {dtype}", timings[key], timings["sum"], rate=rate, unit="GB/s"
            )
            rows.append(row)
    text = f"The digest of one column of {size.rows:,} rows on one core, compared to `np.sum` of the column."
    return Section("digests", "The digest of a column", text, rows)


def orbit_all(size: Size, bandwidth: Bandwidth) -> Section:
    """Measure eight kernels over six columns, against the same as separate prange loops."""
    from rustsim_hpc.kernels import by_hand

    hand = columns_of(orbit.model(), size.rows)
    values = (orbit.DT, orbit.K, orbit.KEEP, orbit.WIDTH)
    setup = Setup(MODELS + "orbit", size.rows, "threads", size.workers)
    by_hand.use_threads(size.workers)
    with Engine(setup) as rollback, Engine(replace(setup, guard="torn")) as torn:
        timings = interleave(
            {
                "hand": Case.steady(lambda: by_hand.orbit_cores(hand, *values)),
                "torn": Case.steady(lambda: torn.step(2), 2),
                "rollback": Case.steady(lambda: rollback.step(2), 2),
            },
            size.rounds,
        )
    names = {
        "hand": "by hand, eight prange loops",
        "torn": "engine, threads, torn",
        "rollback": "engine, threads, rollback",
    }
    text = (
        f"Springs, drag and walls over six float32 columns, {size.rows:,} rows. By hand: eight functions "
        f"with a prange loop each, on {size.workers} cores. The engine: eight row kernels, which it runs "
        "together on one tile of rows after the other. The share of bandwidth counts each column once in "
        "both."
    )
    rows = rows_beside_hand(names, timings, size.rows * BYTES["orbit"] / bandwidth.all)
    return Section("orbit", f"Eight kernels, {size.workers} workers", text, rows)


def parts(size: Size, bandwidth: Bandwidth) -> Section:
    """Measure random draws and a histogram, on one core, each against a loop by hand."""
    from rustsim_hpc.kernels import by_hand

    x, y = columns_of(walk.model(), size.rows)
    [keys] = columns_of(tally.model(), size.rows)
    counts = np.zeros(tally.BINS, np.int64)
    with (
        Engine(Setup(MODELS + "walk", size.rows, guard="torn")) as walking,
        Engine(Setup(MODELS + "tally", size.rows)) as tallying,
    ):
        timings = interleave(
            {
                "walk.hand": Case(lambda: by_hand.walk(x, y, 0, 1, 1, walk.REACH, walk.WIDTH)),
                "walk": Case(lambda: walking.step(1)),
                "tally.hand": Case(lambda: by_hand.histogram(keys, counts)),
                "tally": Case(lambda: tallying.step(1)),
            },
            size.rounds,
        )
    rows = []
    for kind, hand, engine in (
        ("walk", "random walk by hand, splitmix64", "engine, Philox4x32-10, torn"),
        ("tally", "histogram by hand", "engine, histogram"),
    ):
        base = timings[f"{kind}.hand"]
        least = size.rows * BYTES[kind] / bandwidth.one
        for key, name in ((f"{kind}.hand", hand), (kind, engine)):
            rows.append(Row.of(key, name, timings[key], base, share=least / timings[key].median))
    text = (
        f"One core, {size.rows:,} rows. Random walk: two float32 columns, two uniform draws a row, "
        "reflecting walls. By hand it uses splitmix64, the cheapest counter-based generator known to us; the "
        f"engine uses Philox4x32-10. Histogram: int32 keys, {tally.BINS} bins."
    )
    return Section("parts", "Random numbers and histograms, one core", text, rows)
