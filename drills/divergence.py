"""Plant one-bit differences and see that `rustsim-hpc verify` and `diff` find each exactly.

    python drills/divergence.py 50
    python drills/divergence.py 3 --seed 7 --keep /tmp/planted

Each trial runs a small job twice, the second time with one bit of one value flipped, in a step, phase,
column, row and bit drawn at random; checkpoints, executors, partitions, logs and their intervals are drawn as
well. Then `verify` (the second job against the first one's log) and `diff` (of the two folders) have to name
the step, the phase, the column and the row, and to show two values that differ in that bit.
"""

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rustsim_hpc.cli import main as cli

DRILLS = Path(__file__).parent
sys.path.insert(0, str(DRILLS))
from planted import PLACES  # noqa: E402

STEPS = 12


@dataclass(frozen=True)
class Flip:
    """A planted difference. step: index before the step that makes it."""

    step: int
    place: int
    row: int
    bit: int

    @property
    def phase(self) -> str:
        return PLACES[self.place][0]

    @property
    def column(self) -> str:
        return PLACES[self.place][2]

    def options(self) -> list[str]:
        values = {"step": self.step, "phase": self.place, "row": self.row, "bit": self.bit}
        return [f"--set=params.flip_{name}={value}" for name, value in values.items()]


def command(*arguments: object) -> tuple[int, str]:
    """Run the command line in this process; return its exit code and what it wrote."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            return int(stop.code or 0), written.getvalue()


def problems_of(report: Path, flip: Flip) -> list[str]:
    """Return in what a report is not what was planted."""
    found: dict[str, Any] = json.loads(report.read_text())
    wanted = {
        "step": flip.step + 1,
        "equal_at": flip.step,
        "phase": flip.phase,
        "rows_from": f"phase {flip.phase}",
        "rows": [{"column": flip.column, "ranges": [[flip.row, flip.row + 1]], "rows": 1, "exact": True}],
    }
    wrong = [f"{key} {found[key]}, planted {value}" for key, value in wanted.items() if found[key] != value]
    if flip.column not in found["columns"]:
        wrong.append(f"columns {found['columns']}")
    table = found["table"]
    if len(table) != 1 or (table[0]["row"], table[0]["id"], table[0]["column"]) != (
        flip.row, flip.row, flip.column,
    ):  # fmt: skip
        wrong.append(f"table {table}")
    elif int(table[0]["left_bits"], 16) ^ int(table[0]["right_bits"], 16) != 1 << flip.bit:
        wrong.append(f"bits {table[0]['left_bits']} and {table[0]['right_bits']}, planted bit {flip.bit}")
    if not any(cause["text"].startswith("other parameter flip_") for cause in found["causes"]):
        wrong.append(f"causes {found['causes']}")
    return wrong


def write_job(folder: Path) -> Path:
    job = folder / "planted.toml"
    job.write_text(f'[model]\nmodule = "{DRILLS / "planted.py"}"\n[run]\nagents = 1\nsteps = {STEPS}\n')
    return job


def how_to_run(rng: random.Random) -> list[str]:
    """Draw how a run is made; none of it may matter."""
    executor = rng.choice(["inline", "threads"])
    options = [f"--executor={executor}", f"--partitions={rng.choice([1, 2, 3, 7])}"]
    options += [f"--checkpoint-every={rng.choice([0, 1, 3, 5])}", "--set=checkpoint.keep=20"]
    return options + (["--workers=2"] if executor == "threads" else [])


def trial(rng: random.Random, folder: Path) -> tuple[Flip, str, list[str]]:
    """Plant one difference and look for it; return it, how it was run, and what went wrong."""
    rows = rng.choice([1, 2, 300, 5000, 20000])
    place = rng.randrange(len(PLACES))
    flip = Flip(rng.randrange(STEPS), place, rng.randrange(rows), rng.randrange(PLACES[place][3]))
    scheme, interval = rng.choice(["digest", "fnv1a"]), rng.choice([1, 1, 3])
    job = write_job(folder)
    same = [
        f"--agents={rows}", f"--seed={rng.randrange(1000)}", f"--fingerprint={scheme}", "--record",
        f"--set=replay.interval={interval}", "--no-progress",
    ]  # fmt: skip
    clean, flipped = folder / "clean", folder / "flipped"
    wrong = []
    for path, options in ((clean, how_to_run(rng)), (flipped, how_to_run(rng) + flip.options())):
        code, text = command("run", job, *same, *options, "--out", path)
        if code:
            return flip, "", [f"run ended with {code}: {text}"]
    described = f"{rows} rows, {scheme}, interval {interval}"
    code, text = command("verify", flipped, "--against", clean / "replay.jsonl", *how_to_run(rng)[:2])
    if code != 4:
        wrong.append(f"verify ended with {code}: {text}")
    else:
        wrong += [f"verify: {problem}" for problem in problems_of(flipped / "divergence.json", flip)]
    for side in (clean, flipped):
        if rng.random() < 0.25:
            (side / "replay.jsonl").unlink()
            described += f", no log of {side.name}"
    code, text = command("diff", clean, flipped)
    if code != 4:
        wrong.append(f"diff ended with {code}: {text}")
    else:
        wrong += [f"diff: {problem}" for problem in problems_of(clean / "divergence.json", flip)]
    return flip, described, wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int, nargs="?", default=5, help="number of trials (default: 5)")
    parser.add_argument("--seed", type=int, default=1, help="seed of all that is drawn (default: 1)")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    given = parser.parse_args()
    found, start = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rustsim-drill-") as scratch:
        for number in range(given.count):
            folder = Path(given.keep or scratch) / f"trial-{number}"
            folder.mkdir(parents=True)
            flip, described, wrong = trial(random.Random(f"{given.seed} {number}"), folder)
            found += not wrong
            what = f"{flip.phase} of step {flip.step}, bit {flip.bit} of {flip.column} in row {flip.row}"
            print(f"{number + 1:3}  {what} ({described}): {'; '.join(wrong) or 'found'}", flush=True)
    print(f"{found} of {given.count} planted differences found exactly, {time.monotonic() - start:.0f} s")
    return 0 if found == given.count else 1


if __name__ == "__main__":
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
    sys.exit(main())
