"""The ranks of one run, and the few collectives that a control plane needs of them.

`SoloTeam` is one process and imports no MPI. `MpiTeam` is MPI through mpi4py, which only this module
imports, and only under a launcher. Every method of a team but `abort` is collective: all ranks call it, in
one order. What goes wrong on one rank between two collectives is told to all by `agree`, so that nobody
waits for a rank that left.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar, runtime_checkable

import numpy as np

from rustsim_hpc.errors import LauncherError, TeamError
from rustsim_hpc.ranks.agreement import agree, agree_hash
from rustsim_hpc.ranks.launcher import (
    Launcher,
    check_shared_memory,
    crossed,
    detect_launcher,
    must_end,
    no_mpi,
    why_not_shared,
)
from rustsim_hpc.ranks.leaving import Leaving, goodbye, last_words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

__all__ = ["Launcher", "MpiTeam", "SoloTeam", "Team", "agree", "agree_hash", "detect_launcher"]
__all__ += ["end_mpi", "open_team"]

T = TypeVar("T")
_U64 = (1 << 64) - 1
_NOT_OPEN_MPI = ("MPICH", "MVAPICH", "Intel")


@runtime_checkable
class Team(Protocol):
    """The ranks of a run: `rank` of `size` in all, `node_rank` of `node_size` on this machine, `host`.

    waiting: whether this rank is in a collective at this moment, for a watchdog to see.
    broken: whether a collective has failed here, so that the other ranks may be gone, or wait for ever.
    leaving: how the ranks leave together when one cannot go on; None where they are no processes.
    """

    rank: int
    size: int
    node_rank: int
    node_size: int
    host: str
    waiting: bool
    broken: bool
    leaving: Leaving | None

    @property
    def native(self) -> Any:
        """The mpi4py communicator for a library that takes one (parallel HDF5), None without MPI."""

    def mpi_info(self, hints: Mapping[str, str]) -> Any:
        """Return hints as an mpi4py Info, for a library that takes `native`; None without MPI."""

    def sum_int64(self, array: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add up `array` (int64, contiguous) over ranks element by element mod 2^64, in place; return it."""

    def gather(self, value: T) -> list[T] | None:
        """Return every rank's `value` (small, picklable) by rank on rank 0, None elsewhere."""

    def allgather(self, value: T) -> list[T]:
        """Return every rank's `value` (small, picklable) by rank."""

    def bcast(self, value: T, root: int = 0) -> T:
        """Return `value` (small, picklable) of rank `root`."""

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    def node_barrier(self) -> None:
        """Wait until all ranks of this machine are here."""

    def exscan_int(self, value: int) -> int:
        """Return the sum of `value` over the ranks before this one: 0 on rank 0. All within int64."""

    def chain(self, value: int, fn: Callable[[int], int]) -> int:
        """Pass rank 0's `value` (uint64) along the ranks, each applying `fn`; return the last result on all.

        Raises:
            TeamError: `fn` raised on another rank. Where it raised, that error comes out, when all have
            heard.
        """

    def node_shared_array(self, array: NDArray[Any] | None) -> NDArray[Any]:
        """Return a read-only array that exists once a machine, filled from `array` of its node_rank 0.

        The other ranks' `array` is not looked at. It lives until the process ends.

        Raises:
            TeamError: it has no fixed-size dtype, or a machine has no room for it; on all ranks.
        """

    def abort(self, code: int, message: str) -> NoReturn:
        """Write one line to standard error and end all ranks with exit status `code`. One rank may do so.

        The launcher ends with `code` too where the others hear of it (a watchdog listens on each); else at
        times with that of the ranks that it had to kill.
        """


