"""Restore checks first and replaces after: what is tampered, foreign or ragged changes nothing."""

import dataclasses

import numpy as np
import pytest
from planes import KINDS, Plane, everything, reference_stream, small_store, stream

import rustsim_hpc as rs
from rustsim_hpc import errors

ERROR = rs.EngineControlPlaneError
NAMES = ("x", "vx", "y", "vy")


def changed(made, **changes):
    """The checkpoint with another state, and not proved again."""
    return dataclasses.replace(made, state=dataclasses.replace(made.state, **changes))


def proved(made, scheme="fnv1a"):
    """The checkpoint with the fingerprint that its state has: only other checks can refuse it."""
    return dataclasses.replace(
        made, fingerprint=rs.fingerprint_checkpoint(made.step_index, made.state, scheme)
    )


def columns(made, change):
    return changed(made, columns=tuple(change([column.copy() for column in made.state.columns])))


def value(made):
    def change(arrays):
        arrays[1][2] += 1
        return arrays

    return columns(made, change)


def sign_of_zero(made):
    def change(arrays):
        assert arrays[3][-1] == 0
        arrays[3][-1] = 0.0
        return arrays

    return columns(made, change)


def stated(made, **changes):
    return dataclasses.replace(made, fingerprint=dataclasses.replace(made.fingerprint, **changes))


def half(made):
    return dataclasses.replace(made, state=made.state.slice_rows(0, 5))


def schema(made, **changes):
    return rs.Schema(tuple(dataclasses.replace(column, **changes) for column in made.state.schema.columns))


def f8(made):
    arrays = tuple(column.astype(np.float64) for column in made.state.columns)
    return changed(made, columns=arrays, schema=schema(made, dtype="float64"))


def renamed(made):
    names = ("x", "vx", "y", "vz")
    return changed(made, column_names=names, schema=rs.Schema.plain(names, ["float32"] * 4))


REFUSED = {
    "a value": value,
    "the sign of a zero": sign_of_zero,
    "the ids": lambda made: changed(made, ids=made.state.ids[::-1].copy()),
    "the step": lambda made: dataclasses.replace(made, step_index=made.step_index + 1),
    "the step, both": lambda made: stated(dataclasses.replace(made, step_index=9), step_index=9),
    "a negative step": lambda made: dataclasses.replace(made, step_index=-1),
    "no number as step": lambda made: dataclasses.replace(made, step_index=float(made.step_index)),
    "the fingerprint": lambda made: stated(made, value=made.fingerprint.value ^ 1),
    "the scheme": lambda made: stated(made, scheme="digest"),
    "half of the rows": half,
    "names swapped": lambda made: changed(made, column_names=("vx", "x", "y", "vy")),
    "ragged": lambda made: columns(made, lambda a: [a[0], a[1][:-1], *a[2:]]),
    "ragged, proved": lambda made: proved(columns(made, lambda a: [a[0], a[1][:-1], *a[2:]])),
    "ids too short": lambda made: proved(changed(made, ids=made.state.ids[:-1])),
    "extra column": lambda made: proved(columns(made, lambda a: [*a, a[0]])),
    "column left out": lambda made: proved(columns(made, lambda a: a[:3])),
    "two dimensions": lambda made: columns(made, lambda a: [a[0].reshape(-1, 1), *a[1:]]),
    "other dtype": lambda made: proved(columns(made, lambda a: [a[0].astype(np.float64), *a[1:]])),
    "other byte order": lambda made: columns(made, lambda a: [a[0].astype(">f4"), *a[1:]]),
    "foreign names": lambda made: proved(renamed(made)),
    "foreign dtypes": lambda made: proved(f8(made)),
    "foreign units": lambda made: proved(changed(made, schema=schema(made, unit="m"))),
    "rows of another rank": lambda made: proved(changed(made, row_offset=5)),
    "no state": lambda made: dataclasses.replace(made, state=None),
    "no fingerprint": lambda made: dataclasses.replace(made, fingerprint=None),
    "a fingerprint's value alone": lambda made: dataclasses.replace(made, fingerprint=made.fingerprint.value),
    "nothing": lambda made: None,
    "a state": lambda made: made.state,
}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_checkpoint_that_is_not_whole_and_ours(name, single):
    config = {"partition_plan": rs.PartitionPlan.single_process()} if single else {}
    made = Plane("partition", **config)
    made.run(2)
    kept = made.plane.checkpoint("kept")
    made.run(1)
    before = everything(made.plane)
    if name.startswith("half") and not single:  # the plan is asked first, it costs nothing
        wanted, code, text = errors.PlanError, 2, "partition plan error: "
    else:
        wanted, code, text = errors.RestoreError, 5, "checkpoint restore failed: "
    with pytest.raises(wanted) as caught:
        made.plane.restore(REFUSED[name](kept))
    assert everything(made.plane) == before
    assert caught.value.exit_code == code
    assert str(caught.value).startswith(text)
    made.run(1)
    assert stream(made.plane) == reference_stream(4)


