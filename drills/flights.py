"""Run us_flights in every way there is and see that all give one and the same stream of fingerprints.

    python drills/flights.py
    python drills/flights.py 4 --agents 20000 --steps 5

In one process, on 2 threads, with 1, 2 and 3 worker processes, with 2 endpoint workers (`rustsim-hpc worker`
on the loopback), under mpirun with 1, 2, 3 and 4 ranks, with 2 ranks of 2 threads each, with 2 ranks and
the 2 endpoint workers, and with 4 ranks on two simulated machines (those of one share no memory with the
other's). Compared are the replay logs, byte by byte, and the model's outputs. With a count, the first so
many of the ways.
"""

import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    INLINE,
    PYTHON,
    ROOT,
    Drill,
    Started,
    Way,
    arguments,
    differences,
    has_mpirun,
    mpirun,
    processes,
    run,
    threads,
    wait_until,
)

import rustsim_hpc as rs

JOB = ROOT / "jobs" / "us_flights.toml"
TWO_THREADS = ("--executor=threads", "--workers=2")
START_SECONDS = 120.0
WORKER = (PYTHON, "-m", "rustsim_hpc", "worker", "--bind", "tcp://127.0.0.1:*")


@contextmanager
def endpoint_workers(count: int) -> Iterator[list[str]]:
    """Start workers on the loopback, and end them with the block; yields their endpoints."""
    command = [*WORKER, "--model", str(ROOT / "jobs" / "us_flights.py")]
    with ExitStack() as stack:
        workers = [stack.enter_context(Started(command)) for _ in range(count)]
        assert wait_until(lambda: all(map(_endpoint, workers)), START_SECONDS), [w.text() for w in workers]
        yield [_endpoint(worker) for worker in workers]


def _endpoint(worker: Started) -> str:
    """Return where a worker listens, "" as long as it does not."""
    listens = re.search(r"^worker at (\S+) ", worker.text(), re.MULTILINE)
    return listens[1] if listens else ""


def has_pyzmq() -> bool:
    """Return whether endpoint workers can be had here."""
    return importlib.util.find_spec("zmq") is not None


def ways(endpoints: Sequence[str]) -> list[Way]:
    """Return all ways; those with ranks only where there is an mpirun."""
    at = ("--executor=remote", *(f"--endpoint={endpoint}" for endpoint in endpoints))
    remote = [Way(f"{len(endpoints)} endpoint workers", 0, at)] if endpoints else []
    alone = [threads(2), processes(2), *remote, processes(1), processes(3)]
    if not has_mpirun():
        return alone
    shared = [Way("mpirun 2, 2 endpoint workers", 2, at)] if endpoints else []
    # MPICH then takes the ranks of one machine for those of two.
    apart = Way("mpirun 4, two machines", 4, ("--executor=inline",), (("MPIR_CVAR_NUM_CLIQUES", "2"),))
    both = [
        threads(2),
        processes(2),
        mpirun(2),
        apart,
        *remote,
        Way("mpirun 2, 2 threads each", 2, TWO_THREADS),
    ]
    return [*both, mpirun(3), mpirun(1), mpirun(4), processes(1), processes(3), *shared]


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
    with endpoint_workers(2 if has_pyzmq() else 0) as endpoints:
        for number, way in enumerate(ways(endpoints)[: count or None]):
            folder = drill.folder / f"way-{number}"
            ended = run(way, "run", JOB, "--out", folder, *same, timeout=600)
            wrong = [f"run {ended}"] if ended.code else differences(folder, expected)
            drill.trial(way.name, wrong)
    if not has_mpirun():
        print("skipped: all ways with ranks, there is no mpirun")
    if not has_pyzmq():
        print("skipped: all ways with endpoint workers, there is no pyzmq")
    return drill.end()


if __name__ == "__main__":
    given = arguments(__doc__, 0, agents=(100_000, "agents (100000)"), steps=(60, "steps (60)"))
    sys.exit(main(given.count, given.seed, given.keep, given.agents, given.steps))
