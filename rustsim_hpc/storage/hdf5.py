"""Write and read the HDF5 tree of a checkpoint.

Columns that are not compressed are contiguous. Their offsets are fixed when the tree is built, in memory;
`stream` then writes their bytes without HDF5: at the speed of the disk, hashed on the way, and without HDF5's
lock, so that a writer in the background blocks no other thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustsim_hpc.errors import CheckpointFileError
from rustsim_hpc.proof.fingerprint import StateView, digest_column
from rustsim_hpc.state.schema import Column
from rustsim_hpc.storage.default_ids import write_default_ids
from rustsim_hpc.storage.header import (
    FORMAT_NAME,
    FORMAT_VERSION,
    CheckpointHeader,
    StorageOptions,
    plain_json,
    schema_to_json,
)
from rustsim_hpc.storage.proof import file_errors
from rustsim_hpc.storage.sinks import FileSink, MemorySink, start_writeback, write_at
from rustsim_hpc.version import __version__

# Small enough to stay in a core's cache between being hashed and being written.
_PIECE_BYTES = 1 << 20
ALIGNED_FROM = 1 << 16
_READ_BACK_ROWS = 1 << 20
_U64 = (1 << 64) - 1
_IDS = np.dtype("<u8")
# HDF5 1.10 reads it; attributes may be larger than 64 KiB.
LIBVER = ("v110", "v110")


@dataclass(frozen=True)
class Segment:
    """The bytes of one dataset in a file. index: -1 for the ids, else the column's."""

    offset: int
    size: int
    index: int


@dataclass(frozen=True)
class FileImage:
    """A file before its columns are written: its size, the places of the columns, the bytes between them."""

    size: int
    segments: tuple[Segment, ...]
    gaps: tuple[tuple[int, bytes], ...]


def link_name(name: str) -> str:
    """Return a column's name below /columns: its own, with characters that HDF5 does not allow as %XX."""
    escaped = name.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return {"": "%", ".": "%2E"}.get(escaped, escaped)


def datasets(
    header: CheckpointHeader, *, stored: bool = False
) -> Iterator[tuple[int, str, np.dtype[Any], Column | None]]:
    """Yield (index, path, dtype, column) of every dataset: the ids as -1 first, then the columns.

    stored: leave out the ids where they are the default ones.
    """
    if not (stored and header.default_ids):
        yield -1, "ids", _IDS, None
    for index, column in enumerate(header.schema.columns):
        yield index, f"columns/{link_name(column.name)}", np.dtype(column.dtype).newbyteorder("<"), column


def plan_file(
    header: CheckpointHeader, start: int, stop: int, options: StorageOptions, *, whole: bool = True
) -> FileImage:
    """Build the tree of a file for rows [start, stop) in memory; return it with the places of the columns.

    whole: with default ids, if the state has them. They come last, so the columns' places are the same.
    """
    import h5py

    sink = MemorySink()
    with h5py.File(
        sink, "w", libver=LIBVER, alignment_threshold=ALIGNED_FROM, alignment_interval=options.alignment
    ) as file:
        write_root(file, header, start, stop)
        places = []
        for index, path, dtype, column in datasets(header, stored=stop > start):
            dataset = contiguous(file, path, dtype, stop - start)
            describe(dataset, header, index, column)
            if stop > start:
                places.append(Segment(dataset.id.get_offset(), (stop - start) * dtype.itemsize, index))
        if header.default_ids and stop > start and whole:
            describe(write_default_ids(file, start, stop - start), header, -1, None)
    segments = tuple(sorted(places, key=lambda segment: segment.offset))
    gaps, end = [], 0
    for segment in segments:
        gaps.append((end, sink.read_at(end, segment.offset - end)))
        end = segment.offset + segment.size
    gaps.append((end, sink.read_at(end, sink.size - end)))
    return FileImage(sink.size, segments, tuple(gaps))


def plan_master(header: CheckpointHeader, shards: Sequence[tuple[str, int, int]]) -> bytes:
    """Return a whole master file: virtual datasets over shards (name relative to it, first row, end row)."""
    import h5py

    sink = MemorySink()
    with h5py.File(sink, "w", libver=LIBVER) as file:
        write_root(file, header, 0, header.rows)
        for index, path, dtype, column in datasets(header):
            if shards:
                layout = h5py.VirtualLayout(shape=(header.rows,), dtype=dtype)
                # HDF5 takes a % in these names for a pattern.
                source = path.replace("%", "%%")
                for name, start, stop in shards:
                    layout[start:stop] = h5py.VirtualSource(name, source, shape=(stop - start,), dtype=dtype)
                dataset = file.create_virtual_dataset(path, layout)
            else:
                dataset = contiguous(file, path, dtype, 0)
            describe(dataset, header, index, column)
    return sink.read_at(0, sink.size)


