"""What a run of a job takes: multiples of its state, above a run of a thousand rows, per rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from compare_runs import ROOT, needs_mpirun

ROWS = 4_000_000
STATE = 16 * ROWS  # four float32 columns; default ids take nothing
PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
sys.exit(done.stderr) if done.returncode else print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak(folder: Path, rows: int, ranks: int, options: str) -> int:
    """Return the most bytes that a process of the run had at one time."""
    command = ["mpirun", "-n", str(ranks)] if ranks > 1 else []
    command += [sys.executable, "-m", "rustsim_hpc", "run", "jobs/particles.toml", "--agents", str(rows)]
    command += ["--steps", "8", "--no-progress", "--out", str(folder / str(rows)), *options.split()]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_mpirun)])
@pytest.mark.parametrize(
    ("options", "states"),
    [
        ("--guard torn", 1.2),
        ("--guard rollback --record", 2.2),
        (
            "--guard rollback --record --checkpoint-every 4",
            3.2,
        ),  # with a copy that is written behind the steps
    ],
)
def test_a_rank_takes_its_share_of_the_state(tmp_path: Path, ranks: int, options: str, states: float) -> None:
    for rows in (1000, ROWS):  # compiles, which takes memory too
        peak(tmp_path / "first", rows, ranks, options)
    small, large = (peak(tmp_path / "second", rows, ranks, options) for rows in (1000, ROWS))
    assert 0.5 < (large - small) / (STATE / ranks) <= states
