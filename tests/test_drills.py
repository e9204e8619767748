"""A small share of each drill of drills/; docs/drills.md has what the full counts gave."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

DRILLS = Path(__file__).parents[1] / "drills"
Show = Callable[[Callable[[], int]], None]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DRILLS)
    return importlib.import_module(name)


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Run a drill: all its trials have to be good, and what cannot be had here is skipped, visibly."""

    def run(drill: Callable[[], int]) -> None:
        code, text = drill(), capsys.readouterr().out
        assert code == 0, text
        skipped = [line.partition(":")[2] for line in text.splitlines() if line.startswith("skipped:")]
        if skipped:
            pytest.skip(";".join(skipped))
        last = re.match(r"(\d+) of (\d+) ", text.splitlines()[-1])
        assert last
        assert last[1] == last[2] != "0", text

    return run


def test_killed_runs(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of one process and of ranks, both while a checkpoint is written.
    show(lambda: load("kill", monkeypatch).main([4, 6]))


def test_flipped_bytes(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    show(lambda: load("flip", monkeypatch).main(20, stride=400))


def test_restored_runs(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    show(lambda: load("restore", monkeypatch).main(1, seed=4))


def test_full_disk(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    show(lambda: load("disk_full", monkeypatch).main(1, seed=3))


@pytest.mark.parametrize(
    ("kind", "count"),
    [("raise", 4), ("ranks", 5), ("kill", 5), ("stop", 5), ("signal", 5), ("stuck", 5), ("shm", 5)],
)
def test_faults(kind: str, count: int, show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    show(lambda: load("faults", monkeypatch).main(count, seed=3, only=kind))


def test_one_stream(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    show(lambda: load("flights", monkeypatch).main(5, agents=20_000, steps=5))


def test_devices_that_are_none(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    show(lambda: load("devices", monkeypatch).main(4, seed=2))


def test_what_is_told_is_what_was_recorded() -> None:
    docs = DRILLS.parent / "docs"
    text = (docs / "drills.md").read_text(encoding="utf-8")
    row = r"^\| `python drills/(\w+\.py).*?`.*? \| (.*?) \| \[.*?\]\((.*?)\) \|$"
    rows = re.findall(row, text, re.MULTILINE)
    told = {script for script, _, _ in rows}
    assert told >= {
        f"{name}.py"
        for name in ("kill", "flip", "restore", "disk_full", "faults", "flights", "cost", "devices")
    }
    assert all((DRILLS / script).is_file() for script in told)
    for _, result, log in rows:
        last = (docs / log).read_text(encoding="utf-8").splitlines()[-1]
        assert last.startswith(result)
        good, of = re.match(r"(\d+) of (\d+) ", last).groups()  # type: ignore[union-attr]
        # Costs depend on what else a machine does; failures don't.
        assert good == of or "cost" in log
