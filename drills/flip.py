"""Flip every byte of a small checkpoint, and random bytes of a larger one: refused, or of no consequence.

    python drills/flip.py 2000

The small ones hold 5 rows of the drills' model, written by one process and, where there is an mpirun, by two
ranks as one file and as shards. Each byte of each of their files is replaced in turn by another one, drawn at
random. Then COUNT random bytes of one of 100,000 rows. A reader has to say with its own error that the
checkpoint does not hold, or to return the very state and header that were written: another state, another
error or a crash is a failure. Every 500th flip is also shown to `inspect` and `resume`.
"""

import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import INLINE, JOB, Drill, Way, arguments, has_mpirun, mpirun, run

from rustsim_hpc.errors import CheckpointFileError
from rustsim_hpc.ranks.team import SoloTeam
from rustsim_hpc.storage import list_checkpoints, load

SMALL, LARGE = 5, 100_000
REFUSED, EQUAL = "refused", "of no consequence"
SHOWN = 500


@dataclass(frozen=True)
class Target:
    """A run with one checkpoint to flip bytes of."""

    name: str
    folder: Path
    path: Path
    good: tuple[object, ...]

    @property
    def files(self) -> list[Path]:
        """All files of the checkpoint."""
        return sorted(path for path in self.path.parent.rglob("*") if path.is_file())


def read(path: Path) -> tuple[object, ...]:
    """Return everything that a checkpoint says: its header and every bit of its rows."""
    found = load(path, SoloTeam(), lambda header: (0, header.rows))
    ids = None if found.rows.ids is None else found.rows.ids.tobytes()
    return found.header, found.rows.names, ids, [column.tobytes() for column in found.rows.columns]


def target(name: str, way: Way, folder: Path, rows: int, layout: str) -> Target:
    """Make a run of two steps and return its last checkpoint."""
    options = (f"--agents={rows}", "--steps=2", f"--set=checkpoint.layout={layout}", "--no-progress")
    done = run(way, "run", JOB, "--out", folder, *options)
    assert done.code == 0, done
    [path] = list_checkpoints(folder / "checkpoints")
    return Target(name, folder, path, read(path))


def outcome(one: Target) -> str:
    """Return what a reader makes of a checkpoint of which a byte was flipped."""
    try:
        found = read(one.path)
    except CheckpointFileError as error:
        return REFUSED if error.damaged else f"refused as if it were whole: {error}"
    except Exception as error:  # noqa: BLE001 (whatever it is, it is counted)
        return f"{type(error).__name__}: {error}"
    return EQUAL if found == one.good else "another state"


def shown(one: Target, scratch: Path, refused: bool) -> Iterator[str]:
    """Yield what the command line does wrong with a copy of a run with a flipped checkpoint."""
    copy = scratch / "shown"
    shutil.copytree(one.folder, copy)
    ended = run(Way("inspect"), "inspect", copy / "checkpoints" / one.path.name)
    if "Traceback" in ended.text or ended.code != (5 if refused else 0):
        yield f"inspect {ended}"
    ended = run(INLINE, "resume", copy, "--steps=3", "--no-progress")
    if "Traceback" in ended.text or ended.code or ("moved aside" in ended.text) != refused:
        yield f"resume {ended}"
    shutil.rmtree(copy)


def flip(one: Target, file: Path, position: int, rng: random.Random) -> tuple[str, int, int]:
    """Replace a byte, look, put it back; return the outcome and the two bytes."""
    with file.open("r+b", buffering=0) as opened:
        old = os.pread(opened.fileno(), 1, position)[0]
        new = old ^ rng.randrange(1, 256)
        os.pwrite(opened.fileno(), bytes([new]), position)
        found = outcome(one)
    return found, old, new


def flip_all(drill: Drill, one: Target, places: list[tuple[Path, int]], rng: random.Random) -> None:
    """Flip bytes one after the other and count the outcomes."""
    counted: Counter[str] = Counter()
    wrong: list[str] = []
    begun = time.monotonic()
    for number, (file, position) in enumerate(places):
        found, old, new = flip(one, file, position, rng)
        counted[found] += 1
        where = f"byte {position} of {file.name}, {old:#04x} to {new:#04x}"
        if found not in {REFUSED, EQUAL}:
            wrong.append(f"{where}: {found}")
        elif number % SHOWN == SHOWN // 2:
            wrong += [f"{where}: {text}" for text in shown(one, drill.folder, found == REFUSED)]
        with file.open("r+b", buffering=0) as opened:
            os.pwrite(opened.fileno(), bytes([old]), position)
    if read(one.path) != one.good:
        wrong.append("put back, it is not what it was")
    outcomes = ", ".join(f"{count} {text}" for text, count in sorted(counted.items()))
    sizes = f"{len(one.files)} files of {sum(path.stat().st_size for path in one.files):,} bytes"
    drill.trial(
        f"{one.name} ({sizes}), {len(places)} bytes flipped in {time.monotonic() - begun:.0f} s: {outcomes}",
        wrong[:20],
    )


def places_of(one: Target) -> list[tuple[Path, int]]:
    """Return every byte of a checkpoint: (file, position)."""
    return [(path, position) for path in one.files for position in range(path.stat().st_size)]


def main(count: int, seed: int = 1, keep: Path | None = None, stride: int = 1) -> int:
    """Run the drill; return its exit code. stride: of the small ones' bytes take every so many-th."""
    drill = Drill("checkpoints were never taken for what they are not", seed=seed, keep=keep)
    ways = [("one process", INLINE, "auto")]
    if has_mpirun():
        ways += [(f"two ranks, {layout}", mpirun(2), layout) for layout in ("single", "sharded")]
    for number, (name, way, layout) in enumerate(ways):
        rng = drill.random(number)
        one = target(f"{SMALL} rows of {name}", way, drill.folder / f"small-{number}", SMALL, layout)
        flip_all(drill, one, places_of(one)[rng.randrange(stride) :: stride], rng)
    rng = drill.random(len(ways))
    one = target(f"{LARGE:,} rows of one process", INLINE, drill.folder / "large", LARGE, "auto")
    sizes = [path.stat().st_size for path in one.files]
    chosen = rng.choices(one.files, sizes, k=count)
    flip_all(drill, one, [(path, rng.randrange(path.stat().st_size)) for path in chosen], rng)
    return drill.end()


if __name__ == "__main__":
    given = arguments(__doc__, 2000, stride=(1, "take every so many-th byte of the small ones"))
    sys.exit(main(given.count, given.seed, given.keep, given.stride))
