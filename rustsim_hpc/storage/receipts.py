"""Checks before and after writing: that the disk has room, and that the ranks wrote the whole population."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rustsim_hpc.errors import CheckpointFileError
from rustsim_hpc.storage.hdf5 import Segment, datasets
from rustsim_hpc.storage.header import CheckpointHeader, StorageOptions
from rustsim_hpc.storage.proof import FileProof, file_errors

_U64 = (1 << 64) - 1


@dataclass(frozen=True)
class Receipt:
    """What a rank wrote. sums: the digest's over its rows; segments: the columns' places in a shared file."""

    start: int
    stop: int
    sums: tuple[int, ...]
    file: FileProof | None = None
    segments: tuple[Segment, ...] = ()


def checked(
    receipts: Sequence[Receipt] | None, header: CheckpointHeader
) -> tuple[CheckpointHeader, list[Receipt]]:
    """Check that receipts cover the population exactly; return the finished header and the sorted receipts.

    Raises:
        CheckpointFileError: they do not, or the state is not the one that was fingerprinted.
    """
    ordered, row = sorted(receipts or [], key=lambda receipt: (receipt.start, receipt.stop)), 0
    for receipt in ordered:
        if receipt.start != row:
            message = f"ranks wrote rows that start at {receipt.start}, expected {row}"
            raise CheckpointFileError(message=message, damaged=False)
        row = receipt.stop
    if row != header.rows:
        raise CheckpointFileError(message=f"ranks wrote {row} rows of {header.rows}", damaged=False)
    sums = [sum(values) & _U64 for values in zip(*(receipt.sums for receipt in ordered), strict=True)]
    header = header.with_sums(sums)
    if header.fingerprint.scheme == "digest":
        value, given = header.digest_of(sums).value, header.fingerprint.value
        if value != given:
            raise CheckpointFileError(
                message=f"the state to be written has the fingerprint {value:#018x}, "
                f"the step gave {given:#018x}",
                damaged=False,
            )
    return header, ordered


def check_room(folder: Path, header: CheckpointHeader, options: StorageOptions) -> None:
    """Check that the disk has room for a checkpoint, before it uses up what the outputs of the run need.

    Compressed columns, whose size is unknown, do not count. Parallel HDF5 does not recover from a full disk:
    it may wait for ever in a later call.

    Raises:
        CheckpointFileError: there is not enough room.
    """
    size = sum(
        header.rows * dtype.itemsize
        for _, _, dtype, column in datasets(header, stored=True)
        if options.filter_of(None if column is None else column.name) is None
    )
    with file_errors(folder, "write"):
        found = os.statvfs(folder)
    room = found.f_bavail * found.f_frsize
    if size > room:
        message = (
            f"{folder}: cannot write a checkpoint of {size:,} bytes: {os.strerror(errno.ENOSPC)} ({room:,})"
        )
        raise CheckpointFileError(message=message, damaged=False)
