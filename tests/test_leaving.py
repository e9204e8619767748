"""How ranks leave together: the marks, the last words to MPICH's launcher, and jobs that have to end so."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compare_runs import mpirun, needs_mpirun

from rustsim_hpc.ranks.launcher import must_end
from rustsim_hpc.ranks.leaving import Leaving, goodbye

MODEL = """
import os
import time

import numpy as np
import rustsim_hpc as rs


class Odd(BaseException):
    pass


def fail(place):
    if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1" and "{place}" == place:
        {action}


@rs.column_phase(writes="x", row_local=True)
def move(context, columns, rows):
    fail("phase")
    columns["x"] += 1


def tables(params):
    fail("tables")
    return {{}}


def initialise(rows, params, tables, seed):
    fail("initialise")
    return {{"x": np.zeros(rows.stop - rows.start)}}


def model():
    fail("model")
    return rs.Model(columns=[rs.Column("x", "float64")], tables=tables, initialise=initialise, phases=[move])
"""


def job(folder: Path, place: str, action: str) -> Path:
    (folder / "odd.py").write_text(MODEL.format(place=place, action=action))
    path = folder / "odd.toml"
    path.write_text(
        '[model]\nmodule = "odd.py"\n[run]\nagents = 30\nsteps = 4\n'
        'executor = "inline"\nwatchdog_seconds = 8\n'
    )
    return path


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def test_ranks_that_hear_of_it_leave_together_and_leave_nothing(scratch: Path) -> None:
    ranks = [Leaving(rank, 3, "key", grace=60) for rank in range(3)]
    for rank in ranks:
        rank.move(scratch)
    assert [rank.heard() for rank in ranks] == [None] * 3
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ranks[1].together, 3)
        while ranks[0].heard() is None:
            time.sleep(0.01)
        assert ranks[2].heard() == 3
        others = [pool.submit(ranks[k].together, 3) for k in (0, 2)]
        assert [first.result(), *(other.result() for other in others)] == [True] * 3
    assert not [*scratch.glob(".leaving*"), *(scratch / "tmp").iterdir()]


def test_a_rank_that_is_stopped_while_all_leave_is_left_to_the_launcher(scratch: Path) -> None:
    """It has marked itself, but never says that it has seen the others."""
    ranks = [Leaving(rank, 3, "key", grace=0.5) for rank in range(3)]
    for rank in ranks:
        rank.move(scratch)
    ranks[0]._mark(3)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda rank: rank.together(3), ranks[1:])) == [False, False]
    assert not [*scratch.glob(".leaving*"), *(scratch / "tmp").iterdir()]


def test_marks_are_seen_in_the_run_s_folder_alone_as_on_another_machine(scratch: Path) -> None:
    here, there = (Leaving(rank, 2, "key", grace=0.05) for rank in range(2))
    here.move(scratch)
    there._places = [scratch / here._name]
    there._mark(75)
    assert here.heard() == 75


def test_a_rank_that_hears_nothing_is_not_waited_for(scratch: Path) -> None:
    alone, other_job = Leaving(0, 2, "key", grace=0.05), Leaving(1, 2, "another key")
    assert not alone.together(3)
    assert other_job.heard() is None
    assert not list((scratch / "tmp").iterdir())


def test_last_words_go_to_mpich_alone() -> None:
    end, launchers = os.pipe()
    os.close(end)
    goodbye({"PMI_FD": str(launchers), "MPI_LOCALRANKID": "0"})  # a launcher that is gone hears nothing
    os.close(launchers)
    mine, his = socket.socketpair()
    with mine, his:
        his.sendall(b"cmd=finalize_ack\n")
        goodbye({"PMI_FD": str(mine.fileno())})  # Slurm's
        goodbye({"MPI_LOCALRANKID": "0"})
        his.setblocking(False)
        with pytest.raises(BlockingIOError):
            his.recv(10)
        goodbye({"PMI_FD": str(mine.fileno()), "MPI_LOCALRANKID": "0"})
        assert his.recv(100) == b"cmd=finalize\n"


def test_what_cannot_be_interrupted_must_end() -> None:
    code = "import time\nfrom rustsim_hpc.ranks.launcher import must_end\n"
    late = subprocess.run(
        [sys.executable, "-c", code + "with must_end('the start', 0.2): time.sleep(60)"],
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert (late.returncode, late.stderr.count("\n")) == (3, 1)
    assert late.stderr.startswith("Error: the start has not ended in 0.2 s on ")
    with must_end("a quick one", 0.2):
        pass
    time.sleep(0.5)  # this process is still there


@needs_mpirun
@pytest.mark.parametrize(("place", "phase"), [("phase", "phase move, step 0"), ("tables", "phase start-up")])
def test_a_stuck_rank_ends_all_with_3_and_is_the_only_one_heard(
    place: str, phase: str, tmp_path: Path
) -> None:
    path = job(tmp_path, place, "time.sleep(600)")
    code, _, err = mpirun(4, "run", path, "--out", tmp_path / "run", "--no-progress")
    assert code == 3, err
    said = rf"watchdog: rank 1 on {re.escape(os.uname().nodename)} has not moved for [0-9.]+ s \(limit 8 s"
    assert re.search(rf"{said}[^)]*\): {phase}", err), err
    assert err.count("watchdog:") == 1
    assert "odd.py" in err
    assert not list((tmp_path / "run").glob(".leaving*"))


@needs_mpirun
@pytest.mark.parametrize("place", ["model", "tables", "initialise"])
@pytest.mark.parametrize("action", ["raise Odd('gone')", "raise SystemExit(0)"])
def test_what_is_no_exception_is_a_model_s_error_on_all_ranks(
    place: str, action: str, tmp_path: Path
) -> None:
    path = job(tmp_path, place, action)
    code, _, err = mpirun(2, "run", path, "--out", tmp_path / "run", "--no-progress")
    assert code == 2, err
    assert "Traceback" not in err
    assert f"{place}" in err
    assert ("Odd: gone" if "Odd" in action else "SystemExit: 0") in err
    assert "rank: 1" in err
