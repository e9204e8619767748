"""Files that are complete or absent: atomic replacement, and appending of whole records.

No file of a run's folder is ever incomplete under its final name. Files are replaced by way of a temporary
name in the same folder, fsync, rename, and fsync of the folder. Files that grow (CSV, JSON lines, journals)
are appended record by record: a record that does not fit on the disk is removed again, and one that is
incomplete after a kill is cut off at the next start.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

TEMPORARY_SUFFIX = ".rustsim-tmp"
"""Suffix of the names of unfinished files, which are never read."""


class NotAFileError(OSError):
    """A path is not a regular file: opening a pipe could block, reading a device might never end."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.EINVAL, "it is not a regular file", str(path))

    def __reduce__(self) -> tuple[type[NotAFileError], tuple[Path]]:
        return type(self), (Path(self.filename),)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file and return its descriptor; use it for all files that others may have created.

    Raises:
        NotAFileError: it is a pipe, a device or a socket; never blocks on one.
        OSError: it is a folder, or cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        # ENXIO: a socket, or a pipe without a reader opened for writing.
        if error.errno == errno.ENXIO:
            raise NotAFileError(path) from error
        raise
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise NotAFileError(path)


# Where the system reports an error, such as a name too long, these return False; the methods of Path raise.


def exists(path: Path) -> bool:
    """Return whether a path exists."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: Path) -> bool:
    """Return whether a path is a regular file."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder."""
    return os.path.isdir(path)  # noqa: PTH112


def require_regular(path: Path) -> None:
    """Check that a path is a regular file, for libraries that open files by name and could block.

    Raises:
        OSError: as `open_regular`.
    """
    os.close(open_regular(path))


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: as `open_regular`, or it cannot be read.
    """
    with open(open_regular(path), "rb") as file:
        return file.read()


def read_json(path: Path) -> Any:
    """Return the parsed content of a regular JSON file.

    Raises:
        OSError: as `read_bytes`.
        ValueError: as `parse_json`.
    """
    return parse_json(read_bytes(path))


def parse_json(text: bytes | str) -> Any:
    """Return a parsed JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def temporary_path(path: Path) -> Path:
    """Return a new hidden name beside ``path``, for a file that will be renamed to it."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def sweep_temporary(folder: Path) -> list[Path]:
    """Remove temporary files that killed writers left in ``folder``, and return their paths.

    Only the folder's single writer may call this: the unfinished file of a running writer would be removed
    too. Folders are never removed.
    """
    named = sorted(folder.glob(f".*{TEMPORARY_SUFFIX}"))
    found = [path for path in named if path.is_symlink() or not path.is_dir()]
    for path in found:
        path.unlink(missing_ok=True)
    return found


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` durable.

    Raises:
        OSError: the folder cannot be opened or synced; a file system without fsync of folders is no error.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Make a finished temporary file durable and rename it to ``path``.

    Raises:
        OSError: it cannot be synced or renamed; the temporary file is then still there.
    """
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    fsync_folder(path.parent)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that is renamed to ``path`` when the block succeeds, and removed when it raises.

    Raises:
        NotAFileError: ``path`` is a pipe, device or socket, which would be replaced.
        OSError: it cannot be written; an existing file is unchanged.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise NotAFileError(path)
    temporary = temporary_path(path)
    try:
        # Not mkstemp: its mode 0600 would hide a run's files from the group that shares the folder.
        with temporary.open("xb") as file:
            yield file
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace the content of ``path`` by ``data`` (text as UTF-8), completely or not at all.

    Raises:
        OSError: it cannot be written; an existing file is unchanged.
    """
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


class AppendFile:
    """A file that grows by whole records and is readable while it grows.

    Every record goes to the operating system at once, so a killed process loses none for which `append`
    returned; `sync` makes them survive a crash of the machine as well.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` for appending, and create it if it does not exist.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
        self._descriptor = open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        self.size = os.fstat(self._descriptor).st_size

    def append(self, *parts: bytes | memoryview) -> None:
        """Append the parts as one record, completely or not at all.

        Raises:
            OSError: the disk is full or fails; the file is truncated to its previous size.
        """
        written = 0
        try:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    count = os.write(self._descriptor, view)
                    written += count
                    view = view[count:]
        except BaseException:
            # A second failure is ignored: the incomplete end is cut off when the file is next opened.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.size)
            raise
        self.size += written

    def truncate(self, size: int) -> None:
        """Truncate the file to ``size`` bytes.

        Raises:
            OSError: the disk fails.
        """
        os.ftruncate(self._descriptor, size)
        self.size = size

    def sync(self) -> None:
        """Make all records durable.

        Raises:
            OSError: the disk fails.
        """
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the complete lines of a file without their newline; an incomplete last line is ignored.

    Raises:
        OSError: it cannot be read.
    """
    with open(open_regular(path), "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line[:-1]


def keep_lines(path: Path, count: int) -> None:
    """Truncate a file to its first ``count`` complete lines, atomically; a file without more is unchanged.

    Raises:
        OSError: it cannot be read or written; it is unchanged.
    """
    size = 0
    with open(open_regular(path), "rb") as file:
        for number, line in enumerate(file):
            if number == count or not line.endswith(b"\n"):
                break
            size += len(line)
        if size == os.fstat(file.fileno()).st_size:
            return
        file.seek(0)
        with atomic_file(path) as copy:
            left = size
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                copy.write(block)
                left -= len(block)
