"""Executors of somebody else's: what they raise, what they are given, which backends they may serve."""

import dataclasses

import numpy as np
import pytest
from planes import EXECUTORS, Plane, TasksOnly, bits, everything, move, reference_stream, stream

import rustsim_hpc as rs
from rustsim_hpc import errors

ERROR = rs.EngineControlPlaneError


# -- executors that raise ----------------------------------------------------------------------------


class Raises:
    def __init__(self, error):
        self.error = error

    def execute(self, tasks):
        raise self.error


ONE, TWO = rs.PartitionId(1), rs.PartitionId(2)
BARE = rs.PartitionExecutorError
ZERO = rs.PartitionId(0)
PANIC = "worker failed: partition worker thread panicked"
RAISED = {
    "Worker": (BARE.Worker(ONE, "gone"), ONE, None, "worker failed: gone"),
    "Phase": (BARE.Phase(TWO, "damp", "gone"), TWO, "damp", "phase damp failed: gone"),
    "unknown phase": (BARE.Phase(TWO, "zap", "gone"), TWO, "zap", "phase zap failed: gone"),
    "MissingEndpoint": (BARE.MissingEndpoint(ONE), ONE, None, "has no external endpoint"),
    "an Exception": (OSError("gone"), ZERO, None, "worker failed: gone"),
    "SystemExit": (SystemExit(1), ZERO, None, PANIC),
    "KeyboardInterrupt": (KeyboardInterrupt(), ZERO, None, PANIC),
    "another of our errors": (errors.JobError("gone"), ZERO, None, "worker failed: gone"),
    "a plane's error": (
        errors.ReplayExhausted(3),
        ZERO,
        None,
        "worker failed: replay has no expected fingerprint for step 3",
    ),
    "a partition that is no PartitionId": (BARE.Worker(7, "gone"), 7, None, "worker failed: gone"),
}


@pytest.mark.parametrize("name", sorted(RAISED))
def test_whatever_an_executor_raises_is_typed(name):
    error, partition, phase, text = RAISED[name]
    made = Plane("executor", executor=Raises(error))
    made.plane.add_partition_cpu_phase("before", move)
    before = everything(made.plane)
    for _ in range(2):
        with pytest.raises(errors.ExecutorError) as caught:
            made.step()
    assert everything(made.plane) == before
    found = caught.value
    assert str(found) == f"partition executor error: partition {partition!r} {text}"
    assert (found.partition, found.phase, found.step) == (partition, phase, 0)
    assert found.phase_index == (2 if phase == "damp" else None)


def test_an_executors_several_failures_come_in_partition_order():
    error = BARE.Worker(TWO, "late", others=(BARE.Phase(ONE, "move", "early"),))
    with pytest.raises(errors.ExecutorError) as caught:
        Plane("executor", executor=Raises(error)).step()
    assert caught.value.partition == ONE
    assert [other.partition for other in caught.value.others] == [TWO]
    assert all(isinstance(other, errors.ExecutorError) for other in caught.value.others)


# -- what an executor gets ---------------------------------------------------------------------------


def test_tasks_are_self_contained_copies():
    executor = TasksOnly()
    made = Plane("executor", executor=executor, step_index=4)
    made.plane.add_partition_cpu_phase("before", move)
    start = made.plane.runtime.device_store().checkpoint()
    made.step()
    assert [task.context().partition_id.value for task in executor.seen] == [0, 1, 2]
    for task in executor.seen:
        context, checkpoint, base, phases = task.into_parts()
        assert (task.context(), task.checkpoint(), task.phase_base()) == (context, checkpoint, base)
        assert base == 1
        assert (
            [phase.name() for phase in phases]
            == [phase.name() for phase in task.phases()]
            == ["move", "damp"]
        )
        assert (context.step_index, checkpoint.step_index) == (4, 4)
        rows = start.slice_rows(context.row_start, context.row_end)
        assert checkpoint.state == rows
        assert checkpoint.fingerprint == rs.fingerprint_checkpoint(4, rows)
        assert checkpoint.resident_bytes == rows.resident_bytes
        checkpoint.state.columns[0][:] = -1
    assert made.plane.runtime.step_index == 5
    assert -1 not in made.plane.runtime.columns[0]


def test_the_phase_base_follows_phases_that_are_added_later():
    executor = TasksOnly()
    made = Plane("executor", executor=executor)
    for expected in range(3):
        made.step()
        assert {task.phase_base() for task in executor.seen} == {expected}
        made.plane.runtime_mut().add_cpu_phase("r", move) if expected else made.plane.add_partition_cpu_phase(
            "p", move
        )


def report(context, index, name, rows):
    return rs.PartitionPhaseReport(
        context.partition_id, context.worker, index, name, context.backend, rows, elapsed_us=11
    )


class ByHand:
    """As one would write it from the reference: phases run on the arrays of the task's checkpoint."""

    def execute(self, tasks):
        results = []
        for task in tasks:
            context, checkpoint, base, phases = task.into_parts()
            reports = []
            for offset, phase in enumerate(phases):
                phase.run(context, checkpoint.state.columns, checkpoint.state.agent_count)
                reports.append(report(context, base + offset, phase.name(), checkpoint.state.agent_count))
            results.append(rs.PartitionTaskResult.completed(context, checkpoint, reports))
        return results


@pytest.mark.parametrize("fingerprint", ["fnv1a", "digest"])
def test_an_executor_written_by_hand(fingerprint):
    made = Plane("executor", executor=ByHand(), fingerprint=fingerprint)
    steps = made.run(3)
    assert stream(made.plane) == reference_stream(3, fingerprint=fingerprint)
    assert [report.elapsed_us for report in steps[0].phases] == [11] * 6


