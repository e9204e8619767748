"""Let something fail at random: a phase, a rank, a worker, the shared memory. Nothing may hang, or be lost.

    python drills/faults.py 100

Of COUNT trials each of
    raise      a phase, kernel, derived value, check or output fails in a random step, for a random row or
               rank, in one process, on threads or worker processes: exit code 3, an error that names where, a
               checkpoint of the last complete step, and a resume as if nothing had been
and, of a fifth of COUNT each,
    ranks      the same under mpirun, on 2 to 4 ranks, over within 10 s
    kill       SIGKILL of a random rank or worker at a random moment: the job ends within 10 s, with a
               message, not with 0; a resume as if nothing had been
    stop       SIGSTOP of a random rank or worker for 5 s: the run survives
    signal     SIGTERM, SIGUSR1 or SIGINT to a random rank, to the launcher or all, or a time limit: the ranks
               agree on a step, save it and leave with 75; a resume as if nothing had been
    stuck      a phase that sleeps or spins for ever: the watchdog shows the stack and ends the job with 3
    shm        ranks on a machine whose /dev/shm is (almost) full: they run, or end with an error, at once
"""

import contextlib
import io
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    INLINE,
    JOB,
    PATIENCE,
    STEPS,
    Drill,
    Ended,
    Started,
    Way,
    arguments,
    differences,
    has_mpirun,
    mpirun,
    processes,
    run,
    still_there,
    threads,
    wait_until,
)
from disk_full import can_mount

import rustsim_hpc as rs
from rustsim_hpc.cli import main as cli

AGENTS, EVERY = 3000, 3
PACE = 0.05
SAME = ("--no-progress", "--set=checkpoint.keep=2")
# (where, hows, the phase that an error names, whether WHO is a row)
PLACES = (
    ("first", ("raise", "memory", "exit"), "first", True),
    ("middle", ("raise", "memory", "exit"), "middle", True),
    ("kernel", ("raise",), "change", True),
    ("kernel", ("key",), "kinds", True),
    ("derive", ("raise", "memory"), "mean", False),
    ("check", ("raise", "memory"), None, False),
    ("output", ("raise", "memory"), None, False),
)
Trial = tuple[str, list[str]]


def in_this_process(way: Way, *words: object) -> Ended:
    """Run a command of the engine here."""
    written, begun = io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        try:
            cli.main([str(word) for word in (*words, *way.options)])
        except SystemExit as stop:
            return Ended(int(stop.code or 0), written.getvalue(), time.monotonic() - begun)


def planted(rng: random.Random, ranks: int) -> tuple[str, str | None, int]:
    """Draw a failure; return it for DRILL_FAULT, the phase that an error should name, and the step."""
    where, hows, phase, of_rows = rng.choice(PLACES)
    # Rank 0 writes the outputs; crowd and sample are not due after every step, the series is.
    who = rng.randrange(AGENTS) if of_rows else 0 if where == "output" else rng.randrange(max(1, ranks))
    step = rng.randrange(STEPS)
    return f"{where}:{rng.choice(hows)}:{step + (where == 'output')}:{who}", phase, step


def judge(ended: Ended, folder: Path, fault: str, phase: str | None, step: int) -> list[str]:
    """Return what is wrong with how a planted failure ended a run."""
    where = fault.partition(":")[0]
    done = step + (where == "output")
    wrong = [] if ended.code == 3 else [f"run {ended}"]
    wrong += ["it shows a traceback"] if "Traceback" in ended.text else []
    wrong += [f"it does not name {phase}: {ended.text[-300:]}"] if phase and phase not in ended.text else []
    if where != "output" and f"step: {step}" not in ended.text and f"step {step}" not in ended.text:
        wrong.append(f"it does not name step {step}: {ended.text[-300:]}")
    recorded = rs.open_run(folder)
    if (recorded.status, recorded.step_index) != ("failed", done):
        wrong.append(f"the record says {recorded.status} at step {recorded.step_index}, expected {done}")
    # Of a step that an output lacks there is none, lest the run that goes on from there lacks it, too.
    last = done if where != "output" else (done - 1) // EVERY * EVERY or -1
    if max(recorded.checkpoints(), default=-1) != last:
        wrong.append(f"checkpoints {sorted(recorded.checkpoints())}, expected one of step {last} as the last")
    if not recorded.crashes():
        wrong.append("there is no crash bundle")
    return wrong


def resumed(folder: Path, expected: Path, here: bool = True) -> list[str]:
    """Return what is not as expected after a resume."""
    words, ended = ("resume", folder, "--no-progress"), None
    # A run with a time limit of its own may need it more than once.
    while ended is None or ended.code == 75:
        ended = in_this_process(INLINE, *words) if here else run(INLINE, *words)
    return [f"resume {ended}"] if ended.code else differences(folder, expected)


