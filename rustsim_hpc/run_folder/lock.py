"""The lock of a run's folder: one writer, and it ends with the processes that hold it.

Two flock locks, on two small files that are never removed or replaced::

    .lock         exclusive: rank 0 and, by the inherited descriptor, its workers
    .lock.ranks   shared: the other ranks and their workers

A lock belongs to an open file description: it lasts until the last process with the descriptor has ended, in
whatever order and way they end. A new run needs the exclusive lock on ``.lock`` and must find ``.lock.ranks``
unlocked, so a single remaining rank or worker of a run keeps it out. One file would not do: converting an
exclusive lock to a shared one is not atomic everywhere, and a new run could take it in between. The holder of
``.lock`` writes a token into it; a rank that joins too late, when another run has the folder, finds another
token and leaves.

Ranks on several machines see each other's locks if the file system supports flock: NFS from Linux 2.6.12 on
(as byte-range locks of the server), Lustre mounted with ``flock``, GPFS. Lustre's ``localflock`` separates
runs on each machine only. Without any flock the run goes on without a lock and warns.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from rustsim_hpc.errors import RunFolderError
from rustsim_hpc.files import open_regular, read_json

OWNER = ".lock"
RANKS = ".lock.ranks"
WAIT_SECONDS = 5.0
"""How long a new run waits for one that is ending."""

_POLL_SECONDS = 0.05
_held: set[int] = set()
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class FolderLock:
    """A process's hold on a run's folder; make one by `claim` (rank 0) or `join` (other ranks).

    Attributes:
        token: identifies the lock of this run to all its ranks.
        descriptors: those that a worker process must inherit (``pass_fds``) to hold the lock as well.
    """

    def __init__(self, token: str, descriptor: int) -> None:
        self.token = token
        self.descriptors: tuple[int, ...] = (descriptor,)
        _held.add(descriptor)

    @classmethod
    def claim(cls, folder: Path, wait_seconds: float = WAIT_SECONDS) -> Self:
        """Take the folder for a run; rank 0 does this before the others join.

        Raises:
            RunFolderError: another run has it, and still had it after ``wait_seconds``.
            OSError: the lock's files cannot be made.
        """
        deadline = time.monotonic() + wait_seconds
        descriptor = _wait(folder, OWNER, fcntl.LOCK_EX, deadline)
        try:
            os.close(_wait(folder, RANKS, fcntl.LOCK_EX, deadline))
            token = secrets.token_hex(8)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            holder = {"token": token, "pid": os.getpid(), "host": socket.gethostname(), "since": now}
            # Written in place: a renamed file would be another lock.
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(token, descriptor)

    @classmethod
    def join(cls, folder: Path, token: str, wait_seconds: float = WAIT_SECONDS) -> Self:
        """Hold the folder together with the rank that claimed it and got ``token``.

        Raises:
            RunFolderError: the folder is no longer that rank's, or does not show up here.
            OSError: the lock's files cannot be opened.
        """
        descriptor = _wait(folder, RANKS, fcntl.LOCK_SH, time.monotonic() + wait_seconds)
        if read_holder(folder).get("token") != token:
            os.close(descriptor)
            raise RunFolderError(
                f"the folder {folder} is not the one that rank 0 locked: {holder_text(folder)} has it",
                hint="all ranks must see the run's folder on one file system",
            )
        return cls(token, descriptor)

    def release(self) -> None:
        """Release the folder; workers that inherited the lock hold it until they end."""
        for descriptor in self.descriptors:
            _held.discard(descriptor)
            with contextlib.suppress(OSError):  # a model that closes what is not its own
                os.close(descriptor)
        self.descriptors = ()


def _let_go_in_child() -> None:
    """Close the descriptors in a process that a model has forked: it is no rank or worker of the run."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def read_holder(folder: Path) -> dict[str, object]:
    """Return what the newest run wrote into the lock: token, pid, host, since; empty if there was none."""
    try:
        holder = read_json(folder / OWNER)
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def holder_text(folder: Path) -> str:
    """Return who has, or last had, the folder, for an error's text."""
    holder = read_holder(folder)
    if "pid" not in holder:
        return "another run"
    return f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')}"


def is_locked(folder: Path) -> bool:
    """Return whether a process holds the folder at this moment."""
    for name, kind in ((OWNER, fcntl.LOCK_SH), (RANKS, fcntl.LOCK_EX)):
        try:
            descriptor = open_regular(folder / name, os.O_RDWR)
        except OSError:
            # Missing or not writable: whether it is locked cannot be found out.
            continue
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            continue
        finally:
            os.close(descriptor)
    return False


def _wait(folder: Path, name: str, kind: int, deadline: float) -> int:
    """Return a descriptor that holds the lock on a lock file, or raise at the deadline."""
    while True:
        try:
            descriptor = open_regular(folder / name, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            # On a network file system another machine sees a new folder a little later.
            descriptor = -1
            if time.monotonic() >= deadline:
                raise
        if descriptor >= 0:
            try:
                if _lock(descriptor, kind, folder) and _is_file(descriptor, folder / name):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        if time.monotonic() >= deadline:
            raise RunFolderError(
                f"the folder {folder} is in use by {holder_text(folder)}",
                hint="wait until that run has ended, or give another folder with --out",
            )
        time.sleep(_POLL_SECONDS)


def _lock(descriptor: int, kind: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        sys.stderr.write(
            f"warning: no file locks in {folder} ({error.strerror}): start no second run in it\n"
        )
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    """Return whether the descriptor is still the file of that name: the folder may have been recreated."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
