"""Report on this machine and installation: versions, cores, memory, disk, MPI, HDF5, Numba's cache, GPU.

Libraries that can crash the process (MPI, HDF5, ZeroMQ, CUDA) are queried in subprocesses, so that a broken
one becomes a line of the report instead of ending it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from rustsim_hpc.run_folder.environment import host_facts
from rustsim_hpc.version import __version__

Report = dict[str, dict[str, Any]]
"""Section → name → fact; the section "problems" lists what should be fixed."""

_CORE: Final = (
    "numpy", "numba", "llvmlite", "h5py", "click", "pydantic", "tqdm", "tomli-w", "xxhash", "platformdirs",
)  # fmt: skip
_EXTRAS: Final = {"mpi4py": "mpi", "mpich": "mpi", "matplotlib": "plot", "pyzmq": "remote"}
_PROBE_SECONDS: Final = 60
_MPI_PROBE: Final = """
import json, mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
print(json.dumps({"library": " ".join(MPI.Get_library_version().split("\\n")[0].split())}))
"""
_HDF5_PROBE: Final = """
import h5py, json
print(json.dumps({"library": h5py.version.hdf5_version, "parallel": bool(h5py.get_config().mpi)}))
"""
_CUDA_PROBE: Final = """
import cupy, json
runtime = cupy.cuda.runtime
found = {"cupy": cupy.__version__, "devices": []}
if cupy.is_available():
    found["cuda driver"] = runtime.driverGetVersion()
    for number in range(runtime.getDeviceCount()):
        facts = runtime.getDeviceProperties(number)
        with cupy.cuda.Device(number):
            free = runtime.memGetInfo()[0]
        found["devices"].append(
            f"{number}: {facts['name'].decode()}, sm_{facts['major']}{facts['minor']}, "
            f"{free / 2**30:.1f} GiB free of {facts['totalGlobalMem'] / 2**30:.1f}, "
            f"UUID {bytes(facts['uuid']).hex()}"
        )
