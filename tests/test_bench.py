"""The benchmarks: that each table is made and means what it says; no test here looks at a clock's figure."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rustsim_hpc.bench import kept, ranks, readme, run, setting
from rustsim_hpc.bench.engine import Engine, Setup
from rustsim_hpc.bench.goals import GOALS, Goal, Verdict, verdicts
from rustsim_hpc.bench.measure import Case, Row, Section, Timing, figure, interleave
from rustsim_hpc.bench.models import integrate, orbit, tally, walk
from rustsim_hpc.bench.page import page_text
from rustsim_hpc.bench.report import Report, cells, duration
from rustsim_hpc.kernels import by_hand

ROOT = Path(__file__).parents[1]
TINY = setting.Size(rows=9000, rounds=2, agents=2000, days=2, steps=3)


# -- timing -------------------------------------------------------------------------------------------


def test_cases_take_turns() -> None:
    order: list[str] = []
    ticks = iter(range(1000))
    timings = interleave(
        {
            "a": Case(lambda: order.append("a"), 2, settle=lambda: order.append("-")),
            "b": Case(lambda: order.append("b")),
        },
        3,
        clock=lambda: float(next(ticks)),
    )
    assert "".join(order) == "ab" + "-ab" * 3
    assert timings["a"].seconds == (0.5, 0.5, 0.5)
    assert timings["b"].seconds == (1.0, 1.0, 1.0)


def test_multiples_are_of_the_same_round() -> None:
    slow, fast = Timing((2.0, 20.0, 6.0)), Timing((1.0, 10.0, 2.0))
    assert slow.times(fast) == 2.0  # the machine was slow in one round, for both
    assert slow.median == 6.0
    assert slow.spread == (4.0, 13.0)
    assert Timing((3.0,)).spread == (3.0, 3.0)


# -- the loops by hand do what the models do ----------------------------------------------------------


def columns_after(module: str, rows: int, **more: Any) -> tuple[np.ndarray, ...]:
    with Engine(Setup(setting.MODELS + module, rows, **more)) as engine:
        engine.step(1)
        return tuple(column.copy() for column in engine.plane.runtime.device_store().columns)


@pytest.mark.parametrize("loop", [by_hand.integrate, by_hand.integrate_cores])
def test_integrate_by_hand_is_the_model(loop: Any) -> None:
    columns = setting.columns_of(integrate.model(), 5000)
    loop(*columns, integrate.DT, integrate.KEEP)
    for mine, engine in zip(columns, columns_after("integrate", 5000), strict=True):
        np.testing.assert_allclose(mine, engine, rtol=2e-7)  # by hand LLVM may contract x + vx*dt


@pytest.mark.parametrize(("begin", "end"), [(0, 5000), (7, 4999), (3, 20), (0, 0)])
def test_loops_by_hand_that_keep_the_state_before_agree(begin: int, end: int) -> None:
    """Any rows: those in front of a cache line and behind the last one are stored plainly."""
    old = [column[begin:end] for column in setting.columns_of(integrate.model(), 5000)]
    plain, around = (setting.columns_of(integrate.model(), 5000) for _ in range(2))
    for loop, new in ((by_hand.integrate_beside, plain), (by_hand.integrate_around, around)):
        loop(*old, *(column[begin:end] for column in new), integrate.DT, integrate.KEEP)
    for one, other in zip(plain, around, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-7)


def test_orbit_by_hand_is_the_model() -> None:
    columns = setting.columns_of(orbit.model(), 5000)
    by_hand.orbit_cores(columns, orbit.DT, orbit.K, orbit.KEEP, orbit.WIDTH)
    for mine, engine in zip(columns, columns_after("orbit", 5000), strict=True):
        np.testing.assert_allclose(mine, engine, rtol=1e-5, atol=1e-6)


def test_histogram_by_hand_is_the_model() -> None:
    [keys] = setting.columns_of(tally.model(), 5000)
    counts = np.zeros(tally.BINS, np.int64)
    by_hand.histogram(keys, counts)
    with Engine(Setup(setting.MODELS + "tally", 5000)) as engine:
        engine.step(1)
        np.testing.assert_array_equal(engine.plane.values["tally"], counts)


def test_walks_stay_in_the_box_and_spread_alike() -> None:
    """The generators differ, so the walks are compared by the mean square of 4000 single steps."""
    rows = 4000
    x, y = setting.columns_of(walk.model(), rows)
    by_hand.walk(x, y, 0, 1, 1, walk.REACH, walk.WIDTH)
    for moved in ((x, y), columns_after("walk", rows)):
        dx = np.concatenate(moved) - walk.WIDTH / 2
        assert np.abs(dx).max() <= walk.REACH
        mean, sd = walk.REACH**2 / 3, walk.REACH**2 * np.sqrt(4 / 45)  # of (uniform in ±reach)²
        assert abs(float(np.mean(dx**2)) - mean) < 4 * sd / np.sqrt(2 * rows)


# -- the tables ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> Report:
    return run.measure(
        replace(TINY), only=("integrate.one", "integrate.all", "orbit", "parts", "digests", "checkpoint")
    )


def test_tables_have_their_rows(report: Report) -> None:
    assert [section.key for section in report.sections] == [
        "memory", "integrate.one", "integrate.all", "orbit", "parts", "digests", "checkpoint",
    ]  # fmt: skip
    for section in report.sections:
        for row in section.rows:
            assert row.seconds is not None, row
            assert (row.low or 0.0) <= (row.high or 0.0)
    for key in ("integrate.one", "integrate.all", "orbit"):
        base = figure(report.sections, key, "hand")
        assert base is not None
        assert base.times == 1.0
        assert base.share is not None
        assert base.share > 0
    assert report.versions["numba"]
    assert report.machine["cores"] == len(os.sched_getaffinity(0))


def test_report_is_whole_as_json(report: Report) -> None:
    again = Report.from_dict(json.loads(report.to_json()))
    assert again == report
    assert again.markdown() == report.markdown()
    text = report.text()
    assert all(section.title in text for section in report.sections)


@pytest.mark.parametrize(("before", "busy"), [(0.1, False), (3.0, True)])
def test_a_busy_machine_is_told(report: Report, before: float, busy: bool) -> None:
    assert ("other work was running" in replace(report, load=(before, 4.0)).text()) is busy


def test_every_goal_has_its_row(report: Report) -> None:
    """A goal whose row is not made would be lost in silence."""
    for verdict in verdicts(report.sections):
        assert verdict.found is not None, verdict.goal
    assert {goal.section for goal in GOALS} <= set(run.TABLES)


def test_flights_empty_and_start() -> None:
    report = run.measure(replace(TINY, workers=2), only=("flights", "empty"))
    rows = {row.key: row for section in report.sections for row in section.rows}
    for key in ("one", "all", "digest", "inline", "threads", "processes"):
        assert rows[key].seconds is not None, rows[key]
    assert rows["all"].unit == "million agent-steps/s"
    if ranks.mpirun() is None:
        assert "no mpirun" in rows["ranks"].note
    else:
        assert rows["ranks"].seconds is not None, rows["ranks"].note
        assert rows["weak"].rate is not None, rows["weak"].note


def test_without_mpirun_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "mpirun", lambda: None)
    section = ranks.integrate_ranks(TINY, setting.Bandwidth(1.0, 1.0))
    [row] = section.rows
    assert row.seconds is None
    assert "not measured: there is no mpirun" in row.note
    assert "not measured" in cells(row)[1]
    [verdict] = [v for v in verdicts([section]) if v.goal.row == "torn"]
    assert verdict.cells()[3] == "not measured"


def test_ranks_that_fail_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = tmp_path / "mpirun"
    launcher.write_text("#!/bin/sh\necho first; echo the reason >&2; exit 7\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(ranks, "mpirun", lambda: str(launcher))
    with pytest.raises(OSError, match="ended with 7: the reason"):
        ranks.start(2, what="empty", steps=1, rounds=1)


# -- goals, text, files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "found", "met"),
    [(False, 1.0, True), (False, 1.2, False), (True, 1.2, True), (True, 1.0, False)],
)
def test_a_goal_is_met_on_its_own_side(least: bool, found: float, met: bool) -> None:
    goal = Goal("", "s", "r", 1.1, lambda row: row.times, least=least)
    assert Verdict(goal, found).met is met
    assert Verdict(goal, None).met is False


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.50 s"), (0.0174, "17.4 ms"), (2e-7, "200 ns"), (-0.0002, "-200 µs")]
)
def test_durations_have_a_fitting_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_page_and_kept_figures(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "benchmarks.md"
    compared = replace(report, sections=[Section("walk", "A walk", "What it is.", [Row("a", "A", 1.0)])])
    page.with_suffix(".json").write_text(json.dumps({"compare": compared.to_dict()}))
    run.write_page(page, report)
    figures = json.loads(page.with_suffix(".json").read_text())
    assert set(figures) == {"compare", "bench"}
    assert page.read_text() == page_text(figures)
    assert "## Integrate, one core" in page.read_text()
    assert "### A walk" in page.read_text()
    monkeypatch.setattr(kept, "cache_path", lambda: tmp_path / "cache" / "bench.json")
    assert kept.kept() is None
    kept.keep(report)
    assert kept.kept() == report
    (tmp_path / "cache" / "bench.json").write_text("{}")
    assert kept.kept() is None


def test_the_page_of_the_project_is_made_of_its_figures() -> None:
    figures = json.loads((ROOT / "docs" / "benchmarks.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert text == page_text(figures), (
        "nobody writes in it by hand: rustsim-hpc bench --write docs/benchmarks.md"
    )


def test_the_readme_has_the_figures() -> None:
    figures = json.loads((ROOT / "docs" / "benchmarks.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.BEGIN in text
    assert text == readme.with_measured(text, figures), (
        "nobody writes in it by hand: rustsim-hpc bench --write docs/benchmarks.md"
    )
    assert "as a multiple of the loop by hand in place" in text
    for cores in ("one core", "threads", "ranks"):
        assert f"\n| {cores} | 1.00 x |" in text


def test_a_readme_without_marks_stays(report: Report) -> None:
    figures = {"bench": report.to_dict()}
    assert readme.with_measured("words", figures) == "words"
    made = readme.with_measured(f"a\n{readme.BEGIN}\nstale\n{readme.END}\nb\n", figures)
    assert made == readme.with_measured(made, figures)
    assert "stale" not in made
    assert made.startswith("a\n")
    assert made.endswith(f"{readme.END}\nb\n")


def test_the_command_measures_one_table(tmp_path: Path) -> None:
    """The command itself, on the smallest of its tables that needs no other process."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "rustsim_hpc", "bench", "--quick", "--only", "parts", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout.splitlines()[-1])
    assert [section["key"] for section in data["sections"]] == ["memory", "parts"]
    assert not (tmp_path / "rustsim-hpc" / "bench.json").exists()  # a part is no machine's figures
    command[-2:] = ["nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "integrate.one" in done.stderr
