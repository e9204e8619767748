"""Messages between a control plane and its remote workers: one strict header, raw frames behind it.

The first frame is ``rustsim-hpc remote VERSION`` and, on the next line, a JSON object whose fields are
declared here, by kind; any other field makes the whole message invalid. Columns, values of reductions and
what a worker reports follow as raw little-endian bytes, one frame each. Messages contain no code and no
pickles. docs/remote.md shows the same as tables.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rustsim_hpc.state.schema import DTYPES

VERSION = 2
MAGIC = b"rustsim-hpc remote "
MAX_FRAME = 1 << 20
"""Bytes of a frame at most: a header (a partition takes about fifty in the longest one), or part of an array.
It is all that a peer can make the other side keep before it has proved who it is."""
CHUNK_BYTES = 8 << 20
"""Bytes of a column that go in one message, at most."""
MAX_MESSAGE = 64 << 20
"""Bytes of a message at most: results of reductions and derived values go in one."""

Array = np.ndarray[Any, Any]
Frame = bytes | bytearray | memoryview
Check = Callable[[Any], bool]

_MAX_U64 = 2**64 - 1
_MAX_ROWS = 2**62
_FAILURE_TEXT = 4_000
_FAILURE_TRACE = 20_000
_FAILURES_BYTES = 512 << 10


class Malformed(Exception):
    """A message that does not follow the protocol; its text says why."""


class OtherVersion(Malformed):
    """A message of another version of this protocol."""


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        kind: which fields it has; see ``REQUESTS`` and ``ANSWERS``.
        session: 32 hexadecimal digits that name a client's conversation with a worker.
        number: of the request in its session; an answer has its request's.
        fields: as declared for the kind.
        data: arrays as raw bytes; for a received message its frames, for :func:`arrays_of`.
    """

    kind: str
    session: str
    number: int
    fields: Mapping[str, Any]
    data: Sequence[Frame] = ()

    def frames(self) -> list[Frame]:
        """Return the message as frames."""
        header = {"kind": self.kind, "session": self.session, "number": self.number, **self.fields}
        text = json.dumps(header, separators=(",", ":"), allow_nan=False)
        frames: list[Frame] = [b"%s%d\n%s" % (MAGIC, VERSION, text.encode())]
        for array in self.data:
            whole = memoryview(array)
            frames += [
                whole[start : start + MAX_FRAME] for start in range(0, max(whole.nbytes, 1), MAX_FRAME)
            ]
        return frames


# -- what fields may hold ----------------------------------------------------------------------------


def _whole(low: int, high: int) -> Check:
    # `type` and not isinstance: JSON's true is an int in Python.
    return lambda value: type(value) is int and low <= value <= high


def _text(most: int) -> Check:
    return lambda value: isinstance(value, str) and len(value) <= most


def _hex(digits: int) -> Check:
    def check(value: Any) -> bool:
        return isinstance(value, str) and len(value) == digits and set(value) <= set("0123456789abcdef")

    return check


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _one_of(*values: str) -> Check:
    return lambda value: isinstance(value, str) and value in values


def _list(check: Check, most: int = 1 << 20) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def _row(*checks: Check) -> Check:
    def check(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == len(checks)
            and all(one(part) for one, part in zip(checks, value, strict=True))
        )

    return check


def _flag(value: Any) -> bool:
    return value is True or value is False


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= 100 and all(map(_text(1_000), value.values()))


