"""What the partitions of a rank share while they run: the bound program, the state, and a board of results.

:class:`Work` holds what does not change between steps; :class:`Frame` holds the inputs of one step;
:class:`Board` holds what partitions report (fixed arrays, in shared memory where workers are processes).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from rustsim_hpc.errors import InvalidConfig, RustsimError
from rustsim_hpc.modeling.names import AGENTS
from rustsim_hpc.modeling.params import Params
from rustsim_hpc.modeling.program import Program
from rustsim_hpc.random import key_of
from rustsim_hpc.state.memory import ColumnMemory
from rustsim_hpc.state.partition import PartitionAssignment, PartitionExecutionBackend, PartitionId

Array = np.ndarray[Any, Any]

MAX_SUMMED_ROWS = 2**31 - 1
"""Most rows that a partition's exact sum can add without carrying between limbs (kernels/exact_sum.py)."""

MIN_TILE = 4096
MAX_TILE = 65536
_DEFAULT_L2 = 1 << 20

_CACHES_TO_STREAM = 4
"""A partition larger than this many level-2 caches is written with non-temporal stores. The next step would
still find a smaller one in the cache."""


@dataclass(frozen=True)
class Task:
    """One partition of this rank: its assignment (global rows), backend and rows in the rank's arrays."""

    assignment: PartitionAssignment
    backend: PartitionExecutionBackend
    start: int
    stop: int


@dataclass
class Work:
    """A program bound to a rank's state.

    Attributes:
        program: the plan of one step.
        memory: the rank's columns.
        ids: explicit row ids, uint64 (rows,), or None for the default (the global row).
        first_row: global row of the rank's row 0.
        total_rows: rows of the whole population.
        tasks: the rank's partitions, in order.
        params, tables, seed: what the model is bound to.
        checked: compile with bounds and conversion checks.
        tile_rows: rows of a tile, a power of two of at least 4096, or 0 to size it from the cache.
        model: reference by which a worker process loads the phases, or None for phases that are closures.
    """

    program: Program
    memory: ColumnMemory
    ids: Array | None
    first_row: int
    total_rows: int
    tasks: tuple[Task, ...]
    params: Params = field(default_factory=lambda: Params({}))
    tables: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    checked: bool = False
    tile_rows: int = 0
    model: Any = None

    @cached_property
    def tile(self) -> int:
        """Rows of a tile: as many as keep all columns of the tile in half of the level-2 cache."""
        if self.tile_rows:
            return self.tile_rows
        # 16 for random bits that are made a tile at a time.
        row_bytes = 16 + 2 * sum(np.dtype(column.dtype).itemsize for column in self.memory.schema.columns)
        rows = level_two_cache() // 2 // max(row_bytes, 1)
        return min(MAX_TILE, max(MIN_TILE, 1 << max(rows, 1).bit_length() - 1))

    @cached_property
    def bins(self) -> tuple[int, ...]:
        """Number of bins of each reduction slot; 0 for a single value."""
        return tuple(reduction.bin_count(self.params) for reduction in self.program.reductions)

    @property
    def scalars(self) -> dict[str, Any]:
        """What single values bind to: the parameters, and ``agents`` unless a parameter has that name."""
        return {AGENTS: np.int64(self.total_rows), **self.params}

    def streams(self, task: Task) -> bool:
        """Return whether a partition is large enough for its stages to write around the cache."""
        row_bytes = 2 * sum(np.dtype(column.dtype).itemsize for column in self.memory.schema.columns)
        return row_bytes * (task.stop - task.start) > _CACHES_TO_STREAM * level_two_cache()

    def stream_key(self, stream: str) -> int:
        """Return the Philox key of a random stream."""
        return _stream_key(self.seed, stream)


_stream_key = lru_cache(maxsize=1024)(key_of)


def require_partitions_that_add_up(work: Work) -> None:
    """Raise InvalidConfig if a partition has more rows than the state of an exact sum can take."""
    sums = [reduction.name for reduction in work.program.reductions if reduction.kind == "sum"]
    largest = max((task.stop - task.start for task in work.tasks), default=0)
    if sums and largest > MAX_SUMMED_ROWS:
        raise InvalidConfig(
            f"a partition of {largest} rows is too large for the exact sum {sums[0]}",
            hint=f"use more partitions: at most {MAX_SUMMED_ROWS} rows each",
        )


