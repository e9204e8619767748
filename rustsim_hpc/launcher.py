"""Which launcher started this process, as its environment tells: mpirun, srun, or none.

Decided from the environment alone: asking MPI would initialise it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rustsim_hpc.errors import LauncherError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Launcher", "detect_launcher"]

# Slurm numbers a batch script, an interactive shell and its other helpers as steps from here up.
_FIRST_RESERVED_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Launcher:
    """The program that started this process: its name, how many ranks it started, which one this is.

    variable: the environment variable that `size` comes from.
    """

    name: str
    size: int
    rank: int
    variable: str


def detect_launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Return the launcher that `environ` tells of, None if this process was started on its own.

    A batch script or an interactive shell of Slurm is not a rank: only a real `srun` step counts, and an
    mpirun inside of one counts before it.

    Raises:
        LauncherError: a variable of a launcher holds no sensible number.
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


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name].strip()
    if not (text.isascii() and text.isdigit()):
        raise LauncherError(message=f"{name} in the environment is {environ[name]!r}, not a number")
    return int(text)
