"""Dispatch partitions to external endpoints; the client implements the transport."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from rustsim_hpc.errors import MissingEndpoint, PartitionExecutorError, Worker, message_of
from rustsim_hpc.executors.base import PartitionTask, PartitionTaskResult, collect_results
from rustsim_hpc.state.partition import PartitionExecutionBackend


class ExternalPartitionClient(Protocol):
    """The transport that :class:`EndpointPartitionExecutor` calls."""

    def execute_partition(self, endpoint: str, task: PartitionTask) -> PartitionTaskResult:
        """Run ``task`` at ``endpoint``; the text of an exception becomes the worker's failure."""
        ...


Client = TypeVar("Client", bound=ExternalPartitionClient)


class EndpointPartitionExecutor(Generic[Client]):
    """Runs partitions with an External backend through a client.

    Args:
        client: the transport.
    """

    name = "endpoint"

    def __init__(self, client: Client) -> None:
        self._client = client

    def client(self) -> Client:
        """Return the transport."""
        return self._client

    def client_mut(self) -> Client:
        """Return the transport, to be changed (in Python the same object as :meth:`client`)."""
        return self._client

    def execute(self, tasks: Sequence[PartitionTask]) -> list[PartitionTaskResult]:
        """Run all tasks in order at their endpoints.

        The first failure is raised after the last task, with the others attached.

        Raises:
            PartitionExecutorError: ``Worker`` for another backend or a client's failure,
                ``MissingEndpoint`` if the endpoint is empty.
        """
        return collect_results(partial(self._execute, task) for task in tasks)

    def _execute(self, task: PartitionTask) -> PartitionTaskResult:
        partition, backend = task.context().partition_id, task.context().backend
        if not isinstance(backend, PartitionExecutionBackend.External):
            raise Worker(partition, "endpoint executor can only run External partition backends")
        if not backend.endpoint:
            raise MissingEndpoint(partition)
        try:
            return self._client.execute_partition(backend.endpoint, task)
        except PartitionExecutorError:
            raise
        except BaseException as error:  # the client is foreign code: nothing may leave it untyped
            raise Worker(partition, message_of(error)) from error
