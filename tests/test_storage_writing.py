"""Writing checkpoints: beside the running steps, on a full disk, and killed at any moment."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from storage_cases import bounds, cut, header_of, same_bits, state
from storage_cases import layout as options_of
from thread_team import ThreadTeam, run_ranks

from rustsim_hpc.errors import CheckpointFileError
from rustsim_hpc.proof.fingerprint import StateView
from rustsim_hpc.ranks.team import SoloTeam
from rustsim_hpc.storage import (
    CheckpointHeader,
    CheckpointWriter,
    StorageOptions,
    checkpoint_path,
    list_checkpoints,
    load,
    read_header,
    sweep,
    write_checkpoint,
)
from rustsim_hpc.storage import writing as writing_module

TESTS = Path(__file__).parent
LAYOUTS = [(1, "auto"), (2, "sharded"), (3, "single"), (2, "node")]


def read(path: Path) -> StateView:
    return load(path, SoloTeam(), lambda header: (0, header.rows)).rows


class Gate:
    """Holds up every writer thread until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.failure: Exception | None = None
        sums = writing_module.digest_sums

        def held(view: StateView) -> list[int]:
            assert self.open.wait(30)
            if self.failure is not None and view.row_offset == 0:
                raise self.failure
            return sums(view)

        monkeypatch.setattr(writing_module, "digest_sums", held)


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_steps_go_on_while_a_checkpoint_is_written(
    tmp_path: Path, size: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    given = state(300, custom_ids=True)
    header = header_of(given)
    expected = state(300, custom_ids=True)

    def rank(team: ThreadTeam) -> None:
        writer = CheckpointWriter(tmp_path, team, options_of(layout))
        part = cut(given, *bounds(300, size, team.rank))
        assert writer.poll() is None
        writer.reserve(part)
        writer.submit(header, part)
        # The step loop goes on, and changes the columns.
        for array in (*part.columns, part.ids):
            assert array is not None
            array[...] = 0
        assert writer.busy
        assert not writer.done_here
        assert [writer.poll() for _ in range(3)] == [None] * 3
        assert list_checkpoints(tmp_path) == []
        team.barrier()
        gate.open.set()
        path = None
        while path is None:
            path = writer.poll()
        assert writer.paths == [path]
        assert not writer.busy
        assert writer.finish() is None

    run_ranks(size, rank)
    assert same_bits(read(checkpoint_path(tmp_path, 100)), expected)


@pytest.mark.parametrize("scheme", ["digest", "fnv1a"])
@pytest.mark.parametrize(
    ("size", "layout", "compression"),
    [*((size, layout, {}) for size, layout in LAYOUTS), (1, "auto", {"*": "lzf"}), (2, "auto", {"*": "lzf"})],
)
def test_a_fingerprint_that_is_due_is_made_of_what_is_written(
    tmp_path: Path, scheme: str, size: int, layout: str, compression: dict[str, str]
) -> None:
    view = state(300, custom_ids=True)
    known = header_of(view, scheme=scheme)
    header = replace(known, fingerprint=replace(known.fingerprint, value=0), fingerprint_due=True)
    options = options_of(layout, compression)

    def rank(team: ThreadTeam) -> Path:
        return write_checkpoint(tmp_path, header, cut(view, *bounds(300, size, team.rank)), team, options)

    if scheme == "fnv1a" and size > 1:
        with pytest.raises(CheckpointFileError, match="cannot make the fnv1a fingerprint"):
            run_ranks(size, rank)
        return
    path = run_ranks(size, rank)[0]
    found = read_header(path)
    assert found == replace(found, fingerprint=known.fingerprint, fingerprint_due=False)
    with h5py.File(path) as file:
        assert int(file.attrs["fingerprint"]) == known.fingerprint.value
    assert same_bits(read(path), view)


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_a_state_that_is_not_the_step_s_is_not_published(tmp_path: Path, size: int, layout: str) -> None:
    view = state(300)
    header = header_of(view)
    view.columns[0].view(np.uint32)[200] ^= 1

    def rank(team: ThreadTeam) -> None:
        part = cut(view, *bounds(300, size, team.rank))
        with pytest.raises(CheckpointFileError, match="the state to be written has the fingerprint"):
            write_checkpoint(tmp_path, header, part, team, options_of(layout))

    run_ranks(size, rank)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_the_next_checkpoint_waits_for_the_one_before(tmp_path: Path, size: int, layout: str) -> None:
    def rank(team: ThreadTeam) -> list[Path]:
        writer = CheckpointWriter(tmp_path, team, options_of(layout))
        for step in (10, 20, 30):
            view = state(40, step=step)
            writer.submit(header_of(view), cut(view, *bounds(40, size, team.rank)))
        assert len(writer.paths) == 2
        writer.finish()
        return writer.paths

    paths = [checkpoint_path(tmp_path, step) for step in (10, 20, 30)]
    assert run_ranks(size, rank) == [paths] * size
    assert all(
        same_bits(read(path), state(40, step=step)) for path, step in zip(paths, (10, 20, 30), strict=True)
    )


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
@pytest.mark.parametrize("way", ["poll", "finish", "submit"])
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "no luck"), MemoryError(), KeyError("x")])
def test_an_error_of_one_writer_comes_out_on_all_ranks_once(
    tmp_path: Path, size: int, layout: str, way: str, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    gate.open.set()
    view = state(40)
    header = header_of(view)

    def rank(team: ThreadTeam) -> str:
        writer = CheckpointWriter(tmp_path, team, options_of(layout))
        part = cut(view, *bounds(40, size, team.rank))
        gate.failure = failure
        writer.submit(header, part)
        again = {
            "poll": lambda: polled(writer),
            "finish": writer.finish,
            "submit": lambda: writer.submit(header, part),
        }
        with pytest.raises(CheckpointFileError) as caught:
            again[way]()
        assert caught.value.step == 100
        assert not caught.value.damaged
        assert not writer.busy
        assert writer.poll() is None
        team.barrier()
        assert list(tmp_path.iterdir()) == []
        team.barrier()
        gate.failure = None
        writer.submit(header, part)
        assert writer.finish() == checkpoint_path(tmp_path, 100)
        return str(caught.value)

    assert len(set(run_ranks(size, rank))) == 1
    assert same_bits(read(checkpoint_path(tmp_path, 100)), view)


def polled(writer: CheckpointWriter) -> None:
    while writer.busy:
        writer.poll()


@pytest.mark.parametrize(
    ("layout", "compression"), [("sharded", {}), ("single", {}), ("node", {}), ("sharded", {"*": "gzip:1"})]
)
def test_the_others_stop_writing_when_one_has_failed(
    tmp_path: Path, layout: str, compression: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = state(20_000)
    header = header_of(view)
    options = options_of(layout, compression, chunk_rows=100)
    known = threading.Event()
    looks: list[int] = []
    real = writing_module.Attempt.go_on

    def go_on(attempt: writing_module.Attempt) -> None:
        if attempt.team.rank == 1:
            raise OSError(errno.EIO, "no luck")
        if looks:
            # In the middle of its part, until the other one's failure is known.
            assert known.wait(30)
            assert attempt.abandoned.wait(30)
        looks.append(1)
        real(attempt)

    monkeypatch.setattr(writing_module.Attempt, "go_on", go_on)

    def rank(team: ThreadTeam) -> int | None:
        writer = CheckpointWriter(tmp_path, team, options)
        writer.submit(header, cut(view, *bounds(20_000, 2, team.rank)))
        end = time.monotonic() + 60
        while not any(team.allgather(writer.failed_here)):
            # By the first one's clock, so that none is left behind.
            assert team.bcast(time.monotonic()) < team.bcast(end)
        assert writer.failed_here == (team.rank == 1)
        known.set()
        with pytest.raises(CheckpointFileError, match=os.strerror(errno.EIO)) as caught:
            writer.poll(somebody_failed=True)
        assert not writer.busy
        return caught.value.rank

    assert run_ranks(2, rank) == [1, 1]
    # Of its pieces, at least three, it has not begun the third.
    assert len(looks) <= 2
    assert list_checkpoints(tmp_path) == []


def test_a_caller_may_sum_up_who_is_done_itself(tmp_path: Path) -> None:
    view = state(20)

    def rank(team: ThreadTeam) -> None:
        writer = CheckpointWriter(tmp_path, team)
        writer.submit(header_of(view), cut(view, *bounds(20, 2, team.rank)))
        assert writer.poll(everybody_done=False) is None
        path = None
        while path is None:
            done = np.array([writer.done_here], np.int64)
            path = writer.poll(everybody_done=int(team.sum_int64(done)[0]) == team.size)

    run_ranks(2, rank)
    assert same_bits(read(checkpoint_path(tmp_path, 100)), view)


def test_buffers_are_kept_from_one_checkpoint_to_the_next(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, SoloTeam())
    view = state(1000)
    writer.reserve(view)
    before = [buffer.ctypes.data for buffer in writer._buffers]
    for _ in range(3):
        writer.submit(header_of(view), view)
    writer.finish()
    assert [buffer.ctypes.data for buffer in writer._buffers] == before


# A disk that fails.


def fail_at(monkeypatch: pytest.MonkeyPatch, names: list[str], count: int, error: OSError) -> list[int]:
    """Make the `count`-th call of the named functions of os, and all later ones, fail; return a countdown."""
    left = [count]

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                raise error
            return function(*arguments, **named)

        return call

    for name in names:
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    return left


def failure_of(function: Callable[[], object]) -> CheckpointFileError | None:
    try:
        function()
    except CheckpointFileError as error:
        return error
    return None


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
@pytest.mark.parametrize(
    ("names", "code"),
    [(["pwrite", "ftruncate"], errno.ENOSPC), (["fsync"], errno.EIO)],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_disk_that_fails_at_any_call_leaves_the_checkpoint_before(
    tmp_path: Path, size: int, layout: str, names: list[str], code: int, compressed: bool
) -> None:
    if compressed and layout in {"single", "node"}:
        compressed = False
    view, before = state(500), state(500, step=90)
    options = options_of(layout, {"x": "gzip"} if compressed else {})

    def write(given: StateView) -> None:
        header = header_of(given)
        run_ranks(
            size,
            lambda team: write_checkpoint(
                tmp_path, header, cut(given, *bounds(500, size, team.rank)), team, options
            ),
        )

    write(before)
    there = sorted(tmp_path.rglob("*"))
    failures = 0
    for count in range(1, 400):
        with pytest.MonkeyPatch.context() as patch:
            left = fail_at(patch, names, count, OSError(code, "injected"))
            error = failure_of(lambda: write(view))
        if error is None:
            assert left[0] > 0
            break
        failures += 1
        assert os.strerror(code) in str(error)
        assert not error.damaged
        if failures <= 3:
            sweep(tmp_path)
        # A rename that has happened stands; all else is gone.
        if checkpoint_path(tmp_path, 100).exists():
            assert same_bits(read(checkpoint_path(tmp_path, 100)), view)
        else:
            assert sorted(tmp_path.rglob("*")) == there
        assert same_bits(read(checkpoint_path(tmp_path, 90)), before)
    else:
        pytest.fail("never succeeded")
    assert failures >= 2
    assert same_bits(read(checkpoint_path(tmp_path, 100)), view)


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_a_folder_that_cannot_be_written(tmp_path: Path, size: int, layout: str) -> None:
    (tmp_path / "file").touch()
    view = state(10)

    def rank(team: ThreadTeam) -> str:
        part = cut(view, *bounds(10, size, team.rank))
        with pytest.raises(CheckpointFileError, match="cannot make it") as caught:
            write_checkpoint(tmp_path / "file" / "below", header_of(view), part, team, options_of(layout))
        return str(caught.value)

    assert len(set(run_ranks(size, rank))) == 1


def test_what_hdf5_has_not_written_as_given_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, write_chunked = state(40), writing_module.write_chunked

    def miswrite(descriptor: int, header: CheckpointHeader, given: StateView, *how: Any) -> None:
        other = [given.columns[0], given.columns[1] ^ np.uint8(4)]
        write_chunked(descriptor, header, replace(given, columns=tuple(other)), *how)

    monkeypatch.setattr(writing_module, "write_chunked", miswrite)
    with pytest.raises(CheckpointFileError, match="HDF5 has not written what it was given"):
        write_checkpoint(
            tmp_path, header_of(view), view, SoloTeam(), StorageOptions(compression={"*": "gzip"})
        )
    assert list(tmp_path.iterdir()) == []


# A process that is killed.


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", ["new", "replace", "retain"])
def test_a_kill_at_any_call_leaves_whole_checkpoints(tmp_path: Path, case: str, size: int) -> None:
    command = [sys.executable, str(TESTS / "storage_drill.py"), str(tmp_path), case, str(size)]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path])}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=250, env=environ)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["code"] for result in results] == [9] * (len(results) - 1) + [0]
    assert len(results) > 10
    old, new = [10, 1], [10 if case == "replace" else 20, 2]
    allowed = {
        "new": [[old], [old, new]],
        "replace": [[old], [new]],
        "retain": [[old], [old, new], [new]],
    }[case]
    for result in results:
        assert result["at_once"] in allowed, result
        assert result["swept"] == result["at_once"], result
        # Nothing of the attempt is left but what belongs to whole checkpoints.
        assert result["entries"] == len(result["swept"]) * (2 if size == 1 else 3), result
    seen = [result["at_once"] for result in results]
    assert seen == sorted(seen, key=allowed.index), "once it is there, it stays"
    assert seen[0] == allowed[0]
    assert seen[-1] == allowed[-1]
