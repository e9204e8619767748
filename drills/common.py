"""What the drills share: starting the engine in all its ways, killing its processes, comparing runs.

A drill is a script: `python drills/kill.py 200`. It prints one line a trial and, last, how many went well; it
ends with 0 if all did.
"""

import argparse
import contextlib
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import h5py
import numpy as np
import psutil

import rustsim_hpc as rs
from rustsim_hpc.errors import CheckpointFileError
from rustsim_hpc.storage import list_checkpoints, verify

DRILLS = Path(__file__).parent
ROOT = DRILLS.parent
JOB = DRILLS / "drill.toml"
STEPS = 12
# What the engine promises: an error on one rank or a lost process ends the job within so many seconds.
PATIENCE = 10.0


@dataclass(frozen=True)
class Way:
    """A way to run a job: under so many ranks (0: no launcher), with these options."""

    name: str
    ranks: int = 0
    options: tuple[str, ...] = ()
    environ: tuple[tuple[str, str], ...] = ()

    def command(self, *arguments: object) -> list[str]:
        """Return the command line of an engine's command."""
        launcher = [*MPIRUN, "-n", str(self.ranks)] if self.ranks else []
        return [*launcher, PYTHON, "-m", "rustsim_hpc", *map(str, arguments), *self.options]


# Another MPI and its Python: DRILL_MPIRUN="mpirun.openmpi --oversubscribe" DRILL_PYTHON=/path/to/python
MPIRUN = os.environ.get("DRILL_MPIRUN", "mpirun").split()
PYTHON = os.environ.get("DRILL_PYTHON", sys.executable)

INLINE = Way("inline", options=("--executor=inline",))


def threads(count: int) -> Way:
    """Return the way that runs on threads."""
    return Way(f"threads {count}", options=("--executor=threads", f"--workers={count}"))


def processes(count: int) -> Way:
    """Return the way that runs on worker processes."""
    return Way(f"processes {count}", options=("--executor=processes", f"--workers={count}"))


def mpirun(count: int) -> Way:
    """Return the way that runs on MPI ranks."""
    return Way(f"mpirun {count}", count, ("--executor=inline",))


def has_mpirun() -> bool:
    """Return whether ranks can be had here."""
    return shutil.which(MPIRUN[0]) is not None and importlib.util.find_spec("mpi4py") is not None


def environ(**more: str) -> dict[str, str]:
    """Return an environment for the engine: this one's, without what a launcher has put there."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PMI_", "OMPI_COMM_", "SLURM_", "RUSTSIM_"))
    }
    path = os.pathsep.join(part for part in (str(ROOT), inherited.get("PYTHONPATH")) if part)
    return {**inherited, "PYTHONPATH": path, "NUMBA_NUM_THREADS": "1", **more}


@dataclass
class Ended:
    """What became of a command. seconds: how long it took."""

    code: int
    text: str
    seconds: float

    def __str__(self) -> str:
        return f"ended with {self.code}: {' '.join(self.text.split())[-300:]}"


class Started:
    """A command that runs, with all the processes that it starts. They end with the block."""

    def __init__(self, command: list[str], **more: str) -> None:
        self._log = tempfile.TemporaryFile(mode="w+b")  # noqa: SIM115 (closed with the block)
        self.begun = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environ(**more),
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.tree())
        self._process.wait()
        self._log.close()

    @property
    def running(self) -> bool:
        """Whether the command has not ended."""
        return self._process.poll() is None

    def tree(self) -> list[psutil.Process]:
        """Return the command's process and all below it that are alive."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._process.pid)
            return [top, *top.children(recursive=True)]
        return []

    def engines(self) -> list[psutil.Process]:
        """Return the processes that run the engine: ranks and workers, not launchers."""
        return [process for process in self.tree() if "rustsim_hpc" in command_of(process)]

    def wait(self, timeout: float = 120) -> Ended:
        """Wait for the end; one that does not come is told by the code 124."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = 124
        return Ended(code, self.text(), time.monotonic() - self.begun)

    def text(self) -> str:
        """Return what has been written so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")


def command_of(process: psutil.Process) -> str:
    """Return what a process runs, in its own words; nothing of one that is gone."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        words = process.cmdline()
        if words and Path(words[0]).name.startswith("python"):
            return " ".join(words[1:])
    return ""


def kill(victims: list[psutil.Process]) -> None:
    """Kill processes, all of them stopped first so that none sees another one's end."""
    for action in ("suspend", "kill"):
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, action)()


