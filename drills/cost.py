"""Measure what checkpoints and recorded streams cost, beside what copies, disks and h5py do on this machine.

    python drills/cost.py 5
    python drills/cost.py 3 --rows 1000000

COUNT rounds, at 10^7 rows of four float32 columns:
    pause      of the step loop when a checkpoint is due, against np.copyto of the state; no step is recorded
    write      bytes per second from then on, against `dd conv=fsync` of as many bytes in the same round
    restore    from file, with both proofs, against reading the columns with h5py alone
    memory     the highest resident size of a run with checkpoints, above that of one of 1,000 rows
    verify     a step that is verified against a log, against one that is recorded
Medians are compared with the bounds that the project has set itself; the exit code is 1 where one is not
kept. `rustsim-hpc bench` measures what recording adds to a step.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import DRILLS, Drill, arguments, environ

from rustsim_hpc.proof.fingerprint import ReplayFingerprint, StateView
from rustsim_hpc.ranks.team import SoloTeam
from rustsim_hpc.state.schema import Column, Schema
from rustsim_hpc.storage import CheckpointHeader, CheckpointWriter, StorageOptions, load_newest

BOUNDS = {"pause": 1.3, "write": 0.85, "restore": 2.5, "memory": 3.2, "verify": 1.1}
SCHEMA = Schema(tuple(Column(name, "float32") for name in ("x", "y", "vx", "vy")))
MEGABYTE = 1e6


@dataclass
class Clock:
    """Seconds by what was measured, round by round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def time(self, what: str, call: Callable[[], object]) -> None:
        """Measure a call."""
        start = time.perf_counter()
        call()
        self.seconds.setdefault(what, []).append(time.perf_counter() - start)

    def median(self, what: str) -> float:
        """Return the median of what was measured."""
        return statistics.median(self.seconds[what])


def state_of(rows: int) -> StateView:
    """Return a state of that many rows."""
    values = [np.linspace(k, k + 1, rows, dtype=np.float32) for k in range(len(SCHEMA))]
    return StateView(0, rows, SCHEMA.names, None, tuple(values), 0, rows)


def dd(path: Path, size: int) -> None:
    """Write so many bytes as `dd conv=fsync` does, in pieces of 8 MiB."""
    words = ["dd", "if=/dev/zero", f"of={path}", "bs=8M", f"count={size}", "iflag=count_bytes", "conv=fsync"]
    subprocess.run(words, check=True, capture_output=True)


def read_plain(path: Path) -> None:
    """Read the columns of a checkpoint with h5py and nothing else."""
    with h5py.File(path) as file:
        for name in (f"columns/{column}" for column in SCHEMA.names):
            file[name][:]


def checkpoints(rows: int, rounds: int, folder: Path) -> tuple[Clock, int]:
    """Write and restore checkpoints; return the seconds, and the bytes of one."""
    view, clock, team = state_of(rows), Clock(), SoloTeam()
    # Of a step that is not recorded nobody knows the fingerprint: the writer makes it.
    header = CheckpointHeader(0, rows, SCHEMA, ReplayFingerprint(0, 0, "digest"), fingerprint_due=True)
    copies = [np.zeros_like(column) for column in view.columns]
    writer = CheckpointWriter(folder / "checkpoints", team, StorageOptions())
    writer.folder.mkdir(parents=True)
    writer.reserve(view)
    for number in range(rounds + 1):
        clock.time(
            "copy", lambda: [np.copyto(to, column) for to, column in zip(copies, view.columns, strict=True)]
        )
        clock.time("pause", lambda: writer.submit(header, view))
        clock.time("write", writer.finish)
        size = sum(file.stat().st_size for file in writer.folder.iterdir())
        clock.time("dd", lambda size=size: dd(folder / "plain", size))
        clock.time("h5py", lambda: read_plain(writer.paths[-1]))
        clock.time("restore", lambda: load_newest(writer.folder, team, lambda _: (0, rows)))
        # Not in anybody's time: to give back so many bytes takes a disk long.
        for file in (folder / "plain", *writer.folder.iterdir()):
            file.unlink()
        if number == 0:  # memory and caches are there now
            clock.seconds.clear()
    return clock, size


