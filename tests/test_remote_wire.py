"""Messages of remote workers: what is read and refused, and a live worker among peers that break rules."""

import json
import math
import os
import random
import struct
from contextlib import suppress

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("zmq", reason="needs pyzmq: pip install 'rustsim-hpc[remote]'")

from executor_suite import Driven, ExecutorSuite
from remote_peers import SESSION, RawPeer, header, wait_for
from remote_workers import WorkerProcess
from test_endpoint import SUITE_MODEL, At

from rustsim_hpc import errors
from rustsim_hpc.remote.executor import RemotePartitionExecutor
from rustsim_hpc.remote.messages import (
    ANSWERS,
    CHUNK_BYTES,
    MAX_FRAME,
    REQUESTS,
    Malformed,
    Message,
    OtherVersion,
    arrays_of,
    chunks,
    clipped_failures,
    packed,
    packed_params,
    read_message,
    unpacked_params,
)
from rustsim_hpc.remote.watch import MOST_UNREAD

FETCH = {"step": 3, "side": 0, "column": 1, "start": 0, "stop": 9}
RUN = {
    "step": 0, "segment": 0, "attempt": 1, "side": 1, "repeat": 1, "want_digest": True, "afresh": False,
    "values": [["crowd", "int64", [4]]],
}  # fmt: skip


def frames_of(kind, data=(), **fields):
    return [bytes(frame) for frame in Message(kind, SESSION, 1, fields, data).frames()]


# -- reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, MAX_FRAME // 8, MAX_FRAME // 8 + 1, CHUNK_BYTES // 8])
def test_what_is_sent_is_read(size):
    array = np.random.default_rng(1).integers(0, 2**63, size).astype(np.uint64)
    flags = np.arange(5) % 2 == 0
    frames = frames_of("run", [packed(array), packed(flags)], **RUN)
    assert len(frames) == 2 + max(1, math.ceil(array.nbytes / MAX_FRAME))
    assert max(map(len, frames)) <= MAX_FRAME
    message = read_message(frames, REQUESTS)
    assert (message.kind, message.session, message.number, dict(message.fields)) == ("run", SESSION, 1, RUN)
    read, read_flags = arrays_of(message.data, [(np.uint64, (size,)), (np.bool_, (5,))])
    assert (read == array).all()
    assert (read_flags == flags).all()
    assert size == 0 or not read.flags.writeable


def test_parameters_keep_every_bit():
    params = {"a": 0.1, "b": -0.0, "c": math.inf, "d": 2**63, "e": True, "f": "text", "g": 5e-324}
    back = unpacked_params(json.loads(json.dumps(packed_params(params))))
    assert [struct.pack("d", v) if isinstance(v, float) else v for v in back.values()] == [
        struct.pack("d", v) if isinstance(v, float) else v for v in params.values()
    ]


@pytest.mark.parametrize(
    ("frames", "wanted", "text"),
    [
        ([b"1234567"], [(np.float64, (1,))], "7 bytes where"),
        ([b"12345678", b""], [(np.float64, (1,))], "2 frames of arrays where there should be 1"),
        ([], [(np.float64, (1,))], "0 bytes where"),
        ([b"\2"], [(np.bool_, (1,))], "a truth value"),
        ([b""], [(np.int8, (2**62, 2**62))], "0 bytes where"),
        ([b""], [(np.int8, (0, 2**62, 2**62))], "an array of shape"),
        ([b"\0" * 8], [(np.int8, (2**61 + 1, 8))], "8 bytes where"),
        ([bytes(MAX_FRAME - 1), bytes(2)], [(np.int8, (MAX_FRAME + 1,))], "bytes where"),
    ],
)
def test_arrays_that_are_not_what_was_announced(frames, wanted, text):
    with pytest.raises(Malformed, match=text):
        arrays_of(frames, wanted)


def test_arrays_that_no_message_of_its_kind_has():
    with pytest.raises(Malformed, match="a message fetch with arrays"):
        read_message(frames_of("fetch", [b"12345678"], **FETCH), REQUESTS)
    with pytest.raises(Malformed, match="a message hashed with arrays"):
        read_message(frames_of("hashed", [b""], state=1), ANSWERS)