def write_root(file: Any, header: CheckpointHeader, start: int, stop: int) -> None:
    """Write the attributes of a file of rows [start, stop); a shard's header has no digests yet."""
    whole = bool(header.digests)
    file.create_group("columns", track_order=True)
    attributes = file.attrs
    attributes["format"] = FORMAT_NAME if whole else f"{FORMAT_NAME} shard"
    attributes["format_version"] = FORMAT_VERSION
    attributes["engine"] = f"rustsim-hpc {__version__}"
    attributes["step_index"] = np.uint64(header.step_index)
    attributes["rows"] = np.uint64(header.rows)
    attributes["row_start"], attributes["row_stop"] = np.uint64(start), np.uint64(stop)
    attributes["sequence"] = np.uint64(header.sequence)
    attributes["default_ids"] = header.default_ids
    if not whole:
        return
    attributes["fingerprint"] = np.uint64(header.fingerprint.value)
    attributes["fingerprint_scheme"] = header.fingerprint.scheme
    if header.label is not None:
        attributes["label"] = _text(header.label)
    if header.seed is not None:
        attributes["seed"] = str(header.seed)
    for name in ("parameters", "plan", "model"):
        attributes[name] = json.dumps(plain_json(getattr(header, name)))
    attributes["schema"] = json.dumps(schema_to_json(header.schema))


def describe(dataset: Any, header: CheckpointHeader, index: int, column: Column | None) -> None:
    """Write the attributes of a column's dataset (None: the ids')."""
    attributes = dataset.attrs
    if header.digests:
        attributes["digest"] = np.uint64(header.digests[index + 1])
    if column is not None:
        attributes["unit"], attributes["doc"] = _text(column.unit), _text(column.doc)
        if column.codes is not None:
            attributes["codes"] = json.dumps({str(code): name for code, name in column.codes.items()})


def _text(value: str) -> str:
    """Return text that an HDF5 attribute can hold; the proof has the exact one."""
    return value.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def contiguous(file: Any, path: str, dtype: np.dtype[Any], rows: int) -> Any:
    """Create a contiguous dataset, allocated at once."""
    import h5py
    from h5py import h5d, h5p, h5s, h5t

    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_layout(h5d.CONTIGUOUS)
    # Allocated early: its offset is needed before its bytes. Never filled: all bytes are written.
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    kind = h5t.py_create(dtype, logical=True)
    return h5py.Dataset(h5d.create(file.id, path.encode(), kind, h5s.create_simple((rows,)), properties))


def column_bytes(view: StateView, index: int, start: int, stop: int) -> memoryview:
    """Return the bytes of local rows [start, stop) of a column (-1: the ids), little-endian."""
    values: NDArray[Any]
    if index >= 0:
        values = view.columns[index][start:stop]
    elif view.ids is not None:
        values = view.ids[start:stop]
    else:
        values = np.arange(view.row_offset + start, view.row_offset + stop, dtype=_IDS)
    values = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False))
    return memoryview(values.view(np.uint8))  # type: ignore[arg-type]


def rows_of(view: StateView) -> int:
    """Return the number of local rows of a view."""
    return view.row_stop - view.row_offset


def stream(
    descriptor: int, image: FileImage, view: StateView, hasher: Any, go_on: Callable[[], None]
) -> None:
    """Write a whole file in the order of its bytes.

    view: all rows of the file. hasher: gets every byte. go_on: called for each piece; may raise to end it.

    Raises:
        OSError: the disk is full, or fails.
    """
    parts: list[Segment | tuple[int, bytes]] = [*image.segments, *image.gaps]
    begun = 0
    for part in sorted(parts, key=lambda part: part.offset if isinstance(part, Segment) else part[0]):
        pieces = (
            _segment_pieces(part, view, 0) if isinstance(part, Segment) else [(part[0], memoryview(part[1]))]
        )
        for offset, piece in pieces:
            go_on()
            hasher.update(piece)
            write_at(descriptor, piece, offset)
            begun = start_writeback(descriptor, begun, offset + len(piece))


def stream_rows(
    descriptor: int, image: FileImage, view: StateView, first_row: int, go_on: Callable[[], None]
) -> None:
    """Write the rows of `view`, and nothing else, into a file that holds `first_row` rows before them.

    go_on: called for each piece; may raise to end it.

    Raises:
        OSError: the disk is full, or fails.
    """
    for segment in image.segments:
        begun: int | None = None
        for offset, piece in _segment_pieces(segment, view, first_row):
            go_on()
            write_at(descriptor, piece, offset)
            begun = start_writeback(descriptor, offset if begun is None else begun, offset + len(piece))


def stream_gaps(descriptor: int, image: FileImage) -> None:
    """Write everything but the columns.

    Raises:
        OSError: the disk is full, or fails.
    """
    os.ftruncate(descriptor, image.size)
    for offset, data in image.gaps:
        write_at(descriptor, memoryview(data), offset)


def _segment_pieces(segment: Segment, view: StateView, first_row: int) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset, bytes) of the view's rows of a segment, whose file has `first_row` rows before them."""
    itemsize = 8 if segment.index < 0 else view.columns[segment.index].dtype.itemsize
    base, rows, step = segment.offset + first_row * itemsize, rows_of(view), _PIECE_BYTES // itemsize
    for start in range(0, rows, step):
        yield base + start * itemsize, column_bytes(view, segment.index, start, min(start + step, rows))


