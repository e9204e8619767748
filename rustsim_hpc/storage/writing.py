"""Write checkpoints: all ranks together, whole or not at all, beside the running steps if requested.

A checkpoint is written in phases. In a phase every rank does its part without talking to the others, in a
background thread if the writer is asynchronous; between two phases the ranks agree that all succeeded, and
rank 0 gathers their receipts. Only the last phase, on rank 0, gives the checkpoint its name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rustsim_hpc.errors import CheckpointFileError, RustsimError
from rustsim_hpc.files import fsync_folder, temporary_path
from rustsim_hpc.pieces import PIECES
from rustsim_hpc.proof.fingerprint import StateView, digest_sums, fingerprint_view
from rustsim_hpc.ranks.agreement import agree, on_all
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.storage.collective import write_collective, writes_together
from rustsim_hpc.storage.folder import checkpoint_path, publish, retain, settle, shards_path
from rustsim_hpc.storage.groups import groups_of
from rustsim_hpc.storage.hdf5 import (
    Segment,
    add_default_ids,
    check_file,
    plan_file,
    plan_master,
    rows_of,
    stream,
    stream_gaps,
    stream_rows,
    write_chunked,
)
from rustsim_hpc.storage.header import CheckpointHeader, StorageOptions
from rustsim_hpc.storage.proof import (
    BLOCK_BYTES,
    BlockHasher,
    FileProof,
    Manifest,
    block_count,
    check_size,
    file_errors,
    hash_blocks,
    proof_path,
    render_manifest,
)
from rustsim_hpc.storage.receipts import Receipt, check_room, checked
from rustsim_hpc.storage.sinks import Abandoned

Phases = Generator[Callable[[], Any], "list[Any] | None", None]


class Attempt:
    """One attempt of a rank to write a checkpoint: the file names, the phases, and undoing it.

    Collective: rank 0 chooses the names.

    Raises:
        CheckpointFileError: the header is not the state's, the folder cannot be created, or the disk lacks
            room: the same error on all ranks.
    """

    def __init__(
        self, folder: Path, header: CheckpointHeader, view: StateView, team: Team, options: StorageOptions
    ) -> None:
        self.path = checkpoint_path(folder, header.step_index)
        self.header, self.view, self.team, self.options = header, view, team, options
        self.rows = (view.row_offset, view.row_stop)
        self.sums: tuple[int, ...] = ()
        self.published = False
        self.abandoned = threading.Event()
        self.sharded = team.size > 1 and options.layout != "single"
        self.groups = groups_of(team, self.rows, header.rows, options)
        self.group = self.groups[team.rank]
        error, names = self._misfit(), None
        if team.rank == 0 and error is None:
            shards = shards_path(self.path, secrets.token_hex(4))
            names = (shards, temporary_path(self.path), temporary_path(proof_path(self.path)))
            try:
                with file_errors(folder, "make"):
                    (shards if self.sharded else folder).mkdir(parents=True, exist_ok=True)
                check_room(folder, header, options)
            except CheckpointFileError as failure:
                error = failure
        try:
            agree(team, error)
        except RustsimError:
            if names is not None and self.sharded:
                shutil.rmtree(names[0], ignore_errors=True)
            raise
        chosen = team.bcast(names)
        assert chosen is not None  # noqa: S101 (rank 0 has them, or all have raised)
        self.shards, self.first, self.proof = chosen
        self.shard = self.shards / f"{options.shards}_{self.group.first:05d}.h5"

    def _misfit(self) -> CheckpointFileError | None:
        """Return why this cannot be written at all, or None."""
        header, view = self.header, self.view
        arrays = view.columns if view.ids is None else (*view.columns, view.ids)
        fits = (
            (view.names, view.rows, view.step_index) == (header.schema.names, header.rows, header.step_index)
            and tuple(column.dtype for column in view.columns) == header.schema.dtypes
            and all(array.shape == (rows_of(view),) for array in arrays)
            and (view.ids is None) == header.default_ids
        )
        if not fits:
            message = f"{self.path}: the header is not that of the state"
            return CheckpointFileError(message=message, damaged=False)
        if header.fingerprint_due and header.fingerprint.scheme == "fnv1a" and self.team.size > 1:
            message = f"{self.path}: ranks cannot make the fnv1a fingerprint while they write"
            return CheckpointFileError(message=message, damaged=False)
        return None

    @property
    def collective(self) -> bool:
        """Whether parallel HDF5 writes the file, which takes all ranks' main threads."""
        return writes_together(self.team, self.options)

    def phases(self) -> Phases:
        """Yield each phase of this rank as a function; is sent all ranks' results on rank 0, else None."""
        if self.sharded and self.options.shards == "node":
            receipts = yield self.write_part
            blocks = yield self.hash_part
            yield lambda: self._on_first(lambda: self.publish_shards(self._of_machines(receipts, blocks)))
        elif self.sharded:
            receipts = yield self.write_shard
            yield lambda: self._on_first(lambda: self.publish_shards(checked(receipts, self.header)))
        elif self.team.size == 1:
            receipts = yield self.write_alone
            yield lambda: self._on_first(lambda: self.publish_single(checked(receipts, self.header)))
        else:
            receipts = yield self.write_together if self.collective else self.write_part
            header = yield lambda: self._on_first(lambda: self.finish_shared(checked(receipts, self.header)))
            blocks = yield self.hash_part
            yield lambda: self._on_first(lambda: self.publish_shared(header, blocks))

    def go_on(self) -> None:
        """Count a piece; raise Abandoned once another rank has failed, which makes the rest useless."""
        if self.abandoned.is_set():
            raise Abandoned
        PIECES.one_more()

    def _on_first(self, function: Callable[[], Any]) -> Any:
        return function() if self.team.rank == 0 else None

    def write_shard(self) -> Receipt:
        """Write this rank's rows as a separate file, and sync it."""
        start, stop = self.rows
        self.sums = tuple(digest_sums(self.view))
        if start == stop:
            return Receipt(start, stop, self.sums)
        size, blocks = self._write_rows(self.shard, self.header)
        name = f"{self.shards.name}/{self.shard.name}"
        return Receipt(start, stop, self.sums, FileProof(name, size, start, stop, blocks))

    def write_alone(self) -> Receipt:
        """Write the only rank's rows as the whole checkpoint under its temporary name, and sync it."""
        rows = self.header.rows
        self.sums = tuple(digest_sums(self.view))
        if self.header.fingerprint_due and self.header.fingerprint.scheme == "fnv1a":
            fingerprint = fingerprint_view(self.view, "fnv1a")
            self.header = replace(self.header, fingerprint=fingerprint, fingerprint_due=False)
        size, blocks = self._write_rows(self.first, self.header.with_sums(self.sums))
        return Receipt(0, rows, self.sums, FileProof(self.path.name, size, 0, rows, blocks))

    def _write_rows(self, path: Path, header: CheckpointHeader) -> tuple[int, tuple[str, ...]]:
        """Write the view's rows to a new file; return its size and its blocks' checksums."""
        # O_EXCL: a file that a killed attempt left may be a link to something else.
        with _opened(path, os.O_CREAT | os.O_EXCL) as descriptor:
            if self.options.compresses:
                write_chunked(descriptor, header, self.view, self.options, self.go_on)
                os.fsync(descriptor)
                check_file(path, header, self.rows, self.rows[0], self.sums)
                size = os.fstat(descriptor).st_size
                return size, tuple(hash_blocks(path, 0, block_count(size)))
            hasher = BlockHasher()
            image = plan_file(header, *self.rows, self.options)
            stream(descriptor, image, self.view, hasher, self.go_on)
            os.fsync(descriptor)
            return image.size, hasher.finish()

    def write_part(self) -> Receipt:
        """Write this rank's rows into the file of its group, and sync it."""
        self.sums = tuple(digest_sums(self.view))
        group, path = self.group, self.shard if self.sharded else self.first
        if group.start == group.stop and self.sharded:
            return Receipt(*self.rows, self.sums)
        # Digests and the fingerprint have a fixed width, so their values do not move the columns. A shard has
        # none.
        header = self.header if self.sharded else replace(self.header, digests=tuple(0 for _ in self.sums))
        first = self.sharded and self.team.rank == group.first
        image = plan_file(header, group.start, group.stop, self.options, whole=first)
        with _opened(path, os.O_CREAT) as descriptor:
            stream_rows(descriptor, image, self.view, self.rows[0] - group.start, self.go_on)
            if first:
                stream_gaps(descriptor, image)
            os.fsync(descriptor)
        return Receipt(*self.rows, self.sums, segments=image.segments)

    def write_together(self) -> Receipt:
        """Write this rank's rows into the file of all ranks by parallel HDF5, and sync it. Collective."""
        self.sums = on_all(self.team, lambda: tuple(digest_sums(self.view)))
        total = self.team.sum_int64(np.array(self.sums, np.uint64).view(np.int64)).view(np.uint64)
        header = self.header.with_sums([int(value) for value in total])
        with file_errors(self.first, "write"):
            write_collective(self.first, header, self.view, self.team, self.options)
        with _opened(self.first) as descriptor:
            os.fsync(descriptor)
        return Receipt(*self.rows, self.sums)

    def finish_shared(self, checked: tuple[CheckpointHeader, list[Receipt]]) -> CheckpointHeader:
        """Write everything but the columns into the file of all ranks; return the finished header."""
        header, receipts = checked
        with _opened(self.first) as descriptor:
            if self.collective:
                add_default_ids(descriptor, header)
            else:
                image = plan_file(header, self.group.start, self.group.stop, self.options)
                self._check_places(receipts, image.segments)
                stream_gaps(descriptor, image)
            os.fsync(descriptor)
        return header

    def _check_places(self, receipts: Sequence[Receipt], segments: tuple[Segment, ...]) -> None:
        if any(receipt.segments != segments for receipt in receipts):
            message = f"{self.path}: ranks have put the columns in different places"
            raise CheckpointFileError(
                message=message, damaged=False, hint="run one version of h5py on all nodes"
            )

    def hash_part(self) -> list[str]:
        """Return the checksums of this rank's share of the blocks of its group's file."""
        path = self.shard if self.sharded else self.first
        if self.collective:
            check_file(path, self.header, self.rows, 0, self.sums)
        if self.sharded and self.group.start == self.group.stop:
            return []
        with file_errors(path):
            total = block_count(path.stat().st_size)
        return hash_blocks(path, *self.group.share(self.team.rank, total))

    def _of_machines(
        self, receipts: list[Receipt] | None, blocks: list[list[str]] | None
    ) -> tuple[CheckpointHeader, list[Receipt]]:
        """Merge the receipts of each machine's ranks into one for its shard."""
        header, _ = checked(receipts, self.header)
        found = []
        for group in dict.fromkeys(self.groups):
            ranks = slice(group.first, group.end)
            parts, hashes = (receipts or [])[ranks], (blocks or [])[ranks]
            self._check_places(parts, parts[0].segments)
            path, file = self.shards / f"node_{group.first:05d}.h5", None
            if group.start < group.stop:
                with file_errors(path):
                    size = path.stat().st_size
                name = f"{self.shards.name}/{path.name}"
                file = FileProof(name, size, group.start, group.stop, tuple(chain.from_iterable(hashes)))
            found.append(Receipt(group.start, group.stop, (), file))
        return header, found

    def publish_shared(self, headers: list[Any] | None, blocks: list[Any] | None) -> None:
        """Publish the file of all ranks."""
        header = (headers or [None])[0]
        found = tuple(block for part in blocks or [] for block in part)
        with file_errors(self.first):
            size = self.first.stat().st_size
        self._publish(header, "single", [FileProof(self.path.name, size, 0, header.rows, found)])

    def publish_single(self, checked: tuple[CheckpointHeader, list[Receipt]]) -> None:
        """Publish the only rank's file."""
        header, receipts = checked
        self._publish(header, "single", [receipt.file for receipt in receipts if receipt.file is not None])

    def publish_shards(self, checked: tuple[CheckpointHeader, list[Receipt]]) -> None:
        """Write the master file of the shards and publish both."""
        header, receipts = checked
        files = [receipt.file for receipt in receipts if receipt.file is not None]
        for file in files:
            check_size(self.path.parent, file)
        master = plan_master(header, [(file.name, file.start, file.stop) for file in files])
        self._write_small(self.first, master)
        with file_errors(self.shards, "sync"):
            fsync_folder(self.shards)
        first = FileProof(self.path.name, len(master), 0, 0, _checksums(master))
        self._publish(header, "sharded", [first, *files])

    def _publish(self, header: CheckpointHeader, layout: str, files: list[FileProof]) -> None:
        self._write_small(self.proof, render_manifest(Manifest(header, layout, tuple(files))))
        with file_errors(self.path, "publish"):
            publish(self.path, self.first, self.proof)
            self.published = True
            settle(self.path)
        # What cannot be removed now is tried again after the next one.
        with contextlib.suppress(CheckpointFileError):
            retain(self.path.parent, self.options.keep, self.options.keep_every)

    def _write_small(self, path: Path, data: bytes) -> None:
        with file_errors(path, "write"), path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def take_back(self) -> None:
        """Remove what this rank has written, after all ranks know that the attempt failed. Collective."""
        if self.team.bcast(self.published):
            # The checkpoint has its name already; the failure came after that.
            return
        with contextlib.suppress(OSError):
            self.shard.unlink(missing_ok=True)
        self.team.barrier()
        if self.team.rank == 0:
            for path in (self.first, self.proof):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            shutil.rmtree(self.shards, ignore_errors=True)


@contextlib.contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    """Open a file to write and read; errors with it inside the block become errors of the checkpoint."""
    with file_errors(path, "write"):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _checksums(data: bytes) -> tuple[str, ...]:
    starts = range(0, len(data), BLOCK_BYTES)
    return tuple(xxhash.xxh3_128_hexdigest(data[start : start + BLOCK_BYTES]) for start in starts)
