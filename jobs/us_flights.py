"""Influenza over the US air network of 2008: a million agents, 305 airports, one step a day.

Every agent lives at an airport, travels now and then along one direct leg, stays some days, and comes home.
Where agents meet they infect each other: susceptible (S), exposed (E), infectious (I), recovered (R). How
many live at an airport, and where they fly, follows the departures of 2008 (data/README.md): an illustration,
not a forecast.

A step is one day, in three parts: MOVE (at most one move an agent), COUNT (who is where), PROGRESS (at most
one transition an agent, with the chances that follow from the counts).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from us_flights_data import STATES, E, I, Ints, R, S, network
from us_flights_pictures import draw_curve, draw_map

import rustsim_hpc as rs
from rustsim_hpc.errors import ModelError, nearest


def places(params: Mapping[str, Any]) -> int:
    """Return the number of airports."""
    return len(network().codes)


def tables(params: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Return what the kernels look up.

    dep: flights out of each airport (int64). cum: its running sum, the bounds of the airports' shares of the
    population. flight_to: the destination of every flight (int16); those out of airport k are
    cum[k] - dep[k] .. cum[k] - 1.
    """
    routes = network()
    return {"dep": routes.dep, "cum": np.cumsum(routes.dep), "flight_to": routes.flight_to}


# -- The first day ------------------------------------------------------------------------------------