def test_a_partitions_checkpoint_is_not_a_populations():
    made = Plane("partition", partition_plan=rs.PartitionPlan.single_process())
    for piece in Plane("partition").plane.partition_checkpoints():
        with pytest.raises(errors.RestoreError, match="takes an EngineCheckpoint"):
            made.plane.restore(piece)


@pytest.mark.parametrize("rows", [0, 9, 11])
def test_another_population_does_not_fit_the_plan(rows):
    made, other = Plane("partition"), Plane("partition", store=small_store(rows))
    foreign = other.plane.checkpoint()
    before = everything(made.plane)
    with pytest.raises(errors.PlanError) as caught:
        made.plane.restore(foreign)
    assert everything(made.plane) == before
    assert isinstance(caught.value.source, rs.PartitionPlanError)
    single = Plane("partition", partition_plan=rs.PartitionPlan.single_process())
    single.run(1)
    single.plane.restore(foreign)
    single.run(1)
    assert single.plane.metrics().agent_count == rows


def test_no_memory_for_the_restored_state(monkeypatch):
    made = Plane("partition")
    kept = made.plane.checkpoint()
    before = everything(made.plane)

    def none_left(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(rs.DeviceSoaStore, "from_checkpoint", none_left)
    with pytest.raises(errors.RestoreError, match="MemoryError"):
        made.plane.restore(kept)
    with pytest.raises(errors.RestoreError, match="MemoryError"):
        made.plane.restore_partitions(made.plane.partition_checkpoints())
    assert everything(made.plane) == before


@pytest.mark.parametrize("fingerprint", ["fnv1a", "digest"])
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_restore_the_same_bits(kind, fingerprint):
    made = Plane(kind, fingerprint=fingerprint)
    made.run(2)
    kept = made.plane.checkpoint()
    made.run(3)
    first = stream(made.plane)
    made.plane.restore(kept)
    assert stream(made.plane) == first[:2], "fingerprints after the restored step are dropped"
    assert made.plane.runtime.step_index == made.plane.metrics().current_step == 2
    assert made.plane.runtime.device_store().checkpoint() == kept.state
    made.run(3)
    assert stream(made.plane) == first == reference_stream(5, fingerprint=fingerprint)


@pytest.mark.parametrize("theirs", ["fnv1a", "digest"])
@pytest.mark.parametrize("ours", ["fnv1a", "digest"])
def test_a_checkpoint_of_the_other_scheme_is_proved_by_its_own(theirs, ours):
    kept = Plane("partition", fingerprint=theirs).plane.checkpoint()
    made = Plane("partition", fingerprint=ours)
    made.run(1)
    made.plane.restore(kept)
    made.run(2)
    assert stream(made.plane) == reference_stream(2, fingerprint=ours)
    with pytest.raises(errors.RestoreError, match="does not prove itself"):
        made.plane.restore(value(kept))


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (3, 16), (7, 2)])
def test_restore_onto_another_number_of_partitions(before, after):
    made = Plane("partition", parts=before)
    made.run(2)
    other = Plane("threads", parts=after, step_index=9)
    other.run(1)
    other.plane.restore(made.plane.checkpoint())
    other.run(3)
    assert stream(other.plane) == reference_stream(5)[2:]


def test_counters_sequences_and_checkpoints_go_on():
    made = Plane("partition", checkpoint_policy=rs.CheckpointPolicy.every_steps(2))
    made.run(4)
    first, second = made.plane.checkpoints()
    counted = made.plane.metrics()
    made.plane.restore(first)
    after = made.plane.metrics()
    assert dataclasses.replace(after, current_step=4) == counted
    assert made.plane.checkpoints() == (first, second)
    made.run(2)
    assert [(one.sequence, one.step_index) for one in made.plane.checkpoints()] == [(1, 2), (2, 4), (3, 4)]
    assert made.plane.metrics().steps_completed == 6
    assert second.state == made.plane.latest_checkpoint().state


def test_a_restore_does_not_tie_the_state_to_the_checkpoint():
    made = Plane("partition")
    kept = made.plane.checkpoint()
    copy = dataclasses.replace(kept, state=kept.state.slice_rows(0, 10))
    made.plane.restore(kept)
    made.run(2)
    assert kept.state == copy.state
    kept.state.columns[0][:] = 0
    assert not (made.plane.runtime.columns[0] == 0).any()


def test_views_of_the_old_state_stay_valid():
    made = Plane("partition")
    kept = made.plane.checkpoint()
    old = made.plane.runtime.columns[0]
    values = old.copy()
    made.plane.restore(kept)
    made.run(3)
    assert old.tolist() == values.tolist()


# -- partition checkpoints ---------------------------------------------------------------------------


def pieces_of(rows=10, parts=3, **given):
    made = Plane("partition", store=small_store(rows), parts=parts, **given)
    made.run(2)
    return made.plane.partition_checkpoints()


def at(place, change):
    def apply(pieces):
        pieces[place] = change(pieces[place])
        return pieces

    return apply


