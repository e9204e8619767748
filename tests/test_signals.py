"""Stop requests and the watchdog. What ends a process is tested in processes of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rustsim_hpc.compile_clock import CLOCK
from rustsim_hpc.job.signals import SIGNALS, StopRequests
from rustsim_hpc.job.watchdog import FIRST_STEP, LONGER, OUTSIDE, Quiet, Watchdog

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


# --- stop requests


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_and_handlers_come_back(number: int) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda n, frame: seen.append(n))
    try:
        outer = signal.getsignal(number)
        stops = StopRequests(environ={})
        assert signal.getsignal(number) is outer, "nothing before the block"
        with stops:
            assert stops.installed
            assert stops.stop_requested() is None
            signal.raise_signal(number)
            reason = stops.stop_requested()
            assert reason is not None
            assert (reason.kind, reason.text) == ("signal", signal.Signals(number).name)
        assert signal.getsignal(number) is outer
        assert not stops.installed
        signal.raise_signal(number)
        assert seen == [number]
    finally:
        signal.signal(number, before)


def test_handlers_come_back_after_an_error() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]

    def fails() -> None:
        with StopRequests(environ={}):
            assert [signal.getsignal(number) for number in SIGNALS] != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_second_interrupt_stops_at_once_but_a_doubled_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("rustsim_hpc.job.signals.time.monotonic", lambda: now[0])
    with StopRequests(environ={}, debounce=0.05) as stops:
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.04
        signal.raise_signal(signal.SIGINT)
        assert stops.stop_requested() is not None
        now[0] += 0.06
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        reason = stops.stop_requested()
        assert reason is not None
        assert reason.text == "SIGINT", "the first reason stays"


def test_other_threads_install_nothing_but_have_time_limits() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    found: list[object] = []

    def body() -> None:
        with StopRequests(time_limit=0, environ={}) as stops:
            found.extend([stops.installed, stops.stop_requested()])

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found[0] is False
    assert getattr(found[1], "kind", None) == "time_limit"
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_time_limit_stops_a_little_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("rustsim_hpc.job.signals.time.monotonic", lambda: now[0])
    stops = StopRequests(time_limit=50, environ={})
    assert stops.margin == 5
    now[0] += 44.9
    assert stops.stop_requested() is None
    now[0] += 0.2
    reason = stops.stop_requested()
    assert reason is not None
    assert (reason.kind, reason.text) == ("time_limit", "the time limit of 50 s")
    now[0] -= 40
    assert stops.stop_requested() is reason, "a request is never taken back"
    later = StopRequests(time_limit=50, environ={})
    later.margin = 20
    now[0] += 31
    assert later.stop_requested() is not None
    assert StopRequests(time_limit=36_000, environ={}).margin == 60


def slurm(start_in: float, end_in: float) -> dict[str, str]:
    now = time.time()
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_START_TIME": str(int(now + start_in)),
        "SLURM_JOB_END_TIME": str(int(now + end_in)),
    }


def test_slurms_own_limit_counts() -> None:
    stops = StopRequests(environ=slurm(-10, 50))
    assert stops.margin == pytest.approx(6, abs=0.2)
    assert stops.stop_requested() is None
    near = StopRequests(environ=slurm(-597, 3)).stop_requested()
    assert near is not None
    assert near.kind == "slurm"
    both = StopRequests(time_limit=1, environ=slurm(-10, 500))
    assert both.margin == pytest.approx(0.1)
    for environ in ({}, {"SLURM_JOB_END_TIME": "5"}, {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "soon"}):
        assert StopRequests(environ=environ).margin == 0


LOOP = """
import sys, time
from rustsim_hpc.job.signals import StopRequests
steps = 0
with StopRequests(environ={}) as stops:
    print("ready", flush=True)
    while stops.stop_requested() is None:
        time.sleep(0.2)
        steps += 1
    print("stopped by", stops.stop_requested().text, "after a whole step", flush=True)
    if sys.argv[1:] == ["slow"]:
        time.sleep(60)
sys.exit(75)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_ends_its_step_and_leaves_in_order(number: signal.Signals) -> None:
    process = start(LOOP)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert out == f"stopped by {number.name} after a whole step\n"
    assert process.returncode == 75, err


def test_a_second_interrupt_ends_a_process_that_is_still_saving() -> None:
    process = start(LOOP, "slow")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert "stopped by SIGINT" in process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in err
    assert process.returncode != 75


# --- watchdog

STUCK = """
import sys, time, threading
from pathlib import Path
from rustsim_hpc.job.watchdog import Watchdog
def compute():
    while True:
        pass
with Watchdog(2, rank=3, host="node7", folder=Path(sys.argv[1])) as watchdog:
    print("ready", flush=True)
    for step in range(12):
        watchdog.beat("move", step)
        time.sleep(0.1)
    if sys.argv[2] == "loop":
        compute()
    elif sys.argv[2] == "sleep":
        time.sleep(60)
    elif sys.argv[2] == "beat":
        for step in range(12, 30):
            watchdog.beat("move", 12)
            time.sleep(0.1)
"""