print(json.dumps(found))
"""
# An MPI without CUDA support treats the address as host memory and crashes, or returns wrong data. Only
# copies are made: a kernel would need NVRTC, which is not tested here.
_AWARE_PROBE: Final = """
import cupy, json, numpy
from mpi4py import MPI
here = numpy.arange(4096)
sent, got = cupy.asarray(here), cupy.asarray(numpy.zeros_like(here))
cupy.cuda.get_current_stream().synchronize()
MPI.COMM_SELF.Sendrecv(sent, 0, recvbuf=got, source=0)
print(json.dumps({"aware": bool((got.get() == here).all())}))
"""
# CuPy uses NVRTC to compile array phases and users' CUDA C.
_NVRTC_PROBE: Final = """
import cupy, json
print(json.dumps({"version": ".".join(map(str, cupy.cuda.nvrtc.getVersion()))}))
"""
_ZMQ_PROBE: Final = """
import json, zmq
print(json.dumps({"library": f"libzmq {zmq.zmq_version()}", "curve": bool(zmq.has("curve"))}))
"""
_COMPILER_PROBE: Final = """
import json
from rustsim_hpc.kernels.cuda_compile import why_no_compiler
print(json.dumps({"problem": why_no_compiler()}))
"""


def examine() -> Report:
    """Return the report; runs would be written in the working directory."""
    problems: dict[str, str] = {}
    return {
        "python": {
            "rustsim-hpc": __version__,
            "python": platform.python_version(),
            "program": sys.executable,
        },
        "packages": _packages(problems),
        "machine": _machine(),
        "disk": _disk(Path.cwd(), problems),
        "mpi": _mpi(problems),
        "remote workers": _remote(problems),
        "hdf5": _hdf5(problems),
        "numba": _numba(problems),
        "gpu": _gpu(),
        "problems": problems,
    }


def table(report: Report) -> str:
    """Return a report as a readable table."""
    lines = []
    for section, facts in report.items():
        lines += [section] + [f"  {name:<16} {_words(value)}" for name, value in facts.items()]
        if not facts:
            lines.append("  none")
    return "\n".join(lines)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages(problems: dict[str, str]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name in _CORE:
        facts[name] = _version(name) or "missing"
        if facts[name] == "missing":
            problems[name] = f"not installed; pip install {name}"
    for name, extra in _EXTRAS.items():
        facts[name] = _version(name) or f'not installed (pip install "rustsim-hpc[{extra}]")'
    return facts


def _machine() -> dict[str, Any]:
    own = host_facts()
    memory = _memory_info()
    facts: dict[str, Any] = {
        "host": own["host"],
        "system": own["system"],
        "libm": own["libm"]["library"],
        "processor": own["cpu"],
        "cores": os.cpu_count() or 1,
        "cores to use": own["cores"],
    }
    if (share := _group_cores()) is not None:
        facts["cores of group"] = share
    facts["memory"] = f"{memory.get('MemTotal', 0) / 2**30:.1f} GiB"
    facts["memory free"] = f"{memory.get('MemAvailable', 0) / 2**30:.1f} GiB"
    limit = _first_line("/sys/fs/cgroup/memory.max")
    if limit.isdigit():
        facts["memory of group"] = f"{int(limit) / 2**30:.1f} GiB"
    return facts


def _group_cores() -> float | None:
    """Return the CPU limit of the control group (container, batch job) in cores, or None without one."""
    quota, _, period = _first_line("/sys/fs/cgroup/cpu.max").partition(" ")
    return round(int(quota) / int(period), 2) if quota.isdigit() and period.isdigit() else None


def _memory_info() -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    parts = (line.split() for line in _lines("/proc/meminfo"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in parts if len(words) == 3}


def _lines(path: str) -> Iterable[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()


def _first_line(path: str) -> str:
    return next(iter(_lines(path)), "")


def _disk(folder: Path, problems: dict[str, str]) -> dict[str, Any]:
    facts = {"here": f"{folder}: {_free(folder)}"}
    if not os.access(folder, os.W_OK):
        problems["folder"] = f"{folder} cannot be written to; give runs another place with --out"
    for place in (Path("/dev/shm"), Path("/tmp")):  # noqa: S108 (only their free space is read)
        if place.is_dir():
            facts[str(place)] = _free(place)
    return facts


def _free(folder: Path) -> str:
    usage = shutil.disk_usage(folder)
    return f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f}"


def _mpi(problems: dict[str, str]) -> dict[str, Any]:
    from rustsim_hpc.ranks.launcher import detect_launcher

    launcher = detect_launcher(os.environ)
    # In a virtual environment that is not activated, mpirun is in the folder of the Python program.
    mpirun = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
    facts: dict[str, Any] = {
        "launcher": f"{launcher.name}, {launcher.size} ranks" if launcher else "none: one process",
        "mpirun": mpirun or "not on PATH",
        "srun": shutil.which("srun") or "not on PATH",
    }
    if importlib.util.find_spec("mpi4py") is None:
        facts["mpi4py"] = "not installed"
        return facts
    found, failure = _probe(_MPI_PROBE)
    facts["mpi4py"] = _version("mpi4py")
    facts["library"] = library = found.get("library", "cannot be loaded")
    if failure:
        problems["mpi4py"] = f'{failure}; pip install "rustsim-hpc[mpi]", or load the site\'s MPI module'
    elif mpirun:
        family = facts["mpirun is of"] = _launcher_family(mpirun)
        if "unknown" not in (family, _family(library)) and family != _family(library):
            problems["mpirun"] = (
                f"{mpirun} is of {family}, the library is {library}: ranks would not see each other; "
                "put the right mpirun first on PATH"
            )
    return facts


def _launcher_family(mpirun: str) -> str:
    try:
        done = subprocess.run(
            [mpirun, "--version"], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return _family(done.stdout)


def _family(text: str) -> str:
    """Return the MPI implementation named in a version text; MPICH's launcher calls itself HYDRA."""
    lowered = text.lower()
    if "open mpi" in lowered or "openrte" in lowered:
        return "Open MPI"
    return "MPICH" if "hydra" in lowered or "mpich" in lowered else "unknown"


