"""Run us_flights in every way there is and see that all give one and the same stream of fingerprints.

    python drills/flights.py
    python drills/flights.py 4 --agents 20000 --steps 5

In one process, on 2 threads, with 1, 2 and 3 worker processes, under mpirun with 1, 2, 3 and 4 ranks, with 2
ranks of 2 threads each, and with 4 ranks on two simulated machines (those of one share no memory with the
other's). Compared are the replay logs, byte by byte, and the model's outputs. With a count, the first so
many of the ways.
"""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    INLINE,
    ROOT,
    Drill,
    Way,
    arguments,
    differences,
    has_mpirun,
    mpirun,
    processes,
    run,
    threads,
)

import rustsim_hpc as rs

JOB = ROOT / "jobs" / "us_flights.toml"
TWO_THREADS = ("--executor=threads", "--workers=2")


def ways() -> list[Way]:
    """Return all ways; those with ranks only where there is an mpirun."""
    alone = [threads(2), processes(2), processes(1), processes(3)]
    if not has_mpirun():
        return alone
    # MPICH then takes the ranks of one machine for those of two.
    apart = Way("mpirun 4, two machines", 4, ("--executor=inline",), (("MPIR_CVAR_NUM_CLIQUES", "2"),))
    both = [threads(2), processes(2), mpirun(2), apart, Way("mpirun 2, 2 threads each", 2, TWO_THREADS)]
    return [*both, mpirun(3), mpirun(1), mpirun(4), processes(1), processes(3)]


def main(
    count: int = 0, seed: int = 1, keep: Path | None = None, agents: int = 100_000, steps: int = 60
) -> int:
    """Run the drill (count 0: all ways); return its exit code."""
    drill = Drill("ways give the stream of one process", seed=seed, keep=keep)
    same = (f"--agents={agents}", f"--steps={steps}", f"--seed={seed}", "--record", "--no-progress")
    expected = drill.folder / "inline"
    done = run(INLINE, "run", JOB, "--out", expected, *same, timeout=600)
    assert done.code == 0, done
    stream = (expected / "replay.jsonl").read_bytes()
    digest = hashlib.sha256(stream).hexdigest()[:16]
    entries = len(rs.open_run(expected).replay().entries)
    print(f"inline: {entries} fingerprints of {agents:,} agents, sha256 of the log {digest}")
    for number, way in enumerate(ways()[: count or None]):
        folder = drill.folder / f"way-{number}"
        ended = run(way, "run", JOB, "--out", folder, *same, timeout=600)
        wrong = [f"run {ended}"] if ended.code else differences(folder, expected)
        drill.trial(way.name, wrong)
    if not has_mpirun():
        print("skipped: all ways with ranks, there is no mpirun")
    return drill.end()


if __name__ == "__main__":
    given = arguments(__doc__, 0, agents=(100_000, "agents (100000)"), steps=(60, "steps (60)"))
    sys.exit(main(given.count, given.seed, given.keep, given.agents, given.steps))
