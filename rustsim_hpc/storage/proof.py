"""The proof beside a checkpoint: block checksums over every byte of every file, and one over itself.

HDF5 reads flipped bytes as other values, or crashes on them, so it never opens a file whose blocks have not
been verified. The checksum is xxh3_128 over blocks of 4 MiB, so that ranks and threads share the reading.
It detects accidents, not forgery.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from rustsim_hpc.errors import CheckpointFileError
from rustsim_hpc.files import NotAFileError, open_regular, read_bytes
from rustsim_hpc.pieces import PIECES
from rustsim_hpc.storage.header import FORMAT_NAME, FORMAT_VERSION, LAYOUTS, CheckpointHeader

BLOCK_BYTES = 4 << 20
_HEAD = b'{"xxh3_128": "'
_NECK = b'",\n "proof": '
_TAIL = b"}\n"
_HEX = 32
_THREADED_BLOCKS = 16
# Small enough to stay in a core's cache between being read and being hashed.
_READ_BYTES = 1 << 20
# The content could not be read at all, which does not mean that it is damaged.
_OUT_OF_REACH = {
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EINTR,
    errno.ESTALE,
}


@dataclass(frozen=True)
class FileProof:
    """One file of a checkpoint.

    name: relative to the checkpoint's folder; size: bytes; start, stop: the rows that it holds itself;
    blocks: the checksum of each block, 32 hexadecimal digits.
    """

    name: str
    size: int
    start: int
    stop: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's header and the proofs of its files; the first is the file to open."""

    header: CheckpointHeader
    layout: str
    files: tuple[FileProof, ...]


def proof_path(path: Path) -> Path:
    """Return the path of the proof of the checkpoint `path`."""
    return path.with_suffix(".proof.json")


@contextlib.contextmanager
def file_errors(path: Path, doing: str = "read") -> Iterator[None]:
    """Turn errors with a file inside the block into a `CheckpointFileError` that names it."""
    try:
        yield
    except CheckpointFileError:
        raise
    except NotAFileError as error:
        raise CheckpointFileError(message=f"{path}: {error.strerror}") from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        damaged = doing == "read" and error.errno not in _OUT_OF_REACH
        message = f"{path}: cannot {doing} it: {reason}"
        raise CheckpointFileError(message=message, damaged=damaged) from error
    except MemoryError as error:
        raise CheckpointFileError(
            message=f"{path}: not enough memory to {doing} it", damaged=False
        ) from error


def render_manifest(manifest: Manifest) -> bytes:
    """Return the text of a proof: JSON whose first entry is the checksum of everything after it."""
    body = {
        "format": f"{FORMAT_NAME} proof",
        "version": FORMAT_VERSION,
        "block_bytes": BLOCK_BYTES,
        "layout": manifest.layout,
        "header": manifest.header.to_json(),
        "files": [
            {
                "name": file.name,
                "bytes": file.size,
                "rows": [file.start, file.stop],
                "xxh3_128": list(file.blocks),
            }
            for file in manifest.files
        ],
    }
    rest = _NECK + json.dumps(body, indent=1).encode() + _TAIL
    return _HEAD + xxhash.xxh3_128_hexdigest(rest).encode() + rest


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """Verify the text of a proof and return its content. path: its file, for the message.

    Raises:
        CheckpointFileError: the text is damaged, not a proof, or of another version.
    """
    rest = data[len(_HEAD) + _HEX :]
    said = data[len(_HEAD) : len(_HEAD) + _HEX]
    if not data.startswith(_HEAD) or not rest.startswith(_NECK):
        raise CheckpointFileError(message=f"{path}: it is not the proof of a checkpoint")
    if xxhash.xxh3_128_hexdigest(rest).encode() != said:
        raise CheckpointFileError(message=f"{path}: the proof does not agree with its own checksum")
    try:
        body = json.loads(rest[len(_NECK) : -len(_TAIL)])
        version = body["version"]
        if body["format"] != f"{FORMAT_NAME} proof":
            raise CheckpointFileError(message=f"{path}: it is the proof of something else: {body['format']}")
        if version != FORMAT_VERSION or body["block_bytes"] != BLOCK_BYTES:
            raise CheckpointFileError(
                message=f"{path}: its format is version {version}, this program reads {FORMAT_VERSION}",
                damaged=False,
                hint="read it with the version of rustsim-hpc that wrote it",
            )
        files = tuple(_file_from_json(entry) for entry in body["files"])
        if body["layout"] not in LAYOUTS:
            raise ValueError(f"{body['layout']!r} is not a layout")
        manifest = Manifest(CheckpointHeader.from_json(body["header"]), body["layout"], files)
        _check_cover(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, CheckpointFileError):
            raise
        raise CheckpointFileError(message=f"{path}: the proof is not understood: {error!r}") from error
    return manifest


def _file_from_json(entry: dict[str, Any]) -> FileProof:
    name = PurePosixPath(entry["name"])
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"a file outside of the checkpoint's folder: {name}")
    start, stop = entry["rows"]
    proof = FileProof(entry["name"], int(entry["bytes"]), int(start), int(stop), tuple(entry["xxh3_128"]))
    if len(proof.blocks) != block_count(proof.size):
        raise ValueError(f"{name} of {proof.size} bytes has {len(proof.blocks)} checksums")
    return proof


