"""The fingerprint's two schemes: exact values, independence of the cut, and that differences show."""

import itertools
import json
import pickle
import platform
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference_hash as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from rustsim_hpc.errors import InvalidConfig, SchemeMismatch
from rustsim_hpc.proof.fingerprint import (
    BLOCK,
    SCHEMES,
    ReplayFingerprint,
    StateView,
    block_multiplier,
    digest_column,
    digest_default_ids,
    digest_keys,
    digest_sums,
    digest_value,
    fingerprint_checkpoint,
    fingerprint_view,
    fnv1a_bytes,
    fnv1a_default_ids,
    fnv1a_header,
    fnv1a_ids,
    fnv1a_names,
)

ROOT = Path(__file__).parent.parent
DTYPES = (
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)
GOLDEN = json.loads((ROOT / "tests/golden/golden.json").read_text(encoding="utf-8"))
U64 = (1 << 64) - 1


def random_column(rng, dtype, rows):
    """Arbitrary bits: floats with NaN payloads, subnormals and infinities."""
    if dtype == "bool":
        return rng.integers(0, 2, rows).astype(bool)
    return np.frombuffer(rng.bytes(rows * np.dtype(dtype).itemsize), dtype).copy()


def bits(column):
    return column.view(f"u{column.itemsize}")


def view(columns, ids=None, step=3, names=None):
    names = names or tuple(f"c{i}" for i in range(len(columns)))
    return StateView(step, len(columns[0]), names, ids, tuple(columns))


def values(columns, ids=None):
    """Both schemes' values of a state, and the digest's value per column."""
    state = view(columns, ids)
    return tuple(fingerprint_view(state, scheme).value for scheme in SCHEMES), digest_sums(state)


def assert_all_differ(columns, changed, only):
    """The change shows in both schemes, and in the digest of exactly the columns `only` (0: the ids)."""
    (old, old_sums), (new, new_sums) = values(columns), values(changed)
    assert all(a != b for a, b in zip(old, new, strict=True))
    assert [i for i, (a, b) in enumerate(zip(old_sums, new_sums, strict=True)) if a != b] == only


# -- exact values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", GOLDEN["states"], ids=lambda state: state["name"])
def test_golden_states_have_the_reference_value(state):
    columns = [np.array(column, np.uint32).view(np.float32) for column in state["columns"]]
    ids = np.array([int(i) for i in state["ids"]], np.uint64)
    store = SimpleNamespace(
        agent_count=len(ids), column_names=state["column_names"], columns=columns, ids=ids
    )
    found = fingerprint_checkpoint(int(state["step_index"]), store)
    assert str(found) == state["fingerprint"]
    assert found.scheme == "fnv1a"
    assert found.value == reference.fnv1a_state(int(state["step_index"]), ids, state["column_names"], columns)


def test_the_golden_run_starts_at_its_published_value():
    run = GOLDEN["run"]
    columns = [np.array(column, np.uint32).view(np.float32) for column in run["columns"]]
    ids = np.array([int(i) for i in run["ids"]], np.uint64)
    state = view(columns, ids, step=0, names=tuple(run["column_names"]))
    assert str(fingerprint_view(state)) == run["fingerprint_at_step_0_not_in_stream"]


def doc_table(heading):
    """The rows of the table in docs/fingerprints.md that has this heading row, as lists of cell texts."""
    text = (ROOT / "docs/fingerprints.md").read_text(encoding="utf-8")
    body = text.split(f"| {heading} |\n", 1)[1].splitlines()[1:]
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), body))
    assert rows
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


def column_of(dtype, hexadecimal):
    size = np.dtype(dtype).itemsize
    raw = b"".join(int(word, 16).to_bytes(size, "little") for word in hexadecimal.split())
    return np.frombuffer(raw, dtype)


def test_published_keys_and_multipliers():
    for key_index, word, row, key in doc_table("key index | word | row mod 4096 | K"):
        expected = int(key, 16)
        assert reference.keys(int(key_index), int(word))[int(row)] == expected
        assert digest_keys(int(key_index), 8)[int(row), int(word)] == expected
    for block, key_index, word, multiplier in doc_table("block | key index | word | M"):
        arguments = (int(block), int(key_index), int(word))
        assert reference.multiplier(*arguments) == block_multiplier(*arguments) == int(multiplier, 16)


