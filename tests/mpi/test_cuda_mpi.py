"""Jobs whose ranks each have a device: the bits of one rank on the CPU, and what all of them refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_planes import needs_compiler, see

import rustsim_hpc as rs
from rustsim_hpc.errors import JobError
from rustsim_hpc.job.launch import run_job
from rustsim_hpc.job.spec import Override, RunOptions, read_job
from rustsim_hpc.ranks.team import SoloTeam, Team

JOB = Path(__file__).resolve().parents[2] / "jobs" / "random_walk.toml"
pytestmark = needs_compiler


def run(team: Team, folder: Path, **options: object) -> tuple[str, int]:
    sizes = {"agents": 5000, "steps": 4, "partitions": 6, **options}
    spec, _ = read_job(JOB, [Override("run", key, value, key) for key, value in sizes.items()], environ={})
    summary = run_job(spec, RunOptions(out=folder, progress=False), team)
    return summary.executor, summary.fingerprint


def test_each_rank_has_its_device(team: Team, shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = see(monkeypatch, "abcd")
    executor, fingerprint = run(team, shared_path / "run", backend="cuda")
    assert executor == "cuda"
    assert list(devices.made) == [team.rank]
    recorded = team.bcast(rs.open_run(shared_path / "run").record["hosts"] if team.rank == 0 else None)
    assert [(facts["rank"], facts["ordinal"]) for facts in recorded[0]["devices"]] == [
        (rank, rank) for rank in range(team.size)
    ]
    alone = run(SoloTeam(), shared_path / f"alone{team.rank}", backend="cpu")
    assert alone[0] != "cuda"
    assert alone[1] == fingerprint


def test_sharing_is_refused_on_all_ranks(
    team: Team, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = see(monkeypatch, "a")
    if team.size > 1:
        with pytest.raises(JobError, match=f"{team.size} ranks on .* would share 1 CUDA device"):
            run(team, shared_path / "run", backend="cuda")
        assert not (shared_path / "run").exists()
    assert run(team, shared_path / "shared", backend="cuda", share_devices=True)[0] == "cuda"
    assert list(devices.made) == [0]
