"""Where jobs run: which device each rank takes, what is refused and how; jobs on devices that are none."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from cuda_planes import facts_of, needs_compiler, see

import rustsim_hpc as rs
from rustsim_hpc.errors import JobError
from rustsim_hpc.job.backend import choose_backend, one_each
from rustsim_hpc.job.launch import resume_run, run_job
from rustsim_hpc.job.prepared import bind
from rustsim_hpc.job.spec import Override, RunOptions, read_job
from rustsim_hpc.ranks.team import SoloTeam
from rustsim_hpc.run_folder.inspection import inspect_path
from rustsim_hpc.state import cuda_found, cupy_device

JOBS = Path(__file__).resolve().parent.parent / "jobs"


def spec_of(job, folder, *, environ=None, **run):
    changes = [Override("run", key, value, f"--{key}") for key, value in run.items()]
    spec, _ = read_job(JOBS / f"{job}.toml", changes, environ=environ or {})
    return spec, RunOptions(out=folder, progress=False)


# -- which device ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [
        ([["a", "b", "c", "d"]] * 4, [0, 1, 2, 3]),  # all ranks see all of them
        ([["a", "b"]] * 1, [0]),
        ([["a"], ["b"]], [0, 0]),  # Slurm shows each task its own
        ([["b", "a"], ["b"]], [1, 0]),  # the second one has no choice
        ([["a", "b"], ["a", "c"], ["a"]], [1, 1, 0]),
        ([["a"]] * 2, [0, None]),
        ([["a", "b"]] * 3, [0, 1, None]),
        ([[], ["a"]], [None, 0]),
    ],
)
def test_each_rank_has_a_device_of_its_own(visible, wanted):
    assert one_each(visible) == wanted


class Ranks(SoloTeam):
    """One rank of several, whose others are told to it."""

    def __init__(self, others):
        super().__init__()
        self.host = "here"
        self.others = others
        self.size = 1 + len(others)

    def allgather(self, value):
        return [value, *self.others]


@pytest.fixture
def stand_ins(monkeypatch):
    """Let this process see two devices that are none."""
    return see(monkeypatch, "ab")


@needs_compiler
def test_ranks_of_two_machines(stand_ins):
    spec, _ = spec_of("particles", None, backend="cuda")
    others = [("here", ("a", "b"), ""), ("there", ("c",), "")]
    assert choose_backend(spec, bind(spec), Ranks(others)).ordinals == (0, 1, 0)


@needs_compiler
@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_sharing_a_device_must_be_asked_for(stand_ins, backend):
    spec, _ = spec_of("particles", None, backend=backend)
    others = [("here", ("a", "b"), "")] * 3
    with pytest.raises(JobError, match="4 ranks on here would share 2 CUDA devices") as caught:
        choose_backend(spec, bind(spec), Ranks(others))
    assert "share_devices = true" in caught.value.hint
    shared, _ = spec_of("particles", None, backend=backend, share_devices=True)
    assert choose_backend(shared, bind(shared), Ranks(others)).ordinals == (0, 1, 0, 1)


@needs_compiler
def test_all_ranks_or_none(stand_ins, capsys):
    others = [("there", (), "CUDA finds no device")]
    spec, _ = spec_of("particles", None, backend="cuda")
    with pytest.raises(JobError, match=r"backend = cuda: CUDA finds no device \(rank 1 on there\)"):
        choose_backend(spec, bind(spec), Ranks(others))
    spec, _ = spec_of("particles", None)
    assert choose_backend(spec, bind(spec), Ranks(others)).name == "cpu"
    assert capsys.readouterr().err == ""


# -- what is refused ---------------------------------------------------------------------------------


def test_cuda_that_cannot_be_had_is_one_clear_line(tmp_path):
    if cuda_found.visible_devices():
        pytest.skip("there is a CUDA device")
    command = [sys.executable, "-m", "rustsim_hpc", "run", str(JOBS / "particles.toml"), "--steps", "1"]
    command += ["--out", str(tmp_path / "run")]
    for more, environ in ((["--backend", "cuda"], {}), ([], {"RUSTSIM_BACKEND": "cuda"})):
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, env={**os.environ, **environ}, check=False
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        [line] = done.stderr.strip().splitlines()
        assert "[run] backend = cuda: " in line
        assert 'pip install "rustsim-hpc[gpu]"' in line or "CUDA finds no device" in line
        assert not (tmp_path / "run").exists()


@pytest.fixture
def fresh(monkeypatch):
    cuda_found._found.cache_clear()
    yield
    monkeypatch.undo()
    cuda_found._found.cache_clear()


def test_without_cupy(fresh, monkeypatch):
    monkeypatch.setattr(cuda_found.importlib.util, "find_spec", lambda _: None)
    assert cuda_found.why_no_device() == 'CuPy is not installed: pip install "rustsim-hpc[gpu]"'
    assert cuda_found.visible_devices() == ()
    spec, _ = spec_of("particles", None, backend="cuda")
    with pytest.raises(JobError, match="backend = cuda: CuPy is not installed"):
        choose_backend(spec, bind(spec), SoloTeam())


def test_with_cupy_and_no_driver(fresh, monkeypatch):
    monkeypatch.setattr(cuda_found.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(cuda_found, "_DRIVER", "libcuda.so.that-is-not-there")
    assert cuda_found.why_no_device().startswith("CUDA finds no device: there is no NVIDIA driver here")
    spec, _ = spec_of("particles", None)
    assert choose_backend(spec, bind(spec), SoloTeam()).name == "cpu"


LIBRARY = "ImportError: libcudart.so.11.0: cannot open shared object file"
CUPYS_PAGE = f"""
================================================================
Failed to import CuPy.

