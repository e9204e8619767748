"""A client's links to the workers of its shares: opened when they are needed, closed when they are lost."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

from rustsim_hpc.executors.work import Work
from rustsim_hpc.remote.keys import ClientKeys
from rustsim_hpc.remote.link import Link, Patience, Talk
from rustsim_hpc.remote.share import Share, model_of
from rustsim_hpc.remote.talks import Opening, load_talk, open_talk
from rustsim_hpc.run_folder.environment import mixtures, worker_facts

Array = np.ndarray[Any, Any]
T_co = TypeVar("T_co", covariant=True)


class Question(Protocol[T_co]):
    """Returns a conversation with the worker of a share."""

    def __call__(self, share: Share, *, again: bool) -> Talk[T_co]:
        """``again``: the worker has only its rows and what it has repeated of the current step."""
        ...


class Contacts:
    """The links of one session.

    Args:
        work: the bound program.
        keys: None for workers on the loopback.
        patience: how long to wait.

    Attributes:
        machines: what workers have reported about theirs, by endpoint.

    Raises:
        ExecutorError: the phases are not those of a model that workers could have.
    """

    def __init__(self, work: Work, keys: ClientKeys | None, patience: Patience) -> None:
        self._work = work
        self._model = model_of(work).sha256
        self._keys, self.patience = keys, patience
        self.machines: dict[str, Mapping[str, Any]] = {}
        self._differ: set[str] = set()
        self._links: dict[int, Link] = {}
        # A plane that is dropped without being closed must not leave its connections behind.
        self._end = weakref.finalize(self, _hang_up, self._links)

    def __getitem__(self, share: Share) -> Link:
        return self._links[share.places.start]

    def begin(self, share: Share) -> Link:
        """Return a link for a share that has none."""
        share.link = self._links[share.places.start] = Link(share.address, self._keys, self.patience)
        return share.link

    def loading(self, share: Share, step: int, side: int, *, fresh: bool) -> Talk[Mapping[str, Any] | None]:
        """Send a worker the rows that are on the current sides here; ``fresh``: open its session first.

        Args:
            share: the worker's share.
            step: step index of the state.
            side: parity of the written columns, which is the worker's side 0 from now on.
            fresh: whether the session has to be opened.

        Returns:
            What the worker reports about its machine, if its session was opened.
        """
        work, rows, memory, link = self._work, share.rows, self._work.memory, self[share]
        share.base = side
        ids = None if work.ids is None else work.ids[rows]
        facts = None
        if fresh:
            facts = yield from open_talk(link, self._opening(share, ids), share.endpoint)
        columns = [
            memory.array(column, int(memory.parity[column]))[rows] for column in range(len(memory.schema))
        ]
        yield from load_talk(link, ids, columns, share.first_row, step)
        return facts

    def _opening(self, share: Share, ids: Array | None) -> Opening:
        program = self._work.program
        return Opening(
            work=self._work,
            tasks=share.tasks,
            model=self._model,
            phases=program.phase_names[: program.phase_count],
            observers=True,
            two_sided=bool(program.swapped),
            ids=ids,
        )

    def new_differences(self) -> list[str]:
        """Return lines on how the known machines differ, without those returned before."""
        known = [{"endpoint": name, **found} for name, found in self.machines.items()]
        lines = mixtures([worker_facts(), *known], "this process and its remote workers have")
        news = [line for line in lines if line not in self._differ]
        self._differ.update(news)
        return news

    def give_up(self, share: Share) -> None:
        """Drop a worker's link; a new session is opened when it is needed again."""
        share.loaded = False
        self._links.pop(share.places.start, None)
        if share.link is not None:
            share.link.close(politely=True)
            share.link = None


def _hang_up(links: dict[int, Link]) -> None:
    for link in links.values():
        link.close(politely=True)
    links.clear()
