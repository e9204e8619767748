"""Default ids in a file: any HDF5 tool reads them all, and they take next to nothing."""

from __future__ import annotations

import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_cases import bounds, cut, header_of, layout, state
from thread_team import ThreadTeam, run_ranks

from rustsim_hpc.storage import StorageOptions, verify, write_checkpoint
from rustsim_hpc.storage.default_ids import CHUNK_ROWS, chunk_of_ids, write_default_ids
from rustsim_hpc.storage.folder import checkpoint_path

NEAR = st.sampled_from([0, 1 << 8, 1 << 16, 1 << 24, 1 << 32, 1 << 40, 1 << 56, (1 << 64) - 70_000])


@settings(deadline=None, max_examples=60)
@given(near=NEAR, more=st.integers(-70_000, 70_000), rows=st.integers(1, 140_000))
def test_a_chunk_is_what_the_filters_of_hdf5_would_make(near: int, more: int, rows: int) -> None:
    first = min(max(near + more, 0), (1 << 64) - rows)
    planes = np.frombuffer(zlib.decompress(chunk_of_ids(first, rows)), np.uint8).reshape(8, rows)
    ids = planes.T.copy().view("<u8")[:, 0]
    assert np.array_equal(ids, np.arange(rows, dtype=np.uint64) + np.uint64(first))


@pytest.mark.parametrize("rows", [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1])
def test_hdf5_reads_them(tmp_path: Path, rows: int) -> None:
    first = (1 << 32) - 5
    with h5py.File(tmp_path / "ids.h5", "w") as file:
        write_default_ids(file, first, rows)
    with h5py.File(tmp_path / "ids.h5") as file:
        assert file["ids"].dtype == np.uint64
        assert np.array_equal(file["ids"][:], np.arange(first, first + rows, dtype=np.uint64))


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, StorageOptions()),
        (1, StorageOptions(compression={"x": "gzip"})),
        (3, layout("single")),
        (3, layout("sharded")),
        (4, layout("node")),
    ],
    ids=["alone", "compressed", "single", "sharded", "node"],
)
def test_a_checkpoint_has_them_whoever_writes_it(tmp_path: Path, ranks: int, options: StorageOptions) -> None:
    view = state(100_000)
    header = header_of(view)

    def write(team: ThreadTeam) -> None:
        mine = cut(view, *bounds(view.rows, team.size, team.rank))
        write_checkpoint(tmp_path, header, mine, team, options)

    run_ranks(ranks, write)
    path = checkpoint_path(tmp_path, 100)
    verify(path)
    with h5py.File(path) as file:
        assert np.array_equal(file["ids"][:], np.arange(100_000, dtype=np.uint64))
    size = sum(found.stat().st_size for found in tmp_path.rglob("*.h5"))
    assert size < 500_000 + 150_000, "the columns have 500,000 bytes, the ids would have 800,000"