def _params(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= 10_000 and all(map(_param, value.values()))


def _param(value: Any) -> bool:
    if isinstance(value, list):  # ["float", "0x1.8p+1"]: JSON's numbers know no infinity
        return len(value) == 2 and value[0] == "float" and _is_hex_float(value[1])
    return isinstance(value, bool) or _text(1 << 16)(value) or _whole(-(2**64), 2**64)(value)


def _is_hex_float(text: Any) -> bool:
    try:
        float.fromhex(text)
    except (ValueError, TypeError, OverflowError):
        return False
    return len(text) < 64


_COUNT = _whole(0, _MAX_ROWS)
_U64 = _whole(0, _MAX_U64)
_NAME = _text(1_000)
_SIDE = _whole(0, 1)
_DTYPE = _one_of(*DTYPES)
_FAILURE = _row(
    _COUNT,  # place of the partition among the session's
    _maybe(_whole(0, 1 << 20)),  # phase
    _one_of("phase", "worker"),
    _text(_FAILURE_TEXT),
    _text(_FAILURE_TRACE),
    _text(255),  # host
    _COUNT,  # process id
    _maybe(_row(_NAME, _maybe(_NAME), _maybe(_NAME), _maybe(_text(4_000)), _maybe(_COUNT))),
)

REQUESTS: dict[str, dict[str, Check]] = {
    "open": {
        "package": _text(100),
        "model": _hex(64),
        "identity": _hex(64),
        "phases": _list(_NAME, 10_000),
        "observers": _flag,
        "columns": _list(_row(_NAME, _DTYPE), 10_000),
        "params": _params,
        "seed": _whole(-(2**64), 2**64),
        "first_row": _COUNT,
        "rows": _COUNT,
        "total_rows": _COUNT,
        "ids": _flag,
        "two_sided": _flag,
        "checked": _flag,
        "tile_rows": _whole(0, 1 << 30),
        "endpoint": _NAME,
        "tasks": _list(_row(_whole(0, 2**32 - 1), _maybe(_NAME), _COUNT, _COUNT)),
    },
    "load": {"column": _whole(-1, 10_000), "start": _COUNT, "stop": _COUNT},
    "begin": {"step": _U64},
    "run": {
        "step": _U64,
        "segment": _whole(-1, 10_000),
        "attempt": _COUNT,
        "side": _SIDE,
        "repeat": _whole(1, 2**32 - 1),
        "want_digest": _flag,
        "afresh": _flag,
        "values": _list(_row(_NAME, _DTYPE, _list(_COUNT, 8)), 10_000),
    },
    "fetch": {
        "step": _U64,
        "side": _SIDE,
        "column": _whole(0, 10_000),
        "start": _COUNT,
        "stop": _COUNT,
    },
    "hash": {"step": _U64, "side": _SIDE, "column": _whole(0, 10_000), "other": _flag, "state": _U64},
    "close": {},
}
"""Fields of every request, by kind."""

ANSWERS: dict[str, dict[str, Check]] = {
    "opened": {
        "host": _text(255),
        "cpu": _text(1_000),
        "architecture": _text(100),
        "cores": _COUNT,
        "system": _text(1_000),
        "libm": _texts,
        "versions": _texts,
    },
    "loaded": {},
    "begun": {},
    "ran": {"failures": _list(_FAILURE), "compile_ns": _COUNT},
    "fetched": {"digest": _U64},
    "hashed": {"state": _U64},
    "closed": {},
    "refused": {
        "code": _one_of("model", "unknown", "state", "limits", "version"),
        "text": _text(_FAILURE_TEXT),
    },
}
"""Fields of every answer, by kind; "refused" may answer any request, where it is from a client let in."""

ANSWER_OF = {
    "open": "opened", "load": "loaded", "begin": "begun", "run": "ran",
    "fetch": "fetched", "hash": "hashed", "close": "closed",
}  # fmt: skip


BARE = frozenset(
    {"open", "begin", "fetch", "hash", "close", "opened", "loaded", "hashed", "closed", "refused"}
)
"""Kinds of messages that carry no arrays."""


def read_message(frames: Sequence[Frame], kinds: Mapping[str, Mapping[str, Check]]) -> Message:
    """Return the message in some frames.

    Args:
        frames: as received.
        kinds: ``REQUESTS`` or ``ANSWERS``.

    Raises:
        OtherVersion: of another version.
        Malformed: anything else that is wrong with them.
    """
    header = _header(frames)
    kind = header.pop("kind", None)
    session, number = header.pop("session", None), header.pop("number", None)
    wanted = kinds.get(kind) if isinstance(kind, str) else None
    if wanted is None or kind is None:
        raise Malformed(f"kind {str(kind)[:40]!r} is unknown")
    if not _hex(32)(session) or not _whole(0, 2**53)(number):
        raise Malformed("no session or number")
    if header.keys() != wanted.keys():
        odd = sorted(header.keys() ^ wanted.keys())
        raise Malformed(f"a message {kind} with or without {', '.join(odd)[:100]}")
    for name, check in wanted.items():
        if not check(header[name]):
            raise Malformed(f"{name} of a message {kind} is wrong")
    if kind in BARE and len(frames) > 1:
        raise Malformed(f"a message {kind} with arrays")
    return Message(kind, session, number, header, tuple(frames[1:]))


def _header(frames: Sequence[Frame]) -> dict[str, Any]:
    head = bytes(frames[0]) if frames else b""
    if not head.startswith(MAGIC):
        raise Malformed("not a message of rustsim-hpc")
    version, _, text = head[len(MAGIC) :].partition(b"\n")
    if version != b"%d" % VERSION:
        raise OtherVersion(
            f"version {version[:20].decode('ascii', 'replace')} of the messages, not {VERSION}"
        )
    try:
        header = json.loads(
            text, parse_float=_refuse, parse_constant=_refuse, object_pairs_hook=_without_repeats
        )
    except (ValueError, RecursionError) as error:
        raise Malformed(f"a header that cannot be read: {str(error)[:100]}") from error
    if not isinstance(header, dict):
        raise Malformed("a header that is not an object")
    return header


def _refuse(text: str) -> Any:
    raise ValueError(f"{text[:20]} is no value of a header")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a field stands twice")
    return made


# -- raw frames --------------------------------------------------------------------------------------


def packed(array: Array) -> bytes:
    """Return an array's bytes, little-endian, in C order."""
    return (array if sys.byteorder == "little" else array.byteswap()).tobytes()


def arrays_of(frames: Sequence[Frame], wanted: Sequence[tuple[Any, Sequence[int]]]) -> list[Array]:
    """Return the frames of a message as read-only arrays; those of one frame are not copied.

    Args:
        frames: as received, the header left out.
        wanted: dtype and shape of each array.

    Raises:
        Malformed: there are more or fewer bytes, or they are cut into other frames.
    """
    arrays, place = [], 0
    for dtype, shape in wanted:
        # Python's integers: a product that overflows must not look like a small one.
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        count = max(1, -(-nbytes // MAX_FRAME))
        pieces = [memoryview(frame) for frame in frames[place : place + count]]
        place += count
        have = sum(piece.nbytes for piece in pieces)
        if have != nbytes or any(piece.nbytes != MAX_FRAME for piece in pieces[:-1]) or not pieces:
            raise Malformed(f"{have} bytes where {list(shape)} values of {np.dtype(dtype)} take {nbytes}")
        arrays.append(_array(pieces, np.dtype(dtype), shape))
    if place != len(frames):
        raise Malformed(f"{len(frames)} frames of arrays where there should be {place}")
    return arrays


def _array(pieces: Sequence[memoryview], dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
    if not math.prod(shape):
        return _empty(dtype, shape)
    raw = np.concatenate([np.frombuffer(one, np.uint8) for one in pieces]) if len(pieces) > 1 else pieces[0]
    array = np.frombuffer(raw, dtype.newbyteorder("<")).reshape(shape).astype(dtype, copy=False)
    if dtype.kind == "b" and array.view(np.uint8).max() > 1:
        raise Malformed("a truth value that is neither 0 nor 1")
    array.flags.writeable = False
    return array


def _empty(dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
    try:
        return np.empty(shape, dtype)
    except (ValueError, OverflowError) as error:
        raise Malformed(f"an array of shape {str(list(shape))[:100]}") from error


def chunks(rows: int, itemsize: int) -> list[tuple[int, int]]:
    """Return the ranges of rows in which a column travels."""
    step = max(1, CHUNK_BYTES // itemsize)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def clipped_failure_text(text: str) -> str:
    """Return an error's text as it may travel."""
    return text[:_FAILURE_TEXT]


def clipped_trace(text: str) -> str:
    """Return a traceback as it may travel: its end, which says most."""
    return text[-_FAILURE_TRACE:]


def clipped_failures(failures: Iterable[list[Any]]) -> list[list[Any]]:
    """Return the first failures, as many as fit into a header; at least the first one."""
    room, kept = _FAILURES_BYTES, list[list[Any]]()
    for failure in failures:
        room -= len(json.dumps(failure))
        if kept and room < 0:
            break
        kept.append(failure)
    return kept


def packed_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain parameter values as they travel, with every bit of a float."""
    return {k: ["float", v.hex()] if isinstance(v, float) else v for k, v in params.items()}


def unpacked_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what :func:`packed_params` was given."""
    return {k: float.fromhex(v[1]) if isinstance(v, list) else v for k, v in params.items()}
