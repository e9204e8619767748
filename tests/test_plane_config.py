"""Configurations that cannot be right are refused at construction; value types are frozen; errors travel."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from planes import Plane, move, seed_state, small_store

import rustsim_hpc as rs
from rustsim_hpc import errors


def built(**config):
    return rs.EngineControlPlane(rs.ColumnarRuntime(seed_state()), rs.ControlPlaneConfig(**config))


def assignment(number, start, end, worker=None):
    return rs.PartitionAssignment(rs.PartitionId(number), start, end, worker)


def plan(*ranges):
    return rs.PartitionPlan.static([assignment(number, *bounds) for number, bounds in enumerate(ranges)])


TWO = rs.PartitionPlan.row_ranges(10, 2)
INVALID = {
    "no checkpoints kept": {"max_retained_checkpoints": 0},
    "fewer than none": {"max_retained_checkpoints": -1},
    "half a checkpoint": {"max_retained_checkpoints": 2.5},
    "a true number": {"max_retained_checkpoints": True},
    "interval 0": {"checkpoint_policy": rs.CheckpointPolicy.every_steps(0)},
    "interval -1": {"checkpoint_policy": rs.CheckpointPolicy.every_steps(-1)},
    "interval 1.5": {"checkpoint_policy": rs.CheckpointPolicy.every_steps(1.5)},
    "guard": {"guard": rs.StepGuard("none")},
    "scheme": {"fingerprint": "md5"},
    "duplicate labels": {
        "partition_workers": [rs.PartitionWorker.local_cpu("a"), rs.PartitionWorker.local_cpu("a")]
    },
    "duplicate labels of two kinds": {
        "partition_workers": [rs.PartitionWorker.local_cpu("a"), rs.PartitionWorker.cuda_device("a", 0)]
    },
    "no worker": {"partition_workers": ["a"]},
    "no plan": {"partition_plan": None},
    "no policy": {"checkpoint_policy": 3},
    "no replay mode": {"replay_mode": "record"},
    "no guard": {"guard": "torn"},
    "no scheme": {"fingerprint": None},
}


@pytest.mark.parametrize("name", sorted(INVALID))
def test_what_cannot_be_right_is_refused(name):
    with pytest.raises(errors.InvalidConfig) as caught:
        built(**INVALID[name])
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("invalid control-plane configuration: ")


PLANS = {
    "too long": (rs.PartitionPlan.row_ranges(12, 3), "RangeOutOfBounds"),
    "too short": (rs.PartitionPlan.row_ranges(9, 3), "CoverageMismatch"),
    "for nobody": (rs.PartitionPlan.row_ranges(0, 3), "EmptyRange"),
    "no ranges": (plan(), "CoverageMismatch"),
    "a hole": (plan((0, 4), (5, 10)), "NonContiguousRange"),
    "an overlap": (plan((0, 4), (3, 10)), "NonContiguousRange"),
    "not from the start": (plan((1, 10)), "NonContiguousRange"),
    "backwards": (plan((0, 5), (5, 3), (3, 10)), "ReversedRange"),
    "an empty range": (plan((0, 5), (5, 5), (5, 10)), "EmptyRange"),
    "a single process with ranges": (
        rs.PartitionPlan(rs.PartitionMode.SingleProcess, TWO.assignments), "SingleProcessHasAssignments",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PLANS))
def test_plans_that_do_not_fit(name):
    given, variant = PLANS[name]
    with pytest.raises(errors.PlanError) as caught:
        built(partition_plan=given)
    assert isinstance(caught.value.source, getattr(rs.PartitionPlanError, variant))
    assert str(caught.value) == f"partition plan error: {caught.value.source}"
    assert caught.value.partition == getattr(caught.value.source, "partition", None)


@pytest.mark.parametrize("named", [["a", "gone"], ["gone", "a"], ["", "a"]])
def test_a_missing_worker_is_found_at_construction(named):
    with pytest.raises(errors.MissingPartitionWorker) as caught:
        built(partition_plan=TWO.with_workers(named), partition_workers=[rs.PartitionWorker.local_cpu("a")])
    assert caught.value.worker not in ("a", None)
    assert caught.value.partition == rs.PartitionId(named.index(caught.value.worker))


def test_workers_that_nobody_names_are_fine():
    built(partition_plan=TWO, partition_workers=[rs.PartitionWorker.cuda_device("gpu", 0)])


@pytest.mark.parametrize("step", [-1, 1.0, "1", None, True, 2**64])
def test_step_indices_of_a_runtime(step):
    with pytest.raises(errors.InvalidConfig, match="step index"):
        rs.ColumnarRuntime(seed_state(), step_index=step)
    runtime = rs.ColumnarRuntime(seed_state())
    with pytest.raises(errors.InvalidConfig, match="step index"):
        runtime.restore_device_store(small_store(), step)
    assert runtime.device_store().checkpoint() == seed_state().checkpoint()


def test_a_runtime_needs_a_store():
    with pytest.raises(errors.InvalidConfig, match="DeviceSoaStore"):
        rs.ColumnarRuntime(seed_state().checkpoint())


@pytest.mark.parametrize("runtime", [None, seed_state()])
def test_a_plane_needs_a_runtime(runtime):
    with pytest.raises(errors.InvalidConfig, match="needs a ColumnarRuntime"):
        rs.EngineControlPlane(runtime)


@pytest.mark.parametrize("config", [{}, {"fingerprint": "digest"}, rs.ReplayMode.record()])
def test_a_configuration_is_one(config):
    with pytest.raises(errors.InvalidConfig, match="expected a ControlPlaneConfig"):
        rs.EngineControlPlane(rs.ColumnarRuntime(seed_state()), config)


def test_numpy_numbers_are_numbers():
    runtime = rs.ColumnarRuntime(seed_state(), step_index=np.int64(4))
    config = rs.ControlPlaneConfig(
        max_retained_checkpoints=np.int32(2), checkpoint_policy=rs.CheckpointPolicy.every_steps(np.uint8(2))
    )
    plane = rs.EngineControlPlane(runtime, config)
    plane.run(4)
    assert [one.step_index for one in plane.checkpoints()] == [6, 8]
    assert type(plane.runtime.step_index) is int


# -- value types -------------------------------------------------------------------------------------


def step_of(kind):
    return Plane(kind, checkpoint_policy=rs.CheckpointPolicy.every_steps(1)).step()


LOCAL = rs.PartitionExecutionBackend.local_cpu()
VALUES = [
    lambda: (rs.ReplayFingerprint(3, 5), {"value": 6}),
    lambda: (rs.ReplayMode.record(), {"interval": 2}),
    lambda: (rs.ReplayMode.verify([rs.ReplayFingerprint(1, 1)]), {"expected": ()}),
    lambda: (rs.CheckpointPolicy.every_steps(3), {"interval_steps": 4}),
    lambda: (rs.StepGuard.rollback(), {"kind": "torn"}),
    lambda: (rs.ControlPlaneConfig(), {"max_retained_checkpoints": 7}),
    lambda: (rs.PartitionId(3), {"value": 4}),
    lambda: (assignment(0, 0, 4), {"worker": "a"}),
    lambda: (TWO, {"assignments": ()}),
    lambda: (rs.PartitionExecutionBackend.cuda_device(1), {"device_ordinal": 2}),
    lambda: (rs.PartitionExecutionBackend.external("tcp://a"), {"endpoint": "tcp://b"}),
    lambda: (rs.PartitionWorker.local_cpu("a"), {"label": "b"}),
    lambda: (rs.PartitionExecutionContext(rs.PartitionId(0), 0, 4, None, LOCAL, 0), {"step_index": 3}),
    lambda: (step_of("partition").phases[0], {"elapsed_us": 10**9}),
    lambda: (step_of("partition"), {"total_us": -1}),
    lambda: (step_of("runtime"), {"checkpoint": None}),
    lambda: (step_of("runtime").timing, {"total_us": -1}),
    lambda: (step_of("runtime").timing.phases[0], {"name": "other"}),
    lambda: (step_of("partition").checkpoint, {"label": "b"}),
    lambda: (Plane("partition").plane.partition_checkpoints()[0], {"step_index": 4}),
    lambda: (Plane("partition").plane.metrics(), {"steps_completed": 9}),
    lambda: (rs.EnginePhaseMetric(0, "a", rs.ColumnarPhaseBackend.cpu(), 1, 1, 1), {"executions": 2}),
    lambda: (rs.ColumnarPhaseBackend.cpu(), {"kind": "CudaResident"}),
    lambda: (rs.Column("x", "float32"), {"unit": "m"}),
]


@pytest.mark.parametrize("make", VALUES)
def test_value_types_are_frozen_comparable_replaceable_and_travel(make):
    value, change = make()
    (name, new), *_ = change.items()
    other = dataclasses.replace(value, **change)
    assert type(other) is type(value)
    assert getattr(other, name) == new
    assert other != value
    assert dataclasses.replace(value) == value
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        setattr(value, name, new)
    assert getattr(value, name) != new
    for twin in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert twin == value


def test_a_phase_report_list_reads_like_a_list():
    reports = step_of("partition").phases
    assert len(reports) == 6
    assert reports[:2] == [reports[0], reports[1]]
    assert reports[-1] is not reports[5]
    assert next(reversed(reports)) == reports[5]
    assert reports != [reports[0]]
    assert reports != "reports"
    assert repr(reports).startswith("[PartitionPhaseReport(partition_id=PartitionId(0)")
    with pytest.raises(IndexError):
        reports[6]


# -- errors ------------------------------------------------------------------------------------------


def boom(context, columns, rows):
    raise ValueError("no luck")


@pytest.mark.parametrize("kind", ["runtime", "partition", "executor", "threads", "tasks"])
@pytest.mark.parametrize(
    "travel", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))]
)
def test_errors_of_a_step_travel_with_all_facts(kind, travel):
    made = Plane(
        kind, phases=[("move", move), ("boom", boom)], checkpoint_policy=rs.CheckpointPolicy.every_steps(1)
    )
    with pytest.raises(rs.EngineControlPlaneError) as caught:
        made.run(1)
    error = caught.value
    twin = travel(error)
    assert (type(twin), str(twin), twin.details()) == (type(error), str(error), error.details())
    facts = ("rank", "host", "partition", "phase_index", "phase", "step", "hint", "exit_code")
    assert [getattr(twin, name) for name in facts] == [getattr(error, name) for name in facts]
    assert [str(other) for other in twin.others] == [str(other) for other in error.others]
    assert len(error.others) == (0 if kind == "runtime" else 2)
    assert (error.phase, error.phase_index, error.step) == ("boom", 1, 0)
    assert "step: 0" in error.details()


def test_a_plane_that_is_closed_starts_again():
    made = Plane("threads")
    made.run(2)
    made.plane.close()
    made.plane.close()
    made.run(2)
    with made.plane as plane:
        assert plane is made.plane
    assert made.plane.runtime.step_index == 4


def checkpoint_of(columns, names):
    return rs.DeviceSoaCheckpoint(np.arange(3, dtype=np.uint64), columns, names)


STEP_ONE = rs.ReplayFingerprint(1, 2)

# What is wrong, the call that has to say so, the class of the error.
ODD_ARGUMENTS = {
    "a plan of nothing": (lambda: rs.PartitionPlan.static(None), errors.InvalidConfig),
    "a plan of numbers": (lambda: rs.PartitionPlan.static([1, 2]), errors.InvalidConfig),
    "a plan of another mode": (lambda: rs.PartitionPlan("static", ()), errors.InvalidConfig),
    "no labels": (lambda: rs.PartitionPlan.row_ranges(2, 2).with_workers(None), errors.InvalidConfig),
    "a number for a label": (lambda: rs.PartitionWorker.local_cpu(3), errors.InvalidConfig),
    "a backend that is none": (lambda: rs.PartitionWorker("a", "cpu"), errors.InvalidConfig),
    "no endpoint": (lambda: rs.PartitionWorker.external("a", None), errors.InvalidConfig),
    "no workers": (lambda: rs.ControlPlaneConfig(partition_workers=None), errors.InvalidConfig),
    "nothing to verify": (lambda: rs.ReplayMode.verify(None), errors.InvalidConfig),
    "numbers to verify": (lambda: rs.ReplayMode.verify([STEP_ONE, 2]), errors.InvalidConfig),
    "half an interval": (lambda: rs.ReplayMode.record(1.5), errors.InvalidConfig),
    "text for an interval": (lambda: rs.ReplayMode.record("2"), errors.InvalidConfig),
    "text for threads": (lambda: rs.LocalThreadedPartitionExecutor("2"), errors.InvalidConfig),
    "no scheme": (lambda: rs.ReplayFingerprint(1, 2, None), errors.InvalidConfig),
    "columns without names": (lambda: rs.DeviceSoaStore.from_columns(None, [[1.0]]), errors.InvalidConfig),
    "no checkpoint": (lambda: rs.DeviceSoaStore.from_checkpoint(None), errors.DeviceSoaRestoreError),
    "a name too many": (lambda: checkpoint_of([[1, 2, 3]], ["x", "y"]), errors.DeviceSoaRestoreError),
    "a step before the first": (lambda: rs.fingerprint_checkpoint(-1, checkpoint_of([], [])), ValueError),
}


@pytest.mark.parametrize("name", ODD_ARGUMENTS)
def test_odd_arguments_are_refused_where_they_are_given(name):
    call, error = ODD_ARGUMENTS[name]
    with pytest.raises(error):
        call()


@pytest.mark.parametrize("steps", [-1, 1.5, "2", None, True])
@pytest.mark.parametrize("kind", ["runtime", "partition", "executor"])
def test_a_number_of_steps_is_one(kind, steps):
    made = Plane(kind)
    with pytest.raises(errors.InvalidConfig, match="steps must"):
        made.run(steps)
    iterate = made.plane.iter_steps if kind == "runtime" else made.plane.iter_partition_steps
    with pytest.raises(errors.InvalidConfig, match="steps must"):
        iterate(steps)
    assert made.plane.runtime.step_index == 0


def test_no_executor_is_not_the_partition_phases():
    made = Plane("executor")
    made.plane.add_partition_cpu_phase("move", move)
    with pytest.raises(errors.InvalidConfig, match="None is not a partition executor"):
        made.plane.run_partitions_with_executor(2, None)
    assert made.plane.runtime.step_index == 0


@pytest.mark.parametrize("name", ["", "two\nlines"])
def test_names_that_phases_cannot_have(name):
    plane = Plane("partition").plane
    for add in (plane.runtime.add_cpu_phase, plane.add_partition_cpu_phase):
        with pytest.raises(errors.InvalidConfig, match="cannot be the name of a phase"):
            add(name, move)


@pytest.mark.parametrize("given", [None, 5, "ab"])
def test_what_is_no_partition_checkpoints(given):
    with pytest.raises(errors.PartitionCheckpointError, match="expected "):
        Plane("partition").plane.restore_partitions(given)
