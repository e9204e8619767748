"""Fill the disk under runs at a random moment: a typed error, whole checkpoints, and a run that can go on.

    python drills/disk_full.py 40

Each trial begins the drills' job in a folder on a small tmpfs of its own, stops it at step 6, leaves a random
number of bytes free (a multiple of the page of 4 KiB that a tmpfs gives out), and resumes it. Either the rest
fits, or what does not (a checkpoint: exit code 5; an output, the log: 3) is told in one error. The
checkpoints before stand, nothing of the failed one is left, and with room again the run ends as if nothing
had been. Every other trial has `on_error = "continue"`: a checkpoint that does not fit is a warning then.
Compressed checkpoints, whose size nobody knows before, meet the end of the disk while they are written. Needs
root, to mount.
"""

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    INLINE,
    JOB,
    STEPS,
    Drill,
    Way,
    arguments,
    differences,
    has_mpirun,
    mpirun,
    processes,
    run,
    whole,
)

import rustsim_hpc as rs

HALF = STEPS // 2
AGENTS = 250_000
ROOM = 96 << 20
PAGE = 4096


def can_mount() -> bool:
    """Return whether this process may mount a tmpfs."""
    probe = ["unshare", "--mount", "true"]
    return os.geteuid() == 0 and subprocess.run(probe, check=False, capture_output=True).returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a tmpfs of ROOM bytes on a folder, for the block."""
    folder.mkdir(parents=True)
    size = f"size={ROOM},nr_inodes=1000"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "rustsim-drill", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def leave_free(disk: Path, free: int) -> Path:
    """Fill a disk up to so many free bytes; return the file that fills it."""
    ballast = disk / "ballast"
    found = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - free)
    return ballast


def ways() -> list[Way]:
    """Return how runs are made, in turn."""
    return [INLINE, processes(2), *([mpirun(2)] if has_mpirun() else [])]


def judge(code: int, text: str, on_error: str) -> tuple[str, list[str]]:
    """Return how a run on a full disk ended, in words, and what is wrong with that."""
    wrong = ["it shows a traceback"] if "Traceback" in text else []
    if code == 0:
        return ("a warning, and on" if "warning:" in text else "all fits"), wrong
    first = next((line for line in text.splitlines() if line.startswith("Error:")), "")
    if code not in {3, 5} or (code == 5 and on_error == "continue"):
        wrong.append(f"it ended with {code}: {text[-300:]}")
    if not any(word in text for word in ("No space left on device", "disk is full")):
        wrong.append(f"it does not say why: {text[-300:]}")
    return f"code {code} ({first[7:].rpartition('/')[2]})", wrong


def trial(number: int, drill: Drill, expected: Path) -> tuple[str, list[str]]:
    """Fill the disk under one run; return what was done, and what went wrong."""
    rng, way = drill.random(number), ways()[number % len(ways())]
    layout, on_error = rng.choice(["single", "sharded"]), ("stop", "continue")[number % 2]
    with small_disk(drill.folder / f"disk-{number}") as disk:
        folder = disk / "run"
        filters = "none" if way.ranks and layout == "single" else rng.choice(["none", "gzip", "gzip"])
        stored = {"layout": layout, "on_error": on_error, "compression": filters}
        how = (f"--agents={AGENTS}", *(f"--set=checkpoint.{key}={value}" for key, value in stored.items()))
        how += (f"--set=checkpoint.async={rng.choice(['true', 'false'])}", "--no-progress")
        ended = run(way, "run", JOB, "--out", folder, *how, f"--steps={HALF}")
        if ended.code:
            return way.name, [f"run {ended}"]
        before = sorted(rs.open_run(folder).checkpoints())
        free = _free(rng)
        ballast = leave_free(disk, free)
        full = run(way, "resume", folder, f"--steps={STEPS}", "--no-progress")
        ending, wrong = judge(full.code, full.text, on_error)
        described = f"{way.name}, {layout}, {filters}, {on_error}, {free:,} bytes free: {ending}"
        there = sorted(rs.open_run(folder).checkpoints())
        wrong += whole(folder)
        if not there or max(there) < max(before):
            wrong.append(f"of checkpoints {before} there are {there}")
        left = [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
        wrong += [f"left over: {name}" for name in left]
        ballast.unlink()
        ended = run(way, "resume", folder, f"--steps={STEPS}", "--no-progress")
        if ended.code:
            return described, [*wrong, f"with room again, resume {ended}"]
        return described, wrong + differences(folder, expected)


def _free(rng: random.Random) -> int:
    """Draw how many bytes are left: next to nothing, or at most what two checkpoints take."""
    return rng.choice([rng.randrange(64), *(rng.randrange(64, 2500) for _ in range(4))]) * PAGE


def main(count: int, seed: int = 1, keep: Path | None = None) -> int:
    """Run the drill; return its exit code."""
    if not can_mount():
        print("skipped: only root may mount a small disk")
        return 0
    drill = Drill("runs met a full disk with a typed error, whole, and went on", seed=seed, keep=keep)
    expected = drill.folder / "expected"
    done = run(INLINE, "run", JOB, "--out", expected, f"--agents={AGENTS}", "--no-progress")
    assert done.code == 0, done
    for number in range(count):
        drill.trial(*trial(number, drill, expected))
    return drill.end()


if __name__ == "__main__":
    given = arguments(__doc__, 6)
    sys.exit(main(given.count, given.seed, given.keep))
