"""Programs in processes of their own, that wait until it is their turn."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rustsim_hpc.bench.measure import Timing
from rustsim_hpc.bench.ranks import mpirun

HERE = Path(__file__).parent
START, TURN = 600.0, 300.0
"""Seconds after which a program that is not ready, or does not come back from its turn, is ended."""


class LostError(Exception):
    """A program that can give no (further) figures, and why."""


class Running:
    """A program on one workload, in a process (or ranks) of its own; a context manager that ends it."""

    def __init__(self, module: str, workload: str, rows: int, cores: int, ranks: int = 0) -> None:
        command = [sys.executable, str(HERE / "serve.py"), module, workload]
        command += [str(number) for number in (rows, cores, ranks)]
        if ranks:
            command = [mpirun() or "mpirun", "-n", str(ranks), *command]
        threads = 1 if ranks else cores
        names = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")
        # A thread pool that spins after its work would take a core from the next program.
        settings = {"OMP_WAIT_POLICY": "passive", "JAX_PLATFORMS": "cpu"} | dict.fromkeys(names, str(threads))
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the program)
        self._buffer = b""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=os.environ | settings,
            start_new_session=True,
        )

    def answer(self, seconds: float) -> dict[str, Any]:
        """Return the program's next answer.

        Raises:
            LostError: it says that it cannot go on, ended, or said nothing for so long.
        """
        end = time.monotonic() + seconds
        output = self._process.stdout
        assert output is not None
        while b"\n" not in self._buffer:
            if not select.select([output], [], [], max(0.0, end - time.monotonic()))[0]:
                raise LostError(f"failed: no answer after {seconds:g} s")
            found = os.read(output.fileno(), 65536)
            if not found:
                raise LostError(f"failed: it ended with {self._process.wait(10)}: {self._last_words()}")
            self._buffer += found
        line, _, self._buffer = self._buffer.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        if "failed" in said:
            raise LostError(f"failed: {said['failed']}")
        return said

    def ask(self, word: str, seconds: float = TURN) -> dict[str, Any]:
        """Tell the program something and return what it answers.

        Raises:
            LostError: see `answer`.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{word}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last answer, or its end, says why
        return self.answer(seconds)

    def end(self) -> None:
        """End the program and all that it started."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        for word in (None, signal.SIGTERM, signal.SIGKILL):
            if word is not None:
                # All of its group: ranks are started by processes that mpirun has started.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, word)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(3)
                break
        self._words.close()

    def _last_words(self) -> str:
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")[-300:]


def take_turns(
    starts: Mapping[str, Callable[[], Running]],
    rounds: int,
    steps: int,
    workers: int,
    say: Callable[[str], None] = lambda _: None,
    patience: tuple[float, float] = (START, TURN),
) -> dict[str, Timing | str]:
    """Time programs in turns, ``rounds`` of ``steps`` steps, and check their last states.

    starts: by key, how each is started; so many ``workers`` at once. Returns by key the seconds of a step, or
    why there are none.
    """
    running: dict[str, Running] = {}
    lost: dict[str, str] = {}
    seconds: dict[str, list[float]] = {}

    def start(key: str) -> None:
        say(f"  {key}")
        running[key] = starts[key]()
        running[key].answer(patience[0])

    def turn(keys: Sequence[str], what: Callable[[str], object]) -> None:
        for key in keys:
            try:
                what(key)
            except LostError as error:
                lost[key] = str(error)
                running[key].end()

    try:
        with ThreadPoolExecutor(workers) as pool:
            begun = {key: pool.submit(start, key) for key in starts}
        turn(list(starts), lambda key: begun[key].result())
        for _ in range(rounds):

            def step(key: str) -> None:
                took = running[key].ask(str(steps), patience[1])["seconds"]
                seconds.setdefault(key, []).append(took / steps)

            turn([key for key in starts if key not in lost], step)
        turn([key for key in starts if key not in lost], lambda key: running[key].ask("check", patience[1]))
    finally:
        for program in running.values():
            program.end()
    return {key: lost.get(key) or Timing(tuple(seconds[key])) for key in starts}
