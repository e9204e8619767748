"""The doctor: its facts, and the problems that it must see."""

import json
import os
from pathlib import Path

import pytest

from rustsim_hpc import doctor


def test_report() -> None:
    report = doctor.examine()
    assert report["packages"]["numpy"][0].isdigit()
    assert report["machine"]["cores to use"] == len(os.sched_getaffinity(0))
    assert report["hdf5"]["parallel"] in (True, False)
    assert json.loads(json.dumps(report)) == report
    text = doctor.table(report)
    assert "numba" in text
    assert text.index("python") < text.index("problems")


def test_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("numba", "h5py") else found(name))
    report = doctor.examine()
    assert report["packages"]["numba"] == "missing"
    assert report["hdf5"] == {"h5py": "not installed"}
    assert "pip install numba" in report["problems"]["numba"]


def test_probe_survives_what_it_starts() -> None:
    assert doctor._probe("print('{\"a\": 1}')") == ({"a": 1}, "")
    assert doctor._probe("import os; os.abort()")[0] == {}
    assert doctor._probe("raise RuntimeError('cannot load')") == ({}, "RuntimeError: cannot load")


def test_crossed_mpi_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n")
    mpirun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "_probe", lambda _: ({"library": "MPICH Version: 5.0.2"}, ""))
    problems: dict[str, str] = {}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: object())
    assert doctor._mpi(problems)["mpirun is of"] == "Open MPI"
    assert "would not see each other" in problems["mpirun"]
    monkeypatch.setattr(doctor, "_probe", lambda _: ({}, "RuntimeError: cannot load MPI library"))
    assert "cannot load MPI library" in (doctor._mpi(problems), problems["mpi4py"])[1]


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/proc/nowhere")
    problems: dict[str, str] = {}
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert doctor._numba(problems)["writable"] is False
    assert "NUMBA_CACHE_DIR" in problems["cache"]