def _remote(problems: dict[str, str]) -> dict[str, Any]:
    """Return the state of ZeroMQ for remote workers, which need CURVE."""
    if _version("pyzmq") is None:
        return {"pyzmq": 'not installed (pip install "rustsim-hpc[remote]")'}
    found, failure = _probe(_ZMQ_PROBE)
    if failure:
        problems["pyzmq"] = f"{failure}; pip install --force-reinstall pyzmq"
    elif not found["curve"]:
        problems["pyzmq"] = (
            "built without CURVE, so remote workers cannot be used: pip install --force-reinstall pyzmq "
            "takes the wheel, which has it"
        )
    return {"pyzmq": _version("pyzmq"), **found}


def _hdf5(problems: dict[str, str]) -> dict[str, Any]:
    if _version("h5py") is None:
        return {"h5py": "not installed"}
    found, failure = _probe(_HDF5_PROBE)
    if failure:
        problems["h5py"] = failure
    return {"h5py": _version("h5py"), **found}


def _numba(problems: dict[str, str]) -> dict[str, Any]:
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given is None and importlib.util.find_spec("platformdirs") is not None:
        import platformdirs

        given = platformdirs.user_cache_dir("rustsim-hpc")
    folder = Path(given or ".")
    # The folder is created when the first kernel is compiled; check whether that will succeed.
    parent = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    writable = os.access(parent, os.W_OK)
    if not writable:
        problems["cache"] = (
            f"{folder} cannot be written to: every process compiles the kernels again; set NUMBA_CACHE_DIR"
        )
    return {"cache": str(folder), "writable": writable, "free": _free(parent)}


def _gpu() -> dict[str, Any]:
    facts: dict[str, Any] = {"driver": _driver()}
    if importlib.util.find_spec("cupy") is None:
        return {**facts, "cupy": 'not installed (pip install "rustsim-hpc[gpu]")'}
    found, failure = _probe(_CUDA_PROBE)
    facts |= found if not failure else {"cupy": failure}
    compiler, failure = _probe(_COMPILER_PROBE)
    facts["kernels"] = failure or compiler["problem"] or "can be compiled"
    nvrtc, failure = _probe(_NVRTC_PROBE)
    missing = "pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"
    facts["CuPy's and CUDA C"] = (
        f"cannot be compiled: {missing} ({failure})"
        if failure
        else (f"can be compiled (NVRTC {nvrtc['version']})")
    )
    if not facts.get("devices"):
        return facts
    facts["a rank takes"] = _rank_map(os.environ, len(facts["devices"]))
    if importlib.util.find_spec("mpi4py") is not None:
        aware, failure = _probe(_AWARE_PROBE)
        # For information only: ranks exchange a few bytes, which are in host memory.
        facts["cuda-aware mpi"] = bool(aware.get("aware")) if not failure else f"no ({failure})"
    return facts


def _rank_map(environ: Mapping[str, str], devices: int) -> str:
    """Return a description of which device a rank takes, as far as the environment shows."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    seen = f"{devices} visible" + ("" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})")
    for name in ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"):
        if environ.get(name, "").isdigit():
            place = int(environ[name])
            own = f"device {place}" if place < devices else "its own only where Slurm has bound one to it"
            return f"{seen}; this is rank {place} of the node ({name}): {own}"
    return f"{seen}; the k-th rank of a node takes device k of those that it sees"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi on PATH"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return "; ".join((done.stdout if done.returncode == 0 else done.stdout + done.stderr).split("\n")).strip(
        "; "
    )


def _probe(source: str) -> tuple[dict[str, Any], str]:
    """Run Python source that prints one JSON object; return it and "", or {} and why it failed."""
    # With a launcher's variables MPI would take this child process for a rank.
    launchers = ("PMI_", "PMIX_", "OMPI_", "SLURM_", "HYDI_", "MPI_LOCAL")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", source],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
            env=environ,
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer in {_PROBE_SECONDS} s"
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended with status {done.returncode}"]
        return {}, last[0]
    return found, ""
