"""Build one CUDA kernel from a stage: a grid-stride loop in which each row passes through all phases.

Where the CPU goes tile by tile, a device thread takes a row through every row kernel and reduction of the
stage, and through the following steps if several are made at once: one launch, and no column is read or
written twice. Accumulators are integers, so the bits are the CPU's for any grid.
"""

from __future__ import annotations

import dis
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numba import typeof, types
from numba.np import numpy_support

from rustsim_hpc.errors import KernelError
from rustsim_hpc.kernels.compiling import checking, compile_row_function
from rustsim_hpc.kernels.cuda_compile import Image, compile_ptx
from rustsim_hpc.kernels.diagnose import explain
from rustsim_hpc.kernels.stage_source import op_name
from rustsim_hpc.modeling.model import DeviceFunction, Reduction, RowKernel
from rustsim_hpc.modeling.program import Binding, KernelOp, KernelStage, ReduceOp
from rustsim_hpc.modeling.signatures import where
from rustsim_hpc.modeling.source_identity import function_identity
from rustsim_hpc.state.schema import Schema

BLOCK = 256
"""Threads of a block."""

FIXED = ("rows", "first_row", "clock", "replicas", "tile", "failed", "values", "digests", "ids")
"""Names of the first arguments of a stage, described at `CudaStage`."""

NEVER = np.iinfo(np.int64).max
"""Value of `failed` if no row has failed."""


@dataclass(frozen=True)
class DeviceArray:
    """A C-ordered array on a device: address, shape, dtype."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    writable: bool = True

    @property
    def words(self) -> list[Any]:
        """The array as Numba's kernels take it, in 64-bit words: no meminfo, no parent, then its layout."""
        strides, step = [], self.dtype.itemsize
        for length in reversed(self.shape):
            strides.append(step)
            step *= length
        size = int(np.prod(self.shape))
        words = (0, 0, size, self.dtype.itemsize, self.address, *self.shape, *reversed(strides))
        return [np.uint64(word) for word in words]

    @property
    def kind(self) -> Any:
        """Its Numba type."""
        item = numpy_support.from_dtype(self.dtype)
        return types.Array(item, max(1, len(self.shape)), "C", readonly=not self.writable)


@dataclass(frozen=True)
class Argument:
    """What an argument after the fixed ones is bound to."""

    name: str
    source: str
    key: Any


@dataclass(frozen=True)
class Trouble:
    """The first failure in the order of the CPU: index of the op in its stage, global row."""

    place: int
    row: int


