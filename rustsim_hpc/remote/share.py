"""Partitions that one remote worker holds: their state, and the errors about the worker."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from rustsim_hpc.errors import ExecutorError, Worker
from rustsim_hpc.executors.work import PhaseFailure, Task, Work
from rustsim_hpc.modeling.model_source import ModelReference
from rustsim_hpc.remote.addresses import Address
from rustsim_hpc.remote.link import Link, LinkError


@dataclass
class Share:
    """Consecutive partitions that belong to one worker.

    Attributes:
        places: in the list of tasks.
        tasks: the partitions.
        endpoint: of the worker, as the plan has it.
        address: the same, parsed.
        link: the session, or None where there is none.
        loaded: whether the worker holds the rows of the last committed step.
        base: parity of the written columns, here, that is the worker's side 0.
        home: step index of the state of these rows that is here.
        home_side: parity of the written columns at that step.
        promise: a step index, and the digests of its rows at that step, one a column, as the worker reported.
    """

    places: range
    tasks: tuple[Task, ...]
    endpoint: str
    address: Address
    link: Link | None = None
    loaded: bool = False
    base: int = 0
    home: int = 0
    home_side: int = 0
    promise: tuple[int, list[int]] | None = None

    @property
    def rows(self) -> slice:
        """The rows in this rank's arrays."""
        return slice(self.tasks[0].start, self.tasks[-1].stop)

    @property
    def first_row(self) -> int:
        """Global row of the first one."""
        return self.tasks[0].assignment.row_start

    def blame(self, error: LinkError) -> Worker:
        """Return the typed error of a worker that cannot be used."""
        assignment = self.tasks[0].assignment
        label = f'"{assignment.worker}" ' if assignment.worker else ""
        text = f"worker {label}at {self.address.endpoint} {error}"
        return Worker(assignment.partition_id, text, hint=error.hint)


def model_of(work: Work) -> ModelReference:
    """Return the reference of the model that a work's phases belong to.

    Raises:
        ExecutorError: they belong to none that a worker could have installed.
    """
    if isinstance(work.model, ModelReference):
        return work.model
    name = next(iter(work.program.phase_names), "")
    message = f'phase "{name}" is not an entry of a model that a remote worker could have installed'
    hint = "make it a phase of a model in a module of its own, and bind what load_model returns"
    raise ExecutorError(Worker(work.tasks[0].assignment.partition_id, message, phase=name, hint=hint))


def failure_of(error: Any) -> PhaseFailure:
    """Return a worker's failure as data, with the facts of the error."""
    return PhaseFailure(
        partition=error.partition,
        worker=None,
        phase_index=None,
        phase=error.phase or "",
        message=error.message,
        kind="worker",
        host=socket.gethostname(),
        hint=error.hint,
    )
