"""Random numbers: published vectors, plain against compiled bits, who uses which words, and statistics."""

from __future__ import annotations

import doctest
import math
import platform
import re
from pathlib import Path
from random import Random
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite.binding import get_host_cpu_features
from numba import njit
from numba.core.errors import TypingError

import rustsim_hpc as rs
from rustsim_hpc import random
from rustsim_hpc.kernels import philox

philox.register()

DRAWN = ("uniform", "uniform32", "normal", "exponential")
U64 = st.integers(0, 2**64 - 1) | st.sampled_from([0, 2**32 - 1, 2**32, 2**64 - 1])
RNGS = st.tuples(U64, U64, st.integers(0, 2**32 - 1) | st.sampled_from([0, 2**32 - 1]))


@njit(error_model="numpy")
def draw_all(rng, draw, n):
    return (
        rs.random.uniform(rng, draw),
        rs.random.uniform32(rng, draw),
        rs.random.normal(rng, draw),
        rs.random.exponential(rng, draw),
        rs.random.integers(rng, draw, n),
    )


def typed(rng):
    return tuple(np.uint64(number) for number in rng)


def plain_all(rng, draw, n):
    return (*(getattr(random, name)(rng, draw) for name in DRAWN), random.integers(rng, draw, n))


# -- The generator ---------------------------------------------------------------------------------------


# Known-answer vectors of Philox4x32-10 from the Random123 distribution (D. E. Shaw Research), version 1.14.0,
# file tests/kat_vectors, the three lines "philox4x32 10": counter, key, expected words.
KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_known_answer_vectors(line):
    words = [int(word, 16) for word in line.split()]
    assert random.philox4x32_10(words[:4], words[4:6]) == tuple(words[6:])
    # The compiled block, asked for as a row's draw of the slot that the counter's last word names.
    key, row_id = words[4] | words[5] << 32, words[0] | words[1] << 32
    arguments = [np.uint64(number) for number in (key, row_id, words[2], words[3])]
    got = [compiled_word(*arguments, np.uint64(place)) for place in range(4)]
    assert got == words[6:]
    assert compiled_bits(*arguments, np.uint64(0)) == words[6] << 32 | words[7]
    assert compiled_bits(*arguments, np.uint64(1)) == words[8] << 32 | words[9]


@njit
def compiled_word(key, row_id, step, block, place):
    return philox._word(key, row_id, step, block, place)


@njit
def compiled_bits(key, row_id, step, block, half):
    return philox.half_block(key, row_id, step, block, half)


def test_philox_accepts_arrays_and_refuses_what_is_not_words():
    counter, key = np.zeros(4, np.uint32), np.zeros(2, np.uint32)
    assert random.philox4x32_10(counter, key)[0] == 0x6627E8D5
    for bad in (
        ((0, 0, 0), (0, 0)),
        ((0, 0, 0, 0), (0,)),
        ((0, 0, 0, 2**32), (0, 0)),
        ((0, 0, 0, 0), (-1, 0)),
    ):
        with pytest.raises(ValueError, match="philox4x32_10"):
            random.philox4x32_10(*bad)


def test_worked_example_in_the_docs():
    path = Path(__file__).parents[1] / "docs" / "random.md"
    failed, tried = doctest.testfile(str(path), module_relative=False)
    assert failed == 0
    assert tried >= 9


def test_key_depends_on_every_byte_of_seed_and_name():
    keys = {
        random.key_of(seed, name)
        for seed in (0, 1, 256, 2**32, 2**63, -1, -(2**63) + 1)
        for name in ("", "a", "b", "move", "evom", "é")
    }
    assert len(keys) == 7 * 6
    assert random.key_of(-1, "move") == random.key_of(2**64 - 1, "move")
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="64 bits"):
            random.key_of(seed, "move")


# -- Plain and compiled: the same bits -------------------------------------------------------------------


def test_types_are_the_same():
    rng = (1, 2, 3)
    for plain, compiled in zip(plain_all(rng, 0, 10), draw_all(typed(rng), 0, 10), strict=True):
        assert isinstance(plain, (np.float64, np.float32, np.int64))
        assert np.float64(plain).tobytes() == np.float64(compiled).tobytes()


