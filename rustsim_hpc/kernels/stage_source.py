"""Write the source of a stage's function: all its row kernels and reductions, tile by tile.

For each tile of rows that fits in the cache it runs a loop for each reduction and row kernel, or one loop for
several consecutive row kernels that only compute; then adds the digests of the columns that got their last
write of the step here, while the tile is still in cache. A stage that is one loop adds them in that loop,
where the arithmetic overlaps with loading the next rows. A loop indexes slices taken for the tile, from 0:
Numba and LLVM vectorise that, but not a loop over signed indices of whole columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from rustsim_hpc.kernels.column_sums import ColumnSums
from rustsim_hpc.kernels.compiling import STAGE_OPTIONS
from rustsim_hpc.kernels.draws import ready_draws
from rustsim_hpc.kernels.simple import is_one_loop, shares_loop
from rustsim_hpc.kernels.streaming import AHEAD, TOGETHER
from rustsim_hpc.modeling.model import DeviceFunction, Reduction, RowKernel
from rustsim_hpc.modeling.program import Binding, KernelOp, KernelStage, ReduceOp
from rustsim_hpc.state.schema import Schema

KEY_OUT_OF_RANGE, NOT_REPRESENTABLE, KEY_FROM_2_63 = 1, 2, 3
"""Codes in the first field of a stage's status (0: no failure)."""