BAD_HEADERS = [
    b"",
    b"GET / HTTP/1.1\r\n",
    header(b""),
    header(b"{"),
    header(b"[]"),
    header(b"[" * 100_000),
    header(b'{"a":' * 50_000),
    header(b'{"kind":"fetch"}'),
    header(b'{"kind":"fetch","kind":"fetch"}'),
    header(b'{"kind":["fetch"]}'),
    header(b'{"number":' + b"9" * 10_000 + b"}"),
    header(b'{"kind":"\\ud800\\u001b[2J","session":"","number":1}'),
    header(b'{"kind":"close","session":"' + SESSION.encode() + b'","number":1.0}'),
    header(b'{"kind":"close","session":"' + SESSION.encode() + b'","number":true}'),
    header(b'{"kind":"close","session":"' + SESSION.encode() + b'","number":NaN}'),
    header(b'{"kind":"close","session":"' + SESSION.encode() + b'","number":1,"more":1}'),
    header(b'{"kind":"close","session":"' + b"A" * 32 + b'","number":1}'),
    *(frames_of("fetch", **{**FETCH, **bad})[0] for bad in (
        {"step": -1}, {"step": 2**64}, {"side": 2}, {"column": "x"}, {"start": None}, {"stop": [1]},
    )),
    *(frames_of("run", **{**RUN, **bad})[0] for bad in (
        {"values": [["crowd", "object", [4]]]}, {"values": [["crowd", "int64", [-4]]]}, {"values": {}},
        {"values": [["crowd", "int64", [1] * 9]]}, {"repeat": 0}, {"afresh": 1}, {"segment": -2},
    )),
]  # fmt: skip


@pytest.mark.parametrize("head", BAD_HEADERS, ids=range(len(BAD_HEADERS)))
def test_bad_headers(head):
    for kinds in (REQUESTS, ANSWERS):
        with pytest.raises(Malformed):
            read_message([head], kinds)


def test_no_frames_and_other_versions():
    with pytest.raises(Malformed):
        read_message([], REQUESTS)
    for version in (b"0", b"1", b"3", b"02", b"", b"2 "):
        with pytest.raises(OtherVersion):
            read_message([b"rustsim-hpc remote " + version + b"\n{}"], REQUESTS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=40) | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(sorted(REQUESTS)), st.data())
def test_fuzzed_fields_are_read_or_refused(kind, data):
    fields = {name: data.draw(VALUES) for name in REQUESTS[kind]}
    text = json.dumps({"kind": kind, "session": SESSION, "number": 1, **fields})
    with suppress(Malformed):
        assert read_message([header(text.encode())], REQUESTS).kind == kind


@given(st.binary(max_size=300), st.booleans())
def test_fuzzed_bytes_are_refused(raw, with_magic):
    with pytest.raises(Malformed):
        read_message([header(raw) if with_magic else raw], REQUESTS)


def test_long_lists_of_failures_are_cut():
    failure = [0, 0, "phase", "x" * 4000, "\x00" * 20_000, "host", 1, None]
    kept = clipped_failures([failure] * 500)
    assert 1 <= len(kept) < 10
    assert len(json.dumps(kept)) < MAX_FRAME
    assert clipped_failures([]) == []


def test_chunks_cover_a_column():
    for rows in (0, 1, 2_000_000, 2_097_153):
        cut = chunks(rows, 8)
        assert sum(stop - start for start, stop in cut) == rows
        assert all((stop - start) * 8 <= CHUNK_BYTES for start, stop in cut)


# -- a live worker -------------------------------------------------------------------------------------


@pytest.fixture
def worker():
    one = WorkerProcess("--memory", "1", models=(SUITE_MODEL,))
    yield one
    assert one.end() == 0


@pytest.fixture
def peers():
    """Return what makes raw peers; all are closed in the end."""
    made = []

    def make(*given, **more):
        made.append(RawPeer(*given, **more))
        return made[-1]

    yield make
    for peer in made:
        peer.close()


def serves(worker):
    """A run at the worker is as it should be."""
    driven = Driven(At(worker.endpoint), RemotePartitionExecutor(), parts=2)
    driven.run(2)
    assert driven.stream == ExecutorSuite().expected(2)
    driven.plane.close()


