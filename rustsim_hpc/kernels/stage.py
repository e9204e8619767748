"""Make one compiled function of a stage: all its row kernels and reductions, tile by tile.

The source of the function is generated (and can be read in the cache folder). For each tile of rows that
fits in the cache it runs one loop for each row kernel and reduction, then adds the digests of the columns
that got their last write of the step here, while the tile is still in cache. A loop indexes slices taken for
the tile, from 0: Numba and LLVM vectorise that, and not a loop over signed positions in whole columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rustsim_hpc.errors import KernelError
from rustsim_hpc.kernels.compiling import (
    STAGE_OPTIONS,
    checking,
    compile_row_function,
    load_generated,
    one_compiler,
)
from rustsim_hpc.kernels.diagnose import explain
from rustsim_hpc.kernels.draws import ready_draws
from rustsim_hpc.model import DeviceFunction, Reduction, RowKernel
from rustsim_hpc.program import Binding, KernelOp, KernelStage, ReduceOp
from rustsim_hpc.schema import Schema
from rustsim_hpc.source_identity import function_identity

KEY_OUT_OF_RANGE, NOT_REPRESENTABLE = 1, 2
"""Codes in the first field of a stage's status (0: all is well)."""

FIXED = (
    "start", "stop", "first_row", "tile", "want_digest", "status", "times", "digests", "step", "ids",
    "repeat",
)  # fmt: skip


@dataclass(frozen=True)
class Argument:
    """What one argument of a stage function, after the fixed ones, is bound to."""

    name: str
    source: str
    key: Any


@dataclass
class StageFunction:
    """A stage ready to be called: ``function(*FIXED, *arguments)``.

    Attributes:
        stage: what it does.
        arguments: what it takes after the fixed arguments.
        module: the generated module with the function and the dispatchers of its row functions.
        path: the module's file.
        checked: with bounds checks.
    """

    stage: KernelStage
    arguments: tuple[Argument, ...]
    module: ModuleType
    path: Path
    checked: bool
    _dtypes: dict[tuple[Any, ...], dict[int, str]] = field(default_factory=dict)

    @property
    def draws(self) -> bool:
        """Whether it makes random numbers."""
        return any(argument.source == "key" for argument in self.arguments)

    @property
    def function(self) -> Any:
        """The compiled function (a Numba dispatcher)."""
        return self.module.stage

    def compile_for(self, values: Sequence[Any]) -> dict[int, str]:
        """Compile, or load from the disk cache, for the types of these arguments.

        Returns:
            For each reduction slot of the stage the dtype of the values that are reduced.

        Raises:
            KernelError: a row function does not compile; names phase, argument and line.
        """
        from numba import typeof

        signature = tuple(typeof(value) for value in values)
        if signature not in self._dtypes:
            self._dtypes[signature] = self._compile(signature)
        return self._dtypes[signature]

    def _compile(self, signature: tuple[Any, ...]) -> dict[int, str]:
        from numba.core.errors import NumbaError

        by_name = dict(zip((*FIXED, *(a.name for a in self.arguments)), signature, strict=True))
        with one_compiler(self.path) as notes, checking(checked=self.checked):
            name = str(signature)
            if name not in notes:
                # Nobody has compiled it yet: say what is wrong in the user's terms, not in Numba's.
                found = explain(self.stage, by_name, vars(self.module))
                notes[name] = {str(slot): dtype for slot, dtype in found.items()}
            try:
                if signature not in self.function.overloads:
                    self.function.compile(signature)
            except NumbaError as error:
                explain(self.stage, by_name, vars(self.module))
                names = ", ".join(op_name(op) for op in self.stage.ops)
                raise KernelError(f"phases {names} do not compile together: {error}") from error
            return {int(slot): dtype for slot, dtype in notes[name].items()}


def op_name(op: KernelOp | ReduceOp) -> str:
    """Return the name of the phase that an op stands for."""
    return op.kernel.name if isinstance(op, KernelOp) else op.reduction.name


def build_stage(stage: KernelStage, schema: Schema, *, default_ids: bool, checked: bool) -> StageFunction:
    """Generate and load the function of a stage (it is compiled at its first use)."""
    writer = _Writer(stage, schema, default_ids, checked)
    source = writer.source()
    # Machine code that is loaded again looks its functions' modules up by name.
    identity = "\n".join(f"{fn.__module__} {function_identity(fn)}" for fn in writer.functions.values())
    names: dict[str, Any] = {
        name: compile_row_function(fn, checked=checked) for name, fn in writer.functions.items()
    }
    module, path = load_generated(source, f"{identity}\n{checked}", names)
    return StageFunction(stage, tuple(writer.arguments.values()), module, path, checked)


