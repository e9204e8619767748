"""Peers that do not behave, for tests of remote workers and their clients: raw ZMTP, and false workers."""

import socket
import struct
import threading
import time
from contextlib import suppress

import zmq

from rustsim_hpc.remote.addresses import parse_endpoint
from rustsim_hpc.remote.messages import MAGIC, REQUESTS, VERSION, Message, read_message

SESSION = "ab" * 16


class RawPeer:
    """A client that writes ZeroMQ's protocol (ZMTP 3.0, no security) byte by byte, and so can break it."""

    def __init__(self, endpoint, *, shake_hands=True):
        address = parse_endpoint(endpoint)
        self.socket = socket.create_connection((address.host, address.port), timeout=5)
        if shake_hands:
            self.socket.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
            ready = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
            self.socket.sendall(b"\x04" + bytes([len(ready)]) + ready)
            got = b""
            while len(got) < 64:
                got += self.socket.recv(4096)

    def frame(self, body, *, more=False, claim=None):
        """Send a frame; ``claim``: the length that it says it has."""
        size = len(body) if claim is None else claim
        self.socket.sendall(bytes([2 | more]) + struct.pack(">Q", size) + body)

    def message(self, frames):
        for place, body in enumerate(frames):
            self.frame(body, more=place < len(frames) - 1)

    def is_broken_off(self, seconds=10):
        """Whether the other side closes the connection within some seconds; what it says is skipped."""
        self.socket.settimeout(seconds)
        try:
            while self.socket.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def close(self):
        self.socket.close()


class TcpServer:
    """Something that listens and is no worker: ``speak`` gets each connection."""

    def __init__(self, speak, port=0):
        self.server = socket.create_server(("127.0.0.1", port))
        self.endpoint = f"tcp://127.0.0.1:{self.server.getsockname()[1]}"
        self._speak = speak
        self._open = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self._open.append(connection)
            with suppress(OSError):
                self._speak(connection)

    def close(self):
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)  # wakes the thread, which a mere close would not
        self._thread.join()
        self.server.close()
        for connection in self._open:
            connection.close()


class FalseWorker:
    """Something that speaks as a worker does; ``answer(request)`` gives the frames that it says, or None."""

    def __init__(self, answer):
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        port = self._router.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.requests = []
        self._answer = answer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._stop.is_set():
            if self._router.poll(50):
                route, *frames = self._router.recv_multipart()
                request = read_message(frames, REQUESTS)
                self.requests.append(request)
                if (said := self._answer(request)) is not None:
                    self._router.send_multipart([route, *said])

    def close(self):
        self._stop.set()
        self._thread.join()
        self._router.close()
        self._context.term()


def answer_to(request, kind, data=(), **fields):
    """Frames of an answer."""
    return [bytes(frame) for frame in Message(kind, request.session, request.number, fields, data).frames()]


OPENED = {
    "host": "", "cpu": "", "architecture": "", "cores": 1, "system": "", "libm": {}, "versions": {},
}  # fmt: skip


def header(text):
    return MAGIC + b"%d\n" % VERSION + text


def wait_for(true, seconds=20):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)
