"""A CUDA device through CuPy (see :class:`rustsim_hpc.state.device.Device`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Final

import numpy as np

from rustsim_hpc.errors import DeviceError, DeviceMemoryError, KernelError, message_of
from rustsim_hpc.state.cuda_found import why_no_device
from rustsim_hpc.state.device import ASIDE, COMPUTE, TRANSFER
from rustsim_hpc.state.schema import Schema
from rustsim_hpc.texts import raw_message_of

Array = np.ndarray[Any, Any]

_PINNED_BYTES: Final = 16 * 2**20
"""The size of each of two staging buffers."""
_SMALL_BYTES: Final = 2**15
_SMALL_PIECES: Final = 64
"""Small uploads have separate staging buffers, enough that no stage waits for one."""
_NO_MEMORY: Final = 2
"""cudaErrorMemoryAllocation."""
_FOREIGN_PTX: Final = {
    "CUDA_ERROR_NO_BINARY_FOR_GPU",
    "CUDA_ERROR_INVALID_PTX",
    "CUDA_ERROR_JIT_COMPILER_NOT_FOUND",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
}
"""Driver errors that mean the PTX is from a compiler that it does not support."""
_HOW_TO_COMPILE: Final = (
    "CuPy compiles CUDA C with NVRTC and CUDA's headers: pip install nvidia-cuda-nvrtc-cu12 "
    "nvidia-cuda-runtime-cu12, or load a CUDA toolkit"
)


class _CupyBuffer:
    def __init__(self, memory: Any, nbytes: int) -> None:
        self.memory = memory
        self.nbytes = nbytes

    @property
    def address(self) -> int:
        return int(self.memory.ptr)


class CupyDevice:
    """A device of this machine, through CuPy (see :class:`Device`).

    Not run on hardware yet: docs/gpu.md.

    Raises:
        DeviceError: there is no such device, or no CuPy.
    """

    def __init__(self, ordinal: int) -> None:
        problem = why_no_device(ordinal)
        if problem:
            raise DeviceError(problem)
        import cupy

        self._cupy: Any = cupy
        self.ordinal = ordinal
        self.name = "unnamed"  # until queried
        self._device = cupy.cuda.Device(ordinal)
        with self._guard():
            facts = cupy.cuda.runtime.getDeviceProperties(ordinal)
            self.name = facts["name"].decode()
            self.compute_capability = int(facts["major"]), int(facts["minor"])
            self.resident_threads = int(facts["multiProcessorCount"] * facts["maxThreadsPerMultiProcessor"])
            self._streams = [cupy.cuda.Stream(non_blocking=True) for _ in (COMPUTE, TRANSFER, ASIDE)]
        self._large = [_Ring(cupy, 2, _PINNED_BYTES) for _ in self._streams]
        self._small = _Ring(cupy, _SMALL_PIECES, _SMALL_BYTES)
        self._loaded: dict[tuple[bytes, str], Any] = {}

    def _guard(self) -> _Guard:
        return _Guard(self)

    def free_bytes(self) -> int:
        """Return how many bytes of memory are free."""
        with self._guard():
            free, _ = self._cupy.cuda.runtime.memGetInfo()
            return int(free)

    def allocate(self, nbytes: int) -> _CupyBuffer:
        """Allocate memory (see :class:`Device`) without a pool, so that exactly this much is taken.

        If it fails, unused blocks of CuPy's pool, which array phases allocate from, are freed for a retry.
        """
        cuda = self._cupy.cuda
        try:
            with self._guard():
                try:
                    memory = cuda.Memory(max(nbytes, 1))
                except self._none_left() as error:
                    if not _is_of_memory(error):
                        raise
                    self._cupy.get_default_memory_pool().free_all_blocks()
                    memory = cuda.Memory(max(nbytes, 1))
                return _CupyBuffer(memory, nbytes)
        except (DeviceError, MemoryError) as error:
            if not _is_of_memory(error.__cause__ or error):
                raise
            raise DeviceMemoryError(self.ordinal, nbytes, self.free_bytes()) from error

    def _none_left(self) -> tuple[type[BaseException], ...]:
        cuda = self._cupy.cuda
        return (cuda.memory.OutOfMemoryError, cuda.runtime.CUDARuntimeError, MemoryError)

    def release(self, buffer: Any) -> None:
        """Free memory; CUDA waits for the work that uses it."""
        with self._guard():
            buffer.memory = None

    def upload(self, buffer: Any, data: Array) -> None:
        """Copy from the host through pinned memory: one piece is filled while another is transferred."""
        copy, kind = self._cupy.cuda.runtime.memcpyAsync, self._cupy.cuda.runtime.memcpyHostToDevice
        stream = self._streams[COMPUTE]
        ring = self._small if data.nbytes <= _SMALL_BYTES else self._large[COMPUTE]
        with self._guard():
            for at, part in ring.cut(data):
                number, piece = ring.next()
                piece[: part.size] = part
                copy(buffer.address + at, piece.ctypes.data, part.size, kind, stream.ptr)
                ring.busy[number] = stream.record()

    def download(self, buffer: Any, out: Array, stream: int = TRANSFER) -> None:
        """Copy to the host through pinned memory: one piece is emptied while another is transferred."""
        copy, kind = self._cupy.cuda.runtime.memcpyAsync, self._cupy.cuda.runtime.memcpyDeviceToHost
        queue, ring = self._streams[stream], self._large[stream]
        with self._guard():
            before: tuple[Array, int] | None = None
            for at, part in ring.cut(out):
                number, piece = ring.next()
                copy(piece.ctypes.data, buffer.address + at, part.size, kind, queue.ptr)
                ring.busy[number] = queue.record()
                if before is not None:
                    ring.empty(*before)
                before = part, number
            if before is not None:
                ring.empty(*before)

    def pinned(self, words: int) -> Array:
        """Return pinned memory of the host."""
        with self._guard():
            return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(8 * max(words, 1)), np.int64, words)

    def give(self, data: Array, buffer: Any) -> None:
        """Copy pinned memory to the device."""
        runtime = self._cupy.cuda.runtime
        self._copy(buffer.address, data.ctypes.data, data.nbytes, runtime.memcpyHostToDevice)

    def take(self, buffer: Any, out: Array) -> None:
        """Copy to pinned memory, on the stream of launches."""
        runtime = self._cupy.cuda.runtime
        self._copy(out.ctypes.data, buffer.address, out.nbytes, runtime.memcpyDeviceToHost)

    def copy(self, source: Any, target: Any) -> None:
        """Copy within the device."""
        runtime = self._cupy.cuda.runtime
        self._copy(target.address, source.address, source.nbytes, runtime.memcpyDeviceToDevice)

    def _copy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        with self._guard():
            self._cupy.cuda.runtime.memcpyAsync(target, source, nbytes, kind, self._streams[COMPUTE].ptr)

    def array(self, data: Array) -> Any:
        """Return a CuPy array of the same values."""
        with self._guard(), self._streams[COMPUTE]:
            return self._cupy.asarray(data)

    @contextmanager
    def views(
        self, schema: Schema, parts: Sequence[tuple[Any, Any]], rows: int, writable: Sequence[bool]
    ) -> Iterator[CupyColumns]:
        """Return columns as CuPy arrays; work of the block is queued on the stream of launches."""
        cupy = self._cupy
        with self._guard(), self._streams[COMPUTE]:
            arrays = [
                cupy.ndarray((rows,), dtype, cupy.cuda.MemoryPointer(buffer.memory, 0))
                for buffer, dtype in parts
            ]
            yield CupyColumns(schema, arrays, writable)

    def load(self, image: bytes, name: str) -> Any:
        """Load PTX, which the driver compiles for the device; cached by code and name."""
        if (image, name) in self._loaded:
            return self._loaded[image, name]
        cuda = self._cupy.cuda
        with self._guard():
            module = cuda.function.Module()
            try:
                module.load(image)
            except cuda.driver.CUDADriverError as error:
                text = message_of(error)
                foreign = any(name in text for name in _FOREIGN_PTX)
                hint = "is the driver older than the toolkit? then install an older nvidia-cuda-nvcc-cu12"
                refused = f"device {self.ordinal} ({self.name}) refuses a kernel: {text}"
                raise DeviceError(refused, hint=hint if foreign else None) from error
            self._loaded[image, name] = module.get_function(name)
            return self._loaded[image, name]

    def raw_kernel(self, code: str, name: str, *, fma: bool) -> Any:
        """Return a RawKernel, compiled by NVRTC for this device.

        Raises:
            KernelError: it does not compile, or NVRTC is missing.
        """
        with self._guard():
            kernel = self._cupy.RawKernel(code, name, options=() if fma else ("--fmad=false",))
            try:
                kernel.compile()
            except self._device_errors():
                raise
            except Exception as error:
                raise _of_nvrtc(name, error) from error
            return kernel

    def _device_errors(self) -> tuple[type[BaseException], ...]:
        cuda = self._cupy.cuda
        return (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError)

    def launch(self, kernel: Any, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        """Queue a kernel."""
        with self._guard(), self._streams[COMPUTE]:
            kernel((blocks, 1, 1), (threads, 1, 1), tuple(arguments))

    def capture(self, queue: Callable[[], None]) -> Any:
        """Record a CUDA graph on the stream of launches.

        CuPy captures in relaxed mode, so a thread that downloads a checkpoint may wait meanwhile.
        """
        stream = self._streams[COMPUTE]
        with self._guard():
            stream.begin_capture()
            try:
                queue()
            except BaseException:
                with suppress(self._cupy.cuda.runtime.CUDARuntimeError):  # report the original error
                    stream.end_capture()
                raise
            return stream.end_capture()

    def replay(self, graph: Any) -> None:
        """Launch a CUDA graph."""
        with self._guard():
            graph.launch(self._streams[COMPUTE])

    def order(self, first: int, then: int) -> None:
        """Make one stream wait for the other."""
        with self._guard():
            self._streams[then].wait_event(self._streams[first].record())

    def mark(self) -> Any:
        """Record an event on the stream of launches."""
        with self._guard():
            return self._streams[COMPUTE].record()

    def wait(self, mark: Any) -> None:
        """Wait for an event."""
        with self._guard():
            mark.synchronize()

    def nanoseconds(self, first: Any, then: Any) -> int:
        """Return the time between two events."""
        with self._guard():
            return int(1e6 * self._cupy.cuda.get_elapsed_time(first, then))

    def synchronise(self, *streams: int) -> None:
        """Wait for streams."""
        with self._guard():
            for stream in streams or (COMPUTE, TRANSFER):
                self._streams[stream].synchronize()


class _Ring:
    """Pieces of pinned memory, used in turn.

    busy: for each piece, the event after the last copy that uses it.
    """

    def __init__(self, cupy: Any, pieces: int, nbytes: int) -> None:
        self._cupy, self._nbytes, self._memory = cupy, nbytes, np.zeros((0, 0), np.uint8)
        self._last = -1
        self.busy: list[Any] = [None] * pieces

    def cut(self, data: Array) -> list[tuple[int, Array]]:
        """Split data into parts that fit into a piece, each with its offset in bytes."""
        flat = data.reshape(-1).view(np.uint8)
        return [(at, flat[at : at + self._nbytes]) for at in range(0, flat.size, self._nbytes)]

    def next(self) -> tuple[int, Array]:
        """Return the number of the next piece and the piece, after waiting for queued work that uses it."""
        self._last = (self._last + 1) % len(self.busy)
        return self._last, self._free(self._last)

    def _free(self, number: int) -> Array:
        if not self._memory.size:
            total = len(self.busy) * self._nbytes
            memory = self._cupy.cuda.alloc_pinned_memory(total)
            self._memory = np.frombuffer(memory, np.uint8, total).reshape(len(self.busy), -1)
        if self.busy[number] is not None:
            self.busy[number].synchronize()
            self.busy[number] = None
        piece: Array = self._memory[number]
        return piece

    def empty(self, part: Array, number: int) -> None:
        """Copy a piece to ``part``, after waiting for the transfer to it."""
        part[...] = self._free(number)[: part.size]


class CupyColumns(Sequence[Any]):
    """A partition's columns as CuPy arrays, by position and name; assignment copies in place."""

    def __init__(self, schema: Schema, arrays: Sequence[Any], writable: Sequence[bool]) -> None:
        self._schema = schema
        self._arrays = list(arrays)
        self._writable = tuple(writable)

    def _position(self, key: int | str) -> int:
        return self._schema.index(key) if isinstance(key, str) else range(len(self._arrays))[key]

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, key: Any) -> Any:
        return self._arrays[self._position(key)]

    def __setitem__(self, key: int | str, value: Any) -> None:
        position = self._position(key)
        array, name = self._arrays[position], self._schema.names[position]
        if value is array and self._writable[position]:
            return
        if value.dtype != array.dtype or value.shape != array.shape:
            raise TypeError(
                f'column "{name}" is {array.dtype} {array.shape}, '
                f"cannot be replaced by {value.dtype} {value.shape}"
            )
        if not self._writable[position]:
            raise ValueError(f'column "{name}" is not among the columns that this phase writes')
        array[...] = value


