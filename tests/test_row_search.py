"""Finding rows by partial digests: exactly, on every dtype, over any cut into ranks, and within bounds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from thread_team import run_ranks

from rustsim_hpc.divergence import row_search
from rustsim_hpc.divergence.row_search import (
    RowDifference,
    Rows,
    column_sums,
    differing_rows,
    hex_bits,
    ids_of,
)
from rustsim_hpc.ranks.team import SoloTeam, Team
from rustsim_hpc.state.schema import DTYPES

Array = np.ndarray


def search(left: Array, right: Array, ranks: int = 1) -> RowDifference | None:
    """Search on ranks that cut the rows at odd places; all have to find the same."""
    bounds = [0, *sorted(len(left) * k * k // (ranks * ranks) for k in range(1, ranks)), len(left)]
    cuts = list(pairwise(bounds))

    def on_rank(team: Team) -> RowDifference | None:
        start, stop = cuts[team.rank]
        one, other = Rows({"x": left[start:stop]}, start), Rows({"x": right[start:stop]}, start)
        return differing_rows("x", len(left), lambda: one, lambda: other, team)

    if ranks == 1:
        return on_rank(SoloTeam())
    found = run_ranks(ranks, on_rank)
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_one_bit(dtype: str, ranks: int) -> None:
    rng = np.random.default_rng(5)
    left = rng.integers(0, 2, 9999).astype(dtype)
    for row in (0, 4095, 4096, 9998):
        right = left.copy()
        if dtype == "bool":
            right[row] = not right[row]
        else:
            right.view(f"u{right.itemsize}")[row] ^= right.view(f"u{right.itemsize}").dtype.type(1)
        found = search(left, right, ranks)
        assert found is not None
        assert (found.ranges, found.exact, found.rows) == (((row, row + 1),), True, 1)
        [(at, one, other)] = found.first
        assert (at, one.tobytes(), other.tobytes()) == (row, left[row].tobytes(), right[row].tobytes())


def test_signs_and_nans_count() -> None:
    left, right = np.zeros(600), np.zeros(600)
    right[3], right[300] = -0.0, np.nan
    left[5] = right[5] = np.nan
    found = search(left, right)
    assert found is not None
    assert found.ranges == ((3, 4), (300, 301))


def test_equal_columns() -> None:
    column = np.arange(100_000.0)
    assert search(column, column.copy(), 2) is None
    assert search(column[:0], column[:0]) is None


def test_runs_of_rows_in_a_large_column() -> None:
    """Several levels: 3 million rows are more than what the first level cuts short."""
    left = np.zeros(3_000_000, np.uint8)
    right = left.copy()
    for start, stop in ((17, 19), (1_048_570, 1_048_580), (2_999_999, 3_000_000)):
        right[start:stop] = 1
    found = search(left, right)
    assert found is not None
    assert found.ranges == ((17, 19), (1_048_570, 1_048_580), (2_999_999, 3_000_000))
    assert found.exact


def test_too_many_rows_to_look_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    values = row_search.range_values

    def count(rows: Rows, name: str, ranges: list[tuple[int, int]], team: Team) -> Array:
        looked.append(sum(stop - start for start, stop in ranges))
        return values(rows, name, ranges, team)

    monkeypatch.setattr(row_search, "range_values", count)
    left = np.arange(500_000.0)
    right = left + 1
    right[:1000] = left[:1000]
    found = search(left, right)
    assert found is not None
    assert (found.exact, found.ranges, len(found.first)) == (False, ((1000, 500_000),), 20)
    assert found.first[0] == (1000, 1000.0, 1001.0)
    assert max(looked) <= 64 * 256


def test_sums_and_ids_over_ranks() -> None:
    column, ids = np.arange(1000.0), np.arange(1000, dtype=np.uint64)[::-1].copy()
    whole = column_sums(Rows({"x": column}, 0), {"x": 4}, SoloTeam())

    def on_rank(team: Team) -> tuple[dict[str, int], list[int], list[int]]:
        part = slice(team.rank * 400, team.rank * 400 + (400 if team.rank < 2 else 200))
        rows = Rows({"x": column[part]}, part.start, ids[part])
        bare = Rows({"x": column[part]}, part.start)
        return column_sums(rows, {"x": 4}, team), ids_of(rows, [3, 700], team), ids_of(bare, [3, 700], team)

    for sums, found, default in run_ranks(3, on_rank):
        assert (sums, found, default) == (whole, [996, 299], [3, 700])


def test_bits_as_text() -> None:
    assert hex_bits(np.float32(-0.0)) == "0x80000000"
    assert hex_bits(np.int8(-1)) == "0xff"
    assert hex_bits(np.bool_(True)) == "0x01"
    assert hex_bits(np.float64(1.0)) == "0x3ff0000000000000"
