"""Reading checkpoints: the header, the proof, any range of rows, and the newest one that holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rustsim_hpc.errors import CheckpointFileError
from rustsim_hpc.proof.fingerprint import (
    StateView,
    digest_sums,
    digest_value,
    fnv1a_bytes,
    fnv1a_header,
    fnv1a_ids,
    fnv1a_names,
)
from rustsim_hpc.ranks.agreement import agree
from rustsim_hpc.ranks.team import SoloTeam, Team
from rustsim_hpc.storage.folder import list_checkpoints, manifest_of, move_aside, step_of
from rustsim_hpc.storage.hdf5 import read_file
from rustsim_hpc.storage.header import CheckpointHeader
from rustsim_hpc.storage.proof import FileProof, Manifest, check_blocks

T = TypeVar("T")
_PIECE_ROWS = 1 << 20


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that proved itself. rows: this rank's."""

    path: Path
    header: CheckpointHeader
    rows: StateView


def read_header(path: Path) -> CheckpointHeader:
    """Return what a checkpoint says about itself, from its self-checking proof.

    Raises:
        CheckpointFileError: it is not a checkpoint, its proof does not hold, or a file is missing or cut.
    """
    return manifest_of(path).header


def prove(path: Path, team: Team | None = None) -> Manifest:
    """Compare every byte of a checkpoint with its proof, each rank its share; return the proof. Collective.

    Raises:
        CheckpointFileError: it does not hold: the same error on all ranks.
    """
    team = SoloTeam() if team is None else team
    manifest = on_first_rank(team, lambda: manifest_of(path))
    error = None
    try:
        check_blocks(path.parent, _share(manifest.files, team.rank, team.size))
    except CheckpointFileError as failure:
        error = failure
    agree(team, error)
    return manifest


