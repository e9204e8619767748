"""Jobs whose ranks each have a device: the bits of one rank on the CPU, and what all of them refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_planes import needs_compiler, see

import rustsim_hpc as rs
from rustsim_hpc.errors import DeviceError, ExecutorError, JobError
from rustsim_hpc.executors.device_columns import DeviceColumns
from rustsim_hpc.job.launch import run_job
from rustsim_hpc.job.spec import Override, RunOptions, read_job
from rustsim_hpc.ranks.team import SoloTeam, Team

JOB = Path(__file__).resolve().parents[2] / "jobs" / "random_walk.toml"
pytestmark = needs_compiler


def run(team: Team, folder: Path, **options: object) -> tuple[str, int]:
    sizes = {"agents": 5000, "steps": 4, "partitions": 6, **options}
    changes = [Override("run", key, value, key) for key, value in sizes.items()]
    spec, _ = read_job(JOB, [*changes, Override("checkpoint", "every", 2, "every")], environ={})
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


def test_checkpoints_are_those_of_one_rank_on_the_cpu(
    team: Team, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, "abcd")
    run(team, shared_path / "run", backend="cuda")
    if team.rank == 0:
        run(SoloTeam(), shared_path / "alone", backend="cpu")
        there, here = rs.open_run(shared_path / "run"), rs.open_run(shared_path / "alone")
        assert sorted(there.checkpoints()) == sorted(here.checkpoints()) == [2, 4]
        for step in (2, 4):
            assert there.columns("x", step=step).tobytes() == here.columns("x", step=step).tobytes()


def test_a_device_that_cannot_copy_ends_all_ranks(
    team: Team, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, "abcd")

    def refused(self: DeviceColumns, out: object) -> None:
        raise DeviceError("device 0: copy refused")

    if team.rank == team.size - 1:
        monkeypatch.setattr(DeviceColumns, "copy_aside", refused)
    with pytest.raises(ExecutorError, match="copy refused") as caught:
        run(team, shared_path / "run", backend="cuda")
    assert team.size == 1 or caught.value.rank == team.size - 1


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
