"""Row functions and derived values that draw from a generator of the whole process are refused."""

import random
from random import gauss

import numba
import numpy as np
import pytest

import rustsim_hpc as rs
from rustsim_hpc.errors import ModelError
from rustsim_hpc.modeling.global_random import refuse_global_random


@rs.function
def noisy(x):
    return x + np.random.rand()  # noqa: NPY002


@numba.njit
def compiled(x):
    return x + random.random()


def kernel(fn):
    return rs.row_kernel(writes="x", name="jump")(fn)


def by_closure(draw):
    return lambda x: x + draw()


REFUSED = {
    "a module": kernel(lambda x: x + np.random.normal()),  # noqa: NPY002
    "a name of its own": kernel(lambda x: x + gauss(0.0, 1.0)),
    "a helper": kernel(lambda x: noisy(x)),  # noqa: PLW0108
    "a helper that Numba compiled": kernel(lambda x: compiled(x)),  # noqa: PLW0108
    "a closure": kernel(by_closure(np.random.random)),
    "an inner function": rs.derive(name="jump")(lambda beta: max(range(3), key=lambda k: random.random())),
    "a reduction": rs.reduction("sum", name="jump")(lambda x: x * np.random.rand()),  # noqa: NPY002
    "a key": rs.reduction("count", key=lambda x: np.random.randint(3), bins=3, name="jump")(  # noqa: NPY002
        lambda x: x > 0
    ),
    "a derived value": rs.derive(name="jump")(lambda beta: beta * np.random.rand()),  # noqa: NPY002
}


@pytest.mark.parametrize("phase", REFUSED.values(), ids=REFUSED)
def test_a_generator_of_the_process_is_refused(phase):
    with pytest.raises(
        ModelError, match=r"^jump draws from (numpy\.)?random\.\w+ \(.*test_global_random\.py:\d+\)"
    ) as caught:
        refuse_global_random(phase)
    assert caught.value.phase == "jump"
    assert "rng" in (caught.value.hint or "")


ALLOWED = {
    "the engine's own": kernel(lambda x, rng: x + rs.random.normal(rng, 0)),
    "a generator that is made anew": rs.derive(name="jump")(
        lambda step: np.random.default_rng(step).random()
    ),
    "a column phase": rs.column_phase(name="jump")(lambda context, columns, rows: np.random.rand()),  # noqa: NPY002
    "a name that is a column": kernel(lambda random: random + 1.0),
}


@pytest.mark.parametrize("phase", ALLOWED.values(), ids=ALLOWED)
def test_others_are_not(phase):
    refuse_global_random(phase)


def test_a_model_is_refused_before_it_has_a_state():
    model = rs.Model(
        columns=[rs.Column("x", "float64")],
        phases=[REFUSED["a helper"]],
        initialise=lambda rows, params, tables, seed: {"x": np.zeros(len(rows))},
    )
    with pytest.raises(ModelError, match=r"^jump draws from numpy\.random\.rand"):
        rs.BoundModel(model, {}, seed=1, agents=3)
