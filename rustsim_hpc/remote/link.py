"""A client's conversation with one worker: numbered requests, deadlines, new connections, wrong answers.

A request that was not answered is sent again over a new connection. That is safe whatever happened to the
first one: the worker answers a request whose number it has seen with the stored answer, and drops older ones.
Several conversations run concurrently, see :func:`converse`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, TypeVar

from rustsim_hpc.errors import InvalidConfig
from rustsim_hpc.remote.addresses import Address
from rustsim_hpc.remote.keys import ClientKeys
from rustsim_hpc.remote.messages import (
    ANSWER_OF,
    ANSWERS,
    MAX_FRAME,
    MAX_MESSAGE,
    Frame,
    Malformed,
    Message,
    read_message,
)
from rustsim_hpc.remote.sockets import ClientSocket
from rustsim_hpc.texts import shown

T = TypeVar("T")
Talk = Generator[Message, Message, T]
"""A conversation: yields requests, is sent their answers, returns what came of it."""

_LOOK_SECONDS = 0.05
_START_IT = (
    "restart the worker there and continue (a job: with `resume`), or resume with another --executor or "
    "--endpoint. remote.rejoin_seconds is how long a run waits for a worker to be restarted. A worker that "
    "other runs use too may need a larger remote.answer_seconds"
)
_MOST_LATE = 100


@dataclass(frozen=True)
class Patience:
    """How long a client waits for a worker.

    Attributes:
        connect: seconds in which a connection must be established.
        answer: seconds in which a request must be answered; the first one includes compiling the kernels.
        retries: how often a request is sent again, over a new connection, before the worker counts as dead.
        rejoin: seconds in which a broken connection must be established again: a worker that has died may be
            restarted meanwhile.
    """

    connect: float = 10.0
    answer: float = 600.0
    retries: int = 1
    rejoin: float = 15.0

    def __post_init__(self) -> None:
        if not self.rejoin >= 0:
            raise InvalidConfig(f"rejoin must be a number of seconds from 0, got {self.rejoin!r}")
        for name in ("connect", "answer"):
            if not getattr(self, name) > 0:
                raise InvalidConfig(
                    f"{name} must be a number of seconds above 0, got {getattr(self, name)!r}"
                )
        if self.retries < 0:
            raise InvalidConfig(f"retries must be a whole number from 0, got {self.retries!r}")


class LinkError(Exception):
    """A worker cannot be used: it is unreachable, does not answer, or answers something invalid.

    ``hint`` says what to do, where that is known.
    """

    def __init__(self, text: str, *, hint: str | None = None) -> None:
        super().__init__(text)
        self.hint = hint


class Refused(LinkError):
    """A worker refuses a request; ``code`` is one of those in :mod:`rustsim_hpc.remote.messages`."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"refuses: {text}")
        self.code = code

    @property
    def lost_session(self) -> bool:
        """Whether the worker runs but does not know the session: it was restarted, or ended it."""
        return self.code == "unknown"


