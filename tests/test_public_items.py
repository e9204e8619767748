"""Every public item of the reference is there under its name; a property or called, as the contract says."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

import rustsim_hpc as rs
from rustsim_hpc import errors

ITEMS = json.loads((Path(__file__).parent / "golden/public_items.json").read_text("utf-8"))
BY_NAME = {item["item"]: item for item in ITEMS}
PAIRS = [(item["item"], member) for item in ITEMS for member in item["members"]]

# A Rust getter that is a property here. Every other method is called.
PROPERTIES = {
    "EngineControlPlane": {"runtime()", "config()", "partition_plan()", "partition_phase_count()"},
    "PartitionPlan": {"mode()", "assignments()", "partition_count()", "has_worker_assignments()"},
}
# An enum variant that is a classmethod here.
CLASSMETHODS = {
    ("ReplayMode", "Off"): "off",
    ("ReplayMode", "Record"): "record",
    ("ReplayMode", "Verify"): "verify",
    ("CheckpointPolicy", "Disabled"): "disabled",
    ("CheckpointPolicy", "EverySteps"): "every_steps",
}
CONSTRUCTED = {"new()"}
METHODS_OF_LEN = {"len()": "__len__"}


def find(item: str) -> type:
    return getattr(errors if item.endswith("Error") else rs, item)


@pytest.mark.parametrize("item", sorted(BY_NAME))
def test_the_item_is_there(item):
    found = find(item)
    assert inspect.isclass(found)
    assert found.__doc__
    if item.endswith("Error"):
        assert issubclass(found, Exception)
    assert not hasattr(rs, item) or getattr(rs, item) is found


@pytest.mark.parametrize(("item", "member"), PAIRS, ids=lambda value: value)
def test_the_member_is_there(item, member):
    cls = find(item)
    if item.endswith("Error"):
        assert issubclass(getattr(cls, member), cls)
    elif (item, member) in CLASSMETHODS:
        assert inspect.ismethod(getattr(cls, CLASSMETHODS[item, member]))
    elif member in METHODS_OF_LEN:
        assert callable(getattr(cls, METHODS_OF_LEN[member]))
    elif member in PROPERTIES.get(item, ()):
        name = member.removesuffix("()")
        assert (
            isinstance(inspect.getattr_static(cls, name, None), property) or name in cls.__dataclass_fields__
        )
    elif member.endswith("()"):
        name = member.removesuffix("()")
        assert callable(getattr(cls, name, None)) or (member in CONSTRUCTED and callable(cls))
    elif BY_NAME[item]["kind"] == "enum":
        assert hasattr(cls, member)
    else:
        assert member in cls.__dataclass_fields__


def test_every_item_of_the_list_was_walked():
    assert len(BY_NAME) == len(ITEMS) == 29
    assert len(PAIRS) == 150


def test_partition_id_is_a_number():
    assert rs.PartitionId(4).value == 4


@pytest.mark.parametrize(
    "name",
    ["ColumnarRuntime", "ColumnarStepTiming", "ColumnarPhaseTiming", "ColumnarPhaseBackend", "DeviceSoaStore",
     "DeviceSoaCheckpoint", "StepGuard", "Schema", "Column", "ColumnarRuntimeError", "DeviceSoaRestoreError"],
)  # fmt: skip
def test_what_the_reference_uses_and_does_not_show(name):
    assert inspect.isclass(getattr(rs, name))


def test_the_contracts_properties():
    store = rs.DeviceSoaStore.from_columns(np.arange(3, dtype=np.uint64), {"x": np.zeros(3, np.float32)})
    state, runtime = store.checkpoint(), rs.ColumnarRuntime(store, step_index=4)
    for holder in (store, state, runtime):
        assert list(holder.ids) == [0, 1, 2]
        assert len(holder.columns) == holder.num_columns == 1
        assert tuple(holder.column_names) == holder.schema.names == ("x",)
        assert (holder.agent_count, holder.resident_bytes) == (3, 36)
    assert (runtime.step_index, runtime.phase_count) == (4, 0)
    assert store.column(0).dtype == state.column(0).dtype == np.float32
    plane = rs.EngineControlPlane(runtime)
    assert plane.runtime is runtime
    assert plane.config == rs.ControlPlaneConfig()
    assert (plane.partition_plan, plane.partition_phase_count) == (rs.PartitionPlan.single_process(), 0)


def test_the_defaults_are_the_references():
    config = rs.ControlPlaneConfig()
    assert (config.replay_mode, config.checkpoint_policy) == (
        rs.ReplayMode.off(),
        rs.CheckpointPolicy.disabled(),
    )
    assert (config.max_retained_checkpoints, config.partition_workers) == (4, ())
    assert config.partition_plan == rs.PartitionPlan.single_process()
    assert (config.guard, config.fingerprint) == (rs.StepGuard.rollback(), "fnv1a")


def test_new_and_with_config_are_the_constructor():
    def runtime():
        return rs.ColumnarRuntime(rs.DeviceSoaStore.from_columns([0], {"x": np.zeros(1, np.float32)}))

    assert rs.EngineControlPlane.new(runtime()).config == rs.ControlPlaneConfig()
    config = rs.ControlPlaneConfig(max_retained_checkpoints=9)
    assert rs.EngineControlPlane.with_config(runtime(), config).config is config
    assert isinstance(rs.LocalThreadedPartitionExecutor.new(), rs.PartitionExecutor)


def test_everything_exported_has_a_docstring():
    for name in rs.__all__:
        assert getattr(rs, name).__doc__, name