PIECES_REFUSED = {
    "none": lambda pieces: [],
    "one left out": lambda pieces: [pieces[0], pieces[2]],
    "one twice": lambda pieces: [pieces[0], pieces[0], pieces[2]],
    "one too many": lambda pieces: [*pieces, pieces[2]],
    "another order": lambda pieces: pieces[::-1],
    "of other steps": at(1, lambda piece: proved(dataclasses.replace(piece, step_index=5))),
    "a negative step": lambda pieces: [dataclasses.replace(piece, step_index=-1) for piece in pieces],
    "no number as step": lambda pieces: [dataclasses.replace(piece, step_index=2.0) for piece in pieces],
    "a value": at(2, value),
    "ids": at(1, lambda piece: changed(piece, ids=piece.state.ids + np.uint64(1))),
    "fingerprint": at(0, lambda piece: stated(piece, value=1)),
    "assignment": at(
        1, lambda p: dataclasses.replace(p, assignment=dataclasses.replace(p.assignment, worker="elsewhere"))
    ),
    "a partition id": at(
        1,
        lambda p: dataclasses.replace(
            p, assignment=dataclasses.replace(p.assignment, partition_id=rs.PartitionId(7))
        ),
    ),
    "rows": at(1, lambda piece: proved(dataclasses.replace(piece, state=piece.state.slice_rows(0, 2)))),
    "dtype in one": at(2, lambda p: proved(columns(p, lambda a: [a[0].astype(np.int16), *a[1:]]))),
    "dtype in all": lambda pieces: [
        proved(columns(piece, lambda a: [a[0].astype(np.float64), *a[1:]])) for piece in pieces
    ],
    "ragged": at(2, lambda p: proved(columns(p, lambda a: [a[0][:-1], *a[1:]]))),
    "extra column": at(2, lambda p: proved(columns(p, lambda a: [*a, a[0]]))),
    "extra column in all": lambda pieces: [proved(columns(p, lambda a: [*a, a[0]])) for p in pieces],
    "column left out": at(0, lambda p: proved(columns(p, lambda a: a[:3]))),
    "units": at(1, lambda p: proved(changed(p, schema=schema(p, unit="m")))),
    "not a checkpoint": at(1, lambda piece: None),
    "an engine's checkpoint": lambda pieces: [Plane("partition").plane.checkpoint()],
    "no state": at(1, lambda piece: dataclasses.replace(piece, state=None)),
    "no fingerprint": at(1, lambda piece: dataclasses.replace(piece, fingerprint=None)),
    "no assignment": at(1, lambda piece: dataclasses.replace(piece, assignment=None)),
}


@pytest.mark.parametrize("name", sorted(PIECES_REFUSED))
def test_partition_checkpoints_that_do_not_fit(name):
    made = Plane("partition")
    made.run(3)
    before = everything(made.plane)
    with pytest.raises(errors.PartitionCheckpointError) as caught:
        made.plane.restore_partitions(PIECES_REFUSED[name](pieces_of()))
    assert everything(made.plane) == before
    assert caught.value.exit_code == 5
    made.run(1)
    assert stream(made.plane) == reference_stream(4)


@pytest.mark.parametrize("change", [renamed, f8, lambda p: changed(p, schema=schema(p, unit="m"))])
def test_partition_checkpoints_of_another_schema(change):
    made = Plane("partition")
    before = everything(made.plane)
    with pytest.raises(errors.RestoreError, match="another schema"):
        made.plane.restore_partitions([proved(change(piece)) for piece in pieces_of()])
    assert everything(made.plane) == before


def test_partition_checkpoints_of_another_population():
    made = Plane("partition")
    before = everything(made.plane)
    with pytest.raises(errors.PartitionCheckpointError, match="do not match the active partition plan"):
        made.plane.restore_partitions(pieces_of(rows=11))
    assert everything(made.plane) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("container", [list, tuple, iter])
def test_partition_checkpoints_go_back(kind, container):
    made = Plane(kind)
    made.run(2)
    pieces = made.plane.partition_checkpoints()
    whole = made.plane.checkpoint()
    made.run(2)
    first = stream(made.plane)
    made.plane.restore_partitions(container(pieces))
    assert made.plane.runtime.device_store().checkpoint() == whole.state
    assert stream(made.plane) == first[:2]
    made.run(2)
    assert stream(made.plane) == first


def test_default_ids_stay_default_and_others_do_not_become_it():
    store = rs.DeviceSoaStore.from_columns(None, {name: np.ones(10, np.float32) for name in NAMES})
    made = Plane("partition", store=store)
    pieces = made.plane.partition_checkpoints()
    made.plane.restore_partitions(pieces)
    assert made.plane.runtime.device_store().default_ids
    moved = [proved(changed_offset(piece)) for piece in pieces]
    made.plane.restore_partitions(moved)
    assert made.plane.runtime.ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]


def changed_offset(piece):
    """The piece with default ids that start at 0, as if it were the first one."""
    state = piece.state
    alone = rs.DeviceSoaCheckpoint(None, state.columns, state.column_names, state.schema, rows=state.rows)
    return dataclasses.replace(piece, state=alone)


def test_partition_checkpoints_are_copies():
    made = Plane("partition")
    pieces = made.plane.partition_checkpoints()
    before = everything(made.plane)
    for piece in pieces:
        for column in piece.state.columns:
            column[:] = 7
    assert everything(made.plane) == before