class Link:
    """A session with the worker at one address.

    Args:
        address: of the worker.
        keys: see :class:`~rustsim_hpc.remote.sockets.ClientSocket`.
        patience: how long to wait.

    Raises:
        RemoteError: see :class:`~rustsim_hpc.remote.sockets.ClientSocket`.
    """

    def __init__(self, address: Address, keys: ClientKeys | None, patience: Patience) -> None:
        self.address = address
        self._keys = keys
        self._patience = patience
        self._session = token_hex(16)
        self._number = 0
        self._stood = False
        self.socket = ClientSocket(address, keys)
        self._fresh(first=True)
        self._sent: Message | None = None
        self._tries = 0
        self._trouble = ""
        self._deadline = 0.0

    def _fresh(self, *, first: bool = False) -> None:
        if not first:
            self.socket.close()
            self.socket = ClientSocket(self.address, self._keys)
        self._open = False
        self._since = time.monotonic()

    def ask(self, kind: str, data: Sequence[Frame] = (), **fields: Any) -> Message:
        """Return the session's next request."""
        self._number += 1
        return Message(kind, self._session, self._number, fields, data)

    def send(self, request: Message) -> None:
        """Send a request; the session must not wait for the answer to another one."""
        self._sent, self._tries, self._trouble = request, 0, ""
        for event in self.socket.events():  # of the time when nothing was asked
            self._take(event)
        if not self._open:
            self._since = time.monotonic()
        self._post(request)

    def _post(self, request: Message) -> None:
        frames = request.frames()
        sizes = [memoryview(frame).nbytes for frame in frames]
        if sizes[0] > MAX_FRAME:
            raise LinkError("has more partitions than fit into a message: use fewer, or more workers")
        if sum(sizes) > MAX_MESSAGE:
            raise LinkError(f"cannot be sent {sum(sizes):,} bytes at once: {MAX_MESSAGE:,} are the most")
        self._deadline = time.monotonic() + self._patience.answer
        if not self.socket.send(frames):
            raise LinkError("takes no more requests")

    def take(self) -> Message | None:
        """Return the answer to the last request if it has arrived; late answers to others are dropped.

        Raises:
            LinkError: what has arrived is not a valid answer.
            Refused: the worker refuses the request.
        """
        sent = self._sent
        for _ in range(_MOST_LATE):
            if sent is None or (frames := self.socket.receive()) is None:
                return None
            try:
                answer = read_message(frames, ANSWERS)
            except Malformed as error:
                raise LinkError(f"answered with what is no answer: {error}") from error
            if answer.session != self._session or answer.number > sent.number:
                raise LinkError("answered a question that was not asked")
            if answer.number < sent.number:
                continue
            self._sent = None
            self._is_open()
            if answer.kind == "refused":
                raise Refused(answer.fields["code"], shown(answer.fields["text"]))
            if answer.kind != ANSWER_OF[sent.kind]:
                raise LinkError(f'answered "{sent.kind}" with "{answer.kind}"')
            return answer
        return None

    def look(self) -> None:
        """Check the state of the connection; send the request again over a new one where that may help.

        Raises:
            LinkError: the worker cannot be reached, rejects the connection, or has not answered in time.
        """
        now, sent = time.monotonic(), self._sent
        if sent is None:
            return
        for event in self.socket.events():
            self._take(event)
            if event == "shut":
                self._again(sent, "broke off the connection")
                return
        if not self._open:
            seconds = self._patience.rejoin if self._stood else self._patience.connect
            if now > self._since + seconds:
                trouble = f"{self._trouble}, and then " if self._trouble else ""
                raise LinkError(f"{trouble}could not be reached within {seconds:g} s", hint=_START_IT)
        elif now > self._deadline:
            self._again(sent, f"did not answer within {self._patience.answer:g} s (remote.answer_seconds)")

    def _take(self, event: str) -> None:
        if event == "open":
            self._is_open()
            return
        self._open = False
        if event == "refused":
            text = "cannot shake hands: it has other keys, does not know this client's, or is no worker"
            raise LinkError(text)

    def _is_open(self) -> None:
        if not self._open:
            self._deadline = time.monotonic() + self._patience.answer
        self._open = self._stood = True

    def _again(self, request: Message, trouble: str) -> None:
        """Send a request again over a new connection; raise LinkError if the retries are used up."""
        if self._tries >= self._patience.retries:
            raise LinkError(trouble, hint=_START_IT)
        self._tries += 1
        self._trouble = trouble
        self._fresh()
        self._post(request)

    def close(self, *, politely: bool = False) -> None:
        """End the session; ``politely`` tells the worker, which then frees what it holds for it."""
        if politely and self._open:
            self.socket.send(self.ask("close").frames())
        self._sent, self._open = None, False
        self.socket.close(send_rest=politely)


def converse(talks: Sequence[tuple[Link, Talk[T]]]) -> list[T | LinkError]:
    """Run several conversations concurrently, each over its own link; return the result of each."""
    results: list[Any] = [None] * len(talks)
    running: dict[int, tuple[Link, Talk[T]]] = {}

    def advance(place: int, link: Link, talk: Talk[T], answer: Message | None) -> None:
        try:
            request = next(talk) if answer is None else talk.send(answer)
            link.send(request)
        except StopIteration as stop:
            results[place] = stop.value
        except Malformed as error:
            results[place] = LinkError(f"answered what cannot be: {error}")
        except LinkError as error:
            results[place] = error
        else:
            running[place] = (link, talk)
            return
        running.pop(place, None)

    for place, (link, talk) in enumerate(talks):
        advance(place, link, talk, None)
    looked = time.monotonic()
    while running:
        sockets = [link.socket for link, _ in running.values()]
        ready = sockets[0].wait_with(sockets[1:], _LOOK_SECONDS)
        due = time.monotonic() > looked + _LOOK_SECONDS
        looked = time.monotonic() if due else looked
        for place, (link, talk) in list(running.items()):
            try:
                answer = link.take() if id(link.socket) in ready else None
                if answer is not None:
                    advance(place, link, talk, answer)
                elif due:
                    link.look()
            except LinkError as error:
                talk.close()
                running.pop(place, None)
                results[place] = error
    return results
