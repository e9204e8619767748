"""Partitions that stay with remote workers between steps, seen from the control plane."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from rustsim_hpc.errors import ExecutorError, Worker
from rustsim_hpc.executors.work import Frame, PhaseFailure, Work
from rustsim_hpc.modeling.program import OBSERVE
from rustsim_hpc.modeling.reductions import new_board
from rustsim_hpc.proof.fingerprint import fnv1a_bytes
from rustsim_hpc.remote.contacts import Contacts, Question
from rustsim_hpc.remote.journal import Journal, StepMade, make_again
from rustsim_hpc.remote.link import LinkError, Refused, Talk, converse
from rustsim_hpc.remote.messages import Malformed
from rustsim_hpc.remote.requests import Request, RunRequests, values_of
from rustsim_hpc.remote.share import Share, failure_of
from rustsim_hpc.remote.talks import (
    Reports,
    digest_of_pieces,
    fetch_talk,
    hash_talk,
    run_talk,
)

Array = np.ndarray[Any, Any]

_JOURNAL_BYTES = 64 << 20

T = TypeVar("T")


class RemoteSession:
    """A rank's partitions on remote workers; the columns here lag behind, and are updated on demand.

    While workers hold the state, this session is its keeper (:class:`~rustsim_hpc.state.memory.Keeper`). A
    worker learns of a commit from the side that the next request names as the current one. The rows of a lost
    worker are recomputed here, from the last state that was here and the values of the steps since; if it has
    been restarted meanwhile, it gets them, repeats its part of the current step, and the step continues.

    Args:
        work: the bound program.
        shares: its partitions by worker.
        contacts: the links to its workers.
        keep_steps: steps after which the state is fetched without being asked for.
        tell: called with a line that the user should read.

    Attributes:
        machines: what workers have reported about theirs, by endpoint.
    """

    def __init__(
        self,
        work: Work,
        shares: Sequence[Share],
        contacts: Contacts,
        *,
        keep_steps: int,
        tell: Callable[[str], None],
    ) -> None:
        self.work = work
        self.board = new_board(work)
        self.compile_seconds = 0.0
        self._shares = list(shares)
        self._contacts, self._keep_steps, self._tell = contacts, keep_steps, tell
        self._journal = Journal()
        self._made: StepMade | None = None
        self._frame: Frame | None = None
        self._step = 0
        self._lost = ""
        self.machines = contacts.machines
        active = [place for place, segment in enumerate(work.program.segments) if segment.items]
        self._first, self._last = (active[0], active[-1]) if active else (0, 0)
        self._requests = RunRequests(self._first)

    # -- a segment -----------------------------------------------------------------------------------

    def run(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """Run one segment on every partition; returns when all workers have answered or are given up."""
        items = self.work.program.segment(segment, frame.step_index)
        if items is None or not items.items:
            return []
        failures = self._prepare(segment, frame)
        if failures:
            return failures
        try:
            news = self._requests.following(segment, frame)
        except LinkError as error:
            return [failure_of(share.blame(error)) for share in self._shares]
        if segment != OBSERVE:
            self._frame = frame
        side, slots = self._side(), items.reductions

        def talk(share: Share, *, again: bool) -> Talk[Reports]:
            request = self._requests.again(segment, frame, frame.values) if again else news
            return self._running(share, request, side, slots)

        results = self._ask(self._shares, talk, segment)
        failures = [
            found for pair in zip(self._shares, results, strict=True) for found in self._take(*pair, slots)
        ]
        if not failures and segment == self._last:
            self._made = StepMade(frame.step_index, frame.repeat, self._side(), frame.values)
            for share in self._shares:
                digests = self.board.digests[share.places.start : share.places.stop].sum(axis=0)
                share.promise = (self._made.after, digests.tolist()) if frame.want_digest else None
        return failures

    def _running(self, share: Share, request: Request, side: int, slots: Sequence[int]) -> Talk[Reports]:
        (fields, data), link = request, self._contacts[share]
        own = fields | {"side": side ^ share.base}
        return run_talk(link, self.work, self.board, share.tasks, slots, data, own)

    def _take(
        self, share: Share, result: Reports | LinkError, slots: Sequence[int]
    ) -> Sequence[PhaseFailure]:
        if isinstance(result, LinkError):
            self._contacts.give_up(share)
            return [failure_of(share.blame(result))]
        places = slice(share.places.start, share.places.stop)
        self.board.times[places] = result.times
        self.board.digests[places] = result.digests
        self.board.codes[places] = result.codes
        for slot, states in zip(slots, result.states, strict=True):
            self.board.states[slot][places] = states
        self.compile_seconds = max(self.compile_seconds, result.compile_seconds)
        if result.failures and not self.work.program.swapped:
            self._contacts.give_up(share)  # its rows are partly updated, in place
        return result.failures

    # -- where the state is --------------------------------------------------------------------------

    def _side(self) -> int:
        """Return the parity of the columns that a step swaps; 0 where it swaps none."""
        swapped = self.work.program.swapped
        return int(self.work.memory.parity[swapped[0]]) if swapped else 0

    def _prepare(self, segment: int, frame: Frame) -> list[PhaseFailure]:
        """Make sure that every worker holds the state that a segment starts from."""
        memory, swapped = self.work.memory, self.work.program.swapped
        made = self._made
        if segment == OBSERVE and not (
            made is not None and made.after == frame.step_index and made.side == self._side()
        ):
            # The stepper has put the current state where an observation expects the next one.
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
        """Start from the state that is here; what workers hold is invalid."""
        self._journal.clear()
        self._made, self._step, self._lost = None, step, ""
        for share in self._shares:
            share.loaded = False
            share.home, share.home_side = step, self._side()

    def _settle(self, step: int | None = None) -> None:
        """Determine whether the last step was committed; ``step``: the next one, None between steps."""
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
            ExecutorError: a worker is lost, and its rows cannot be recomputed.
        """
        self._settle()
        behind = [share for share in self._shares if share.home != self._step]
        if not behind or not self.work.program.written:
            return
        memory, reach = self.work.memory, [share for share in behind if share.loaded]
        talks = [(self._contacts[share], self._fetching(share)) for share in reach]
        for share, result in zip(reach, converse(talks), strict=True):
            if isinstance(result, LinkError):
                self._contacts.give_up(share)
                lost = f"the worker at {share.address.endpoint} {result}"
                self._tell(f"{lost}: its rows of step {self._step} are made again here")
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
            self._contacts[share],
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
        """Recompute the rows of a share up to the last committed step, from those that are here."""
        if self._lost:
            raise ExecutorError(Worker(share.tasks[0].assignment.partition_id, self._lost))
        if share.home == self._step or not self.work.program.written:
            return
        memory, keeper = self.work.memory, self.work.memory.keeper
        now = memory.parity.copy()
        if share.home_side != self._side():
            memory.swap(self.work.program.swapped)
        memory.keeper = None  # the columns are modified here
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
        """Continue a FNV-1a chain over the rows of a column of the state that was made last.

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
            result: int | LinkError = LinkError("is lost")
            if share.link is not None:

                def talk(share: Share, *, again: bool, state: int = state) -> Talk[int]:  # noqa: ARG001
                    link, side = self._contacts[share], self._side() ^ share.base
                    return hash_talk(link, step, side, column, other=other, state=state)

                [result] = self._ask([share], talk, 0)
            if isinstance(result, LinkError):
                self._contacts.give_up(share)
                raise ExecutorError(share.blame(result))
            state = result
        return state

    # -- workers come and go -------------------------------------------------------------------------

    def _ask(self, shares: Sequence[Share], talk: Question[T], segment: int) -> list[T | LinkError]:
        """Run a conversation with the worker of each share; again with one that was restarted."""
        results = converse([(self._contacts[share], talk(share, again=False)) for share in shares])
        for _ in range(self._contacts.patience.retries):
            again = [place for place, result in enumerate(results) if _lost_session(result)]
            # Not for a step that has failed elsewhere.
            if not again or any(_failed(result) for result in results):
                break
            fresh = self._begin_again([shares[place] for place in again], talk, segment)
            for place, result in zip(again, fresh, strict=True):
                results[place] = result
        return results

    def _begin_again(self, shares: Sequence[Share], talk: Question[T], segment: int) -> list[T | LinkError]:
        """Bring restarted workers to the state of the others, and ask them once more."""
        self._settle()
        # The segments of the current step made so far; all of them if it is made but not committed.
        behind = max(segment, 0) if self._made is None else self._last + 1
        aside = self.work.program.swapped if segment == OBSERVE and self._made is None else ()
        self.work.memory.swap(aside)  # see `_prepare`
        try:
            for share in shares:
                self._contacts.give_up(share)
                self._make_again(share)
            talks = [
                (self._contacts.begin(share), self._catching_up(share, talk, behind)) for share in shares
            ]
            results = converse(talks)
        except ExecutorError as error:
            return [LinkError(str(error.source))] * len(shares)
        finally:
            self.work.memory.swap(aside)
        for share, result in zip(shares, results, strict=True):
            if not isinstance(result, LinkError):
                text = "was restarted and has its rows again"
                self._tell(f"the worker at {share.address.endpoint} {text}, step {self._step} continues")
        self._tell_differences()
        return results

    def _catching_up(self, share: Share, talk: Question[T], behind: int) -> Talk[T]:
        """Send a new session a share's rows, let it repeat the first segments of the step, and ask it."""
        facts = yield from self._loading(share, fresh=True)
        frame, known = self._frame, dict[str, Any]()
        for number, segment in enumerate(self.work.program.segments[:behind]):
            assert frame is not None  # noqa: S101 (a step is in progress)
            if segment.items:
                request = self._requests.again(number, frame, known)
                reports = yield from self._running(share, request, self._side(), segment.reductions)
                if reports.failures:
                    text = f"failed at what it had done before: {reports.failures[0].message}"
                    raise LinkError(f"was begun again, and then {text}")
            known |= {name: frame.values[name] for name in values_of(self.work.program, segment)}
        self._have(share, facts)
        return (yield from talk(share, again=True))

    def _load(self, shares: Sequence[Share]) -> list[PhaseFailure]:
        """Send workers the rows of their shares, in new sessions where there are none."""
        self._requests.forget()
        failures, left = list[PhaseFailure](), self._contacts.patience.retries
        while shares:
            fresh = [share.link is None for share in shares]
            links = [share.link or self._contacts.begin(share) for share in shares]
            talks = [self._loading(share, fresh=new) for share, new in zip(shares, fresh, strict=True)]
            again = []
            results = converse(list(zip(links, talks, strict=True)))
            for share, result in zip(shares, results, strict=True):
                if not isinstance(result, LinkError):
                    self._have(share, result)
                    continue
                self._contacts.give_up(share)
                if _lost_session(result) and left:
                    again.append(share)
                else:
                    failures.append(failure_of(share.blame(result)))
            shares, left = again, left - 1
        self._tell_differences()
        return sorted(failures, key=lambda failure: failure.partition.value)

    def _loading(self, share: Share, *, fresh: bool) -> Talk[Mapping[str, Any] | None]:
        return self._contacts.loading(share, self._step, self._side(), fresh=fresh)

    def _have(self, share: Share, facts: Mapping[str, Any] | None) -> None:
        """Note that a worker has its rows; ``facts``: of its machine, if its session is new."""
        share.loaded = True
        if facts is not None:
            self.machines[share.address.endpoint] = facts

    def _tell_differences(self) -> None:
        for line in self._contacts.new_differences():
            self._tell(line)

    def close(self) -> None:
        """Fetch the state and end the sessions; calling it again does nothing."""
        try:
            if self.work.memory.keeper is self:
                self.work.memory.take_back()
        finally:
            for share in self._shares:
                self._contacts.give_up(share)


def _lost_session(result: object) -> bool:
    return isinstance(result, Refused) and result.lost_session


def _failed(result: object) -> bool:
    if isinstance(result, Reports):
        return bool(result.failures)
    return isinstance(result, LinkError) and not _lost_session(result)