FIXED = (
    "start", "stop", "first_row", "tile", "status", "times", "digests", "step", "ids", "repeat",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A variant of a stage's function; all variants do the same to the columns.

    Attributes:
        proved: it adds up the digests of columns that get their last write of the step.
        several: it makes several steps on a tile before the next tile.
        around: it writes rows around the cache, if the stage can (see :attr:`StageWriter.streams`).
    """

    proved: bool = False
    several: bool = False
    around: bool = False


@dataclass(frozen=True)
class Argument:
    """What one argument of a stage function, after the fixed ones, is bound to."""

    name: str
    source: str
    key: Any


def op_name(op: KernelOp | ReduceOp) -> str:
    """Return the name of the phase that an op stands for."""
    return op.kernel.name if isinstance(op, KernelOp) else op.reduction.name


class StageWriter:
    """Writes the source of one stage function."""

    def __init__(
        self, stage: KernelStage, variant: Variant, schema: Schema, *, default_ids: bool, checked: bool
    ) -> None:
        self.stage = stage
        self.variant = variant
        self.schema = schema
        self.default_ids = default_ids
        self.checked = checked
        self.arguments: dict[tuple[str, Any], Argument] = {}
        self.functions: dict[str, Any] = {}
        self.slices: list[tuple[int, int]] = []
        self.ready = 0
        self.made: dict[tuple[int, int], str] = {}
        self.place = "j"

    @property
    def one_loop(self) -> bool:
        """Whether the stage is a single loop, shared by all its kernels."""
        return is_one_loop(self.stage, checked=self.checked)

    @property
    def streams(self) -> bool:
        """Whether rows are written around the cache: one loop fills buffers that it does not read."""
        sides = [side for op in self.stage.ops if isinstance(op, KernelOp) for _, side in op.writes]
        return self.variant.around and not self.variant.several and self.one_loop and all(sides)

    @property
    def by_blocks(self) -> bool:
        """Whether the loop itself adds up digests; a tile is then one of the digest's blocks of rows."""
        wanted = self.variant.proved and bool(self.stage.digests)
        return wanted and not self.variant.several and self.one_loop

    def source(self) -> str:
        """Return the source of the module."""
        body = self._streaming(self.stage.ops) if self.streams else self._loops(self.stage.ops)
        if self.variant.several:
            # Later steps work on what the first has written.
            again = self._loops(self.stage.again)
            body += [
                "for later in range(1, repeat):",
                "    now_step = step + later",
                "    ustep = np.uint64(now_step)",
                *_inside(again),
            ]
        if self.variant.proved and not self.by_blocks:
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
            *(["from rustsim_hpc.kernels import hashing"] if self.by_blocks else []),
            *(["from rustsim_hpc.kernels import reduce"] if reduces else []),
            "from rustsim_hpc.kernels.clock import now",
            "from rustsim_hpc.kernels.convert import fits, stored",
            "from rustsim_hpc.kernels.far_call import far_call",
            *(["from rustsim_hpc.kernels import streaming"] if self.streams else []),
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
            *(["    streaming.streamed()"] if self.streams else []),
            "",
        ]
        return "\n".join(lines)

    # -- loops ---------------------------------------------------------------------------------------

    def _loops(self, ops: Sequence[KernelOp | ReduceOp]) -> list[str]:
        lines: list[str] = []
        for simple, group in groupby(ops, partial(shares_loop, checked=self.checked)):
            if simple:
                lines += self._shared_loop([op for op in group if isinstance(op, KernelOp)])
                continue
            for op in group:
                lines += self._kernel(op) if isinstance(op, KernelOp) else self._reduction(op)
        return lines

    def _shared_loop(self, ops: Sequence[KernelOp]) -> list[str]:
        """Return one loop that applies several kernels to each row; a column is stored once."""
        row = self._row(ops)
        row += [f"{_slice(c, s)}[j] = {value}" for (c, s), value in self.made.items()]
        row += [sums.add_row(self.made[where], "np.uint64(j)") for where, sums in self._sums()]
        self.made = {}
        loop = self._summed(["for j in range(hi - lo):", *_inside(row)])
        return [*_heading(ops), *loop, *_clock(*(op.phase for op in ops))]

    def _streaming(self, ops: Sequence[KernelOp | ReduceOp]) -> list[str]:
        """Return the same loop, with rows collected in scratch buffers and then written around the cache."""
        kernels = [op for op in ops if isinstance(op, KernelOp)]
        self.place = "np.int64(j)"
        row, self.place = self._row(kernels), "j"
        targets = {_slice(*where): self._scratch(where[0]) for where in self.made}
        sources = [_slice(*where) for where in self.slices if where not in self.made]
        row += [f"{self._scratch(c)}[k] = {value}" for (c, _), value in self.made.items()]
        self.made = {}
        words = [line for (c, _), sums in self._sums() for line in sums.add_words(self._scratch(c), "at")]
        some = [sums.add_row(f"{self._scratch(c)}[k]", "at + k") for (c, _), sums in self._sums()]
        loop = [
            "rows = np.uint64(hi - lo)",
            "at = np.uint64(0)",
            "while at < rows:",
            f"    past_line = (np.uint64(lo) + at) % np.uint64({TOGETHER})",
            f"    count = min(np.uint64({TOGETHER}) - past_line, rows - at)",
            *(f"    streaming.fetch_rows({source}, at + np.uint64({AHEAD}))" for source in sources),
            "    for k in range(count):",
            "        j = at + k",
            *_inside(row, 2),
            f"    if count == np.uint64({TOGETHER}):",
            *_inside(words, 2),
            *(
                f"        streaming.stream_rows({target}, at, {scratch})"
                for target, scratch in targets.items()
            ),
            "    else:",
            "        for k in range(count):",
            *(f"            {target}[at + k] = {scratch}[k]" for target, scratch in targets.items()),
            *_inside(some, 3),
            "    at += count",
        ]
        return [*_heading(kernels), *self._summed(loop), *_clock(*(op.phase for op in kernels))]

    def _sums(self) -> list[tuple[tuple[int, int], ColumnSums]]:
        """Return the columns and sides whose digests the loop itself adds up, and the lines that do it."""
        return [
            (where, ColumnSums(where[0], self._itemsize(where[0]), self._keys(where[0])))
            for where in (self.stage.digests if self.by_blocks else ())
        ]

    def _summed(self, loop: list[str]) -> list[str]:
        """Return a loop with the lines that its sums need before and after it."""
        sums = [sums for _, sums in self._sums()]
        head = ["in_block = np.uint64(base) % hashing.BLOCK_ROWS"] if sums else []
        return [*head, *(each.begin() for each in sums), *loop, *(each.end() for each in sums)]

    def _keys(self, column: int) -> str:
        return self._argument("digest_keys", column, f"dk{column}")

    def _itemsize(self, column: int) -> int:
        return np.dtype(self.schema.columns[column].dtype).itemsize

    def _row(self, ops: Sequence[KernelOp]) -> list[str]:
        """Return the lines of kernels for one row; ``made`` maps columns to the names of their new values."""
        lines = []
        for op in ops:
            call = self._call(op.phase, op.kernel, op.kernel.stream, op.reads)
            names = [f"v{op.phase}_{i}" for i in range(len(op.writes))]
            lines.append(f"{', '.join(names)} = {call}")
            for name, (column, side) in zip(names, op.writes, strict=True):
                lines.append(f"w{name} = stored({name}, {self._sliced(column, side)})")
                self.made[column, side] = f"w{name}"
        return lines

    def _scratch(self, column: int) -> str:
        return self._argument("scratch", column, f"t{column}")

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
        """Return the head of an op's loop, preceded by a call that computes its first uniform draws, if any.

        A loop of random bits alone is vectorised; the kernel's own loop, with its branches, often is not.
        """
        lines = [f"# {described.name}", f"status[1] = {op.phase}"]
        ready = ready_draws(described) if any(read.source == "rng" for read in op.reads) else 0
        key = self._argument("key", described.stream, self._key_name(described.stream)) if ready else ""
        ids = "no_ids" if self.default_ids else "tile_ids"
        if ready:
            far = self._argument("fill_bits", ready, f"fill_bits{ready}")
            bits = [self._argument("bits", draw, f"bits{draw}") for draw in range(ready)]
            lines += [f"u{draw} = {name}[: hi - lo]" for draw, name in enumerate(bits)]
            rows = f"base, {ids}, {ids}.size, ustep, u0, u{ready - 1}, hi - lo"
            lines.append(f"far_call({far}, ({key}, {rows}))")
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
            inner = self._add_keyed(op, value, f"reduce.add_histogram({state}, key)")
        elif reduction.key is not None:
            add = f"reduce.add_keyed_{reduction.kind}({state}, key, {value})"
            inner = self._add_keyed(op, self._key_call(op), add)
        else:
            inner = [f"reduce.add_{reduction.kind}({state}, {value})"]
        return [*lines, *(f"    {line}" for line in inner), *_clock(op.phase)]

    def _add_keyed(self, op: ReduceOp, key: str, add: str) -> list[str]:
        return [
            f"found = {key}",
            "key = np.int64(found)",
            f"if not {add} and status[0] == 0:",
            f"    status[0] = {KEY_FROM_2_63} if key < 0 and found > 0 else {KEY_OUT_OF_RANGE}",
            f"    status[2] = {op.phase}",
            "    status[3] = base + j; status[4] = key",
        ]

    def _digests(self) -> list[str]:
        lines = []
        for column, side in self.stage.digests:
            itemsize = self._itemsize(column)
            address = self._argument("digest", itemsize, f"digest{itemsize}")
            rows = f"{self._sliced(column, side)}, hi - lo, base"
            lines.append(
                f"digests[{column}] += far_call({address}, ({rows}, {self._keys(column)}, {column + 1}))"
            )
        return [*lines, *_clock(-1)]

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
            made = self.made.get((read.index, read.side))
            return made or f"{self._sliced(read.index, read.side)}[j]"
        if read.source == "step":
            return "now_step"
        if read.source == "row":
            return f"(base + {self.place})"
        if read.source == "id":
            return self._id()
        if read.source == "rng":
            key = self._argument("key", stream, self._key_name(stream))
            bits = "".join(f", u{draw}[j]" for draw in range(self.ready))
            return f"({key}, {self._id()}, ustep{bits})"
        return self._argument(read.source, read.argument, f"{read.source}_{read.argument}")

    def _id(self) -> str:
        return f"np.uint64(base + {self.place})" if self.default_ids else "tile_ids[j]"

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


def _heading(ops: Sequence[KernelOp]) -> list[str]:
    return [f"# {', '.join(op.kernel.name for op in ops)}", f"status[1] = {ops[0].phase}"]


def _inside(lines: Sequence[str], depth: int = 1) -> list[str]:
    return [f"{'    ' * depth}{line}" for line in lines]


def _clock(*phases: int) -> list[str]:
    """Return lines that count the time since the last ones, in equal shares for phases that share a loop."""
    first, *others = phases
    if not others:
        return ["tock = now()", f"times[{first}] += tock - clock", "clock = tock"]
    return [
        "tock = now()",
        f"share = (tock - clock) // {len(phases)}",
        f"times[{first}] += tock - clock - {len(others)} * share",
        *(f"times[{phase}] += share" for phase in others),
        "clock = tock",
    ]
