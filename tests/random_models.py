"""Random models, and what they must come to: their own functions called row by row, as plain Python.

The source of a model is drawn from a seed: columns of all dtypes with values of every sort, row kernels
with early returns and helpers, reductions of every kind, derived values, random draws. All arithmetic is of
float64 and int64, which NumPy's scalars and compiled code do in the same way.
"""

from __future__ import annotations

import math
import random
import re
from types import SimpleNamespace
from typing import Any

import numpy as np

DTYPES = (
    "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool",
)  # fmt: skip
KINDS = ("sum", "count", "min", "max", "histogram")
SEED = 11
BINS = 5
HEAD = '''"""A model of tests/random_models.py."""
import math

import numpy as np

import rustsim_hpc as rs

ODD = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e300, 5e-324, -2.5]


def column(row, number, dtype):
    mixed = (row + number) * 2654435761 % 2**32
    if np.dtype(dtype).kind != "f":
        return (mixed // 7 - (2**28 if number % 2 else 0)).astype(dtype)
    with np.errstate(over="ignore", under="ignore"):
        odd = np.array(ODD)[mixed % len(ODD)].astype(dtype)
    return np.where(mixed % 7 == 3, odd, (mixed / 2**20 - 2048).astype(dtype))


@rs.function
def within(value, limit):
    return value if abs(value) < limit else 0.5 * limit
'''
TAIL = """

def initialise(rows, params, tables, seed):
    row = np.arange(rows.start, rows.stop)
    return [column(row, k, dtype) for k, (_, dtype) in enumerate({columns})]


def model():
    return rs.Model(
        columns=[rs.Column(name, dtype) for name, dtype in {columns}],
        params={{"dt": rs.Param("float64", 0.1), "shift": rs.Param("int64", 3)}},
        tables=lambda params: {{"weights": np.linspace(-1.0, 2.0, 7)}},
        initialise=initialise,
        phases=[{phases}],
    )
"""


def kind_of(dtype: str) -> str:
    return {"f": "float64", "b": "bool_"}.get(np.dtype(dtype).kind, "int64")


class Source:
    """Draws the source of a model; ``reads``: expressions by the type of their values."""

    def __init__(self, seed: int) -> None:
        self.r = r = random.Random(seed)
        self.columns = [(f"c{k}", r.choice(DTYPES)) for k in range(r.randint(2, 6))]
        self.names = [
            "dt",
            "shift",
            "weights",
            "row",
            "step",
            "id",
            "rng",
            *(name for name, _ in self.columns),
        ]
        self.reads = {"float64": ["dt", "weights[row % 7]"], "int64": ["row", "step", "shift"], "bool_": []}
        self.reads["int64"].append("np.int64(id % np.uint64(1000))")
        for name, dtype in self.columns:
            self.reads[kind_of(dtype)].append(f"np.{kind_of(dtype)}({name})")
        self.parts: list[str] = []
        self.phases: list[str] = []
        for k in range(r.randint(3, 8)):
            r.choice([self.kernel, self.kernel, self.reduction, self.derive])(f"p{k}")
        self.kernel("last")

    @property
    def text(self) -> str:
        columns, phases = repr(self.columns), ", ".join(self.phases)
        return HEAD + "".join(self.parts) + TAIL.format(columns=columns, phases=phases)

    def leaf(self, kind: str) -> str:
        draw = self.r.randint(0, 3)
        more = {
            "float64": [
                "0.1",
                "-2.5",
                "1e10",
                f"rs.random.uniform(rng, {draw})",
                f"rs.random.normal(rng, {draw})",
            ],
            "int64": ["3", "-7", "1099511627776", f"rs.random.integers(rng, {draw}, 10)"],
            "bool_": [f"(rs.random.uniform(rng, {draw}) < 0.5)"],
        }
        return self.r.choice(self.reads[kind] + more[kind])

    def value(self, kind: str, depth: int = 3) -> str:
        """Return an expression of a type, parenthesised."""
        if depth == 0 or self.r.random() < 0.1:
            return f"np.{kind}({self.leaf(kind)})"
        a, b = self.value(kind, depth - 1), self.value(kind, depth - 1)
        x, y = self.value("float64", depth - 1), self.value("float64", depth - 1)
        n = self.value("int64", depth - 1)
        forms = {
            "float64": [f"({a} + {b})", f"({a} - {b})", f"({a} * {b})", f"({a} / {b})",
                        f"({a} if {x} < {y} else {b})",
                        f"within({a}, 50.0)", f"math.sqrt(abs({a}))", f"np.float64({n})"],
            "int64": [f"({a} + {b})", f"({a} - {b})", f"({a} * {b})", f"({a} & {b})", f"({a} ^ {b})",
                      f"({a} % np.int64(9))", f"({a} if {x} < {y} else {b})"],
            "bool_": [f"({x} < {y})", f"({a} and {b})", f"({a} or {b})", f"(not {a})",
                      f"({n} > np.int64(4))"],
        }  # fmt: skip
        return self.r.choice(forms[kind])

    def add(self, decorator: str, name: str, body: str, text: str) -> None:
        """Add a phase, a function of the names that stand in ``text``."""
        words = set(re.findall(r"\w+", text))
        takes = ", ".join(known for known in self.names if known in words)
        self.parts.append(f"\n\n@rs.{decorator}\ndef {name}({takes}):\n{body}")
        self.phases.append(name)

    def kernel(self, name: str) -> None:
        targets = self.r.sample(self.columns, self.r.randint(1, 2))

        def results() -> str:
            return ", ".join(f"np.{kind_of(dtype)}({self.value(kind_of(dtype))})" for _, dtype in targets)

        body = f"    return {results()}\n"
        if self.r.random() < 0.3:
            body = f"    if {self.value('bool_')}:\n        return {results()}\n{body}"
        self.add(f"row_kernel(writes={tuple(name for name, _ in targets)!r})", name, body, body)

    def reduction(self, name: str) -> None:
        kind = self.r.choice(KINDS)
        value = {"count": "bool_", "histogram": "int64"}.get(kind) or self.r.choice(["float64", "int64"])
        text = self.value(value)
        if value == "int64":  # a key, or small enough for sums
            text = f"({text} % np.int64({BINS}))"
        more = f", bins={BINS}" if kind == "histogram" else ""
        self.add(f'reduction("{kind}"{more})', name, f"    return np.{value}({text})\n", text)
        self.names.append(name)
        made = f"{name}[row % {BINS}]" if kind == "histogram" else name
        self.reads["float64" if value == "float64" else "int64"].append(made)

    def derive(self, name: str) -> None:
        terms = [n for n in self.names if re.fullmatch(r"p\d+", n)] or ["dt"]
        text = " + ".join(f"float(np.sum({term}))" for term in terms)
        body = f"    total = {text}\n    total = total if abs(total) < 1e9 else 1.0\n"
        self.add("derive", name, f"{body}    return np.arange(4.0) * total + step\n", f"{text} step")
        self.names.append(name)
        self.reads["float64"].append(f"{name}[row % 4]")


