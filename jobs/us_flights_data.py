"""What us_flights and its pictures share: the states, the airports and routes of 2008, and arrival days."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

DATA = Path(__file__).with_name("data")
S, E, I, R = range(4)  # noqa: E741
STATES = ("S", "E", "I", "R")
NOT_REACHED = -1
"""Arrival day of an airport where nobody infectious has been."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Network(NamedTuple):
    """The routes: airports sorted by code, and every flight of the year, by origin and then destination."""

    codes: tuple[str, ...]
    dep: Ints  # (places,) flights out of each airport in the year
    flight_to: npt.NDArray[np.int16]  # (flights,) destination of each flight


@cache
def network() -> Network:
    """Read the routes of 2008."""
    with (DATA / "flights-airport.csv").open(newline="", encoding="utf-8") as file:
        routes = [(r["origin"], r["destination"], int(r["count"])) for r in csv.DictReader(file)]
    codes = tuple(sorted({code for origin, destination, _ in routes for code in (origin, destination)}))
    index = {code: place for place, code in enumerate(codes)}
    sorted_routes = np.array(sorted((index[o], index[d], count) for o, d, count in routes), np.int64)
    origin, destination, count = sorted_routes.T
    dep = np.zeros(len(codes), np.int64)
    np.add.at(dep, origin, count)
    return Network(codes, dep, np.repeat(destination, count).astype(np.int16))


@cache
def positions() -> tuple[Floats, Floats]:
    """Return longitudes and latitudes, degrees: of all airports, (3376, 2), and the routes', (305, 2)."""
    with (DATA / "airports.csv").open(newline="", encoding="utf-8") as file:
        at = {r["iata"]: (float(r["longitude"]), float(r["latitude"])) for r in csv.DictReader(file)}
    return np.array(list(at.values())), np.array([at[code] for code in network().codes])


def arrival_days(day: Ints, infectious: Ints) -> Ints:
    """Return the first day on which each airport had an infectious agent after MOVE, or NOT_REACHED.

    Args:
        day: the samples' days, int64 (samples,), rising; day 0 is before the first move and never counts.
        infectious: counts after MOVE, int64 (samples, places).
    """
    seen = (np.asarray(infectious) > 0) & (np.asarray(day) > 0)[:, np.newaxis]
    first = np.asarray(day)[np.argmax(seen, axis=0)]
    return np.where(seen.any(axis=0), first, NOT_REACHED).astype(np.int64)
