"""Column memory: two sides and their swap, addresses, sharing between processes, shortage, and no leaks."""

import errno
import gc
import mmap
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from rustsim_hpc.errors import ColumnMemoryError
from rustsim_hpc.state.memory import ColumnMemory
from rustsim_hpc.state.schema import DTYPES, Column, Schema

BIG = 300_000  # float32 columns of this length are above the limit from which pages are mapped
KINDS = pytest.mark.parametrize("kind", ["heap", "shared"])


def floats(count: int) -> Schema:
    return Schema.plain([f"c{i}" for i in range(count)], ["float32"] * count)


@KINDS
@pytest.mark.parametrize("rows", [0, 1, 1000, BIG])
def test_sides_are_separate_and_swap(kind, rows):
    with ColumnMemory(Schema.plain(DTYPES, DTYPES), rows, kind, with_ids=True) as memory:
        for column, dtype in enumerate(DTYPES):
            for side in (0, 1):
                array = memory.array(column, side)
                assert (array.dtype, array.shape) == (np.dtype(dtype), (rows,))
                assert array.flags.writeable
                array[:] = side
        assert memory.ids.dtype == np.uint64
        assert memory.ids.shape == (rows,)
        memory.ids[:] = 7
        memory.swap([0, 3])
        assert memory.parity.tolist() == [1, 0, 0, 1, *[0] * (len(DTYPES) - 4)]
        for column in range(len(DTYPES)):
            swapped = column in (0, 3)
            assert (memory.current(column) == swapped).all()
            assert (memory.other(column) != swapped).all()
        memory.swap([3])
        assert memory.parity.tolist() == [1, *[0] * (len(DTYPES) - 1)]


@KINDS
def test_arrays_keep_their_address(kind):
    with ColumnMemory(floats(2), 100, kind) as memory:
        first = memory.array(0, 0)
        memory.array(0, 1)[:] = 3
        memory.swap([0])
        memory.swap([0])
        assert memory.current(0) is first


@KINDS
@pytest.mark.parametrize("rows", [1, 5000, BIG])
def test_starts_are_aligned_and_staggered(kind, rows):
    with ColumnMemory(floats(8), rows, kind, with_ids=True) as memory:
        starts = [memory.array(column, side).ctypes.data for side in (0, 1) for column in range(8)]
        starts.append(memory.ids.ctypes.data)
        assert [start % 64 for start in starts] == [0] * 17
        assert [start % 4096 for start in starts] == [k * 832 % 4096 for k in range(17)]
        assert len({start % 4096 for start in starts}) == 17


@KINDS
def test_the_second_side_is_allocated_at_first_use(kind):
    with ColumnMemory(floats(2), BIG, kind, with_ids=True) as memory:
        one = 4 * BIG
        assert memory.allocated_bytes == 4 * one
        memory.other(1)
        memory.other(1)
        assert memory.allocated_bytes == 5 * one


def test_the_second_side_of_shared_memory_takes_no_memory_before():
    with ColumnMemory(floats(4), BIG, "shared") as memory:
        sizes = [os.fstat(fd).st_blocks * 512 for fd in memory.handles().fds]
        assert sizes[0] >= 16 * BIG
        assert sizes[1] == 0
        memory.other(2)
        claimed = os.fstat(memory.handles().fds[1]).st_blocks * 512
        assert 4 * BIG <= claimed <= 4 * BIG + 2 * mmap.PAGESIZE


def test_threads_that_ask_at_once_get_one_array():
    with ColumnMemory(floats(1), BIG) as memory:
        found = []
        barrier = threading.Barrier(8)

        def ask():
            barrier.wait()
            found.append(memory.other(0))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(array) for array in found}) == 1


@KINDS
def test_close_is_idempotent_and_final(kind):
    memory = ColumnMemory(floats(1), 10, kind, with_ids=True)
    view = memory.current(0)
    view[:] = 4
    memory.close()
    memory.close()
    assert view.tolist() == [4] * 10
    for use in (lambda: memory.current(0), lambda: memory.array(0, 1), lambda: memory.ids, memory.handles):
        with pytest.raises(ColumnMemoryError, match="closed"):
            use()


@KINDS
def test_wrong_places_are_refused(kind):
    with ColumnMemory(floats(2), 10, kind) as memory:
        assert memory.ids is None
        for column, side in ((2, 0), (-1, 0), (0, 2), (0, -1)):
            with pytest.raises(IndexError):
                memory.array(column, side)


@KINDS
def test_closed_memory_is_given_back(kind):
    process = psutil.Process()

    def mapped():
        return process.memory_info().vms, process.num_fds()

    def use():
        memory = ColumnMemory(floats(4), BIG, kind)
        for column in range(4):
            memory.array(column, 1)[:] = 1
        memory.close()

    use()
    gc.collect()
    before = mapped()
    for _ in range(20):
        use()
    gc.collect()
    after = mapped()
    assert after[1] == before[1]
    assert after[0] - before[0] < 8 * BIG * 4


def test_heap_memory_has_no_handles():
    with (
        ColumnMemory(floats(1), 1) as memory,
        pytest.raises(ColumnMemoryError, match="another process"),
    ):
        memory.handles()


