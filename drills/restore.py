"""Write checkpoints in every way and layout, and go on from each in every way: always the same bits.

    python drills/restore.py
    python drills/restore.py 6

The drills' job is run to step 6 by each writer (one process, 2 worker processes, mpirun 1, 2 and 3; a single
file, a shard for each rank, or for each node; some compressed; async or not), and each of these runs is taken
to step 12 by each reader (one process, 3 threads, mpirun 1, 2 and 4). Whatever the pair, fingerprint, replay
log and outputs have to be those of the run that never stopped. With a count, so many pairs drawn at random.

A single file of several ranks is written by parallel HDF5 where h5py is built with MPI, else by positioned
writes. For the former: DRILL_PYTHON=/path/to/python DRILL_MPIRUN="mpirun.openmpi --oversubscribe".
"""

import random
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    INLINE,
    JOB,
    PYTHON,
    STEPS,
    Drill,
    Way,
    arguments,
    differences,
    environ,
    has_mpirun,
    mpirun,
    processes,
    run,
    threads,
)

import rustsim_hpc as rs

HALF = STEPS // 2
LAYOUTS = ("single", "sharded", "node")


def writers() -> list[Way]:
    """Return who writes."""
    return [INLINE, processes(2), *([mpirun(count) for count in (1, 2, 3)] if has_mpirun() else [])]


def readers() -> list[Way]:
    """Return who reads."""
    return [INLINE, threads(3), *([mpirun(count) for count in (1, 2, 4)] if has_mpirun() else [])]


def parallel_hdf5() -> bool:
    """Return whether the drilled Python's h5py is built with MPI."""
    probe = "import h5py, sys; sys.exit(not h5py.get_config().mpi)"
    return subprocess.run([PYTHON, "-c", probe], env=environ(), check=False).returncode == 0


def write(writer: Way, layout: str, folder: Path, number: int) -> list[str]:
    """Run to half way; return what went wrong."""
    filters = "gzip" if layout == "sharded" and number % 3 else "none"
    shards = "node" if layout == "node" else "rank"
    how = (f"--set=checkpoint.layout={'single' if layout == 'single' else 'sharded'}",)
    how += (f"--set=checkpoint.shards={shards}", f"--set=checkpoint.compression={filters}")
    how += (f"--set=checkpoint.async={str(number % 3 != 0).lower()}", f"--steps={HALF}", "--no-progress")
    ended = run(writer, "run", JOB, "--out", folder, *how)
    if ended.code:
        return [f"run {ended}"]
    found = len(list((folder / "checkpoints").glob(f"step_{HALF:010d}.shards-*/{shards}_*.h5")))
    wanted = 0 if writer.ranks < 2 or layout == "single" else writer.ranks if layout == "sharded" else 1
    return [] if found == wanted else [f"{found} shards, expected {wanted}"]


def read(reader: Way, folder: Path, copy: Path, expected: Path) -> list[str]:
    """Go on with a copy of a run; return what is not as in the run that never stopped."""
    shutil.copytree(folder, copy)
    ended = run(reader, "resume", copy, f"--steps={STEPS}", "--no-progress")
    if ended.code:
        return [f"resume {ended}"]
    wrong = differences(copy, expected)
    if rs.open_run(copy).record["sessions"][-1]["resumed_from"] != HALF:
        wrong.append(f"it did not go on from step {HALF}")
    shutil.rmtree(copy)
    return wrong


def main(count: int = 0, seed: int = 1, keep: Path | None = None, only: str = "") -> int:
    """Run the drill (count 0: all pairs; only: one of the layouts); return its exit code."""
    drill = Drill("restored runs have the bits of the one that never stopped", seed=seed, keep=keep)
    expected = drill.folder / "expected"
    done = run(INLINE, "run", JOB, "--out", expected, "--no-progress")
    assert done.code == 0, done
    layouts = [layout for layout in LAYOUTS if only in {"", layout}]
    pairs = [(writer, layout, reader) for writer in writers() for layout in layouts for reader in readers()]
    if count:
        pairs = random.Random(seed).sample(pairs, count)
    written: dict[tuple[str, str], tuple[Path, list[str]]] = {}
    for number, (writer, layout, reader) in enumerate(pairs):
        key = (writer.name, layout)
        if key not in written:
            folder = drill.folder / f"written-{len(written)}"
            written[key] = (folder, write(writer, layout, folder, len(written)))
        folder, wrong = written[key]
        wrong = wrong or read(reader, folder, drill.folder / f"read-{number}", expected)
        drill.trial(f"{writer.name}, {layout}, then {reader.name}", wrong)
    if not has_mpirun():
        print("skipped: all pairs with ranks, there is no mpirun")
    print("single files of ranks were written by", "parallel HDF5" if PARALLEL else "positioned writes")
    return drill.end()


PARALLEL = parallel_hdf5()

if __name__ == "__main__":
    given = arguments(__doc__, 0, only=("", "one of single, sharded, node"))
    sys.exit(main(given.count, given.seed, given.keep, given.only))
