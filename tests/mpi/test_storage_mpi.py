"""Checkpoints written by real ranks, read by them, by fewer, and by a single process."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from storage_cases import ALL, bounds, cut, header_of, same_bits, state
from storage_cases import layout as options_of

from rustsim_hpc.errors import CheckpointFileError
from rustsim_hpc.ranks.team import SoloTeam, Team
from rustsim_hpc.storage import (
    CheckpointWriter,
    checkpoint_path,
    list_checkpoints,
    load,
    load_newest,
    prove,
    write_checkpoint,
)
from rustsim_hpc.storage.collective import has_parallel_hdf5

pytestmark = pytest.mark.mpi
LAYOUTS = ["sharded", "node", "single"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", ["digest", "fnv1a"])
@pytest.mark.parametrize("rows", [0, 1, 2, 1000])
def test_written_by_ranks_read_by_ranks_and_by_one(
    team: Team, shared_path: Path, layout: str, scheme: str, rows: int
) -> None:
    view = state(rows, ALL, custom_ids=rows == 1000)
    header = header_of(view, ALL, scheme)
    mine = bounds(rows, team.size, team.rank)
    path = write_checkpoint(shared_path, header, cut(view, *mine), team, options_of(layout))
    assert path == checkpoint_path(shared_path, 100)
    assert same_bits(load(path, team, lambda header: mine).rows, cut(view, *mine))
    # All rows to the last rank, none to the others.
    uneven = (0, rows) if team.rank == team.size - 1 else (0, 0)
    assert same_bits(load(path, team, lambda header: uneven).rows, cut(view, *uneven))
    if team.rank == 0:
        assert same_bits(load(path, SoloTeam(), lambda header: (0, rows)).rows, view)
        with h5py.File(path, "r") as file:
            assert file["columns/c_float64"][:].tobytes() == view.columns[ALL.index("c_float64")].tobytes()


def test_written_by_one_read_by_ranks(team: Team, shared_path: Path) -> None:
    view = state(500)
    if team.rank == 0:
        write_checkpoint(shared_path, header_of(view), view, SoloTeam())
    team.barrier()
    mine = bounds(500, team.size, team.rank)
    found = load_newest(shared_path, team, lambda header: mine)
    assert found is not None
    assert same_bits(found.rows, cut(view, *mine))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_beside_the_running_steps(team: Team, shared_path: Path, layout: str) -> None:
    writer = CheckpointWriter(shared_path, team, options_of(layout, keep=2))
    for step in (10, 20, 30):
        view = state(2000, step=step)
        header, part = header_of(view), cut(view, *bounds(2000, team.size, team.rank))
        writer.submit(header, part)
        for column in part.columns:
            column[...] = 0
        for _ in range(3):
            writer.poll()
    writer.finish()
    assert writer.paths == [checkpoint_path(shared_path, step) for step in (10, 20, 30)]
    assert list_checkpoints(shared_path) == writer.paths[:0:-1]
    mine = bounds(2000, team.size, team.rank)
    for step in (20, 30):
        found = load_newest(shared_path, team, lambda header: mine, at=step)
        assert found is not None
        assert same_bits(found.rows, cut(state(2000, step=step), *mine))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_on_any_rank_is_one_error_on_all(
    team: Team, shared_path: Path, layout: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "single" and has_parallel_hdf5():
        pytest.skip("parallel HDF5 does not write through the calls that are made to fail here")
    view = state(300)
    header, part = header_of(view), cut(view, *bounds(300, team.size, team.rank))
    for bad in range(team.size):
        writer = CheckpointWriter(shared_path, team, options_of(layout), asynchronous=asynchronous)
        with monkeypatch.context() as patch:
            if team.rank == bad:
                patch.setattr(os, "pwrite", full)
            with pytest.raises(CheckpointFileError, match=os.strerror(errno.ENOSPC)) as caught:
                submit_and_finish(writer, header, part)
        assert len(set(team.allgather(str(caught.value)))) == 1
        assert caught.value.rank == (bad if team.size > 1 else None)
        assert team.bcast([str(path) for path in shared_path.iterdir()]) == []
        team.barrier()
        writer.submit(header, part)
        writer.finish()
        assert prove(checkpoint_path(shared_path, 100), team).header.rows == 300
        team.barrier()
        if team.rank == 0:
            for path in sorted(shared_path.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        team.barrier()


def full(*arguments: object) -> int:
    raise OSError(errno.ENOSPC, "injected")


def submit_and_finish(writer: CheckpointWriter, *arguments: object) -> None:
    writer.submit(*arguments)  # type: ignore[arg-type]
    writer.finish()


def test_damage_anywhere_is_one_error_on_all(team: Team, shared_path: Path) -> None:
    view = state(400)
    mine = bounds(400, team.size, team.rank)
    path = write_checkpoint(shared_path, header_of(view), cut(view, *mine), team)
    files = team.bcast(sorted(str(file) for file in shared_path.rglob("*") if file.is_file()))
    for name in files:
        if team.rank == 0:
            flip(Path(name))
        team.barrier()
        with pytest.raises(CheckpointFileError) as caught:
            load(path, team, lambda header: mine)
        assert len(set(team.allgather(str(caught.value)))) == 1
        if team.rank == 0:
            flip(Path(name))
        team.barrier()
    assert same_bits(load(path, team, lambda header: mine).rows, cut(view, *mine))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("compression", ["gzip:1", "lzf"])
def test_compressed_columns(team: Team, shared_path: Path, compression: str) -> None:
    view = state(3000)
    # All zeros but one: it must become smaller.
    view.columns[0][1:] = np.float32(0)
    header, mine = header_of(view), bounds(3000, team.size, team.rank)
    layouts = LAYOUTS[::2] if has_parallel_hdf5() and compression != "lzf" else LAYOUTS[:1]
    for layout in layouts:
        options = options_of(layout, {"*": compression}, chunk_rows=512)
        path = write_checkpoint(shared_path, header, cut(view, *mine), team, options)
        assert same_bits(load(path, team, lambda header: mine).rows, cut(view, *mine))