CHILD = """
    import pickle, sys
    from rustsim_hpc.state.memory import ColumnMemory
    layout = pickle.loads(bytes.fromhex(sys.argv[1]))
    memory = ColumnMemory.attach(layout)
    assert memory.parity.tolist() == [0, 1], memory.parity
    assert memory.current(1).tolist() == [9.0] * 5
    assert memory.ids.tolist() == [5, 6, 7, 8, 9]
    memory.array(0, 1)[:] = 42
    memory.swap([0])
    memory.close()
"""


def test_a_child_maps_the_same_memory():
    with ColumnMemory(floats(2), 5, "shared", with_ids=True) as memory:
        memory.ids[:] = range(5, 10)
        memory.array(1, 1)[:] = 9
        memory.swap([1])
        layout = memory.handles()
        child = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CHILD), pickle.dumps(layout).hex()],
            pass_fds=layout.fds,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (child.returncode, child.stderr) == (0, "")
        assert memory.parity.tolist() == [1, 1]
        assert memory.current(0).tolist() == [42.0] * 5


def test_nothing_has_a_name_that_could_be_left_behind():
    with ColumnMemory(floats(2), BIG, "shared") as memory:
        memory.other(0)
        for fd in memory.handles().fds:
            assert os.fstat(fd).st_nlink == 0
            assert not Path(str(Path(f"/proc/self/fd/{fd}").readlink()).removesuffix(" (deleted)")).exists()


def test_without_memfd_an_unlinked_file_serves(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with ColumnMemory(floats(1), 100, "shared") as memory:
        memory.other(0)[:] = 2
        memory.swap([0])
        assert memory.current(0).sum() == 200
        assert os.fstat(memory.handles().fds[0]).st_nlink == 0


@KINDS
def test_more_than_there_is_is_a_typed_error_that_names_the_bytes(kind):
    fds = psutil.Process().num_fds()
    with pytest.raises(ColumnMemoryError) as caught:
        ColumnMemory(floats(1), 2**58, kind)
    asked = int(str(caught.value).split(" bytes")[0].split()[-1].replace(",", ""))
    assert 2**60 <= asked < 2**60 + 2**22
    assert isinstance(caught.value, MemoryError)
    assert psutil.Process().num_fds() == fds


SHORT = """
    import resource
    from rustsim_hpc.state.schema import Schema
    from rustsim_hpc.errors import ColumnMemoryError
    from rustsim_hpc.state.memory import ColumnMemory
    memory = ColumnMemory(Schema.plain(["x"], ["float64"]), 4_000_000)
    memory.current(0)[:] = 1
    resource.setrlimit(resource.RLIMIT_AS, (1_000_000, 1_000_000))
    for _ in range(2):
        try:
            memory.other(0)
        except ColumnMemoryError as error:
            print(error)
            print(error.details())
    print(memory.current(0).sum())
"""


def shortage_is_told(lines, kind):
    assert len(lines) == 5
    assert lines[0].startswith(f"cannot get 32,000,000 bytes of {kind} memory for x (second buffer): ")
    assert "torn guard" in lines[1]
    assert lines[2:4] == lines[0:2]
    assert lines[4] == "4000000.0"


def test_a_second_heap_buffer_that_cannot_be_had_leaves_the_first():
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHORT)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    shortage_is_told(child.stdout.splitlines(), "heap")


def test_a_second_shared_buffer_that_cannot_be_had_leaves_the_first(monkeypatch):
    lines = []

    def full(fd, offset, size):
        assert size == 32_000_000
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ColumnMemory(Schema.plain(["x"], ["float64"]), 4_000_000, "shared") as memory:
        memory.current(0)[:] = 1
        monkeypatch.setattr(os, "posix_fallocate", full)
        for _ in range(2):
            with pytest.raises(ColumnMemoryError) as caught:
                memory.other(0)
            lines += [str(caught.value), caught.value.details()]
        lines.append(str(memory.current(0).sum()))
        monkeypatch.undo()
        assert memory.other(0).shape == (4_000_000,)
    assert "No space left" in lines[0]
    shortage_is_told(lines, "shared")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux places mappings from the top down")
def test_large_shared_columns_can_have_huge_pages() -> None:
    """Sides lie at multiples of a huge page in every process's map, whatever else is mapped; values stay."""
    schema = Schema((Column("a", "float64"), Column("b", "int32")))
    kept = []
    for number in range(3):
        memory = ColumnMemory(schema, 1_000_003, "shared")
        for column in range(2):
            for side in range(2):
                memory.array(column, side)[:] = np.arange(1_000_003) + 10 * number + side
        layout = memory.handles()
        own = replace(layout, fds=(os.dup(layout.fds[0]), os.dup(layout.fds[1])))
        kept += [memory, ColumnMemory.attach(own)]
    for number, memory in enumerate(kept):
        for column in range(2):
            for side in range(2):
                values = memory.array(column, side)
                assert (values.ctypes.data - values.ctypes.data % 4096) % (2 << 20) == 0
                assert values[-1] == 1_000_002 + 10 * (number // 2) + side
    for memory in kept:
        memory.close()
