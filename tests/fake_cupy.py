"""As much of CuPy as cupy_device and cuda_found of rustsim_hpc.state call, over a stand-in: they run here.

Names and arguments are those of CuPy 14; addresses of the host are read and written as CUDA would.
"""

import ctypes
import types

import numpy as np
from cuda_source import RawKernel
from standin_device import StandInDevice

from rustsim_hpc.errors import DeviceError, DeviceMemoryError


class CUDARuntimeError(RuntimeError):
    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class CUDADriverError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3


def host(address, size):
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class FakeCupy(types.ModuleType):
    """A module named cupy; `standin`: the device behind it."""

    def __init__(self, **given):  # noqa: C901 (as many small things as CuPy has)
        super().__init__("cupy")
        self.standin = standin = StandInDevice(**given)
        current = []

        def typed(call, *arguments):
            if not current:
                raise AssertionError("no device is the current one")
            try:
                return call(*arguments)
            except DeviceError as error:
                raise CUDARuntimeError(719, str(error)) from error

        self.lost = ""  # what every change of device answers, once it has been set

        class Device:
            def __init__(self, ordinal):
                self.ordinal = ordinal

            def __enter__(inner):  # noqa: N805
                if self.lost:
                    raise CUDARuntimeError(700, self.lost)
                current.append(inner.ordinal)

            def __exit__(self, *_):
                current.pop()

        class Memory:
            def __init__(self, size):
                try:
                    self.buffer = typed(standin.allocate, size)
                except DeviceMemoryError as error:
                    raise CUDARuntimeError(2, "cudaErrorMemoryAllocation: out of memory") from error
                self.ptr = self.buffer.address

            def __del__(self):
                if hasattr(self, "ptr") and not self.buffer.released:
                    standin.release(self.buffer)

        streams = self._streams = []

        class Stream:
            made = 0

            def __init__(self, null=False, non_blocking=False):
                assert non_blocking, "the legacy stream would wait for everything"
                self.ptr = Stream.made % 3
                Stream.made += 1

            def __enter__(self):
                streams.append(self)
                return self

            def __exit__(self, *_):
                streams.pop()

            def synchronize(self):
                typed(standin.synchronise, self.ptr)

            def record(self):
                return Event(self.ptr)

            def begin_capture(self, mode=None):
                assert self.ptr == 0
                typed(standin._fault, "capture")
                standin.begin_capture()

            def end_capture(self):
                return Graph(standin.end_capture())

            def wait_event(self, event):
                standin.order(event.stream, self.ptr)

        class Graph:
            def __init__(self, made):
                self.made = made

            def launch(self, stream=None):
                assert stream.ptr == 0, "the current stream is another one"
                typed(standin.replay, self.made)

        class Event:
            def __init__(self, stream):
                self.stream = stream
                self.mark = typed(standin.mark) if stream == 0 else None

            def synchronize(self):
                if self.mark is None:
                    typed(standin.synchronise, self.stream)
                else:
                    typed(standin.wait, self.mark)

        def memcpy_async(target, source, size, kind, stream):
            if kind == HOST_TO_DEVICE:
                assert stream == 0
                typed(standin.put, target, host(source, size))
            elif kind == DEVICE_TO_HOST:
                typed(standin.get, source, host(target, size), stream)
            else:
                assert (kind, stream) == (DEVICE_TO_DEVICE, 0)
                typed(standin.move, source, target, size)

        class Module:
            def load(self, image):
                assert isinstance(image, bytes)
                if b".version" not in image:
                    fault = image.decode() if image.startswith(b"CUDA_ERROR") else "UNSUPPORTED_PTX_VERSION"
                    raise CUDADriverError(f"CUDA_ERROR_{fault.removeprefix('CUDA_ERROR_')}")
                self.image = image

            def get_function(self, name):
                kernel = typed(standin.load, self.image, name)

                def call(grid, block, args):
                    assert (len(grid), len(block), streams[-1].ptr) == (3, 3, 0)
                    typed(standin.launch, kernel, grid[0], block[0], args)

                return call

        properties = {
            "name": b"stand-in",
            "major": 9,
            "minor": 0,
            "multiProcessorCount": 2,
            "maxThreadsPerMultiProcessor": 256,
            "uuid": b"\x01" * 16,
            "totalGlobalMem": standin.capacity,
        }
        runtime = types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            deviceGetPCIBusId=lambda _: "0000:65:00.0",
            driverGetVersion=lambda: 12040,
            runtimeGetVersion=lambda: 12090,
            getDeviceCount=lambda: 1,
            getDeviceProperties=lambda _: properties,
            memGetInfo=lambda: (standin.free_bytes(), standin.capacity),
            memcpyAsync=memcpy_async,
            memcpyHostToDevice=HOST_TO_DEVICE,
            memcpyDeviceToHost=DEVICE_TO_HOST,
            memcpyDeviceToDevice=DEVICE_TO_DEVICE,
        )
        self.cuda = types.SimpleNamespace(
            Device=Device,
            Memory=Memory,
            MemoryPointer=lambda memory, offset: (memory, offset),
            Stream=Stream,
            get_elapsed_time=lambda first, then: standin.nanoseconds(first.mark, then.mark) / 1e6,
            alloc_pinned_memory=lambda size: memoryview(bytearray(size)),
            driver=types.SimpleNamespace(CUDADriverError=CUDADriverError),
            function=types.SimpleNamespace(Module=Module),
            memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            runtime=runtime,
        )
        self.asarray = np.array
        self.pooled = []  # memory that CuPy keeps for itself
        self.get_default_memory_pool = lambda: types.SimpleNamespace(free_all_blocks=self.pooled.clear)
        self.uncompiled = None  # what a RawKernel raises when it is compiled
        self.raw_kernels = []
        self._typed = typed
        self.__version__ = "14.2.0"

    def RawKernel(self, code, name, options=()):  # noqa: N802 (CuPy's)
        self.raw_kernels.append((code, name, options))
        kernel = RawKernel(code, name, options)

        def call(grid, block, args):
            assert (len(grid), len(block), self._streams[-1].ptr) == (3, 3, 0)
            self._typed(self.standin.launch, kernel, grid[0], block[0], args)

        def compile_it():
            if self.uncompiled is not None:
                raise self.uncompiled

        call.compile = compile_it
        return call

    def ndarray(self, shape, dtype, pointer):
        """Let a phase work on the memory itself, when all that is queued has happened."""
        memory, offset = pointer
        self.standin.synchronise()
        size = shape[0] * np.dtype(dtype).itemsize
        return self.standin.window(memory.buffer)[offset : offset + size].view(dtype)
