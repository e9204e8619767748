"""`SoloTeam`, and finding the launcher from the environment."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from rustsim_hpc.errors import CheckpointFileError, LauncherError, TeamError
from rustsim_hpc.ranks import launcher
from rustsim_hpc.ranks.team import Launcher, SoloTeam, Team, agree, agree_hash, detect_launcher, open_team


def run(program: str, expected: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `program` in a Python that no launcher has started."""
    launchers = ("PMI", "OMPI", "SLURM")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == expected, done.stderr
    return done


def test_solo_collectives_are_identities() -> None:
    team = SoloTeam()
    values = np.array([1, -2], np.int64)
    assert isinstance(team, Team)
    assert (team.rank, team.size, team.node_rank, team.node_size, team.native) == (0, 1, 0, 1, None)
    assert team.sum_int64(values) is values
    assert values.tolist() == [1, -2]
    assert team.gather("a") == ["a"]
    assert team.allgather("a") == ["a"]
    assert team.bcast("a") == "a"
    assert team.chain(3, lambda value: value * 7) == 21
    team.barrier()
    team.node_barrier()


def test_solo_shared_table_is_read_only_and_no_copy() -> None:
    table = np.arange(3.0)
    shared = SoloTeam().node_shared_array(table)
    assert np.shares_memory(shared, table)
    assert not shared.flags.writeable
    assert table.flags.writeable
    with pytest.raises(TeamError, match="must bring"):
        SoloTeam().node_shared_array(None)


def test_solo_agreement_raises_the_error_itself() -> None:
    agree(SoloTeam(), None)
    agree_hash(SoloTeam(), "job file", "abc")
    error = CheckpointFileError(message="no")
    with pytest.raises(CheckpointFileError) as caught:
        agree(SoloTeam(), error)
    assert caught.value is error


def test_abort_ends_the_process_with_its_code_and_one_line() -> None:
    program = "from rustsim_hpc.ranks.team import SoloTeam\nSoloTeam().abort(3, 'stuck in\\na phase')"
    done = run(program, expected=3)
    assert done.stderr == "stuck in a phase\n"


BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({}, None),
        ({"PATH": "/bin", "PMI_SIZE": "4"}, None),
        ({"PMI_SIZE": "4", "PMI_RANK": "2"}, Launcher("mpirun (PMI)", 4, 2, "PMI_SIZE")),
        (
            {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"},
            Launcher("mpirun (Open MPI)", 3, 0, "OMPI_COMM_WORLD_SIZE"),
        ),
        (
            {"MV2_COMM_WORLD_SIZE": "3", "MV2_COMM_WORLD_RANK": "1"},
            Launcher("mpirun (MVAPICH)", 3, 1, "MV2_COMM_WORLD_SIZE"),
        ),
        # A batch script: tasks are reserved, but this is not one of them.
        (BATCH, None),
        (BATCH | {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "1"}, None),
        # The shell of a salloc is a step of its own kind.
        (BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (
            BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            Launcher("srun", 2, 1, "SLURM_STEP_NUM_TASKS"),
        ),
        (BATCH | {"SLURM_STEPID": "3"}, Launcher("srun", 4, 0, "SLURM_NTASKS")),
        # mpirun inside of a job starts its helpers with srun: its own ranks are what counts.
        (
            BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "8", "PMI_RANK": "5"},
            Launcher("mpirun (PMI)", 8, 5, "PMI_SIZE"),
        ),
    ],
)
def test_launchers(environ: dict[str, str], launcher: Launcher | None) -> None:
    assert detect_launcher(environ) == launcher


@pytest.mark.parametrize("text", ["", "four", "-1", "4.0", "٤"])
def test_a_launcher_variable_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(LauncherError, match="PMI_SIZE"):
        detect_launcher({"PMI_SIZE": text, "PMI_RANK": "0"})


