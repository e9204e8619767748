"""Two pipes between a parent and a worker process, one for orders and one for answers.

A round trip over pipes takes about half as long as one over a socket. If either side dies, the other sees the
end of its pipe. A process that a worker forked may hold that end open, so the parent checks at least once a
second that its worker is alive.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

POLL_SECONDS = 1.0

_POLL_MS = int(1000 * POLL_SECONDS)
_SPIN_NS = 100_000
Poll = Callable[[int], list[tuple[int, int]]]


def comes_soon(poll: Poll) -> bool:
    """Spin briefly until a pipe has something to read; return whether it has (``poll`` of a poll object).

    Waking a sleeping thread takes tens of microseconds if its core went idle: longer than a small step. The
    core is yielded between polls.
    """
    until = time.perf_counter_ns() + _SPIN_NS
    while not poll(0):
        if time.perf_counter_ns() > until:
            return False
        os.sched_yield()
    return True


class PipeEnds:
    """A parent's ends of the pipes to a worker.

    Args:
        answers: descriptor to read from; owned by this object.
        orders: descriptor to write to; owned by this object.
        is_gone: returns whether the worker has ended.
    """

    def __init__(self, answers: int, orders: int, is_gone: Callable[[], bool]) -> None:
        self._answers = answers
        self._orders = orders
        self._is_gone = is_gone
        os.set_blocking(answers, False)
        os.set_blocking(orders, False)
        incoming, outgoing = select.poll(), select.poll()
        incoming.register(answers, select.POLLIN)
        outgoing.register(orders, select.POLLOUT)
        self._until_answer, self._until_room = incoming.poll, outgoing.poll

    def send(self, data: bytes | bytearray) -> bool:
        """Send all of ``data``; return False if the worker died."""
        rest: bytes | bytearray | memoryview = data
        while True:
            try:
                sent = os.write(self._orders, rest)
            except BlockingIOError:
                sent = 0
            except OSError:
                return False
            if sent == len(rest):
                return True
            rest = memoryview(rest)[sent:]
            if not self._until_room(_POLL_MS) and self._is_gone():
                return False

    def receive(self, buffer: memoryview, deadline: float = float("inf")) -> bool:
        """Fill a buffer; return False if the worker died.

        Raises:
            TimeoutError: it is not full at the deadline (``time.monotonic``).
        """
        soon = comes_soon(self._until_answer)
        while True:
            if not soon and not self._until_answer(_POLL_MS):
                if self._is_gone():
                    return False
                if time.monotonic() > deadline:
                    raise TimeoutError
                continue
            got = os.readv(self._answers, (buffer,))
            if got == len(buffer):
                return True
            if not got:
                return False
            buffer, soon = buffer[got:], False

    def close(self) -> None:
        """Close both ends, which tells the worker to end."""
        os.close(self._orders)
        os.close(self._answers)


def read_all(fd: int, buffer: memoryview) -> bool:
    """Fill a buffer from a pipe, without a time limit; return False at the pipe's end."""
    while True:
        got = os.readv(fd, (buffer,))
        if got == len(buffer):
            return True
        if not got:
            return False
        buffer = buffer[got:]


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data`` to a pipe, without a time limit.

    Raises:
        BrokenPipeError: the other end is closed.
    """
    rest: bytes | memoryview = data
    while (sent := os.write(fd, rest)) < len(rest):
        rest = memoryview(rest)[sent:]
