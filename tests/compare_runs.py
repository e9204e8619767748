"""Helpers for tests of verify and diff: small runs of tests/stray_model.py, made through the command line."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rustsim_hpc.cli import main as cli

ROOT = Path(__file__).parents[1]
MODEL = Path(__file__).with_name("stray_model.py")
AGENTS, STEPS = 1000, 10

needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpi4py and an mpirun on PATH",
)


def drill() -> ModuleType:
    """Return drills/divergence.py as a module."""
    name = "drill_divergence"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "drills" / "divergence.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def command(*arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process; return its exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            return int(stop.code or 0), out.getvalue(), err.getvalue()


def without_launcher() -> dict[str, str]:
    """Return this process's environment without what a launcher of ranks has set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PMI_", "OMPI_"))}


def mpirun(ranks: int, *arguments: object) -> tuple[int, str, str]:
    """Run the command line under mpirun; return the launcher's exit code, standard output and error."""
    done = subprocess.run(
        ["mpirun", "-n", str(ranks), sys.executable, "-m", "rustsim_hpc", *map(str, arguments)],
        cwd=ROOT,
        env={**without_launcher(), "NUMBA_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def write_job(folder: Path, model: Path = MODEL) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "stray.toml"
    path.write_text(f'[model]\nmodule = "{model}"\n[run]\nagents = {AGENTS}\nsteps = {STEPS}\n')
    return path


def make_run(folder: Path, *options: object, model: Path = MODEL) -> Path:
    """Run the job into `folder`, recorded, with all its checkpoints kept; return `folder`."""
    job = write_job(folder.parent, model)
    same = ("--record", "--no-progress", "--set=checkpoint.keep=99", "--executor=inline")
    code, out, err = command("run", job, *same, *options, "--out", folder)
    assert code == 0, out + err
    return folder


def report_of(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / "divergence.json").read_text())
    assert (made["format"], made["version"]) == ("rustsim-hpc divergence", 1)
    return made


def kinds(report: dict[str, Any]) -> list[str]:
    return [cause["kind"] for cause in report["causes"]]


def drop_log(folder: Path) -> None:
    (folder / "replay.jsonl").unlink()


def drop_checkpoints(folder: Path, *, before: int = 1 << 60, after: int = -1) -> None:
    """Remove checkpoints of steps in (after, before)."""
    for path in (folder / "checkpoints").glob("step_*"):
        if after < int(path.name[5:15]) < before:
            path.unlink()
