"""The report of a benchmark: as a table for a terminal, as JSON, and as a page of the documentation."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rustsim_hpc.bench.goals import verdicts
from rustsim_hpc.bench.measure import Row, Section

_HEAD = ("", "time", "quartiles", "multiple", "rate", "of bandwidth")


_WIDTH = 110
_BUSY = 0.7
"""Load average before the start from which on somebody else's work is in the figures."""


@dataclass
class Report:
    """What was measured, where and when.

    made: date and time (UTC). machine, versions: facts by name. settings: how much was measured. load: the
    system's load average (1 minute) before and after.
    """

    made: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    load: tuple[float, float]
    sections: list[Section] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report in JSON's types."""
        return {
            "made": self.made,
            "machine": self.machine,
            "versions": self.versions,
            "settings": self.settings,
            "load": list(self.load),
            "sections": [section.to_dict() for section in self.sections],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Build a report from what `to_dict` gave.

        Raises:
            KeyError, TypeError: it is something else.
        """
        sections = [Section.from_dict(section) for section in data["sections"]]
        before, after = data["load"]
        settings = dict(data["settings"])
        return cls(
            data["made"], dict(data["machine"]), dict(data["versions"]), settings, (before, after), sections
        )

    def to_json(self) -> str:
        """Return the report as one line of JSON."""
        return json.dumps(self.to_dict())

    def header(self) -> list[str]:
        """Return where and when it was measured, a line each."""
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        versions = ", ".join(f"{name} {value}" for name, value in self.versions.items())
        settings = ", ".join(f"{name} {value:,}" for name, value in self.settings.items())
        load = f"load average {self.load[0]:.2f} before, {self.load[1]:.2f} after"
        if self.load[0] > _BUSY:
            load += ": other work was running, so these figures say little"
        return [f"measured {self.made}, {load}", f"machine: {machine}", versions, f"size: {settings}"]

    def text(self) -> str:
        """Return the report for a terminal."""
        lines = self.header()
        for section in filter(lambda section: section.rows, self.sections):
            rows = [cells(row) for row in section.rows]
            lines += ["", *_aligned((section.title, *_HEAD[1:]), rows)]
        found = verdicts(self.sections)
        if found:
            lines += ["", *_aligned(("Goals", "bound", "found", ""), [v.cells() for v in found])]
        return "\n".join(lines)

    def markdown(self, level: int = 2) -> str:
        """Return the report as a part of a page, its headings of a level."""
        heading = "#" * level
        parts = ["\n".join(f"- {line}" for line in self.header())]
        found = verdicts(self.sections)
        if found:
            met = sum(verdict.met for verdict in found)
            table = _markdown_table(("", "goal", "found", ""), [verdict.cells() for verdict in found])
            parts.append(f"{heading} Goals\n\nThe engine meets {met} of {len(found)}.\n\n{table}")
        for section in self.sections:
            parts.append(f"{heading} {section.title}\n\n{wrapped(section.text)}")
            if section.rows:
                parts.append(_markdown_table(_HEAD, [cells(row) for row in section.rows]))
        return "\n\n".join(parts) + "\n"


def wrapped(text: str) -> str:
    """Return paragraphs in lines of the page's width; tables and code in between stay as they are."""
    whole = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    lines = [
        part if part.startswith("|") else textwrap.fill(part, _WIDTH, break_on_hyphens=False)
        for part in whole.split("\n\n")
    ]
    return "\n\n".join(lines).replace("\0", " ")


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as text, in the order of the table's head."""
    if row.seconds is None and row.note:
        return row.name, row.note, "", "", "", ""
    spread = "" if row.low is None or row.high is None else f"{duration(row.low)} to {duration(row.high)}"
    return (
        row.name,
        "" if row.seconds is None else duration(row.seconds),
        spread,
        "" if row.times is None else f"{row.times:.2f} x",
        "" if row.rate is None else f"{row.rate:.3g} {row.unit}",
        "" if row.share is None else f"{100 * row.share:.0f} %",
    )


def duration(seconds: float) -> str:
    """Return a duration with three digits and its unit: 17.4 ms."""
    units = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
    size, unit = next((found for found in units if abs(seconds) >= found[0]), units[-1])
    value = seconds / size
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        first, *rest = row
        more = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *more]).rstrip())
    return lines


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    used = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    lines = [" | ".join(head[i] for i in used), " | ".join("---" if i == 0 else "---:" for i in used)]
    lines += [" | ".join(row[i] for i in used) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
