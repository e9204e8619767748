"""The launcher that started this process, found from its environment: mpirun, srun, or none.

Only the environment is read: asking MPI would initialise it.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rustsim_hpc.errors import LauncherError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = [
    "SHARED_MEMORY",
    "Launcher",
    "check_shared_memory",
    "crossed",
    "detect_launcher",
    "must_end",
    "no_mpi",
    "why_not_shared",
]

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (MPI's shared memory and windows are there)
START_SECONDS = 600.0
"""Time limit for the start of MPI, which would wait forever for a rank that never starts."""

_BYTES_A_RANK = 1 << 20
"""What MPI allocates there per rank before the first message; MPICH 5 was seen to need a little more."""

_INSTALL_HINT = (
    'on a laptop: pip install "rustsim-hpc[mpi]" (brings MPICH, its mpirun then lies beside python); '
    'on a cluster: load the site\'s MPI module and pip install "rustsim-hpc[mpi-system]"'
)
_MPIRUN_HINT = (
    "use the mpirun of the MPI that mpi4py loads; with srun, --mpi=pmi2 for MPICH and --mpi=pmix for Open MPI"
)

# Slurm uses step numbers from here up for batch scripts, interactive shells and other special steps.
_FIRST_RESERVED_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Launcher:
    """The program that started this process: its name, the number of ranks, and this rank.

    variable: the environment variable that `size` was read from.
    """

    name: str
    size: int
    rank: int
    variable: str


def detect_launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Return the launcher found in `environ`, or None if the process was started without one.

    A batch script or an interactive shell of Slurm is not a rank: only a real `srun` step counts, and an
    mpirun inside of one takes precedence.

    Raises:
        LauncherError: a variable of a launcher is not a number.
    """
    for name, size, rank in (
        ("mpirun (PMI)", "PMI_SIZE", "PMI_RANK"),
        ("mpirun (Open MPI)", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("mpirun (MVAPICH)", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ):
        if size in environ and rank in environ:
            return Launcher(name, _number(environ, size), _number(environ, rank), size)
    step = "SLURM_STEP_ID" if "SLURM_STEP_ID" in environ else "SLURM_STEPID"
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if not {step, size, "SLURM_PROCID"} <= environ.keys() or _number(environ, step) >= _FIRST_RESERVED_STEP:
        return None
    return Launcher("srun", _number(environ, size), _number(environ, "SLURM_PROCID"), size)


def check_shared_memory(environ: Mapping[str, str]) -> None:
    """Check before MPI starts that /dev/shm has enough space.

    Without it, MPI ends the job with a bus error, which cannot be caught. The first rank of a machine checks
    for all of its ranks. The others check for their own share only, since some may have allocated theirs.

    Raises:
        LauncherError: there is too little. Its `rank` is set only on the first rank of a machine.
    """
    for rank, size in (
        ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ):
        if rank not in environ or size not in environ or not SHARED_MEMORY.is_dir():
            continue
        first, ranks, found = _number(environ, rank) == 0, _number(environ, size), os.statvfs(SHARED_MEMORY)
        room, launcher = found.f_bavail * found.f_frsize, detect_launcher(environ)
        if ranks > 1 and room < (ranks if first else 1) * _BYTES_A_RANK:
            raise LauncherError(
                message=f"{SHARED_MEMORY} has {room:,} bytes free, too few for MPI and {ranks} ranks",
                rank=launcher.rank if first and launcher is not None else None,
                host=socket.gethostname(),
                hint="free space there (at least 1 MiB a rank, plus the model's tables), or enlarge "
                f"it: mount -o remount,size=1G {SHARED_MEMORY}; docker run --shm-size=1g",
            )


def why_not_shared(array: NDArray[Any] | None) -> str | None:
    """Return why an array cannot be shared by the ranks of this machine, or None if it can."""
    if array is None:
        return "the first rank of each machine must bring the array that is shared on it"
    if array.dtype.hasobject:
        return f"an array of dtype {array.dtype} cannot be shared between processes"
    if SHARED_MEMORY.is_dir():
        # With a full /dev/shm the first write is a bus error, which cannot be caught.
        room = os.statvfs(SHARED_MEMORY)
        if array.nbytes > room.f_bavail * room.f_frsize:
            return f"{SHARED_MEMORY} has no room for a shared table of {array.nbytes} bytes"
    return None


def crossed(launcher: Launcher, found: str) -> LauncherError:
    """Return the error of a launcher and an MPI library of different MPI implementations."""
    text = f" ({launcher.variable}), but {found}: launcher and library belong to different MPIs"
    return _refused(launcher, text, _MPIRUN_HINT)


def no_mpi(launcher: Launcher, reason: str) -> LauncherError:
    """Return the error of a launcher without an MPI library here."""
    return _refused(launcher, f", but {' '.join(reason.split())}", _INSTALL_HINT)


def _refused(launcher: Launcher, text: str, hint: str) -> LauncherError:
    message = f"{launcher.name} started {launcher.size} ranks{text}"
    return LauncherError(message=message, rank=launcher.rank, host=socket.gethostname(), hint=hint)


@contextmanager
def must_end(what: str, seconds: float = START_SECONDS) -> Iterator[None]:
    """Write a line and exit with code 3 if the block, which cannot be interrupted, takes longer."""

    def give_up() -> None:
        sys.stderr.write(f"Error: {what} has not ended in {seconds:g} s on {socket.gethostname()}\n")
        sys.stderr.flush()
        os._exit(3)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name].strip()
    if not (text.isascii() and text.isdigit()):
        raise LauncherError(message=f"{name} in the environment is {environ[name]!r}, not a number")
    return int(text)
