"""Kill runs at random moments, half of them while a checkpoint is being written, and resume each.

    python drills/kill.py 200

Each trial starts the drills' job (in one process, with worker processes, under mpirun; single or sharded
checkpoints; written behind the steps or while they wait), kills it with SIGKILL, all its processes at once or
one of them, and has it resumed in another way. What is in the folder then must be the run that nobody
interrupted: fingerprint, replay log, outputs; no checkpoint that does not prove itself was published, and
nothing is left over.
"""

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    INLINE,
    JOB,
    PATIENCE,
    STEPS,
    Drill,
    Started,
    Way,
    arguments,
    differences,
    has_mpirun,
    kill,
    mpirun,
    processes,
    run,
    still_there,
    threads,
    wait_until,
    whole,
)

import rustsim_hpc as rs

# Seconds a step: long enough that a moment drawn at random falls into the steps as a rule.
PACE = 0.05
TRIES = 40
SAME = ("--no-progress", "--set=checkpoint.keep=2")


def unfinished(checkpoints: Path) -> list[str]:
    """Return what lies among the checkpoints that does not belong to a published one."""
    try:
        names = {path.name for path in checkpoints.iterdir()}
    except OSError:
        return []
    masters = {name[:-3] for name in names if name.endswith(".h5")}
    return [
        name
        for name in names
        if name.startswith(".") or ".previous." in name or name.partition(".")[0] not in masters
    ]


def ways() -> list[Way]:
    """Return how runs are started, in turn."""
    return [INLINE, processes(2), *([mpirun(2), mpirun(3)] if has_mpirun() else [])]


def resumed_by(rng: random.Random) -> Way:
    """Draw how a run is resumed."""
    return rng.choice([INLINE, threads(3), processes(3), *([mpirun(2), mpirun(4)] if has_mpirun() else [])])


def begin_and_kill(
    way: Way, folder: Path, rng: random.Random, *, writing: bool, length: float
) -> tuple[str, bool, list[str]]:
    """Start a run and kill it; return how, whether the moment was the wanted one, and what went wrong."""
    layout, written = rng.choice(["single", "sharded"]), rng.choice(["true", "true", "false"])
    how = [f"--set=checkpoint.layout={layout}", f"--set=checkpoint.async={written}"]
    checkpoints = folder / "checkpoints"
    with Started(way.command("run", JOB, "--out", folder, *SAME, *how), DRILL_PACE=str(PACE)) as started:
        if writing:
            first = rng.randrange(3, STEPS + 1, 3)
            there = checkpoints / f"step_{first - 3:010d}.h5" if first > 3 else folder / "curve.csv"
            wait_until(lambda: not started.running or there.exists(), 60)
            # Looked up before: that takes longer than a small checkpoint.
            everyone, engines = started.tree(), started.engines()
            wait_until(lambda: not started.running or unfinished(checkpoints), 60, pause=0)
            time.sleep(rng.choice([0, rng.uniform(0, 0.001), rng.uniform(0, 0.004)]))
        else:
            # One in five before there is anything; else from when there is a job to go on with.
            early = rng.random() < 0.2
            wait_until(lambda: not started.running or early or (folder / "job.toml").exists(), 60)
            wait_until(lambda: not started.running, rng.uniform(0, 1 if early else length))
            everyone, engines = started.tree(), started.engines()
        running, everything = started.running, rng.random() < 0.5
        victims = everyone if everything or not everyone else [rng.choice(engines or everyone)]
        kill(victims)
        ended = started.wait(PATIENCE)
        wrong = [f"{PATIENCE:g} s after the kill it has not ended"] if ended.code == 124 else []
        wrong += still_there(everyone)
    left = unfinished(checkpoints)
    who = "all processes" if everything else "one process"
    moment = "writing" if left else "running" if running else "done"
    described = (
        f"{way.name}, {layout}{', not async' if written == 'false' else ''}, {who} killed while {moment}"
    )
    # A worker may be killed when its run needs it no longer.
    if running and ended.code == 0 and (everything or way.ranks):
        wrong.append("it ended with 0")
    return f"{described} ({ended.code})", running and (bool(left) or not writing), wrong


def length_of(way: Way, folder: Path) -> float:
    """Return the seconds that a run takes from its job file to its end."""
    with Started(way.command("run", JOB, "--out", folder, *SAME), DRILL_PACE=str(PACE)) as started:
        wait_until(lambda: not started.running or (folder / "job.toml").exists(), 60)
        begun = time.monotonic()
        ended = started.wait()
    assert ended.code == 0, ended
    return time.monotonic() - begun


def trial(number: int, drill: Drill, expected: Path, lengths: dict[str, float]) -> tuple[str, list[str]]:
    """Kill one run and resume it; return what was done, and what went wrong."""
    rng, way = drill.random(number), ways()[number % len(ways())]
    writing = number // len(ways()) % 2 == 1
    for attempt in range(TRIES):
        folder = drill.folder / f"trial-{number}-{attempt}"
        length = lengths[way.name]
        described, wanted, wrong = begin_and_kill(way, folder, rng, writing=writing, length=length)
        wrong += whole(folder)
        if wanted or wrong:
            break
    else:
        return described, [f"no kill in {TRIES} met the moment"]
    other = resumed_by(rng)
    # As the batch scripts do: what was killed before it had a job file is begun again.
    begun = (folder / "job.toml").exists()
    again = ("resume", folder, "--no-progress") if begun else ("run", JOB, "--out", folder, *SAME)
    ended = run(other, *again)
    described += f"; {again[0]} with {other.name}"
    if ended.code:
        return described, [*wrong, f"{again[0]} {ended}"]
    from_step = rs.open_run(folder).record["sessions"][-1]["resumed_from"]
    wrong += differences(folder, expected) + [
        f"left over: {name}" for name in unfinished(folder / "checkpoints")
    ]
    return f"{described} from {from_step or 0}", wrong


def main(numbers: Sequence[int], seed: int = 1, keep: Path | None = None) -> int:
    """Run the trials of these numbers; return the drill's exit code."""
    drill = Drill("killed runs ended as if nobody had interrupted them", seed=seed, keep=keep)
    expected = drill.folder / "expected"
    done = run(INLINE, "run", JOB, "--out", expected, *SAME)
    assert done.code == 0, done
    used = {ways()[number % len(ways())] for number in numbers}
    lengths = {way.name: length_of(way, drill.folder / f"length-{way.name}") for way in used}
    for number in numbers:
        drill.trial(*trial(number, drill, expected, lengths))
    if not has_mpirun():
        print("skipped: runs under mpirun, there is none")
    return drill.end()


if __name__ == "__main__":
    given = arguments(__doc__, 8)
    sys.exit(main(range(given.count), given.seed, given.keep))