class Twin:
    """A model's state, stepped by calling its functions for one row after the other."""

    def __init__(self, source: Source, model: Any, key_of: Any, ids: np.ndarray) -> None:
        self.model, self.key_of, self.ids = model, key_of, ids
        made = model.initialise(SimpleNamespace(start=0, stop=len(ids)), None, None, SEED)
        self.columns = dict(zip((name for name, _ in source.columns), made, strict=True))
        self.step = 0
        self.values: dict[str, Any] = {}

    def advance(self) -> None:
        self.values = {"dt": np.float64(0.1), "shift": np.int64(3), "weights": np.linspace(-1.0, 2.0, 7)}
        self.values["step"] = np.int64(self.step)
        with np.errstate(all="ignore"):
            for phase in self.model.phases:
                if hasattr(phase, "names"):
                    self.values[phase.name] = phase.fn(*(self.values[a] for a in phase.arguments))
                    continue
                found = [self._call(phase, row) for row in range(len(self.ids))]
                if hasattr(phase, "writes"):
                    self._store(phase.writes, found)
                else:
                    self.values[phase.name] = reduced(phase.kind, found)
        self.step += 1

    def _call(self, phase: Any, row: int) -> Any:
        rng = (self.key_of(SEED, phase.stream), int(self.ids[row]), self.step)
        bound = {**self.values, "row": np.int64(row), "id": self.ids[row], "rng": rng}
        bound |= {name: column[row] for name, column in self.columns.items()}
        return phase.fn(*(bound[name] for name in phase.arguments))

    def _store(self, names: tuple[str, ...], found: list[Any]) -> None:
        rows = [value if isinstance(value, tuple) else (value,) for value in found]
        for k, name in enumerate(names):
            old = self.columns[name]
            values = np.array([row[k] for row in rows], kind_of(old.dtype.name).rstrip("_"))
            self.columns[name] = values.astype(old.dtype)


def reduced(kind: str, values: list[Any]) -> Any:
    """Return a reduction's result, exact and rounded once."""
    if kind == "histogram":
        return np.bincount(np.array(values, np.int64), minlength=BINS)
    if kind == "count":
        return np.int64(sum(bool(value) for value in values))
    if kind != "sum":
        nan = any(value != value for value in values)  # noqa: PLR0124
        best = (min if kind == "min" else max)(values, key=lambda value: (value, math.copysign(1, value)))
        return type(best)(np.nan) if nan else best
    if not isinstance(values[0], float):
        return np.int64(sum(map(int, values)))
    special = [value for value in values if not math.isfinite(value)]
    if special:
        return np.float64(sum(special))
    exact = sum(int(a) * (2**1074 // b) for a, b in (float(value).as_integer_ratio() for value in values))
    try:
        return np.float64(exact / 2**1074)
    except OverflowError:
        return np.float64(math.copysign(math.inf, exact))
