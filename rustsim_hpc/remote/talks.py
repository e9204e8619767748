"""The conversations by which a client opens, loads, runs and fetches partitions that a worker holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rustsim_hpc.errors import KernelError
from rustsim_hpc.executors.work import Board, PhaseFailure, Task, Work
from rustsim_hpc.proof.fingerprint import digest_column
from rustsim_hpc.remote.identity import work_identity
from rustsim_hpc.remote.link import Link, Talk
from rustsim_hpc.remote.messages import (
    Frame,
    Malformed,
    Message,
    arrays_of,
    chunks,
    packed,
    packed_params,
)
from rustsim_hpc.state.schema import DTYPES
from rustsim_hpc.texts import MESSAGE_CHARS, shown, shown_lines
from rustsim_hpc.version import __version__

Array = np.ndarray[Any, Any]

_IDS = -1


@dataclass(frozen=True)
class Opening:
    """What a worker has to know about consecutive partitions before it gets their rows.

    Attributes:
        work: the program, its parameters, tables and seed; its memory is not used.
        tasks: the partitions, one after the other.
        model: SHA-256 of the model's source file.
        phases: names of the phases to run.
        observers: whether checks' and outputs' reductions are part of the program.
        two_sided: whether steps write to the other side.
        ids: uint64 (rows,), or None for the default ones.
    """

    work: Work
    tasks: Sequence[Task]
    model: str
    phases: Sequence[str]
    observers: bool
    two_sided: bool
    ids: Array | None

    @property
    def first_row(self) -> int:
        """Global row of the first one."""
        return self.tasks[0].assignment.row_start

    @property
    def rows(self) -> int:
        """Rows of all the partitions."""
        return self.tasks[-1].assignment.row_end - self.first_row

    def request(self, link: Link, endpoint: str) -> Message:
        """Return the request that opens the session."""
        work, assignments = self.work, [task.assignment for task in self.tasks]
        return link.ask(
            "open",
            package=__version__,
            model=self.model,
            identity=work_identity(work),
            phases=list(self.phases),
            observers=self.observers,
            columns=[[column.name, column.dtype] for column in work.program.schema.columns],
            params=packed_params(work.params.plain()),
            seed=int(work.seed),
            first_row=self.first_row,
            rows=self.rows,
            total_rows=work.total_rows,
            ids=self.ids is not None,
            two_sided=self.two_sided,
            checked=work.checked,
            tile_rows=work.tile_rows,
            endpoint=endpoint,
            tasks=[[a.partition_id.value, a.worker, a.row_start, a.row_end] for a in assignments],
        )


def open_talk(link: Link, opening: Opening, endpoint: str) -> Talk[Mapping[str, Any]]:
    """Open a session; return what the worker reports about its machine."""
    answer = yield opening.request(link, endpoint)
    return answer.fields


def load_talk(
    link: Link, ids: Array | None, columns: Sequence[Array], first_row: int, step: int
) -> Talk[None]:
    """Send ids and columns as the state of a step, and verify that they arrived unchanged."""
    wanted = [0 if ids is None else digest_column(ids, first_row, 0)]
    wanted += [digest_column(column, first_row, place + 1) for place, column in enumerate(columns)]
    sources = [*([(_IDS, ids)] if ids is not None else []), *enumerate(columns)]
    for place, source in sources:
        for start, stop in chunks(len(source), source.itemsize):
            yield link.ask("load", [packed(source[start:stop])], column=place, start=start, stop=stop)
    answer = yield link.ask("begin", step=step)
    [digests] = arrays_of(answer.data, [(np.uint64, (len(wanted),))])
    if digests.tolist() != wanted:
        raise Malformed("the digests of a state that is not what was sent")


def fetch_talk(
    link: Link,
    columns: Sequence[tuple[int, np.dtype[Any]]],
    rows: int,
    first_row: int,
    *,
    step: int,
    side: int,
) -> Talk[list[list[Array]]]:
    """Fetch columns of the state of a step, in pieces; each is verified by its digest."""
    fetched = []
    for column, dtype in columns:
        pieces = []
        for start, stop in chunks(rows, dtype.itemsize):
            answer = yield link.ask("fetch", step=step, side=side, column=column, start=start, stop=stop)
            [piece] = arrays_of(answer.data, [(dtype, (stop - start,))])
            if digest_column(piece, first_row + start, column + 1) != answer.fields["digest"]:
                raise Malformed(f"rows of column {column} that are not those of their digest")
            pieces.append(piece)
        fetched.append(pieces)
    return fetched


def hash_talk(link: Link, step: int, side: int, column: int, *, other: bool, state: int) -> Talk[int]:
    """Continue a FNV-1a chain over a column; return its new state."""
    answer = yield link.ask("hash", step=step, side=side, column=column, other=other, state=state)
    return int(answer.fields["state"])


def digest_of_pieces(pieces: Sequence[Array], first_row: int, column: int) -> int:
    """Return the digest of a column that came in pieces, a sum mod 2^64."""
    total = 0
    for piece in pieces:
        total += digest_column(piece, first_row, column + 1)
        first_row += len(piece)
    return total % 2**64


@dataclass(frozen=True)
class Reports:
    """What a worker reports about a segment; arrays as on a board, one row a partition."""

    times: Array
    digests: Array
    codes: Array
    states: tuple[Array, ...]
    failures: tuple[PhaseFailure, ...]
    compile_seconds: float


def run_talk(
    link: Link,
    work: Work,
    board: Board,
    tasks: Sequence[Task],
    slots: Sequence[int],
    data: Sequence[Frame],
    fields: dict[str, Any],
) -> Talk[Reports]:
    """Run a segment on partitions.

    Args:
        link: the session.
        work: the program.
        board: a board of the program, for the shapes of what is reported.
        tasks: the session's partitions, in order.
        slots: reductions that the segment makes.
        data, fields: of the request "run".
    """
    answer = yield link.ask("run", data, **fields)
    return _reports(answer, work, board, tasks, slots)


def _reports(
    answer: Message, work: Work, board: Board, tasks: Sequence[Task], slots: Sequence[int]
) -> Reports:
    count = len(tasks)
    wanted = [board.times, board.digests, board.codes, *(board.states[slot] for slot in slots)]
    shapes = [(array.dtype, (count, *array.shape[1:])) for array in wanted]
    times, digests, codes, *states = arrays_of(answer.data, shapes)
    if times.min(initial=0) < 0 or codes.min(initial=0) < 0 or codes.max(initial=0) >= len(DTYPES):
        raise Malformed("times below zero, or dtypes that there are not")
    failures = tuple(_failure(told, work, tasks) for told in answer.fields["failures"])
    seconds = answer.fields["compile_ns"] / 1e9
    return Reports(times, digests, codes, tuple(states), failures, seconds)


def _failure(told: Sequence[Any], work: Work, tasks: Sequence[Task]) -> PhaseFailure:
    place, phase, kind, message, trace, host, pid, known = told
    names = work.program.phase_names
    if place >= len(tasks) or (phase is not None and phase >= len(names)):
        raise Malformed("a failure of a partition or phase that there is not")
    assignment = tasks[place].assignment
    error = None
    if known is not None:
        text, kernel, argument, file, line = known
        error = KernelError(text, kernel=kernel, argument=argument, file=file, line=line)
    return PhaseFailure(
        partition=assignment.partition_id,
        worker=assignment.worker,
        phase_index=phase,
        phase="" if phase is None else names[phase],
        message=shown(message, MESSAGE_CHARS),
        kind=kind,
        trace=shown_lines(trace),
        host=shown(host),
        pid=pid,
        error=error,
    )
