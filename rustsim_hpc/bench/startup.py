"""What a start costs: imports, the command line's help, and the main job's way to its first step."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rustsim_hpc.bench.measure import Case, Row, Section, interleave
from rustsim_hpc.bench.setting import Size, flights_module

_LOOK_SECONDS = 0.002
_PATIENCE = 300.0


def start(size: Size) -> Section:
    """Measure fresh processes: everything they need lies in the page cache, and kernels are compiled."""
    cases = {
        "python": Case(lambda: _run("-c", "pass")),
        "numpy": Case(lambda: _run("-c", "import numpy")),
        "import": Case(lambda: _run("-c", "import numpy, rustsim_hpc")),
        "help": Case(lambda: _run("-m", "rustsim_hpc", "--help")),
    }
    module = flights_module()
    if module is not None:
        agents = str(size.agents)
        job = str(module.with_suffix(".toml"))
        command = ("run", job, "--agents", agents, "--steps", "2", "--record", "--no-progress")
        cases["first"] = Case(lambda: _to_first_step(command))
    timings = interleave(cases, max(3, size.rounds // 2))
    names = {
        "python": "an empty Python",
        "numpy": "import numpy",
        "import": "import numpy, rustsim_hpc",
        "help": "rustsim-hpc --help",
        "first": f"rustsim-hpc run us_flights, {size.agents:,} agents, to its first step",
    }
    rows = [Row.of(key, names[key], timing) for key, timing in timings.items()]
    added = timings["import"].median - timings["numpy"].median
    rows.insert(3, Row("import.added", "added by importing rustsim_hpc", added))
    text = (
        "New processes, from start to end; the run is timed until its log has the first step. The kernels "
        "were compiled by an earlier run and are loaded from the cache."
    )
    return Section("start", "Starting", text, rows)


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=_PATIENCE)


def _to_first_step(command: Sequence[str]) -> None:
    """Start a run, wait until its replay log has an entry, and end it.

    Raises:
        OSError: it ended before.
    """
    folder = Path(tempfile.mkdtemp(prefix="rustsim-bench-"))
    out, errors = folder / "run", folder / "errors"
    whole = [sys.executable, "-m", "rustsim_hpc", *command, "--out", str(out)]
    with errors.open("wb") as file:
        process = subprocess.Popen(whole, stdout=subprocess.DEVNULL, stderr=file)
    try:
        deadline = time.monotonic() + _PATIENCE
        while _lines(out / "replay.jsonl") < 2:  # the header, and a step
            if process.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"{' '.join(command)} did not reach its first step: {errors.read_text()}")
            time.sleep(_LOOK_SECONDS)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
