"""Partitions behind endpoints of this machine: resident with the workers, and as self-contained tasks."""

import pytest

pytest.importorskip("zmq", reason="needs pyzmq: pip install 'rustsim-hpc[remote]'")

from executor_suite import HERE, ExecutorSuite
from remote_workers import WorkerProcess

import rustsim_hpc as rs
from rustsim_hpc.remote.executor import RemotePartitionExecutor
from rustsim_hpc.remote.tasks_client import ZmqPartitionClient

SUITE_MODEL = str(HERE / "suite_model.py")


@pytest.fixture(scope="module")
def workers():
    made = [WorkerProcess() for _ in range(2)]
    yield made
    assert [worker.end() for worker in made] == [0, 0]


def external(plan, endpoints):
    """Return a plan whose partitions lie with workers at endpoints, and the workers."""
    count = plan.partition_count
    labels = [f"w{place * len(endpoints) // count}" for place in range(count)]
    made = [rs.PartitionWorker.external(f"w{k}", endpoint) for k, endpoint in enumerate(endpoints)]
    return plan.with_workers(labels), made


class At(ExecutorSuite):
    """Partitions with workers at endpoints."""

    def __init__(self, *endpoints):
        self.endpoints = endpoints

    def plan(self, rows, parts):
        return external(rs.PartitionPlan.row_ranges(rows, parts), self.endpoints)


def tasks_executor():
    return rs.EndpointPartitionExecutor(ZmqPartitionClient(SUITE_MODEL, seed=5))


class RemoteSuite(ExecutorSuite):
    @pytest.fixture(autouse=True)
    def endpoints(self, workers):
        self.at = [worker.endpoint for worker in workers]

    def plan(self, rows, parts):
        return external(rs.PartitionPlan.row_ranges(rows, parts), self.at)


class TestResident(RemoteSuite):
    @pytest.fixture
    def make_executor(self):
        return RemotePartitionExecutor

    @pytest.fixture
    def make_other(self):
        return tasks_executor


class TestTasks(RemoteSuite):
    kernels = False

    @pytest.fixture
    def make_executor(self):
        return tasks_executor

    @pytest.fixture
    def make_other(self):
        return RemotePartitionExecutor
