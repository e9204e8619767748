"""The page of figures, made from their JSON alone; nobody writes in it by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rustsim_hpc.bench.report import Report
from rustsim_hpc.bench.scaling import curve_text

_HEAD = """# Benchmarks

Made by `rustsim-hpc bench --write docs/benchmarks.md`, from the figures in
[benchmarks.json](benchmarks.json); not written by hand. The cases of a table are run in turns, round after
round; a time is the median of the rounds, a multiple the median of each round's ratio to the first row of its
kind.
"""

_COMPARE = """## Side by side

The same work by what else one could use, made by `python benchmarks/compare.py --write docs/benchmarks.md`.
Each program runs in a process of its own and waits while the others have their turns, round after round. All
begin with the same columns, of as many rows and the same types, and make as many steps one by one; the system
holds each to its number of cores, whatever it starts. A program has figures only if its results are right:
checked on few rows before, and on all rows, in the state that the timed steps have led to, after. What is not
installed, or fails, has a line that says so.

![Side by side](images/compare.png)
"""


def page_text(figures: Mapping[str, Any]) -> str:
    """Return the page for figures by kind: ``bench``, and where they were made ``compare`` and ``scaling``.

    Raises:
        KeyError, TypeError: they are something else.
    """
    parts = [_HEAD]
    if "bench" in figures:
        parts.append(Report.from_dict(figures["bench"]).markdown())
    if "scaling" in figures:
        parts.append(curve_text(figures["scaling"]))
    if "compare" in figures:
        parts += [_COMPARE, Report.from_dict(figures["compare"]).markdown(level=3)]
    return "\n".join(parts)
