"""A terminal that is closed while a job runs: the run is saved, or goes on if it was told to."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compare_runs import ROOT, command

import rustsim_hpc as rs

DRILL = ROOT / "drills" / "drill.toml"


def run_on_a_terminal(out: Path, *options: str, ignoring: bool) -> tuple[subprocess.Popen[bytes], int]:
    """Start the drill in a session of its own with a terminal; return its process and our end of that."""
    ours, its = pty.openpty()
    shell = ("sh", "-c", 'trap "" HUP; exec "$@"', "sh") if ignoring else ()
    # A session without a terminal gets the one that it opens first.
    take = "import os, sys; os.close(os.open(sys.argv[1], os.O_RDWR)); os.execvp(sys.argv[2], sys.argv[2:])"
    words = ("-m", "rustsim_hpc", "run", str(DRILL), "--out", str(out), *options)
    process = subprocess.Popen(
        [sys.executable, "-c", take, os.ttyname(its), *shell, sys.executable, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "DRILL_PACE": "0.1" if ignoring else "2"},
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
    )
    os.close(its)
    return process, ours


@pytest.mark.parametrize(
    ("options", "ignoring"), [((), False), (("--executor=processes", "--workers=2"), False), ((), True)]
)
def test_closing_the_terminal_saves_the_run(tmp_path: Path, options: tuple[str, ...], ignoring: bool) -> None:
    out = tmp_path / "run"
    process, terminal = run_on_a_terminal(out, *options, ignoring=ignoring)
    log = out / "replay.jsonl"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 2):
        time.sleep(0.02)
    os.close(terminal)
    assert process.wait(120) == (0 if ignoring else 75)
    stopped = rs.open_run(out)
    assert (stopped.status == "done") == ignoring
    assert (stopped.step_index < 12) != ignoring
    assert command("resume", out, "--no-progress")[0] == 0
    assert rs.open_run(out).fingerprint == rs.run_job(DRILL, out=tmp_path / "whole").fingerprint
