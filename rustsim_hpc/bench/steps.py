"""Whole steps of the standard set: those of the main job, and those that have next to nothing to do."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from rustsim_hpc.bench.engine import Engine, Setup
from rustsim_hpc.bench.measure import Case, Row, Section, added, interleave
from rustsim_hpc.bench.setting import MODELS, Size, flights_module, flights_params


def flights(size: Size) -> Section:
    """Measure us_flights on one worker and on several, with and without its proof."""
    text = (
        f"The epidemic of jobs/us_flights on threads, {size.agents:,} agents, {size.days * size.rounds} "
        "days. The model's daily check is included; output files are not."
    )
    section = Section("flights", "us_flights", text)
    module = flights_module()
    if module is None:
        section.rows.append(
            Row("one", "us_flights", note="not measured: there is no jobs/us_flights.py here")
        )
        return section
    params = flights_params(size.agents)
    setup = Setup(str(module), size.agents, "threads", size.workers, params=params)
    with (
        Engine(replace(setup, workers=1)) as one,
        Engine(setup) as several,
        Engine(replace(setup, replay="digest")) as digest,
    ):
        engines = {"one": one, "all": several, "digest": digest}
        cases = {key: Case(partial(engine.step, size.days), size.days) for key, engine in engines.items()}
        timings = interleave(cases, size.rounds)
    names = {
        "one": "one worker",
        "all": f"{size.workers} workers",
        "digest": f"{size.workers} workers, digest of each step",
    }
    for key, name in names.items():
        # Days differ, so the rate is that of all days together.
        rate = size.agents * len(timings[key].seconds) / sum(timings[key].seconds)
        row = Row.of(key, name, timings[key], timings["one"], rate=rate / 1e6, unit="million agent-steps/s")
        section.rows.append(row)
    section.rows.append(added("digest.added", "added by the digest", timings, "digest", "all", "all"))
    return section


def empty(size: Size) -> Section:
    """Measure what a step costs that has next to nothing to do."""
    setups = {
        "inline": Setup(MODELS + "integrate", 1),
        "threads": Setup(MODELS + "integrate", size.workers, "threads", size.workers),
        "processes": Setup(MODELS + "integrate", size.workers, "processes", size.workers),
    }
    with ExitStack() as stack:
        cases = {}
        for key, setup in setups.items():
            engine = stack.enter_context(Engine(setup))
            cases[key] = Case(partial(engine.step, size.steps), size.steps)
        timings = interleave(cases, size.rounds)
    rows = [
        Row.of(key, key if key == "inline" else f"{key} {size.workers}", timing)
        for key, timing in timings.items()
    ]
    text = (
        "A step of integrate with one row in each partition, guard rollback, replay off: what a step costs "
        "before it does any work."
    )
    return Section("empty", "An empty step", text, rows)
