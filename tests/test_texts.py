"""Texts of unknown origin are shown bounded, as one line, and without control characters."""

from __future__ import annotations

from rustsim_hpc.executors.work import PhaseTrace
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
