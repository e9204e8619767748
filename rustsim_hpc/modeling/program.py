"""Plan one step from a list of phases: segments, stages, and which buffers each one reads and writes.

A *stage* is consecutive row kernels and reductions that can share one pass over the tiles of rows. A
*segment* is what a partition can do before the ranks have to meet; it ends where a reduction's result or a
derived value is needed. Everything here is decided once, from names; nothing is compiled or run.

Buffers: under the rollback guard every column has two sides. The first phase of a step that writes a column
reads the *current* side (0) and fills the *other* (1); later phases of the step read and write the other
side; committing the step swaps them. Under the torn guard everything happens on the current side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rustsim_hpc.errors import ModelError
from rustsim_hpc.modeling.model import Check, ColumnPhase, Derive, Output, Phase, Reduction, RowKernel
from rustsim_hpc.modeling.names import Names, Source, made_names
from rustsim_hpc.modeling.observing import Intervals, is_due, observed_reductions
from rustsim_hpc.state.schema import Schema

OBSERVE = -1
"""Number of the segment that observes: reductions of checks and outputs over the new state, where due."""


@dataclass(frozen=True)
class Binding:
    """The source of one argument of a row function; ``index`` and ``side`` are those of a column."""

    argument: str
    source: Source
    index: int = -1
    side: int = 0


@dataclass(frozen=True)
class KernelOp:
    """One row kernel of a stage; ``writes`` are (column, side) pairs."""

    phase: int
    kernel: RowKernel
    reads: tuple[Binding, ...]
    writes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ReduceOp:
    """One reduction of a stage; ``slot`` numbers the program's reductions."""

    phase: int
    reduction: Reduction
    slot: int
    reads: tuple[Binding, ...]
    key_reads: tuple[Binding, ...]


@dataclass(frozen=True)
class KernelStage:
    """Row kernels and reductions that share one pass over the tiles.

    Attributes:
        ops: row kernels and reductions to run on a tile, in order.
        digests: the columns, with their side, whose last write of the step is in this stage.
        again: ops of a second step on the same tile, which reads what the first has written; empty if the
            ranks have to meet between steps.
    """

    ops: tuple[KernelOp | ReduceOp, ...]
    digests: tuple[tuple[int, int], ...] = ()
    again: tuple[KernelOp, ...] = ()


@dataclass(frozen=True)
class ColumnCall:
    """One column phase.

    ``sides``: the side of each column that it sees. ``fill``: columns that must first be copied from the
    current side to the other. ``writable``: for each column whether it may change it.
    """

    phase: int
    column_phase: ColumnPhase
    sides: tuple[int, ...]
    fill: tuple[int, ...]
    writable: tuple[bool, ...]
    digests: tuple[tuple[int, int], ...] = ()


Item = KernelStage | ColumnCall


@dataclass(frozen=True)
class Segment:
    """What a partition does between two meetings of the ranks, and what the meeting then computes.

    Attributes:
        items: stages and column phases, in order.
        reductions: slots whose results are complete after this segment.
        derives: phases (index, Derive) computed from them, in order.
    """

    items: tuple[Item, ...]
    reductions: tuple[int, ...] = ()
    derives: tuple[tuple[int, Derive], ...] = ()


@dataclass(frozen=True)
class Observation:
    """The reductions of checks and outputs that are due at the same steps, as a segment of one stage."""

    every: Intervals
    segment: Segment


@dataclass(frozen=True)
class Program:
    """The plan of one step.

    Attributes:
        schema: the columns.
        phase_names: names of the phases in order; reductions of checks and outputs follow the model's phases.
        phase_count: number of the model's phases.
        segments: the step, in order.
        observations: the reductions of checks and outputs over the new state, by when they are due.
        reductions: all reductions by slot.
        written: columns that a step writes.
        swapped: columns whose sides are swapped on commit (none under the torn guard).
        final_sides: for each column the side that holds its new values before the commit.
        partition_bound: names of column phases that do not promise to be row-local.
    """

    schema: Schema
    phase_names: tuple[str, ...]
    phase_count: int
    segments: tuple[Segment, ...]
    observations: tuple[Observation, ...]
    reductions: tuple[Reduction, ...]
    written: tuple[int, ...]
    swapped: tuple[int, ...]
    final_sides: tuple[int, ...]
    partition_bound: tuple[str, ...]

    @property
    def repeatable(self) -> bool:
        """Whether several steps can be made on a tile before the next tile."""
        first = self.segments[0].items
        return len(first) == 1 and isinstance(first[0], KernelStage) and bool(first[0].again)

    def segment(self, number: int, step: int) -> Segment | None:
        """Return a segment by its number; for `OBSERVE` what is due after ``step`` steps, None if nothing is.

        What is due together is one segment, so that the ranks meet once. Its stages are the same objects in
        each combination: none is compiled twice.
        """
        if number != OBSERVE:
            return self.segments[number]
        due = tuple(k for k, each in enumerate(self.observations) if is_due(each.every, step))
        if due and due not in self._combined:
            parts = [self.observations[k].segment for k in due]
            items = tuple(item for part in parts for item in part.items)
            slots = tuple(slot for part in parts for slot in part.reductions)
            self._combined.setdefault(due, Segment(items, slots))  # one object, whichever thread asks first
        return self._combined.get(due)

    @cached_property
    def _combined(self) -> dict[tuple[int, ...], Segment]:
        return {}

    @cached_property
    def model_phases(self) -> tuple[str, ...]:
        """Names of the model's phases, without the reductions of checks and outputs."""
        return self.phase_names[: self.phase_count]