JOB = """
[model]
module = "{model}"
[run]
agents = {rows}
steps = {steps}
[replay]
mode = "{mode}"
[checkpoint]
every = {every}
"""


def job(folder: Path, rows: int, *, steps: int, every: int, mode: str = "off") -> list[str]:
    """Write a job of the four columns; return the command that runs it."""
    name = f"{rows}-{mode}-{every}"
    path = folder / f"{name}.toml"
    path.write_text(
        JOB.format(model=DRILLS / "cost_model.py", rows=rows, steps=steps, mode=mode, every=every)
    )
    words = ["run", str(path), "--out", str(folder / name), "--force", "--no-progress", "--json"]
    return [sys.executable, "-m", "rustsim_hpc", *words]


def peak(command: list[str]) -> int:
    """Run a command; return its highest resident size in bytes."""
    process = subprocess.Popen(command, env=environ(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


def memory(rows: int, folder: Path) -> tuple[int, int]:
    """Return what a run with checkpoints needs above one of 1,000 rows, and the bytes of its state."""
    small, large = (peak(job(folder, count, steps=12, every=4)) for count in (1000, rows))
    return large - small, 16 * rows


def seconds_a_step(command: list[str]) -> float:
    """Return the seconds of a step of a job, without what the first steps take (compiling, memory)."""
    loops = []
    for steps in (10, 50):
        words = [*command, f"--steps={steps}"]
        done = subprocess.run(words, env=environ(), check=True, capture_output=True, text=True)
        loops.append(float(json.loads(done.stdout.splitlines()[-1])["seconds"]))
    return (loops[1] - loops[0]) / 40


def verifying(rows: int, rounds: int, folder: Path) -> tuple[float, float]:
    """Return the seconds of a recorded step and of a verified one, in turn."""
    record = job(folder, rows, steps=50, every=0, mode="record")
    seconds_a_step(record)
    log = shutil.copy(folder / f"{rows}-record-0" / "replay.jsonl", folder / "log.jsonl")
    verify = [*job(folder, rows, steps=50, every=0), "--verify", str(log)]
    pairs = [(seconds_a_step(record), seconds_a_step(verify)) for _ in range(rounds)]
    recorded, verified = zip(*pairs, strict=True)
    return statistics.median(recorded), statistics.median(verified)


def main(count: int, seed: int = 1, keep: Path | None = None, rows: int = 10_000_000) -> int:
    """Measure; return 1 where a bound is not kept."""
    drill = Drill("bounds are kept", seed=seed, keep=keep)
    # First: a process begins with the highest size of the one that it was forked from.
    above, state = memory(rows, drill.folder)
    recorded, verified = verifying(rows, count, drill.folder)
    clock, size = checkpoints(rows, count, drill.folder)
    copy, written = clock.median("copy"), size / clock.median("write") / MEGABYTE
    pause, read = clock.median("pause"), clock.median("h5py")
    plain, restore = size / clock.median("dd") / MEGABYTE, clock.median("restore")
    found = {
        "pause": (pause / copy, f"{pause * 1e3:.1f} ms, np.copyto {copy * 1e3:.1f} ms"),
        "write": (written / plain, f"{written:.0f} MB/s, dd {plain:.0f} MB/s, {size / MEGABYTE:.0f} MB"),
        "restore": (restore / read, f"{restore:.3f} s, h5py alone {read:.3f} s"),
        "memory": (
            above / state,
            f"{above / MEGABYTE:.0f} MB above the baseline, state {state / MEGABYTE:.0f} MB",
        ),
        "verify": (verified / recorded, f"{verified * 1e3:.1f} ms a step, recorded {recorded * 1e3:.1f} ms"),
    }
    for name, (ratio, text) in found.items():
        least = name == "write"
        kept = ratio >= BOUNDS[name] if least else ratio <= BOUNDS[name]
        bound = f"at {'least' if least else 'most'} {BOUNDS[name]}"
        drill.trial(f"{name}: {ratio:.2f} x ({text}), {bound}", [] if kept else ["not kept"])
    return drill.end()


if __name__ == "__main__":
    given = arguments(__doc__, 5, rows=(10_000_000, "rows (10000000)"))
    sys.exit(main(given.count, given.seed, given.keep, given.rows))
