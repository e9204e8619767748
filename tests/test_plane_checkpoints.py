"""Checkpoints of a plane: sequence, retention, what a failed one does, and that they compare by bits."""

import dataclasses
import pickle

import numpy as np
import pytest
from planes import KINDS, Plane, damp, move, reference_stream, small_store, stream

import rustsim_hpc as rs
from rustsim_hpc import errors

EVERY = rs.CheckpointPolicy.every_steps


@pytest.mark.parametrize("kind", KINDS)
def test_every_k_steps_after_the_fingerprint(kind):
    made = Plane(kind, checkpoint_policy=EVERY(2), step_index=3)
    steps = made.run(5)
    assert [step.checkpoint and step.checkpoint.step_index for step in steps] == [4, None, 6, None, 8]
    for step in steps[::2]:
        assert step.checkpoint.fingerprint == step.fingerprint
        assert step.checkpoint.label is None
    assert [made_.sequence for made_ in made.plane.checkpoints()] == [1, 2, 3]
    assert made.plane.latest_checkpoint() is steps[-1].checkpoint
    assert made.plane.metrics().checkpoints_created == 3


def test_an_explicit_checkpoint_at_step_0():
    made = Plane("partition", checkpoint_policy=EVERY(1))
    assert made.plane.latest_checkpoint() is None
    first = made.plane.checkpoint(label="start")
    assert (first.sequence, first.label, first.step_index) == (1, "start", 0)
    assert first.fingerprint == rs.fingerprint_checkpoint(0, first.state)
    assert first.resident_bytes == first.state.resident_bytes == 10 * (8 + 16)
    assert made.step().checkpoint.sequence == 2


@pytest.mark.parametrize("most", [1, 2, 4])
def test_retention_drops_the_oldest(most):
    made = Plane("partition", checkpoint_policy=EVERY(1), max_retained_checkpoints=most)
    made.run(5)
    assert [one.sequence for one in made.plane.checkpoints()] == list(range(6 - most, 6))
    assert made.plane.metrics().checkpoints_created == 5


def test_a_retention_beyond_what_can_be_counted():
    made = Plane("partition", max_retained_checkpoints=2**64 - 1)
    made.plane.checkpoint()
    assert len(made.plane.checkpoints()) == 1


@pytest.mark.parametrize("label", [3, b"x", ("a",)])
def test_a_label_is_text(label):
    with pytest.raises(errors.InvalidConfig, match="label"):
        Plane("partition").plane.checkpoint(label)


def test_a_checkpoint_is_independent_of_the_state():
    made = Plane("partition")
    kept = made.plane.checkpoint()
    copy = kept.state.slice_rows(0, 10)
    made.run(3)
    assert kept.state == copy


def test_checkpoints_between_change_nothing():
    plain, often = Plane("threads"), Plane("threads", checkpoint_policy=EVERY(1))
    for _ in range(4):
        plain.step()
        often.step()
        often.plane.checkpoint()
        often.plane.partition_checkpoints()
    assert stream(plain.plane) == stream(often.plane)


# -- checkpoints that fail ---------------------------------------------------------------------------


class Memory:
    """Lets copies of the state fail while it is full."""

    def __init__(self, monkeypatch, error):
        self.full = False

        def copy(store, *args):
            if self.full:
                raise error
            return original(store, *args)

        original = rs.DeviceSoaStore.checkpoint
        monkeypatch.setattr(rs.DeviceSoaStore, "checkpoint", copy)


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError("no space"), errors.ColumnMemoryError("full")], ids=repr
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_automatic_checkpoint_never_undoes_a_step(kind, error, monkeypatch):
    memory = Memory(monkeypatch, error)
    made = Plane(kind, checkpoint_policy=EVERY(2))
    memory.full = True
    with pytest.raises(errors.CheckpointWriteFailed) as caught:
        made.run(4)
    memory.full = False
    assert [step.checkpoint for step in caught.value.results] == [None, None]
    assert made.plane.runtime.step_index == 2, "the step stands, the next one was not begun"
    assert caught.value.step == 2
    assert (str(error) or "MemoryError") in str(caught.value)
    assert caught.value.exit_code == 5
    assert made.plane.checkpoints() == ()
    assert made.plane.metrics().checkpoints_created == 0
    made.run(2)
    assert stream(made.plane) == reference_stream(4)
    assert [one.sequence for one in made.plane.checkpoints()] == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_raised_once(kind, monkeypatch):
    memory = Memory(monkeypatch, MemoryError())
    made = Plane(kind, checkpoint_policy=EVERY(1))
    memory.full = True
    made.step()
    with pytest.raises(errors.CheckpointWriteFailed):
        made.step()
    assert made.plane.runtime.step_index == 1
    made.step()
    assert made.plane.runtime.step_index == 2


