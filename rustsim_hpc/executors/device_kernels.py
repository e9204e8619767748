"""Call a user's CuPy kernels for a partition, with parameters bound by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from rustsim_hpc.executors.device_partition import Partition
from rustsim_hpc.executors.device_queue import Piece
from rustsim_hpc.executors.work import Frame
from rustsim_hpc.kernels.cuda_stage import BLOCK
from rustsim_hpc.modeling.device_kernel import DeviceKernel, KernelParameter
from rustsim_hpc.modeling.device_random import RNG, source_with_random
from rustsim_hpc.modeling.program import ColumnCall
from rustsim_hpc.random import MAX_STEP
from rustsim_hpc.state.partition import PartitionExecutionContext


class DeviceKernels:
    """The user's kernels of one partition's phases.

    Args:
        partition: the partition, whose values the parameters are bound to.
    """

    def __init__(self, partition: Partition) -> None:
        self._own = partition
        self._made: dict[int, Any] = {}
        self._tables: dict[str, Any] = {}

    # -- CUDA C: a plain launch, which a graph can record --------------------------------------------

    def prepare(self, kernel: DeviceKernel, call: ColumnCall, frame: Frame) -> Piece:
        """Upload what a kernel takes, and return its launch.

        The piece has no key if the kernel takes a value that changes from step to step by value.

        Raises:
            TypeError: a result has another type than the kernel takes.
            KeyError: a parameter has an unknown name.
            ValueError: the step index is too large for random numbers.
        """
        own = self._own
        values = [self._word(parameter, kernel, call, frame) for parameter in kernel.parameters]
        if id(kernel) not in self._made:
            self._made[id(kernel)] = kernel.made or own.device.raw_kernel(
                source_with_random(kernel.code), kernel.name, fma=own.fma
            )
        blocks = -(-own.rows // BLOCK)
        of_step = [p for p in kernel.parameters if p.dtype != RNG and self._is_of_the_step(p.name)]
        stays = all(p.array for p in of_step)
        key = (id(kernel), *(value.tobytes() for value in values)) if stays else None
        launch = partial(own.device.launch, self._made[id(kernel)], blocks, BLOCK, values)
        return Piece((call.phase,), launch, key, moves=any(p.name != "step" for p in of_step))

    def _is_of_the_step(self, name: str) -> bool:
        work = self._own.work
        fixed = (*work.memory.schema.names, "rows", "row_start", *work.params, *work.tables)
        return name not in fixed

    def _word(self, parameter: KernelParameter, kernel: DeviceKernel, call: ColumnCall, frame: Frame) -> Any:
        """Return a parameter's value: an address (uint64), or a number."""
        name, own, work = parameter.name, self._own, self._own.work
        schema = work.memory.schema
        if parameter.dtype == RNG:
            return np.uint64(self._rng(call, frame))
        if name in schema.names:
            column = schema.index(name)
            return np.uint64(own.columns.of(column, call.sides[column]).address)
        if name == "step":
            return np.uint64(own.clock.address) if parameter.array else np.int64(frame.step_index)
        if name in ("rows", "row_start"):
            return np.int64(own.rows if name == "rows" else work.first_row + own.task.start)
        if name in work.params:
            return np.asarray(work.params[name])[()]
        if name in work.tables:
            table = np.asarray(work.tables[name])
            return np.uint64(own.kept(("table", name), table).address) if table.ndim else table[()]
        value = _result(parameter, kernel, frame.values)
        if value.ndim:
            return np.uint64(own.kept(("value", name), value, frame).address)
        return np.uint64(own.number(name, value.dtype).address) if parameter.array else value[()]

    def _rng(self, call: ColumnCall, frame: Frame) -> int:
        """Return the address of a phase's stream: its key, first row, and addresses of ids and step index."""
        own, work, stream = self._own, self._own.work, call.column_phase.stream
        if frame.step_index > MAX_STEP:
            raise ValueError(f"step {frame.step_index}: random numbers reach up to step {MAX_STEP}")
        ids = 0 if work.ids is None else own.columns.ids.address
        words = [work.stream_key(stream), work.first_row + own.task.start, ids, own.clock.address]
        return own.kept(("rng", stream), np.array(words, np.uint64)).address

    # -- ElementwiseKernel: CuPy calls it with arrays ------------------------------------------------

    def call(self, kernel: DeviceKernel, context: PartitionExecutionContext, columns: Any) -> None:
        """Call an ElementwiseKernel on the current stream.

        Raises:
            TypeError: a result has another type than the kernel takes.
            KeyError: a parameter has an unknown name.
        """
        values = [self._value(parameter, kernel, context, columns) for parameter in kernel.parameters]
        if self._own.rows:
            kernel.made(*values)

    def _value(
        self,
        parameter: KernelParameter,
        kernel: DeviceKernel,
        context: PartitionExecutionContext,
        columns: Any,
    ) -> Any:
        name, own, work = parameter.name, self._own, self._own.work
        places = {"rows": own.rows, "row_start": context.row_start, "step": context.step_index}
        if name in work.memory.schema.names:
            return columns[name]
        if name in places:
            return np.int64(places[name])
        if name in work.params:
            return np.asarray(work.params[name])[()]
        if name in work.tables:
            if name not in self._tables:
                self._tables[name] = own.device.array(work.tables[name])
            return self._tables[name]
        value = _result(parameter, kernel, context.reductions)
        return own.device.array(value) if value.ndim else value[()]


def _result(parameter: KernelParameter, kernel: DeviceKernel, results: Any) -> Any:
    """Return a result of the step (an array of any number of dimensions) that a kernel takes by its name.

    Raises:
        TypeError: it has another type than the kernel takes.
        KeyError: there is none of that name.
    """
    name = parameter.name
    if name not in results:
        raise KeyError(f"kernel {kernel.name} takes {name}, which is no column, parameter, table or result")
    value = np.asarray(results[name])
    if parameter.dtype is not None and np.dtype(parameter.dtype) != value.dtype:
        raise TypeError(f"kernel {kernel.name} takes {name} as {parameter.dtype}, and it is {value.dtype}")
    if not kernel.elementwise and value.ndim and not parameter.array:
        raise TypeError(f"kernel {kernel.name} takes {name} as a number, and it is an array")
    return value
