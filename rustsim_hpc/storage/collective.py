"""A single file that all ranks write together, where h5py is built with MPI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rustsim_hpc.errors import JobError
from rustsim_hpc.proof.fingerprint import StateView
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.storage.hdf5 import (
    ALIGNED_FROM,
    LIBVER,
    column_bytes,
    create_dataset,
    datasets,
    describe,
    rows_of,
    write_root,
)
from rustsim_hpc.storage.header import CheckpointHeader, StorageOptions

# MPI-IO counts in 32 bits in places.
_PIECE_BYTES = 256 << 20


def has_parallel_hdf5() -> bool:
    """Return whether the h5py at hand is built with MPI."""
    import h5py

    return bool(h5py.get_config().mpi)


def writes_together(team: Team, options: StorageOptions) -> bool:
    """Return whether parallel HDF5 writes a single file of these ranks, which takes their main threads."""
    single = team.size > 1 and options.layout == "single"
    return single and team.native is not None and has_parallel_hdf5()


def check_supported(options: StorageOptions, team: Team) -> None:
    """Check that these ranks can write what the options ask for with this h5py.

    Raises:
        JobError: they cannot.
    """
    if team.size == 1 or not options.compresses:
        return
    if options.layout != "single":
        if options.shards == "node":
            raise JobError(
                "compressed columns need a shard for each rank", hint='use checkpoint shards "rank"'
            )
        return
    if team.native is None or not has_parallel_hdf5():
        raise JobError(
            "compressed columns in a single file of several ranks need parallel HDF5",
            hint='use checkpoint layout "sharded", or an h5py that is built with MPI',
        )
    if "lzf" in options.compression.values():
        # Chunks that lzf does not make smaller cannot be read back (seen with HDF5 1.10.8).
        raise JobError("parallel HDF5 does not write lzf safely", hint="use gzip")


def write_collective(
    path: Path, header: CheckpointHeader, view: StateView, team: Team, options: StorageOptions
) -> None:
    """Write a file of all rows, each rank its own, by collective calls of parallel HDF5; no default ids.

    A rank without rows, or one whose write has failed, joins every call like the others.

    Raises:
        OSError: the disk is full, or fails.
    """
    import h5py
    from h5py import h5fd, h5p

    most = max(team.allgather(rows_of(view)))
    transfer = h5p.create(h5p.DATASET_XFER)
    transfer.set_dxpl_mpio(h5fd.MPIO_COLLECTIVE)
    failure = None
    info = team.mpi_info(options.hints)
    places = {"alignment_threshold": ALIGNED_FROM, "alignment_interval": options.alignment}
    with h5py.File(path, "w", libver=LIBVER, driver="mpio", comm=team.native, info=info, **places) as file:
        write_root(file, header, 0, header.rows)
        for index, name, dtype, column in datasets(header, stored=header.rows > 0):
            dataset = create_dataset(file, name, dtype, header.rows, column, options)
            describe(dataset, header, index, column)
            step = max(_PIECE_BYTES // dtype.itemsize, 1)
            for first in range(0, most, step):
                try:
                    _write_piece(dataset, header, view, index, (first, first + step), transfer)
                except OSError as error:
                    failure = failure or error
    if failure is not None:
        raise failure


def _write_piece(
    dataset: Any,
    header: CheckpointHeader,
    view: StateView,
    index: int,
    wanted: tuple[int, int],
    transfer: Any,
) -> None:
    from h5py import h5s

    first, last = (min(row, rows_of(view)) for row in wanted)
    target = h5s.create_simple((header.rows,))
    if first < last:
        target.select_hyperslab((view.row_offset + first,), (last - first,))
        values = np.frombuffer(column_bytes(view, index, first, last), dataset.dtype)
        source = h5s.create_simple((last - first,))
    else:
        # HDF5 requires an array even if nothing of it is selected.
        target.select_none()
        values = np.zeros(1, dataset.dtype)
        source = h5s.create_simple((1,))
        source.select_none()
    dataset.id.write(source, target, values, dxpl=transfer)
