"""Samples of arrays as an HDF5 file that survives a kill at any moment.

An HDF5 file that is open for writing when its process dies is lost, or marked as open for ever (SWMR mode
does not change that). So none is ever changed in place. Each sample is first appended to a journal,
``.NAME.journal`` beside the file, as a record with a checksum; a kill can tear only the last record. From
time to time the journal is folded: the HDF5 file is copied, the journal's samples are added to the copy, and
the copy replaces the file by fsync and rename; only then is the journal emptied. A kill at any of these
moments leaves an intact HDF5 file and a journal that together hold every sample; those that are in both are
recognised by their step. A fold happens when the journal has reached half the size of the file (and at each
flush while the file is small), so that all copying together costs a small multiple of what is written.
Closing folds the rest and removes the journal.

HDF5's structures have checksums (its file format of 1.10), the arrays too (Fletcher-32): damage is an error,
where it could be a segmentation fault or other values. Files of earlier versions have none.

The HDF5 file, for any tool::

    /                attributes: format "rustsim-hpc samples", version 1, every
    /step            (samples,)       int64    step index of each sample
    /time            (samples,)       float64  its time
    /NAME            (samples, ...)   the array's dtype; one dataset an array, first axis = sample
    /rows            (rows,)          int64    only for sampled columns: the global row of each entry
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rustsim_hpc.files import (
    AppendFile,
    open_regular,
    publish,
    require_regular,
    temporary_path,
    write_atomic,
)
from rustsim_hpc.run_folder.sample_journal import (
    Array,
    JournalRecord,
    Layout,
    journal_path,
    layout_of,
    pack_record,
    scan_journal,
)

FORMAT = "rustsim-hpc samples"
VERSION = 1
SMALL_FILE = 16 << 20
"""Up to this many bytes an HDF5 file is written anew at every flush."""

LARGE_JOURNAL = 32 << 20
"""From this many bytes on a journal may be folded between flushes."""

_CHECKSUMMED = ("v110", "v110")
"""HDF5's bounds of the file format: from 1.10 on, all its structures have checksums."""

_BATCH = 16 << 20
_CHUNK = 64 << 10
_LARGEST_CHUNK = 4 << 20
_ALWAYS: Layout = (("step", "<i8", ()), ("time", "<f8", ()))