def test_published_column_values():
    heading = "dtype | bits of the values | global row of the first | key index | value"
    table = doc_table(heading)
    assert {row[0] for row in table} == set(DTYPES)
    for dtype, hexadecimal, row, key_index, value in table:
        column = column_of(dtype, hexadecimal)
        expected = int(value, 16)
        assert reference.digest_column(column, int(row), int(key_index)) == expected
        assert digest_column(column, int(row), int(key_index)) == expected


def test_published_ten_thousand_rows():
    ids = np.arange(10_000, dtype=np.uint64)
    hashed = (2654435761 * ids % 2**32).astype(np.uint32)
    (_, ids_value), (_, hashed_value) = doc_table("column | value")
    assert digest_default_ids(0, 10_000) == digest_column(ids, 0, 0) == int(ids_value, 16)
    assert digest_column(hashed, 0, 1) == int(hashed_value, 16) == reference.digest_column(hashed, 0, 1)


def test_published_states():
    for step, ids, columns, *expected in doc_table("step | ids | columns | `fnv1a` | `digest`"):
        parsed = re.findall(r"(\w+):(\w+) ([0-9a-f ]+)", columns)
        names = tuple(name for name, _, _ in parsed)
        arrays = tuple(column_of(dtype, hexadecimal) for _, dtype, hexadecimal in parsed)
        numbers = np.array([int(i) for i in ids.split()], np.uint64)
        state = StateView(int(step), len(numbers), names, numbers, arrays)
        twins = (reference.fnv1a_state, reference.digest_state)
        for scheme, twin, value in zip(SCHEMES, twins, expected, strict=True):
            assert str(fingerprint_view(state, scheme)) == value
            assert twin(int(step), numbers, names, arrays) == int(value, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_digest_equals_its_twin(dtype):
    rng = np.random.default_rng(1)
    for rows, start in itertools.product((0, 1, 2, 3, 8, 70), (0, 1, 4093, 4094, 4095, 12288, 2**40 + 4091)):
        column = random_column(rng, dtype, rows)
        assert digest_column(column, start, 5) == reference.digest_column(column, start, 5)
    column = random_column(rng, dtype, 9001)
    assert digest_column(column, 4001, 2) == reference.digest_column(column, 4001, 2)


def test_fnv1a_equals_its_twin_at_every_length():
    data = np.random.default_rng(2).bytes(200)
    for length in range(200):
        expected = reference.fnv1a(12345, data[:length])
        assert fnv1a_bytes(12345, data[:length]) == expected
        assert fnv1a_bytes(12345, np.frombuffer(data[:length], np.uint8)) == expected


@settings(max_examples=40, deadline=None)
@given(
    state=st.integers(0, U64), rows=st.integers(0, 20 * 4096), seed=st.integers(0, 99), alike=st.booleans()
)
def test_hashing_in_pieces_equals_the_chain(state, rows, seed, alike):
    from rustsim_hpc.kernels.fnv_parallel import fnv1a_pieces
    from rustsim_hpc.kernels.hashing import fnv1a_chain

    rng = np.random.default_rng(seed)
    data = np.full(rows, seed, np.uint8) if alike else np.frombuffer(rng.bytes(rows), np.uint8)
    assert fnv1a_pieces(np.uint64(state), data) == fnv1a_chain(np.uint64(state), data)


def test_the_low_byte_of_a_piece_is_settled_from_every_start():
    from rustsim_hpc.kernels.fnv_parallel import PIECE, low_byte_after

    rng = np.random.default_rng(4)
    data = np.frombuffer(rng.bytes(PIECE + 3), np.uint8)
    scratch = rng.integers(0, U64, (34, 72), dtype=np.uint64)  # whatever an earlier piece left there
    for low in range(256):
        expected = low
        for byte in data[3:].tolist():
            expected = (expected ^ byte) * 0xB3 % 256
        assert low_byte_after(data, np.uint64(3), np.uint64(low), scratch) == expected


def test_a_large_column_is_hashed_in_pieces_to_the_same_value():
    column = random_column(np.random.default_rng(11), "float64", 140_001)
    assert fnv1a_bytes(77, column) == reference.fnv1a(77, column.tobytes())
    ids = np.arange(5, 140_006, dtype=np.uint64)
    assert fnv1a_default_ids(77, 5, 140_006) == reference.fnv1a(77, ids.tobytes())


def test_arrays_of_any_layout_hash_by_value():
    rng = np.random.default_rng(3)
    column = random_column(rng, "int32", 100)
    strided = np.repeat(column, 3)[::3]
    unaligned = np.frombuffer(b"x" + column.tobytes(), np.uint8)[1:].view(np.int32)
    assert not unaligned.flags.aligned
    for other in (
        strided,
        unaligned,
        column.astype(">i4"),
        np.lib.stride_tricks.as_strided(column, writeable=False),
    ):
        assert digest_column(other, 7, 1) == digest_column(column, 7, 1)
        assert fnv1a_bytes(1, other) == fnv1a_bytes(1, column)
    assert column.flags.writeable


@pytest.mark.parametrize("column", [np.zeros((2, 2)), np.zeros(2, complex), np.array(["a"])])
def test_what_is_no_column_is_refused(column):
    with pytest.raises(TypeError, match="cannot hash an array of dtype"):
        digest_column(column, 0, 1)


# -- keys ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_keys_are_distinct_and_never_zero(itemsize):
    for key_index in (0, 1, 2, 77, 10_000):
        keys = digest_keys(key_index, itemsize)
        assert keys.shape == (BLOCK, 2 if itemsize == 8 else 1)
        assert keys.dtype == np.uint32
        assert not keys.flags.writeable
        assert keys.flags.c_contiguous
        for word in range(keys.shape[1]):
            assert len(np.unique(keys[:, word])) == BLOCK
            assert keys[:, word].all()
            assert keys[:, word].tolist() == reference.keys(key_index, word)


def test_keys_differ_between_columns_and_words():
    tables = {tuple(digest_keys(c, 8)[:, w].tolist()) for c in range(20) for w in (0, 1)}
    assert len(tables) == 40


# -- any cut of the rows -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_digest_is_the_sum_over_any_cut(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    rows = data.draw(st.integers(0, 45_000))
    start = data.draw(st.sampled_from((0, 1, 4095, 4096, 10_001, 2**33)))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=6)))
    column = random_column(np.random.default_rng(rows), dtype, rows)
    pieces = itertools.pairwise([0, *cuts, rows])
    total = sum(digest_column(column[a:b], start + a, 4) for a, b in pieces) & U64
    assert total == digest_column(column, start, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 4095, 2**33])
