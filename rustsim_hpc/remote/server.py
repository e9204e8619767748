"""The loop of a worker: receive a request, check it, serve it, answer; drop invalid messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rustsim_hpc.errors import RustsimError, message_of
from rustsim_hpc.remote.held import HeldPartitions, Reply
from rustsim_hpc.remote.installed import InstalledModels, NotHere
from rustsim_hpc.remote.keys import WorkerKeys
from rustsim_hpc.remote.messages import (
    CHUNK_BYTES,
    REQUESTS,
    Frame,
    Malformed,
    Message,
    OtherVersion,
    clipped_failure_text,
    read_message,
)
from rustsim_hpc.remote.sockets import Peer, WorkerSocket
from rustsim_hpc.run_folder.environment import worker_facts
from rustsim_hpc.texts import shown

_TICK_SECONDS = 0.25
_PEERS_REPORTED = 1_000
_NOBODY = "0" * 32


@dataclass(frozen=True)
class WorkerLimits:
    """Limits on what a worker provides.

    Attributes:
        memory: bytes of columns and reductions, all sessions together.
        sessions: how many sessions.
        idle_seconds: after which a session without requests is ended.
        threads: that run a session's partitions.
    """

    memory: int
    sessions: int = 64
    idle_seconds: float = 3600.0
    threads: int = 1


@dataclass
class _Session:
    """A session of a client: its owner, what it holds, and its last answer, in case it is requested again.

    Storage is bounded: one answer a session, and as many sessions and bytes as the limits allow.
    """

    peer: Peer
    held: HeldPartitions
    number: int
    answer: list[Frame]
    used: float


class WorkerServer:
    """Serves clients until it is told to stop.

    Args:
        endpoint: where to listen; see :class:`~rustsim_hpc.remote.sockets.WorkerSocket`.
        keys: its keys, or None on the loopback.
        models: what it can run.
        limits: on what it provides.
        tell: called with a line where there is something to tell.

    Raises:
        RemoteError: it cannot listen there.
    """

    def __init__(
        self,
        endpoint: str,
        keys: WorkerKeys | None,
        models: InstalledModels,
        limits: WorkerLimits,
        tell: Callable[[str], None],
    ) -> None:
        self._models = models
        self._limits = limits
        self._tell = tell
        self._reported: set[str] = set()
        self._sessions: dict[str, _Session] = {}
        self._served = 0
        self._socket = WorkerSocket(endpoint, keys, self._tell_once)
        self.endpoint = self._socket.endpoint

    def serve(self, stop: Callable[[], bool], *, once: bool = False) -> None:
        """Serve until ``stop()`` is true; with ``once`` until the first clients have ended their sessions."""
        while not stop():
            if self._socket.wait(_TICK_SECONDS):
                while (received := self._socket.receive()) is not None:
                    self._serve(*received)
                    if stop():
                        return
            self._end_idle()
            if once and self._served and not self._sessions:
                return

    def close(self) -> None:
        """Stop listening and release everything."""
        for session in self._sessions.values():
            session.held.close()
        self._sessions.clear()
        self._socket.close()

    # -- one request ---------------------------------------------------------------------------------

    def _serve(self, route: bytes, peer: Peer, frames: Sequence[Frame]) -> None:
        try:
            request = read_message(frames, REQUESTS)
        except OtherVersion as error:
            self._tell_once(str(peer), f"refused {peer}: {error}")
            self._socket.send(route, _refusal(_NOBODY, 0, "version", str(error)).frames())
            return
        except Malformed as error:
            self._tell_once(str(peer), f"dropped a message from {peer}: {error}")
            return
        known = self._sessions.get(request.session)
        if known is not None and known.peer.owner != peer.owner:
            self._tell_once(str(peer), f"dropped a message from {peer}: it names a session of {known.peer}")
        elif known is not None and request.number < known.number:
            self._tell_once(str(peer), f"dropped a message from {peer}: an old one again")
        elif known is not None and request.number == known.number:
            self._socket.send(route, known.answer)
        else:
            self._answer(route, peer, request, known)

    def _answer(self, route: bytes, peer: Peer, request: Message, known: _Session | None) -> None:
        try:
            kind, fields, data = self._do(peer, request, known)
            answer = Message(kind, request.session, request.number, fields, data)
        except Malformed as error:
            self._tell_once(str(peer), f"dropped a message from {peer}: {error}")
            return
        except NotHere as error:
            answer = _refusal(request.session, request.number, error.code, str(error))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (a model is somebody else's code)
            kind = "" if isinstance(error, RustsimError) else f"{type(error).__name__}: "
            answer = _refusal(request.session, request.number, "model", f"{kind}{message_of(error)}")
        frames = answer.frames()
        session = self._sessions.get(request.session)
        if session is not None:
            session.number, session.answer, session.used = request.number, frames, time.monotonic()
        self._socket.send(route, frames)

    def _do(self, peer: Peer, request: Message, known: _Session | None) -> Reply:
        fields, data = request.fields, request.data
        if request.kind == "open":
            return self._open(peer, request, known)
        if known is None:
            raise NotHere("unknown", "the session is not known here: the worker was restarted, or ended it")
        if request.kind == "close":
            self._sessions.pop(request.session).held.close()
            return "closed", {}, []
        held = known.held
        serve: Mapping[str, Callable[[Mapping[str, Any], Sequence[Frame]], Reply]] = {
            "load": held.load,
            "begin": held.begin,
            "run": held.run,
            "fetch": held.fetch,
            "hash": held.hash,
        }
        return serve[request.kind](fields, data)

    def _open(self, peer: Peer, request: Message, known: _Session | None) -> Reply:
        if known is not None:
            raise NotHere("state", "the session is open")
        if len(self._sessions) >= self._limits.sessions:
            raise NotHere("limits", f"{len(self._sessions)} sessions are open here, and no more are allowed")
        used = sum(session.held.nbytes + CHUNK_BYTES for session in self._sessions.values())
        work = self._models.work_for(request.fields, self._limits.memory - used - CHUNK_BYTES)
        held = HeldPartitions(work, self._limits.threads)
        self._sessions[request.session] = _Session(peer, held, request.number, [], time.monotonic())
        self._served += 1
        return "opened", worker_facts(), []

    # -- what must not grow --------------------------------------------------------------------------

    def _end_idle(self) -> None:
        oldest = time.monotonic() - self._limits.idle_seconds
        for name, session in list(self._sessions.items()):
            if session.used < oldest:
                self._tell(f"ended a session of {session.peer} that asked nothing for a long time")
                self._sessions.pop(name).held.close()

    def _tell_once(self, peer: str, line: str) -> None:
        """Report a peer's mistake, only its first one and only for a limited number of peers."""
        if peer not in self._reported and len(self._reported) < _PEERS_REPORTED:
            self._reported.add(peer)
            self._tell(shown(line))


def _refusal(session: str, number: int, code: str, text: str) -> Message:
    return Message("refused", session, number, {"code": code, "text": clipped_failure_text(text)})