class ArrayFile:
    """The writer of one HDF5 file of samples; ``last_step`` is the step of its newest one."""

    def __init__(self, path: Path, every: int, fixed: Mapping[str, Array] | None = None) -> None:
        self.path = path
        self.every = every
        self.last_step: int | None = None
        self._fixed = dict(fixed or {})
        self._journal: AppendFile | None = None
        self._layout: Layout | None = None

    def start(self) -> None:
        """Begin without samples, in place of any old file.

        Raises:
            OSError: it cannot be written.
        """
        self._journal = _open_journal(self.path, 0)
        write_atomic(self.path, self._empty_image())
        self.last_step = self._layout = None

    def resume(self, step: int) -> npt.NDArray[np.int64]:
        """Continue after ``step``: later samples, and a torn one, are cut off; return the steps kept.

        Raises:
            OSError: it cannot be read or written.
            ValueError: the HDF5 file is not one of samples.
        """
        stored, layout = _stored(self.path)
        # The journal first: if the file were cut first, a kill in between would leave a gap.
        end, journaled = 0, []
        for record in scan_journal(journal_path(self.path)):
            if record.step > step:
                break
            end, layout = record.end, record.layout
            if not len(stored) or record.step > stored[-1]:
                journaled.append(record.step)
        self._journal = _open_journal(self.path, end if journaled else 0)
        if len(stored) and stored[-1] > step:
            stored = stored[stored <= step]
            self._rewrite(keep=len(stored))
        self._layout = layout
        steps = np.concatenate([stored, np.array(journaled, np.int64)])
        self.last_step = int(steps[-1]) if len(steps) else None
        return steps

    def append(self, step: int, time: float, arrays: Mapping[str, Array]) -> None:
        """Add one sample of arrays that `checked_array` made; names, dtypes and shapes as in the first one.

        Raises:
            OSError: it cannot be written.
            ValueError: an array has another shape or dtype than before, or there are others.
        """
        if self._journal is None:
            raise ValueError(f"{self.path} is not open")
        layout = layout_of(arrays)
        _check_layout(layout, self._layout)
        self._journal.append(*pack_record(step, time, arrays))
        self._layout = layout
        self.last_step = step
        if self._journal.size >= max(LARGE_JOURNAL, _size(self.path) // 2):
            self._fold(self._journal)

    def flush(self) -> None:
        """Make all samples durable, and fold where that is cheap.

        Raises:
            OSError: the disk fails, or there is no room for the new HDF5 file; all samples are still there.
        """
        if self._journal is None or self._journal.size == 0:
            return
        if _size(self.path) <= SMALL_FILE or self._journal.size >= _size(self.path) // 2:
            self._fold(self._journal)
        else:
            self._journal.sync()

    def close(self) -> None:
        """Put all samples into the HDF5 file and remove the journal; closing twice is allowed.

        Raises:
            OSError: there is no room for the new HDF5 file; the journal then stays and loses nothing.
        """
        if self._journal is None:
            return
        journal, self._journal = self._journal, None
        try:
            if journal.size:
                self._fold(journal)
        finally:
            journal.close()
        journal_path(self.path).unlink(missing_ok=True)

    def _fold(self, journal: AppendFile) -> None:
        """Move the journal's samples into the HDF5 file."""
        self._rewrite(keep=None)
        # Until here they are in both, and the journal's are ignored.
        journal.truncate(0)

    def _rewrite(self, keep: int | None) -> None:
        """Replace the HDF5 file: cut to ``keep`` samples, or (None) with the journal's added."""
        temporary = temporary_path(self.path)
        try:
            shutil.copyfile(self.path, temporary)
            if keep is None:
                _reserve(temporary, self._size_after_fold())
            _change(temporary, keep, journal_path(self.path))
            publish(temporary, self.path)
        except (OSError, RuntimeError) as error:
            raise _plain(error, self.path) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _size_after_fold(self) -> int:
        """Return an upper bound of the HDF5 file's size with the journal's samples in it."""
        layout = (*_ALWAYS, *(self._layout or ()))
        chunks = sum(np.dtype(dtype).itemsize * math.prod(_chunk(dtype, shape)) for _, dtype, shape in layout)
        tables = (16 << 10) * len(layout)
        journal = _size(journal_path(self.path))
        return _size(self.path) + journal + journal // 4 + 2 * chunks + tables

    def _empty_image(self) -> bytes:
        """Return the bytes of an HDF5 file without samples."""
        import h5py

        # In memory: HDF5 cannot recover from a failed write to a disk (see `_reserve`).
        with h5py.File("empty", "w", driver="core", backing_store=False, libver=_CHECKSUMMED) as file:
            file.attrs["format"] = FORMAT
            file.attrs["version"] = VERSION
            file.attrs["every"] = self.every
            for name, array in self._fixed.items():
                chunk = {"chunks": (min(len(array), _CHUNK),), "fletcher32": True} if len(array) else {}
                file.create_dataset(name, data=array, **chunk)
            _create_sampled(file, _ALWAYS)
            file.flush()
            return bytes(file.id.get_file_image())


def _reserve(path: Path, size: int) -> None:
    """Make the file ``size`` bytes long, on the disk, before HDF5 opens it.

    When HDF5 cannot write, it keeps the file open for ever and may end the process with a segmentation fault.
    So the room must be there before; closing cuts the file to what is used.
    """
    if hasattr(os, "posix_fallocate"):
        descriptor = open_regular(path, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)


def _change(temporary: Path, keep: int | None, journal: Path) -> None:
    import h5py

    with h5py.File(temporary, "r+", locking=False, libver=_CHECKSUMMED) as file:
        if keep is not None:
            for name in _sampled(file):
                file[name].resize(keep, axis=0)
            return
        newest = int(file["step"][-1]) if len(file["step"]) else -1
        for batch in _batches(r for r in scan_journal(journal) if r.step > newest):
            _extend(file, batch)


def _chunk(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the chunk of a dataset of samples: many small samples, or a part of a large one."""
    size = np.dtype(dtype).itemsize
    chunk: list[int] = []
    for extent in reversed(shape):
        # Equal parts: a chunk that extends past the end is padded in the file.
        parts = -(-max(1, extent) // max(1, _LARGEST_CHUNK // size))
        chunk.insert(0, -(-max(1, extent) // parts))
        size *= chunk[0]
    return (min(1024, max(1, _CHUNK // size)), *chunk)


def _create_sampled(file: Any, layout: Layout) -> None:
    for name, dtype, shape in layout:
        limits = (None, *(extent or None for extent in shape))
        chunk = _chunk(dtype, shape)
        dataset = file.create_dataset(
            name, (0, *shape), dtype, chunks=chunk, maxshape=limits, fletcher32=True
        )
        dataset.dims[0].label = "sample"


def _batches(records: Iterator[JournalRecord]) -> Iterator[list[JournalRecord]]:
    """Yield the records in lists of about `_BATCH` bytes: few writes, little memory."""
    batch: list[JournalRecord] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.payload) + 1024
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_samples(path: Path) -> dict[str, Array]:
    """Read a file of samples with its journal, also while it is being written.

    Returns:
        ``step`` (int64) and ``time`` (float64), one a sample; each array by name, first axis = sample; and
        the constant arrays of the file (``rows``).

    Raises:
        OSError: it cannot be read, or is not there.
        ValueError: it is not a file of samples.
    """
    for _ in range(3):
        # The journal first: a fold in between then shows samples twice rather than losing them.
        records = list(scan_journal(journal_path(path)))
        arrays, every = _read_file(path)
        steps = arrays["step"]
        fresh = [r for r in records if not len(steps) or r.step > steps[-1]]
        # A gap shows a run that is being cut back for a resume at this moment.
        if not (len(steps) and fresh) or fresh[0].step == steps[-1] + every:
            break
    return _joined(arrays, fresh)


def _joined(arrays: dict[str, Array], fresh: list[JournalRecord]) -> dict[str, Array]:
    if not fresh:
        return arrays
    added: dict[str, list[Array]] = {"step": [], "time": []}
    for record in fresh:
        added["step"].append(np.array(record.step, np.int64))
        added["time"].append(np.array(record.time, np.float64))
        for name, array in record.arrays().items():
            added.setdefault(name, []).append(array)
    for name, samples in added.items():
        more = np.stack(samples)
        arrays[name] = np.concatenate([arrays[name], more]) if name in arrays else more
    return arrays


def _read_file(path: Path) -> tuple[dict[str, Array], int]:
    with _opened(path) as file:
        return {name: np.asarray(file[name][()]) for name in file}, int(file.attrs["every"])


def _stored(path: Path) -> tuple[npt.NDArray[np.int64], Layout | None]:
    """Return the steps in an HDF5 file of samples, and the layout of a sample, None without samples."""
    with _opened(path) as file:
        names = sorted(set(_sampled(file)) - {"step", "time"})
        layout = tuple((name, file[name].dtype.str, tuple(file[name].shape[1:])) for name in names)
        return np.asarray(file["step"][()], np.int64), layout or None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file of samples for reading.

    Raises:
        OSError: it cannot be read, by the system or by HDF5.
        ValueError: it is not a file of samples.
    """
    import h5py

    require_regular(path)
    try:
        with h5py.File(path, "r", locking=False) as file:
            _check_format(file)
            yield file
    except OSError as error:
        raise _plain(error, path) from error
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:  # h5py's answers to damage
        raise ValueError(f"it is damaged: {' '.join(str(error).split())}") from error


def _check_format(file: Any) -> None:
    if file.attrs.get("format") != FORMAT:
        raise ValueError("it is not a file of samples")
    if file.attrs.get("version") != VERSION:
        raise ValueError(f"its format has version {file.attrs.get('version')}, expected {VERSION}")


def _sampled(file: Any) -> list[str]:
    return [name for name in file if name != "rows"]


def _extend(file: Any, batch: list[JournalRecord]) -> None:
    start = len(file["step"])
    _create_sampled(file, tuple(entry for entry in batch[0].layout if entry[0] not in file))
    for name, values in _joined({}, batch).items():
        dataset = file[name]
        dataset.resize(start + len(batch), axis=0)
        dataset[start:] = values


def _check_layout(layout: Layout, before: Layout | None) -> None:
    if before is None or layout == before:
        return
    known = {name: (dtype, shape) for name, dtype, shape in before}
    for name, dtype, shape in layout:
        if name in known and known[name] != (dtype, shape):
            was = f"{np.dtype(known[name][0])} {known[name][1]}"
            raise ValueError(f'array "{name}" is {np.dtype(dtype)} {shape}, in the samples before {was}')
    names = ", ".join(name for name, _, _ in layout)
    raise ValueError(f"the arrays are {names or 'none'}, in the samples before {', '.join(known)}")


def _open_journal(path: Path, size: int) -> AppendFile:
    journal = AppendFile(journal_path(path))
    if journal.size > size:
        journal.truncate(size)
    return journal


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _plain(error: OSError | RuntimeError, path: Path) -> OSError:
    """Return an error of HDF5, which has many lines and is not always an OSError, as a plain OSError."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    found = re.search(r"errno = (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number) if found else " ".join(str(error).split()), str(path))