def level_two_cache() -> int:
    """Return the size of the level-2 cache in bytes (1 MiB where the system does not say)."""
    try:
        size = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (ValueError, OSError):
        size = 0
    return size if size > 0 else _DEFAULT_L2


@dataclass
class Frame:
    """The inputs of one step, beside the partitions' :class:`Work`.

    Attributes:
        step_index: index before the step.
        want_digest: add up the digests of the columns that are written.
        repeat: number of steps; more than one only if the program is repeatable.
        values: results of reductions and derived values so far.
    """

    step_index: int
    want_digest: bool = False
    repeat: int = 1
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PhaseFailure:
    """One partition's failure, as picklable data.

    ``kind`` is "phase" for an error that a phase raised and "worker" for anything else that ended its
    worker (a dead process, an exception that is not an ``Exception``). ``phase_index`` is the phase's
    position in the program, None if unknown. ``error`` is set if the phase raised a typed error of this
    package (a kernel that does not compile). ``hint`` says what to do, if known.
    """

    partition: PartitionId
    worker: str | None
    phase_index: int | None
    phase: str
    message: str
    kind: str = "phase"
    trace: str = ""
    rank: int = 0
    host: str = ""
    pid: int = 0
    error: RustsimError | None = None
    hint: str | None = None


class PhaseTrace(Exception):
    """The traceback of a phase's exception as text: the exception may have been raised in another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


PANICKED = "partition worker thread panicked"
"""Message of a failure that was not an ``Exception``, such as SystemExit in a phase."""

STATUS_FIELDS = 5
"""int64 fields of a stage's status: code, phase that runs, phase that failed, global row, offending value."""


class Board:
    """What partitions report, one row each: status, time of each phase, column digests, reduction states.

    Attributes:
        status: int64 (tasks, 5).
        times: int64 (tasks, phases + 1), nanoseconds of the current step; the last is for digests in stages.
        digests: uint64 (tasks, columns), sums mod 2^64 over the partition's rows.
        codes: int64 (tasks, slots), dtype of the values that each slot reduces, as an index of ``DTYPES``.
        states: for each reduction slot int64 (tasks, …), in the layout of :mod:`rustsim_hpc.kernels.reduce`.
    """

    def __init__(self, tasks: int, program: Program, state_shapes: Sequence[tuple[int, ...]]) -> None:
        self.layout = self._layout(tasks, program, state_shapes)
        self._place(np.zeros(self.layout[-1][1] // 8, np.int64))

    @staticmethod
    def _layout(
        tasks: int, program: Program, state_shapes: Sequence[tuple[int, ...]]
    ) -> list[tuple[tuple[int, ...], int]]:
        """Return (shape, end offset in bytes) of each array; they are contiguous and 64-byte aligned."""
        shapes: list[tuple[int, ...]] = [
            (tasks, STATUS_FIELDS),
            (tasks, len(program.phase_names) + 1),
            (tasks, max(1, len(program.schema.columns))),
            (tasks, max(1, len(program.reductions))),
            *((tasks, *shape) for shape in state_shapes),
        ]
        layout, end = [], 0
        for shape in shapes:
            end += -(-8 * int(np.prod(shape)) // 64) * 64
            layout.append((shape, end))
        return layout

    def _place(self, words: Array) -> None:
        arrays, start = [], 0
        for shape, end in self.layout:
            arrays.append(words[start // 8 :][: int(np.prod(shape))].reshape(shape))
            start = end
        self.status, self.times = arrays[0], arrays[1]
        self._sums = words[self.layout[0][1] // 8 : self.layout[2][1] // 8]
        self.digests = arrays[2].view(np.uint64)
        self.codes = arrays[3]
        self.states = tuple(arrays[4:])

    def clear(self) -> None:
        """Set times and digests to 0, at the start of a step."""
        self._sums.fill(0)

    @property
    def nbytes(self) -> int:
        """Size of the board's arrays in bytes."""
        return self.layout[-1][1]

    def move_to(self, words: Array) -> None:
        """Let the board use given memory (int64, ``nbytes`` long) and its present content."""
        self._place(words)
