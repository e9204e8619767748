"""A model in which one bit can be flipped at will: in one step, phase, column and row. For drills and tests.

Every kind of phase is there, and columns of several dtypes. A flipped bit is seen at the end of its step; `h`
keeps it from then on, so that a log that has not every step sees it, too. One of `b` moves every row of `f`.
"""

from typing import Any

import numpy as np

import rustsim_hpc as rs

# (phase, its number for flip_phase, column, bits of a value)
PLACES = (
    ("mix", 0, "a", 32),
    ("wander", 1, "b", 32),
    ("pull", 2, "f", 64),
    ("turn", 3, "c", 64),
    ("turn", 4, "e", 8),
    ("settle", 5, "d", 16),
    ("settle", 6, "g", 1),
)


@rs.row_kernel(writes="a")
def mix(a: Any, step: Any, row: Any, flip_step: Any, flip_row: Any, flip_phase: Any, flip_bit: Any) -> Any:
    mixed = np.uint32(np.uint64(a) * np.uint64(1664525) + np.uint64(1013904223) & np.uint64(0xFFFFFFFF))
    if step == flip_step and row == flip_row and flip_phase == 0:
        return mixed ^ np.uint32(1 << flip_bit)
    return mixed


@rs.row_kernel(writes="b")
def wander(
    b: Any, rng: Any, step: Any, row: Any, flip_step: Any, flip_row: Any, flip_phase: Any, flip_bit: Any
) -> Any:
    moved = np.float32(b + 0.01 * rs.random.normal(rng, 0))
    if step == flip_step and row == flip_row and flip_phase == 1:
        return np.uint32(moved.view(np.uint32) ^ np.uint32(1 << flip_bit)).view(np.float32)
    return moved


@rs.reduction("sum")
def total(b: Any) -> Any:
    return b


@rs.derive
def mean(total: Any, size: Any) -> Any:
    return total / size


@rs.row_kernel(writes="f")
def pull(
    f: Any, mean: Any, step: Any, row: Any, flip_step: Any, flip_row: Any, flip_phase: Any, flip_bit: Any
) -> Any:
    pulled = 0.5 * f + mean + row
    if step == flip_step and row == flip_row and flip_phase == 2:
        flipped = np.float64(pulled).view(np.uint64) ^ (np.uint64(1) << np.uint64(flip_bit))
        return np.uint64(flipped).view(np.float64)
    return pulled


@rs.column_phase(writes=("c", "e"), row_local=True)
def turn(context: Any, columns: Any, rows: int) -> None:
    params = context.params
    columns["c"] = context.random.uniform(0)
    columns["e"] = columns["e"] + np.uint8(1)
    here = params.flip_row - context.row_start
    if context.step_index == params.flip_step and 0 <= here < rows:
        if params.flip_phase == 3:
            columns["c"].view(np.uint64)[here] ^= np.uint64(1) << np.uint64(params.flip_bit)
        if params.flip_phase == 4:
            columns["e"][here] ^= np.uint8(1 << int(params.flip_bit))


@rs.row_kernel(writes=("d", "g"))
def settle(
    a: Any, d: Any, g: Any, step: Any, row: Any, flip_step: Any, flip_row: Any, flip_phase: Any, flip_bit: Any
) -> Any:
    new_d, new_g = np.int16(d + (a & np.uint32(3))), not g
    if step == flip_step and row == flip_row:
        if flip_phase == 5:
            new_d = np.int16(new_d ^ np.int16(1 << flip_bit))
        if flip_phase == 6:
            new_g = not new_g
    return new_d, new_g


@rs.row_kernel(writes="h")
def trail(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
    bits = np.float64(c).view(np.uint64) ^ np.uint64(np.float32(b).view(np.uint32)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    bits ^= np.float64(f).view(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
    small = np.uint64(a) << np.uint64(32) | np.uint64(np.uint16(d)) << np.uint64(16)
    bits ^= (small | np.uint64(e) << np.uint64(8) | np.uint64(g)) * np.uint64(0x94D049BB133111EB)
    return (np.uint64(h) ^ bits) * np.uint64(0x2545F4914F6CDD1D)


def initialise(rows: Any, params: Any, tables: Any, seed: int) -> dict[str, Any]:
    numbers = np.arange(rows.start, rows.stop)
    return {
        "a": (numbers * 2654435761 + seed).astype(np.uint32),
        "b": np.sin(numbers).astype(np.float32),
        "c": np.zeros(len(numbers)),
        "d": (numbers % 100).astype(np.int16),
        "e": (numbers % 7).astype(np.uint8),
        "f": numbers.astype(np.float64),
        "g": numbers % 2 == 0,
        "h": np.zeros(len(numbers), np.uint64),
    }


def model() -> Any:
    return rs.Model(
        params={
            "size": rs.Param("float64", default=1000.0, doc="what the sum of b is divided by"),
            "flip_step": rs.Param("int64", default=-1, doc="step that flips a bit, -1 for none"),
            "flip_phase": rs.Param("int64", default=0, doc="number of the place, see PLACES"),
            "flip_row": rs.Param("int64", default=0, doc="row"),
            "flip_bit": rs.Param("int64", default=0, doc="bit of the value, from the lowest"),
        },
        columns=[
            rs.Column("a", "uint32", doc="a mixed integer"),
            rs.Column("b", "float32", doc="a random walk"),
            rs.Column("c", "float64", doc="a random number"),
            rs.Column("d", "int16", doc="a sum of a's low bits"),
            rs.Column("e", "uint8", doc="a counter"),
            rs.Column("f", "float64", doc="drawn to the mean of b"),
            rs.Column("g", "bool", doc="on and off"),
            rs.Column("h", "uint64", doc="a hash of all that was"),
        ],
        initialise=initialise,
        phases=[mix, wander, total, mean, pull, turn, settle, trail],
    )