class SoloTeam:
    """One process that is the whole run."""

    rank = 0
    size = 1
    node_rank = 0
    node_size = 1
    native = None
    waiting = False
    broken = False
    leaving: Leaving | None = None

    def __init__(self) -> None:
        self.host = socket.gethostname()

    def mpi_info(self, hints: Mapping[str, str]) -> None:
        """Return None."""

    def sum_int64(self, array: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return `array` as it is."""
        return array

    def gather(self, value: T) -> list[T] | None:
        """Return `[value]`."""
        return [value]

    def allgather(self, value: T) -> list[T]:
        """Return `[value]`."""
        return [value]

    def bcast(self, value: T, root: int = 0) -> T:  # noqa: ARG002
        """Return `value`."""
        return value

    def barrier(self) -> None:
        """Return at once."""

    def node_barrier(self) -> None:
        """Return at once."""

    def exscan_int(self, value: int) -> int:  # noqa: ARG002
        """Return 0."""
        return 0

    def chain(self, value: int, fn: Callable[[int], int]) -> int:
        """Return `fn(value)`."""
        return fn(value)

    def node_shared_array(self, array: NDArray[Any] | None) -> NDArray[Any]:
        """Return a read-only view of `array`."""
        if array is None:
            raise TeamError(message="the only rank of a machine must bring the array that is shared on it")
        view = array.view()
        view.flags.writeable = False
        return view

    def abort(self, code: int, message: str) -> NoReturn:
        """Write one line to standard error and end the process with `code`."""
        last_words(message)
        os._exit(code)


class MpiTeam:
    """The ranks of an MPI communicator.

    It is duplicated, so that a model's own messages cannot meet the engine's. The process should leave
    together with the others: MPI's finalisation at exit waits for them. A rank that has to leave alone
    calls `abort`.
    """

    def __init__(self, communicator: Any) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = communicator.Dup()
        self._node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self.node_rank: int = self._node.Get_rank()
        self.node_size: int = self._node.Get_size()
        self.host = socket.gethostname()
        self.waiting = False
        self.broken = False
        key = self._comm.bcast(secrets.token_hex(8))
        self.leaving: Leaving | None = Leaving(self.rank, self.size, key) if self.size > 1 else None
        self._windows: list[Any] = []
        self._link = np.zeros(2, np.uint64)
        # Looked up once: the allreduce is in every step, and attribute look-ups would be a tenth of it.
        self._allreduce = self._comm.Allreduce
        self._in_place, self._sum_type, self._failure = MPI.IN_PLACE, MPI.UINT64_T, MPI.Exception

    @property
    def native(self) -> Any:
        """The mpi4py communicator."""
        return self._comm

    def mpi_info(self, hints: Mapping[str, str]) -> Any:
        """Return hints as an mpi4py Info."""
        info = self._mpi.Info.Create()
        for name, value in hints.items():
            info.Set(name, value)
        return info

    def sum_int64(self, array: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add up `array` over ranks mod 2^64, in place; return it."""
        self.waiting = True
        try:
            # Unsigned: there overflow is defined. Count and type are said, which saves mpi4py asking the
            # array.
            self._allreduce(self._in_place, (array, array.size, self._sum_type))
        except self._failure as error:
            raise self._lost(error) from error
        self.waiting = False
        return array

    def gather(self, value: T) -> list[T] | None:
        """Return every rank's `value` on rank 0, None elsewhere."""
        result: list[T] | None = self._collect(self._comm.gather, value)
        return result

    def allgather(self, value: T) -> list[T]:
        """Return every rank's `value` by rank."""
        result: list[T] = self._collect(self._comm.allgather, value)
        return result

    def bcast(self, value: T, root: int = 0) -> T:
        """Return `value` of rank `root`."""
        result: T = self._collect(self._comm.bcast, value, root)
        return result

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self._collect(self._comm.Barrier)

    def node_barrier(self) -> None:
        """Wait until all ranks of this machine are here."""
        self._collect(self._node.Barrier)

    def exscan_int(self, value: int) -> int:
        """Return the sum of `value` over the ranks before this one."""
        mine, before = np.array([value], np.int64), np.zeros(1, np.int64)
        self._collect(self._comm.Exscan, mine, before)
        # MPI leaves rank 0's result undefined.
        return int(before[0]) if self.rank else 0

    def chain(self, value: int, fn: Callable[[int], int]) -> int:
        """Pass rank 0's `value` along the ranks, each applying `fn`; return the last result everywhere."""
        link, last, failure = self._link, self.size - 1, None
        link[:] = (value, 0)
        if self.rank:
            self._collect(self._comm.Recv, link, self.rank - 1)
        if not link[1]:
            try:
                link[0] = fn(int(link[0])) & _U64
            except BaseException as error:  # noqa: BLE001 (raised below, when the ranks behind know)
                failure = error
                link[1] = self.rank + 1
        if self.rank != last:
            self._collect(self._comm.Send, link, self.rank + 1)
        self._collect(self._comm.Bcast, link, last)
        if failure is not None:
            raise failure
        if link[1]:
            raise TeamError(message=f"rank {int(link[1]) - 1} failed", rank=int(link[1]) - 1)
        return int(link[0])

    def node_shared_array(self, array: NDArray[Any] | None) -> NDArray[Any]:
        """Return a read-only array that exists once a machine, filled by its rank with node_rank 0."""
        refusal = why_not_shared(array) if self.node_rank == 0 else None
        agree(self, None if refusal is None else TeamError(message=refusal))
        shape, dtype = self._collect(self._node.bcast, None if array is None else (array.shape, array.dtype))
        size = int(np.prod(shape)) * dtype.itemsize
        if size == 0:
            result = np.empty(shape, dtype)
        else:
            mine, info = size if self.node_rank == 0 else 0, self._mpi.INFO_NULL
            window = self._collect(self._mpi.Win.Allocate_shared, mine, 1, info, self._node)
            self._windows.append(window)
            memory, _ = window.Shared_query(0)
            result = np.ndarray(shape, dtype, buffer=memory)
            if self.node_rank == 0:
                result[...] = array
            self.node_barrier()
        result.flags.writeable = False
        return result

    def abort(self, code: int, message: str) -> NoReturn:
        """Write one line to standard error and end all ranks with `code`."""
        last_words(f"rank {self.rank} of {self.size} on {self.host}: {message}")
        if self.leaving is not None and self.leaving.together(code):
            goodbye()
            os._exit(code)
        self._comm.Abort(code)
        os._exit(code)

    def _collect(self, call: Callable[..., Any], *arguments: Any) -> Any:
        self.waiting = True
        try:
            return call(*arguments)
        except self._failure as error:
            raise self._lost(error) from error
        finally:
            self.waiting = False

    def _lost(self, error: BaseException) -> TeamError:
        self.waiting, self.broken = False, True
        message = f"a collective failed: {error}"
        return TeamError(message=message, rank=self.rank, host=self.host, hint="a rank was probably lost")


def open_team(environ: Mapping[str, str] | None = None) -> Team:
    """Return the team of this process: `MpiTeam` under a launcher, else `SoloTeam`, without any MPI.

    environ: in place of `os.environ`. A single task of srun needs no MPI and is a `SoloTeam`.

    Raises:
        LauncherError: there is no mpi4py or no MPI library, or MPI and the launcher count different ranks.
    """
    environ = os.environ if environ is None else environ
    launcher = detect_launcher(environ)
    if launcher is None or (launcher.name == "srun" and launcher.size == 1):
        return SoloTeam()
    mpi = _import_mpi(launcher)
    library = _library(mpi)
    if "Open MPI" in launcher.name and library.startswith(_NOT_OPEN_MPI):
        # Asked to start, this one would end the process.
        raise crossed(launcher, f"the MPI library here is {library}")
    if not mpi.Is_initialized():
        try:
            check_shared_memory(environ)
        except LauncherError as error:
            if error.rank:
                # Rank 0, which speaks, may be on another machine and know nothing of it.
                last_words(f"{error} (on {error.host})")
            raise
        # One thread calls MPI: the locks of a higher level cost a tenth of every collective.
        with must_end(f"the start of MPI ({launcher.size} ranks)"):
            mpi.Init_thread(mpi.THREAD_FUNNELED)
    world = mpi.COMM_WORLD
    if world.Get_size() != launcher.size:
        raise crossed(launcher, f"MPI here ({library}) sees {world.Get_size()}")
    return MpiTeam(world)


def _import_mpi(launcher: Launcher) -> Any:
    """Return mpi4py's MPI, not initialised yet."""
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules:
            mpi4py.rc.initialize = False
            mpi4py.rc.finalize = True
        from mpi4py import MPI
    except ImportError as error:
        raise no_mpi(launcher, f"mpi4py cannot be imported: {error}") from error
    except RuntimeError as error:
        raise no_mpi(launcher, f"there is no MPI library: {error}") from error
    return MPI


def _library(mpi: Any) -> str:
    """Return the MPI library's name and version: "MPICH 5.0.2"."""
    first = mpi.Get_library_version().split("\n", 1)[0].split(",", 1)[0]
    return " ".join(first.replace("Version:", "").split())


def end_mpi(seconds: float) -> None:
    """End MPI where it was started: its ranks wait for each other in that, but not for ever."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        with must_end("the end of MPI", seconds):
            mpi.Finalize()
