"""The storage's MPI tests with an h5py that is built with MPI: Debian's, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = "/usr/bin/python3"
MPIRUN = "/usr/bin/mpirun.openmpi"
PROBE = "import h5py, mpi4py, sys; sys.exit(not h5py.get_config().mpi or sys.version_info < (3, 11))"
ENVIRON = {
    "PATH": "/usr/bin:/bin",
    "HOME": os.environ.get("HOME", "/"),
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "H5PY_ALWAYS_USE_MPI": "1",
    "NUMBA_NUM_THREADS": "1",
}


def has_parallel_h5py() -> bool:
    if not Path(PYTHON).exists() or shutil.which(MPIRUN) is None:
        return False
    return (
        subprocess.run([PYTHON, "-c", PROBE], check=False, capture_output=True, env=ENVIRON).returncode == 0
    )


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(580),
    pytest.mark.skipif(
        not has_parallel_h5py(), reason="needs Debian's openmpi-bin, python3-mpi4py and python3-h5py-mpi"
    ),
]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the system's h5py, numpy and mpi4py, and what else the package and its tests need."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run(
        [PYTHON, "-m", "venv", "--system-site-packages", folder], check=True, env=ENVIRON, timeout=100
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [name for name in project["project"]["dependencies"] if not name.startswith(("numpy", "h5py"))]
    tools = ("pytest==", "pytest-mpi==", "pytest-timeout==", "hypothesis==")
    wanted += [name for name in project["dependency-groups"]["dev"] if name.startswith(tools)]
    python = folder / "bin" / "python"
    # pip finds its index where the environment of this run says.
    environ = os.environ | {"PYTHONNOUSERSITE": "1"}
    subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True, env=environ, timeout=400)
    return python


@pytest.mark.parametrize("ranks", [2, 3])
def test_single_files_written_collectively(python: Path, ranks: int, tmp_path: Path) -> None:
    command = [
        MPIRUN,
        "--oversubscribe",
        "-n",
        str(ranks),
        str(python),
        "-m",
        "pytest",
        "--with-mpi",
        "-q",
        "-x",
    ]
    command += [
        "-p",
        "no:cacheprovider",
        "--timeout=60",
        "--timeout-method=thread",
        "-W",
        "default",
        "--color=no",
    ]
    done = subprocess.run(
        [*command, "tests/mpi/test_storage_mpi.py", "tests/mpi/test_team_mpi.py"],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRON
        | {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=280,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    # The two that are skipped are of files that parallel HDF5 does not write.
    assert done.stdout.count(" passed, 2 skipped") == ranks, done.stdout[-6000:]