class _Writer:
    """Writes the source of one stage function."""

    def __init__(self, stage: KernelStage, schema: Schema, default_ids: bool, checked: bool) -> None:
        self.stage = stage
        self.schema = schema
        self.default_ids = default_ids
        self.checked = checked
        self.arguments: dict[tuple[str, Any], Argument] = {}
        self.functions: dict[str, Any] = {}
        self.slices: list[tuple[int, int]] = []
        self.ready = 0

    def source(self) -> str:
        body = self._loops(self.stage.ops)
        if self.stage.again:
            # Several steps on a tile before the next tile: what the first has written, the others work on.
            again = self._loops(self.stage.again)
            body += [
                "for later in range(1, repeat):",
                "    now_step = step + later",
                "    ustep = np.uint64(now_step)",
                *(f"    {line}" for line in again),
            ]
        if self.stage.digests:
            body += self._digests()
        head = [f"{_slice(c, s)} = {self._column(c, s)}[lo:hi]" for c, s in self.slices]
        if self._uses_explicit_ids():
            head.append("tile_ids = ids[lo:hi]")
        options = ", ".join(f"{k}={v!r}" for k, v in (STAGE_OPTIONS | {"boundscheck": self.checked}).items())
        names = (*FIXED, *(a.name for a in self.arguments.values()))
        reduces = any(isinstance(op, ReduceOp) for op in self.stage.ops)
        lines = [
            f"# Stage of {', '.join(op_name(op) for op in self.stage.ops)} (generated by rustsim-hpc).",
            "import numpy as np",
            "from numba import njit",
            *(["from rustsim_hpc.kernels import reduce"] if reduces else []),
            "from rustsim_hpc.kernels.clock import now",
            "from rustsim_hpc.kernels.convert import fits, stored",
            "from rustsim_hpc.kernels.far_call import far_call",
            "",
            f"@njit({options})",
            f"def stage({', '.join(names)}):",
            "    no_ids = ids[:0]",
            "    clock = now()",
            "    lo = start",
            "    while lo < stop:",
            "        hi = min(stop, lo + tile - (first_row + lo) % tile)",
            "        base = first_row + lo",
            "        now_step = step",
            "        ustep = np.uint64(step)",
            *(f"        {line}" for line in head),
            *(f"        {line}" for line in body),
            "        lo = hi",
            "",
        ]
        return "\n".join(lines)

    # -- one loop an op ------------------------------------------------------------------------------

    def _loops(self, ops: Sequence[KernelOp | ReduceOp]) -> list[str]:
        lines: list[str] = []
        for op in ops:
            lines += self._kernel(op) if isinstance(op, KernelOp) else self._reduction(op)
        return lines

    def _kernel(self, op: KernelOp) -> list[str]:
        kernel = op.kernel
        call = self._call(op.phase, kernel, kernel.stream, op.reads)
        targets = [self._sliced(c, s) for c, s in op.writes]
        lines = self._loop(op, kernel)
        if len(targets) == 1:
            lines.append(f"    v0 = {call}")
        else:
            lines.append(f"    {', '.join(f'v{i}' for i in range(len(targets)))} = {call}")
        for i, (target, (column, _)) in enumerate(zip(targets, op.writes, strict=True)):
            lines += [f"    {line}" for line in self._store(target, f"v{i}", column, op.phase)]
        return [*lines, *_clock(op.phase)]

    def _loop(self, op: KernelOp | ReduceOp, described: RowKernel | Reduction) -> list[str]:
        """Return the head of an op's loop; its first uniform draws are made before, where it has any.

        A loop of random bits alone is vectorised, and the kernel's own loop, with its branches, often not.
        """
        lines = [f"# {described.name}", f"status[1] = {op.phase}"]
        ready = ready_draws(described) if any(read.source == "rng" for read in op.reads) else 0
        key = self._argument("key", described.stream, self._key_name(described.stream)) if ready else ""
        ids = "no_ids" if self.default_ids else "tile_ids"
        far = self._argument("fill_bits", "", "fill_bits") if ready else ""
        for draw in range(ready):
            self._argument("bits", draw, f"bits{draw}")
            lines += [
                f"u{draw} = bits{draw}[: hi - lo]",
                f"far_call({far}, ({key}, base, {ids}, {ids}.size, ustep, {draw}, u{draw}, hi - lo))",
            ]
        return [*lines, "for j in range(hi - lo):"]

    def _key_name(self, stream: str) -> str:
        known = self.arguments.get(("key", stream))
        return known.name if known else f"key{sum(k[0] == 'key' for k in self.arguments)}"

    def _store(self, target: str, value: str, column: int, phase: int) -> list[str]:
        store = f"{target}[j] = stored({value}, {target})"
        if not self.checked or np.dtype(self.schema.columns[column].dtype).kind not in "iu":
            return [store]
        return [
            f"if not fits({value}, {target}) and status[0] == 0:",
            f"    status[0] = {NOT_REPRESENTABLE}; status[2] = {phase}",
            f"    status[3] = base + j; status[4] = {column}",
            store,
        ]

    def _reduction(self, op: ReduceOp) -> list[str]:
        reduction = op.reduction
        value = self._call(op.phase, reduction, reduction.stream, op.reads)
        state = self._argument("state", op.slot, f"s{op.slot}")
        lines = self._loop(op, reduction)
        if reduction.kind == "histogram":
            inner = [f"key = np.int64({value})", *self._add_keyed(op, f"reduce.add_histogram({state}, key)")]
        elif reduction.key is not None:
            add = f"reduce.add_keyed_{reduction.kind}({state}, key, {value})"
            inner = [f"key = np.int64({self._key_call(op)})", *self._add_keyed(op, add)]
        else:
            inner = [f"reduce.add_{reduction.kind}({state}, {value})"]
        return [*lines, *(f"    {line}" for line in inner), *_clock(op.phase)]

    def _add_keyed(self, op: ReduceOp, add: str) -> list[str]:
        return [
            f"if not {add} and status[0] == 0:",
            f"    status[0] = {KEY_OUT_OF_RANGE}; status[2] = {op.phase}",
            "    status[3] = base + j; status[4] = key",
        ]

    def _digests(self) -> list[str]:
        lines = ["if want_digest:"]
        for column, side in self.stage.digests:
            keys = self._argument("digest_keys", column, f"dk{column}")
            itemsize = np.dtype(self.schema.columns[column].dtype).itemsize
            address = self._argument("digest", itemsize, f"digest{itemsize}")
            values = self._sliced(column, side)
            call = f"far_call({address}, ({values}, hi - lo, base, {keys}, {column + 1}))"
            lines.append(f"    digests[{column}] += {call}")
        return lines

    # -- arguments -----------------------------------------------------------------------------------

    def _call(
        self, phase: int, described: RowKernel | Reduction, stream: str, reads: Sequence[Binding]
    ) -> str:
        name = f"f{phase}"
        self.functions[name] = described.fn
        self.ready = ready_draws(described)
        return f"{name}({', '.join(self._value(read, stream) for read in reads)})"

    def _key_call(self, op: ReduceOp) -> str:
        key = op.reduction.key
        if isinstance(key, str):
            return self._value(op.key_reads[0], op.reduction.stream)
        name = f"f{op.phase}_key"
        self.ready = 0
        self.functions[name] = key.fn if isinstance(key, DeviceFunction) else key
        return f"{name}({', '.join(self._value(read, op.reduction.stream) for read in op.key_reads)})"

    def _value(self, read: Binding, stream: str) -> str:
        if read.source == "column":
            return f"{self._sliced(read.index, read.side)}[j]"
        if read.source == "step":
            return "now_step"
        if read.source == "row":
            return "(base + j)"
        if read.source == "id":
            return self._id()
        if read.source == "rng":
            key = self._argument("key", stream, self._key_name(stream))
            bits = "".join(f", u{draw}[j]" for draw in range(self.ready))
            return f"({key}, {self._id()}, ustep{bits})"
        return self._argument(read.source, read.argument, f"{read.source}_{read.argument}")

    def _id(self) -> str:
        return "np.uint64(base + j)" if self.default_ids else "tile_ids[j]"

    def _uses_explicit_ids(self) -> bool:
        reads = [r for op in self.stage.ops for r in (*op.reads, *getattr(op, "key_reads", ()))]
        return not self.default_ids and any(read.source in ("id", "rng") for read in reads)

    def _sliced(self, column: int, side: int) -> str:
        if (column, side) not in self.slices:
            self.slices.append((column, side))
            self._column(column, side)
        return _slice(column, side)

    def _column(self, column: int, side: int) -> str:
        return self._argument("column", (column, side), f"c{column}_{side}")

    def _argument(self, source: str, key: Any, name: str) -> str:
        return self.arguments.setdefault((source, key), Argument(name, source, key)).name


def _slice(column: int, side: int) -> str:
    return f"a{column}_{side}"


def _clock(phase: int) -> list[str]:
    return ["tock = now()", f"times[{phase}] += tock - clock", "clock = tock"]
