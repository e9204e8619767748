"""Texts of unknown origin, made fit to be shown: bounded, and without control characters for a terminal.

What users' code raises, what files hold and what peers send may be of any size and have any characters: line
breaks, escape sequences, NUL, unpaired surrogates that cannot be encoded.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

MESSAGE_CHARS: Final = 2_000
"""Upper bound of the characters that are kept of an exception's own text."""

LINE_CHARS: Final = 8_000
"""Upper bound of the characters of a line that is shown; a message with its context fits."""

TRACE_CHARS: Final = 20_000
"""Upper bound of the characters of a traceback; its end is kept, which says most."""

_UNSHOWN: Final = "\N{REPLACEMENT CHARACTER}"


def shown(text: str, limit: int = LINE_CHARS) -> str:
    """Return a text as one line of printable characters; of more than ``limit``, the first and a count."""
    more = len(text) - limit
    line = text[:limit]
    if not line.isprintable():
        line = _printable(" ".join(line.split()))
    return f"{line}… ({more:,} more characters)" if more > 0 else line


def shown_lines(text: str) -> str:
    """Return a text with its line breaks and tabs, but without other control characters."""
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(c if c in "\n\t" else _printable(c) for c in text)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else _UNSHOWN for c in text)


def raw_message_of(error: BaseException) -> str:
    """Return the text of any exception as it is, or its type's name if it has no text or `str` fails.

    An exception that is not an `Exception`, such as `SystemExit`, is prefixed with its type's name.
    """
    name = type(error).__name__
    try:
        # A plain string, also where `__str__` returns a subclass with methods of its own.
        text = "".join((str(error), ""))
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 (user code may fail here, while its failure is reported)
        return name
    return text if text and isinstance(error, Exception) else f"{name}: {text}" if text else name


def message_of(error: BaseException) -> str:
    """Return the text of any exception, as `raw_message_of` does, as one bounded line to show."""
    return shown(raw_message_of(error), MESSAGE_CHARS)


def named(error: BaseException) -> str:
    """Return the type and the text of any exception, as one bounded line to show."""
    name, text = shown(type(error).__name__, MESSAGE_CHARS), message_of(error)
    return text if text.startswith(name) else f"{name}: {text}"


def trace_of(error: BaseException) -> str:
    """Return the traceback of an exception and of its causes as text to show, bounded."""
    import traceback

    lines = traceback.TracebackException.from_exception(error).format()
    whole = "".join(shown_lines(_clipped(line)) for line in lines)
    return whole if len(whole) <= TRACE_CHARS else f"…{whole[-TRACE_CHARS:]}"


def _clipped(line: str) -> str:
    # A traceback that came from another process is the text of one exception here, and stays whole.
    if len(line) <= 2 * TRACE_CHARS:
        return line
    return f"{line[:LINE_CHARS]}… ({len(line) - LINE_CHARS:,} more characters)\n"


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ` (did you mean "x"?)` for the candidate most similar to `name`, or "" if there is none."""
    matches = get_close_matches(name, list(candidates), n=1)
    return f' (did you mean "{matches[0]}"?)' if matches else ""
