"""Arrays in one anonymous shared mapping, which a process passes to its child processes."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from rustsim_hpc.errors import ColumnMemoryError, message_of
from rustsim_hpc.state.backing import anonymous_file, claim

Array = np.ndarray[Any, Any]

_LINE = 64


@dataclass(frozen=True)
class ArraysLayout:
    """What another process needs to map the arrays; picklable.

    Attributes:
        arrays: (dtype, shape) of each array.
        fd: descriptor of the anonymous file, for ``subprocess.Popen(pass_fds=...)``.
    """

    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    fd: int


class SharedArrays:
    """Zero-initialised arrays in one shared mapping, each aligned to a cache line.

    Attributes:
        layout: what another process needs to map them.
        arrays: the arrays; they keep the mapping alive after :meth:`close`.

    Raises:
        ColumnMemoryError: the memory cannot be allocated or mapped.
    """

    def __init__(self, shapes: Iterable[tuple[str, tuple[int, ...]]], *, _fd: int | None = None) -> None:
        wanted = tuple(shapes)
        ends = list(_ends(wanted))
        total = max(ends[-1] if ends else 0, mmap.PAGESIZE)
        fd = _new_file(total) if _fd is None else _fd
        self._close = weakref.finalize(self, os.close, fd)
        self._close.atexit = False
        self.layout = ArraysLayout(wanted, fd)
        try:
            area = np.frombuffer(mmap.mmap(fd, total, mmap.MAP_SHARED), np.uint8)
        except (OSError, ValueError) as error:
            self.close()
            raise _shortage(total, error) from error
        self.arrays: list[Array] = [
            area[end - _room(dtype, shape) :][: _size(dtype, shape)].view(dtype).reshape(shape)
            for end, (dtype, shape) in zip(ends, wanted, strict=True)
        ]

    @classmethod
    def attach(cls, layout: ArraysLayout) -> Self:
        """Map the arrays of a parent process that passed ``layout.fd`` on, and own the descriptor."""
        return cls(layout.arrays, _fd=layout.fd)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._close()


def _size(dtype: str, shape: Sequence[int]) -> int:
    return int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))


def _room(dtype: str, shape: Sequence[int]) -> int:
    return -(-_size(dtype, shape) // _LINE) * _LINE


def _ends(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Iterable[int]:
    end = 0
    for dtype, shape in shapes:
        end += _room(dtype, shape)
        yield end


def _new_file(size: int) -> int:
    try:
        fd = anonymous_file()
    except OSError as error:
        raise _shortage(size, error) from error
    try:
        os.ftruncate(fd, size)
        claim(fd, 0, size)
    except (OSError, OverflowError) as error:
        os.close(fd)
        raise _shortage(size, error) from error
    return fd


def _shortage(size: int, error: Exception) -> ColumnMemoryError:
    return ColumnMemoryError(f"cannot get {size:,} bytes of shared memory for workers: {message_of(error)}")