@settings(max_examples=300, deadline=None)
@given(rng=RNGS, draw=st.integers(0, 2**20 - 1), n=st.integers(1, 2**63 - 1))
def test_compiled_and_plain_bits_agree(rng, draw, n):
    plain, compiled = plain_all(rng, draw, n), draw_all(typed(rng), draw, n)
    assert np.array(plain[:4]).tobytes() == np.array(compiled[:4]).tobytes()
    assert int(plain[4]) == compiled[4]


@pytest.mark.parametrize("name", DRAWN)
def test_last_draw_agrees_and_the_next_is_nan(name):
    place = DRAWN.index(name)
    last = random.DRAWS[name] - 1
    rng = (2**64 - 1, 2**64 - 1, 2**32 - 1)
    assert draw_all(typed(rng), last, 1)[place] == getattr(random, name)(rng, last)
    assert math.isnan(draw_all(typed(rng), last + 1, 1)[place])
    assert math.isnan(draw_all(typed(rng), -1, 1)[place])


def test_many_rows_agree_with_the_plain_face():
    # Enough normals for the tails (|x| > 1.44), of all kinds of counters.
    rng = Random(5)
    for _ in range(2000):
        key, row_id, step = rng.getrandbits(64), rng.getrandbits(64), rng.getrandbits(32)
        draw = rng.randrange(2**20)
        got = draw_all((np.uint64(key), np.uint64(row_id), np.uint64(step)), draw, 1000)
        assert got[2] == random.normal((key, row_id, step), draw)
        assert got[3] == random.exponential((key, row_id, step), draw)


@njit(error_model="numpy")
def compiled_quantile(u):
    return philox._normal_quantile(u)


@njit(error_model="numpy")
def compiled_log(x):
    return philox._log(x)


EDGES = [0.075, 0.925, math.exp(-25.0), 2.0**-53, 1 - 2.0**-53, 0.5, 0.5 + 2.0**-53, 2.0**-0.5, 0.25, 1e-12]


@settings(max_examples=300, deadline=None)
@given(st.floats(2.0**-53, 1 - 2.0**-53) | st.sampled_from(EDGES) | st.floats(2.0**-53, 1e-9))
def test_quantile_and_logarithm_agree_in_all_branches(u):
    assert compiled_quantile(u) == random._normal_quantile(u)
    assert compiled_log(u) == random._log(u)
    assert abs(random._log(u) - math.log(u)) <= math.ulp(math.log(u))
    assert math.isclose(random._normal_quantile(u), NormalDist().inv_cdf(u), rel_tol=2e-15, abs_tol=1e-300)


def test_normal_is_symmetric_and_bounded():
    for k in (0, 1, 12345, 2**51 - 1):
        below, above = ((k + 0.5) * 2.0**-52, 1 - (k + 0.5) * 2.0**-52)
        assert random._normal_quantile(below) == -random._normal_quantile(above)
    assert -8.21 < random._normal_quantile(2.0**-53) < -8.2
    assert -random._log(2.0**-53) < 36.74
    assert -random._log(1 - 2.0**-53) > 0


