"""Operators and functions that must give the CPU's bits on a device."""

import math

import numpy as np
import pytest
from cuda_planes import needs_compiler
from test_cuda_kernels import both, ugly_floats

import rustsim_hpc as rs
from rustsim_hpc.modeling.bound_model import BoundModel

pytestmark = needs_compiler

ROWS = 1200

FLOATS = """
    a + b; a - b; a * b; a / b; -a; abs(a); math.sqrt(abs(a)); math.floor(a) if abs(a) < 1e9 else 0
    math.ceil(b) if abs(b) < 1e9 else 0; math.trunc(a * 0.5) if abs(a) < 1e9 else 0; min(a, b); max(a, b)
    min(a, b, 1.5); max(a, 0.0, b, -1.0); math.copysign(a, b); math.fabs(b); a % b; a // b; a % -b; a ** 2
    a * b + a; a * a - b * b; (a < b) + 2 * (a == b); (a >= b) * 0.5; 1.0 if math.isnan(a) else b
    2.0 if math.isinf(b) else a; np.float32(a); np.sqrt(abs(b)); np.float64(b) * 0.1; np.floor(b)
    np.minimum(a, b); np.maximum(a, b); np.rint(a); int(a) if abs(a) < 9 else 0
"""
INTEGERS = """
    a + b; a - b; a * b; -a; abs(a); a // b; a % b; a & b; a | b; a ^ b; ~a; a << (b & 31); a >> (b & 31)
    min(a, b); max(a, b); min(a, b, 7); (a < b) * 2; a / b; float(a) * 0.5; int(a / 3); a ** 2; a ** 3
    math.sqrt(abs(float(a))); a > 0 and b > 0; divmod(a, 7)[0]; divmod(a, 7)[1]; round(a / 8); np.int32(a)
    np.uint8(b); np.float32(a)
"""
COLUMNS = 16
"""More than some 30 values are not a tuple in Python's byte code, but a list that is made one."""


def operands(dtype):
    kind = np.dtype(dtype)
    if kind.kind == "f":
        a, b = ugly_floats(kind, ROWS), ugly_floats(kind, ROWS)[::-1].copy()
        a[::3] = np.linspace(-50, 50, a[::3].size)
        b[::2] = np.linspace(7, -9, b[::2].size)
        a[20:28] = [0, -0.0, np.inf, -np.inf, np.nan, 0, 5, -0.0]
        b[20:28] = [0, 3, 2, np.inf, 1, np.nan, 0, 0]
        return a, b
    limits, some = np.iinfo(kind), np.random.default_rng(4)
    a, b = some.integers(limits.min, limits.max, (2, ROWS), kind)
    a[::3] = some.integers(-20 if limits.min else 0, 20, a[::3].size)
    b[::4] = some.integers(-5 if limits.min else 0, 5, b[::4].size)
    a[5], b[5] = limits.max, 1
    return a, b


def model_of(expressions, dtype):
    """Return a model whose kernel fills a float64 column with each of its results."""
    targets = tuple(f"r{k}" for k in range(len(expressions)))
    namespace = {"math": math, "np": np}
    exec(f"def kernel(a, b):\n    return ({', '.join(expressions)},)", namespace)  # noqa: S102 (our own)
    values = operands(dtype)

    def start(rows, *_):
        columns = [value[rows.start : rows.stop] for value in values]
        return [*columns, *(np.zeros(rows.stop - rows.start) for _ in targets)]

    names = [("a", dtype), ("b", dtype), *((target, "float64") for target in targets)]
    model = rs.Model(
        columns=[rs.Column(name, kind) for name, kind in names],
        initialise=start,
        phases=[rs.row_kernel(writes=targets, name="all_of_them")(namespace["kernel"])],
    )
    return BoundModel(model, {}, seed=1, agents=ROWS)


def same(one, other):
    """Return whether columns have the same bits, but for the payload of a NaN, which IEEE 754 leaves open."""
    return (one.view(np.int64) == other.view(np.int64)) | (np.isnan(one) & np.isnan(other))


CASES = [
    *(pytest.param(FLOATS, name, id=name) for name in ("float32", "float64")),
    *(pytest.param(INTEGERS, name, id=name) for name in ("int32", "uint64")),
]


@pytest.mark.parametrize(("text", "dtype"), CASES)
def test_the_bits_are_the_cpus(text, dtype):
    compare(text, dtype)


def compare(text, dtype, devices=None):
    """Run expressions on the CPU and on a device; fail where they part."""
    expressions = [part.strip() for part in text.replace("\n", ";").split(";") if part.strip()]
    for at in range(0, len(expressions), COLUMNS):
        few = expressions[at : at + COLUMNS]
        here, there, _ = both(model_of(few, dtype), 1, parts=1, devices=devices)
        mine, theirs = (plane.runtime.device_store() for plane in (here, there))
        a, b = mine.column(0), mine.column(1)
        for k, expression in enumerate(few, start=2):
            wrong = np.flatnonzero(~same(mine.column(k), theirs.column(k)))
            told = [(a[i], b[i], mine.column(k)[i], theirs.column(k)[i]) for i in wrong[:5]]
            assert not told, f"{expression}: {told}"
        there.close()