def test_no_launcher_no_mpi() -> None:
    program = (
        "import sys\nfrom rustsim_hpc.ranks.team import open_team\nteam = open_team()\n"
        "assert type(team).__name__ == 'SoloTeam'\n"
        "assert not any(name.split('.')[0] == 'mpi4py' for name in sys.modules)"
    )
    run(program)


def test_a_single_task_of_srun_is_solo() -> None:
    team = open_team(BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    assert isinstance(team, SoloTeam)


LAUNCHED = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


def test_without_mpi4py_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LauncherError, match=r"Open MPI\) started 2 ranks, but mpi4py") as caught:
        open_team(LAUNCHED)
    assert 'pip install "rustsim-hpc[mpi]"' in caught.value.details()
    assert caught.value.rank == 1


def test_without_an_mpi_library_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLibrary:
        rc = type("rc", (), {})

        def __getattr__(self, name: str) -> object:
            raise RuntimeError("cannot load MPI library\nlibmpi.so: not found")

    monkeypatch.setitem(sys.modules, "mpi4py", NoLibrary())  # type: ignore[arg-type]
    with pytest.raises(LauncherError, match="there is no MPI library: cannot load MPI library libmpi"):
        open_team(LAUNCHED)


def test_another_mpis_mpirun_is_refused_before_mpi_starts() -> None:
    pytest.importorskip("mpi4py")
    program = (
        "from rustsim_hpc.errors import LauncherError\nfrom rustsim_hpc.ranks.team import open_team\n"
        f"try:\n    open_team({LAUNCHED!r})\nexcept LauncherError as error:\n    print(error)\n"
        "from mpi4py import MPI\nprint(MPI.Is_initialized())"
    )
    done = run(program)
    if "MPICH" not in done.stdout:
        pytest.skip("mpi4py loads an Open MPI here")
    assert "started 2 ranks (OMPI_COMM_WORLD_SIZE), but the MPI library here is MPICH" in done.stdout
    assert done.stdout.endswith("launcher and library belong to different MPIs\nFalse\n")


def test_silent_singletons_are_refused() -> None:
    pytest.importorskip("mpi4py")
    # What each of them sees where the launcher does not know the library: a world of its own.
    program = (
        "from rustsim_hpc.errors import LauncherError\nfrom rustsim_hpc.ranks.team import open_team\n"
        "step = {'SLURM_STEP_ID': '0', 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_PROCID': '1'}\n"
        "try:\n    open_team(step)\nexcept LauncherError as error:\n    print(error)\n"
    )
    done = run(program)
    assert "srun started 2 ranks (SLURM_STEP_NUM_TASKS), but MPI here" in done.stdout
    assert "sees 1: launcher and library belong to different MPIs" in done.stdout


class Room:
    """What os.statvfs says of /dev/shm."""

    f_frsize = 4096

    def __init__(self, free: int) -> None:
        self.f_bavail = free // 4096


@pytest.mark.parametrize(
    ("prefix", "rank", "free", "told_by"),
    [
        (("MPI_LOCALRANKID", "MPI_LOCALNRANKS"), 0, 3 << 20, 6),
        (("MPI_LOCALRANKID", "MPI_LOCALNRANKS"), 1, 3 << 20, None),
        (("MPI_LOCALRANKID", "MPI_LOCALNRANKS"), 1, 1 << 19, -1),
        (("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"), 0, 4 << 20, None),
        (("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"), 0, 0, 6),
        ((), 0, 0, None),
    ],
)
def test_a_full_shared_memory_is_told_before_mpi_starts(
    prefix: tuple[str, ...], rank: int, free: int, told_by: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.os, "statvfs", lambda path: Room(free))
    environ = {"PMI_SIZE": "8", "PMI_RANK": "6", **dict(zip(prefix, (str(rank), "4"), strict=False))}
    if told_by is None:
        launcher.check_shared_memory(environ)
        return
    with pytest.raises(LauncherError, match=f"has {free:,} bytes free") as caught:
        launcher.check_shared_memory(environ)
    assert caught.value.rank == (None if told_by < 0 else told_by)
    assert "--shm-size" in str(caught.value.hint)