class CudaStage:
    """A stage of a program as a CUDA kernel.

    The fixed arguments: number of rows, global row of the first one, `clock` int64 (3,): step index, number
    of steps, whether to digest (0 or 1); number of replicas of the accumulators, rows of the CPU's tiles;
    `failed` int64 (1,), the first failure (see :meth:`trouble`); `values` int64 (threads,), the value that
    failed first in each thread; `digests` uint64 (replicas * columns,); `ids` uint64, empty for default ids.

    Attributes:
        source: the generated source.
        arguments: arguments after the fixed ones.
        numbers: names of those that are scalars made by the step, passed as arrays of one item.
        can_fail: whether a row can fail: a key out of range, or a value that does not fit its column.
        draws: whether it draws random numbers.
        dtypes: for each reduction slot the dtype of the values that are reduced.

    Raises:
        KernelError: a row function does not compile, or contains ``raise`` or ``assert``.
    """

    def __init__(
        self,
        stage: KernelStage,
        schema: Schema,
        kinds: Callable[[Argument], Any],
        *,
        default_ids: bool,
        checked: bool,
    ) -> None:
        writer = _Writer(stage, schema, default_ids, checked)
        self.stage = stage
        self.checked = checked
        self.source = writer.source({})  # a first pass, to collect the arguments
        self.functions = writer.functions
        self.arguments = tuple(writer.arguments.values())
        self.draws = any(argument.source == "key" for argument in self.arguments)
        for fn in self.functions.values():
            refuse_raising(fn)
        self.dtypes = self._explain(kinds)
        values = {a.name: kinds(a) for a in self.arguments if a.source == "value"}
        self.numbers = {name for name, kind in values.items() if not isinstance(kind, types.Array)}
        self.source = writer.source(self.dtypes, self.numbers)
        self.can_fail = writer.can_fail

    def _explain(self, kinds: Callable[[Argument], Any]) -> dict[int, str]:
        """Compile the row functions for the CPU, to find their return types or report their errors."""
        with checking(checked=False):
            functions = {name: compile_row_function(fn, checked=False) for name, fn in self.functions.items()}
            return explain(self.stage, {a.name: kinds(a) for a in self.arguments}, functions)

    def trouble(self, failed: int, tile: int, repeat: int) -> Trouble:
        """Decode a word of `failed`, which is made of tile, step, op and row of the tile, in this order."""
        failed, row = divmod(failed, tile)
        failed, place = divmod(failed, len(self.stage.ops))
        return Trouble(place, failed // repeat * tile + row)

    @property
    def identity(self) -> str:
        """Text that covers everything that the kernel's meaning depends on."""
        parts = [f"{fn.__module__} {function_identity(fn)}" for fn in self.functions.values()]
        return hashlib.sha256("\n".join([self.source, *parts]).encode()).hexdigest()

    def python(self, names: dict[str, Any]) -> Callable[..., None]:
        """Return the stage as a Python function over given globals."""
        namespace = dict(names)
        exec(compile(self.source, "<stage>", "exec"), namespace)  # noqa: S102 (our own text)
        function: Callable[..., None] = namespace["stage"]
        return function

    def image(self, values: Sequence[Any], capability: tuple[int, int], *, fma: bool = False) -> Image:
        """Compile for these arguments (scalars and :class:`DeviceArray`) and a compute capability.

        Raises:
            KernelError: it does not compile, or there is no compiler.
        """
        from numba import cuda

        from rustsim_hpc.kernels.cuda_bodies import cuda_names

        names = cuda_names()
        names |= {name: cuda.jit(fn, device=True) for name, fn in self.functions.items()}
        signature = [kind_of(value) for value in values]
        phases = ", ".join(op_name(op) for op in self.stage.ops) or "a digest"
        return compile_ptx(
            self.python(names), signature, capability, identity=self.identity, what=phases, fma=fma
        )


def kind_of(value: Any) -> Any:
    """Return the Numba type of an argument: a scalar or a :class:`DeviceArray`."""
    return value.kind if isinstance(value, DeviceArray) else typeof(value)


def flat_arguments(values: Sequence[Any]) -> list[Any]:
    """Return a stage's arguments as its kernel takes them: NumPy scalars."""
    flat: list[Any] = []
    for value in values:
        flat += value.words if isinstance(value, DeviceArray) else [np.asarray(value)[()]]
    return flat


def refuse_raising(fn: Any, seen: tuple[Any, ...] = ()) -> None:
    """Refuse a row function that raises: a device cannot raise, and would silently continue.

    Raises:
        KernelError: it, or a helper that it names, has a ``raise`` or ``assert``.
    """
    plain = fn.fn if isinstance(fn, DeviceFunction) else fn
    for at in dis.get_instructions(plain):
        if at.opname == "RAISE_VARARGS":
            raise KernelError(
                f"{plain.__name__} ({where(plain)}) raises, which a kernel on a CUDA device cannot",
                hint="return a value that says so, and look for it with a reduction or rs.check",
            )
    for helper in _helpers_of(plain):
        if helper.fn not in seen:
            refuse_raising(helper, (*seen, plain))


def _helpers_of(plain: Any) -> list[DeviceFunction]:
    names = plain.__code__.co_names
    known = [plain.__globals__.get(name) for name in names]
    known += [cell.cell_contents for cell in plain.__closure__ or ()]
    modules = [value for value in known if isinstance(value, ModuleType)]
    known += [getattr(module, name, None) for module in modules for name in names]
    return [value for value in known if isinstance(value, DeviceFunction)]


class _Writer:
    """Writes the source of one stage."""

    def __init__(self, stage: KernelStage, schema: Schema, default_ids: bool, checked: bool) -> None:
        self.stage = stage
        self.schema = schema
        self.default_ids = default_ids
        self.checked = checked
        self.arguments: dict[tuple[str, Any], Argument] = {}
        self.functions: dict[str, Any] = {}
        self.can_fail = False
        self.dtypes: dict[int, str] = {}
        self.head: list[str] = []
        self.tail: list[str] = []

    def source(self, dtypes: dict[int, str], numbers: Collection[str] = ()) -> str:
        self.dtypes = dtypes
        self.head, self.tail, self.can_fail = [], [], False
        body = self._ops(self.stage.ops)
        if self.stage.again:
            body += [
                "for later in range(np.int64(1), repeat):",
                "    now_step = step + later",
                "    ustep = np.uint64(now_step)",
                *(f"    {line}" for line in self._ops(self.stage.again)),
            ]
        body += self._digests()
        if self.can_fail:
            self.head.append(f"worst = np.int64({NEVER})")
            self.tail += [f"if worst != {NEVER}:", "    least_word(failed, 0, worst)"]
        self.head += [f"{name} = {name}_at[0]" for name in sorted(numbers)]
        names = [*FIXED, *(a.name + "_at" * (a.name in numbers) for a in self.arguments.values())]
        return "\n".join(
            [
                f"def stage({', '.join(names)}):",
                "    thread = np.int64(cuda.grid(1))",
                "    threads = np.int64(cuda.gridsize(1))",
                "    step, repeat, want_digest = clock[0], clock[1], clock[2]",
                f"    replica = (thread // {BLOCK}) % replicas",
                *(f"    {line}" for line in self.head),
                "    i = thread",
                "    while i < rows:",
                "        row = first_row + i",
                f"        row_id = {'np.uint64(row)' if self.default_ids else 'ids[i]'}",
                "        now_step = step",
                "        ustep = np.uint64(step)",
                "        later = np.int64(0)",
                *(f"        {line}" for line in body),
                "        i += threads",
                *(f"    {line}" for line in self.tail),
                "",
            ]
        )

    def _ops(self, ops: Sequence[KernelOp | ReduceOp]) -> list[str]:
        lines: list[str] = []
        for place, op in enumerate(ops):
            lines += self._kernel(place, op) if isinstance(op, KernelOp) else self._reduction(place, op)
        return lines

    # -- row kernels ---------------------------------------------------------------------------------

    def _kernel(self, place: int, op: KernelOp) -> list[str]:
        call = self._call(op.phase, op.kernel, op.reads)
        names = [f"v{k}" for k in range(len(op.writes))]
        lines = [f"# {op.kernel.name}", f"{', '.join(names)} = {call}"]
        for name, (column, side) in zip(names, op.writes, strict=True):
            target = self._column(column, side)
            if self.checked and np.dtype(self.schema.columns[column].dtype).kind in "iu":
                lines += [f"if not fits({name}, {target}):", *self._fail(place, f"np.int64({column})")]
            lines.append(f"{target}[i] = stored({name}, {target})")
        return lines

    def _fail(self, place: int, value: str) -> list[str]:
        """Return lines that record the failure that the CPU, going tile by tile, would meet first."""
        self.can_fail = True
        ops = len(self.stage.ops)
        return [
            f"    fault = ((row // tile * repeat + later) * {ops} + {place}) * tile + row % tile",
            "    if fault < worst:",
            "        worst = fault",
            f"        values[thread] = {value}",
        ]

    # -- reductions ----------------------------------------------------------------------------------

    def _reduction(self, place: int, op: ReduceOp) -> list[str]:
        reduction, slot = op.reduction, op.slot
        state = self._argument("state", slot, f"s{slot}")
        lines = [f"# {reduction.name}", f"value = {self._call(op.phase, reduction, op.reads)}"]
        room = self._argument("room", slot, f"room{slot}")
        self.head.append(f"at{slot} = replica * {room}")
        if reduction.kind == "histogram":
            return lines + self._keyed(place, op, "np.int64(value)", [f"add_word({state}, at, np.int64(1))"])
        if reduction.key is None:
            return lines + self._unkeyed(op, state)
        add = [f"{self._sum_body(slot)}({state}, at, value)"]
        if reduction.kind == "count":
            add = ["if value != 0:", f"    add_word({state}, at, np.int64(1))"]
        return lines + self._keyed(place, op, f"np.int64({self._key_call(op)})", add)

    def _sum_body(self, slot: int) -> str:
        return "sum_float" if np.dtype(self.dtypes.get(slot, "float64")).kind == "f" else "sum_integer"

    def _keyed(self, place: int, op: ReduceOp, key: str, add: list[str]) -> list[str]:
        bins = self._argument("bins", op.slot, f"bins{op.slot}")
        width = f"({self._argument('room', op.slot, f'room{op.slot}')} // {bins})"
        return [
            f"key = {key}",
            f"if 0 <= key < {bins}:",
            f"    at = at{op.slot} + key * {width}",
            *(f"    {line}" for line in add),
            "else:",
            *self._fail(place, "key"),
        ]

    def _unkeyed(self, op: ReduceOp, state: str) -> list[str]:
        slot, kind = op.slot, op.reduction.kind
        if kind == "sum":
            return [f"{self._sum_body(slot)}({state}, at{slot}, value)"]
        if kind == "count":  # in a register until the thread's last row
            self.head.append(f"n{slot} = np.int64(0)")
            self.tail.append(f"add_word({state}, at{slot}, n{slot})")
            return [f"n{slot} += np.int64(value != 0)"]
        limit = "2**63 - 1" if kind == "min" else "-(2**63)"
        body, sign = ("least_word", "-") if kind == "min" else ("most_word", "")
        self.head += [f"n{slot} = np.int64({limit})", f"nan{slot} = np.int64(0)"]
        self.tail += [f"{body}({state}, at{slot}, n{slot})", f"{body}({state}, at{slot} + 1, nan{slot})"]
        return [
            f"n{slot} = {kind}(n{slot}, sort_key(value))",
            f"nan{slot} = {kind}(nan{slot}, {sign}np.int64(value != value))",
        ]

    # -- digests -------------------------------------------------------------------------------------

    def _digests(self) -> list[str]:
        lines = []
        for column, side in self.stage.digests:
            keys = self._argument("digest_keys", column, f"dk{column}")
            wide = np.dtype(self.schema.columns[column].dtype).itemsize == 8
            array = self._column(column, side)
            self.head.append(f"d{column} = np.uint64(0)")
            self.tail += [
                "if want_digest:",
                f"    add_word(digests, replica * {len(self.schema.columns)} + {column}, d{column})",
            ]
            item = f"load_item({array}, np.uint64(i))"
            lines.append(f"    d{column} += digest_item({item}, np.uint64(row), {keys}, "
                         f"np.uint64({column + 1}), {wide})")  # fmt: skip
        return ["if want_digest:", *lines] if lines else []

    # -- arguments -----------------------------------------------------------------------------------

    def _call(self, phase: int, described: RowKernel | Reduction, reads: Sequence[Binding]) -> str:
        self.functions[f"f{phase}"] = described.fn
        return f"f{phase}({', '.join(self._value(read, described.stream) for read in reads)})"

    def _key_call(self, op: ReduceOp) -> str:
        key = op.reduction.key
        if isinstance(key, str):
            return self._value(op.key_reads[0], op.reduction.stream)
        self.functions[f"f{op.phase}_key"] = key.fn if isinstance(key, DeviceFunction) else key
        reads = (self._value(read, op.reduction.stream) for read in op.key_reads)
        return f"f{op.phase}_key({', '.join(reads)})"

    def _value(self, read: Binding, stream: str) -> str:
        match read.source:
            case "column":
                return f"{self._column(read.index, read.side)}[i]"
            case "step":
                return "now_step"
            case "row":
                return "row"
            case "id":
                return "row_id"
            case "rng":
                known = self.arguments.get(("key", stream))
                name = known.name if known else f"key{sum(k[0] == 'key' for k in self.arguments)}"
                return f"({self._argument('key', stream, name)}, row_id, ustep)"
        return self._argument(read.source, read.argument, f"{read.source}_{read.argument}")

    def _column(self, column: int, side: int) -> str:
        return self._argument("column", (column, side), f"c{column}_{side}")

    def _argument(self, source: str, key: Any, name: str) -> str:
        return self.arguments.setdefault((source, key), Argument(name, source, key)).name
