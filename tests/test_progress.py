"""The progress bar shows on a terminal, and leaves a log alone."""

import io

import pytest

from rustsim_hpc.job.progress import Progress
from rustsim_hpc.job.summary import rate


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, *, wanted: bool = True) -> str:
    with Progress("flock", done=10, total=40, agents=1_000_000, wanted=wanted, stream=stream) as bar:
        bar.advance()
        bar.advance(5)
        bar.advance(24)
    return stream.getvalue()


def test_a_terminal_sees_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("rustsim_hpc.job.progress._REFRESH_SECONDS", 0.0)
    shown = run(Terminal())
    assert "flock: first step (compiling)  25%" in shown
    assert "\rflock  28%" in shown
    assert "40/40" in shown
    assert "agent-steps/s" in shown
    assert "left" in shown


def test_a_log_gets_no_bar() -> None:
    assert run(io.StringIO()) == ""


def test_who_wants_no_bar_gets_none() -> None:
    assert run(Terminal(), wanted=False) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12.34, "12.3"), (1234.0, "1.23 thousand"), (2.41e7, "24.1 million"), (3e9, "3 billion")],
)
def test_a_rate_is_told_in_three_digits(value: float, text: str) -> None:
    assert rate(value) == text