def on_first_rank(team: Team, function: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its (small, picklable) result on all ranks. Collective.

    Raises:
        CheckpointFileError: it raised that: the same error on all ranks.
    """
    result, error = None, None
    if team.rank == 0:
        try:
            result = function()
        except CheckpointFileError as failure:
            error = failure
    agree(team, error)
    return team.bcast(result)  # type: ignore[return-value]


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

    columns: the names wanted, in schema order; None for all. manifest: what `prove` returned, to be taken
    at its word; without it the files that are opened are proven first. ids: read /ids even where they are
    the default ones, which else are None.

    Raises:
        CheckpointFileError: it does not hold, or has no such rows or columns.
    """
    manifest, proven = (manifest_of(path), False) if manifest is None else (manifest, True)
    header = manifest.header
    stop = header.rows if stop is None else stop
    if not 0 <= start <= stop <= header.rows:
        message = f"{path}: it has no rows {start} to {stop}, only {header.rows}"
        raise CheckpointFileError(message=message, damaged=False)
    wanted = _wanted(path, header, columns)
    files = [file for file in manifest.files if max(file.start, start) < min(file.stop, stop)]
    if not proven:
        check_blocks(path.parent, [(file, 0, len(file.blocks)) for file in files])
    out: dict[int, NDArray[Any]] = {
        index: np.empty(stop - start, header.schema.dtypes[index]) for index in wanted
    }
    if ids or not header.default_ids:
        out[-1] = np.empty(stop - start, np.uint64)
    for file in files:
        first = max(file.start, start)
        part = {index: array[: min(file.stop, stop) - start] for index, array in out.items()}
        read_file(path.parent / file.name, header, first - file.start, part, first - start)
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


def _wanted(path: Path, header: CheckpointHeader, columns: Iterable[str] | None) -> list[int]:
    names = header.schema.names
    if columns is None:
        return list(range(len(names)))
    chosen = set(columns)
    if missing := chosen.difference(names):
        message = f"{path}: it has no column {', '.join(sorted(missing))}; it has {', '.join(names)}"
        raise CheckpointFileError(message=message, damaged=False)
    return [index for index, name in enumerate(names) if name in chosen]


def load(path: Path, team: Team, rows_for: Callable[[CheckpointHeader], tuple[int, int]]) -> LoadedCheckpoint:
    """Read this rank's rows of a checkpoint, proven before and after. Collective.

    rows_for: returns the rows [start, stop) of this rank; all ranks together must take every row once.

    Raises:
        CheckpointFileError: it does not hold: the same error on all ranks, and nothing has changed.
    """
    manifest, view, error = prove(path, team), None, None
    header = manifest.header
    try:
        start, stop = rows_for(header)
        view = read_rows(path, start, stop, manifest=manifest)
    except Exception as failure:  # noqa: BLE001 (told to all ranks, then raised)
        error = failure
    agree(team, error)
    assert view is not None  # noqa: S101 (else all have raised)
    check_values(path, header, view, team)
    return LoadedCheckpoint(path, header, view)


def check_values(path: Path, header: CheckpointHeader, view: StateView, team: Team) -> None:
    """Compute the digests and the fingerprint anew from what was read, and compare. Collective.

    Raises:
        CheckpointFileError: one differs: the same error on all ranks.
    """
    total = _check_sums(path, header, np.array(digest_sums(view), np.uint64), team)

    def hash_ids(state: int) -> int:
        return fnv1a_ids(state, view.ids, view.row_offset, view.row_stop)

    hashes = [lambda state, column=column: fnv1a_bytes(state, column) for column in view.columns]
    _check_value(path, header, total, team, hash_ids, hashes)


def _check_sums(path: Path, header: CheckpointHeader, sums: NDArray[np.uint64], team: Team) -> list[int]:
    """Compare the digests' sums of all ranks with the header's; return them."""
    total = [int(value) for value in team.sum_int64(sums.view(np.int64)).view(np.uint64)]
    names = ("ids", *header.schema.names)
    odd = [name for name, one, other in zip(names, total, header.digests, strict=True) if one != other]
    if odd:
        message = f"{path}: what was read of {', '.join(odd)} is not what was written"
        raise CheckpointFileError(message=message)
    return total


def _check_value(
    path: Path,
    header: CheckpointHeader,
    sums: list[int],
    team: Team,
    hash_ids: Callable[[int], int],
    hash_columns: Sequence[Callable[[int], int]],
) -> None:
    """Compare the state's fingerprint, made of the sums or by hashing the rows, with the header's."""
    step, rows, names = header.step_index, header.rows, header.schema.names
    if header.fingerprint.scheme == "digest":
        value = digest_value(step, rows, names, header.schema.dtypes, sums[1:], sums[0])
    else:
        value = fnv1a_names(team.chain(fnv1a_header(step, rows, len(names)), hash_ids), names)
        for hash_column in hash_columns:
            value = team.chain(value, hash_column)
    if value != header.fingerprint.value:
        raise CheckpointFileError(
            message=f"{path}: its fingerprint is {value:#018x}, it says {header.fingerprint.value:#018x}"
        )


def verify(path: Path, team: Team | None = None) -> Manifest:
    """Prove a checkpoint as `load` does, holding only a piece of it at a time; return its proof. Collective.

    Raises:
        CheckpointFileError: it does not hold: the same error on all ranks.
    """
    team = SoloTeam() if team is None else team
    manifest, error = prove(path, team), None
    header = manifest.header
    mine = (team.rank * header.rows // team.size, (team.rank + 1) * header.rows // team.size)
    sums = np.zeros(len(header.schema) + 1, np.uint64)
    try:
        for piece in _pieces(path, manifest, mine):
            sums += np.array(digest_sums(piece), np.uint64)
    except CheckpointFileError as failure:
        error = failure
    agree(team, error)
    total = _check_sums(path, header, sums, team)
    names = header.schema.names

    def hash_ids(state: int) -> int:
        for piece in _pieces(path, manifest, mine, ()):
            state = fnv1a_ids(state, piece.ids, piece.row_offset, piece.row_stop)
        return state

    def hash_column(state: int, name: str) -> int:
        for piece in _pieces(path, manifest, mine, (name,)):
            state = fnv1a_bytes(state, piece.columns[0])
        return state

    hashes = [lambda state, name=name: hash_column(state, name) for name in names]
    _check_value(path, header, total, team, hash_ids, hashes)
    return manifest


def _pieces(
    path: Path, manifest: Manifest, rows: tuple[int, int], columns: Iterable[str] | None = None
) -> Iterator[StateView]:
    for start in range(*rows, _PIECE_ROWS):
        stop = min(start + _PIECE_ROWS, rows[1])
        yield read_rows(path, start, stop, manifest=manifest, columns=columns)


def load_newest(
    folder: Path,
    team: Team,
    rows_for: Callable[[CheckpointHeader], tuple[int, int]],
    at: int | None = None,
    reject: Callable[[Path, str], object] = move_aside,
) -> LoadedCheckpoint | None:
    """Load the newest checkpoint that proves itself, or None if there is none. Collective.

    One that is damaged is rejected and the one before is tried. at: load the one of this step, and no other.
    reject: called on rank 0 with the path of one that is damaged, and why.

    Raises:
        CheckpointFileError: there is none of step `at` or it does not hold, or one is out of reach.
    """
    paths = on_first_rank(team, lambda: list_checkpoints(folder))
    if at is not None:
        steps = ", ".join(str(step_of(path)) for path in reversed(paths))
        paths = [path for path in paths if step_of(path) == at]
        if not paths:
            message = f"{folder}: there is no checkpoint of step {at}"
            raise CheckpointFileError(
                message=message, damaged=False, hint=f"there are steps {steps}" if steps else None
            )
        return load(paths[0], team, rows_for)
    for path in paths:
        try:
            return load(path, team, rows_for)
        except CheckpointFileError as error:
            if not error.damaged:
                raise
            reason = str(error)
            on_first_rank(team, lambda path=path, reason=reason: reject(path, reason))  # type: ignore[misc]
    return None
