"""A device that is none: its own address space, limited memory, queues that run late, in any order, faults.

It does what rustsim_hpc.state.device.Device says and nothing more: nothing queued happens before `wait` or
`synchronise` (or memory is given back), the streams are interleaved at random but for what `order` says,
memory holds garbage until written, and buffers are not arrays. Kernels are PTX, and run on `ptx_machine`.
While a graph is recorded, nothing may be asked for but what a graph is made of; a graph does again what was
recorded, with the arguments of then, and refuses memory that was given back since.
"""

import random
import threading
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
from cuda_source import RawKernel
from ptx_machine import Machine

from rustsim_hpc.errors import DeviceError, DeviceMemoryError
from rustsim_hpc.state.phase_columns import PhaseColumns

BASE = 0x7F_4000_0000
ALIGNMENT = 256


class StandInBuffer:
    """A piece of the stand-in's memory; not an array, whoever asks."""

    def __init__(self, address, nbytes):
        self.address = address
        self.nbytes = nbytes
        self.released = False

    def __array__(self, *args, **kwargs):
        raise TypeError("this is device memory: the host cannot touch it")

    __getitem__ = __len__ = __iter__ = __buffer__ = __array__


class Mark:
    """A place in the queue of launches. `reached`: when it was passed (ns). `lost`: why it never will be."""

    reached = lost = None

    def reach(self):
        self.reached = time.perf_counter_ns()


