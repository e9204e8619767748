"""What somebody else's executor returns is checked against the request; a wrong result changes nothing."""

import dataclasses
from collections import UserList

import numpy as np
import pytest
from planes import Plane, TasksOnly, everything, move, reference_stream, stream

import rustsim_hpc as rs
from rustsim_hpc import errors

ERROR = rs.EngineControlPlaneError
NAN_1, NAN_2 = (np.array([word], np.uint32).view(np.float32)[0] for word in (0x7FC00001, 0x7FC00002))


def on(place, change):
    """Change one result's checkpoint, and prove it again: only the request can tell that it is wrong."""

    def tamper(results):
        made = change(results[place].checkpoint)
        scheme = made.fingerprint.scheme
        try:
            proof = rs.fingerprint_checkpoint(made.step_index, made.state, scheme)
            made = dataclasses.replace(made, fingerprint=proof)
        except Exception:  # noqa: BLE001, S110 (what cannot be hashed keeps its old fingerprint)
            pass
        results[place] = dataclasses.replace(results[place], checkpoint=made)
        return results

    return tamper


def state(checkpoint, **changes):
    return dataclasses.replace(checkpoint, state=dataclasses.replace(checkpoint.state, **changes))


def columns(checkpoint, change):
    return state(checkpoint, columns=tuple(change([column.copy() for column in checkpoint.state.columns])))


def schema(names, dtypes):
    return rs.Schema.plain(names, dtypes)


NAMES = ("x", "vx", "y", "vy")
F4 = ["float32"] * 4


def assigned(checkpoint, **changes):
    return dataclasses.replace(checkpoint, assignment=dataclasses.replace(checkpoint.assignment, **changes))


def named(checkpoint, *names):
    return state(checkpoint, column_names=names, schema=schema(names, F4))


def declared(checkpoint, count):
    """The state with another number of columns, of which nothing but the request knows."""
    made = (*checkpoint.state.columns, checkpoint.state.columns[0])[:count]
    names = (*NAMES, "z")[:count]
    return state(checkpoint, columns=made, column_names=names, schema=schema(names, ["float32"] * count))


def as_float64(checkpoint):
    made = tuple(one.astype(np.float64) for one in checkpoint.state.columns)
    return state(checkpoint, columns=made, schema=schema(NAMES, ["float64"] * 4))


WRONG = {
    "step kept": lambda c: dataclasses.replace(c, step_index=c.step_index - 1),
    "step skipped": lambda c: dataclasses.replace(c, step_index=c.step_index + 1),
    "another worker": lambda c: assigned(c, worker="w"),
    "another id": lambda c: assigned(c, partition_id=rs.PartitionId(9)),
    "longer range": lambda c: assigned(c, row_end=c.assignment.row_end + 1),
    "ids changed": lambda c: state(c, ids=c.state.ids + np.uint64(1)),
    "ids swapped": lambda c: state(c, ids=c.state.ids[::-1].copy()),
    "ids dropped": lambda c: rs.PartitionCheckpoint(
        c.assignment, c.step_index, c.fingerprint, c.resident_bytes,
        rs.DeviceSoaCheckpoint(None, c.state.columns, NAMES, c.state.schema, rows=c.state.rows),
    ),
    "ids of another dtype": lambda c: state(c, ids=c.state.ids.astype(np.int64)),
    "names changed": lambda c: named(c, "x", "vx", "y", "z"),
    "names swapped": lambda c: named(c, "vx", "x", "y", "vy"),
    "unit changed": lambda c: state(
        c, schema=rs.Schema(tuple(dataclasses.replace(one, unit="m") for one in c.state.schema.columns))
    ),
    "column left out": lambda c: declared(c, 3),
    "extra column": lambda c: columns(c, lambda made: [*made, made[0]]),
    "extra column, declared": lambda c: declared(c, 5),
    "fewer rows": lambda c: state(
        c, columns=tuple(one[:-1] for one in c.state.columns), ids=c.state.ids[:-1], rows=c.state.rows - 1
    ),
    "ragged": lambda c: columns(c, lambda made: [made[0], made[1][:-1], *made[2:]]),
    "longer column": lambda c: columns(c, lambda made: [made[0], np.append(made[1], made[1][:1]), *made[2:]]),
    "two dimensions": lambda c: columns(c, lambda made: [made[0].reshape(-1, 1), *made[1:]]),
    "other dtype": lambda c: columns(c, lambda made: [made[0].astype(np.float64), *made[1:]]),
    "other dtype of the same width": lambda c: columns(c, lambda made: [made[0].view(np.int32), *made[1:]]),
    "other byte order": lambda c: columns(c, lambda made: [made[0].astype(">f4"), *made[1:]]),
    "another schema's dtypes": as_float64,
}  # fmt: skip


