"""Plans against the reference, what is refused, workers, backends, contexts and reports."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustsim_hpc.errors import (
    EngineControlPlaneError,
    InvalidConfig,
    MissingPartitionWorker,
    PartitionPlanError,
)
from rustsim_hpc.state.partition import (
    PartitionAssignment,
    PartitionExecutionBackend,
    PartitionExecutionContext,
    PartitionId,
    PartitionMode,
    PartitionPhaseReport,
    PartitionPlan,
    PartitionWorker,
    resolve_backend,
    validate_workers,
)

GOLDEN = json.loads((Path(__file__).parent / "golden/golden.json").read_text("utf-8"))
ERRORS = {entry["id"]: entry["display"] for entry in GOLDEN["errors"]}


def plan(*ranges: tuple[int, int, int]) -> PartitionPlan:
    return PartitionPlan.static(PartitionAssignment(PartitionId(i), start, end) for i, start, end in ranges)


def as_lists(made: PartitionPlan) -> list[list[int]]:
    return [[one.partition_id.value, one.row_start, one.row_end] for one in made.assignments]


@pytest.mark.parametrize(
    "entry", GOLDEN["partition_plans"]["grid"], ids=lambda e: f"{e['agents']}-{e['partitions']}"
)
def test_row_ranges_are_the_references(entry):
    made = PartitionPlan.row_ranges(entry["agents"], entry["partitions"])
    assert as_lists(made) == entry["assignments"]
    assert made.mode is PartitionMode.StaticRowRanges
    assert made.partition_count == len(entry["assignments"])
    made.validate(entry["agents"])


@pytest.mark.parametrize(
    "entry", GOLDEN["partition_plans"]["large"], ids=lambda e: f"{e['agents']}-{e['partitions']}"
)
def test_large_row_ranges_are_the_references(entry):
    made = PartitionPlan.row_ranges(int(entry["agents"]), int(entry["partitions"]))
    assert as_lists(made) == [[number, int(start), int(end)] for number, start, end in entry["assignments"]]


@given(st.integers(0, 300), st.integers(1, 400))
def test_row_ranges_cover_the_rows_once_and_evenly(agents, partitions):
    made = PartitionPlan.row_ranges(agents, partitions)
    made.validate(agents)
    sizes = [len(assignment) for assignment in made.assignments]
    assert sum(sizes) == agents
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == max(1, min(agents, partitions))


def test_a_huge_partition_count_makes_as_many_ranges_as_rows():
    """A loop over the partitions asked for would not end."""
    made = PartitionPlan.row_ranges(1000, 2**62)
    assert as_lists(made) == as_lists(PartitionPlan.row_ranges(1000, 1000))


def test_row_counts_of_64_bits():
    most = 2**64 - 1
    made = PartitionPlan.row_ranges(most, 3)
    assert as_lists(made) == [[0, 0, most // 3], [1, most // 3, most // 3 * 2], [2, most // 3 * 2, most]]
    assert PartitionPlan.row_ranges(most, 1).assignments[0].rows == most
    made.validate(most)


def test_counts_of_numpy_integers_do_not_overflow():
    made = PartitionPlan.row_ranges(np.int32(2**31 - 1), np.int32(2))
    assert made == PartitionPlan.row_ranges(2**31 - 1, 2)
    assert type(made.assignments[1].row_start) is int


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("agents", [0, 10])
def test_no_partitions(agents, count):
    with pytest.raises(PartitionPlanError.InvalidPartitionCount) as caught:
        PartitionPlan.row_ranges(agents, count)
    assert str(caught.value) == ERRORS["plan_zero"] == ERRORS["plan_zero_zero"]


@pytest.mark.parametrize(
    ("agents", "count"), [(-1, 2), (1.5, 2), (10, 2.0), (10, True), ("10", 2), (2**40, 2**40)]
)
def test_bad_counts(agents, count):
    with pytest.raises(InvalidConfig):
        PartitionPlan.row_ranges(agents, count)


def test_single_process():
    made = PartitionPlan.single_process()
    assert made == PartitionPlan()
    assert (made.mode, made.assignments, made.partition_count) == (PartitionMode.SingleProcess, (), 1)
    made.validate(0)
    made.validate(10)
    assert made.materialized_assignments(10) == (PartitionAssignment(PartitionId(0), 0, 10),)
    assert plan((0, 0, 4), (1, 4, 10)).materialized_assignments(10) == plan((0, 0, 4), (1, 4, 10)).assignments


REFUSED = {
    "plan_non_contiguous_overlap": (plan((0, 0, 4), (1, 3, 10)), 10, PartitionPlanError.NonContiguousRange),
    "plan_non_contiguous_first": (plan((0, 1, 10)), 10, PartitionPlanError.NonContiguousRange),
    "plan_no_assignments": (plan(), 10, PartitionPlanError.CoverageMismatch),
    "plan_no_assignments_0": (plan(), 0, PartitionPlanError.CoverageMismatch),
    "plan_bounds_before_order": (plan((0, 0, 12), (1, 12, 10)), 10, PartitionPlanError.RangeOutOfBounds),
    "plan_out_of_bounds": (PartitionPlan.row_ranges(12, 3), 10, PartitionPlanError.RangeOutOfBounds),
    "plan_empty_range": (PartitionPlan.row_ranges(0, 3), 10, PartitionPlanError.EmptyRange),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_fit_is_refused_in_the_references_words(name):
    made, agents, variant = REFUSED[name]
    with pytest.raises(variant) as caught:
        made.validate(agents)
    assert str(caught.value) == ERRORS[name].removeprefix("partition plan error: ")


@pytest.mark.parametrize(
    ("made", "agents", "variant", "text"),
    [
        (
            plan((0, 0, 5), (1, 5, 3), (2, 3, 10)),
            10,
            PartitionPlanError.ReversedRange,
            "partition PartitionId(1) ends at row 3, before its start 5",
        ),
        (
            plan((0, 0, 0)),
            10,
            PartitionPlanError.EmptyRange,
            "partition PartitionId(0) has an empty row range",
        ),
        (
            plan((0, 0, 9)),
            10,
            PartitionPlanError.CoverageMismatch,
            "static partition plan covers 9 rows, expected 10",
        ),
        (
            PartitionPlan(PartitionMode.SingleProcess, plan((0, 0, 10)).assignments),
            10,
            PartitionPlanError.SingleProcessHasAssignments,
            "single-process partition plan must not contain row assignments",
        ),
    ],
)
def test_more_that_is_refused(made, agents, variant, text):
    with pytest.raises(variant) as caught:
        made.validate(agents)
    assert str(caught.value) == text
    assert caught.value.exit_code == 2


def test_empty_partitions_of_an_empty_population():
    plan((0, 0, 0), (1, 0, 0)).validate(0)


def test_with_workers_labels_in_order_and_leaves_the_plan_alone():
    bare = PartitionPlan.row_ranges(10, 2)
    named = bare.with_workers(["a", "b"])
    assert [assignment.worker for assignment in named.assignments] == ["a", "b"]
    assert (bare.has_worker_assignments, named.has_worker_assignments) == (False, True)
    assert as_lists(named) == as_lists(bare)


@pytest.mark.parametrize(
    ("made", "workers", "name"),
    [
        (PartitionPlan.row_ranges(2, 3), ["a", "b", "c"], "plan_workers_rows_lt_parts"),
        (PartitionPlan.single_process(), ["a"], "plan_workers_single"),
    ],
)
def test_a_wrong_number_of_labels(made, workers, name):
    with pytest.raises(PartitionPlanError.WorkerCountMismatch) as caught:
        made.with_workers(workers)
    assert str(caught.value) == ERRORS[name]


def test_partition_ids():
    assert repr(PartitionId(3)) == str(PartitionId(3)) == "PartitionId(3)"
    assert sorted([PartitionId(10), PartitionId(2)]) == [PartitionId(2), PartitionId(10)]
    assert {PartitionId(1): "x"}[PartitionId(1)] == "x"
    assert (PartitionId(2**32 - 1).value, PartitionId(np.uint8(7))) == (4294967295, PartitionId(7))
    for bad in (-1, 2**32, 1.0, "1", True, None):
        with pytest.raises(InvalidConfig):
            PartitionId(bad)


def test_an_assignment_knows_its_rows_and_is_frozen():
    one = PartitionAssignment(PartitionId(1), 3, 7, "a")
    assert (len(one), one.rows, one.is_empty()) == (4, 4, False)
    empty, backwards = dataclasses.replace(one, row_end=3), dataclasses.replace(one, row_end=2)
    assert (len(empty), empty.is_empty(), bool(empty)) == (0, True, True)
    assert (len(backwards), backwards.is_empty()) == (0, True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.row_end = 9


@pytest.mark.parametrize(
    "fields",
    [(0, 0, 1), (PartitionId(0), -1, 1), (PartitionId(0), 0, 1.0), (PartitionId(0), 0, 1, 5)],
)
def test_bad_assignments(fields):
    with pytest.raises(InvalidConfig):
        PartitionAssignment(*fields)


def test_backends_are_variants_with_values():
    backend = PartitionExecutionBackend
    assert backend.local_cpu() == backend.LocalCpu()
    assert backend.cuda_device(1) == backend.CudaDevice(1) != backend.CudaDevice(2)
    assert backend.external("tcp://a").endpoint == "tcp://a"
    assert backend.CudaDevice(device_ordinal=3).device_ordinal == 3
    for one in (backend.local_cpu(), backend.cuda_device(0), backend.external("")):
        assert isinstance(one, backend)
        assert pickle.loads(pickle.dumps(one)) == one
    assert len({backend.local_cpu(), backend.LocalCpu(), backend.cuda_device(0)}) == 2
    with pytest.raises(InvalidConfig):
        backend.cuda_device(-1)


def test_workers_and_their_backends():
    workers = [
        PartitionWorker.local_cpu("a"),
        PartitionWorker.cuda_device("b", 1),
        PartitionWorker.external("c", "tcp://c"),
    ]
    made = PartitionPlan.row_ranges(9, 3).with_workers(["c", "a", "b"])
    validate_workers(made, workers)
    assert [resolve_backend(assignment, workers) for assignment in made.assignments] == [
        PartitionExecutionBackend.external("tcp://c"),
        PartitionExecutionBackend.local_cpu(),
        PartitionExecutionBackend.cuda_device(1),
    ]
    bare = PartitionPlan.row_ranges(9, 1).assignments[0]
    assert resolve_backend(bare, workers) == PartitionExecutionBackend.local_cpu()


def test_an_unknown_label_is_refused_by_both():
    made = PartitionPlan.row_ranges(9, 2).with_workers(["w0", "w1"])
    workers = [PartitionWorker.local_cpu("w0")]
    with pytest.raises(EngineControlPlaneError.MissingPartitionWorker) as caught:
        validate_workers(made, workers)
    assert str(caught.value) == ERRORS["missing_worker_executor"]
    with pytest.raises(MissingPartitionWorker):
        resolve_backend(made.assignments[1], workers)


def test_duplicate_labels_are_refused():
    workers = [PartitionWorker.local_cpu("a"), PartitionWorker.cuda_device("a", 0)]
    with pytest.raises(InvalidConfig, match='label "a"'):
        validate_workers(PartitionPlan.single_process(), workers)


def test_contexts_compare_by_what_the_reference_knows():
    context = PartitionExecutionContext(PartitionId(1), 4, 7, None, PartitionExecutionBackend.local_cpu(), 5)
    assert (context.params, context.reductions, context.random) == (None, None, None)
    richer = dataclasses.replace(context, params=object(), random=object())
    assert richer == context
    assert repr(richer) == repr(context)
    assert dataclasses.replace(context, step_index=6) != context


def test_reports_are_values():
    report = PartitionPhaseReport(
        PartitionId(1), "a", 2, "move", PartitionExecutionBackend.local_cpu(), 3, 41
    )
    assert pickle.loads(pickle.dumps(report)) == report
    assert dataclasses.replace(report, rows=4) != report


@pytest.mark.parametrize("kind", ["plan", "assignment"])
def test_plans_travel(kind):
    made = PartitionPlan.row_ranges(10, 3).with_workers(["a", "b", "c"])
    value = made if kind == "plan" else made.assignments[2]
    assert pickle.loads(pickle.dumps(value)) == value
    assert hash(value) == hash(dataclasses.replace(value))