@pytest.mark.parametrize("how", ["loop", "sleep"])
def test_a_stuck_process_is_reported_and_ended(tmp_path: Path, how: str) -> None:
    process = start(STUCK, tmp_path, how)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3
    said = re.search(r"rank 3 on node7 has not moved for ([0-9.]+) s \(limit 2 s\): phase move, step 11", err)
    assert said is not None
    assert float(said[1]) >= 2
    assert 'File "<string>"' in err
    assert "most recent call first" in err
    bundle = json.loads((tmp_path / "crash" / "rank_00003.json").read_text())
    assert (bundle["phase"], bundle["step"], bundle["host"]) == ("move", 11, "node7")
    assert "most recent call first" in bundle["stacks"]
    if how == "loop":
        assert "in compute" in bundle["stacks"]
    assert (tmp_path / "crash" / "rank_00003.txt").exists()


def test_beats_keep_a_process_alive_and_the_watchdog_leaves_nothing(tmp_path: Path) -> None:
    process = start(STUCK, tmp_path, "beat")
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert not (tmp_path / "crash").exists()


def test_time_in_which_a_process_was_stopped_does_not_count(tmp_path: Path) -> None:
    process = start(STUCK, tmp_path, "beat")
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")


def test_a_watchdog_without_a_limit_watches_nothing() -> None:
    before = threading.active_count()
    for limit in (None, 0):
        with Watchdog(limit) as watchdog:
            watchdog.beat("move", 1)
            assert threading.active_count() == before
    with Watchdog(60, backstop=False):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_process_that_compiles_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[str, int]] = []
    monkeypatch.setattr(Watchdog, "_expire", lambda _, phase, step, how_long: ended.append((phase, step)))
    with Watchdog(0.05, backstop=False) as watchdog:
        watchdog.beat("step", 0)
        with CLOCK.counting(), CLOCK.counting():
            time.sleep(0.5)
            assert (CLOCK.running, ended) == (1, [])
        assert CLOCK.running == 0
        until = time.monotonic() + 30
        while not ended and time.monotonic() < until:
            time.sleep(0.01)
    assert ended[0] == ("step", 0)


def looks(beat: tuple[str, int], cpu: float, *, waiting: bool = False, pieces: bool = False) -> Quiet:
    """Look at a process every second for a minute; ``cpu``: what share of them it computes."""
    quiet = Quiet()
    for second in range(61):
        quiet.look(beat, 1.0, cpu, second if pieces else 0, waiting=waiting)
    return quiet


def test_outside_of_steps_only_what_does_nothing_counts_in_full() -> None:
    share = 60.0 / LONGER
    for phase in OUTSIDE:
        assert looks((phase, 0), 0.0).counted == 60
        assert looks((phase, 0), 1.0).counted == pytest.approx(share)
        assert looks((phase, 0), 0.0, waiting=True).counted == pytest.approx(share)
        assert looks((phase, 0), 0.0, pieces=True).counted == 0
        assert looks((phase, 0), 1.0).seconds == 60
    step = ("step", 7)
    assert looks(step, 1.0).counted == looks(step, 1.0, waiting=True, pieces=True).counted == 60
    quiet = looks(step, 1.0)
    quiet.look(("step", int("7")), 1.0, 0.0, 0, waiting=False)
    assert quiet.counted == quiet.seconds == 0


@pytest.mark.parametrize("workers", [False, True])
def test_a_rank_waits_in_its_first_step_for_those_that_may_compile(
    workers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[tuple[str, int]] = []
    monkeypatch.setattr(Watchdog, "_expire", lambda _, phase, step, how_long: ended.append((phase, step)))
    monkeypatch.setattr("rustsim_hpc.job.watchdog.PATIENCE", 0.0)
    with Watchdog(0.05, backstop=False) as watchdog:
        watchdog.waiting = lambda: not workers
        watchdog.has_workers = workers
        watchdog.beat(FIRST_STEP, 3)
        time.sleep(0.5)
        assert ended == []
        watchdog.beat("step", 4)
        until = time.monotonic() + 30
        while not ended and time.monotonic() < until:
            time.sleep(0.01)
    assert ended[0] == ("step", 4)


ENDLESS = """
import sys, time
from rustsim_hpc.job import watchdog as module
module.LONGER = 3
with module.Watchdog(1.0) as watchdog:
    print("ready", flush=True)
    while sys.argv[1] == "compute":
        pass
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["compute", "sleep"])
def test_a_start_that_never_ends_is_ended(how: str) -> None:
    process = start(ENDLESS, how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    # What computes has three times the limit, and the message says the time that has really passed. On a busy
    # machine, the moment before a sleep may count as computing.
    longer = "(, 3 times that while it computes or waits)" + ("" if how == "compute" else "?")
    said = re.search(rf"has not moved for ([0-9.]+) s \(limit 1 s{longer}\): phase start-up, step 0", err)
    assert said is not None, err
    assert float(said[1]) >= (3 if how == "compute" else 1)


def test_an_unwritable_folder_does_not_keep_the_watchdog_from_ending_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = start(STUCK, tmp_path / "file", "sleep")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "has not moved" in err


HELD = """
import sys, ctypes
from rustsim_hpc.job.watchdog import Watchdog
import rustsim_hpc.job.watchdog as module
import faulthandler
original = faulthandler.dump_traceback_later
# The C-level watchdog waits long on purpose; not in this test.
module.faulthandler.dump_traceback_later = lambda limit, **more: original(1.0, **more)
with Watchdog(0.3) as watchdog:
    watchdog.beat("move", 1)
    print("ready", flush=True)
    import time
    time.sleep(0.1)
    ctypes.PyDLL(None).sleep(60)  # in C, with Python's lock
"""


def test_code_that_keeps_pythons_lock_is_ended_by_the_backstop() -> None:
    process = start(HELD)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Timeout" in err
    assert 'File "<string>"' in err
