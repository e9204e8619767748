"""Starts tests/mpi under mpirun at 1 to 4 ranks, with a time limit per test: a hang is a failure."""

from __future__ import annotations

import subprocess
import sys

import pytest
from compare_runs import ROOT, needs_mpirun, without_launcher

pytestmark = needs_mpirun


def run_under_mpirun(ranks: int, arguments: list[str], timeout: float, **environ: str) -> str:
    """Run pytest on `ranks` ranks and return what it wrote; fail with the last of it if it did not pass."""
    command = [
        "mpirun",
        "-n",
        str(ranks),
        sys.executable,
        "-m",
        "pytest",
        "--with-mpi",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-x", "-q", "--timeout=60", "--timeout-method=thread", *arguments]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**without_launcher(), "NUMBA_NUM_THREADS": "1", **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate(timeout=20)
            pytest.fail(f"mpirun -n {ranks} did not end in {timeout} s:\n{output[-6000:]}")
    assert process.returncode == 0, output[-6000:]
    return output


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_mpi_suite(ranks: int) -> None:
    output = run_under_mpirun(ranks, ["tests/mpi"], timeout=240)
    # Every rank ran it: each writes its own summary.
    assert output.count(" passed") == ranks, output[-6000:]


def test_the_team_on_two_simulated_machines() -> None:
    output = run_under_mpirun(4, ["tests/mpi/test_team_mpi.py"], timeout=120, MPIR_CVAR_NUM_CLIQUES="2")
    assert output.count(" passed") == 4, output[-6000:]
