"""The standard set, from beginning to end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rustsim_hpc.bench import loops, ranks, scaling, startup, steps, storage
from rustsim_hpc.bench.measure import Section
from rustsim_hpc.bench.report import Report
from rustsim_hpc.bench.setting import Bandwidth, Size
from rustsim_hpc.errors import OutputError
from rustsim_hpc.files import write_atomic
from rustsim_hpc.run_folder.environment import host_facts, versions

TABLES: Final = (
    "memory", "integrate.one", "integrate.all", "integrate.ranks", "orbit", "parts", "digests", "flights",
    "empty", "checkpoint", "start", "predict",
)  # fmt: skip
"""Keys of the tables, in order. Memory is measured in any case."""


def measure(size: Size, only: Collection[str] = (), say: Callable[[str], None] = lambda _: None) -> Report:
    """Measure the standard set, or the tables ``only``; ``say`` hears what is being measured.

    Raises:
        RustsimError: something that the set needs does not work here.
    """
    # An OpenMP that spins after a prange loop would take a core from what is measured next.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    before = os.getloadavg()[0]
    say("memory")
    memory, bandwidth = loops.memory(size)
    made = [memory]
    for key in TABLES[1:]:
        if not only or key in only:
            say(key)
            made.append(_table(key, size, bandwidth, made))
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Report(now, machine(), versions(), asdict(size), (before, os.getloadavg()[0]), made)


def _table(key: str, size: Size, bandwidth: Bandwidth, before: list[Section]) -> Section:
    match key:
        case "integrate.one":
            return loops.integrate_one(size, bandwidth)
        case "integrate.all":
            return loops.integrate_all(size, bandwidth)
        case "integrate.ranks":
            return ranks.integrate_ranks(size, bandwidth)
        case "orbit":
            return loops.orbit_all(size, bandwidth)
        case "parts":
            return loops.parts(size, bandwidth)
        case "digests":
            return loops.digests(size)
        case "flights":
            section = steps.flights(size)
            section.rows += ranks.weak_scaling(size)
        case "empty":
            section = steps.empty(size)
            section.rows += ranks.empty_rows(size)
        case "checkpoint":
            section = storage.checkpoints(size, Path.cwd())
        case "predict":
            section = scaling.predicted(size, before)
        case _:
            section = startup.start(size)
    return section


def machine() -> dict[str, Any]:
    """Return facts about this machine: CPU, cores, caches, memory, system."""
    facts = host_facts()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    caches = [f"L{level} {found}" for level in (2, 3) if (found := _cache(level))]
    return {
        "CPU": facts["cpu"],
        "cores": facts["cores"],
        "caches": " ".join(caches) or "unknown",
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": facts["system"],
    }


def _cache(level: int) -> str:
    try:
        return (
            Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size").read_text(encoding="ascii").strip()
        )
    except OSError:
        return ""


def write_page(page: Path, report: Report, curve: dict[str, Any] | None = None) -> None:
    """Write a page of documentation, and beside it the figures that it is made of, as JSON.

    curve: what the curve to many ranks is made of (:func:`rustsim_hpc.bench.scaling.curve_figures`).

    Raises:
        OutputError: a file cannot be read or written.
    """
    made: dict[str, Any] = {"bench": report.to_dict()}
    if curve is not None:
        made["scaling"] = curve
        scaling.draw_curve(curve, page.parent)
    write_figures(page, made)


def write_figures(page: Path, made: Mapping[str, Any]) -> None:
    """Write figures, by kind (``bench``, ``compare``, ``scaling``), and the page that is made of them.

    A README.md in the folder above gets its short table anew, if it has the marks of one.
    Figures of other kinds that the JSON holds stay, in the page as well.

    Raises:
        OutputError: a file cannot be read or written.
    """
    from rustsim_hpc.bench.page import page_text
    from rustsim_hpc.bench.readme import with_measured

    source = page.with_suffix(".json")
    try:
        kept: dict[str, Any] = json.loads(source.read_bytes()) if source.exists() else {}
        figures = {**kept, **made}
        write_atomic(source, (json.dumps(figures, indent=1) + "\n").encode())
        write_atomic(page, page_text(figures).encode())
        readme = page.parent.parent / "README.md"
        if "bench" in figures and readme.exists():
            write_atomic(readme, with_measured(readme.read_text(encoding="utf-8"), figures).encode())
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {page}: {error}") from error