def _check_cover(manifest: Manifest) -> None:
    """Check that the files' rows cover the population exactly, and that there is a digest for each column."""
    header, row = manifest.header, 0
    for file in sorted(manifest.files, key=lambda file: (file.start, file.stop)):
        if file.start < file.stop:
            if file.start != row:
                raise ValueError(f"{file.name} starts at row {file.start}, expected {row}")
            row = file.stop
    if row != header.rows or not manifest.files:
        raise ValueError(f"the files hold {row} rows of {header.rows}")
    if len(header.digests) != len(header.schema) + 1:
        raise ValueError(f"{len(header.digests)} digests for {len(header.schema)} columns and the ids")


def read_manifest(path: Path) -> Manifest:
    """Return the content of the proof file at `path`, verified by its own checksum.

    Raises:
        CheckpointFileError: it is missing or invalid.
    """
    with file_errors(path):
        if not path.exists():
            raise CheckpointFileError(message=f"{path}: there is no such file: nothing proves the checkpoint")
        return parse_manifest(read_bytes(path), path)


def block_count(size: int) -> int:
    """Return how many blocks a file of `size` bytes has."""
    return -(-size // BLOCK_BYTES)


class BlockHasher:
    """Computes the checksums of a file's blocks from a stream of its bytes."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self._hash = xxhash.xxh3_128()
        self._room = BLOCK_BYTES

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        while data:
            part = data[: self._room]
            self._hash.update(part)
            self._room -= len(part)
            data = data[len(part) :]
            if not self._room:
                self._end_block()

    def finish(self) -> tuple[str, ...]:
        """Return the checksum of every block, the last of which may be shorter."""
        if self._room < BLOCK_BYTES:
            self._end_block()
        return tuple(self.blocks)

    def _end_block(self) -> None:
        self.blocks.append(self._hash.hexdigest())
        self._hash.reset()
        self._room = BLOCK_BYTES


def hash_blocks(path: Path, first: int, last: int) -> list[str]:
    """Return the checksums of the blocks [first, last) of a file, as it is on the disk.

    Raises:
        CheckpointFileError: it cannot be read, or ends before them.
    """
    found = []
    with file_errors(path):
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            # Not memory-mapped: truncating the file meanwhile would kill the process.
            buffer = memoryview(bytearray(_READ_BYTES))
            for block in range(first, last):
                offset = block * BLOCK_BYTES
                end = min(offset + BLOCK_BYTES, size)
                checksum = xxhash.xxh3_128()
                while offset < end:
                    count = os.preadv(descriptor, [buffer[: end - offset]], offset)
                    if count == 0:
                        break
                    checksum.update(buffer[:count])
                    offset += count
                if offset < end or end <= block * BLOCK_BYTES:
                    raise CheckpointFileError(
                        message=f"{path}: it ends at byte {min(offset, end)}: it was cut"
                    )
                found.append(checksum.hexdigest())
        finally:
            os.close(descriptor)
    return found


def check_size(folder: Path, file: FileProof) -> None:
    """Check that a file is there, is a plain file, and is as long as its proof says.

    Raises:
        CheckpointFileError: it is not.
    """
    path = folder / file.name
    with file_errors(path):
        # Opened, not only stat'ed: a network file system may answer that from a stale cache.
        descriptor = open_regular(path)
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    if status.st_size != file.size:
        raise CheckpointFileError(
            message=f"{path}: it has {status.st_size} bytes, its proof says {file.size}"
        )


def check_blocks(
    folder: Path, work: list[tuple[FileProof, int, int]], beside: Sequence[Callable[[], object]] = ()
) -> None:
    """Compare blocks of files with their proof.

    work: files with first and last (exclusive) block. beside: calls to make in the same threads; not made
    if no threads are used.

    Raises:
        CheckpointFileError: one differs; the first in the order given.
    """
    # 32 MiB a piece: enough to read ahead, and enough pieces for all threads.
    pieces = [
        (file, first, min(first + 8, stop)) for file, start, stop in work for first in range(start, stop, 8)
    ]

    def check(piece: tuple[FileProof, int, int]) -> None:
        file, first, last = piece
        path = folder / file.name
        for block, checksum in enumerate(hash_blocks(path, first, last), first):
            if checksum != file.blocks[block]:
                raise CheckpointFileError(
                    message=f"{path}: its bytes {block * BLOCK_BYTES} to "
                    f"{min((block + 1) * BLOCK_BYTES, file.size)} are not those that were written"
                )
        PIECES.one_more()

    # Threads pay from a few dozen megabytes on.
    threads = min(len(pieces), len(os.sched_getaffinity(0)), 4)
    if threads < 2 or sum(last - first for _, first, last in pieces) < _THREADED_BLOCKS:
        for piece in pieces:
            check(piece)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="rustsim-proof") as pool:
        more = [pool.submit(call) for call in beside]
        for _ in pool.map(check, pieces):
            pass
        for call in more:
            call.result()
