"""The engine side by side with what one could use instead, in one run.

    python benchmarks/compare.py                                 everything, as tables: some ten minutes
    python benchmarks/compare.py --quick                         few rows and rounds: rough figures
    python benchmarks/compare.py --workload sir --program jax    a part
    python benchmarks/compare.py --write docs/benchmarks.md      figures, page and picture
    python benchmarks/compare.py --redraw docs/benchmarks.md     page and picture anew, nothing measured

What is not installed is named and left out. The others come with

    pip install mpi4py mpich matplotlib mesa mesa-frames taichi jax dask
    CC=mpicxx CXX=mpicxx MPICC=mpicc pip install repast4py       compiles; brings PyTorch, several GB

The programs are in competitors/ and, for the engine, models/; what they must do, and how that is checked, is
in workloads.py. Each runs in a process of its own (serve.py) and waits while the others have their turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from picture import draw
from programs import PROGRAMS, Program
from turns import Running, take_turns
from workloads import WORKLOADS, Workload

from rustsim_hpc.bench.measure import Row, Section, Timing
from rustsim_hpc.bench.report import Report
from rustsim_hpc.bench.run import machine, write_figures
from rustsim_hpc.errors import OutputError
from rustsim_hpc.run_folder.environment import versions


@dataclass(frozen=True)
class Size:
    """How much is measured: rows, rounds of turns, steps of a turn, and cores where there are several."""

    rows: int = 10_000_000
    rounds: int = 9
    steps: int = 2
    cores: int = 2


QUICK = Size(rows=1_000_000, rounds=3)

_TEXT = (
    "{text} {rows:,} rows, unless a line says otherwise. Times are for one row and one step; the baseline of "
    "the multiples is the fastest loop by hand on the same number of cores."
)


def measure(size: Size, workloads: Sequence[Workload], programs: Sequence[Program]) -> Report:
    """Measure programs on workloads."""
    before = os.getloadavg()[0]
    sections = [_programs(size, programs), *(_workload(w, size, programs) for w in workloads)]
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    found = versions()
    for dist in sorted({dist for program in programs for dist in program.dists}):
        try:
            found.setdefault(dist, version(dist))
        except PackageNotFoundError:
            continue
    return Report(now, machine(), found, asdict(size), (before, os.getloadavg()[0]), sections)


def _workload(workload: Workload, size: Size, programs: Sequence[Program]) -> Section:
    """Measure programs on one workload."""
    _say(f"{workload.key}: setting up")
    programs = [program for program in programs if workload.key in program.workloads]
    rows = {program.key: max(1, size.rows // program.part) for program in programs}
    notes = {program.key: program.missing() for program in programs}
    starts = {
        program.key: partial(
            Running,
            program.module,
            workload.key,
            rows[program.key],
            size.cores if program.several else 1,
            size.cores if program.ranks else 0,
        )
        for program in programs
        if not notes[program.key]
    }
    results = take_turns(starts, size.rounds, size.steps, size.cores, _say)
    each = {
        key: Timing(tuple(seconds / rows[key] for seconds in timing.seconds))
        for key, timing in results.items()
        if isinstance(timing, Timing)
    }
    section = Section(workload.key, workload.title, _TEXT.format(text=workload.text, rows=size.rows))
    for program in programs:
        key, name = program.key, program.name.format(cores=size.cores)
        if program.part > 1:
            name += f", {rows[key]:,} rows"
        if key in each:
            section.rows.append(Row.of(key, name, each[key], _base(program, programs, each)))
        else:
            section.rows.append(Row(key, name, note=notes[key] or str(results[key])))
    return section


def _base(program: Program, programs: Sequence[Program], each: dict[str, Timing]) -> Timing | None:
    """Return the fastest loop by hand on as many cores as a program has."""
    alike = (p.key for p in programs if p.kind == "hand" and p.several == program.several)
    return min((each[key] for key in alike if key in each), key=lambda timing: timing.median, default=None)


def _programs(size: Size, programs: Sequence[Program]) -> Section:
    """Return the table of what each program is, as a section without figures."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for p in programs:
        what = (f"competitors/{p.module}.py", p.draws, p.bits, p.more)
        alike.setdefault(what, []).append(p.name.format(cores=size.cores))
    lines = ["| program | random numbers; bits of a draw | the bits of a run | what else it gives |"]
    lines.append("| --- | --- | --- | --- |")
    for (source, *told), names in alike.items():
        lines.append(f"| [{'; '.join(names)}](../benchmarks/{source}) | {' | '.join(told)} |")
    text = (
        "Each program follows the documentation of its library and draws from the library's own random "
        "generator. Columns are float32 or uint8 everywhere (objects have Python's numbers); a draw has at "
        "least 23 bits. Whether two runs give the same bits was found out with the versions above. The "
        "engine is stepped through its control plane and writes no files.\n\n" + "\n".join(lines)
    )
    return Section("programs", "The programs", text)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def positive(word: str) -> int:
        if (number := int(word)) < 1:
            raise ValueError(word)
        return number

    parser.add_argument("--quick", action="store_true", help=f"{QUICK.rows:,} rows, {QUICK.rounds} rounds")
    for name, what in (
        ("rows", "of each program"),
        ("rounds", "of turns"),
        ("cores", "where several are used"),
    ):
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=what)
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), help="may be repeated")
    keys = [program.key for program in PROGRAMS]
    parser.add_argument("--program", action="append", choices=keys, metavar="KEY", help=", ".join(keys))
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of tables")
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="write page, figures and picture")
    parser.add_argument("--redraw", type=Path, metavar="PAGE.md", help="measure nothing")
    found = parser.parse_args(words)
    if found.write and (found.workload or found.program):
        parser.error("--write takes all workloads and programs")
    if (found.write or found.redraw) and find_spec("matplotlib") is None:
        parser.error("a picture needs matplotlib: pip install matplotlib")
    if found.cores == 1:
        parser.error("--cores is 2 or more; every program that uses one core is measured anyway")
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    asked = _arguments(words)
    try:
        if asked.redraw:
            source = asked.redraw.with_suffix(".json")
            report = Report.from_dict(json.loads(source.read_bytes())["compare"])
            _publish(asked.redraw, report)
            return 0
        size = QUICK if asked.quick else Size()
        chosen = {name: getattr(asked, name) for name in ("rows", "rounds", "cores") if getattr(asked, name)}
        size = Size(**asdict(size) | chosen)
        report = measure(
            size,
            [w for w in WORKLOADS.values() if not asked.workload or w.key in asked.workload],
            [p for p in PROGRAMS if not asked.program or p.key in asked.program],
        )
        if asked.write:
            _publish(asked.write, report)
    except (OSError, ValueError, KeyError, TypeError, OutputError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    print(report.to_json() if asked.json else report.text())
    return 0


def _publish(page: Path, report: Report) -> None:
    """Write the page with its figures, and the picture beside it."""
    draw(report, {program.key: program.kind for program in PROGRAMS}, page.parent / "images" / "compare.png")
    write_figures(page, {"compare": report.to_dict()})


if __name__ == "__main__":
    raise SystemExit(main())