@pytest.mark.parametrize("guard", ["rollback", "torn"])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_result_that_is_not_what_was_asked_for(name, place, guard):
    executor = TasksOnly()
    made = Plane("executor", executor=executor, guard=rs.StepGuard(guard))
    made.run(2)
    kept = made.plane.checkpoint()
    before = everything(made.plane)
    executor.change = on(place, WRONG[name])
    with pytest.raises(ERROR) as caught:
        made.step()
    assert everything(made.plane) == before
    error = caught.value
    assert isinstance(error, errors.PartitionCheckpointError)
    assert error.partition == rs.PartitionId(place)
    assert f"partition PartitionId({place}) " in str(error)
    assert (error.step, error.exit_code) == (2, 5)
    executor.change = None
    if guard == "torn":
        made.plane.restore(kept)
    made.run(2)
    assert stream(made.plane) == reference_stream(4)


def unproved(change):
    def tamper(results):
        results[1] = dataclasses.replace(results[1], checkpoint=change(results[1].checkpoint))
        return results

    return tamper


def with_value(checkpoint, column, row, value):
    made = [one.copy() for one in checkpoint.state.columns]
    made[column][row] = value
    return state(checkpoint, columns=tuple(made))


FORGED = {
    "value": lambda c: with_value(c, 0, 1, 3),
    "one NaN for another": lambda c: with_value(with_value(c, 0, 0, NAN_1), 0, 0, NAN_2),
    "fingerprint's value": lambda c: dataclasses.replace(
        c, fingerprint=dataclasses.replace(c.fingerprint, value=c.fingerprint.value ^ 1)
    ),
    "fingerprint's step": lambda c: dataclasses.replace(
        c, fingerprint=dataclasses.replace(c.fingerprint, step_index=c.step_index + 1)
    ),
    "fingerprint's scheme": lambda c: dataclasses.replace(
        c, fingerprint=dataclasses.replace(c.fingerprint, scheme="digest")
    ),
}


@pytest.mark.parametrize("name", sorted(FORGED))
def test_a_result_that_does_not_prove_itself(name):
    executor = TasksOnly()
    made = Plane("executor", executor=executor)
    before = everything(made.plane)
    executor.change = unproved(FORGED[name])
    with pytest.raises(
        errors.PartitionCheckpointError, match=r"partition PartitionId\(1\) fingerprint mismatch$"
    ):
        made.step()
    assert everything(made.plane) == before


NONSENSE = {
    "None": lambda results: [results[0], None, results[2]],
    "a task": lambda results: [results[0], object(), results[2]],
    "no checkpoint": lambda results: [results[0], rs.PartitionTaskResult(None, ()), results[2]],
    "no assignment": unproved(lambda c: dataclasses.replace(c, assignment=None)),
    "no state": unproved(lambda c: dataclasses.replace(c, state=None)),
    "no fingerprint": unproved(lambda c: dataclasses.replace(c, fingerprint=None)),
    "a dict": lambda results: [results[0], dataclasses.asdict(results[1].checkpoint.assignment), results[2]],
}


@pytest.mark.parametrize("name", sorted(NONSENSE))
def test_objects_that_are_no_results_name_their_partition(name):
    executor = TasksOnly()
    made = Plane("executor", executor=executor)
    before = everything(made.plane)
    executor.change = NONSENSE[name]
    with pytest.raises(ERROR) as caught:
        made.step()
    assert everything(made.plane) == before
    assert caught.value.partition == rs.PartitionId(1)
    assert caught.value.step == 0


