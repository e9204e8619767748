"""Restore each rank's rows from the newest valid checkpoint, verified before and after reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustsim_hpc.errors import CheckpointFileError
from rustsim_hpc.pieces import PIECES
from rustsim_hpc.proof.fingerprint import (
    StateView,
    digest_column,
    digest_default_ids,
    digest_sums,
    digest_value,
    fnv1a_bytes,
    fnv1a_header,
    fnv1a_ids,
    fnv1a_names,
)
from rustsim_hpc.ranks.agreement import agree, on_all, on_first
from rustsim_hpc.ranks.team import SoloTeam, Team
from rustsim_hpc.storage.folder import find_checkpoint, list_checkpoints, manifest_of, move_aside
from rustsim_hpc.storage.header import CheckpointHeader
from rustsim_hpc.storage.proof import Manifest
from rustsim_hpc.storage.reading import (
    check_range,
    files_of,
    prove,
    prove_files,
    read_files,
    read_rows,
)

RowsFor = Callable[[CheckpointHeader], tuple[int, int]]
RoomFor = Callable[[CheckpointHeader, int, int], StateView]
_PIECE_ROWS = 1 << 20
_TOUCHED_AT_ONCE = 16 << 20
_PAGE = 4096
_U64 = (1 << 64) - 1


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was read and verified. rows: this rank's."""

    path: Path
    header: CheckpointHeader
    rows: StateView


def fresh_room(header: CheckpointHeader, start: int, stop: int) -> StateView:
    """Return new arrays for the rows [start, stop) of a checkpoint."""
    return StateView(
        step_index=header.step_index,
        rows=header.rows,
        names=header.schema.names,
        ids=None if header.default_ids else np.empty(stop - start, np.uint64),
        columns=tuple(np.empty(stop - start, dtype) for dtype in header.schema.dtypes),
        row_offset=start,
        local_rows=stop - start,
    )


def load(path: Path, team: Team, rows_for: RowsFor, room_for: RoomFor = fresh_room) -> LoadedCheckpoint:
    """Read this rank's rows of a checkpoint, proven before and after. Collective.

    ::

        compare every byte with the proof, the threads of all ranks together
        HDF5 opens the files, and reads each column into its final array
        digest each column while the next one is read, and compare

    Args:
        path: the checkpoint.
        team: the ranks.
        rows_for: returns the rows [start, stop) of this rank; all ranks together must take every row once.
        room_for: returns the arrays to read those rows into, 1-D, contiguous, of the schema's dtypes, and ids
            unless they are the default ones. After a failure their content is undefined.

    Raises:
        CheckpointFileError: it does not hold: the same error on all ranks.
    """
    manifest = on_first(team, lambda: manifest_of(path))
    header, room, error = manifest.header, None, None
    try:
        start, stop = rows_for(header)
        check_range(path, header, start, stop)
        room = room_for(header, start, stop)
    except Exception as failure:  # noqa: BLE001 (raised on all ranks, once the files are known to be whole)
        error = failure
    prove_files(path, manifest, team, [] if room is None else _touches(room))
    agree(team, error)
    assert room is not None  # noqa: S101 (else all have raised)
    sums = on_all(team, lambda: _read_and_digest(path, manifest, room))
    _check(path, header, room, sums, team)
    return LoadedCheckpoint(path, header, room)


def _touches(room: StateView) -> list[Callable[[], object]]:
    """Return calls that touch every page of the arrays: page faults take as long as filling the memory."""
    arrays = room.columns if room.ids is None else (*room.columns, room.ids)
    pieces = [
        array.view(np.uint8)[first : first + _TOUCHED_AT_ONCE : _PAGE]
        for array in arrays
        for first in range(0, array.nbytes, _TOUCHED_AT_ONCE)
    ]
    return [partial(piece.fill, 0) for piece in pieces]


def _read_and_digest(path: Path, manifest: Manifest, room: StateView) -> list[int]:
    """Read rows into `room` from proven files; return the digest's sums over them, the ids' first."""
    arrays: dict[int, NDArray[Any]] = dict(enumerate(room.columns))
    if room.ids is not None:
        arrays[-1] = room.ids
    start, stop = room.row_offset, room.row_stop
    digests: list[tuple[int, Future[int]]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="rustsim-proof") as beside:

        def digest(index: int, first: int, end: int) -> None:
            PIECES.one_more()
            values = arrays[index][first:end]
            digests.append((index + 1, beside.submit(digest_column, values, start + first, index + 1)))

        if room.ids is None:
            digests.append((0, beside.submit(digest_default_ids, start, stop)))
        read_files(path, manifest.header, files_of(manifest, start, stop), start, arrays, digest)
    sums = [0] * (len(room.columns) + 1)
    for place, value in digests:
        sums[place] = (sums[place] + value.result()) & _U64
    return sums


def _check(path: Path, header: CheckpointHeader, view: StateView, sums: Sequence[int], team: Team) -> None:
    """Compare the digests and the fingerprint of what was read with the header's. Collective.

    Raises:
        CheckpointFileError: one differs: the same error on all ranks.
    """
    total = _check_sums(path, header, np.array(sums, np.uint64), team)

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
    """Compare the state's fingerprint, computed from the sums or by hashing the rows, with the header's."""
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
    manifest = prove(path, team)
    header = manifest.header
    mine = (team.rank * header.rows // team.size, (team.rank + 1) * header.rows // team.size)

    def sums() -> NDArray[np.uint64]:
        made = np.zeros(len(header.schema) + 1, np.uint64)
        for piece in _pieces(path, manifest, mine):
            made += np.array(digest_sums(piece), np.uint64)
        return made

    total = _check_sums(path, header, on_all(team, sums), team)
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
    rows_for: RowsFor,
    at: int | None = None,
    reject: Callable[[Path, str], object] = move_aside,
    room_for: RoomFor = fresh_room,
) -> LoadedCheckpoint | None:
    """Load the newest valid checkpoint, or return None if there is none. Collective.

    A damaged one is rejected and the previous one is tried. at: load only the checkpoint of this step.
    reject: called on rank 0 with the path of a damaged one, and why. room_for: as for `load`.

    Raises:
        CheckpointFileError: there is none of step `at` or it is damaged, or one cannot be accessed.
    """
    if at is not None:
        return load(on_first(team, lambda: find_checkpoint(folder, at)), team, rows_for, room_for)
    paths = on_first(team, lambda: list_checkpoints(folder))
    for path in paths:
        try:
            return load(path, team, rows_for, room_for)
        except CheckpointFileError as error:
            if not error.damaged:
                raise
            reason = str(error)
            on_first(team, lambda path=path, reason=reason: reject(path, reason))  # type: ignore[misc]
    return None