def plan_program(
    schema: Schema,
    phases: Sequence[Phase],
    *,
    two_sided: bool,
    params: Iterable[str] = (),
    texts: Iterable[str] = (),
    tables: Iterable[str] = (),
    checks: Sequence[Check] = (),
    outputs: Sequence[Output] = (),
) -> Program:
    """Plan one step of ``phases`` over ``schema``.

    Args:
        two_sided: write to the other side (the rollback guard) or in place (torn).
        params, tables: names that row functions and derived values can bind.
        texts: parameters that are text, which only derived values can bind.
        checks, outputs: their reductions become ``observations``.

    Raises:
        ModelError: an argument or column does not exist, a name is ambiguous, or a value is read before it
            is made.
    """
    known = Names(schema.names, tuple(params), tuple(texts), tuple(tables), made_names(phases))
    planner = _Planner(schema, two_sided, known)
    for phase in phases:
        planner.add(phase)
    return planner.finish(observed_reductions(checks, outputs))


class _Planner:
    """Walks the phases once, tracking which columns are written and which values exist so far."""

    def __init__(self, schema: Schema, two_sided: bool, known: Names) -> None:
        self.schema = schema
        self.two_sided = two_sided
        self.known = known
        self.sides = [0] * len(schema.columns)
        self.written: set[int] = set()
        self.pending: list[int] = []
        self.pending_names: set[str] = set()
        self.names: list[str] = []
        self.reductions: list[Reduction] = []
        self.stage: list[KernelOp | ReduceOp] = []
        self.items: list[Item] = []
        self.segments: list[Segment] = []
        self.partition_bound: list[str] = []

    # -- one phase after the other -------------------------------------------------------------------

    def add(self, phase: Phase) -> None:
        index = len(self.names)
        self.names.append(phase.name)
        if isinstance(phase, RowKernel):
            self._add_kernel(index, phase)
        elif isinstance(phase, Reduction):
            self._add_reduction(index, phase)
        elif isinstance(phase, Derive):
            self._add_derive(index, phase)
        else:
            self._add_column_phase(index, phase)

    def _add_kernel(self, index: int, kernel: RowKernel) -> None:
        self._meet_if_needed(kernel.arguments)
        reads = self._bind(kernel, kernel.arguments, kernel.fn)
        writes = [self.known.column(kernel, name) for name in kernel.writes]
        for column in writes:
            self._mark_written(column)
        self.stage.append(KernelOp(index, kernel, reads, tuple((c, self.sides[c]) for c in writes)))

    def _add_reduction(self, index: int, reduction: Reduction) -> None:
        self._meet_if_needed((*reduction.arguments, *reduction.key_arguments))
        slot = len(self.reductions)
        self.reductions.append(reduction)
        reads = self._bind(reduction, reduction.arguments, reduction.fn)
        keyed = self._bind(reduction, reduction.key_arguments, reduction.fn)
        self.stage.append(ReduceOp(index, reduction, slot, reads, keyed))
        self.pending.append(slot)
        self.pending_names.add(reduction.name)

    def _add_derive(self, index: int, derive: Derive) -> None:
        self.known.check_derivable(derive, self.pending_names)
        if not self.segments or self.stage or self.items or self.pending:
            self._close_segment()
        last = self.segments[-1]
        self.segments[-1] = replace(last, derives=(*last.derives, (index, derive)))
        self.known.ready.update(derive.names)

    def _add_column_phase(self, index: int, phase: ColumnPhase) -> None:
        if self.pending:
            self._close_segment()
        self._close_stage()
        count = len(self.schema.columns)
        targets = (
            tuple(range(count))
            if phase.writes is None
            else tuple(self.known.column(phase, name) for name in phase.writes)
        )
        fill = tuple(c for c in targets if self.two_sided and c not in self.written)
        for column in targets:
            self._mark_written(column)
        writable = tuple(c in targets for c in range(count))
        self.items.append(ColumnCall(index, phase, tuple(self.sides), fill, writable))
        if not phase.row_local:
            self.partition_bound.append(phase.name)

    def finish(self, observed: Mapping[Reduction, Intervals]) -> Program:
        if self.stage or self.items or self.pending or not self.segments:
            self._close_segment()
        phase_count = len(self.names)
        segments = tuple(self.segments)
        observations = self._observations(observed)
        return Program(
            schema=self.schema,
            phase_names=tuple(self.names),
            phase_count=phase_count,
            segments=_with_repeats(_with_digests(segments, self.written, self.sides), self.sides),
            observations=observations,
            reductions=tuple(self.reductions),
            written=tuple(sorted(self.written)),
            swapped=tuple(c for c, side in enumerate(self.sides) if side),
            final_sides=tuple(self.sides),
            partition_bound=tuple(self.partition_bound),
        )

    def _observations(self, observed: Mapping[Reduction, Intervals]) -> tuple[Observation, ...]:
        first = len(self.segments)
        for reduction in observed:
            if reduction.name in self.known.made or reduction.name in self.names:
                raise ModelError(
                    f'reduction "{reduction.name}" of a check or output has the name of another phase',
                    hint="a phase's result is of the middle of the step; for the new state declare a "
                    'reduction of another name, with name="…"',
                )
            self.known.made[reduction.name] = reduction.name
            self.add(reduction)
        if len(self.segments) != first:
            raise ModelError("a reduction of a check or output cannot read another one's result")
        together: dict[Intervals, list[ReduceOp]] = {}
        for op in self.stage:
            if isinstance(op, ReduceOp):
                together.setdefault(observed[op.reduction], []).append(op)
        return tuple(
            Observation(every, Segment((KernelStage(tuple(ops)),), tuple(op.slot for op in ops)))
            for every, ops in together.items()
        )

    # -- closing stages and segments -----------------------------------------------------------------

    def _meet_if_needed(self, arguments: tuple[str, ...]) -> None:
        if self.pending_names.intersection(arguments):
            self._close_segment()

    def _close_stage(self) -> None:
        if self.stage:
            self.items.append(KernelStage(tuple(self.stage)))
            self.stage = []

    def _close_segment(self) -> None:
        self._close_stage()
        self.segments.append(Segment(tuple(self.items), tuple(self.pending)))
        self.known.ready |= self.pending_names
        self.items, self.pending, self.pending_names = [], [], set()

    def _mark_written(self, column: int) -> None:
        self.written.add(column)
        if self.two_sided:
            self.sides[column] = 1

    # -- names ---------------------------------------------------------------------------------------

    def _bind(self, phase: Phase, arguments: tuple[str, ...], fn: Callable[..., Any]) -> tuple[Binding, ...]:
        return tuple(self._bind_one(phase, name, fn) for name in arguments)

    def _bind_one(self, phase: Phase, name: str, fn: Callable[..., Any]) -> Binding:
        source = self.known.source(phase, name, fn)
        if source != "column":
            return Binding(name, source)
        column = self.schema.index(name)
        return Binding(name, source, column, self.sides[column])