def test_blocks_add_up_whether_they_are_visited_one_by_one_or_four_at_a_time(dtype, start):
    column = random_column(np.random.default_rng(4), dtype, 9 * BLOCK + 5)
    cuts = itertools.pairwise([*range(0, len(column), BLOCK), len(column)])
    total = sum(digest_column(column[a:b], start + a, 2) for a, b in cuts) & U64
    assert digest_column(column, start, 2) == total


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 2**34), rows=st.integers(0, 9000), cut=st.integers(0, 9000))
def test_default_ids_take_no_array_and_any_cut(start, rows, cut):
    middle = start + min(cut, rows)
    stop = start + rows
    ids = np.arange(start, stop, dtype=np.uint64)
    whole = digest_column(ids, start, 0)
    assert digest_default_ids(start, stop) == whole
    assert (digest_default_ids(start, middle) + digest_default_ids(middle, stop)) & U64 == whole
    assert fnv1a_default_ids(99, start, stop) == fnv1a_bytes(99, ids)
    assert fnv1a_default_ids(fnv1a_default_ids(99, start, middle), middle, stop) == fnv1a_bytes(99, ids)


def test_both_schemes_can_be_put_together_from_the_parts_of_ranks():
    rng = np.random.default_rng(5)
    columns = [random_column(rng, dtype, 10_000) for dtype in DTYPES]
    names = tuple(DTYPES)
    whole = StateView(9, 10_000, names, None, tuple(columns))
    cuts = list(itertools.pairwise([0, 1, 4097, 4097, 10_000]))
    parts = [
        StateView(9, 10_000, names, None, tuple(c[a:b] for c in columns), row_offset=a, local_rows=b - a)
        for a, b in cuts
    ]
    sums = [sum(column) & U64 for column in zip(*(digest_sums(part) for part in parts), strict=True)]
    value = digest_value(9, 10_000, names, [c.dtype for c in columns], sums[1:], sums[0])
    assert value == fingerprint_view(whole, "digest").value

    state = fnv1a_header(9, 10_000, len(names))
    for part in parts:
        state = fnv1a_ids(state, part.ids, part.row_offset, part.row_stop)
    state = fnv1a_names(state, names)
    for i in range(len(names)):
        for part in parts:
            state = fnv1a_bytes(state, part.columns[i])
    assert state == fingerprint_view(whole, "fnv1a").value


