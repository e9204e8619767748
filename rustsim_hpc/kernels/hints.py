"""Say what to do about a row function that Numba rejects, and shorten what Numba says."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

_DRAWS: Final = ("uniform", "uniform32", "normal", "exponential", "integers")

_HINTS: Final = (
    (
        r"Untyped global name '(\w+)':.*<class 'function'>",
        r"decorate \1 with @rs.function, so that it is compiled too",
    ),
    (
        r"Untyped global name '\w+':.*builtin",
        "row functions do arithmetic on one row; docs/models.md says what they may call",
    ),
    (r"Untyped global name '(\w+)'", r"make \1 a parameter, or an array that tables(params) returns"),
    (
        rf"<function ({'|'.join(_DRAWS)}) at ",
        "take the argument rng, and draw with rs.random.normal(rng, 0); 0 is the number of the draw",
    ),
    (
        r"Unknown attribute '\w+' of type UniTuple\(uint64 x",
        "draw with rs.random: rs.random.normal(rng, 0); 0 is the number of the draw",
    ),
    (
        r"module 'rustsim_hpc\.random' has no attribute",
        f"rs.random has {', '.join(_DRAWS)} (docs/random.md)",
    ),
    ("exception_match", "test for it with if: there is no try in a row function"),
    ("yield in a closure", "write a loop: row functions have no generators"),
)
_ADDRESS = re.compile(r"<(?:built-in )?(?:function|intrinsic) (\w+)[^>]*>")
_TYPES: Final = (
    (r"UniTuple\(uint64 x [345]\)", "rng"),
    (r"Literal\[\w+\]\(([^)]*)\)", r"\1"),
    (r"unicode_type", "text"),
)


def hint_for(text: str, source: str, columns: Collection[str]) -> str | None:
    """Return what to do about a function that Numba rejects, or None if nothing is known.

    Args:
        text: Numba's report.
        source: the line of the user's file that it is about.
        columns: arguments that are columns.
    """
    for name in columns:
        if "getitem" in text and re.search(rf"\b{re.escape(name)}\s*\[", source):
            return f"{name} is a number, this row's value; other rows are seen only through reductions"
    for pattern, hint in _HINTS:
        if found := re.search(pattern, text):
            return found.expand(hint)
    if "No implementation" in text:
        return "row functions take and return numbers, not arrays; docs/models.md says what they may call"
    return None


def shortened(reason: str, lines: Collection[str]) -> str:
    """Return a line of Numba's report in plain terms; ``lines`` are those after it."""
    if "No implementation of function" in reason:
        call = next((line.removeprefix(">>>").strip() for line in lines if line.startswith(">>>")), "")
        name = _ADDRESS.search(reason)
        reason = f"there is no {call or (name[1] if name else 'such function')}"
    return plain_types(reason)


def plain_types(text: str) -> str:
    """Return a text with Numba's names of types in the user's terms."""
    for pattern, plain in _TYPES:
        text = re.sub(pattern, plain, text)
    return text