@pytest.mark.parametrize(
    ("name", "change", "count"),
    [
        ("one less", lambda results: results[:-1], 2),
        ("one more", lambda results: [*results, results[0]], 4),
        ("none", lambda results: [], 0),
        ("None", lambda results: None, 0),
        ("a generator", lambda results: (one for one in results), 0),
        ("a set", lambda results: {1, 2, 3}, 0),
        ("a number", lambda results: 3, 0),
    ],
)
def test_a_wrong_number_of_results(name, change, count):
    executor = TasksOnly()
    made = Plane("executor", executor=executor)
    before = everything(made.plane)
    executor.change = change
    with pytest.raises(errors.ExecutorError) as caught:
        made.step()
    assert everything(made.plane) == before
    source = caught.value.source
    assert isinstance(source, rs.PartitionExecutorError.ResultCountMismatch)
    assert (source.expected, source.actual) == (3, count)
    assert (caught.value.partition, caught.value.phase, caught.value.step) == (None, None, 0)


@pytest.mark.parametrize("container", [list, tuple, UserList])
def test_any_sequence_will_do(container):
    made = Plane("executor", executor=TasksOnly(container))
    made.run(2)
    assert stream(made.plane) == reference_stream(2)


def test_several_wrong_results_are_all_told():
    def both(results):
        return on(2, WRONG["step kept"])(on(0, WRONG["ids changed"])(results))

    made = Plane("executor", executor=TasksOnly(both))
    with pytest.raises(errors.PartitionCheckpointError) as caught:
        made.step()
    assert caught.value.partition == rs.PartitionId(0)
    assert [other.partition for other in caught.value.others] == [rs.PartitionId(2)]


def test_results_in_another_order_name_both_partitions():
    made = Plane("executor", executor=TasksOnly(lambda results: [results[1], results[0], results[2]]))
    with pytest.raises(errors.PartitionCheckpointError) as caught:
        made.step()
    assert caught.value.partition == rs.PartitionId(1)
    assert [other.partition for other in caught.value.others] == [rs.PartitionId(0)]


class Careless:
    """An executor that runs the phases itself and lets pass whatever they raise."""

    def execute(self, tasks):
        return [self.one(task) for task in tasks]

    def one(self, task):
        context, checkpoint, _, phases = task.into_parts()
        for phase in phases:
            phase.run(context, checkpoint.state.columns, checkpoint.state.agent_count)
        return rs.PartitionTaskResult.completed(context, checkpoint, [])


class Delegating:
    """An executor that raises what another plane raised."""

    def execute(self, tasks):
        raise errors.ExecutorError(errors.Worker(tasks[2].context().partition_id, "lost"))


def unlucky(error):
    def phase(context, columns, rows):
        if context.partition_id.value == 1:
            raise error

    return phase


def reshaping(context, columns, rows):
    if context.partition_id.value == 1:
        columns["x"].shape = (rows, 1)


@pytest.mark.parametrize(
    ("phase", "text"),
    [
        (unlucky(ValueError("no luck")), "phase bad failed: no luck"),
        (unlucky(SystemExit(3)), "worker failed: partition worker thread panicked"),
        (reshaping, "phase bad failed: column "),
    ],
)
def test_what_a_phase_raises_through_an_executor_names_where(phase, text):
    labels = ["a", "b", "c"]
    made = Plane(
        "executor",
        executor=Careless(),
        phases=[("move", move), ("bad", phase)],
        partition_plan=rs.PartitionPlan.row_ranges(10, 3).with_workers(labels),
        partition_workers=[rs.PartitionWorker.local_cpu(label) for label in labels],
    )
    before = everything(made.plane)
    with pytest.raises(errors.ExecutorError) as caught:
        made.step()
    assert everything(made.plane) == before
    error = caught.value
    assert str(error).startswith(f"partition executor error: partition PartitionId(1) {text}")
    assert (error.partition, error.worker, error.phase, error.step) == (rs.PartitionId(1), "b", "bad", 0)
    assert "worker: b" in error.details()


def test_an_executor_may_raise_what_a_plane_raises():
    made = Plane("executor", executor=Delegating())
    with pytest.raises(errors.ExecutorError) as caught:
        made.step()
    assert str(caught.value) == "partition executor error: partition PartitionId(2) worker failed: lost"
    assert caught.value.partition == rs.PartitionId(2)
