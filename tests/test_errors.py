"""The error types: their texts against the reference, their facts, and that they travel."""

import copy
import inspect
import json
import pickle
from pathlib import Path

import pytest

from rustsim_hpc import errors
from rustsim_hpc.errors import (
    EngineControlPlaneError,
    PartitionExecutorError,
    PartitionPlanError,
    RustsimError,
)
from rustsim_hpc.state.partition import PartitionId

GOLDEN = {
    entry["id"]: entry["display"]
    for entry in json.loads((Path(__file__).parent / "golden/golden.json").read_text("utf-8"))["errors"]
}
ONE = PartitionId(1)


def cases() -> dict[str, RustsimError]:
    """One error per golden entry, built by hand from its facts."""
    phase = errors.ColumnarRuntimeError(0, "boom", "no luck")
    ragged = errors.DeviceSoaRestoreError("column 1 has 9 rows, expected 10")
    config = EngineControlPlaneError.InvalidConfig
    checkpoint = EngineControlPlaneError.PartitionCheckpointError
    plan, executor = EngineControlPlaneError.PlanError, EngineControlPlaneError.ExecutorError
    schema = "partition PartitionId(2) schema does not match the first partition"
    other_plan = "partition checkpoints do not match the active partition plan"
    return {
        "invalid_config_retained": config("max_retained_checkpoints must be greater than zero"),
        "invalid_config_interval": config("checkpoint interval_steps must be greater than zero"),
        "invalid_config_order2": config("checkpoint interval_steps must be greater than zero"),
        "no_partition_phase": config("at least one partition phase must be registered"),
        "plan_zero": PartitionPlanError.InvalidPartitionCount(),
        "plan_zero_zero": PartitionPlanError.InvalidPartitionCount(),
        "plan_workers_rows_lt_parts": PartitionPlanError.WorkerCountMismatch(2, 3),
        "plan_workers_single": PartitionPlanError.WorkerCountMismatch(assignments=0, workers=1),
        "plan_out_of_bounds": plan(PartitionPlanError.RangeOutOfBounds(PartitionId(2), 12, 10)),
        "plan_empty_range": plan(PartitionPlanError.EmptyRange(PartitionId(0))),
        "plan_non_contiguous_overlap": PartitionPlanError.NonContiguousRange(ONE, 3, 4),
        "plan_non_contiguous_first": PartitionPlanError.NonContiguousRange(PartitionId(0), 1, 0),
        "plan_no_assignments": PartitionPlanError.CoverageMismatch(0, 10),
        "plan_no_assignments_0": PartitionPlanError.CoverageMismatch(0, 0),
        "plan_bounds_before_order": PartitionPlanError.RangeOutOfBounds(PartitionId(0), 12, 10),
        "replay_divergence": EngineControlPlaneError.ReplayDivergence(3, 1, 0x74F25F822D3AC07F),
        "replay_exhausted": EngineControlPlaneError.ReplayExhausted(4),
        "replay_step_mismatch": EngineControlPlaneError.ReplayStepMismatch(2, 1),
        "runtime": EngineControlPlaneError.Runtime(phase),
        "restore": EngineControlPlaneError.RestoreError(ragged),
        "pc_step": checkpoint("partition PartitionId(1) captured step 9, expected 0"),
        "pc_order": checkpoint("partition PartitionId(1) starts at row 4, expected 0"),
        "pc_schema_names": checkpoint(schema),
        "pc_schema": checkpoint(schema),
        "pc_missing_last": checkpoint(other_plan),
        "pc_other_plan": checkpoint(other_plan),
        "pc_slice": checkpoint("invalid checkpoint slice 5..11 for 10 rows"),
        "pc_slice_rev": checkpoint("invalid checkpoint slice 6..5 for 10 rows"),
        "missing_worker_executor": EngineControlPlaneError.MissingPartitionWorker(ONE, "w1"),
        "partition_phase": EngineControlPlaneError.PartitionExecution(ONE, "boom", "no luck"),
        "executor_panic": executor(
            PartitionExecutorError.Worker(PartitionId(2**32 - 1), "partition worker thread panicked")
        ),
        "executor_count_less": executor(PartitionExecutorError.ResultCountMismatch(2, 1)),
        "executor_order": checkpoint("partition PartitionId(1) starts at row 5, expected 0"),
        "executor_tamper": checkpoint("partition PartitionId(1) fingerprint mismatch"),
        "endpoint_client": executor(PartitionExecutorError.Worker(PartitionId(0), "cannot reach tcp://a")),
        "missing_endpoint": executor(PartitionExecutorError.MissingEndpoint(PartitionId(3))),
    }


def test_every_golden_error_has_a_case():
    assert set(cases()) == set(GOLDEN)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_text_is_the_references(name):
    assert str(cases()[name]) == GOLDEN[name]


def every_class() -> list[type[RustsimError]]:
    found = [value for value in vars(errors).values() if inspect.isclass(value)]
    return [cls for cls in found if issubclass(cls, RustsimError) and not cls.__name__.startswith("_")]


@pytest.mark.parametrize(
    ("root", "code"), [(PartitionPlanError, 2), (PartitionExecutorError, 3), (EngineControlPlaneError, None)]
)
def test_variants_are_attributes_of_their_root(root, code):
    variants = [cls for cls in every_class() if issubclass(cls, root) and cls is not root]
    assert len(variants) >= 4
    for variant in variants:
        assert getattr(root, variant.__name__) is variant is getattr(errors, variant.__name__)
        assert code is None or variant.exit_code == code