def raise_here(rng: random.Random, folder: Path, expected: Path) -> Trial:
    """Fail in this process (and its threads or workers)."""
    way = rng.choice([INLINE, threads(2), threads(3), processes(2)])
    fault, phase, step = planted(rng, 1)
    os.environ["DRILL_FAULT"] = fault
    try:
        ended = in_this_process(way, "run", JOB, "--out", folder, *SAME)
    finally:
        del os.environ["DRILL_FAULT"]
    return f"{fault}, {way.name}", judge(ended, folder, fault, phase, step) + resumed(folder, expected)


def raise_on_ranks(rng: random.Random, folder: Path, expected: Path) -> Trial:
    """Fail on ranks; from the crash bundle on, the job has so many seconds to end."""
    way = mpirun(rng.choice([2, 3, 4]))
    fault, phase, step = planted(rng, way.ranks)
    with Started(way.command("run", JOB, "--out", folder, *SAME), DRILL_FAULT=fault) as started:
        wait_until(lambda: not started.running or list(folder.glob("crash/*.json")), 60)
        begun = time.monotonic()
        ended = started.wait(60)
        wrong = late(time.monotonic() - begun)
    wrong += judge(ended, folder, fault, phase, step)
    return f"{fault}, {way.name}", wrong + resumed(folder, expected)


def late(seconds: float) -> list[str]:
    """Return a complaint about a job that took longer to end than the engine promises."""
    return [f"it took {seconds:.1f} s to end"] if seconds > PATIENCE else []


def launched(rng: random.Random) -> Way:
    """Draw a way with several processes."""
    return rng.choice([processes(2), processes(3), *(mpirun(count) for count in (2, 3, 4) if has_mpirun())])


def in_its_steps(started: Started, folder: Path, rng: random.Random) -> None:
    """Wait for a random moment in the steps of a run."""
    series = folder / "curve.csv"

    def stepping() -> bool:
        return series.exists() and series.read_bytes().count(b"\n") > 2

    wait_until(lambda: not started.running or stepping(), 60)
    wait_until(lambda: not started.running, rng.uniform(0, 0.6 * STEPS * PACE))


def kill_one(rng: random.Random, folder: Path, expected: Path) -> Trial:
    """Kill a rank or a worker."""
    way = launched(rng)
    with Started(way.command("run", JOB, "--out", folder, *SAME), DRILL_PACE=str(PACE)) as started:
        in_its_steps(started, folder, rng)
        everyone, engines = started.tree(), started.engines()
        victim = rng.choice(engines if way.ranks else engines[1:])
        begun = time.monotonic()
        victim.kill()
        ended = started.wait(60)
        seconds = time.monotonic() - begun
        wrong = late(seconds) + still_there(everyone)
    if ended.code == 0 or not ended.text.strip():
        wrong.append(f"run {ended}")
    wanted = "(signal 9)" if way.ranks else "SIGKILL"
    if wanted not in ended.text and "lost" not in ended.text:
        wrong.append(f"it does not say what happened: {ended.text[-300:]}")
    who = "a rank" if way.ranks else "a worker"
    return f"{who} of {way.name} killed, over in {seconds:.1f} s ({ended.code})", wrong + resumed(
        folder, expected
    )


def stop_one(rng: random.Random, folder: Path, expected: Path) -> Trial:
    """Stop a rank or a worker for five seconds."""
    way = launched(rng)
    with Started(way.command("run", JOB, "--out", folder, *SAME), DRILL_PACE=str(PACE)) as started:
        in_its_steps(started, folder, rng)
        engines = started.engines()
        victim = rng.choice(engines if way.ranks else engines[1:])
        victim.suspend()
        time.sleep(5)
        still = started.running
        victim.resume()
        ended = started.wait(60)
    wrong = [] if ended.code == 0 and still else [f"run {ended}"]
    who = "a rank" if way.ranks else "a worker"
    return f"{who} of {way.name} stopped for 5 s", wrong + differences(folder, expected)


