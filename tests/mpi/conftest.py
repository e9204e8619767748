"""Tests that run on every rank of an mpirun; tests/test_mpi_suite.py starts them at several sizes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rustsim_hpc.ranks.team import MpiTeam, Team, open_team

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Outside of mpirun they would only be skipped one by one; the suite's own test runs them there.
    return None if config.getoption("--with-mpi", default=False) else True


@pytest.fixture(scope="session")
def team() -> Team:
    team = open_team()
    assert isinstance(team, MpiTeam)
    return team


@pytest.fixture
def shared_path(team: Team) -> Iterator[Path]:
    """A folder that is the same on all ranks, gone afterwards."""
    folder = tempfile.TemporaryDirectory(prefix="rustsim-") if team.rank == 0 else None
    yield Path(team.bcast("" if folder is None else folder.name))
    team.barrier()
    if folder is not None:
        folder.cleanup()
