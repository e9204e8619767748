"""Partitions that stay with remote workers between steps, seen from the control plane."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from rustsim_hpc.errors import ExecutorError, Worker
from rustsim_hpc.executors.base import OBSERVE
from rustsim_hpc.executors.work import Frame, PhaseFailure, Work
from rustsim_hpc.modeling.reductions import new_board
from rustsim_hpc.proof.fingerprint import fnv1a_bytes
from rustsim_hpc.remote.journal import Journal, StepMade, make_again
from rustsim_hpc.remote.keys import ClientKeys
from rustsim_hpc.remote.link import Link, LinkError, Patience, Talk, converse
from rustsim_hpc.remote.messages import Malformed
from rustsim_hpc.remote.share import Share, failure_of, model_of, warn_of_differences
from rustsim_hpc.remote.talks import (
    Opening,
    Reports,
    digest_of_pieces,
    fetch_talk,
    hash_talk,
    load_talk,
    open_talk,
    run_talk,
    value_fields,
)

Array = np.ndarray[Any, Any]

_JOURNAL_BYTES = 64 << 20


class RemoteSession:
    """A rank's partitions on remote workers; the columns here lag behind, and are brought up on demand.

    While workers hold the state, this session keeps it (see :class:`~rustsim_hpc.state.memory.Keeper`). A
    worker is told of a commit by the side that the next request calls the current one. Of a worker that is
    lost, the rows are made again here, from the state that was here last and the values of the steps since.

    Args:
        work: the bound program.
        shares: its partitions by worker.
        keys: None for workers on the loopback.
        patience: how long to wait.
        keep_steps: steps after which the state is brought here without being asked for.

    Raises:
        ExecutorError: the phases are not those of a model that workers could have.
    """

    def __init__(
        self,
        work: Work,
        shares: Sequence[Share],
        *,
        keys: ClientKeys | None,
        patience: Patience,
        keep_steps: int,
    ) -> None:
        self.work = work
        self.board = new_board(work)
        self.compile_seconds = 0.0
        self._model = model_of(work).sha256
        self._shares = list(shares)
        self._keys, self._patience, self._keep_steps = keys, patience, keep_steps
        self._links: dict[int, Link] = {}
        # A plane that is dropped without being closed must not leave its connections behind.
        self._end = weakref.finalize(self, _hang_up, self._links)
        self._journal = Journal()
        self._made: StepMade | None = None
        self._step = 0
        self._attempt = 0
        self._values: dict[str, Any] | None = None
        self._sent: dict[str, Any] = {}
        self._lost = ""
        active = [place for place, segment in enumerate(work.program.segments) if segment.items]
        self._first, self._last = (active[0], active[-1]) if active else (0, 0)

    # -- a segment -----------------------------------------------------------------------------------

    def run(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """Run one segment on every partition; returns when all workers have answered or are given up."""
        program = self.work.program
        items = program.observe if segment == OBSERVE else program.segments[segment]
        if items is None or not items.items:
            return []
        failures = self._prepare(segment, frame)
        if failures:
            return failures
        try:
            fields, data = self._request(segment, frame)
        except LinkError as error:
            return [failure_of(share.blame(error)) for share in self._shares]
        talks: list[tuple[Link, Talk[Reports]]] = []
        for share in self._shares:
            own = fields | {"side": self._side() ^ share.base}
            link = self._links[share.places.start]
            talks.append(
                (link, run_talk(link, self.work, self.board, share.tasks, items.reductions, data, own))
            )
        results = converse(talks)
        failures = [
            found
            for pair in zip(self._shares, results, strict=True)
            for found in self._take(*pair, items.reductions)
        ]
        if not failures and segment == self._last:
            self._made = StepMade(frame.step_index, frame.repeat, self._side(), frame.values)
            for share in self._shares:
                digests = self.board.digests[share.places.start : share.places.stop].sum(axis=0)
                share.promise = (self._made.after, digests.tolist()) if frame.want_digest else None
        return failures

    def _request(self, segment: int, frame: Frame) -> tuple[dict[str, Any], list[Any]]:
        """Return the fields and frames of a request: the values are those that workers do not know yet."""
        if segment == self._first:
            self._attempt += 1
        afresh = frame.values is not self._values
        if afresh:
            self._values, self._sent = frame.values, {}
        news = {name: value for name, value in frame.values.items() if self._sent.get(name) is not value}
        values, data = value_fields(news)
        self._sent = dict(frame.values)
        fields = {
            "step": frame.step_index,
            "segment": segment,
            "attempt": self._attempt,
            "repeat": frame.repeat,
            "want_digest": bool(frame.want_digest),
            "afresh": afresh,
            "values": values,
        }
        return fields, data

    def _take(
        self, share: Share, result: Reports | LinkError, slots: Sequence[int]
    ) -> Sequence[PhaseFailure]:
        if isinstance(result, LinkError):
            self._give_up(share)
            return [failure_of(share.blame(result))]
        places = slice(share.places.start, share.places.stop)
        self.board.times[places] = result.times
        self.board.digests[places] = result.digests
        self.board.codes[places] = result.codes
        for slot, states in zip(slots, result.states, strict=True):
            self.board.states[slot][places] = states
        self.compile_seconds = max(self.compile_seconds, result.compile_seconds)
        if result.failures and not self.work.program.swapped:
            self._give_up(share)  # its rows are half made, in place
        return result.failures

    # -- where the state is --------------------------------------------------------------------------

    def _side(self) -> int:
        """Return the parity of the columns that a step swaps; 0 where it swaps none."""
        swapped = self.work.program.swapped
        return int(self.work.memory.parity[swapped[0]]) if swapped else 0

    def _prepare(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """See to it that every worker holds the state that a segment sets out from."""
        memory, swapped = self.work.memory, self.work.program.swapped
        made = self._made
        if segment == OBSERVE and not (
            made is not None and made.after == frame.step_index and made.side == self._side()
        ):
            # The stepper has put the current state where an observation looks for the next one.
            memory.swap(swapped)
            try:
                return self._ready(frame.step_index)
            finally:
                memory.swap(swapped)
        return self._ready(frame.step_index) if segment == self._first else []

    def _ready(self, step: int) -> list[PhaseFailure]:
        self._settle(step)
        if self.work.memory.keeper is not self:
            self._start_over(step)
        try:
            if len(self._journal) >= self._keep_steps or self._journal.nbytes > _JOURNAL_BYTES:
                self.refresh()
            missing = [share for share in self._shares if not share.loaded]
            for share in missing:
                self._make_again(share)
        except ExecutorError as error:
            return [failure_of(error.source)]
        failures = self._load(missing) if missing else []
        if not failures:
            self.work.memory.keeper = self
        return failures

    def _start_over(self, step: int) -> None:
        """Begin with the state that is here; what workers hold is void."""
        self._journal.clear()
        self._made, self._step, self._lost = None, step, ""
        for share in self._shares:
            share.loaded = False
            share.home, share.home_side = step, self._side()

    def _settle(self, step: int | None = None) -> None:
        """Find out whether the last step was committed; ``step``: the next one, None between steps."""
        made = self._made
        if made is None:
            return
        if self.work.program.swapped:
            committed = made.side != self._side()
        else:
            committed = step is None or step == made.after
        if committed:
            if self.work.program.written:
                self._journal.add(made)
            self._step = made.after
        if committed or step is not None:
            self._made = None

    def refresh(self) -> None:
        """Bring the columns here up to date with the last committed step.

        Raises:
            ExecutorError: a worker is lost, and its rows cannot be made again.
        """
        self._settle()
        behind = [share for share in self._shares if share.home != self._step]
        if not behind or not self.work.program.written:
            return
        memory, reach = self.work.memory, [share for share in behind if share.loaded]
        talks = [(self._links[share.places.start], self._fetching(share)) for share in reach]
        for share, result in zip(reach, converse(talks), strict=True):
            if isinstance(result, LinkError):
                self._give_up(share)
                continue
            for column, pieces in zip(self.work.program.written, result, strict=True):
                target = memory.array(column, int(memory.parity[column]))[share.rows]
                np.concatenate([target[:0], *pieces], out=target)
            share.home, share.home_side = self._step, self._side()
        for share in behind:
            self._make_again(share)
        self._journal.clear()

    def _fetching(self, share: Share) -> Talk[list[list[Array]]]:
        work, rows = self.work, share.rows
        columns = [(column, work.memory.schema.dtypes[column]) for column in work.program.written]
        fetched = yield from fetch_talk(
            self._links[share.places.start],
            columns,
            rows.stop - rows.start,
            share.first_row,
            step=self._step,
            side=self._side() ^ share.base,
        )
        if share.promise is not None and share.promise[0] == self._step:
            for (column, _), pieces in zip(columns, fetched, strict=True):
                if digest_of_pieces(pieces, share.first_row, column) != share.promise[1][column]:
                    raise Malformed("rows that are not those whose digests it has reported")
        return fetched

    def _make_again(self, share: Share) -> None:
        """Make the rows of a share up to the last committed step, from those that are here."""
        if self._lost:
            raise ExecutorError(Worker(share.tasks[0].assignment.partition_id, self._lost))
        if share.home == self._step or not self.work.program.written:
            return
        memory, keeper = self.work.memory, self.work.memory.keeper
        now = memory.parity.copy()
        if share.home_side != self._side():
            memory.swap(self.work.program.swapped)
        memory.keeper = None  # here the columns are to be worked on
        try:
            make_again(self.work, share.places, self._journal.since(share.home))
        except ExecutorError as error:
            self._lost = error.source.message if isinstance(error.source, Worker) else str(error)
            raise
        finally:
            memory.keeper = keeper
            memory.parity[:] = now
        share.home, share.home_side = self._step, self._side()

    def fnv1a(self, state: int, column: int, *, other: bool) -> int:
        """Carry a FNV-1a chain on over the rows of a column of the state that was made last.

        Raises:
            ExecutorError: a worker is lost.
        """
        memory, made = self.work.memory, self._made
        step = self._step if made is None else made.after
        for share in self._shares:
            if column not in self.work.program.written:  # it never leaves
                array = memory.array(column, int(memory.parity[column]))
                state = fnv1a_bytes(state, array[share.rows])
                continue
            link = share.link
            if link is None:
                raise ExecutorError(share.blame(LinkError("is lost")))
            talk = hash_talk(link, step, self._side() ^ share.base, column, other=other, state=state)
            [result] = converse([(link, talk)])
            if isinstance(result, LinkError):
                self._give_up(share)
                raise ExecutorError(share.blame(result))
            state = result
        return state

    # -- workers come and go -------------------------------------------------------------------------

    def _load(self, shares: Sequence[Share]) -> list[PhaseFailure]:
        """Open sessions for shares and send them their rows."""
        self._values = None
        talks = []
        for share in shares:
            fresh = share.link is None
            link = share.link or Link(share.address, self._keys, self._patience)
            share.link = self._links[share.places.start] = link
            share.base = self._side()
            talks.append((link, self._loading(share, link, fresh=fresh)))
        results = converse(talks)
        failures = []
        for share, result in zip(shares, results, strict=True):
            if isinstance(result, LinkError):
                self._give_up(share)
                failures.append(failure_of(share.blame(result)))
                continue
            share.loaded = True
            if result is not None:
                warn_of_differences(share.address.endpoint, result)
        return failures

    def _loading(self, share: Share, link: Link, *, fresh: bool) -> Talk[dict[str, str] | None]:
        work, rows, memory = self.work, share.rows, self.work.memory
        ids = None if work.ids is None else work.ids[rows]
        facts = None
        if fresh:
            facts = yield from open_talk(link, self._opening(share, ids), share.endpoint)
        columns = [
            memory.array(column, int(memory.parity[column]))[rows] for column in range(len(memory.schema))
        ]
        yield from load_talk(link, ids, columns, share.first_row, self._step)
        return facts

    def _opening(self, share: Share, ids: Array | None) -> Opening:
        program = self.work.program
        return Opening(
            work=self.work,
            tasks=share.tasks,
            model=self._model,
            phases=program.phase_names[: program.phase_count],
            observers=True,
            two_sided=bool(program.swapped),
            ids=ids,
        )

    def _give_up(self, share: Share) -> None:
        """Let go of a worker; another session is begun when it is needed again."""
        share.loaded = False
        self._links.pop(share.places.start, None)
        if share.link is not None:
            share.link.close(politely=True)
            share.link = None

    def close(self) -> None:
        """Bring the state here and end the sessions; calling it again does nothing."""
        try:
            if self.work.memory.keeper is self:
                self.work.memory.take_back()
        finally:
            for share in self._shares:
                self._give_up(share)


def _hang_up(links: dict[int, Link]) -> None:
    for link in links.values():
        link.close(politely=True)
    links.clear()
