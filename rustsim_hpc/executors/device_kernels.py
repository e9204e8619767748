"""Call a user's kernels of CuPy for a partition: each parameter bound to what its name says."""

from __future__ import annotations

from typing import Any

import numpy as np

from rustsim_hpc.executors.work import Work
from rustsim_hpc.kernels.cuda_stage import BLOCK
from rustsim_hpc.modeling.device_kernel import DeviceKernel, KernelParameter
from rustsim_hpc.state.device import Device
from rustsim_hpc.state.partition import PartitionExecutionContext


class DeviceKernels:
    """The kernels that users gave for phases, on one device.

    Args:
        device: where.
        work: the program's parameters and tables.
        fma: let source be compiled with fused products and sums.
    """

    def __init__(self, device: Device, work: Work, *, fma: bool) -> None:
        self._device, self._work, self._fma = device, work, fma
        self._made: dict[int, Any] = {}
        self._tables: dict[str, Any] = {}

    def call(self, kernel: DeviceKernel, context: PartitionExecutionContext, columns: Any) -> None:
        """Queue a kernel on the current stream, a thread for each row at least.

        Raises:
            TypeError: a result has another type than the kernel takes.
            KeyError: a parameter is the name of nothing.
        """
        rows = context.row_end - context.row_start
        values = [self._value(parameter, kernel, context, columns) for parameter in kernel.parameters]
        if not rows:
            return
        if kernel.elementwise:
            kernel.made(*values)
            return
        if id(kernel) not in self._made:
            self._made[id(kernel)] = kernel.made or self._device.raw_kernel(
                kernel.code, kernel.name, fma=self._fma
            )
        self._made[id(kernel)]((-(-rows // BLOCK),), (BLOCK,), tuple(values))

    def _value(
        self,
        parameter: KernelParameter,
        kernel: DeviceKernel,
        context: PartitionExecutionContext,
        columns: Any,
    ) -> Any:
        name, work = parameter.name, self._work
        places = {"rows": context.row_end - context.row_start, "row_start": context.row_start}
        places["step"] = context.step_index
        if name in work.memory.schema.names:
            return columns[name]
        if name in places:
            return np.int64(places[name])
        if name in work.params:
            return np.asarray(work.params[name])[()]
        if name in work.tables:
            if name not in self._tables:
                self._tables[name] = self._device.array(work.tables[name])
            return self._tables[name]
        if name not in context.reductions:
            raise KeyError(
                f"kernel {kernel.name} takes {name}, which is no column, parameter, table or result"
            )
        value = np.asarray(context.reductions[name])
        if parameter.dtype is not None and np.dtype(parameter.dtype) != value.dtype:
            raise TypeError(
                f"kernel {kernel.name} takes {name} as {parameter.dtype}, and it is {value.dtype}"
            )
        if not kernel.elementwise and parameter.array != (value.ndim > 0):
            raise TypeError(
                f"kernel {kernel.name} takes {name} as {'an array' if parameter.array else 'a number'}"
            )
        return self._device.array(value) if value.ndim else value[()]