def test_an_explicit_checkpoint_that_fails(monkeypatch):
    memory = Memory(monkeypatch, MemoryError())
    made = Plane("partition")
    memory.full = True
    with pytest.raises(errors.CheckpointWriteFailed, match="step 0: MemoryError"):
        made.plane.checkpoint()
    memory.full = False
    assert made.plane.checkpoint().sequence == 1


# -- bits --------------------------------------------------------------------------------------------


def checkpoint_of(values, dtype=np.float32):
    store = rs.DeviceSoaStore.from_columns([3, 4], {"x": np.array(values, dtype)})
    return rs.EngineControlPlane(rs.ColumnarRuntime(store)).checkpoint()


def nan(word):
    return np.array([word], np.uint32).view(np.float32)[0]


def test_checkpoints_compare_by_bits():
    assert checkpoint_of([np.nan, -0.0]) == checkpoint_of([np.nan, -0.0])
    assert checkpoint_of([1, 0.0]) != checkpoint_of([1, -0.0])
    assert checkpoint_of([nan(0x7FC00001), 1]) == checkpoint_of([nan(0x7FC00001), 1])
    assert checkpoint_of([nan(0x7FC00001), 1]) != checkpoint_of([nan(0x7FC00002), 1])
    assert checkpoint_of([1, 2], np.int32).state != checkpoint_of([1, 2], np.uint32).state
    assert checkpoint_of([1, 2]) != checkpoint_of([1, 2]).state


def test_a_state_with_nan_survives_all_round_trips():
    made = Plane("partition")
    kept = made.plane.checkpoint()
    assert np.isnan(kept.state.column(2)[0])
    twin = pickle.loads(pickle.dumps(kept))
    assert twin == kept
    made.run(1)
    made.plane.restore(twin)
    assert made.plane.checkpoint().state == kept.state
    assert rs.DeviceSoaStore.from_checkpoint(kept.state).checkpoint() == kept.state


def test_checkpoints_are_frozen_and_can_be_replaced():
    kept = Plane("partition").plane.checkpoint()
    with pytest.raises(dataclasses.FrozenInstanceError):
        kept.sequence = 2
    other = dataclasses.replace(kept, sequence=7, label="x")
    assert (other.sequence, other.label, other.state == kept.state) == (7, "x", True)
    assert dataclasses.replace(kept.state, columns=kept.state.columns) == kept.state


# -- metrics -----------------------------------------------------------------------------------------


def test_metrics_are_keyed_by_the_phase_whenever_phases_are_added():
    made = Plane("partition", phases=[("p", move)])
    made.run(2)
    made.plane.runtime_mut().add_cpu_phase("r", damp)
    made.plane.step()
    made.plane.add_partition_executor_phase("e", damp)
    made.plane.step_partitions_with_executor(rs.InlinePartitionExecutor())
    made.plane.add_partition_cpu_phase("late", damp)
    made.plane.runtime_mut().add_cpu_phase("later", damp)
    made.run(1)
    made.plane.step()
    made.plane.step_partitions_with_executor(rs.InlinePartitionExecutor())
    metrics = made.plane.metrics()
    found = [(phase.phase_index, phase.name, phase.executions) for phase in metrics.phases]
    assert found == [(0, "r", 2), (1, "later", 1), (2, "p", 9), (3, "late", 3), (4, "e", 6)]
    assert metrics.phase_count == 5
    assert (metrics.steps_completed, metrics.partition_steps_completed) == (7, 5)
    assert metrics.partition_rows_processed == 10 * (2 + 1 + 2 + 1)
    reports = made.plane.step_partitions().phases
    assert [(one.phase_index, one.name) for one in reports[:2]] == [(2, "p"), (3, "late")]


def test_two_phases_of_one_name_are_two_phases():
    made = Plane("partition", phases=[("same", move), ("same", damp)], parts=2)
    made.run(3)
    assert [(p.phase_index, p.name, p.executions) for p in made.plane.metrics().phases] == [
        (0, "same", 6),
        (1, "same", 6),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_of_metrics(kind):
    made = Plane(kind, store=small_store(10), parts=2)
    start = made.plane.metrics()
    assert (start.current_step, start.agent_count, start.phase_count, start.partition_count) == (0, 10, 2, 2)
    assert start.resident_bytes == 240
    assert start.phases == ()
    made.run(3)
    later = made.plane.metrics()
    assert (start.steps_completed, later.steps_completed, later.current_step) == (0, 3, 3)
    assert later.total_step_us >= later.last_step_us >= 0
    assert later.replay_fingerprints == 3
    for phase in later.phases:
        assert phase.total_elapsed_us >= phase.last_elapsed_us >= 0
        assert phase.backend == rs.ColumnarPhaseBackend.cpu()