class _Guard:
    """Makes a device current, and converts CUDA's exceptions to DeviceError."""

    def __init__(self, owner: CupyDevice) -> None:
        self._owner = owner

    def __enter__(self) -> None:
        try:
            self._owner._device.__enter__()  # noqa: SLF001 (its own)
        except self._owner._device_errors() as error:  # noqa: SLF001
            raise self._typed(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        owner = self._owner
        failed = owner._device_errors()  # noqa: SLF001
        try:
            owner._device.__exit__(kind, error, trace)  # noqa: SLF001
        except failed as later:  # after a permanent failure of the device every call fails
            raise self._typed(error or later) from (error or later)
        if isinstance(error, failed):
            raise self._typed(error) from error

    def _typed(self, error: BaseException) -> DeviceError:
        return DeviceError(f"device {self._owner.ordinal} ({self._owner.name}): {message_of(error)}")


def _is_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or getattr(error, "status", None) == _NO_MEMORY


def _of_nvrtc(kernel: str, error: Exception) -> KernelError:
    """Return the error of a failed compilation of CUDA C: NVRTC's first error, or why it cannot be used."""
    lines = [" ".join(line.split()) for line in raw_message_of(error).splitlines() if line.strip()]
    complaints = [line for line in lines if ": error:" in line]
    # The file name is NVRTC's own; only the line number is useful.
    said = re.sub(r"^\S*\((\d+)\): ", r"line \1: ", (complaints or lines)[0])
    hint = None if complaints else _HOW_TO_COMPILE
    return KernelError(f"the CUDA C of kernel {kernel} cannot be compiled: {said}", hint=hint)