class StandInDevice:
    """See the module.

    Args:
        capacity: bytes of memory.
        seed: of the order in which streams go on.
        faults: what fails: {"launch": 3} the third launch, {"download": 1} ...; counted down.
    """

    name = "stand-in"

    def __init__(
        self, ordinal=0, capacity=64 * 2**20, seed=0, resident_threads=512, compute_capability=(9, 0)
    ):
        self.ordinal = ordinal
        self.compute_capability = compute_capability
        self.capacity = capacity
        self.resident_threads = resident_threads
        self.faults = {}
        self.counts = dict.fromkeys(
            ("upload", "download", "launch", "copy", "give", "take", "load", "wait", "synchronise"), 0
        )
        self.calls = []  # what was asked for, in order: (ordinal, what); several devices may share a list
        self.images = []
        self.live = {}
        self._memory = np.full(capacity, 0xA5, np.uint8)
        self._queues = [[], [], []]
        self._tickets = [0, 0, 0]  # how many operations were ever queued on each stream
        self._done = [0, 0, 0]
        self._lock = threading.RLock()
        self._choice = random.Random(seed)
        self._pinned = []
        self._marks = []
        self._launched = self._made = 0
        self._graph = self._recorder = None  # what is being recorded, and by which thread

    # -- memory --------------------------------------------------------------------------------------

    def free_bytes(self):
        return self.capacity - sum(_rounded(buffer.nbytes) for buffer in self.live.values())

    def allocate(self, nbytes):
        self._not_recording()
        self._fault("allocate")
        self.counts["memory"] = self.counts.get("memory", 0) + 1
        if self.faults.get("memory") == self.counts["memory"]:
            del self.faults["memory"]
            raise DeviceMemoryError(self.ordinal, nbytes, 0)
        at = 0
        for address in sorted(self.live):
            if address - BASE - at >= _rounded(nbytes):
                break
            at = address - BASE + _rounded(self.live[address].nbytes)
        if at + _rounded(nbytes) > self.capacity:
            raise DeviceMemoryError(self.ordinal, nbytes, self.free_bytes())
        buffer = StandInBuffer(BASE + at, nbytes)
        self.live[buffer.address] = buffer
        return buffer

    def release(self, buffer):
        if buffer.released:
            raise AssertionError("released twice")
        self._drain()
        buffer.released = True
        self._memory[self._range(buffer)] = 0xA5
        del self.live[buffer.address]

    def _range(self, buffer):
        return slice(buffer.address - BASE, buffer.address - BASE + buffer.nbytes)

    def _require(self, buffer, nbytes):
        if buffer.released or nbytes > buffer.nbytes:
            raise DeviceError(f"device {self.ordinal}: {nbytes} bytes do not fit, or the buffer is released")

    # -- queues --------------------------------------------------------------------------------------

    def upload(self, buffer, data):
        self._fault("upload")
        self._require(buffer, data.nbytes)
        bytes_, where = data.reshape(-1).view(np.uint8).copy(), self._range(buffer)
        self._queue(0, lambda: self._write(where.start, bytes_))

    def download(self, buffer, out, stream=1):
        self._fault("download")
        self._require(buffer, out.nbytes)
        if not out.flags.c_contiguous or not out.flags.writeable:
            raise AssertionError("a download needs contiguous, writable memory")
        target = out.reshape(-1).view(np.uint8)
        target[...] = 0x5A  # what the host must not look at yet
        start = self._range(buffer).start
        self._queue(
            stream, lambda: target.__setitem__(slice(None), self._memory[start : start + target.size])
        )

    def copy(self, source, target):
        self._fault("copy")
        self._uses(source.address, target.address)
        self._move(self._range(source).start, self._range(target).start, source.nbytes)

    def _move(self, start, to, size):
        self._record(
            lambda: self._queue(0, lambda: self._write(to, self._memory[start : start + size].copy()))
        )

    def pinned(self, words):
        self._not_recording()
        memory = np.full(words, 0x5A5A, np.int64)
        self._pinned.append(memory)
        return memory

    def _require_pinned(self, memory):
        if not any(memory is known for known in self._pinned):
            raise AssertionError("not pinned memory")

    def give(self, data, buffer):
        self._fault("give")
        self._require(buffer, data.nbytes)
        self._require_pinned(data)
        self._uses(buffer.address)
        start = self._range(buffer).start
        self._record(lambda: self._queue(0, lambda: self._write(start, data.view(np.uint8))))

    def take(self, buffer, out):
        self._fault("take")
        self._require(buffer, out.nbytes)
        self._require_pinned(out)
        self._uses(buffer.address)
        start, target = self._range(buffer).start, out.view(np.uint8)

        def queue():
            out[...] = 0x5A5A  # what the host must not look at yet
            self._queue(0, lambda: target.__setitem__(slice(None), self._memory[start : start + target.size]))

        self._record(queue)

    def capture(self, queue):
        self._fault("capture")
        graph = self.begin_capture()
        try:
            queue()
        finally:
            self.end_capture()
        return graph

    def begin_capture(self):
        self._not_recording()
        self._graph, self._recorder = [], threading.get_ident()
        return self._graph

    def end_capture(self):
        graph, self._graph = self._graph, None
        return graph

    def replay(self, graph):
        self._not_recording()
        self._fault("replay")
        for queue in graph:
            queue()

    def _uses(self, *addresses):
        """Let the graph that is being recorded look, when it runs, whether what is there now still is."""
        if not self._recording:
            return
        for address in map(int, addresses):
            for buffer in self.live.values():
                if buffer.address <= address < buffer.address + max(buffer.nbytes, 1):
                    self._graph.append(partial(_require_live, buffer))

    def _record(self, queue):
        """Queue something, or make it a part of the graph that is being recorded."""
        if self._recording:
            self._graph.append(queue)
        else:
            queue()

    @property
    def _recording(self):
        """Whether this thread records a graph; what others queue is not a part of it."""
        return self._graph is not None and self._recorder == threading.get_ident()

    # By address, as CUDA's own calls have it; the host's memory is looked at when the queue comes to it.

    def put(self, target, data):
        self._fault("upload")
        self._record(lambda: self._queue(0, lambda: self._write(target - BASE, data)))

    def get(self, source, out, stream):
        self._fault("download")
        start = source - BASE
        self._record(
            lambda: self._queue(
                stream, lambda: out.__setitem__(slice(None), self._memory[start : start + out.size])
            )
        )

    def move(self, source, target, size):
        self._fault("copy")
        self._move(source - BASE, target - BASE, size)

    def window(self, buffer):
        return self._memory[self._range(buffer)]

    def _write(self, start, data):
        self._memory[start : start + data.size] = data

    def load(self, image, name):
        self._not_recording()
        self._fault("load")
        self.images.append(image.decode())
        machine = Machine(self.images[-1])
        if machine.entry != name:
            raise DeviceError(f"no kernel {name}")
        return machine

    def launch(self, kernel, blocks, threads, arguments):
        if not blocks or any(not isinstance(argument, np.generic) for argument in arguments):
            raise AssertionError("a launch takes NumPy scalars, and at least one block")
        values = list(arguments)
        self._uses(*(value for value in values if value.dtype == np.uint64))
        self._record(lambda: self._queue_launch(kernel, blocks, threads, values))

    def _queue_launch(self, kernel, blocks, threads, arguments):
        self._fault("launch")
        fails = self.faults.get("kernel") == self.counts["launch"]
        self._launched += 1
        self._queue(0, lambda: self._execute(kernel, blocks, threads, arguments, fails))

    def _execute(self, kernel, blocks, threads, arguments, fails):
        self._made += 1
        if fails:
            del self.faults["kernel"]
            raise DeviceError(f"device {self.ordinal}: an illegal memory access was encountered")
        try:
            kernel.run(self._memory, BASE, blocks, threads, arguments)
        except IndexError as error:
            raise DeviceError(f"device {self.ordinal}: {error}") from error

    def order(self, first, then):
        self._not_recording()
        with self._lock:
            self._queues[then].append(("wait", first, self._tickets[first]))

    def _not_recording(self):
        if self._recording:
            raise AssertionError("not while a graph is recorded")

    def _queue(self, stream, operation):
        self._not_recording()
        with self._lock:
            self._tickets[stream] += 1
            self._queues[stream].append(("do", operation))

    def mark(self):
        mark = Mark()
        self._marks = [known for known in self._marks if known.reached is None and known.lost is None]
        self._marks.append(mark)
        self._queue(0, mark.reach)
        return mark

    def wait(self, mark):
        self._fault("wait")
        self._drain(until=mark)
        if mark.lost is not None:
            raise mark.lost

    def nanoseconds(self, first, then):
        if first.reached is None or then.reached is None:
            raise AssertionError("a mark that nobody has waited for")
        return then.reached - first.reached

    @property
    def busy(self):
        """Whether launches are queued that have not been made."""
        return self._launched > self._made

    def synchronise(self, *streams):
        self._fault("synchronise")
        self._drain(streams or (0, 1))

    def _drain(self, streams=(0, 1, 2), until=None):
        """Run what is queued on streams, or up to a mark: all streams in turn, as chance has it."""
        self._not_recording()
        with self._lock:
            self._drain_alone(streams, until)

    def _drain_alone(self, streams, until):
        while any(self._queues[k] for k in streams) and (until is None or until.reached is None):
            ready = [stream for stream in (0, 1, 2) if self._is_ready(stream)]
            stream = self._choice.choice(ready)
            what = self._queues[stream].pop(0)
            if what[0] == "do":
                self._done[stream] += 1
                try:
                    what[1]()
                except DeviceError as error:
                    for mark in self._marks:
                        mark.lost = error if mark.reached is None else None
                    for queue in self._queues:
                        queue.clear()
                    self._made = self._launched
                    self._done = list(self._tickets)
                    raise

    def _is_ready(self, stream):
        if not self._queues[stream]:
            return False
        what = self._queues[stream][0]
        return what[0] == "do" or self._done[what[1]] >= what[2]

    def _fault(self, what):
        self.calls.append((self.ordinal, what))
        self.counts[what] = self.counts.get(what, 0) + 1
        if self.faults.get(what) == self.counts[what]:
            del self.faults[what]
            raise DeviceError(f"device {self.ordinal}: {what} refused")

    # -- device phases -------------------------------------------------------------------------------

    def raw_kernel(self, code, name, *, fma):
        return RawKernel(code, name, options=() if fma else ("--fmad=false",))

    def array(self, data):
        self._not_recording()
        return data

    @contextmanager
    def views(self, schema, parts, rows, writable):
        """Let a phase work on the memory itself, as its kernels would on a real device."""
        self._drain()
        arrays = [self._memory[self._range(buffer)].view(dtype)[:rows] for buffer, dtype in parts]
        columns = PhaseColumns(schema, arrays, writable)
        try:
            yield columns
            columns.verify_unchanged_shape(rows)
        finally:
            columns.seal()


def _require_live(buffer):
    if buffer.released:
        raise AssertionError("a graph uses memory that was given back")


def _rounded(nbytes):
    return -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
