"""The end of a run: nothing is printed after its line of JSON, and no thread of a model keeps the process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from compare_runs import mpirun, needs_mpirun

MODEL = """
import atexit
import threading

import numpy as np
import rustsim_hpc as rs

atexit.register(print, "at exit")
if {thread}:
    threading.Thread(target=threading.Event().wait, name="stubborn").start()


@rs.column_phase(writes="x", row_local=True)
def move(context, columns, rows):
    print("step", end="")
    columns["x"] += 1


def initialise(rows, params, tables, seed):
    return {{"x": np.zeros(rows.stop - rows.start)}}


def model():
    return rs.Model(columns=[rs.Column("x", "float64")], initialise=initialise, phases=[move])
"""


def write(folder: Path, *, thread: bool) -> Path:
    (folder / "talkative.py").write_text(MODEL.format(thread=thread))
    path = folder / "talkative.toml"
    path.write_text('[model]\nmodule = "talkative.py"\n[run]\nagents = 4\nsteps = 2\n')
    return path


def check(code: int, out: str, err: str, ranks: int) -> None:
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert (found["ranks"], found["steps"]) == (ranks, 2)
    assert out.count("step") >= 2 * ranks


@pytest.mark.parametrize("thread", [False, True])
def test_a_run_ends_with_its_line_of_json(tmp_path: Path, thread: bool) -> None:
    job = write(tmp_path, thread=thread)
    done = subprocess.run(
        [sys.executable, "-m", "rustsim_hpc", "run", job, "--out", tmp_path / "run", "--json"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    check(done.returncode, done.stdout, done.stderr, 1)
    said = "warning: the thread stubborn still runs, and ends with the run\n" if thread else "at exit\n"
    assert done.stderr == said


@needs_mpirun
def test_ranks_end_with_one_line_of_json(tmp_path: Path) -> None:
    job = write(tmp_path, thread=False)
    code, out, err = mpirun(3, "run", job, "--out", tmp_path / "run", "--json", "--no-progress")
    check(code, out, err, 3)
    assert err.count("at exit") == 3
