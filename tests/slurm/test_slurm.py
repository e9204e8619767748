"""The scripts of slurm/, and the engine's launching, signals and resuming, on a real Slurm."""

from __future__ import annotations

import csv
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from slurm_cluster import GPUS, libopenmpi
from slurm_site import SCRIPTS, STEPS, Site

import rustsim_hpc as rs

pytestmark = pytest.mark.slurm

SMALL = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem-per-cpu=100M")
PAIR = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem-per-cpu=100M")
SLOW = {"TEST_PACE": "0.2"}


def assert_whole(out: Path, expected: int) -> rs.run_reader.Run:
    """The run in a folder is the one that nobody interrupted, its outputs included."""
    run = rs.open_run(out)
    assert (run.status, run.step_index, run.fingerprint) == ("done", STEPS, expected)
    assert run.series("near")["step"].tolist() == list(range(0, STEPS + 1, 10))
    return run


@pytest.mark.parametrize("name", [path.name for path in sorted(SCRIPTS.glob("*.sbatch"))])
def test_directives_are_what_slurm_takes(site: Site, name: str) -> None:
    code, text = site.run("sbatch", "--test-only", SCRIPTS / name)
    assert code == 0, text
    assert "to start at" in text


def test_cpu_script_on_two_nodes(site: Site, expected: int) -> None:
    out = site.out("cpu")
    words = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem-per-cpu=100M")
    job = site.submit("cpu.sbatch", *words, OUT=out)
    assert site.wait(job)["ExitCode"] == "0:0", site.log(job)
    record = assert_whole(out, expected).record
    assert (record["ranks"], record["executor"], record["workers"]) == (2, "threads", 2)
    # A finished run that is submitted again prints its summary.
    again = site.submit("cpu.sbatch", *SMALL, OUT=out)
    assert site.wait(again)["ExitCode"] == "0:0", site.log(again)
    assert f"{expected:#018x}" in site.log(again)