def test_the_references_variant_names_are_there():
    items = json.loads((Path(__file__).parent / "golden/public_items.json").read_text("utf-8"))
    for item in items:
        if item["item"].endswith("Error"):
            root = getattr(errors, item["item"])
            assert all(issubclass(getattr(root, name), root) for name in item["members"])


def test_exit_codes():
    by_code = {
        2: "InvalidConfig PlanError MissingPartitionWorker ModelError KernelError JobError RunFolderError "
        "ReplayLogError LauncherError SchemeMismatch PartitionPlanError",
        3: "Runtime PartitionExecution ExecutorError TornState CheckFailed TeamError OutputError "
        "ColumnarRuntimeError",
        4: "ReplayDivergence ReplayStepMismatch ReplayExhausted",
        5: "RestoreError PartitionCheckpointError CheckpointWriteFailed DeviceSoaRestoreError "
        "CheckpointFileError",
    }
    for code, names in by_code.items():
        assert {name: getattr(errors, name).exit_code for name in names.split()} == dict.fromkeys(
            names.split(), code
        )


def test_configuration_errors_are_value_errors():
    for name in ["InvalidConfig", "PlanError", "EmptyRange", "ModelError", "JobError", "SchemeMismatch"]:
        assert issubclass(getattr(errors, name), ValueError)


def full_error() -> RustsimError:
    other = PartitionExecutorError.Worker(PartitionId(4), "killed by signal 9")
    inner = PartitionExecutorError.Phase(ONE, "move", "no {luck}", rank=3, phase_index=0)
    error = EngineControlPlaneError.ExecutorError(
        inner, host="node17", step=6, hint="run with --check", others=(other,)
    )
    error.results = (1, 2)
    error.add_note("a note")
    return error


def test_details_print_the_facts_one_a_line_and_the_hint_last():
    assert full_error().details().splitlines() == [
        "rank: 3",
        "host: node17",
        "partition: PartitionId(1)",
        "phase: move",
        "step: 6",
        "also failed: partition PartitionId(4) worker failed: killed by signal 9",
        "hint: run with --check",
    ]
    assert errors.JobError("no").details() == ""
    others = tuple(errors.Phase(PartitionId(place), "move", "no") for place in (1, 2, 3))
    alike = errors.Phase(ONE, "move", "no", others=others)
    assert alike.details().splitlines()[-1] == "also failed: 2 other partitions, in the same way"
    divergence = EngineControlPlaneError.ReplayDivergence(3, 1, 2, columns=("x", "vx"), rank=0)
    assert divergence.details().splitlines() == ["rank: 0", "columns: x, vx"]


def pickled(error):
    return pickle.loads(pickle.dumps(error))


@pytest.mark.parametrize(
    "error",
    [
        *cases().values(),
        full_error(),
        errors.KernelError("m", kernel="k", line=3),
        errors.ColumnMemoryError("no room", rank=1),
        errors.CheckpointFileError("torn", damaged=False, step=3),
    ],
)
@pytest.mark.parametrize("travel", [pickled, copy.copy, copy.deepcopy])
def test_errors_survive_pickling_with_all_facts(error, travel):
    twin = travel(error)
    assert type(twin) is type(error)
    assert (str(twin), repr(twin), twin.details()) == (str(error), repr(error), error.details())
    facts, twins = dict(error.__dict__), dict(twin.__dict__)
    assert facts.keys() == twins.keys()
    assert {name: repr(value) for name, value in facts.items()} == {
        name: repr(value) for name, value in twins.items()
    }


def test_facts_of_the_source_are_taken_over_but_do_not_win():
    inner = PartitionPlanError.EmptyRange(ONE, rank=3, step=5)
    error = EngineControlPlaneError.PlanError(inner, rank=4)
    assert (error.rank, error.step, error.partition) == (4, 5, ONE)
    assert error.__cause__ is error.source is inner


def test_add_facts_keeps_what_is_known_and_refuses_what_is_no_fact():
    error = errors.TeamError("lost", rank=0)
    assert error.add_facts(rank=7, step=2) is error
    assert (error.rank, error.step) == (0, 2)
    with pytest.raises(TypeError, match="message is not a fact"):
        error.add_facts(message="x")


def test_required_facts_are_required():
    with pytest.raises(TypeError):
        errors.EmptyRange()
    with pytest.raises(TypeError):
        errors.ColumnarRuntimeError(0, "boom")


@pytest.mark.parametrize(
    ("values", "facts"),
    [((ONE, 1, 2), {}), ((ONE,), {"partition": ONE}), ((ONE,), {"rnak": 3}), ((), {"rank": 3})],
)
def test_fields_are_checked(values, facts):
    with pytest.raises(TypeError, match="EmptyRange"):
        errors.EmptyRange(*values, **facts)
    assert errors.EmptyRange(partition=ONE).partition is ONE
    with pytest.raises(TypeError):
        errors.KernelError("m", "kernel")


def test_kernel_errors_name_kernel_argument_and_line():
    error = errors.KernelError("no such column", kernel="move", argument="zz", file="flock.py", line=12)
    assert str(error) == "flock.py:12: kernel move, argument zz: no such column"
    assert str(errors.KernelError("no", file="f.py")) == "f.py: no"
    assert str(errors.KernelError("no", kernel="move")) == "kernel move: no"


def test_a_close_name_is_proposed():
    assert errors.nearest("stpes", ["steps", "seed"]) == ' (did you mean "steps"?)'
    assert errors.nearest("zzz", ["steps", "seed"]) == ""
    assert errors.nearest("x", iter([])) == ""
