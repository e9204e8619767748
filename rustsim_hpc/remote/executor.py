"""The executor whose partitions stay with remote workers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

from rustsim_hpc.errors import ExecutorError, InvalidConfig, MissingEndpoint, RemoteError, Worker
from rustsim_hpc.executors.work import Task, Work
from rustsim_hpc.remote.addresses import Address, parse_endpoint
from rustsim_hpc.remote.contacts import Contacts
from rustsim_hpc.remote.keys import ClientKeys, read_client_keys
from rustsim_hpc.remote.link import Patience
from rustsim_hpc.remote.session import RemoteSession
from rustsim_hpc.remote.share import Share
from rustsim_hpc.remote.sockets import library
from rustsim_hpc.state.partition import PartitionExecutionBackend


class RemotePartitionExecutor:
    """Runs partitions on workers started by ``rustsim-hpc worker``, where they stay between steps.

    A step sends only control messages and the results of reductions; columns travel when the first step is
    made, when the state is needed here (a checkpoint, ``store.columns``), and when a worker is lost. Every
    partition's worker must be ``PartitionWorker.external(label, endpoint)``; phases must be those of a model
    that was loaded by its reference, and that the workers have installed.

    Args:
        keys: a folder made by ``rustsim-hpc worker --make-keys``, or None for workers on the loopback.
        connect_seconds: time in which a connection must be established.
        answer_seconds: time in which a request must be answered; the first one includes compiling.
        retries: how often an unanswered request is sent again before its worker counts as dead, and how
            often per request a restarted worker is sent its rows again; 0: never.
        rejoin_seconds: time in which a broken connection must be established again. A worker that has died
            may be restarted at its endpoint meanwhile: it gets its rows again, and the step continues.
        keep_steps: after so many steps the state is fetched; no more steps than these have to be repeated
            if a worker is lost.
        tell: called with a line that the user should read; a RuntimeWarning if None.

    Raises:
        InvalidConfig: a number is invalid, keys cannot be read, or pyzmq is missing.
    """

    name = "remote"

    def __init__(
        self,
        keys: str | Path | None = None,
        *,
        connect_seconds: float = 10.0,
        answer_seconds: float = 600.0,
        retries: int = 1,
        rejoin_seconds: float = 15.0,
        keep_steps: int = 256,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        if keep_steps < 1:
            raise InvalidConfig(f"keep_steps must be at least 1, got {keep_steps}")
        self._patience = Patience(connect_seconds, answer_seconds, retries, rejoin_seconds)
        self._tell = tell or _warn
        self._keep_steps = keep_steps
        self._keys = client_keys(keys)

    def attach(self, work: Work) -> RemoteSession:
        """Bind to a rank's work (see :class:`~rustsim_hpc.executors.base.ResidentExecutor`).

        Workers are contacted when the first step is made.

        Raises:
            ExecutorError: a partition's backend is not external, or the phases are not those of a model.
            InvalidConfig: an endpoint is invalid, or needs keys.
        """
        contacts = Contacts(work, self._keys, self._patience)
        return RemoteSession(work, self._shares(work), contacts, keep_steps=self._keep_steps, tell=self._tell)

    def require(self, endpoints: Iterable[str]) -> None:
        """Check that this executor could use the workers, as far as that is known without contacting them.

        Raises:
            InvalidConfig: an endpoint is invalid, or needs keys.
        """
        for endpoint in endpoints:
            self._address(endpoint)

    def _address(self, endpoint: str) -> Address:
        try:
            address = parse_endpoint(endpoint)
        except RemoteError as error:
            raise InvalidConfig(error.message, hint=error.hint) from error
        if self._keys is None and not address.loopback:
            hint = "rustsim-hpc worker --make-keys DIR makes keys; give the folder as keys"
            raise InvalidConfig(f"{endpoint} may not be on this machine: keys are required", hint=hint)
        return address

    def _shares(self, work: Work) -> list[Share]:
        shares, place = [], 0
        for endpoint, group in groupby(work.tasks, key=_endpoint_of):
            tasks = tuple(group)
            address = self._address(endpoint)
            shares.append(Share(range(place, place + len(tasks)), tasks, endpoint, address))
            place += len(tasks)
        return shares


def _endpoint_of(task: Task) -> str:
    partition = task.assignment.partition_id
    if not isinstance(task.backend, PartitionExecutionBackend.External):
        raise ExecutorError(Worker(partition, "remote executor can only run External partition backends"))
    if not task.backend.endpoint:
        raise ExecutorError(MissingEndpoint(partition))
    return task.backend.endpoint


def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=2)


def client_keys(folder: str | Path | None) -> ClientKeys | None:
    """Return the keys of a client, None without a folder of them.

    Raises:
        InvalidConfig: they cannot be read, or pyzmq is missing.
    """
    try:
        library()
        return None if folder is None else read_client_keys(Path(folder))
    except RemoteError as error:
        raise InvalidConfig(error.message, hint=error.hint) from error
