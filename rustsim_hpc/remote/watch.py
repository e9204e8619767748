"""A thread beside a worker's loop that watches for endless messages and for peers with another protocol.

libzmq limits the length of a frame and the number of queued messages, but not the frames of one message,
which it collects before the worker sees any; and the worker may be busy with a step meanwhile. So this thread
asks the kernel how much each connection has sent since its last message was taken, and closes those that have
sent more than the longest message.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from rustsim_hpc.remote.messages import MAX_MESSAGE

MOST_UNREAD = 2 * MAX_MESSAGE
"""Bytes that one connection may have sent since its last message was taken."""
MOST_UNREAD_IN_ALL = 1 << 30
"""The same of all connections together."""

_LOOK_SECONDS = 0.1
_TCP_INFO_BYTES = 136
_BYTES_RECEIVED = 128
_Peer = tuple[str, int]


class Watch:
    """Watches the connections to a port of this process until it is stopped.

    Args:
        port: where the worker listens.
        strangers: waits for so many seconds, and returns how many peers have failed to shake hands meanwhile.
        tell: called with a peer and a line where there is something to tell, from the watch's own thread.
    """

    def __init__(
        self, port: int, strangers: Callable[[float], int], tell: Callable[[str, str], None]
    ) -> None:
        self._port = port
        self._strangers = strangers
        self._tell = tell
        self._taken: dict[_Peer, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rustsim-worker-watch", daemon=True)
        self._thread.start()

    def taken(self, descriptor: int) -> None:
        """Note that a whole message of a connection has been taken: nothing of it is unread."""
        with suppress(OSError), _socket_of(descriptor) as connection, self._lock:
            self._taken[connection.getpeername()[:2]] = _bytes_received(connection)

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._strangers(_LOOK_SECONDS):
                self._tell("a stranger", "dropped a connection that does not speak ZeroMQ as it should")
            self._break_off()

    def _break_off(self) -> None:
        """Close connections that have sent too much, the worst first."""
        unread: dict[_Peer, int] = {}
        with self._lock:
            for peer, connection in self._connections():
                with suppress(OSError):
                    unread[peer] = _bytes_received(connection) - self._taken.get(peer, 0)
            self._taken = {peer: count for peer, count in self._taken.items() if peer in unread}
        total = sum(unread.values())
        for peer, count in sorted(unread.items(), key=lambda pair: -pair[1]):
            if count <= MOST_UNREAD and total <= MOST_UNREAD_IN_ALL:
                return
            total -= count
            text = f"broke off a connection from {peer[0]}: a message of more than {count:,} bytes"
            self._tell(f"{peer[0]} without end", text)
            for other, connection in self._connections():
                if other == peer:
                    with suppress(OSError):
                        # libzmq finds the end of it and closes it, at once and with a reset.
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        connection.shutdown(socket.SHUT_RDWR)

    def _connections(self) -> Iterator[tuple[_Peer, socket.socket]]:
        """Yield every connection to the port; libzmq has them, and may close them any time."""
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(OSError), _socket_of(int(entry.name)) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    peer = connection.getpeername()[:2]
                    if connection.getsockname()[1] == self._port:
                        yield peer, connection


def _socket_of(descriptor: int) -> socket.socket:
    """Return a new socket object for a descriptor."""
    own = os.dup(descriptor)
    try:
        return socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise


def _bytes_received(connection: socket.socket) -> int:
    """Return the bytes that a connection has got so far (``tcpi_bytes_received`` of Linux's ``tcp_info``)."""
    told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(told) < _TCP_INFO_BYTES:  # a kernel older than 4.1
        return 0
    return int(struct.unpack_from("=Q", told, _BYTES_RECEIVED)[0])
