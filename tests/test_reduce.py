"""Accumulators of reductions against exact arithmetic: any values, any order, any cut into parts."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import njit

from rustsim_hpc.kernels import exact_sum, reduce

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
# Exponents of all sizes, subnormals, halves of units in the last place, neighbours of powers of two.
WILD = (
    FLOATS
    | st.floats(-1e-300, 1e-300)
    | st.sampled_from(
        [0.0, -0.0, 5e-324, -5e-324, 2.0**-1022, 1.0, 2.0**53, 2.0**53 + 2, 2.0**-53, 1e308, -1e308]
    )
    | st.builds(math.ldexp, st.sampled_from([1.0, -1.0, 1.5, 1 - 2.0**-53]), st.integers(-1080, 1000))
)
NEAR = st.floats(1e-6, 1e6) | st.floats(-1e6, -1e-6)


@njit(error_model="numpy")
def sum_all(state, values):
    for value in values:
        reduce.add_sum(state, value)


@njit(error_model="numpy")
def fold_all(state, values):
    reduce.fold_sum(state, values)


@njit(error_model="numpy")
def count_all(state, values):
    for value in values:
        reduce.add_count(state, value)


@njit(error_model="numpy")
def min_all(state, values):
    for value in values:
        reduce.add_min(state, value)


@njit(error_model="numpy")
def max_all(state, values):
    for value in values:
        reduce.add_max(state, value)


ADD_ALL = {"sum": sum_all, "count": count_all, "min": min_all, "max": max_all}


@njit(error_model="numpy")
def add_by_key(state, keys, values):
    for i in range(values.size):
        if not reduce.add_keyed_sum(state, keys[i], values[i]):
            return i
    return -1


@njit(error_model="numpy")
def count_by_key(state, keys, values):
    for i in range(values.size):
        if not reduce.add_keyed_count(state, keys[i], values[i]):
            return i
    return -1


@njit(error_model="numpy")
def histogram(state, keys):
    for i in range(keys.size):
        if not reduce.add_histogram(state, keys[i]):
            return i
    return -1


def reduced(kind, values, cuts=(), *, fold=False):
    """Reduce an array in parts, merge their states, and return the value."""
    states = []
    for part in np.split(values, sorted(cuts)):
        state = reduce.new(kind, values.dtype)
        if fold:
            reduce.fold_sum(state, part)
        else:
            ADD_ALL[kind](state, part)
        states.append(state)
    return reduce.finish(kind, values.dtype, reduce.merge(kind, np.stack(states)))


def exact(values):
    """Return the correctly rounded sum of finite floats, infinite beyond the largest one."""
    total = sum(map(Fraction, values), Fraction(0))
    try:
        return total.numerator / total.denominator
    except OverflowError:
        return math.inf if total > 0 else -math.inf


def same(a, b):
    return np.float64(a).tobytes() == np.float64(b).tobytes()


# -- Sums of floats ----------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(values=st.lists(WILD, max_size=40), cuts=st.lists(st.integers(0, 40), max_size=4), data=st.data())
@example(values=[1e308, 1e308, -1e308], cuts=[], data=None)
@example(values=[2.0**53, 1.0, 2.0**-1074], cuts=[], data=None)
@example(values=[2.0**53, 1.0], cuts=[1], data=None)
@example(values=[1.0, -1.0, 5e-324], cuts=[1], data=None)
def test_sum_is_correctly_rounded_in_any_order(values, cuts, data):
    expected = exact(values)
    array = np.array(values, np.float64)
    if math.isfinite(expected):
        with contextlib.suppress(OverflowError):  # math.fsum gives up where a partial sum overflows
            assert same(expected, math.fsum(values) + 0.0)
    for fold in (False, True):
        assert same(reduced("sum", array, cuts, fold=fold), expected)
    if data is not None:
        order = data.draw(st.permutations(range(len(values))))
        assert same(reduced("sum", array[list(order)], cuts), expected)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), spread=st.sampled_from([0, 10, 45, 50, 100, 900]), n=st.integers(1, 5000))
def test_folded_blocks_are_exact(seed, spread, n):
    # Narrow blocks take the short way, wide ones the long way, blocks of one array now this, now that.
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.normal(size=n), rng.integers(-spread, spread + 1, n))
    values[n // 2 :] = rng.normal(size=n - n // 2)
    values = np.concatenate([values, -values[: n // 3] * (1 + 2.0**-50)])
    expected = exact(values)
    state, one_by_one = reduce.new("sum", "f8"), reduce.new("sum", "f8")
    reduce.fold_sum(state, values)
    sum_all(one_by_one, values)
    assert same(reduce.finish("sum", "f8", state), expected)
    assert same(reduce.finish("sum", "f8", one_by_one), expected)
    assert same(reduced("sum", rng.permutation(values), rng.integers(0, n, 5), fold=True), expected)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(NEAR, min_size=1, max_size=50), exponent=st.integers(-1040, 1000))
def test_folded_blocks_are_exact_at_every_magnitude(values, exponent):
    array = np.ldexp(np.array(values), exponent)
    assert same(reduced("sum", array, fold=True), exact(array))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=60))
def test_float32_is_summed_as_float64(values):
    array = np.array(values, np.float32)
    for fold in (False, True):
        total = reduced("sum", array, (len(values) // 2,), fold=fold)
        assert isinstance(total, np.float64)
        assert same(total, exact(values))


def test_cancellation_leaves_what_is_there():
    rng = np.random.default_rng(1)
    values = np.ldexp(rng.normal(size=3000), rng.integers(-500, 500, 3000))
    array = rng.permutation(np.concatenate([values, -values, [2.0**-600]]))
    assert reduced("sum", array, (100, 2000)) == 2.0**-600
    assert reduced("sum", array, (100, 2000), fold=True) == 2.0**-600


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([math.inf, 1.0], math.inf),
        ([-math.inf, 1e308, 1e308], -math.inf),
        ([math.inf, -math.inf], math.nan),
        ([math.nan, 1.0], math.nan),
        ([math.nan, math.inf, -math.inf], math.nan),
        ([1e308] * 20, math.inf),
        ([-1e308] * 20, -math.inf),
        ([1.7976931348623157e308, 2.0**969], 1.7976931348623157e308),
        ([1.7976931348623157e308, 2.0**970], math.inf),
        ([], 0.0),
        ([-0.0, -0.0], 0.0),
    ],
)
def test_sum_of_special_values(values, expected):
    array = np.array(values, np.float64)
    for fold in (False, True):
        for cuts in ((), (0,), (len(values) // 2,)):
            total = reduced("sum", array, cuts, fold=fold)
            assert same(total, expected) or (math.isnan(expected) and math.isnan(total))


def test_settling_changes_no_value_and_makes_room():
    rng = np.random.default_rng(2)
    values = rng.normal(size=1000) * 1e10
    state = reduce.new("sum", "f8")
    sum_all(state, values)
    before = reduce.finish("sum", "f8", state)
    reduce.settle_sum(state)
    assert np.all((state[: exact_sum.LIMBS - 1] >= 0) & (state[: exact_sum.LIMBS - 1] < 2**32))
    assert same(reduce.finish("sum", "f8", state), before)
    # As if 2**31 - 1 values had been added: limbs nearly full, of either sign.
    state[:] = 0
    state[30:33] = (2**31 - 1) * (2**32 - 1)
    total = sum(Fraction((2**31 - 1) * (2**32 - 1)) * Fraction(2) ** (32 * j - 1074) for j in (30, 31, 32))
    reduce.settle_sum(state)
    assert np.all(state[:66] < 2**32)
    assert same(reduce.finish("sum", "f8", state), total.numerator / total.denominator)
    merged = reduce.merge("sum", np.stack([state, -state, state]))
    assert same(reduce.finish("sum", "f8", merged), total.numerator / total.denominator)


def test_more_values_than_a_state_holds_unsettled():
    state = reduce.new("sum", "f8", 2)
    integers = reduce.new("sum", "i8", 2)
    tenth, large = np.full(1, 0.1), np.full(1, -(2**63))
    for _ in range(3):
        # One addition stands for 2**30: states are linear in what is added.
        for target, value in ((state, tenth), (integers, large)):
            once = np.zeros_like(target)
            add_by_key(once, np.ones(1, np.int32), value)
            np.add(target, once * 2**30, out=target)
            reduce.settle_sum(target)
    assert same(reduce.finish("sum", "f8", state)[1], exact([Fraction(0.1) * 3 * 2**30]))
    with pytest.raises(OverflowError, match=str(-(3 * 2**93))):
        reduce.finish("sum", "i8", integers)


# -- Sums of integers --------------------------------------------------------------------------------------


INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@settings(max_examples=200, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(INTEGERS), fold=st.booleans())
def test_integer_sum_is_exact_or_an_error(data, dtype, fold):
    limits = np.iinfo(dtype)
    one = st.integers(limits.min, limits.max) | st.sampled_from([limits.min, limits.max, 0, 1])
    values = data.draw(st.lists(one, max_size=30))
    cuts = data.draw(st.lists(st.integers(0, 30), max_size=3))
    total = sum(values)
    array = np.array(values, dtype)
    if -(2**63) <= total < 2**63:
        result = reduced("sum", array, cuts, fold=fold)
        assert isinstance(result, np.int64)
        assert int(result) == total
    else:
        with pytest.raises(OverflowError, match=rf"sum is {total},"):
            reduced("sum", array, cuts, fold=fold)


@pytest.mark.parametrize("total", [2**63 - 1, 2**63, -(2**63), -(2**63) - 1])
def test_integer_sum_at_the_edge_of_int64(total):
    parts = np.array([total // 2, total - total // 2], np.int64)
    if -(2**63) <= total < 2**63:
        assert reduced("sum", parts, (1,)) == total
    else:
        with pytest.raises(OverflowError, match=str(total)):
            reduced("sum", parts, (1,))


def test_compiled_and_called_from_python_are_the_same():
    for values in (np.array([0.1, -3.5, np.inf]), np.array([3, -4, 2**62])):
        state, by_hand, folded = (reduce.new("sum", values.dtype) for _ in range(3))
        sum_all(state, values)
        fold_all(folded, values)
        for value in values:
            reduce.add_sum(by_hand, value)
        assert np.array_equal(state, by_hand)
        assert reduce.finish("sum", values.dtype, folded) == reduce.finish("sum", values.dtype, state)


def test_bools_are_summed_as_integers():
    values = np.array([True, False, True, True])
    assert reduced("sum", values) == 3
    assert reduced("sum", values, fold=True) == 3


# -- Counts, minima, maxima --------------------------------------------------------------------------------


def test_count_takes_what_is_true():
    assert reduced("count", np.array([True, False, True]), (1,)) == 2
    assert reduced("count", np.array([0, 3, -1, 0])) == 2
    assert reduced("count", np.array([0.0, -0.0, 0.5, np.nan])) == 2
    assert isinstance(reduced("count", np.empty(0, np.bool_)), np.int64)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([*INTEGERS, "bool", "float32", "float64"]))
def test_extremes_are_those_of_numpy(data, dtype):
    if dtype == "bool":
        one = st.booleans()
    elif dtype.startswith("float"):
        one = st.floats(width=int(dtype[5:]), allow_nan=False)
    else:
        limits = np.iinfo(dtype)
        one = st.integers(limits.min, limits.max) | st.sampled_from([limits.min, limits.max])
    array = np.array(data.draw(st.lists(one, min_size=1, max_size=20)), dtype)
    cuts = data.draw(st.lists(st.integers(0, 20), max_size=3))
    for kind in ("min", "max"):
        result = reduced(kind, array, cuts)
        assert result.dtype == array.dtype
        assert result == getattr(array, kind)()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extremes_of_special_floats(dtype):
    values = np.array([1.0, np.nan, -np.inf], dtype)
    for kind in ("min", "max"):
        result = reduced(kind, values, (2,))
        assert result.dtype == values.dtype
        assert np.isnan(result)
        assert not np.isnan(reduced(kind, values[[0, 2]]))
    for zeros in ([0.0, -0.0], [-0.0, 0.0]):
        assert np.signbit(reduced("min", np.array(zeros, dtype), (1,)))
        assert not np.signbit(reduced("max", np.array(zeros, dtype), (1,)))
    tiny = np.array([5e-324, -5e-324, 1e-45], np.float64).astype(dtype)
    assert reduced("min", tiny) == tiny.min()


@pytest.mark.parametrize(
    ("dtype", "lowest", "highest"),
    [
        ("float32", -np.inf, np.inf),
        ("float64", -np.inf, np.inf),
        ("bool", False, True),
        *((name, np.iinfo(name).min, np.iinfo(name).max) for name in INTEGERS),
    ],
)
def test_extremes_of_no_rows_are_the_identity(dtype, lowest, highest):
    for kind, expected in (("min", highest), ("max", lowest)):
        result = reduced(kind, np.empty(0, dtype), (0,))
        assert result.dtype == np.dtype(dtype)
        assert result == expected


# -- By key ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "uint64"])
def test_histogram_is_that_of_numpy(dtype):
    keys = np.random.default_rng(3).integers(0, 100, 5000).astype(dtype)
    states = []
    for part in np.split(keys, [17, 4000]):
        state = reduce.new("histogram", dtype, 100)
        assert histogram(state, part) == -1
        states.append(state)
    counts = reduce.finish("histogram", dtype, reduce.merge("histogram", np.stack(states)))
    assert counts.dtype == np.int64
    assert np.array_equal(counts, np.bincount(keys, minlength=100))


@pytest.mark.parametrize("key", [-1, 8, -(2**63), 2**63 - 1])
def test_a_key_outside_is_reported_and_nothing_is_done(key):
    keys, values = np.array([3, key, 4], np.int64), np.ones(3)
    for kind, add in (
        ("histogram", lambda state: histogram(state, keys)),
        ("count", lambda state: count_by_key(state, keys, values)),
        ("sum", lambda state: add_by_key(state, keys, values)),
    ):
        state = reduce.new(kind, "f8", 8)
        assert add(state) == 1
        assert np.array_equal(reduce.finish(kind, "f8", state), np.eye(8)[3])


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64"])
def test_sums_and_counts_by_key(dtype):
    rng = np.random.default_rng(4)
    keys = rng.integers(0, 13, 3000)
    values = (rng.normal(size=3000) * 10.0 ** rng.integers(-9, 9, 3000)).astype(dtype)
    sums, counts = [], []
    for part in np.array_split(np.arange(3000), 5):
        state = reduce.new("sum", dtype, 14)
        assert add_by_key(state, keys[part], values[part]) == -1
        sums.append(state)
        state = reduce.new("count", dtype, 14)
        assert count_by_key(state, keys[part], values[part]) == -1
        counts.append(state)
    total = reduce.finish("sum", dtype, reduce.merge("sum", np.stack(sums)))
    expected = [values[keys == key].tolist() for key in range(14)]
    if dtype == "int64":
        assert total.dtype == np.int64
        assert total.tolist() == [sum(group) for group in expected]
    else:
        assert total.dtype == np.float64
        assert all(same(a, exact(group)) for a, group in zip(total, expected, strict=True))
    count = reduce.finish("count", dtype, reduce.merge("count", np.stack(counts)))
    assert count.tolist() == [sum(value != 0 for value in group) for group in expected]


def test_overflow_names_the_key():
    state = reduce.new("sum", "i8", 4)
    add_by_key(state, np.array([2, 2, 1]), np.array([2**62, 2**62, 5]))
    with pytest.raises(OverflowError, match=f"sum of key 2 is {2**63}"):
        reduce.finish("sum", "i8", state)


def test_one_key_still_gives_an_array():
    assert reduce.finish("count", "?", reduce.new("count", "?", 1), keyed=True).shape == (1,)
    assert reduce.finish("sum", "f8", reduce.new("sum", "f8", 1)).shape == (1,)
    assert reduce.finish("histogram", "i8", reduce.new("histogram", "i8", 1)).shape == (1,)


@pytest.mark.parametrize(("kind", "bins"), [("histogram", None), ("min", 3), ("median", None)])
def test_reductions_that_there_are_not(kind, bins):
    with pytest.raises(ValueError, match="no reduction"):
        reduce.new(kind, "f8", bins)


def test_finishing_does_not_change_the_state():
    for kind, dtype in (("sum", "f8"), ("sum", "i8"), ("min", "f4"), ("count", "?")):
        state = reduce.new(kind, dtype)
        ADD_ALL[kind](state, np.array([-3, 5]).astype(dtype))
        before = state.copy()
        reduce.finish(kind, dtype, state)
        reduce.merge(kind, np.stack([state, state]))
        assert np.array_equal(state, before)
