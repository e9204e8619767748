"""Mistakes in row functions: one line that names the phase, the line of the user's file and what is wrong."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

import rustsim_hpc as rs
from rustsim_hpc.errors import KernelError


def kernel(*writes):
    return rs.row_kernel(writes=writes, name="turn")


def reduction(kind, **how):
    return rs.reduction(kind, name="turn", **how)


@rs.function
def helper(x):
    return x + nowhere  # noqa: F821


@kernel("x")
def misspelt(x, reach):
    y = x + 1
    return y + raech  # noqa: F821


@kernel("x")
def in_a_helper(x):
    return helper(x)


@kernel("x")
def no_such_function(x):
    return math.sqare(x)


@kernel("x")
def one_value_too_many(x, y):
    return x, y


@kernel("x", "y")
def one_value_too_few(x, y):
    return x


@kernel("x", "y")
def sometimes_one(x, y):
    if x > 3:
        return x
    return x, y


@kernel("x")
def sometimes_nothing(x):
    if x > 3:
        return x
    return None


@kernel("x")
def indexes_a_number(x, reach):
    return x + reach[0]


@kernel("x")
def gives_a_text(x):
    return "x"


@reduction("histogram", bins=3)
def a_float_as_a_key(y):
    return y


@reduction("count")
def a_float_as_a_truth(y):
    return y * 2.0


@reduction("sum", key="y", bins=3)
def by_a_float(x):
    return x


def plain_helper(x):
    return x * 2


@kernel("x")
def calls_what_is_not_decorated(x):
    return plain_helper(x)


@kernel("x")
def reads_the_next_row(x, row):
    return x[row + 1]


@kernel("y")
def draws_without_a_number(y, rng):
    return y + rs.random.normal(rng)


@kernel("y")
def draws_from_rng(y, rng):
    return y + rng.normal(0)


@kernel("y")
def draws_what_is_not_there(y, rng):
    return y + rs.random.gauss(rng, 0)


@kernel("y")
def catches(y):
    try:
        return 1 / y
    except ZeroDivisionError:
        return 0.0


@kernel("y")
def works_on_arrays(y):
    return np.clip(y, 0.0, 5.0)


HINTS = [
    (calls_what_is_not_decorated, "helper", "decorate plain_helper with @rs.function"),
    (reads_the_next_row, r"there is no getitem\(int32, int64\)", "x is a number, this row's value"),
    (draws_without_a_number, r"rng: there is no normal\(rng\)", "rs.random.normal(rng, 0)"),
    (draws_from_rng, "'normal' of type rng", "rs.random.normal(rng, 0)"),
    (draws_what_is_not_there, "gauss", "rs.random has uniform, uniform32, normal, exponential, integers"),
    (catches, "exception_match", "test for it with if"),
    (works_on_arrays, r"there is no clip\(float64, float64, float64\)", "numbers, not arrays"),
]

MISTAKES = [
    (
        misspelt,
        "return y + raech",
        r'return y \+ raech.*: NameError: name \'raech\' is not defined \(did you mean "reach"\?\)',
    ),
    (in_a_helper, "", "name 'nowhere' is not defined"),
    (no_such_function, "return math.sqare(x)", "module 'math' has no attribute 'sqare'"),
    (one_value_too_many, "", "declares writes=x but returns 2 values"),
    (one_value_too_few, "", r"declares writes=x, y but returns one value \(int32\)"),
    (sometimes_one, "return x", "unify"),
    (sometimes_nothing, "", 'returns .* for column "x", not a number'),
    (indexes_a_number, "return x + reach[0]", r"reach \(float64\)"),
    (gives_a_text, "", 'for column "x", not a number'),
    (a_float_as_a_key, "", "returns float64, but a histogram needs an integer key"),
    (a_float_as_a_truth, "", "returns float64, but a count needs true or false"),
    (by_a_float, "", "has a key that is float64, but a sum needs an integer"),
]


@pytest.mark.parametrize(
    ("phase", "source", "text"), MISTAKES, ids=[phase.__name__ for phase, _, _ in MISTAKES]
)
def test_a_mistake_is_told_where_it_is(phase, source, text):
    error = raised_by(phase, text)
    said = str(error)
    assert "\n" not in said
    assert error.phase == "turn"
    line = int(re.search(r"test_kernel_mistakes\.py:(\d+)", said)[1])
    if source:
        lines = Path(__file__).read_text("utf-8").splitlines()
        assert lines[line - 1].strip().startswith(source)
        assert source in said
    else:
        first = phase.fn.__code__.co_firstlineno
        assert first <= line <= first + 8


@pytest.mark.parametrize(("phase", "text", "hint"), HINTS, ids=[phase.__name__ for phase, _, _ in HINTS])
def test_a_mistake_comes_with_what_to_do(phase, text, hint):
    assert hint in (raised_by(phase, text).hint or "")


def raised_by(phase, text):
    """Return the error of a model of one phase."""
    model = rs.Model(
        params={"reach": 1.0},
        columns=[rs.Column("x", "int32"), rs.Column("y", "float64")],
        phases=[phase],
        initialise=lambda rows, params, tables, seed: {
            "x": np.zeros(len(rows), np.int32),
            "y": np.zeros(len(rows)),
        },
    )
    bound = rs.BoundModel(model, {}, seed=1, agents=4)
    with rs.EngineControlPlane(rs.ColumnarRuntime(bound.new_store(0, 4))) as plane:
        plane.add_model(bound)
        with pytest.raises(KernelError, match=text) as caught:
            plane.step_partitions_with_executor(rs.InlinePartitionExecutor())
        assert plane.runtime.step_index == 0
    return caught.value
