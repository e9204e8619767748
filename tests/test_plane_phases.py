"""What phases see and may do: columns by name and position, the context, and every way to break the rules."""

import dataclasses

import numpy as np
import pytest
from planes import KINDS, Plane, everything, move, small_store, stream

import rustsim_hpc as rs
from rustsim_hpc import errors

ERROR = rs.EngineControlPlaneError
PARTITIONED = ("partition", "executor", "threads", "tasks")


def every_dtype(rows=7):
    rng = np.random.default_rng(1)
    named = {
        name: (rng.integers(0, 2, rows) if name == "bool" else rng.integers(0, 100, rows)).astype(name)
        for name in (
            "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
            "bool",
        )
    }  # fmt: skip
    return rs.DeviceSoaStore.from_columns(None, named)


def flip(context, columns, rows):
    for column in columns:
        if column.dtype == bool:
            np.logical_not(column, out=column)
        else:
            np.add(column, column.dtype.type(1), out=column)


@pytest.mark.parametrize("scheme", ["fnv1a", "digest"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype(kind, scheme):
    made = Plane(kind, store=every_dtype(), phases=[("flip", flip)], fingerprint=scheme)
    start = made.plane.checkpoint()
    made.run(3)
    for before, after in zip(start.state.columns, made.plane.runtime.columns, strict=True):
        assert after.dtype == before.dtype
        wanted = ~before if before.dtype == bool else before + before.dtype.type(3)
        assert after.tolist() == wanted.tolist()
    assert made.plane.recorded_replay()[-1] == rs.fingerprint_checkpoint(
        3, made.plane.checkpoint().state, scheme
    )
    made.plane.restore(start)
    again = made.run(3)
    assert [step.fingerprint for step in again] == list(made.plane.recorded_replay())


@pytest.mark.parametrize("kind", KINDS)
def test_columns_by_name_position_and_assignment(kind):
    def phase(context, columns, rows):
        assert len(columns) == 4
        assert list(columns.names) == ["x", "vx", "y", "vy"]
        assert [column.shape for column in columns] == [(rows,)] * 4
        assert columns["vx"] is columns[1] is columns[-3]
        assert [one is two for one, two in zip(columns[1:3], (columns["vx"], columns["y"]), strict=True)] == [
            True
        ] * 2
        columns["x"] += np.float32(1)
        columns[0] *= np.float32(2)
        columns["vx"] = np.full(rows, 5, np.float32)
        columns["y"] = columns["vx"]
        columns["vy"] = columns["vy"][::-1]

    made = Plane(kind, phases=[("phase", phase)], parts=1)
    start = made.plane.checkpoint().state
    made.step()
    x, vx, y, vy = made.plane.runtime.columns
    assert x.tolist() == ((start.column(0) + np.float32(1)) * np.float32(2)).tolist()
    assert vx.tolist() == y.tolist() == [5] * 10
    assert vy.tolist() == start.column(3)[::-1].tolist()


@pytest.mark.parametrize("kind", PARTITIONED)
def test_the_context(kind):
    seen = []
    plan = rs.PartitionPlan.row_ranges(10, 2).with_workers(["a", "b"])
    workers = [rs.PartitionWorker.local_cpu("b"), rs.PartitionWorker.local_cpu("a")]
    made = Plane(
        kind,
        phases=[("look", lambda context, columns, rows: seen.append((context, rows)))],
        partition_plan=plan,
        partition_workers=workers,
        step_index=6,
    )
    made.step()
    local = rs.PartitionExecutionBackend.local_cpu()
    seen.sort(key=lambda pair: pair[0].partition_id)
    assert seen == [
        (rs.PartitionExecutionContext(rs.PartitionId(0), 0, 5, "a", local, 6), 5),
        (rs.PartitionExecutionContext(rs.PartitionId(1), 5, 10, "b", local, 6), 5),
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen[0][0].row_start = 3
    assert [report.worker for report in made.step().phases] == ["a", "b"]


def test_the_context_of_a_runtime_phase():
    seen = []
    made = Plane(
        "runtime",
        phases=[("look", lambda context, columns, rows: seen.append((context, rows)))],
        step_index=6,
    )
    made.step()
    local = rs.PartitionExecutionBackend.local_cpu()
    assert seen == [(rs.PartitionExecutionContext(rs.PartitionId(0), 0, 10, None, local, 6), 10)]


@pytest.mark.parametrize("kind", PARTITIONED)
def test_within_a_partition_all_phases_run_in_order(kind):
    seen = []
    phases = [
        (name, lambda c, columns, rows, name=name: seen.append((c.partition_id.value, name)))
        for name in "abc"
    ]
    made = Plane(kind, phases=phases, parts=4)
    made.step()
    for partition in range(4):
        assert [name for where, name in seen if where == partition] == ["a", "b", "c"]
    assert len(seen) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_later_phases_see_what_earlier_ones_wrote(kind):
    def first(context, columns, rows):
        columns["x"][:] = 3

    def second(context, columns, rows):
        columns["y"][:] = columns["x"] + 1

    made = Plane(kind, phases=[("first", first), ("second", second)])
    made.step()
    assert set(made.plane.runtime.columns[2].tolist()) == {4}


# -- what a phase may not do -------------------------------------------------------------------------


def put(key, value):
    def phase(context, columns, rows):
        columns["vy"][:] = 9
        columns[key] = value(rows) if callable(value) else value

    return phase


def mutate(change):
    def phase(context, columns, rows):
        columns["vy"][:] = 9
        change(columns["x"])

    return phase


def set_dtype(column):
    column.dtype = np.int32


def set_length(column):
    column.resize(3)


def set_shape(column):
    column.shape = (len(column), 1)


BROKEN = {
    "longer": (put("x", lambda rows: np.zeros(rows + 1, np.float32)), "cannot be replaced by shape"),
    "shorter": (put("x", lambda rows: np.zeros(rows - 1, np.float32)), "cannot be replaced by shape"),
    "empty": (put("x", lambda rows: np.zeros(0, np.float32)), "cannot be replaced by shape"),
    "a scalar": (put("x", np.float32(1)), "cannot be replaced by shape"),
    "two dimensions": (put("x", lambda rows: np.zeros((rows, 1), np.float32)), "cannot be replaced by shape"),
    "another dtype": (put("x", np.zeros), "is float32, cannot be replaced by float64"),
    "integers": (put("x", lambda rows: np.zeros(rows, np.int32)), "cannot be replaced by int32"),
    "a list": (put("x", lambda rows: [0.0] * rows), "cannot be replaced by float64"),
    "None": (put("x", None), "cannot be replaced by object"),
    "a misspelt name": (put("vxx", lambda rows: np.zeros(rows, np.float32)), "did you mean"),
    "a column too far": (put(4, lambda rows: np.zeros(rows, np.float32)), "out of range"),
    "resized": (mutate(set_length), "resize"),
    "dtype set": (mutate(set_dtype), "dtype"),
    "shape set": (mutate(set_shape), "shape"),
}


@pytest.mark.parametrize("guard", ["rollback", "torn"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_phase_that_breaks_the_columns(name, kind, guard):
    broken, text = BROKEN[name]
    made = Plane(kind, phases=[("move", move), ("broken", broken)], guard=rs.StepGuard(guard))
    before = everything(made.plane)
    with pytest.raises(ERROR, match=text) as caught:
        made.step()
    assert (caught.value.phase, caught.value.step) == ("broken", 0)
    if guard == "rollback":
        assert everything(made.plane) == before
    else:
        with pytest.raises(errors.TornState):
            made.step()
    assert {column.dtype for column in made.plane.runtime.columns} == {np.dtype(np.float32)}
    assert {column.shape for column in made.plane.runtime.columns} == {(10,)}


def read_only_fill(context, columns, rows):
    columns["vx"].fill(0)


def read_only_in_place(context, columns, rows):
    columns["vx"] += np.float32(1)


def read_only_assigned(context, columns, rows):
    columns["vx"] = np.zeros(rows, np.float32)


def read_only_unlocked(context, columns, rows):
    columns["vx"].flags.writeable = True
    columns["vx"].fill(0)


@pytest.mark.parametrize("guard", ["rollback", "torn"])
@pytest.mark.parametrize("kind", ["runtime", "partition", "executor", "threads"])
@pytest.mark.parametrize("fn", [read_only_fill, read_only_in_place, read_only_assigned, read_only_unlocked])
def test_a_column_that_was_not_declared_is_read_only(fn, kind, guard):
    phase = rs.column_phase(writes="x")(fn)
    made = Plane(kind, phases=[("phase", phase)], guard=rs.StepGuard(guard))
    before = made.plane.runtime.device_store().checkpoint()
    with pytest.raises(ERROR) as caught:
        made.step()
    assert caught.value.phase == "phase"
    assert made.plane.runtime.device_store().checkpoint() == before


@pytest.mark.parametrize("kind", KINDS)
def test_declared_columns_give_the_same_bits(kind):
    @rs.column_phase(writes=("x", "vy"), row_local=True)
    def declared(context, columns, rows):
        columns["x"] += columns["vx"]
        columns["vy"] = -columns["vy"]

    made, plain = (Plane(kind, phases=[("phase", fn)]) for fn in (declared, declared.fn))
    made.run(3)
    plain.run(3)
    assert stream(made.plane) == stream(plain.plane)
    assert made.step().fingerprint.step_index == 4


def test_a_column_phase_is_known_by_the_name_it_is_added_under():
    @rs.column_phase(writes="x")
    def inner(context, columns, rows):
        columns["x"] += np.float32(1)

    made = Plane("partition", phases=[("outer", inner)])
    assert made.step().phases[0].name == "outer"
    assert inner.name == "inner"


@rs.row_kernel(writes="x")
def kernel(x):
    return x


@pytest.mark.parametrize("what", [None, 3, b"move", kernel])
@pytest.mark.parametrize("kind", ["runtime", "partition", "executor"])
def test_what_is_not_a_phase(kind, what):
    made = Plane(kind)
    with pytest.raises(errors.InvalidConfig, match="odd"):
        made.add("odd", what)
    with pytest.raises(errors.InvalidConfig, match="name"):
        made.add(what, move)
    made.step()


@pytest.mark.parametrize("kind", KINDS)
def test_callables_that_are_no_functions(kind):
    class Shift:
        def __call__(self, context, columns, rows):
            columns["x"] += np.float32(1)

    made = Plane(kind, phases=[("shift", Shift())])
    start = made.plane.runtime.columns[0].copy()
    made.step()
    assert made.plane.runtime.columns[0].tolist() == (start + np.float32(1)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_phase_with_the_wrong_arguments(kind):
    made = Plane(kind, phases=[("short", lambda context: None)])
    with pytest.raises(ERROR, match="positional argument"):
        made.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_that_outlives_its_phase_cannot_write(kind):
    """It may lie in the state that a later step must be able to go back to."""
    kept = []

    def late(context, columns, rows):
        if kept:
            kept[0]["x"][:] = 0
        kept.append(columns)
        columns["x"] += np.float32(1)

    made = Plane(kind, phases=[("late", late)], parts=1)
    if kind == "tasks":  # their columns are copies
        made.run(2)
        return
    made.step()
    before = everything(made.plane)
    with pytest.raises(ERROR, match="read-only"):
        made.step()
    with pytest.raises(ValueError, match="read-only"):
        kept[0]["x"] += np.float32(1)
    assert everything(made.plane) == before


def test_phases_cannot_write_what_others_reduce():
    def phase(context, columns, rows):
        context.reductions["x"] = 1

    made = Plane("partition", store=small_store(), phases=[("phase", phase)])
    with pytest.raises(errors.PartitionExecution, match="item assignment"):
        made.step()
