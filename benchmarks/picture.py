"""The comparison as a picture: a panel a workload, a bar a program."""

from __future__ import annotations

import io
from pathlib import Path

from rustsim_hpc.bench.measure import Section
from rustsim_hpc.bench.report import Report, duration
from rustsim_hpc.files import write_atomic

COLOURS = {"engine": "#c1440e", "hand": "#555b66", "library": "#7ba3c9"}
LABELS = {"engine": "this engine", "hand": "a loop by hand", "library": "a library"}


def draw(report: Report, kinds: dict[str, str], path: Path) -> None:
    """Draw the report's workloads to a PNG file; ``kinds`` says of each program what it is.

    Raises:
        ImportError: there is no matplotlib.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    sections = [section for section in report.sections if section.rows]
    height = 0.9 + sum(0.62 + 0.235 * len(section.rows) for section in sections)
    figure = Figure(figsize=(9.5, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(
        len(sections), 1, sharex=True, squeeze=False, height_ratios=[len(s.rows) + 1.5 for s in sections]
    )
    seconds = [row.seconds for section in sections for row in section.rows if row.seconds is not None]
    for section, [axes] in zip(sections, all_axes, strict=True):
        _panel(section, kinds, axes)
        axes.set_xscale("log")
        if seconds:
            axes.set_xlim(min(seconds) / 2, max(seconds) * 8)
        axes.xaxis.set_major_formatter(lambda value, _: duration(value).replace(".00", "").replace(".0", ""))
        axes.tick_params(labelbottom=True)
    all_axes[-1][0].set_xlabel("time of one row and step (logarithmic; shorter is better)")
    figure.legend(
        handles=[Patch(color=COLOURS[kind], label=LABELS[kind]) for kind in COLOURS],
        loc="outside upper center",
        ncols=len(COLOURS),
        frameon=False,
    )
    image = io.BytesIO()
    figure.savefig(image, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, image.getvalue())


def _panel(section: Section, kinds: dict[str, str], axes: object) -> None:
    """Draw one workload: the fastest on top, what could not be measured below."""
    rows = sorted(section.rows, key=lambda row: (row.seconds is None, row.seconds or 0.0))
    left = min((row.seconds for row in rows if row.seconds is not None), default=1.0)
    for place, row in enumerate(rows):
        if row.seconds is None:
            axes.text(left, place, row.note.partition(":")[0], va="center", color="#999999", size=8)
            continue
        axes.barh(place, row.seconds, color=COLOURS[kinds.get(row.key, "library")], height=0.72)
        times = "" if row.times is None else f", {row.times:,.{0 if row.times >= 100 else 2}f} x"
        axes.text(row.seconds * 1.06, place, f"{duration(row.seconds)}{times}", va="center", size=8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], size=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(section.title, loc="left", size=11, weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
