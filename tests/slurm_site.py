"""Where the Slurm tests submit their jobs from: a folder with a job whose steps can be slowed down."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slurm_cluster import Cluster

import rustsim_hpc as rs
from rustsim_hpc.errors import RunFolderError

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "slurm"
STEPS = 300

_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

_MODEL = """
import os
import time

import numpy as np

import rustsim_hpc as rs


@rs.row_kernel(writes="x")
def walk(x, reach, rng):
    return x + reach * rs.random.normal(rng, 0)


@rs.column_phase(writes="x", row_local=True)
def rest(context, columns, rows):
    # As slow as the environment says, but not after the run was resumed.
    if os.environ.setdefault("TEST_BEGAN", str(context.step_index)) == "0":
        time.sleep(float(os.environ.get("TEST_PACE", "0")))


@rs.reduction("count")
def near(x):
    return abs(x) < 1.0


def initialise(rows, params, tables, seed):
    return {"x": np.zeros(rows.stop - rows.start)}


def row(context):
    return context.step_index, context.reductions["near"]


def model():
    return rs.Model(
        params={"reach": rs.Param(default=0.25)},
        columns=[rs.Column("x", "float64")],
        initialise=initialise,
        phases=[walk, rest],
        outputs=[rs.Series("near.csv", row=row, columns=("step", "near"), every=10, reductions=[near])],
    )
"""

_JOB = f"""
[model]
module = "walkers.py"
[run]
agents = 500
steps = {STEPS}
[checkpoint]
every = 20
"""


def furnish(folder: Path) -> None:
    """Write the job, its model, and a virtual environment that has the engine of this checkout."""
    tools = folder / "venv" / "bin"
    tools.mkdir(parents=True)
    (folder / "walkers.py").write_text(_MODEL)
    (folder / "walkers.toml").write_text(_JOB)
    (tools / "activate").write_text(f"export PATH={tools}:$PATH\n")
    command = tools / "rustsim-hpc"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m rustsim_hpc "$@"\n')
    command.chmod(0o755)


@dataclass
class Site:
    """Where jobs are submitted from: job.toml, its model, and a virtual environment with the engine."""

    folder: Path
    cluster: Cluster
    environ: dict[str, str]
    jobs: list[str] = field(default_factory=list)

    def out(self, name: str) -> Path:
        """Return a run's folder that has not been used."""
        return self.folder / "runs" / name

    def run(self, *words: str | Path, timeout: float = 90, **environ: str | Path) -> tuple[int, str]:
        """Run a command; return its exit code and all that it printed."""
        given = {name: str(value) for name, value in environ.items()}
        done = self.cluster.run(*words, cwd=self.folder, timeout=timeout, **(self.environ | given))
        return done.returncode, done.stdout + done.stderr

    def engine(self, *words: str | Path) -> tuple[int, str]:
        """Run the engine on this machine, outside of Slurm."""
        return self.run(self.folder / "venv" / "bin" / "rustsim-hpc", *words)

    def submit(
        self, script: str | Path, *options: str, engine: Sequence[str] = (), **environ: str | Path
    ) -> str:
        """Submit a script (a name in slurm/, or a path) and return the job's id; `engine`: its arguments."""
        code, text = self.run("sbatch", "--parsable", *options, SCRIPTS / script, *engine, **environ)
        assert code == 0, text
        job = text.strip()
        self.jobs.append(job)
        return job

    def facts(self, job: str) -> list[dict[str, str]]:
        """Return what Slurm knows of a job, or of each task of an array."""
        _, text = self.run("scontrol", "--oneliner", "show", "job", job)
        return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in text.splitlines()]

    def wait(self, job: str, timeout: float = 120) -> dict[str, str]:
        """Wait until a job and all its tasks have ended, requeues included; return what Slurm knows of it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            facts = self.facts(job)
            if facts and all(task.get("JobState") in _ENDED for task in facts):
                return facts[0]
            time.sleep(0.5)
        texts = (f"job {job} has not ended: {self.facts(job)}", self.log(job), self.cluster.logs())
        raise AssertionError("\n".join(texts))

    def log(self, job: str) -> str:
        """Return what a job has printed."""
        logs = [path for end in (".log", "_*.log") for path in sorted(self.folder.glob(f"*-{job}{end}"))]
        return "\n".join(path.read_text(errors="replace") for path in logs)

    def wait_for(self, what: Callable[[], bool], timeout: float = 120) -> None:
        """Wait until something is true."""
        deadline = time.monotonic() + timeout
        while not what():
            if time.monotonic() > deadline:
                raise AssertionError("what was waited for has not come:\n" + self.cluster.logs())
            time.sleep(0.5)

    def wait_for_step(self, out: Path, step: int) -> None:
        """Wait until a run has saved a checkpoint of this step or a later one."""

        def there() -> bool:
            with contextlib.suppress(RunFolderError):
                return max(rs.open_run(out).checkpoints(), default=-1) >= step
            return False

        self.wait_for(there)