def signalled(rng: random.Random, folder: Path, expected: Path) -> Trial:
    """Ask a run to stop: by a signal to a rank, to the launcher, to all processes, or by a time limit."""
    way = rng.choice([INLINE, threads(2), processes(2), *(mpirun(count) for count in (2, 3) if has_mpirun())])
    number = rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, None])
    words = way.command("run", JOB, "--out", folder, *SAME) + (["--time-limit=3"] if number is None else [])
    with Started(words, DRILL_PACE=str(4 * PACE if number else 3 / STEPS * 4)) as started:
        in_its_steps(started, folder, rng)
        tree, engines = started.tree(), started.engines()
        # Workers leave signals to their parent; a launcher hands them on.
        to = rng.choice(
            [[engines[0]], [rng.choice(engines)], tree[:1], tree] if way.ranks else [tree[:1], tree]
        )
        for process in to if number else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        ended = started.wait(60)
        wrong = still_there(tree)
    recorded = rs.open_run(folder)
    if ended.code != 75 or recorded.status != "stopped":
        wrong.append(f"the run is {recorded.status}, it {ended}")
    if max(recorded.checkpoints(), default=-1) != recorded.step_index:
        wrong.append(f"stopped at {recorded.step_index}, checkpoints {sorted(recorded.checkpoints())}")
    who = "a time limit" if number is None else f"{number.name} to {len(to)} of {len(tree)} processes"
    return f"{who}, {way.name}, step {recorded.step_index}", wrong + resumed(folder, expected)


def stuck(rng: random.Random, folder: Path, expected: Path) -> Trial:
    """Get stuck in a phase: Python that sleeps or spins, or a compiled loop."""
    way = rng.choice([INLINE, threads(2), processes(2), *(mpirun(count) for count in (2, 3) if has_mpirun())])
    where, how = rng.choice(
        [("initialise", "sleep"), ("first", "sleep"), ("middle", "spin"), ("kernel", "spin")]
    )
    step = 0 if where == "initialise" else rng.randrange(1, STEPS)
    fault = f"{where}:{how}:{step}:{rng.randrange(AGENTS)}"
    # A rank that compiles, or waits for one that does, is not stuck.
    words = ("run", JOB, "--out", folder, *SAME, "--set=run.watchdog_seconds=5")
    with Started(way.command(*words), DRILL_FAULT=fault) as started:
        wait_until(lambda: not started.running or "watchdog:" in started.text(), 60, pause=0.05)
        begun = time.monotonic()
        everyone, ended = started.tree(), started.wait(60)
        wrong = late(time.monotonic() - begun) + still_there(everyone)
    if ended.code != 3 or "(limit 5 s)" not in ended.text or "File " not in ended.text:
        wrong.append(f"run {ended}")
    return f"{fault}, {way.name}", wrong + resumed(folder, expected, here=False)


def full_shm(rng: random.Random, folder: Path, expected: Path) -> Trial:
    """Run ranks on a machine whose /dev/shm has room for next to nothing, in a mount of their own."""
    way, pages = mpirun(rng.choice([2, 3])), rng.choice([1, rng.randrange(1, 64), rng.randrange(64, 4096)])
    words = way.command("run", JOB, "--out", folder, *SAME, "--agents=3000")
    mount = f'mount -t tmpfs -o size={pages * 4096} none /dev/shm && exec "$@"'
    with Started(["unshare", "--mount", "sh", "-c", mount, "sh", *words]) as started:
        everyone, ended = started.tree(), started.wait(30)
        wrong = still_there(everyone)
    if ended.code == 124 or not (ended.code == 0 or ended.text.strip()):
        wrong.append(f"run {ended}")
    if ended.code == 0:
        wrong += differences(folder, expected)
    said = ended.text.strip().splitlines() if ended.code else ["it runs"]
    shown = next((line for line in said if "rror" in line), said[-1] if said else "")
    return f"{way.name}, /dev/shm of {pages * 4} KiB: {ended.code} {shown[:120]}", wrong


def main(count: int, seed: int = 1, keep: Path | None = None, only: str = "") -> int:
    """Run the drill (only: one of its kinds); return its exit code."""
    drill = Drill("failures ended as they should", seed=seed, keep=keep)
    expected = drill.folder / "expected"
    done = run(INLINE, "run", JOB, "--out", expected, *SAME)
    assert done.code == 0, done
    part = max(1, count // 5)
    kinds: dict[str, tuple[int, Callable[[random.Random, Path, Path], Trial], bool]] = {
        "raise": (count, raise_here, True),
        "ranks": (part, raise_on_ranks, has_mpirun()),
        "kill": (part, kill_one, True),
        "stop": (part, stop_one, True),
        "signal": (part, signalled, True),
        "stuck": (part, stuck, True),
        "shm": (part, full_shm, has_mpirun() and can_mount()),
    }
    for kind, (trials, trial, possible) in kinds.items():
        if only not in {"", kind}:
            continue
        if not possible:
            print(f"skipped: {kind}, which needs an mpirun, or root to mount")
            continue
        for number in range(trials):
            rng = random.Random(f"{seed} {kind} {number}")
            described, wrong = trial(rng, drill.folder / f"{kind}-{number}", expected)
            drill.trial(f"{kind}: {described}", wrong)
    return drill.end()


if __name__ == "__main__":
    given = arguments(__doc__, 5, only=("", "one of raise, ranks, kill, stop, signal, stuck, shm"))
    sys.exit(main(given.count, given.seed, given.keep, given.only))
