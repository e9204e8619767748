"""The only door to pyzmq: sockets of clients and workers, encrypted where there are keys, and who may enter.

CURVE, ZeroMQ's own security layer, gives every connection keys of its own, encrypts it, and proves both sides
to each other by their long-term keys; libzmq and libsodium come with pyzmq's wheel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rustsim_hpc.errors import RemoteError, message_of
from rustsim_hpc.remote.addresses import Address, parse_endpoint
from rustsim_hpc.remote.keys import ClientKeys, WorkerKeys
from rustsim_hpc.remote.messages import MAX_FRAME, Frame
from rustsim_hpc.remote.watch import Watch

if TYPE_CHECKING:
    import zmq

_HEARTBEAT_MS = 5_000
_HEARTBEAT_TIMEOUT_MS = 30_000
_HANDSHAKE_MS = 10_000
_QUEUE = 4
"""Messages that wait on either side: a client has one request under way, and one that ends its session."""
_SEND_MS = 100
"""For a queue that seems full: libzmq hears with some delay of what has left it."""
_LINGER_MS = 200
_DOMAIN = b"rustsim-hpc"
_KNOWN = 1_000


@functools.cache
def library() -> Any:
    """Return the module zmq.

    Raises:
        RemoteError: it is not installed, or was built without CURVE.
    """
    try:
        import zmq
        import zmq.auth.thread
        import zmq.utils.monitor
    except ImportError as error:
        hint = "pip install 'rustsim-hpc[remote]'"
        raise RemoteError(
            "remote workers need the package pyzmq, which is not installed", hint=hint
        ) from error
    if not zmq.has("curve"):
        hint = "pip install --force-reinstall pyzmq takes the wheel, which has it"
        raise RemoteError("the installed pyzmq has no CURVE, so it cannot encrypt", hint=hint)
    return zmq


def new_key_pair() -> tuple[str, str]:
    """Return a new public and secret key, 40 characters each."""
    public, secret = library().curve_keypair()
    return public.decode(), secret.decode()


@functools.cache
def _context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return the context that all clients of this process share, with one I/O thread."""
    context: zmq.Context[zmq.Socket[bytes]] = library().Context()
    return context


def _prepare(socket: zmq.Socket[bytes]) -> None:
    """Set the options that both sides share; call this before the socket is connected or bound."""
    zmq = library()
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)  # of one frame
    socket.setsockopt(zmq.RCVHWM, _QUEUE)
    socket.setsockopt(zmq.SNDHWM, _QUEUE)
    socket.setsockopt(zmq.SNDTIMEO, _SEND_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)


class ClientSocket:
    """One connection of a client to a worker.

    Args:
        address: of the worker.
        keys: None for a connection that is neither encrypted nor authenticated.

    Raises:
        RemoteError: there are no keys, and the worker is on another machine.
    """

    def __init__(self, address: Address, keys: ClientKeys | None) -> None:
        if keys is None and not address.loopback:
            hint = "rustsim-hpc worker --make-keys DIR makes keys"
            raise RemoteError(f"{address.endpoint} may not be on this machine: keys are required", hint=hint)
        zmq = library()
        self._socket = _context().socket(zmq.DEALER)
        _prepare(self._socket)
        self._socket.setsockopt(zmq.IPV6, int(":" in address.host))
        if keys is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.worker.encode())
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_DISCONNECTED
        )
        self._monitor.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address.endpoint)

    def send(self, frames: Sequence[Frame]) -> bool:
        """Queue a message, which is sent once connected; return whether there was room for it."""
        zmq = library()
        try:
            self._socket.send_multipart(frames)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[Frame] | None:
        """Return the next message that has arrived, if there is one."""
        zmq = library()
        try:
            return list(self._socket.recv_multipart(zmq.DONTWAIT))
        except zmq.Again:
            return None

    def events(self) -> list[str]:
        """Return the events of the connection since the last call: open, shut, refused."""
        zmq = library()
        words = {zmq.EVENT_HANDSHAKE_SUCCEEDED: "open", zmq.EVENT_DISCONNECTED: "shut"}
        found = []
        while self._monitor.poll(0):
            event = zmq.utils.monitor.recv_monitor_message(self._monitor)["event"]
            found.append(words.get(event, "refused"))
        return found

    def close(self, *, send_rest: bool = False) -> None:
        """Close the connection; what is queued goes out in the background for a moment, or is dropped."""
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(_LINGER_MS if send_rest else 0)

    def wait_with(self, others: Sequence[ClientSocket], seconds: float) -> set[int]:
        """Wait until this socket or one of others has a message; return which have, by their ``id``."""
        zmq = library()
        poller = zmq.Poller()
        by_socket = {one._socket: id(one) for one in (self, *others)}  # noqa: SLF001
        for socket in by_socket:
            poller.register(socket, zmq.POLLIN)
        return {by_socket[socket] for socket, _ in poller.poll(1000 * seconds)}


