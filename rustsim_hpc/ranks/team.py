"""The ranks of a run, and the few collectives that a control plane needs.

`SoloTeam` is one process and imports no MPI. `MpiTeam` is MPI through mpi4py, which only this module
imports, and only under a launcher. Every method of a team except `abort` and `mpi_info` is collective: all
ranks call it, in the same order. A failure of one rank between two collectives is shared by `agree`, so that
no rank waits for one that has left.
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

    waiting: whether this rank is in a collective now; read by the watchdog.
    broken: whether a collective has failed here, so that other ranks may have ended, or wait forever.
    leaving: ends all ranks together when one cannot go on; None for a single rank.
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
        """The mpi4py communicator, for libraries that need one (parallel HDF5); None without MPI."""

    def mpi_info(self, hints: Mapping[str, str]) -> Any:
        """Return hints as an mpi4py Info, for libraries that need `native`; None without MPI."""

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

    def chain(self, value: int, fn: Callable[[int], int]) -> int:
        """Pass rank 0's `value` (uint64) along the ranks, each applying `fn`; return the last result on all.

        Raises:
            TeamError: `fn` raised on another rank. On that rank its own error is raised, after all ranks
            have been told.
        """

    def node_shared_array(self, array: NDArray[Any] | None) -> NDArray[Any]:
        """Return a read-only array that exists once per machine, filled from `array` of its node_rank 0.

        `array` of other ranks is ignored. The memory is kept until the process ends.

        Raises:
            TeamError: `array` is missing or holds objects, or a machine has no room for it; on all ranks.
        """

    def abort(self, code: int, message: str) -> NoReturn:
        """Write one line to standard error and end all ranks with exit status `code`; not collective.

        The launcher returns `code` too if the other ranks notice in time (their watchdogs poll for it);
        otherwise possibly the status of the ranks that it had to kill.
        """


class SoloTeam:
    """A team of one process, without MPI."""

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
        """Return `array` unchanged."""
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

    It is duplicated, so that a model's own messages cannot mix with the engine's. All processes should exit
    together: MPI's finalisation at exit waits for all of them. A rank that has to exit alone calls `abort`.
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
            # Unsigned, where overflow is defined. Passing count and type spares mpi4py from inspecting the
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
        """Return a read-only array that exists once per machine, filled by its rank with node_rank 0."""
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

    environ: replaces `os.environ`. A single task of srun needs no MPI and is a `SoloTeam`.

    Raises:
        LauncherError: no mpi4py or MPI library, launcher and MPI do not belong together or differ in the
            number of ranks, or /dev/shm is too small.
    """
    environ = os.environ if environ is None else environ
    launcher = detect_launcher(environ)
    if launcher is None or (launcher.name == "srun" and launcher.size == 1):
        return SoloTeam()
    mpi = _import_mpi(launcher)
    library = _library(mpi)
    if "Open MPI" in launcher.name and library.startswith(_NOT_OPEN_MPI):
        # Initialising this library would end the process.
        raise crossed(launcher, f"the MPI library here is {library}")
    if not mpi.Is_initialized():
        try:
            check_shared_memory(environ)
        except LauncherError as error:
            if error.rank:
                # Rank 0, which reports errors, may be on another machine, where the check passes.
                last_words(f"{error} (on {error.host})")
            raise
        # Only one thread calls MPI; the locks of a higher thread level cost a tenth of every collective.
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
    """Finalise MPI if it was started; exit if the other ranks do not join within `seconds`."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        with must_end("the end of MPI", seconds):
            mpi.Finalize()