def still_there(processes: list[psutil.Process], timeout: float = PATIENCE) -> list[str]:
    """Return which processes have not gone after so many seconds."""
    _, alive = psutil.wait_procs(processes, timeout)
    return [f"process {process.pid} is still there: {command_of(process)[:80]}" for process in alive]


def run(way: Way, *arguments: object, timeout: float = 120, **more: str) -> Ended:
    """Run a command of the engine to its end."""
    with Started(way.command(*arguments), **dict(way.environ), **more) as started:
        return started.wait(timeout)


def wait_until(there: Callable[[], object], seconds: float, pause: float = 0.002) -> bool:
    """Wait until something is true, at most so long; return whether it is."""
    end = time.monotonic() + seconds
    while not there():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


def whole(folder: Path) -> list[str]:
    """Return what is wrong with the checkpoints that lie in a run's folder: each has to prove itself."""
    wrong = []
    for path in list_checkpoints(folder / "checkpoints"):
        try:
            verify(path)
        except CheckpointFileError as error:
            wrong.append(f"a checkpoint was published that is not whole: {error}")
    return wrong


def differences(
    folder: Path, expected: Path, files: tuple[str, ...] = ("curve.csv", "replay.jsonl")
) -> list[str]:
    """Return in what a finished run is not the expected one: status, fingerprint, outputs, left-overs."""
    found, wanted = rs.open_run(folder), rs.open_run(expected)
    facts = [
        f"{name} {getattr(found, name)}, expected {getattr(wanted, name)}"
        for name in ("status", "step_index", "fingerprint")
        if getattr(found, name) != getattr(wanted, name)
    ]
    facts += [
        f"{name} is another one"
        for name in files
        if (wanted.path / name).exists() and (folder / name).read_bytes() != (expected / name).read_bytes()
    ]
    for path in sorted(expected.glob("*.h5")):
        facts += [f"{path.name} differs in {name}" for name in _other_arrays(folder / path.name, path)]
    left = [str(path.relative_to(folder)) for path in folder.rglob(".*.rustsim-tmp")]
    return facts + whole(folder) + [f"left over: {name}" for name in left]


def _other_arrays(one: Path, other: Path) -> Iterator[str]:
    with h5py.File(one) as left, h5py.File(other) as right:
        names: list[str] = []
        right.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in names:
            if name not in left or np.asarray(left[name]).tobytes() != np.asarray(right[name]).tobytes():
                yield name


class Drill:
    """The trials of a drill: their random numbers, their folders, one line for each, and the count."""

    def __init__(self, what: str, *, seed: int = 1, keep: Path | None = None) -> None:
        self._what, self.seed, self._keep = what, seed, keep
        self.tried = self.good = 0
        self.begun = time.monotonic()
        self._scratch = tempfile.TemporaryDirectory(prefix="rustsim-drill-")

    @property
    def folder(self) -> Path:
        """The drill's own folder."""
        return self._keep or Path(self._scratch.name)

    def random(self, number: int) -> random.Random:
        """Return the random numbers of a trial: the same for the same seed and number."""
        return random.Random(f"{self.seed} {number}")

    def trial(self, described: str, wrong: list[str]) -> None:
        """Count a trial and print its line; `wrong`: what went wrong."""
        self.tried += 1
        self.good += not wrong
        print(f"{self.tried:4}  {described}: {'; '.join(wrong) or 'good'}", flush=True)

    def end(self) -> int:
        """Print the last line and return the exit code."""
        print(f"{self.good} of {self.tried} {self._what}, {time.monotonic() - self.begun:.0f} s")
        self._scratch.cleanup()
        return 0 if self.good == self.tried else 1


def arguments(doc: str | None, count: int, **more: tuple[int | str, str]) -> argparse.Namespace:
    """Return a drill's command line: its count, --seed, --keep, and `more` (default, help)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = f"number of trials (default: {count or 'all'})"
    parser.add_argument("count", type=int, nargs="?", default=count, help=text)
    for name, (value, meaning) in more.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=meaning)
    parser.add_argument("--seed", type=int, default=1, help="seed of all that is drawn (default: 1)")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    return parser.parse_args()
