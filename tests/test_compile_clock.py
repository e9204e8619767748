"""What figures of speed leave out: the time to compile, and nothing else."""

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

    import rustsim_hpc.kernels.cached  # noqa: F401 (registers the listener)

    before, start = CLOCK.seconds, time.perf_counter()
    assert njit(lambda x: x + 1)(1) == 2
    took = time.perf_counter() - start
    assert 0.3 * took < CLOCK.seconds - before <= took