@pytest.mark.parametrize(
    "reports", [None, 5, [None], [object()], "reports"], ids=lambda value: type(value).__name__
)
def test_reports_that_make_no_sense_are_left_out(reports):
    def strange(results):
        return [rs.PartitionTaskResult(result.checkpoint, reports) for result in results]

    made = Plane("executor", executor=TasksOnly(strange))
    assert [report.elapsed_us for report in made.step().phases] == [0] * 6


def test_reported_times_cannot_overflow():
    def huge(results):
        return [
            rs.PartitionTaskResult(
                result.checkpoint, [dataclasses.replace(one, elapsed_us=time) for one in result.phases]
            )
            for result, time in zip(results, (2**70, -5, 7), strict=True)
        ]

    made = Plane("executor", executor=TasksOnly(huge))
    assert [report.elapsed_us for report in made.step().phases] == [0, 0, 0, 0, 7, 7]


def test_payloads_with_default_ids_may_come_back_with_the_ids_written_out():
    store = rs.DeviceSoaStore.from_columns(None, {"x": np.zeros(9, np.float32), "vx": np.ones(9, np.float32)})

    def written_out(results):
        return [dataclasses.replace(result, checkpoint=with_ids(result.checkpoint)) for result in results]

    def with_ids(checkpoint):
        ids = np.array(checkpoint.state.ids)
        return dataclasses.replace(checkpoint, state=dataclasses.replace(checkpoint.state, ids=ids))

    made = Plane("executor", store=store, executor=TasksOnly(written_out))
    made.run(2)
    assert made.plane.runtime.device_store().default_ids
    assert bits(made.plane.runtime.ids) == bits(np.arange(9, dtype=np.uint64))


# -- backends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "worker", [rs.PartitionWorker.cuda_device("w", 0), rs.PartitionWorker.external("w", "tcp://a")]
)
@pytest.mark.parametrize("kind", ["partition", "executor", "threads"])
def test_a_backend_that_an_executor_cannot_serve(kind, worker):
    plan = rs.PartitionPlan.row_ranges(10, 2).with_workers(["cpu", "w"])
    workers = [rs.PartitionWorker.local_cpu("cpu"), worker]
    made = Plane(kind, partition_plan=plan, partition_workers=workers)
    before = everything(made.plane)
    with pytest.raises(
        errors.ExecutorError, match=r"partition PartitionId\(1\) worker failed: .*local CPU only"
    ) as caught:
        made.step()
    assert everything(made.plane) == before
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["executor", "threads"])
def test_tasks_for_a_gpu_do_not_run_on_the_cpu(kind):
    plan = rs.PartitionPlan.row_ranges(10, 2).with_workers(["cpu", "w"])
    workers = [rs.PartitionWorker.local_cpu("cpu"), rs.PartitionWorker.cuda_device("w", 3)]
    executor = TasksOnly()
    made = Plane("executor", executor=executor, partition_plan=plan, partition_workers=workers)
    with pytest.raises(errors.ExecutorError, match="CUDA device 3"):
        made.step()
    with pytest.raises(rs.PartitionExecutorError.Worker, match="CUDA device 3"):
        EXECUTORS[kind]().execute(executor.seen)


def test_the_endpoint_executor_serves_external_partitions_only():
    calls = []

    class Client:
        def execute_partition(self, endpoint, task):
            calls.append(endpoint)
            local = dataclasses.replace(task.context(), backend=rs.PartitionExecutionBackend.local_cpu())
            copy = rs.PartitionTask(local, task.checkpoint(), task.phase_base(), task.phases())
            return rs.InlinePartitionExecutor().execute([copy])[0]

    client = Client()
    executor = rs.EndpointPartitionExecutor(client)
    assert executor.client() is executor.client_mut() is client
    plan = rs.PartitionPlan.row_ranges(10, 2)
    with pytest.raises(
        errors.ExecutorError, match="endpoint executor can only run External partition backends"
    ):
        Plane("executor", executor=executor, partition_plan=plan).step()
    workers = [rs.PartitionWorker.external("a", "tcp://a"), rs.PartitionWorker.external("b", "tcp://b")]
    made = Plane(
        "executor", executor=executor, partition_plan=plan.with_workers(["a", "b"]), partition_workers=workers
    )
    made.run(3)
    assert stream(made.plane) == reference_stream(3)
    assert calls == ["tcp://a", "tcp://b"] * 3


@pytest.mark.parametrize("raised", [OSError("down"), SystemExit(1), None])
def test_an_endpoints_failure_names_its_partition(raised):
    class Client:
        def execute_partition(self, endpoint, task):
            if endpoint == "tcp://b":
                if raised is None:
                    return "garbage"
                raise raised
            local = dataclasses.replace(task.context(), backend=rs.PartitionExecutionBackend.local_cpu())
            copy = rs.PartitionTask(local, task.checkpoint(), task.phase_base(), task.phases())
            return rs.LocalThreadedPartitionExecutor(1).execute([copy])[0]

    workers = [rs.PartitionWorker.external("a", "tcp://a"), rs.PartitionWorker.external("b", "tcp://b")]
    plan = rs.PartitionPlan.row_ranges(10, 2).with_workers(["a", "b"])
    executor = rs.EndpointPartitionExecutor(Client())
    made = Plane("executor", executor=executor, partition_plan=plan, partition_workers=workers)
    before = everything(made.plane)
    with pytest.raises(errors.ExecutorError) as caught:
        made.step()
    assert everything(made.plane) == before
    assert caught.value.partition == ONE
