"""The README's short table, made by the command out of the figures of docs/benchmarks.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rustsim_hpc.bench.goals import verdicts
from rustsim_hpc.bench.measure import Row, Section, figure
from rustsim_hpc.bench.report import Report, duration, wrapped

BEGIN: Final = "<!-- measured: made by rustsim-hpc bench --write docs/benchmarks.md -->"
END: Final = "<!-- end of measured -->"

_LOOPS: Final = (("integrate.one", "one core"), ("integrate.all", "threads"), ("integrate.ranks", "ranks"))
_WAYS: Final = (
    ("hand", "by hand, in place"),
    ("hand.around", "by hand, keeping the old state"),
    ("torn", "engine, torn"),
    ("rollback", "engine, rollback"),
    ("digest", "engine, rollback, digest"),
)
_SIDE: Final = {"integrate.all": "threads."}  # there the engine's rows say which executor


def measured(figures: Mapping[str, Any]) -> str:
    """Return the part of the README between its marks, for the figures of docs/benchmarks.json."""
    report = Report.from_dict(figures["bench"])
    machine = report.machine
    found = verdicts(report.sections)
    size = report.settings
    text = (
        f"Measured on {machine['CPU']}, {machine['cores']} cores, {report.made.split()[0]}: medians of "
        f"{size['rounds']} rounds. The project meets {sum(v.met for v in found)} of its {len(found)} "
        "performance goals. [docs/benchmarks.md](docs/benchmarks.md) has all tables and explains them; "
        "`rustsim-hpc bench` measures your machine."
    )
    loops = (
        f"The time of a step of {size['rows']:,} rows, as a multiple of the loop by hand in place. The guard "
        "`rollback` keeps the old state until the step is complete; the digest is a fingerprint of each step."
    )
    return "\n\n".join(
        (wrapped(text), wrapped(loops), _loops(report.sections), "\n".join(_others(report.sections, size)))
    )


def _loops(sections: list[Section]) -> str:
    lines = ["| | " + " | ".join(name for _, name in _WAYS) + " |", "| --- |" + " ---: |" * len(_WAYS)]
    for section, cores in _LOOPS:
        keys = (key if key.startswith("hand") else _SIDE.get(section, "") + key for key, _ in _WAYS)
        lines.append(f"| {cores} | " + " | ".join(_times(sections, section, key) for key in keys) + " |")
    return "\n".join(lines)


def _others(sections: list[Section], size: Mapping[str, Any]) -> list[str]:
    lines = []
    rate = figure(sections, "flights", "all")
    if rate is not None and rate.rate:
        lines.append(
            f"- `us_flights`, {size['agents']:,} agents on all cores, with its check and reductions: "
            f"{rate.rate:.0f} {rate.unit}"
        )
    empty = ((key, figure(sections, "empty", key)) for key in ("inline", "threads", "processes", "ranks"))
    costs = ", ".join(f"{duration(row.seconds)} {key}" for key, row in empty if row and row.seconds)
    if costs:
        lines.append(f"- The cost of a step without rows: {costs}")
    return lines


def _times(sections: list[Section], section: str, key: str) -> str:
    row: Row | None = figure(sections, section, key)
    return "" if row is None or row.times is None else f"{row.times:.2f} x"


def with_measured(readme: str, figures: Mapping[str, Any]) -> str:
    """Return a README with the part between its marks made anew; one without marks stays as it is."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        return readme
    return f"{before}{BEGIN}\n\n{measured(figures)}\n\n{END}{after}"
