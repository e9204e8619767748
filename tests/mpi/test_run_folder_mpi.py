"""A run's folder under ranks: all hold it, and any of them keeps others out."""

from __future__ import annotations

from pathlib import Path

import pytest

from rustsim_hpc.errors import RunFolderError
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.run_folder.folder import RunFolder
from rustsim_hpc.run_folder.lock import FolderLock, is_locked
from rustsim_hpc.run_folder.record import RunFacts, read_record

pytestmark = pytest.mark.mpi
FACTS = RunFacts(job="flock", seed=1, agents=10, steps=5)


def test_all_ranks_hold_the_folder(team: Team, shared_path: Path) -> None:
    path = shared_path / "run"
    folder = RunFolder.create(path, "", FACTS, team, wait_seconds=2)
    record = read_record(path)
    assert record["ranks"] == team.size
    assert sorted(rank for host in record["hosts"] for rank in host["ranks"]) == list(range(team.size))
    team.barrier()
    with pytest.raises(RunFolderError, match="in use"):
        RunFolder.reopen(path, FACTS, team, wait_seconds=0.1)
    if team.rank == 0:
        folder.release()
    team.barrier()
    assert is_locked(path) == (team.size > 1), "the other ranks still hold it"
    team.barrier()
    if team.rank == 0 and team.size > 1:
        with pytest.raises(RunFolderError, match="in use"):
            FolderLock.claim(path, 0.1)
    team.barrier()
    if team.rank > 0:
        folder.release()
    team.barrier()
    again = RunFolder.reopen(path, FACTS, team, wait_seconds=2)
    again.update(session={"resumed_from": 3})
    again.finish("done", exit_code=0, step_index=5)
    team.barrier()
    again.release()
    assert [session["resumed_from"] for session in read_record(path)["sessions"]] == [None, 3]


def test_a_refused_folder_is_refused_on_all_ranks(team: Team, shared_path: Path) -> None:
    if team.rank == 0:
        (shared_path / "notes.txt").write_text("mine")
    team.barrier()
    with pytest.raises(RunFolderError, match="is not empty"):
        RunFolder.create(shared_path, "", FACTS, team, wait_seconds=0.1)