def _with_digests(
    segments: tuple[Segment, ...], written: set[int], sides: Sequence[int]
) -> tuple[Segment, ...]:
    """Assign to each item the columns whose last write is in it, to be digested while in cache."""
    left = set(written)
    done = []
    for segment in reversed(segments):
        items: list[Item] = []
        for item in reversed(segment.items):
            if isinstance(item, KernelStage):
                wrote = {c for op in item.ops if isinstance(op, KernelOp) for c, _ in op.writes}
            else:
                wrote = {c for c, may in enumerate(item.writable) if may}
            mine = sorted(wrote & left)
            left -= wrote
            items.append(replace(item, digests=tuple((c, sides[c]) for c in mine)))
        done.append(replace(segment, items=tuple(reversed(items))))
    return tuple(reversed(done))


def _with_repeats(segments: tuple[Segment, ...], sides: Sequence[int]) -> tuple[Segment, ...]:
    """Let a program that is a single stage of only row kernels make several steps on a tile."""
    if len(segments) != 1 or len(segments[0].items) != 1 or segments[0].derives:
        return segments
    stage = segments[0].items[0]
    if not isinstance(stage, KernelStage):
        return segments
    kernels = [op for op in stage.ops if isinstance(op, KernelOp)]
    if len(kernels) != len(stage.ops):
        return segments
    again = tuple(
        replace(
            op,
            reads=tuple(replace(r, side=sides[r.index]) if r.source == "column" else r for r in op.reads),
            writes=tuple((column, sides[column]) for column, _ in op.writes),
        )
        for op in kernels
    )
    return (replace(segments[0], items=(replace(stage, again=again),)),)