@dataclass(frozen=True)
class Peer:
    """Who a message is from.

    Attributes:
        key: public key of a client that was let in; "" on a connection without keys.
        address: of its machine.
    """

    key: str
    address: str

    @property
    def owner(self) -> str:
        """The owner of its sessions: a client with a key may come from several addresses."""
        return self.key or self.address

    def __str__(self) -> str:
        address = self.address or "a peer that gives no address"
        return f"{address} with the key {self.key}" if self.key else address


class WorkerSocket:
    """Where a worker listens.

    Args:
        endpoint: ``tcp://HOST:PORT``; ``*`` for any free port.
        keys: None to let in everybody who can reach it, which is allowed on the loopback alone.
        tell: called with the peer and a line for each peer that is rejected or sends without end; the callee
            has to limit it to once a peer. It may be called from other threads.

    Attributes:
        endpoint: with the port that was taken.

    Raises:
        RemoteError: it cannot listen there.
    """

    def __init__(self, endpoint: str, keys: WorkerKeys | None, tell: Callable[[str, str], None]) -> None:
        address = parse_endpoint(endpoint, to_bind=True)
        if keys is None and not address.loopback:
            hint = "rustsim-hpc worker --make-keys DIR makes keys; --keys DIR uses them"
            raise RemoteError(f"{endpoint} can be reached from other machines: keys are required", hint=hint)
        zmq = library()
        self._context = zmq.Context()
        self._gate = None if keys is None else _gate(self._context, keys, tell)
        self._watch: Watch | None = None
        self._socket = self._context.socket(zmq.ROUTER)
        _prepare(self._socket)
        self._socket.setsockopt(zmq.IPV6, int(":" in address.host))
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # without it an answer to a full queue is dropped
        if keys is not None:
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
            self._socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
            # Without a running authenticator nobody is let in.
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )
        try:
            self._socket.bind(address.endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise RemoteError(f"cannot listen at {endpoint}: {message_of(error)}") from error
        self.endpoint = str(self._socket.getsockopt(zmq.LAST_ENDPOINT).decode().rstrip("\0"))
        self._watch = Watch(int(self.endpoint.rpartition(":")[2]), self._strangers, tell)

    def wait(self, seconds: float) -> bool:
        """Wait for a message; return whether there is one."""
        return bool(self._socket.poll(1000 * seconds))

    def receive(self) -> tuple[bytes, Peer, list[Frame]] | None:
        """Return the next message that has arrived, if any: where an answer goes, who it is from, frames."""
        zmq = library()
        try:
            route, *frames = self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return None
        if self._watch is not None:
            with suppress(zmq.ZMQError):  # who speaks ZeroMQ's oldest protocol has no descriptor here
                self._watch.taken(int(route.get(zmq.SRCFD)))
        return bytes(route.buffer), _peer(route), [frame.buffer for frame in frames]

    def send(self, route: bytes, frames: Sequence[Frame]) -> None:
        """Send an answer; it is dropped if its client is gone or receives too slowly."""
        zmq = library()
        try:
            self._socket.send_multipart([route, *frames], copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise

    def _strangers(self, seconds: float) -> int:
        """Wait, and return how many peers have failed to speak ZeroMQ; the watch's thread alone calls it."""
        zmq = library()
        count = 0
        while self._monitor.poll(0 if count else 1000 * seconds) and count < _KNOWN:
            zmq.utils.monitor.recv_monitor_message(self._monitor)
            count += 1
        return count

    def close(self) -> None:
        """Stop listening."""
        if not self._socket.closed:
            if self._watch is not None:
                self._watch.stop()
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(_LINGER_MS)
            if self._gate is not None:
                self._gate.stop()
            self._context.term()


def _peer(route: Any) -> Peer:
    return Peer(_property(route, "User-Id"), _property(route, "Peer-Address"))


def _property(frame: Any, name: str) -> str:
    try:
        return str(frame.get(name))
    except library().ZMQError:
        return ""


def _gate(context: Any, keys: WorkerKeys, tell: Callable[[str, str], None]) -> Any:
    """Return a started authenticator that lets in those whose keys are allowed."""
    zmq = library()
    gate = zmq.auth.thread.ThreadAuthenticator(context)
    gate.configure_curve_callback(_DOMAIN.decode(), _Allowed(keys.allowed, tell))
    gate.start()
    return gate


class _Allowed:
    """Says which keys are let in, and reports the others."""

    def __init__(self, keys: frozenset[str], tell: Callable[[str, str], None]) -> None:
        self._keys = keys
        self._tell = tell

    def callback(self, _domain: str, key: bytes) -> bool:
        """Answer the authenticator; ``key`` is public, 40 characters."""
        text = key.decode("ascii", "replace")
        if text in self._keys:
            return True
        self._tell(text, f"a client with the key {text} is not let in")
        return False
