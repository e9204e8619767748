"""The README's short table, made by the command out of the figures of docs/benchmarks.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rustsim_hpc.bench.goals import verdicts
from rustsim_hpc.bench.measure import Row, Section, figure
from rustsim_hpc.bench.report import Report, duration

BEGIN: Final = "<!-- measured: made by rustsim-hpc bench --write docs/benchmarks.md -->"
END: Final = "<!-- end of measured -->"

_LOOPS: Final = (
    ("integrate.one", "one core"), ("integrate.all", "threads"), ("integrate.ranks", "ranks of mpirun"),
)  # fmt: skip
_WAYS: Final = (("torn", "torn"), ("rollback", "rollback"), ("digest", "rollback, digest of each step"))


def measured(figures: Mapping[str, Any]) -> str:
    """Return the part of the README between its marks, for the figures of docs/benchmarks.json."""
    report = Report.from_dict(figures["bench"])
    machine = report.machine
    found = verdicts(report.sections)
    size = report.settings
    text = (
        f"On {machine['CPU']}, {machine['cores']} cores, {report.made.split()[0]}; {size['rows']:,} rows, "
        f"{size['agents']:,} agents, medians of {size['rounds']} rounds. {sum(v.met for v in found)} of the "
        f"{len(found)} goals that the project has set itself are met. "
        "[docs/benchmarks.md](docs/benchmarks.md) has all tables and says what they mean; "
        "`rustsim-hpc bench` makes them on your machine."
    )
    lines = [
        text,
        "",
        "| what | measured |",
        "| --- | --- |",
        *(f"| {what} | {value} |" for what, value in _rows(report.sections)),
    ]
    return "\n".join(lines)


def _rows(sections: list[Section]) -> list[tuple[str, str]]:
    rows = []
    for section, cores in _LOOPS:
        prefix = "threads." if section == "integrate.all" else ""
        times = [(name, _times(sections, section, prefix + key)) for key, name in _WAYS]
        text = ", ".join(f"{value} {name}" for name, value in times if value)
        if text:
            rows.append((f"a step of two kernels, {cores}, as a multiple of the loop by hand", text))
    rate = figure(sections, "flights", "all")
    if rate is not None and rate.rate:
        rows.append(
            ("`us_flights` on all cores, its check and reductions included", f"{rate.rate:.0f} {rate.unit}")
        )
    empty = ((key, figure(sections, "empty", key)) for key in ("inline", "threads", "processes", "ranks"))
    costs = ", ".join(f"{duration(row.seconds)} {key}" for key, row in empty if row and row.seconds)
    if costs:
        rows.append(("a step with nothing to do", costs))
    return rows


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
