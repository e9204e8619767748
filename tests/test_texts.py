"""Texts of unknown origin are shown bounded, as one line, and without control characters."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare_runs import command, mpirun, needs_mpirun

from rustsim_hpc.executors.work import PhaseTrace
from rustsim_hpc.run_folder.reader import open_run
from rustsim_hpc.texts import (
    LINE_CHARS,
    MESSAGE_CHARS,
    TRACE_CHARS,
    message_of,
    named,
    raw_message_of,
    shown,
    shown_lines,
    trace_of,
)

ODD = "\N{REPLACEMENT CHARACTER}"
HOSTILE = "one\n\x1b[2Jtwo\x1b]0;title\x07\r\0three\x9b31m\u202efour\ud800"


class Silent(Exception):
    def __str__(self) -> str:
        raise SystemExit(0)


class Number(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]  # noqa: PLE0307 (some do)


class Trap(str):
    __slots__ = ()

    def __len__(self) -> int:
        raise RuntimeError("not even its length")


class Trapped(Exception):
    def __str__(self) -> str:
        return Trap("plain")


def test_what_a_peer_writes_is_shown_as_one_harmless_line() -> None:
    assert shown("no\n room\x1b[2J today\r\n") == f"no room{ODD}[2J today"
    assert shown(HOSTILE) == f"one {ODD}[2Jtwo{ODD}]0;title{ODD} {ODD}three{ODD}31m{ODD}four{ODD}"
    assert shown("two  spaces, é and 漢 stay") == "two  spaces, é and 漢 stay"
    assert shown_lines(f"a\tb\n{HOSTILE}") == (
        f"a\tb\none\n{ODD}[2Jtwo{ODD}]0;title{ODD}{ODD}{ODD}three{ODD}31m{ODD}four{ODD}"
    )


def test_a_message_is_bounded_and_says_what_is_missing() -> None:
    error = ValueError("A" * 10_000_000)
    assert message_of(error) == "A" * MESSAGE_CHARS + "… (9,998,000 more characters)"
    assert len(named(error)) < MESSAGE_CHARS + 100
    assert len(shown("B" * 10_000_000)) < LINE_CHARS + 100


def test_an_exception_without_a_text_has_its_name() -> None:
    assert message_of(Silent()) == message_of(Silent("x")) == "Silent"
    assert message_of(Number()) == "Number"
    assert message_of(Trapped()) == "plain"
    assert type(raw_message_of(Trapped())) is str
    assert message_of(ValueError()) == "ValueError"
    assert message_of(SystemExit(HOSTILE)).startswith("SystemExit: one ")
    assert named(type("Bad\x1b[31m", (Exception,), {})("no")) == f"Bad{ODD}[31m: no"


def test_a_traceback_is_bounded_and_harmless() -> None:
    def fail() -> None:
        try:
            raise KeyError(HOSTILE)
        except KeyError as error:
            raise ValueError(HOSTILE + "Z" * 10_000_000) from error

    try:
        fail()
    except ValueError as error:
        text = trace_of(error)
    assert "in fail" in text
    assert "KeyError" in text
    assert "ValueError: one\n" in text
    assert "more characters" in text
    assert len(text) <= TRACE_CHARS + 1
    assert all(c.isprintable() or c == "\n" for c in text)
    # One that came from another process keeps its end.
    far = "first frame\n" + "frame\n" * TRACE_CHARS + "last frame"
    assert trace_of(PhaseTrace(far[-TRACE_CHARS:])).endswith("frame\nlast frame\n")


MODEL = """
import os, signal, time
import numpy as np
import rustsim_hpc as rs

class Odd(ValueError):
    def __init__(self, text):
        super().__init__(text)
        self.cannot = lambda: "be pickled"

def interrupt():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)

@rs.column_phase(writes="x", row_local=True)
def move(context, columns, rows):
    if context.step_index == 2 and context.partition_id.value == 1:
        if context.params.what == "interrupt":
            interrupt()
        if context.params.what == "exit":
            raise SystemExit(0)
        raise Odd("one\\n\\x1b[2Jtwo\\0\\ud800" + "Z" * 5_000_000)
    columns["x"] += 1

def model():
    return rs.Model(
        params={"what": "raise"},
        columns=[rs.Column("x", "float64")],
        initialise=lambda rows, params, tables, seed: {"x": np.zeros(len(rows))},
        phases=[move],
    )
"""


def job(folder: Path) -> Path:
    (folder / "odd.py").write_text(MODEL)
    path = folder / "job.toml"
    path.write_text('[model]\nmodule = "odd.py"\n[run]\nagents = 8\nsteps = 4\npartitions = 2\nworkers = 2\n')
    return path


@pytest.mark.parametrize("way", ["inline", "threads", "processes", pytest.param("ranks", marks=needs_mpirun)])
def test_a_hostile_exception_is_one_bounded_line_with_its_place(way: str, tmp_path: Path) -> None:
    words = ("run", job(tmp_path), "--out", tmp_path / "run", "--no-progress", "--checkpoint-every=1")
    if way == "ranks":
        code, out, err = mpirun(2, *words)
    else:
        code, out, err = command(*words, f"--executor={way}")
    assert code == 3
    [line] = [line for line in err.splitlines() if line.startswith("Error: ")]
    begins = f"PartitionId(1) phase move failed: one {ODD}[2Jtwo{ODD}{ODD}ZZZ"
    assert line.startswith(f"Error: partition executor error: partition {begins}")
    assert line.endswith("more characters)")
    assert {f"rank: {1 if way == 'ranks' else 0}", "phase: move", "step: 2"} <= set(err.splitlines())
    assert len(err) < 4 * MESSAGE_CHARS
    assert all(c.isprintable() or c == "\n" for c in out + err)
    run = open_run(tmp_path / "run")
    assert (run.status, run.step_index) == ("failed", 2)
    for path in (tmp_path / "run" / "crash").iterdir():
        assert len(path.read_text()) < 10 * TRACE_CHARS
        assert all(c.isprintable() or c == "\n" for c in path.read_text())


def test_what_is_no_exception_is_named_in_the_hint(tmp_path: Path) -> None:
    words = ("run", job(tmp_path), "--out", tmp_path / "run", "--no-progress", "--set=params.what=exit")
    code, _, err = command(*words)
    assert code == 3
    assert "hint: the phase raised SystemExit: 0" in err


def test_a_second_interrupt_within_a_phase_is_an_interrupt(tmp_path: Path) -> None:
    words = ("run", job(tmp_path), "--out", tmp_path / "run", "--no-progress", "--set=params.what=interrupt")
    assert command(*words)[0] == 130


def test_each_mistake_of_a_job_file_has_its_line(tmp_path: Path) -> None:
    code, _, err = command("run", job(tmp_path), "--set=run.agents=-1", "--set=run.steps=-1")
    assert code == 2
    assert err.count("\n") >= 2
    assert len([line for line in err.splitlines() if "agents" in line or "steps" in line]) == 2
