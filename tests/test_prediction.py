"""The model of a step's time: what it must say where the answer is known."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustsim_hpc.bench import kept, scaling
from rustsim_hpc.bench import load as bench_load
from rustsim_hpc.bench.engine import Setup
from rustsim_hpc.bench.load import machine_of, sample
from rustsim_hpc.bench.measure import Row, Section
from rustsim_hpc.bench.report import Report
from rustsim_hpc.bench.setting import MODELS
from rustsim_hpc.cli.main import main
from rustsim_hpc.job.prediction import (
    Load,
    Machine,
    Network,
    allreduce_seconds,
    curve,
    predict,
    slowdown,
    table,
)

MACHINE = Machine(step=20e-6, allreduce=1e-6, one=20e9, all=30e9, cores=2)
NETWORK = Network(latency=2e-6, bandwidth=10e9, ranks_per_node=2)
LOAD = Load(row=1e-9, row_bytes=32, meetings=2, meeting_bytes=64)


def test_one_rank_is_rows_and_a_step() -> None:
    made = predict(LOAD, MACHINE, NETWORK, 1000, 1)
    assert made.seconds == pytest.approx(1000 * 1e-9 + 20e-6)
    assert (made.strong, made.weak, made.meeting_seconds) == (1.0, 1.0, 0.0)


def test_ranks_of_one_node_share_memory() -> None:
    """32 bytes a ns is more than one core moves, so that the rows are bounded by memory."""
    assert slowdown(LOAD, MACHINE, 1) == 1.0
    assert slowdown(LOAD, MACHINE, 2) == pytest.approx(20 / 15)
    assert slowdown(LOAD, MACHINE, 64) == slowdown(LOAD, MACHINE, 2)
    assert slowdown(Load(10e-9, 32, 1, 8), MACHINE, 2) == 1.0
    assert slowdown(Load(0.0, 32, 1, 8), MACHINE, 2) == pytest.approx(20 / 15), "too quick to be measured"
    made = predict(LOAD, MACHINE, NETWORK, 10**9, 2)
    assert made.strong == pytest.approx(0.75, abs=1e-3)


def test_a_collective_costs_latencies_and_bytes() -> None:
    assert allreduce_seconds(MACHINE, NETWORK, 8, 1) == 0.0
    inside = 1e-6 + 8 / 20e9
    assert allreduce_seconds(MACHINE, NETWORK, 8, 2) == pytest.approx(inside)
    eight_nodes = inside + 3 * (2e-6 + 8 / 10e9)
    assert allreduce_seconds(MACHINE, NETWORK, 8, 16) == pytest.approx(eight_nodes)
    large = 1e9
    assert allreduce_seconds(MACHINE, NETWORK, large, 16) < 3 * large / 10e9 + inside + large / 20e9


@given(ranks=st.integers(1, 65536), rows=st.integers(1, 10**12))
def test_no_more_than_whole_efficiency(ranks: int, rows: int) -> None:
    made = predict(LOAD, MACHINE, NETWORK, rows, ranks)
    assert 0 < made.strong <= 1.0 + 1e-9
    assert 0 < made.weak <= 1.0 + 1e-9
    assert made.rows == math.ceil(rows / ranks)


def test_table_has_a_line_a_prediction() -> None:
    lines = table(curve(LOAD, MACHINE, NETWORK, 10**6, (1, 65536))).splitlines()
    assert [line.split()[0] for line in lines] == ["ranks", "1", "65,536"]
    assert len({len(line) for line in lines}) == 1


# -- what it is fed with ----------------------------------------------------------------------------------


def sections(with_ranks: bool = True) -> list[Section]:
    memory = [
        Row(f"{kind}.{cores}", kind, 1.0, rate=rate)
        for kind in ("copy",)
        for cores, rate in (("one", 20.0), ("all", 30.0))
    ]
    empty = [Row("inline", "inline", 10e-6)]
    if with_ranks:
        empty += [Row("ranks", "ranks", 20e-6 + 1e-6), Row("allreduce", "allreduce", 1e-6)]
    return [Section("memory", "memory", "", memory), Section("empty", "empty", "", empty)]


def test_machine_of_a_report() -> None:
    found = machine_of(sections(), 2)
    assert found is not None
    assert found.step == pytest.approx(MACHINE.step)
    assert replace(found, step=MACHINE.step) == MACHINE
    assert machine_of(sections(with_ranks=False), 2) is None


def test_sample_finds_what_a_step_asks_for() -> None:
    load = sample(Setup(MODELS + "integrate", 20_000), MACHINE)
    assert load.row_bytes == 32
    assert load.meetings == 1
    assert load.row >= 0


def test_curve_is_made_of_its_figures(tmp_path: Path) -> None:

    figures = {
        "job": "a",
        "rows": 10**9,
        "load": asdict(LOAD),
        "machine": asdict(MACHINE),
        "network": asdict(NETWORK),
    }
    made = scaling.predictions(json.loads(json.dumps(figures)))
    assert [p.ranks for p in made] == [1 << power for power in range(17)]
    assert "65,536" in scaling.curve_text(figures)
    pytest.importorskip("matplotlib")
    scaling.draw_curve(figures, tmp_path)
    assert (tmp_path / scaling.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_plan_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kept, "cache_path", lambda: tmp_path / "bench.json")
    job = str(Path(__file__).parents[1] / "jobs" / "particles.toml")
    command = ["plan", job, "--ranks", "6", "--predict", "--set", "run.agents=20_000", "--json"]

    def call(*words: str) -> tuple[int | str | None, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(words)
        return ended.value.code, *capsys.readouterr()

    code, _, said = call(*command)
    assert code == 2
    assert "rustsim-hpc bench" in said
    kept.keep(Report("", {}, {}, {"workers": 2}, (0.0, 0.0), sections()))
    code, printed, said = call(*command)
    assert code == 0, said
    made = json.loads(printed.splitlines()[-1])["predictions"]
    assert [p["ranks"] for p in made] == [1, 2, 4, 6]
    assert all(0 < p["strong"] <= 1 for p in made)
    assert "It is assumed that" in call(*command[:-1])[1]
    asked = []
    real = bench_load.job_load
    monkeypatch.setattr(
        bench_load, "job_load", lambda spec, machine, ranks: asked.append(ranks) or real(spec, machine, 1)
    )
    many = ("plan", job, "--ranks", "1_000_000", "--predict", "--set", "run.agents=400_000", "--json")
    made = json.loads(call(*many)[1])["predictions"]
    assert asked == [4], "a part of the job that is large enough to be timed"
    assert (made[-1]["ranks"], made[-1]["rows"]) == (1_000_000, 1)
    code, printed, said = call(*command, "--set", "run.backend=cuda")
    assert (code, printed) == (2, "")
    assert "--predict knows the figures of CPUs" in said