def size_of(worker):
    return psutil.Process(worker.pid).memory_info().rss / 2**20


def test_a_worker_among_broken_messages(worker, peers):
    """Nothing that is sent ends the worker or grows it, and it tells of each peer once."""
    serves(worker)
    noise = random.Random(2)
    good = [frames_of("fetch", **FETCH), frames_of("run", [bytes(32)], **RUN), frames_of("close")]
    peer = peers(worker.endpoint)

    def once():
        for head in BAD_HEADERS:
            peer.message([head])
        for _ in range(1500):
            frames = [bytearray(frame) for frame in noise.choice(good)]
            for _ in range(noise.randint(1, 8)):
                frame = noise.choice(frames)
                frame[noise.randrange(len(frame))] = noise.randrange(256)
            peer.message([bytes(frame) for frame in frames])
            peer.message([noise.randbytes(noise.randrange(1, 200)) for _ in range(noise.randrange(1, 5))])

    once()
    serves(worker)
    before, descriptors = size_of(worker), psutil.Process(worker.pid).num_fds()
    for _ in range(3):
        once()
    serves(worker)
    assert size_of(worker) < before + 16
    wait_for(lambda: psutil.Process(worker.pid).num_fds() <= descriptors)
    assert len(worker.told) <= 2, worker.told
    assert "dropped a message from 127.0.0.1" in worker.told[0]
    assert all(line.isprintable() for line in worker.told)


def test_frames_that_claim_or_are_too_much(worker, peers):
    serves(worker)
    before = size_of(worker)
    for claim in (MAX_FRAME + 1, 2**31, 2**40, 2**63, 2**64 - 1):
        peer = peers(worker.endpoint)
        peer.frame(b"x" * 100, claim=claim)
        assert peer.is_broken_off(), claim
        serves(worker)
    assert size_of(worker) < before + 16


def test_a_message_without_end(worker, peers):
    """Frames that are all announced to be followed by others: broken off, long before the memory is full."""
    serves(worker)
    before, sent, part = size_of(worker), 0, bytes(MAX_FRAME)
    peer = peers(worker.endpoint)
    with suppress(OSError):
        while sent < 20 * MOST_UNREAD:
            peer.frame(part, more=True)
            sent += len(part)
    assert sent < 12 * MOST_UNREAD
    wait_for(lambda: size_of(worker) < before + 100)
    assert [line for line in worker.told if "broke off a connection from 127.0.0.1" in line]
    serves(worker)


def test_peers_that_shake_hands_badly(worker, peers):
    serves(worker)
    before = size_of(worker)
    for number in range(150):
        peer = peers(worker.endpoint, shake_hands=False)
        peer.socket.sendall(os.urandom(number) if number % 2 else b"\xff" * 64)
        peer.close()
    for _ in range(50):  # who say nothing
        peers(worker.endpoint, shake_hands=False)
    serves(worker)
    assert size_of(worker) < before + 16
    assert len([line for line in worker.told if "does not speak ZeroMQ" in line]) <= 1


def test_a_session_that_is_not_there(worker, peers):
    """A request out of nowhere is refused, and leaves nothing behind."""
    peer = peers(worker.endpoint)
    peer.message([header(b'{"kind":"close","session":"' + SESSION.encode() + b'","number":1}')])
    said = b""
    while b"the session is not known here" not in said:
        said += peer.socket.recv(65536)
    serves(worker)
    assert worker.told == []


def test_too_many_sessions_and_too_much_memory(worker):
    """Sessions are counted, and so are the bytes of those that are open; what is refused leaves nothing."""
    planes = [Driven(At(worker.endpoint), RemotePartitionExecutor()) for _ in range(65)]
    for driven in planes[:64]:
        driven.run(1)
    with pytest.raises(errors.ExecutorError, match="64 sessions are open here"):
        planes[64].run(1)
    large = Driven(At(worker.endpoint), RemotePartitionExecutor(), rows=30_000_000)
    for driven in planes[:2]:
        driven.plane.close()
    with pytest.raises(errors.ExecutorError, match=r"bytes are asked for, [0-9,]+ are left here"):
        large.run(1)
    planes[64].run(1)
    for driven in (*planes, large):
        driven.plane.close()
    serves(worker)
