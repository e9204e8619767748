"""Slow plain-NumPy twins of the jobs: the same bits as the engine, by other means.

Nothing here uses the package or the jobs' own functions, so that agreement says something. The generator is
Philox4x32-10 after Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11,
doi:10.1145/2063384.2063405, in the layout that docs/random.md gives: counter = id (two words, low first),
step, block; key = two words, low first.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
State = dict[str, npt.NDArray[Any]]

DATA = Path(__file__).resolve().parent.parent / "jobs" / "data"
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
UNIFORM, UNIFORM32, INTEGERS = 0, 1, 4  # the functions' slots in the upper four bits of the block


# -- Random numbers -----------------------------------------------------------------------------------


def philox4x32_10(counter: list[U32], key: tuple[int, int]) -> list[U32]:
    """Return four words for each counter; counter is four arrays (or scalars) of words."""
    c = [np.asarray(word).astype(np.uint64) for word in counter]
    k0, k1 = key
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (second >> HALF) ^ c[1] ^ np.uint64(k0),
            second & LOW,
            (first >> HALF) ^ c[3] ^ np.uint64(k1),
            first & LOW,
        ]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [word.astype(np.uint32) for word in c]


@dataclass(frozen=True)
class Stream:
    """One phase's random numbers in one step, for rows with these ids."""

    key: int
    ids: U64
    step: int

    @classmethod
    def of(cls, seed: int, name: str, ids: U64, step: int) -> Stream:
        """Return the stream of a phase: its key is a hash of the seed and the phase's name."""
        text = (seed % 2**64).to_bytes(8, "little") + name.encode()
        return cls(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"), ids, step)

    def words(self, block: int) -> list[U32]:
        """Return the four words of one block for every row."""
        low, high = (self.ids & LOW).astype(np.uint32), (self.ids >> HALF).astype(np.uint32)
        step, number = np.full_like(low, self.step), np.full_like(low, block)
        return philox4x32_10([low, high, step, number], (self.key % 2**32, self.key >> 32))

    def bits64(self, slot: int, index: int) -> U64:
        """Return the index-th 64 bits of a function's blocks: two a block, the first word upper."""
        words = self.words(slot << 28 | index >> 1)
        high, low = words[2 * (index & 1)], words[2 * (index & 1) + 1]
        return low.astype(np.uint64) | high.astype(np.uint64) << HALF

    def uniform(self, draw: int) -> F64:
        """Return float64 in [0, 1): the upper 53 bits."""
        return (self.bits64(UNIFORM, draw) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def uniform32(self, draw: int) -> npt.NDArray[np.float32]:
        """Return float32 in [0, 1): the upper 24 bits of one word."""
        word = self.words(UNIFORM32 << 28 | draw >> 2)[draw & 3]
        return (word >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)

    def integers(self, draw: int, n: I64) -> I64:
        """Return integers in [0, n), n < 2^31 and one for each row, without bias.

        Lemire, "Fast random integer generation in an interval", doi:10.1145/3230636: the upper half of the
        128-bit product of 64 random bits and n, refused where the lower half is below 2^64 mod n; then the
        next 64 bits are tried.
        """
        bound = np.asarray(n).astype(np.uint64)
        result = np.zeros(bound.shape, np.int64)
        left = np.arange(bound.size)
        attempt = 0
        while left.size:
            rows = Stream(self.key, self.ids[left], self.step)
            x, b = rows.bits64(INTEGERS, draw << 9 | attempt), bound[left]
            carry = ((x & LOW) * b) >> HALF
            upper = ((x >> HALF) * b + carry) >> HALF
            refused = x * b < (~b + np.uint64(1)) % b  # (2^64 - n) mod n = 2^64 mod n
            result[left[~refused]] = upper[~refused].astype(np.int64)
            left = left[refused]
            attempt += 1
        return result


# -- Twins of the small jobs --------------------------------------------------------------------------


def particles(agents: int, steps: int, dt: float = 0.1, keep: float = 0.99) -> State:
    """Return the columns of jobs/particles after some steps, all arithmetic in float32."""
    row = np.arange(agents, dtype=np.int64)
    x, y = (row % 1000).astype(np.float32), (row // 1000 % 1000).astype(np.float32)
    vx = ((row * 7919 % 2001 - 1000) / 1000).astype(np.float32)
    vy = ((row * 104729 % 2001 - 1000) / 1000).astype(np.float32)
    step_length, factor = np.float32(dt), np.float32(keep)
    for _ in range(steps):
        x, y = x + vx * step_length, y + vy * step_length
        vx, vy = vx * factor, vy * factor
    return {"x": x, "y": y, "vx": vx, "vy": vy}


def random_walk(agents: int, steps: int, seed: int, reach: float = 0.25, width: float = 10.0) -> State:
    """Return the columns of jobs/random_walk after some steps; every random number by hand."""
    ids = np.arange(agents, dtype=np.uint64)
    x, y = np.full(agents, width / 2), np.full(agents, width / 2)
    path = np.zeros(agents, np.float32)
    for step in range(steps):
        stream = Stream.of(seed, "wander", ids, step)
        dx, dy = (reach * (2.0 * stream.uniform(draw) - 1.0) for draw in (0, 1))
        x, y = _reflected(x + dx, width), _reflected(y + dy, width)
        path = (path + np.sqrt(dx * dx + dy * dy)).astype(np.float32)
    return {"x": x, "y": y, "path": path}


def _reflected(z: F64, width: float) -> F64:
    return np.where(z < 0, -z, np.where(z > width, 2.0 * width - z, z))


# -- The twin of us_flights ---------------------------------------------------------------------------


@cache
def routes() -> tuple[tuple[str, ...], dict[str, list[tuple[int, int]]]]:
    """Return the airports' codes, sorted, and the routes out of each: (destination's place, flights)."""
    with (DATA / "flights-airport.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))[1:]
    codes = tuple(sorted({line[0] for line in lines} | {line[1] for line in lines}))
    out: dict[str, list[tuple[int, int]]] = {code: [] for code in codes}
    for origin, destination, count in lines:
        out[origin].append((codes.index(destination), int(count)))
    return codes, {code: sorted(legs) for code, legs in out.items()}


@dataclass
class Day:
    """The population after one day: columns, counts (places, 4) after MOVE (None on day 0) and at the end."""

    day: int
    columns: State
    moved: I64 | None
    counts: I64


@dataclass(frozen=True)
class Influenza:
    """The parameters of us_flights, with its defaults."""

    p_travel: float = 0.01
    stay_days: float = 3.0
    beta: float = 0.5
    latent_days: float = 2.0
    infectious_days: float = 3.0
    initial_infectious: int = 100
    seed_airport: str = "JFK"


def us_flights(agents: int, seed: int, params: Influenza = Influenza()) -> Iterator[Day]:
    """Yield day 0, day 1, ... of the influenza job, for ever."""
    codes, out = routes()
    dep = np.array([sum(count for _, count in out[code]) for code in codes], np.int64)
    bounds = np.cumsum(dep)
    row = np.arange(agents, dtype=np.int64)
    ids = row.astype(np.uint64)
    flight = row * int(bounds[-1]) // agents
    home = np.searchsorted(bounds, flight, side="right")
    place = home.copy()
    state = np.zeros(agents, np.int64)
    state[np.flatnonzero(home == codes.index(params.seed_airport))[: params.initial_infectious]] = 2
    destination = _destination_of(codes, out)
    yield Day(0, _columns(home, place, state), None, _counted(place, state))
    step = 0
    while True:
        place = _moved(home, place, dep, destination, params, Stream.of(seed, "move", ids, step))
        moved = _counted(place, state)
        state = _progressed(place, state, moved, params, Stream.of(seed, "progress", ids, step))
        step += 1
        yield Day(step, _columns(home, place, state), moved, _counted(place, state))


def _destination_of(
    codes: tuple[str, ...], out: dict[str, list[tuple[int, int]]]
) -> Callable[[I64, I64], I64]:
    """Return a function (home, flight out of it) -> place, by search in the legs' running counts."""
    legs = {
        place: (np.cumsum([count for _, count in out[code]]), np.array([to for to, _ in out[code]]))
        for place, code in enumerate(codes)
        if out[code]
    }

    def destination(home: I64, flight: I64) -> I64:
        result = np.empty(home.size, np.int64)
        for place in np.unique(home):
            mine = home == place
            ends, to = legs[int(place)]
            result[mine] = to[np.searchsorted(ends, flight[mine], side="right")]
        return result

    return destination


def _moved(
    home: I64,
    place: I64,
    dep: I64,
    destination: Callable[[I64, I64], I64],
    params: Influenza,
    random: Stream,
) -> I64:
    u = random.uniform(0)
    at_home = place == home
    leaves = np.flatnonzero(at_home & (u < params.p_travel) & (dep[home] > 0))
    result = np.where(~at_home & (u < 1.0 / params.stay_days), home, place)
    travellers = Stream(random.key, random.ids[leaves], random.step)
    result[leaves] = destination(home[leaves], travellers.integers(0, dep[home[leaves]]))
    return result


def _progressed(place: I64, state: I64, moved: I64, params: Influenza, random: Stream) -> I64:
    here = moved.sum(axis=1)
    p_inf = np.zeros(len(here))
    some = here > 0
    p_inf[some] = 1.0 - np.exp(-params.beta * moved[some, 2] / here[some])
    chance = np.array([0.0, 1.0 / params.latent_days, 1.0 / params.infectious_days, 0.0])[state]
    chance[state == 0] = p_inf[place[state == 0]]
    return state + (random.uniform(0) < chance)


def _counted(place: I64, state: I64) -> I64:
    return np.bincount(place * 4 + state, minlength=4 * len(routes()[0])).reshape(-1, 4)


def _columns(home: I64, place: I64, state: I64) -> State:
    return {
        "home": home.astype(np.int16),
        "place": place.astype(np.int16),
        "state": state.astype(np.uint8),
    }
