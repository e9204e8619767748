"""What figures of speed leave out: the time to compile, and nothing else."""

import subprocess
import sys
import threading
import time

from rustsim_hpc.compile_clock import CLOCK, CompileClock


def test_nested_counting_counts_once():
    clock = CompileClock()
    start = time.perf_counter()
    with clock.counting():
        time.sleep(0.02)
        with clock.counting():
            time.sleep(0.02)
        assert clock.seconds == 0.0, "the outer one is still counting"
    assert 0.04 <= clock.seconds <= time.perf_counter() - start


def test_threads_add_up():
    clock = CompileClock()

    def work():
        with clock.counting():
            time.sleep(0.03)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.seconds >= 0.09


def test_what_fails_is_counted_and_ends():
    clock = CompileClock()
    for _ in range(2):
        try:
            with clock.counting():
                raise ValueError
        except ValueError:
            pass
    before = clock.seconds
    with clock.counting():
        time.sleep(0.01)
    assert clock.seconds - before >= 0.01


def test_numba_tells_the_clock_what_it_compiles():
    from numba import njit
    from numba.extending import overload

    import rustsim_hpc.kernels.cached  # noqa: F401 (registers the listener)

    def slow():
        raise NotImplementedError

    @overload(slow)
    def compiled():
        time.sleep(0.2)
        return lambda: 1

    before, start = CLOCK.seconds, time.perf_counter()
    assert njit(lambda: slow() + 1)() == 2
    assert 0.2 <= CLOCK.seconds - before <= time.perf_counter() - start


_PROOF = """
import numpy as np
from rustsim_hpc.compile_clock import CLOCK
from rustsim_hpc.proof import fingerprint
seen = []
for _ in range(2):
    fingerprint.digest_default_ids(0, 1000)
    seen.append(CLOCK.seconds)
assert 0 < seen[0] == seen[1], seen
CLOCK.seconds = 0.0
fingerprint.digest_column(np.zeros(9, np.float32), 0, 1)
assert CLOCK.seconds > 0, "the first of its kind is loaded or compiled"
"""


def test_loading_what_proofs_call_is_no_proof():
    done = subprocess.run([sys.executable, "-c", _PROOF], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