Original error:
  {LIBRARY}
================================================================
"""


@pytest.mark.parametrize(
    ("count", "why"),
    [
        (0, ""),
        (RuntimeError("cudaErrorNoDevice: none\nmore"), ": cudaErrorNoDevice: none"),
        (ImportError(CUPYS_PAGE), f": CuPy cannot be loaded: {LIBRARY}"),
        (ValueError(), ": ValueError"),
    ],
)
def test_with_cupy_and_no_device(fresh, monkeypatch, count, why):
    def get_device_count():
        if isinstance(count, Exception):
            raise count
        return count

    runtime = types.SimpleNamespace(getDeviceCount=get_device_count)
    fake = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(cuda_found.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(cuda_found.ctypes, "CDLL", lambda _: None)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    said = cuda_found.why_no_device()
    assert said == f"CUDA finds no device (CUDA_VISIBLE_DEVICES=7){why}"
    with pytest.raises(rs.errors.DeviceError, match="CUDA finds no device"):
        cupy_device.CupyDevice(0)


def test_parts_of_one_device_are_told_apart(fresh, monkeypatch):
    runtime = types.SimpleNamespace(
        getDeviceCount=lambda: 1, getDeviceProperties=lambda _: {"uuid": b"\x02" * 16}
    )
    fake = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(cuda_found.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(cuda_found.ctypes, "CDLL", lambda _: None)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    seen = []
    for part in ("MIG-a", "MIG-b", "GPU-02", "0"):
        cuda_found._found.cache_clear()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", part)
        seen.append(cuda_found.visible_devices())
    assert one_each(seen) == [0, 0, 0, None]


def remote(**run):
    spec, _ = spec_of("particles", None, **run)
    return spec.model_copy(update={"run": spec.run.model_copy(update={"executor": "remote"})})


def test_what_does_not_go_together(stand_ins):
    spec = remote(backend="cuda")
    with pytest.raises(JobError, match="cuda does not go with executor = remote"):
        choose_backend(spec, bind(spec), SoloTeam())
    here, _ = spec_of("particles", None, backend="cpu", memory="device", executor="threads")
    for spec in (here, remote(memory="device")):
        with pytest.raises(JobError, match="memory = device needs backend = cuda"):
            choose_backend(spec, bind(spec), SoloTeam())


def test_auto_leaves_remote_workers_alone(stand_ins):
    spec = remote()
    assert choose_backend(spec, bind(spec), SoloTeam()).name == "cpu"


# -- jobs --------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("job", ["us_flights", "particles", "random_walk"])
def test_jobs_run_unchanged(stand_ins, tmp_path, job):
    sizes = {"agents": 8000, "steps": 6}
    spec, options = spec_of(job, tmp_path / "cpu", backend="cpu", **sizes)
    plain = run_job(spec, options, SoloTeam())
    spec, options = spec_of(job, tmp_path / "gpu", memory="device", **sizes)
    spec = spec.model_copy(update={"checkpoint": spec.checkpoint.model_copy(update={"every": 3})})
    made = run_job(spec, options, SoloTeam())
    assert (made.executor, made.workers, made.partitions) == ("cuda", 1, 1)
    assert plain.executor != "cuda"
    assert made.fingerprint == plain.fingerprint
    assert stand_ins(0).counts["replay"]
    assert not stand_ins(0).live, "all of its memory is given back"
    runs = [rs.open_run(path) for path in (tmp_path / "cpu", tmp_path / "gpu")]
    assert runs[1].columns("x" if job != "us_flights" else "state", step=6).tobytes() == (
        runs[0].columns("x" if job != "us_flights" else "state", step=6).tobytes()
    )
    assert sorted(runs[1].checkpoints()) == [3, 6]
    for name in runs[0].outputs():
        if name.endswith(".csv"):
            assert (tmp_path / "gpu" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()


@needs_compiler
def test_a_run_changes_sides(stand_ins, tmp_path):
    """A run that stopped on a device goes on here, and the other way round."""
    ends = []
    for first, then in (("cuda", "cpu"), ("cpu", "cuda")):
        folder = tmp_path / first
        spec, options = spec_of("random_walk", folder, backend=first, agents=3000, steps=4)
        run_job(spec, options, SoloTeam())
        spec, options = spec_of("random_walk", folder, backend=then, agents=3000, steps=9)
        ends.append(resume_run(folder, spec, options, SoloTeam()))
    assert [(end.executor == "cuda", end.resumed_from) for end in ends] == [(False, 4), (True, 4)]
    assert ends[0].fingerprint == ends[1].fingerprint


@needs_compiler
def test_a_device_that_is_too_small(stand_ins, tmp_path):
    stand_ins.given["capacity"] = 2**16
    spec, options = spec_of("particles", tmp_path / "run", backend="cuda", agents=100_000, steps=2)
    with pytest.raises(rs.errors.ExecutorError, match="out of memory: 3,200,000 bytes asked for"):
        run_job(spec, options, SoloTeam())
    assert rs.open_run(tmp_path / "run").status == "failed"


def test_nothing_imports_cupy():
    code = "import sys, rustsim_hpc as rs; rs.CudaPartitionExecutor; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- what is recorded --------------------------------------------------------------------------------


@needs_compiler
def test_the_record_has_each_ranks_device(stand_ins, tmp_path):
    folder = tmp_path / "run"
    spec, options = spec_of("random_walk", folder, backend="cuda", agents=300, steps=2)
    run_job(spec, options, SoloTeam())
    record = rs.open_run(folder).record
    [host] = record["hosts"]
    [own] = host["devices"]
    assert own == {"rank": 0, **facts_of(0), "libdevice": own["libdevice"]}
    assert len(own["libdevice"]) == 16
    assert "device" not in record
    assert record["sessions"][0]["hosts"] == record["hosts"]
    found = inspect_path(folder)
    assert not found.problems
    line = found.facts["devices"]["rank 0"]
    for part in (
        "stand-in (compute capability 9.0), 64.0 MiB, GPU-0 at 0000:00:00.0",
        "driver 550.1 (CUDA 12.4)",
    ):
        assert part in line
    assert "CuPy 14.2.0 (CUDA 12.9)" in found.text()


@needs_compiler
@pytest.mark.parametrize("then", ["another device", "the CPU", "the same"])
def test_a_resume_on_another_kind_of_device_warns(stand_ins, tmp_path, monkeypatch, capsys, then):
    folder = tmp_path / "run"
    spec, options = spec_of("random_walk", folder, backend="cuda", agents=300, steps=2)
    run_job(spec, options, SoloTeam())
    if then == "another device":
        monkeypatch.setattr(cuda_found, "device_facts", lambda k: {**facts_of(k), "name": "another"})
    backend = "cpu" if then == "the CPU" else "cuda"
    spec, options = spec_of("random_walk", folder, backend=backend, agents=300, steps=4)
    capsys.readouterr()
    resume_run(folder, spec, options, SoloTeam())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    if then == "the same":
        assert said == []
        return
    [line] = said
    before = r"warning: CUDA device: stand-in \(compute capability 9\.0, libdevice \w{16}\) then, "
    assert re.fullmatch(before + (r"another \(.*\) now" if backend == "cuda" else "none now"), line)
