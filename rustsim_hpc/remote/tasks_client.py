"""The client of self-contained tasks: a partition's rows are sent with each task, and come back changed."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from rustsim_hpc.control.checkpoint import PartitionCheckpoint
from rustsim_hpc.errors import ModelError, Phase, RemoteError, RustsimError, Worker
from rustsim_hpc.executors.base import PartitionExecutablePhase, PartitionTask, PartitionTaskResult
from rustsim_hpc.executors.work import Board, PhaseFailure, Task, Work
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model import ColumnPhase
from rustsim_hpc.modeling.model_source import load_model
from rustsim_hpc.modeling.params import Params
from rustsim_hpc.modeling.program import plan_program
from rustsim_hpc.random import key_of
from rustsim_hpc.remote.addresses import parse_endpoint
from rustsim_hpc.remote.executor import client_keys
from rustsim_hpc.remote.link import Link, LinkError, Patience, Refused, Talk, converse
from rustsim_hpc.remote.talks import Opening, Reports, fetch_talk, load_talk, open_talk, run_talk
from rustsim_hpc.state.columns import DeviceSoaCheckpoint
from rustsim_hpc.state.memory import ColumnMemory
from rustsim_hpc.state.partition import PartitionExecutionContext, PartitionPhaseReport

Array = np.ndarray[Any, Any]

_KEPT = 4


@dataclass
class _Desk:
    """A session for the tasks of one partition."""

    link: Link
    opening: Opening
    board: Board
    is_open: bool = False


class ZmqPartitionClient:
    """Runs tasks at workers started by ``rustsim-hpc worker``; a client of ``EndpointPartitionExecutor``.

    Each task carries the partition's rows both ways; workers keep no state between tasks. A session that
    a worker no longer knows (it was restarted) is opened again. Phases are column phases of a model that
    the workers have installed: names and the model's hash are sent, never functions.

    Args:
        model: the model's module, as a job names it: the path of a Python file, or an importable name.
        seed: seed of the random numbers, as the plane's model has it.
        keys: a folder made by ``rustsim-hpc worker --make-keys``, or None for workers on the loopback.
        connect_seconds, answer_seconds, retries, rejoin_seconds: see
            :class:`~rustsim_hpc.remote.executor.RemotePartitionExecutor`.

    Raises:
        InvalidConfig: a number is invalid, keys cannot be read, or pyzmq is missing.
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        keys: str | Path | None = None,
        *,
        seed: int = 0,
        connect_seconds: float = 10.0,
        answer_seconds: float = 600.0,
        retries: int = 1,
        rejoin_seconds: float = 15.0,
    ) -> None:
        self._patience = Patience(connect_seconds, answer_seconds, retries, rejoin_seconds)
        self._keys = client_keys(keys)
        self._model, self._reference = load_model(model)
        self._seed = seed
        self._bound: OrderedDict[str, BoundModel] = OrderedDict()
        self._desks: dict[tuple[Any, ...], _Desk] = {}
        self._end = weakref.finalize(self, _close_all, self._desks)

    def execute_partition(self, endpoint: str, task: PartitionTask) -> PartitionTaskResult:
        """Run a task at an endpoint.

        Raises:
            PartitionExecutorError: ``Phase`` where a phase failed, ``Worker`` for anything else.
        """
        context, checkpoint, base, phases = task.into_parts()
        partition = context.partition_id
        try:
            model = self._bind(context.params)
            self._require_phases(model, context, checkpoint.state, phases)
            desk = self._desk(model, endpoint, context, checkpoint, [phase.name() for phase in phases])
            result = self._tried(desk, endpoint, checkpoint)
        except (ModelError, RemoteError) as error:
            raise Worker(partition, error.message, hint=error.hint) from error
        if isinstance(result, LinkError):
            label = f'"{context.worker}" ' if context.worker else ""
            raise Worker(partition, f"worker {label}at {endpoint} {result}", hint=result.hint) from result
        reports, columns = result
        for failure in reports.failures:
            raise _error_of(failure)
        state = replace(checkpoint.state, columns=tuple(columns))
        made = [
            PartitionPhaseReport(
                partition_id=partition,
                worker=context.worker,
                phase_index=base + place,
                name=phase.name(),
                backend=context.backend,
                rows=state.agent_count,
                elapsed_us=int(reports.times[0, place]) // 1000,
            )
            for place, phase in enumerate(phases)
        ]
        return PartitionTaskResult.completed(context, replace(checkpoint, state=state), made)

    # -- what a task must be -------------------------------------------------------------------------

    def _bind(self, params: Params | None) -> BoundModel:
        """Return the model with a task's parameters; the newest few are kept, as tables may take long."""
        plain = {} if params is None else params.plain()
        key = repr(sorted(plain.items()))
        if key not in self._bound:
            self._bound[key] = BoundModel(
                self._model, plain, seed=self._seed, agents=0, reference=self._reference
            )
        self._bound.move_to_end(key)
        if len(self._bound) > _KEPT:
            self._bound.popitem(last=False)
        return self._bound[key]

    def _require_phases(
        self,
        model: BoundModel,
        context: PartitionExecutionContext,
        state: DeviceSoaCheckpoint,
        phases: Sequence[PartitionExecutablePhase],
    ) -> None:
        """Raise Worker unless a worker with this client's model can do the task."""
        partition = context.partition_id
        own = {phase.name: phase for phase in model.phases if isinstance(phase, ColumnPhase)}
        for phase in phases:
            found = own.get(phase.name())
            if found is None or phase.function is not found.fn:
                message = f'phase "{phase.name()}" is not one of the model\'s, which is all that a worker has'
                raise Worker(partition, message, phase=phase.name(), hint="make it a phase of the model")
            if phase.stream_key not in (None, key_of(model.seed, found.stream)):
                raise Worker(partition, f'phase "{phase.name()}" has another seed than the client')
        if dict(context.params or {}) != dict(model.params):
            raise Worker(partition, "the task has not all of the model's parameters", hint="use add_model")
        if state.schema != model.schema:
            raise Worker(partition, "the task has other columns than the client's model")

    # -- the conversation ----------------------------------------------------------------------------

    def _tried(self, desk: _Desk, endpoint: str, checkpoint: PartitionCheckpoint) -> Any:
        """Run the conversation; once more, from the start, if the worker does not know its session."""
        for _ in range(2):
            [result] = converse([(desk.link, _whole_task(desk, endpoint, checkpoint))])
            if not isinstance(result, LinkError):
                return result
            known, desk.is_open = desk.is_open, False
            desk.link.close(politely=True)
            desk.link = Link(desk.link.address, self._keys, self._patience)
            if not (known and isinstance(result, Refused) and result.code == "unknown"):
                return result
        return result

    def _desk(
        self,
        model: BoundModel,
        endpoint: str,
        context: PartitionExecutionContext,
        checkpoint: PartitionCheckpoint,
        names: Sequence[str],
    ) -> _Desk:
        assignment, state = checkpoint.assignment, checkpoint.state
        key = (endpoint, assignment, tuple(names), state.default_ids, repr(model.params))
        desk = self._desks.get(key)
        if desk is None:
            address = parse_endpoint(endpoint)
            task = Task(assignment, context.backend, 0, state.agent_count)
            work = _work_of(model, task, names)
            ids = None if state.default_ids else np.empty(0, np.uint64)
            opening = Opening(
                work=work,
                tasks=(task,),
                model=self._reference.sha256,
                phases=names,
                observers=False,
                two_sided=True,
                ids=ids,
            )
            link = Link(address, self._keys, self._patience)
            desk = self._desks[key] = _Desk(link, opening, Board(1, work.program, []))
        return desk

    def close(self) -> None:
        """End all sessions; the client stays usable."""
        _close_all(self._desks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _work_of(model: BoundModel, task: Task, names: Sequence[str]) -> Work:
    """Return the work as a worker will plan it: the named phases alone, without rows here."""
    by_name = {phase.name: phase for phase in model.phases}
    options = model.program_options() | {"checks": (), "outputs": ()}
    program = plan_program(model.schema, [by_name[name] for name in names], two_sided=True, **options)
    work = Work(
        program=program,
        memory=ColumnMemory(model.schema, 0),
        ids=None,
        first_row=task.assignment.row_start,
        total_rows=task.assignment.row_end,
        tasks=(task,),
    )
    model.bind_work(work)
    return work


def _whole_task(
    desk: _Desk, endpoint: str, checkpoint: PartitionCheckpoint
) -> Talk[tuple[Reports, list[Array]]]:
    """Send a partition's rows, run its phases, and fetch the rows again."""
    link, work, state = desk.link, desk.opening.work, checkpoint.state
    first, step = checkpoint.assignment.row_start, checkpoint.step_index
    if not desk.is_open:
        yield from open_talk(link, desk.opening, endpoint)
        desk.is_open = True
    ids = None if state.default_ids else np.asarray(state.ids)
    yield from load_talk(link, ids, state.columns, first, step)
    fields = {
        "step": step, "segment": 0, "attempt": 0, "side": 0, "repeat": 1, "want_digest": False,
        "afresh": True, "values": [],
    }  # fmt: skip
    columns = list(state.columns)
    reports = yield from run_talk(link, work, desk.board, work.tasks, (), [], fields)
    if not reports.failures:
        wanted = [(column, columns[column].dtype) for column in work.program.written]
        side = 1 if work.program.swapped else 0
        fetched = yield from fetch_talk(link, wanted, state.agent_count, first, step=step + 1, side=side)
        for (column, dtype), pieces in zip(wanted, fetched, strict=True):
            columns[column] = np.concatenate([np.empty(0, dtype), *pieces])
    return reports, columns


def _error_of(failure: PhaseFailure) -> RustsimError:
    if failure.kind == "phase":
        return Phase(failure.partition, failure.phase, failure.message)
    return Worker(failure.partition, failure.message, phase=failure.phase or None)


def _close_all(desks: dict[tuple[Any, ...], _Desk]) -> None:
    for desk in desks.values():
        desk.link.close(politely=True)
    desks.clear()