@pytest.mark.parametrize("scheme", SCHEMES)
def test_default_ids_hash_as_the_ids_they_stand_for(scheme):
    column = np.arange(50, dtype=np.float64)
    explicit = view([column], np.arange(50, dtype=np.uint64))
    assert fingerprint_view(view([column]), scheme) == fingerprint_view(explicit, scheme)
    state = SimpleNamespace(
        agent_count=50,
        column_names=("c0",),
        columns=(column,),
        ids=explicit.ids,
        default_ids=True,
        row_offset=0,
    )
    assert fingerprint_checkpoint(3, state, scheme) == fingerprint_view(explicit, scheme)
    state.ids, state.row_offset = explicit.ids + np.uint64(7), 7
    shifted = view([column], state.ids)
    assert fingerprint_checkpoint(3, state, scheme) == fingerprint_view(shifted, scheme)


def test_a_state_without_columns_keeps_its_rows():
    state = StateView(1, 4, (), None, ())
    assert fingerprint_view(state).value == reference.fnv1a_state(1, range(4), (), ())
    assert fingerprint_view(state, "digest").value == reference.digest_state(1, range(4), (), ())


# -- differences show ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_one_bit_change_shows(dtype):
    rng = np.random.default_rng(6)
    columns = [random_column(rng, dtype, 5) for _ in range(2)]
    width = 1 if dtype == "bool" else 8 * columns[0].itemsize
    for column, row, bit in itertools.product(range(2), range(5), range(width)):
        changed = [c.copy() for c in columns]
        bits(changed[column])[row] ^= bits(columns[column]).dtype.type(1 << bit)
        assert_all_differ(columns, changed, only=[column + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_one_bit_changes_show_in_a_large_column(dtype):
    rng = np.random.default_rng(7)
    column = random_column(rng, dtype, 50_001)
    before = digest_column(column, 0, 1)
    width = 1 if dtype == "bool" else 8 * column.itemsize
    for _ in range(200):
        row, bit = rng.integers(column.size), int(rng.integers(width))
        bits(column)[row] ^= bits(column).dtype.type(1 << bit)
        assert digest_column(column, 0, 1) != before
        bits(column)[row] ^= bits(column).dtype.type(1 << bit)
    assert digest_column(column, 0, 1) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_and_two_sign_flips_show(dtype):
    """The highest bit of each value: what a single 64-bit product with an even key misses."""
    rng = np.random.default_rng(8)
    column = random_column(rng, dtype, 30)
    sign = bits(column).dtype.type(1 if dtype == "bool" else 1 << (8 * column.itemsize - 1))
    for first, second in itertools.combinations_with_replacement(range(30), 2):
        changed = column.copy()
        bits(changed)[list({first, second})] ^= sign
        assert_all_differ([column], [changed], only=[1])
    large = random_column(rng, dtype, 50_001)
    before = digest_column(large, 0, 1)
    for _ in range(200):
        rows = rng.choice(large.size, 2, replace=False)
        bits(large)[rows] ^= sign
        assert digest_column(large, 0, 1) != before
        bits(large)[rows] ^= sign


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_swap_of_two_different_rows_shows(dtype):
    rng = np.random.default_rng(9)
    column = random_column(rng, dtype, 24)
    raw = bits(column)
    for first, second in itertools.combinations(range(24), 2):
        changed = column.copy()
        bits(changed)[[first, second]] = raw[[second, first]]
        if raw[first] != raw[second]:
            assert_all_differ([column], [changed], only=[1])
        else:
            assert values([column]) == values([changed])
    large = random_column(rng, dtype, 50_001)
    before = digest_column(large, 0, 1)
    for _ in range(200):
        pair = rng.choice(large.size, 2, replace=False)
        if bits(large)[pair[0]] != bits(large)[pair[1]]:
            large[pair] = large[pair[::-1]]
            assert digest_column(large, 0, 1) != before
            large[pair] = large[pair[::-1]]
    assert digest_column(large, 0, 1) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_swap_of_two_columns_shows(dtype):
    rng = np.random.default_rng(10)
    columns = [random_column(rng, dtype, 40) for _ in range(3)]
    for first, second in itertools.combinations(range(3), 2):
        changed = list(columns)
        changed[first], changed[second] = columns[second], columns[first]
        assert_all_differ(columns, changed, only=[first + 1, second + 1])


def test_any_pair_of_sign_flips_in_a_block_shows_by_the_keys():
    """K1 + K2 and K1 - K2 are never multiples of 2^33 (docs/fingerprints.md): checked for the largest sum."""
    for key_index, word in ((1, 0), (2, 0), (2, 1)):
        keys = np.sort(digest_keys(key_index, 8)[:, word].astype(np.int64))
        assert int(keys[-1] + keys[-2]) < 2**33
        assert int(np.diff(keys).min()) > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_payloads_and_negative_zero_count(scheme):
    for dtype, patterns in (
        ("float32", (0x7FC00000, 0x7FC00001, 0xFFC00000, 0x7F800001, 0, 0x80000000)),
        ("float64", (0x7FF8 << 48, (0x7FF8 << 48) + 1, 0xFFF8 << 48, (0x7FF0 << 48) + 1, 0, 1 << 63)),
    ):
        unsigned = "u4" if dtype == "float32" else "u8"
        columns = [np.array([pattern], unsigned).view(dtype) for pattern in patterns]
        assert len({fingerprint_view(view([c]), scheme).value for c in columns}) == len(patterns)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_step_rows_ids_and_names_count(scheme):
    column = np.zeros(3, np.float32)
    ids = np.array([4, 5, 6], np.uint64)
    others = [
        view([column], ids),
        view([column], ids, step=4),
        view([np.zeros(4, np.float32)], np.array([4, 5, 6, 0], np.uint64)),
        view([column], ids[::-1].copy()),
        view([column], ids, names=("d0",)),
        view([column, column], ids),
    ]
    assert len({fingerprint_view(state, scheme).value for state in others}) == len(others)


def test_the_digest_knows_dtypes():
    zeros = [np.zeros(3, dtype) for dtype in DTYPES]
    assert len({fingerprint_view(view([c]), "digest").value for c in zeros}) == len(DTYPES)
    assert fingerprint_view(view([zeros[0]])) == fingerprint_view(view([np.zeros(3, np.int32)]))


# -- the value type ------------------------------------------------------------------------------------


def test_a_fingerprint_is_a_frozen_value():
    one = ReplayFingerprint(np.int64(3), np.uint64(U64))
    assert one == ReplayFingerprint(3, U64, "fnv1a")
    assert one != ReplayFingerprint(4, U64)
    assert one != ReplayFingerprint(3, 0)
    assert one != (3, U64)
    assert type(one.value) is int
    assert str(one) == "0xffffffffffffffff"
    assert pickle.loads(pickle.dumps(one)) == one
    assert len({one, ReplayFingerprint(3, U64), ReplayFingerprint(3, U64, "digest")}) == 2
    with pytest.raises(FrozenInstanceError):
        one.value = 1


def test_comparing_two_schemes_is_an_error():
    with pytest.raises(
        SchemeMismatch, match="cannot compare a fnv1a fingerprint with a digest one at step 3"
    ):
        assert ReplayFingerprint(3, 1) == ReplayFingerprint(3, 1, "digest")


@pytest.mark.parametrize("arguments", [(-1, 0), (0, -1), (0, 1 << 64), (1 << 64, 0)])
def test_a_fingerprint_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError, match="64-bit unsigned"):
        ReplayFingerprint(*arguments)


def test_an_unknown_scheme_is_named_with_the_nearest():
    with pytest.raises(
        InvalidConfig, match=r'unknown fingerprint scheme \'digst\' \(did you mean "digest"\?\)'
    ):
        fingerprint_view(view([np.zeros(1)]), "digst")
    with pytest.raises(InvalidConfig):
        ReplayFingerprint(0, 0, "md5")


# -- how it is built -----------------------------------------------------------------------------------


def test_importing_loads_no_numba():
    code = "import sys, rustsim_hpc.proof.fingerprint; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_digest_of_large_columns_is_vectorised():
    """Lanes of two 32 x 32 bit products: without them the digest is several times slower than memory."""
    if platform.machine() != "x86_64":
        pytest.skip("looks for an instruction of x86-64")
    from numba import njit, types

    from rustsim_hpc.kernels import hashing

    fresh = njit(nogil=True, error_model="numpy")(hashing.digest_range.py_func)
    for dtype in (types.uint8, types.uint16, types.float32, types.float64):
        column = types.Array(dtype, 1, "C")
        signature = (column, types.uint64, types.Array(types.uint32, 2, "C"), types.uint64)
        fresh.compile(signature)
        # Where there is AVX-512 IFMA, narrow items take its multiply-add instead.
        assert re.search("pmuludq|vpmadd52luq", fresh.inspect_asm(fresh.signatures[-1]))
