"""The comparison with other programs: it runs what is installed, names what is not, believes nobody."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Any:
    """Import from benchmarks/ as its own scripts do."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def run(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "compare.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


# -- the whole ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_installed_is_measured_and_the_rest_is_named() -> None:
    from programs import PROGRAMS

    done = run("--quick", "--rows", 20_000, "--rounds", 2, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    about, *sections = figures["sections"]
    assert about["key"] == "programs"
    assert [section["key"] for section in sections] == ["integrate", "walk", "sir"]
    for section in sections:
        programs = {p.key: p for p in PROGRAMS if section["key"] in p.workloads}
        assert [row["key"] for row in section["rows"]] == list(programs)
        for row in section["rows"]:
            if reason := programs[row["key"]].missing():
                assert row["note"] == reason
                assert reason.startswith("not installed")
                assert "seconds" not in row
            else:
                assert row["seconds"] > 0, row
                assert row["times"] > 0, row
        for cores in (False, True):
            hand = [r["times"] for r in section["rows"] if programs[r["key"]].kind == "hand"
                    and programs[r["key"]].several == cores and "times" in r]  # fmt: skip
            assert 1.0 in hand
    assert {"numpy", "numba", "rustsim-hpc"} <= set(figures["versions"])


def test_page_figures_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import compare
    from programs import PROGRAMS

    from rustsim_hpc.bench.measure import Row, Section, Timing
    from rustsim_hpc.bench.report import Report

    size = compare.Size()
    rows = [
        Row.of("numpy", "NumPy", Timing((2e-9, 3e-9)), Timing((1e-9, 1e-9))),
        Row("jax", "JAX", note="not installed: jax"),
    ]
    sections = [compare._programs(size, PROGRAMS), Section("walk", "Random walk", "What it is.", rows)]
    report = Report("now", {}, {}, {"rows": 1000}, (0.0, 0.0), sections)
    page = tmp_path / "benchmarks.md"
    compare._publish(page, report)
    text = page.read_text()
    assert "| NumPy | 2.50 ns |" in text
    assert "| JAX | not installed: jax |" in text
    assert "Philox4x32-10" in text
    picture = tmp_path / "images" / "compare.png"
    drawn = picture.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    picture.unlink()
    page.unlink()
    assert compare.main(["--redraw", str(page)]) == 0
    assert page.read_text() == text
    assert picture.read_bytes() == drawn


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "0"], "invalid"),
        (["--cores", "1"], "2 or more"),
        (["--program", "abacus"], "numpy"),
        (["--write", "page.md", "--workload", "sir"], "takes all"),
        (["--redraw", "nowhere.md"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str) -> None:
    done = run(*words, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


# -- programs that are wrong, break, or hang ----------------------------------------------------------

_BROKEN = """
import os, time
import numpy as np
from workloads import *

class Sir:
    def __init__(self, state, cores):
        self.state, self.made = state, 0
    def step(self, steps):
        self.made += steps
        {body}
    def columns(self):
        return (self.state,)
"""


@pytest.mark.parametrize(
    ("body", "patience", "reason"),
    [
        ("pass", 60, "failed: CheckError: its result is wrong: the share of S"),
        ("raise ValueError('a reason')", 60, "failed: ValueError: a reason"),
        ("os._exit(9)", 60, "failed: it ended with 9: it said nothing"),
        ("time.sleep(60)", 2, "failed: no answer after 2 s"),
    ],
)
def test_a_program_without_figures_says_why(
    body: str, patience: float, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turns import Running, take_turns

    (tmp_path / "competitors").mkdir()
    (tmp_path / "competitors" / "broken.py").write_text(_BROKEN.format(body=body))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started: list[Running] = []

    def start(module: str) -> Running:
        started.append(Running(module, "sir", 2000, 1))
        return started[-1]

    starts = {"broken": lambda: start("broken"), "good": lambda: start("numpy_arrays")}
    found = take_turns(starts, 2, 1, 2, patience=(patience, patience))
    assert str(found["broken"]).startswith(reason)
    assert len(found["good"].seconds) == 2
    assert all(program._process.poll() is not None for program in started)


def test_a_rank_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from turns import LostError, Running

    from rustsim_hpc.bench.ranks import mpirun

    if mpirun() is None:
        pytest.skip("no mpirun")
    (tmp_path / "competitors").mkdir()
    body = "from mpi4py import MPI; assert MPI.COMM_WORLD.rank == 0, 'rank 1 it is'; MPI.COMM_WORLD.barrier()"
    (tmp_path / "competitors" / "broken.py").write_text(_BROKEN.format(body=body))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = Running("broken", "sir", 2000, 2, 2)
    try:
        with pytest.raises(LostError, match="it ended with"):
            program.answer(60)
    finally:
        program.end()


# -- the checks refuse what is wrong ------------------------------------------------------------------


def moved_walk(rows: int, steps: int, move: Callable[..., Any]) -> tuple[Any, Any]:
    import workloads

    rng = np.random.default_rng(7)
    before = workloads.start_walk(0, rows)
    after = [column.copy() for column in before]
    for _ in range(steps):
        after = [np.asarray(column, np.float32) for column in move(after, rng)]
    return before, after


def right_walk(columns: Any, rng: Any) -> Any:
    for z in columns:
        moved = np.abs(z + rng.uniform(-0.25, 0.25, len(z)))
        yield np.minimum(moved, 20.0 - moved)


def clamped_walk(columns: Any, rng: Any) -> Any:
    for z in columns:
        yield np.clip(z + rng.uniform(-0.25, 0.25, len(z)), 0, 10)


def open_walk(columns: Any, rng: Any) -> Any:
    for z in columns:
        yield z + rng.uniform(-0.25, 0.25, len(z))


def one_draw_walk(columns: Any, rng: Any) -> Any:
    u = rng.uniform(-0.25, 0.25, len(columns[0]))
    for z in columns:
        moved = np.abs(z + u)
        yield np.minimum(moved, 20.0 - moved)


def same_draws_walk(columns: Any, rng: Any) -> Any:
    yield from right_walk(columns, np.random.default_rng(1))


def one_for_all_walk(columns: Any, rng: Any) -> Any:
    for z in columns:
        moved = np.abs(z + rng.uniform(-0.25, 0.25))
        yield np.minimum(moved, 20.0 - moved)


def short_walk(columns: Any, rng: Any) -> Any:
    for z in columns:
        moved = np.abs(z + rng.uniform(-0.23, 0.23, len(z)))
        yield np.minimum(moved, 20.0 - moved)


@pytest.mark.parametrize("steps", [3, 30])
def test_walk_check_takes_what_is_right(steps: int) -> None:
    import workloads

    for rows in (2000, 20_000, 200_000):
        workloads.check_walk(*moved_walk(rows, steps, right_walk), steps)


@pytest.mark.parametrize(
    "wrong", [clamped_walk, open_walk, one_draw_walk, same_draws_walk, one_for_all_walk, short_walk]
)
def test_walk_check_refuses_what_is_wrong(wrong: Callable[..., Any]) -> None:
    import workloads

    def check() -> None:
        for steps in workloads.SMALL_STEPS:
            workloads.check_walk(*moved_walk(workloads.SMALL, steps, wrong), steps)

    with pytest.raises(workloads.CheckError):
        check()


def test_integrate_check() -> None:
    import workloads

    before = workloads.start_integrate(0, 1000)
    x, y, vx, vy = (column.copy() for column in before)
    for _ in range(3):
        x, y, vx, vy = x + vx * workloads.DT, y + vy * workloads.DT, vx * workloads.KEEP, vy * workloads.KEEP
    workloads.check_integrate(before, (x, y, vx, vy), 3)
    with pytest.raises(workloads.CheckError, match="x is off"):
        workloads.check_integrate(before, (x, y, vx, vy), 4)
    slow_first = (before[0] + vx * workloads.DT, y, vx, vy)
    with pytest.raises(workloads.CheckError, match="x is off"):
        workloads.check_integrate(before, slow_first, 3)


def epidemic(rows: int, steps: int, seed: int, beta: float = 0.4) -> tuple[Any, Any]:
    import workloads

    rng = np.random.default_rng(seed)
    [before] = workloads.start_sir(0, rows)
    state = before.copy()
    for _ in range(steps):
        p = 1 - np.exp(-beta * np.mean(state == 1))
        u = rng.random(rows)
        state = state + (((state == 0) & (u < p)) | ((state == 1) & (u < 0.1))).astype(np.uint8)
    return [before], [state]


@pytest.mark.parametrize("steps", [3, 19, 30])
def test_sir_check_takes_what_is_right(steps: int) -> None:
    import workloads

    for seed in range(5):
        for rows in (2000, 20_000, 200_000):
            workloads.check_sir(*epidemic(rows, steps, seed), steps)


def test_sir_check_refuses_what_is_wrong() -> None:
    import workloads

    before, after = epidemic(20_000, 30, 1, beta=0.5)
    with pytest.raises(workloads.CheckError, match="the share of"):
        workloads.check_sir(before, after, 30)
    before, after = epidemic(20_000, 3, 1)
    for wrong, said in (
        (after[0][:-1], "uint8"),
        (after[0].astype(np.int64), "int64"),
        (np.where(after[0] == 2, 3, after[0]).astype(np.uint8), "a state 3"),
        (np.where(np.arange(20_000) == 0, 0, after[0]).astype(np.uint8), "gone back"),
    ):
        with pytest.raises(workloads.CheckError, match=said):
            workloads.check_sir(before, [wrong], 3)


def test_models_begin_with_the_columns_of_all() -> None:
    import workloads

    from rustsim_hpc.bench.engine import Engine, Setup

    for key, workload in workloads.WORKLOADS.items():
        with Engine(Setup(str(BENCHMARKS / "models" / f"{key}.py"), 3000)) as engine:
            columns = engine.plane.runtime.device_store().columns
            for mine, theirs in zip(columns, workload.start(0, 3000), strict=True):
                np.testing.assert_array_equal(mine, theirs)
