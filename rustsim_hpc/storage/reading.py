"""Reading checkpoints: the header, the proof, and any range of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustsim_hpc.errors import CheckpointFileError
from rustsim_hpc.proof.fingerprint import StateView
from rustsim_hpc.ranks.agreement import on_all, on_first
from rustsim_hpc.ranks.team import SoloTeam, Team
from rustsim_hpc.storage.folder import manifest_of
from rustsim_hpc.storage.hdf5 import read_file
from rustsim_hpc.storage.header import CheckpointHeader
from rustsim_hpc.storage.proof import FileProof, Manifest, check_blocks


def read_header(path: Path) -> CheckpointHeader:
    """Return a checkpoint's header, from its proof file, which has a checksum of itself.

    Raises:
        CheckpointFileError: it is not a checkpoint, its proof is invalid, or a file is missing or truncated.
    """
    return manifest_of(path).header


def prove(path: Path, team: Team | None = None) -> Manifest:
    """Compare every byte of a checkpoint with its proof, each rank its share; return the proof. Collective.

    Raises:
        CheckpointFileError: they do not match: the same error on all ranks.
    """
    team = SoloTeam() if team is None else team
    manifest = on_first(team, lambda: manifest_of(path))
    prove_files(path, manifest, team)
    return manifest


def prove_files(
    path: Path, manifest: Manifest, team: Team, beside: Sequence[Callable[[], object]] = ()
) -> None:
    """Compare every byte of a checkpoint with a proof of it, each rank its share. Collective.

    beside: calls to make in the same threads; not made if there are too few bytes for threads.

    Raises:
        CheckpointFileError: they do not match: the same error on all ranks.
    """
    mine = _share(manifest.files, team.rank, team.size)
    on_all(team, lambda: check_blocks(path.parent, mine, beside))


def _share(files: Iterable[FileProof], rank: int, size: int) -> list[tuple[FileProof, int, int]]:
    """Return a rank's run of all blocks, as (file, first block, end block)."""
    listed = list(files)
    total = sum(len(file.blocks) for file in listed)
    first, last, base, share = rank * total // size, (rank + 1) * total // size, 0, []
    for file in listed:
        start, stop = max(first - base, 0), min(last - base, len(file.blocks))
        if start < stop:
            share.append((file, start, stop))
        base += len(file.blocks)
    return share


def read_rows(
    path: Path,
    start: int = 0,
    stop: int | None = None,
    *,
    columns: Iterable[str] | None = None,
    manifest: Manifest | None = None,
    ids: bool = False,
) -> StateView:
    """Return the rows [start, stop) of a checkpoint, from the files that hold them.

    columns: the names wanted, in schema order; None for all. manifest: what `prove` returned, which is
    trusted; without it the files that are opened are proven first. ids: read /ids even if the ids are the
    default ones, which are None otherwise.

    Raises:
        CheckpointFileError: it is damaged, or has no such rows or columns.
    """
    manifest, proven = (manifest_of(path), False) if manifest is None else (manifest, True)
    header = manifest.header
    stop = header.rows if stop is None else stop
    check_range(path, header, start, stop)
    wanted = _wanted(path, header, columns)
    files = files_of(manifest, start, stop)
    if not proven:
        check_blocks(path.parent, [(file, 0, len(file.blocks)) for file in files])
    out: dict[int, NDArray[Any]] = {
        index: np.empty(stop - start, header.schema.dtypes[index]) for index in wanted
    }
    if ids or not header.default_ids:
        out[-1] = np.empty(stop - start, np.uint64)
    read_files(path, header, files, start, out)
    names = header.schema.names
    return StateView(
        step_index=header.step_index,
        rows=header.rows,
        names=tuple(names[index] for index in wanted),
        ids=out.get(-1),
        columns=tuple(out[index] for index in wanted),
        row_offset=start,
        local_rows=stop - start,
    )


def check_range(path: Path, header: CheckpointHeader, start: int, stop: int) -> None:
    """Check that a checkpoint has the rows [start, stop).

    Raises:
        CheckpointFileError: it has not.
    """
    if not 0 <= start <= stop <= header.rows:
        message = f"{path}: it has no rows {start} to {stop}, only {header.rows}"
        raise CheckpointFileError(message=message, damaged=False)


def files_of(manifest: Manifest, start: int, stop: int) -> list[FileProof]:
    """Return the files that hold the rows [start, stop)."""
    return [file for file in manifest.files if max(file.start, start) < min(file.stop, stop)]


def read_files(
    path: Path,
    header: CheckpointHeader,
    files: Sequence[FileProof],
    start: int,
    out: Mapping[int, NDArray[Any]],
    done: Callable[[int, int, int], object] | None = None,
) -> None:
    """Read rows from proven files into arrays: from row `start` on, as many as the arrays hold.

    out: array of each column wanted (-1: the ids). done: called with a column and the elements [first, end)
    of its array that have been read.

    Raises:
        CheckpointFileError: a file lacks a column, or has it in another form.
    """
    for file in files:
        first = max(file.start, start)
        part = {index: array[: file.stop - start] for index, array in out.items()}
        read_file(path.parent / file.name, header, first - file.start, part, first - start, done)


def _wanted(path: Path, header: CheckpointHeader, columns: Iterable[str] | None) -> list[int]:
    names = header.schema.names
    if columns is None:
        return list(range(len(names)))
    chosen = set(columns)
    if missing := chosen.difference(names):
        message = f"{path}: it has no column {', '.join(sorted(missing))}; it has {', '.join(names)}"
        raise CheckpointFileError(message=message, damaged=False)
    return [index for index, name in enumerate(names) if name in chosen]
