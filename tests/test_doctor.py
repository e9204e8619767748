"""The doctor: its facts, and the problems that it must see."""

import json
import os
from pathlib import Path

import pytest

from rustsim_hpc import doctor


def test_the_report_names_what_is_there() -> None:
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


def test_remote_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _: "27.3.0")
    problems: dict[str, str] = {}
    monkeypatch.setattr(doctor, "_probe", lambda _: ({"library": "libzmq 4.3.5", "curve": True}, ""))
    assert doctor._remote(problems) == {"pyzmq": "27.3.0", "library": "libzmq 4.3.5", "curve": True}
    assert problems == {}
    monkeypatch.setattr(doctor, "_probe", lambda _: ({"library": "libzmq 4.3.5", "curve": False}, ""))
    assert doctor._remote(problems)["curve"] is False
    assert problems.pop("pyzmq").startswith("built without CURVE")
    monkeypatch.setattr(doctor, "_probe", lambda _: ({}, "ImportError: libzmq.so.5"))
    assert doctor._remote(problems) == {"pyzmq": "27.3.0"}
    assert "ImportError: libzmq.so.5" in problems["pyzmq"]
    monkeypatch.setattr(doctor, "_version", lambda _: None)
    assert "rustsim-hpc[remote]" in doctor._remote(problems)["pyzmq"]


def test_real_remote_workers() -> None:
    zmq = pytest.importorskip("zmq", reason="needs pyzmq: pip install 'rustsim-hpc[remote]'")
    found = doctor.examine()["remote workers"]
    assert found["pyzmq"] == zmq.__version__
    assert found["library"] == f"libzmq {zmq.zmq_version()}"
    assert found["curve"] == bool(zmq.has("curve"))


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/proc/nowhere")
    problems: dict[str, str] = {}
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert doctor._numba(problems)["writable"] is False
    assert "NUMBA_CACHE_DIR" in problems["cache"]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(doctor, "_driver", lambda: "NVIDIA H100, 81559 MiB, 570.86.15")
    devices = ["0: NVIDIA H100, sm_90, 79.1 GiB free of 79.6, UUID 00", "1: NVIDIA H100, sm_90"]
    answers = {
        doctor._CUDA_PROBE: ({"cupy": "14.2.0", "devices": devices, "cuda driver": 12080}, ""),
        doctor._COMPILER_PROBE: ({"problem": "no libNVVM: pip install nvidia-cuda-nvcc-cu12"}, ""),
        doctor._AWARE_PROBE: ({}, "ended with status -11"),
        doctor._NVRTC_PROBE: ({}, 'Failure finding "libnvrtc.so.12"'),
    }
    monkeypatch.setattr(doctor, "_probe", answers.__getitem__)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    found = doctor._gpu()
    assert found["devices"] == devices
    assert found["kernels"].startswith("no libNVVM")
    assert found["cuda-aware mpi"] == "no (ended with status -11)"
    assert found["a rank takes"] == (
        "2 visible (CUDA_VISIBLE_DEVICES=2,3); this is rank 1 of the node (SLURM_LOCALID): device 1"
    )
    assert found["CuPy's and CUDA C"] == (
        "cannot be compiled: pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 "
        '(Failure finding "libnvrtc.so.12")'
    )
    answers[doctor._AWARE_PROBE] = ({"aware": True}, "")
    answers[doctor._NVRTC_PROBE] = ({"version": "12.9"}, "")
    assert doctor._gpu()["CuPy's and CUDA C"] == "can be compiled (NVRTC 12.9)"
    answers[doctor._COMPILER_PROBE] = ({"problem": ""}, "")
    assert (doctor._gpu()["cuda-aware mpi"], doctor._gpu()["kernels"]) == (True, "can be compiled")
    answers[doctor._CUDA_PROBE] = ({"cupy": "14.2.0", "devices": []}, "")
    assert "a rank takes" not in doctor._gpu()


def test_the_probes_of_devices_are_python() -> None:
    for source in (
        doctor._CUDA_PROBE,
        doctor._AWARE_PROBE,
        doctor._COMPILER_PROBE,
        doctor._NVRTC_PROBE,
    ):
        compile(source, "<probe>", "exec")
    assert isinstance(doctor._probe(doctor._COMPILER_PROBE)[0]["problem"], str)