def residents(code: str, agents: int, cum: Ints) -> range:
    """Return the rows of the agents who live at an airport.

    Raises:
        ModelError: there is no such airport.
    """
    codes = network().codes
    if code not in codes:
        raise ModelError(f'seed_airport "{code}" is not an airport of the routes{nearest(code, codes)}')
    place = codes.index(code)
    total = int(cum[-1])
    before = int(cum[place - 1]) if place else 0
    # Row r lives where cum[place - 1] <= r * total // agents < cum[place]: both bounds rounded up.
    return range(-(-before * agents // total), -(-int(cum[place]) * agents // total))


def initialise(
    rows: Any, params: Mapping[str, Any], tables: Mapping[str, npt.NDArray[Any]], seed: int
) -> dict[str, npt.NDArray[Any]]:
    """Put everyone at home; the first residents of the seed airport are infectious, the rest susceptible.

    Homes are exact quotas of the departures, without a random draw: row r of N lives where flight number
    r * T // N of the year's T departs.

    Raises:
        ModelError: no such airport, or more initially infectious agents than it has residents.
    """
    cum = tables["cum"]
    local = residents(params["seed_airport"], rows.total, cum)
    infectious = int(params["initial_infectious"])
    if infectious > len(local):
        raise ModelError(
            f"initial_infectious = {infectious} is more than the {len(local)} residents of "
            f"{params['seed_airport']} among {rows.total} agents",
            hint="lower params.initial_infectious, raise run.agents or choose a larger params.seed_airport",
        )
    row = np.arange(rows.start, rows.stop, dtype=np.int64)
    home = np.searchsorted(cum, row * cum[-1] // max(rows.total, 1), side="right").astype(np.int16)
    first = (row >= local.start) & (row < local.start + infectious)
    return {"home": home, "place": home.copy(), "state": np.where(first, I, S).astype(np.uint8)}


# -- One day ------------------------------------------------------------------------------------------


@rs.row_kernel(writes="place")
def move(
    home: int,
    place: int,
    p_travel: float,
    stay_days: float,
    dep: Ints,
    cum: Ints,
    flight_to: npt.NDArray[np.int16],
    rng: Any,
) -> int:
    """Leave home along one of the year's flights, or go home again."""
    u = rs.random.uniform(rng, 0)
    if place == home:
        if u < p_travel and dep[home] > 0:
            return flight_to[cum[home] - dep[home] + rs.random.integers(rng, 0, dep[home])]  # type: ignore[no-any-return]
        return place
    return home if u < 1.0 / stay_days else place


@rs.reduction("histogram", bins=lambda params: 4 * places(params))
def crowd(place: int, state: int) -> int:
    """Count the agents at each place in each state, after everyone has moved."""
    return place * 4 + state


@rs.derive
def p_inf(crowd: Ints, beta: float) -> npt.NDArray[np.float64]:
    """Return the chance of infection at each place: 1 - exp(-beta * infectious / all)."""
    n = crowd.reshape(-1, 4)
    here = n.sum(axis=1)
    return 1.0 - np.exp(-beta * n[:, I] / np.maximum(here, 1))  # type: ignore[no-any-return]


@rs.row_kernel(writes="state")
def progress(
    place: int,
    state: int,
    p_inf: npt.NDArray[np.float64],
    latent_days: float,
    infectious_days: float,
    rng: Any,
) -> int:
    """Go on to the next state, or not; nobody leaves R."""
    if state == S:
        p = p_inf[place]
    elif state == E:
        p = 1.0 / latent_days
    elif state == I:
        p = 1.0 / infectious_days
    else:
        return state
    return state + 1 if rs.random.uniform(rng, 0) < p else state


# -- What is watched and kept -------------------------------------------------------------------------


@rs.reduction("histogram", bins=lambda params: 4 * places(params))
def census(place: int, state: int) -> int:
    """Count the agents at each place in each state at the end of the day."""
    return place * 4 + state


@rs.check(every=1, reductions=[census])
def population(context: Any) -> bool:
    """Nobody is lost or made, nobody goes back, and nobody makes more than one transition a day."""
    after = context.reductions["census"].reshape(-1, 4).sum(axis=0)
    before = context.reductions["crowd"].reshape(-1, 4).sum(axis=0)
    infected, recovered = before[S] - after[S], after[R] - before[R]
    fell_ill = before[E] + infected - after[E]
    return bool(
        before.sum() == after.sum() == context.agent_count
        and infected >= 0
        and 0 <= fell_ill <= before[E]
        and 0 <= recovered <= before[I]
    )


def curve_row(context: Any) -> dict[str, int]:
    """Return one line of curve.csv."""
    totals = context.reductions["census"].reshape(-1, 4).sum(axis=0)
    return {"day": int(context.step_index), **{s: int(n) for s, n in zip(STATES, totals, strict=True)}}


def airport_counts(context: Any) -> Ints:
    """Return the agents at each place in each state at the end of the day, int64 (places, 4)."""
    counts: Ints = context.reductions["census"].reshape(-1, 4)
    return counts


def infectious_after_move(context: Any) -> Ints:
    """Return the infectious agents at each place after MOVE, int64 (places,).

    All 0 where the state recorded is one that no step of this run has made: day 0, and where a fork starts.
    """
    moved = context.reductions.get("crowd")
    if moved is None:
        return np.zeros(places(context.params), np.int64)
    counts: Ints = moved.reshape(-1, 4)[:, I]
    return counts


def model() -> Any:
    """Return the model."""
    airports = dict(enumerate(network().codes))
    return rs.Model(
        params={
            "p_travel": rs.Param(
                "float64", default=0.01, min=0, max=1, doc="chance that an agent at home leaves, each day"
            ),
            "stay_days": rs.Param("float64", default=3.0, min=1, unit="d", doc="mean stay away from home"),
            "beta": rs.Param(
                "float64", default=0.5, min=0, unit="1/d", doc="infectious contacts a day of one agent"
            ),
            "latent_days": rs.Param("float64", default=2.0, min=1, unit="d", doc="mean time in E"),
            "infectious_days": rs.Param("float64", default=3.0, min=1, unit="d", doc="mean time in I"),
            "initial_infectious": rs.Param("int64", default=100, min=0, doc="agents in I on day 0"),
            "seed_airport": rs.Param("str", default="JFK", doc="home of the initially infectious"),
        },
        columns=[
            rs.Column("home", "int16", doc="airport where the agent lives", codes=airports),
            rs.Column("place", "int16", doc="airport where the agent is", codes=airports),
            rs.Column("state", "uint8", doc="course of the infection", codes=dict(enumerate(STATES))),
        ],
        tables=tables,
        initialise=initialise,
        phases=[move, crowd, p_inf, progress],
        checks=[population],
        outputs=[
            rs.Series("curve.csv", row=curve_row, columns=("day", *STATES), reductions=(census,)),
            rs.Arrays(
                "airports.h5",
                arrays={"counts": airport_counts, "infectious_after_move": infectious_after_move},
                reductions=(census,),
            ),
            rs.Picture("curve.png", draw=draw_curve, size=(10.5, 7.2)),
            rs.Picture("map.png", draw=draw_map, size=(14.0, 15.2)),
        ],
        step_length=1.0,
        time_unit="d",
    )