@settings(max_examples=200, deadline=None)
@given(
    rng=RNGS,
    draw=st.integers(0, 2**20 - 1),
    # One attempt in three is rejected near 2**64 / 3, none where n is a power of two.
    n=st.integers(1, 2**63)
    | st.integers(2**64 // 3 + 1, 2**64 // 3 + 10)
    | st.sampled_from([1, 2, 2**62, 2**63]),
)
def test_integers_agree_and_stay_below_n(rng, draw, n):
    plain = int(random.integers(rng, draw, n))
    assert 0 <= plain < n
    assert draw_all(typed(rng), draw, np.uint64(n))[4] == plain


def test_integers_out_of_range_in_compiled_code():
    rng = typed((1, 2, 3))
    for n in (0, -1, -(2**63), np.uint64(0), np.uint64(2**63 + 1), np.uint64(2**64 - 1)):
        assert draw_all(rng, 0, n)[4] == -1
    assert draw_all(rng, 2**20, 10)[4] == -1
    assert draw_all(rng, -1, 10)[4] == -1


@pytest.mark.parametrize("name", [*DRAWN, "integers"])
def test_plain_faces_refuse_what_is_out_of_range(name):
    more = (10,) if name == "integers" else ()
    face = getattr(random, name)
    for draw in (-1, random.DRAWS[name], 2**64):
        with pytest.raises(ValueError, match=rf"{name}: draw"):
            face((0, 0, 0), draw, *more)
    with pytest.raises(TypeError):
        face((0, 0, 0), 0.5, *more)
    with pytest.raises(ValueError, match="step"):
        face((0, 0, 2**32), 0, *more)
    with pytest.raises(ValueError, match="id"):
        face((0, 2**64, 0), 0, *more)
    with pytest.raises(ValueError, match="key, id, step"):
        face((0, 0), 0, *more)


@pytest.mark.parametrize("n", [0, -5, 2**63 + 1])
def test_integers_refuses_counts(n):
    with pytest.raises(ValueError, match="n ="):
        random.integers((0, 0, 0), 0, n)


def test_mistakes_in_kernels_do_not_compile():
    rng = typed((1, 2, 3))
    with pytest.raises(ValueError, match=r"rs\.random\.uniform: draw 536870912"):
        njit(lambda rng: rs.random.uniform(rng, 2**29))(rng)
    with pytest.raises(ValueError, match=r"rs\.random\.integers: n = 0"):
        njit(lambda rng: rs.random.integers(rng, 0, 0))(rng)
    with pytest.raises(TypingError, match="must be the kernel's rng, not float64"):
        njit(lambda rng: rs.random.normal(1.5, 0))(rng)
    with pytest.raises(TypingError, match="draw must be an integer, not float64"):
        njit(lambda rng: rs.random.normal(rng, 0.5))(rng)
    with pytest.raises(TypingError, match="n must be an integer, not float64"):
        njit(lambda rng: rs.random.integers(rng, 0, 2.5))(rng)


# -- Whole columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 2**32 - 3, 2**64 - 8])
def test_row_random_is_the_plain_face_of_each_row(start):
    rows = 8
    ids = np.arange(rows, dtype=np.uint64) + np.uint64(start)
    key, step = 0xFEDCBA9876543210, 2**32 - 1
    for random_rows in (random.RowRandom(key, start, rows, step), random.RowRandom(key, ids, rows, step)):
        for name, dtype in zip(DRAWN, ("f8", "f4", "f8", "f8"), strict=True):
            for draw in (0, 1, 7):
                column = getattr(random_rows, name)(draw)
                assert column.dtype == np.dtype(dtype)
                expected = [getattr(random, name)((key, int(row_id), step), draw) for row_id in ids]
                assert column.tolist() == [float(value) for value in expected]
        column = random_rows.integers(3, 10**18)
        assert column.tolist() == [random.integers((key, int(row_id), step), 3, 10**18) for row_id in ids]


def test_row_random_takes_scattered_ids_and_no_rows():
    ids = np.array([5, 2**64 - 1, 5, 0], np.uint64)[::-1]
    column = random.RowRandom(9, ids, 4, 1).uniform(0)
    assert column[0] == random.uniform((9, 0, 1), 0)
    assert column[1] == column[3] == random.uniform((9, 5, 1), 0)
    assert random.RowRandom(9, 0, 0, 1).normal(0).size == 0
    assert random.RowRandom(9, ids[:0], 0, 1).normal(0).size == 0


def test_row_random_refuses_what_does_not_fit():
    for key, ids, rows, step in (
        (2**64, 0, 1, 0),
        (0, 2**64 - 1, 2, 0),
        (0, 0, -1, 0),
        (0, 0, 1, 2**32),
        (0, np.zeros(2, np.int64), 2, 0),
        (0, np.zeros(2, np.uint64), 3, 0),
    ):
        with pytest.raises(ValueError, match=r"ids|rng"):
            random.RowRandom(key, ids, rows, step)
    with pytest.raises(ValueError, match="draw"):
        random.RowRandom(0, 0, 1, 0).uniform(2**29)
    with pytest.raises(ValueError, match="n ="):
        random.RowRandom(0, 0, 1, 0).integers(0, 0)


# -- Who uses which words --------------------------------------------------------------------------------


def words_used(monkeypatch, call):
    """Return the (block, word) pairs that a call's result depends on, by flipping each word of each block."""
    asked = []

    def run(flip=None):
        def fake(counter, key):
            block = counter[3]
            if block not in asked:
                asked.append(block)
            return tuple(
                (0x80000001 if place % 2 else 0x80000000) ^ (0xFFFFFFFF if (block, place) == flip else 0)
                for place in range(4)
            )

        monkeypatch.setattr(random, "philox4x32_10", fake)
        return call()

    base = run()
    return {(block, place) for block in list(asked) for place in range(4) if run((block, place)) != base}


def test_no_two_draws_share_a_word(monkeypatch):
    rng = (1, 2, 3)
    seen = {}
    for name in (*DRAWN, "integers"):
        more = (2**62,) if name == "integers" else ()
        for draw in (*range(12), random.DRAWS[name] - 2, random.DRAWS[name] - 1):
            used = words_used(
                monkeypatch, lambda name=name, draw=draw, more=more: getattr(random, name)(rng, draw, *more)
            )
            assert len(used) == (1 if name == "uniform32" else 2)
            for triple in used:
                assert triple not in seen, (name, draw, seen[triple])
                assert triple[0] < 2**32
                seen[triple] = (name, draw)
    assert {block >> 28 for block, _ in seen} == {0, 1, 2, 3, 4}


def test_all_attempts_of_integers_stay_in_their_draw(monkeypatch):
    # Words of 0 make every product's lower half 0, which is rejected: all attempts are made.
    asked = []

    def fake(counter, key):
        asked.append(counter[3])
        return (0, 0, 0, 0)

    monkeypatch.setattr(random, "philox4x32_10", fake)
    last = random.DRAWS["integers"] - 1
    blocks = []
    for draw in (0, 1, 2, last - 1, last):
        asked.clear()
        assert random.integers((1, 2, 3), draw, 3) == 0
        assert len(asked) == 512
        assert sorted(set(asked)) == [4 << 28 | draw << 8 | place for place in range(256)]
        blocks += set(asked)
    assert len(blocks) == len(set(blocks))
    assert max(blocks) == (5 << 28) - 1


def test_rejected_attempts_go_on_with_the_next_words():
    # n just above 2**64 / 3: an attempt in three is rejected. Follow the rule by hand for many rows.
    n = 2**64 // 3 + 2
    again = 0
    for row_id in range(300):
        words = [
            word
            for block in range(20)
            for word in random.philox4x32_10((row_id, 0, 0, 4 << 28 | 5 << 8 | block), (77, 0))
        ]
        numbers = [words[2 * i] << 32 | words[2 * i + 1] for i in range(40)]
        first = next(i for i, number in enumerate(numbers) if number * n % 2**64 >= 2**64 % n)
        again += first > 0
        assert random.integers((77, row_id, 0), 5, n) == numbers[first] * n >> 64
    assert 60 < again < 140


# -- Statistics: fixed keys, so that a test either always or never fails ---------------------------------

ROWS = 200_000


def sample(name, draw=0, *, rows=ROWS, start=0, step=0, stream="test"):
    return getattr(random.RowRandom(random.key_of(2024, stream), start, rows, step), name)(draw)


def kolmogorov_smirnov(values, cdf):
    """Return sqrt(n) times the largest distance of the empirical from the true distribution function."""
    values = np.sort(values)
    n = len(values)
    expected = cdf(values)
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * max(np.max(steps[1:] - expected), np.max(expected - steps[:-1]))


# The statistic exceeds 1.95 with probability 0.001.
KS_LIMIT = 1.95


def chi_square_score(counts, expected):
    """Return how many standard deviations (Wilson-Hilferty) the chi-square statistic lies above its mean."""
    freedom = len(counts) - 1
    statistic = float(np.sum((counts - expected) ** 2 / expected))
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def test_uniform_fits():
    for name in ("uniform", "uniform32"):
        values = sample(name).astype(np.float64)
        assert values.min() >= 0
        assert values.max() < 1
        assert abs(values.mean() - 0.5) < 4 * math.sqrt(1 / 12 / ROWS)
        assert abs(values.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / ROWS)
        assert kolmogorov_smirnov(values, lambda x: x) < KS_LIMIT
        counts = np.bincount((values * 1024).astype(np.int64), minlength=1024)
        assert abs(chi_square_score(counts, ROWS / 1024)) < 4


def test_every_bit_of_uniform_is_fair():
    for name, bits in (("uniform", 53), ("uniform32", 24)):
        integers = (sample(name).astype(np.float64) * 2.0**bits).astype(np.uint64)
        for bit in range(bits):
            ones = int(np.sum(integers >> np.uint64(bit) & np.uint64(1)))
            assert abs(ones - ROWS / 2) < 4.5 * math.sqrt(ROWS) / 2, (name, bit)


def test_normal_fits():
    values = sample("normal")
    erf = np.array([math.erf(x / math.sqrt(2)) for x in np.sort(values)])
    assert kolmogorov_smirnov(values, lambda _: (1 + erf) / 2) < KS_LIMIT
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(np.mean(values**power) - mean) < 4 * math.sqrt(variance / ROWS), power
    tail = np.sum(np.abs(values) > 3) / ROWS
    assert abs(tail - math.erfc(3 / math.sqrt(2))) < 4 * math.sqrt(0.0027 / ROWS)


def test_exponential_fits():
    values = sample("exponential")
    assert values.min() > 0
    assert kolmogorov_smirnov(values, lambda x: -np.expm1(-x)) < KS_LIMIT
    for power, mean, variance in ((1, 1, 1), (2, 2, 20), (3, 6, 684)):
        assert abs(np.mean(values**power) - mean) < 4 * math.sqrt(variance / ROWS), power


@pytest.mark.parametrize("n", [2, 3, 10, 1000])
def test_integers_fit(n):
    values = random.RowRandom(random.key_of(1, "n"), 0, ROWS, 0).integers(0, n)
    counts = np.bincount(values, minlength=n)
    assert len(counts) == n
    assert abs(chi_square_score(counts, ROWS / n)) < 4


def test_integers_have_no_bias_for_large_n():
    # 2**64 = 8/3 n: without rejection the residues mod 3 would have shares 3/8, 3/8 and 2/8.
    n = 3 * 2**61
    values = random.RowRandom(random.key_of(1, "n"), 0, ROWS, 0).integers(0, n)
    assert values.max() < n
    assert abs(chi_square_score(np.bincount(values % 3, minlength=3), ROWS / 3)) < 4
    assert abs(chi_square_score(np.bincount(values // (n // 64), minlength=64), ROWS / 64)) < 4


def correlation(a, b):
    return float(np.corrcoef(a, b)[0, 1])


@pytest.mark.parametrize("name", DRAWN)
def test_neighbours_are_uncorrelated(name):
    base = sample(name)
    others = {
        "next row": sample(name, start=1),
        "row 2**32 on": sample(name, start=2**32),
        "next step": sample(name, step=1),
        "next draw": sample(name, 1),
        "draw of the next block": sample(name, 4),
        "other stream": sample(name, stream="tesu"),
        "other seed": getattr(random.RowRandom(random.key_of(2025, "test"), 0, ROWS, 0), name)(0),
    }
    for what, other in others.items():
        assert abs(correlation(base, other)) < 4 / math.sqrt(ROWS), what
        assert abs(correlation(base**2, other**2)) < 4 / math.sqrt(ROWS), what
        assert not np.any(base[:1000] == other[:1000]) or name == "uniform32", what


def test_functions_are_uncorrelated():
    columns = [sample(name) for name in DRAWN]
    for i, a in enumerate(columns):
        for b in columns[:i]:
            assert abs(correlation(a, b)) < 4 / math.sqrt(ROWS)


def test_pairs_fill_the_square():
    # Draws 0 and 1 (one block), and rows i and i + 1, in a grid of 32 x 32.
    for a, b in ((sample("uniform"), sample("uniform", 1)), (sample("uniform"), sample("uniform", start=1))):
        cells = (a * 32).astype(np.int64) * 32 + (b * 32).astype(np.int64)
        assert abs(chi_square_score(np.bincount(cells, minlength=1024), ROWS / 1024)) < 4


# -- Speed, as seen in the machine code ------------------------------------------------------------------


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not get_host_cpu_features().get("avx2"),
    reason="looks at AVX2 machine code",
)
@pytest.mark.parametrize(
    "call", ["uniform(rng, 0) + rs.random.uniform(rng, 1)", "uniform(rng, 0)", "normal(rng, 0)"]
)
def test_row_loops_are_vectorised_and_share_blocks(call):
    names = {"np": np, "rs": rs}
    exec(  # noqa: S102
        "def loop(key, start, step, out):\n"
        "    for i in range(out.size):\n"
        "        rng = (key, start + np.uint64(i), step)\n"
        f"        out[i] = rs.random.{call}\n",
        names,
    )
    loop = njit(error_model="numpy")(names["loop"])
    number = np.uint64(5)
    loop(number, number, number, np.zeros(100))
    assembly = loop.inspect_asm(loop.signatures[0])
    products = len(re.findall(r"vpmul(?:u?dq|lq)\s.*[yz]mm", assembly))
    # A block takes 19 or 20 products (one does not depend on the row); two blocks would be more than 36.
    assert 16 <= products <= 30
    assert "vmulpd" in assembly
