"""Where a run's time goes: the parts fit into the whole, and the table says what it should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rustsim_hpc.control.profiling import SPANS, RankProfile, RunProfile, _LoopDigests
from rustsim_hpc.job.launch import run_job
from rustsim_hpc.job.spec import Override, RunOptions, read_job
from rustsim_hpc.job.summary import RunSummary
from rustsim_hpc.proof.replay_log import read_replay_log
from rustsim_hpc.ranks.team import SoloTeam
from rustsim_hpc.run_folder.metrics_log import read_metrics

ROOT = Path(__file__).parents[1]


def run(out: Path, *sets: str, job: str = "particles", profile: bool = True) -> RunSummary:
    small = [Override.parse(text) for text in ("run.agents=20000", "run.steps=12", *sets)]
    spec, _ = read_job(ROOT / "jobs" / f"{job}.toml", small, environ={})
    return run_job(spec, RunOptions(out=out, progress=False, profile=profile), SoloTeam())


@pytest.mark.parametrize("executor", ["inline", "threads", "processes"])
def test_the_parts_fit_into_the_loop(tmp_path: Path, executor: str) -> None:
    summary = run(
        tmp_path / "run",
        f"run.executor={executor}",
        "replay.mode=record",
        "checkpoint.every=4",
        "run.workers=2",
    )
    profile = summary.profile
    assert profile is not None
    [rank] = profile.ranks
    assert set(rank.spans) == set(SPANS)
    assert 0.5 * rank.loop < sum(rank.spans.values()) + rank.compiling <= rank.loop * 1.001
    assert all(rank.spans[name] > 0 for name in SPANS if name not in ("checks", "outputs"))
    assert list(rank.phases) == ["move", "slow"]
    assert rank.busy > 0
    assert rank.rows == 20000
    # What moves: move reads four float32 and writes two, slow reads two and writes them.
    assert profile.row_bytes == {"move": 24, "slow": 16}
    assert rank.tile_proof == 0, "digests are made in the loop of the phases"
    assert rank.loops_compared == 1, "the 8th of 12"
    assert 0 < profile.proof_share < 1


def test_it_is_told_where_the_run_is(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", "replay.mode=record", job="us_flights")
    assert summary.profile is not None
    assert summary.profile.ranks[0].tile_proof > 0, "of kernels that have loops of their own"
    text = summary.text()
    for name in ("move", "crowd", "p_inf", "progress", "compilation", *SPANS.values()):
        assert f"  {name} " in text
    assert "of the time went into proof" in text
    told = json.loads(summary.to_json())["profile"]
    assert told == json.loads(json.dumps(summary.profile.to_dict()))
    [*before, last] = read_metrics(tmp_path / "run")
    assert last["profile"] == told
    assert all("profile" not in entry for entry in before)


def test_without_being_asked_there_is_none(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", profile=False)
    assert summary.profile is None
    assert "profile" not in summary.to_dict()
    assert all("profile" not in entry for entry in read_metrics(tmp_path / "run"))


def test_a_profile_changes_no_proof(tmp_path: Path) -> None:
    alike = [run(tmp_path / str(on), "replay.mode=record", profile=on) for on in (True, False)]
    logs = [read_replay_log(tmp_path / str(on) / "replay.jsonl") for on in (True, False)]
    assert logs[0].entries == logs[1].entries
    assert alike[0].fingerprint == alike[1].fingerprint


def test_digests_now_and_then_are_told_apart_too(tmp_path: Path) -> None:
    profile = run(tmp_path / "run", "run.steps=72", "replay.mode=record", "replay.interval=4").profile
    assert profile is not None
    assert profile.ranks[0].loops_compared == 2, "of the 8th and 16th of 18"


def test_steps_made_together_have_their_digests_beside_the_loops(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text((ROOT / "rustsim_hpc/bench/models/integrate.py").read_text())
    (tmp_path / "plain.toml").write_text(
        '[model]\nmodule = "plain.py"\n[run]\nagents = 20000\nsteps = 80\n'
        '[replay]\nmode = "record"\ninterval = 4\n'
    )
    spec, _ = read_job(tmp_path / "plain.toml", [], environ={})
    profile = run_job(
        spec, RunOptions(out=tmp_path / "run", progress=False, profile=True), SoloTeam()
    ).profile
    assert profile is not None
    [rank] = profile.ranks
    assert rank.tile_proof > 0
    assert (rank.loop_proof, rank.spans["measuring"]) == (0.0, 0.0)


def test_digests_in_loops_are_told_from_steps_without() -> None:
    # Steps get longer by 1 µs each; digests take 300 µs of them; one step is disturbed.
    digests = _LoopDigests()
    for step in range(64):
        apart = step % 8 == 0
        disturbed = 10**7 if step == 17 else 0
        digests.add(10**6 + 1000 * step + (0 if apart else 300_000) + disturbed, apart=apart)
    seconds, compared = digests.seconds()
    assert compared == 7, "the first has none before it"
    assert seconds == pytest.approx(56 * 300e-6)


def test_steps_that_are_no_slower_with_digests_have_none_to_tell() -> None:
    digests = _LoopDigests()
    for step in range(20):
        digests.add(2000 if step % 8 == 0 else 1000, apart=step % 8 == 0)
    assert digests.seconds() == (0.0, 2)


def rank_profile(
    rank: int, busy: float, proof: float = 0.0, tile_proof: float = 0.0, loop_proof: float = 0.0
) -> RankProfile:
    spans = {**dict.fromkeys(SPANS, 0.0), "executor": busy, "proof": proof}
    phases = {"move": busy - tile_proof}
    compared = 3 if loop_proof else 0
    return RankProfile(rank, f"node{rank}", 10.0, 2.0, spans, phases, tile_proof, loop_proof, compared, 1000)


def test_digests_in_loops_are_proof() -> None:
    profile = RunProfile((rank_profile(0, 4.0, proof=0.4, loop_proof=0.4),), 4, {"move": 24})
    assert profile.proof_share == pytest.approx(0.8 / 8)
    lines = profile.text().splitlines()
    assert any(line.split() == ["of", "it,", "digests", "in", "loops", "0.400", "10.0%"] for line in lines)
    assert lines[-1].endswith("(digests in loops estimated from 3 steps without them)")


def test_figures_of_several_ranks() -> None:
    profile = RunProfile(
        (rank_profile(0, 3.0, 1.0), rank_profile(1, 5.0, 0.6, tile_proof=2.0)), 4, {"move": 24}
    )
    assert profile.imbalance == pytest.approx(5 / 4)
    assert profile.loop == 10.0
    # 1 s of rank 0's 8 s of stepping, 0.6 s and the 2 s of digests of rank 1's.
    assert profile.proof_share == pytest.approx((1.0 + 0.6 + 2.0) / 16)
    [(name, seconds, speed)] = profile.phase_rows()
    assert (name, seconds) == ("move", 6.0)
    assert speed == pytest.approx(24 * 4 * 2000 / 6.0)
    lines = profile.text().splitlines()
    assert "  the slowest rank is busy 1.25 x as long as the mean" in lines
    assert any(line.split() == ["1", "on", "node1", "5.000", "0.000"] for line in lines)


def test_a_phase_that_does_not_say_what_it_moves_has_no_speed() -> None:
    profile = RunProfile((rank_profile(0, 3.0),), 4, {"move": None})
    assert profile.phase_rows() == [("move", 3.0, None)]
    idle = replace(profile, ranks=(rank_profile(0, 0.0),))
    assert idle.imbalance == 1.0
    assert idle.phase_rows() == [("move", 0.0, None)]
