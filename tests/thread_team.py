"""A team of threads in one process: many ranks for tests of what is written against `Team` alone."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
_PATIENCE = 30.0


class _World:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=_PATIENCE)
        self.slots: list[Any] = [None] * size


class ThreadTeam:
    """One rank of a world of threads. A rank that stays away from a collective breaks it for all."""

    native = None
    waiting = False
    broken = False
    leaving: Any = None

    def __init__(self, world: _World, rank: int) -> None:
        self._world, self.rank, self.size = world, rank, len(world.slots)
        self.node_rank, self.node_size, self.host = self.rank, self.size, "threads"

    def mpi_info(self, hints: Mapping[str, str]) -> None:
        return None

    def _exchange(self, value: Any) -> list[Any]:
        self._world.slots[self.rank] = copy.deepcopy(value)
        self._world.barrier.wait()
        found = list(self._world.slots)
        self._world.barrier.wait()
        return found

    def sum_int64(self, array: NDArray[np.int64]) -> NDArray[np.int64]:
        terms = np.array(self._exchange(array)).view(np.uint64)
        array[...] = np.sum(terms, axis=0, dtype=np.uint64).view(np.int64)
        return array

    def gather(self, value: T) -> list[T] | None:
        found = self._exchange(value)
        return found if self.rank == 0 else None

    def allgather(self, value: T) -> list[T]:
        return self._exchange(value)

    def bcast(self, value: T, root: int = 0) -> T:
        found: T = self._exchange(value)[root]
        return found

    def barrier(self) -> None:
        self._world.barrier.wait()

    def node_barrier(self) -> None:
        self._world.barrier.wait()

    def chain(self, value: int, fn: Callable[[int], int]) -> int:
        running = self.bcast(value)
        for rank in range(self.size):
            running = self.bcast(fn(running) % 2**64 if rank == self.rank else 0, rank)
        return running

    def node_shared_array(self, array: NDArray[Any] | None) -> NDArray[Any]:
        shared: NDArray[Any] = self.bcast(array)  # type: ignore[assignment]
        shared.flags.writeable = False
        return shared

    def abort(self, code: int, message: str) -> NoReturn:
        os._exit(code)


def run_ranks(size: int, function: Callable[[ThreadTeam], T]) -> list[T]:
    """Call `function` as every rank of a new world; return the results by rank, or raise a failure."""
    world = _World(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(function, ThreadTeam(world, rank)) for rank in range(size)]
    return [future.result() for future in futures]