def write_chunked(
    descriptor: int,
    header: CheckpointHeader,
    view: StateView,
    options: StorageOptions,
    go_on: Callable[[], None],
) -> None:
    """Write a file of the view's rows through HDF5, which compresses the columns that `options` names.

    go_on: called for each piece; may raise to end it.

    Raises:
        OSError: the disk is full, or fails.
    """
    import h5py

    sink, rows = FileSink(descriptor), rows_of(view)
    start = view.row_offset
    with h5py.File(
        sink, "w", libver=LIBVER, alignment_threshold=ALIGNED_FROM, alignment_interval=options.alignment
    ) as file:
        write_root(file, header, start, start + rows)
        for index, path, dtype, column in datasets(header, stored=rows > 0):
            dataset = create_dataset(file, path, dtype, rows, column, options)
            describe(dataset, header, index, column)
            for first in range(0, rows, options.chunk_rows):
                go_on()
                last = min(first + options.chunk_rows, rows)
                if sink.failure is None:
                    dataset[first:last] = np.frombuffer(column_bytes(view, index, first, last), dtype)
        if header.default_ids and rows and sink.failure is None:
            describe(write_default_ids(file, start, rows), header, -1, None)
    if sink.failure is not None:
        raise sink.failure


def add_default_ids(descriptor: int, header: CheckpointHeader) -> None:
    """Add the default ids, if the state has them, to an otherwise complete file of all rows.

    Raises:
        OSError: the disk is full, or fails.
    """
    import h5py

    if not (header.default_ids and header.rows):
        return
    sink = FileSink(descriptor)
    sink.size = os.fstat(descriptor).st_size
    with h5py.File(sink, "r+", libver=LIBVER) as file:
        describe(write_default_ids(file, 0, header.rows), header, -1, None)
    if sink.failure is not None:
        raise sink.failure


def create_dataset(
    file: Any, path: str, dtype: np.dtype[Any], rows: int, column: Column | None, options: StorageOptions
) -> Any:
    """Create the dataset of a column (None: the ids), compressed if `options` says so, else contiguous."""
    chosen = options.filter_of(None if column is None else column.name)
    if chosen is None or rows == 0:
        return contiguous(file, path, dtype, rows)
    chunks = (min(options.chunk_rows, rows),)
    name, level = chosen
    return file.create_dataset(
        path, (rows,), dtype, chunks=chunks, shuffle=True, compression=name, compression_opts=level
    )


def read_file(
    path: Path,
    header: CheckpointHeader,
    start: int,
    out: Mapping[int, NDArray[Any]],
    at: int,
    done: Callable[[int, int, int], object] | None = None,
) -> None:
    """Read rows of a proven file into arrays. start: first row wanted, counted in the file.

    out: array of each column wanted (-1: the ids); filled from element `at` on, with as many rows as the
    file has. done: called with a column and the elements [first, end) of its array that have been read.

    Raises:
        CheckpointFileError: the file lacks a column, or has it in another form.
    """
    import h5py

    # h5py raises errors of many types for a bad file; the bytes are proven, so it does not crash.
    with file_errors(path):
        try:
            with h5py.File(path, "r", locking=False) as file:
                for index, name, dtype, _ in datasets(header):
                    if index not in out:
                        continue
                    dataset = file.get(name)
                    if not isinstance(dataset, h5py.Dataset):
                        raise CheckpointFileError(message=f"{path}: it has no /{name}")
                    if dataset.dtype != dtype or dataset.ndim != 1:
                        raise CheckpointFileError(
                            message=f"{path}: /{name} is {dataset.dtype} {dataset.shape}, not {dtype.name}"
                        )
                    count = min(len(dataset) - start, len(out[index]) - at)
                    if count > 0:
                        dataset.read_direct(out[index], np.s_[start : start + count], np.s_[at : at + count])
                        if done is not None:
                            done(index, at, at + count)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, CheckpointFileError):
                raise
            raise CheckpointFileError(message=f"{path}: HDF5 cannot read it: {error}") from error


def check_file(
    path: Path, header: CheckpointHeader, rows: tuple[int, int], file_start: int, sums: Sequence[int]
) -> None:
    """Read back rows [first, end) of a file that HDF5 has written, and compare their digests.

    file_start: the first row of the file. sums: the digests' sums over the rows, the ids' first.

    Raises:
        CheckpointFileError: a digest differs.
    """
    first, end = rows
    found = [0] * len(sums)
    for start in range(first, end, _READ_BACK_ROWS):
        stop = min(start + _READ_BACK_ROWS, end)
        for index, _, dtype, _ in datasets(header):
            values = np.empty(stop - start, dtype)
            read_file(path, header, start - file_start, {index: values}, 0)
            found[index + 1] += digest_column(values, start, index + 1)
    if [value & _U64 for value in found] != list(sums):
        raise CheckpointFileError(message=f"{path}: HDF5 has not written what it was given", damaged=False)
