"""The plane against the reference: its run of 50 steps, its partition checkpoints, its errors' texts."""

import dataclasses
import sys

import numpy as np
import pytest
from planes import (
    EXECUTORS,
    GOLDEN,
    KINDS,
    RUN,
    STREAM,
    TEXTS,
    Plane,
    TasksOnly,
    bits,
    damp,
    f32,
    golden_store,
    move,
    seed_state,
    small_store,
    stream,
)

import rustsim_hpc as rs
from rustsim_hpc import errors

ERROR = rs.EngineControlPlaneError


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_run_is_the_references(kind, parts):
    made = Plane(kind, store=golden_store(), parts=parts)
    made.run(RUN["steps"])
    assert stream(made.plane) == STREAM
    columns = made.plane.runtime.columns
    assert [bits(column) for column in columns] == [bits(f32(column)) for column in RUN["final_columns"]]
    start = rs.fingerprint_checkpoint(0, golden_store())
    assert f"{start.value:#018x}" == RUN["fingerprint_at_step_0_not_in_stream"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_torn_guard_gives_the_same_bits(kind):
    made = Plane(kind, store=golden_store(), guard=rs.StepGuard.torn())
    made.run(RUN["steps"])
    assert stream(made.plane) == STREAM


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_in_shared_memory_gives_the_same_bits(kind):
    start = golden_store().checkpoint()
    made = Plane(kind, store=rs.DeviceSoaStore.from_checkpoint(start, kind="shared"))
    made.run(5)
    kept = made.plane.checkpoint()
    made.run(5)
    made.plane.restore(kept)
    assert made.plane.runtime.device_store().memory.kind == "shared"
    made.run(5)
    assert stream(made.plane) == STREAM[:10]


@pytest.mark.parametrize("entry", GOLDEN["partition_checkpoints"], ids=lambda e: str(e["rows"]))
def test_partition_checkpoints_are_the_references(entry):
    named = dict(zip(entry["column_names"], map(f32, entry["columns"]), strict=True))
    ids, step = np.array([int(i) for i in entry["ids"]], np.uint64), int(entry["step_index"])
    for case in entry["cases"]:
        plan = rs.PartitionPlan.row_ranges(len(ids), case["parts"]) if case["parts"] else rs.PartitionPlan()
        runtime = rs.ColumnarRuntime(rs.DeviceSoaStore.from_columns(ids, named), step)
        plane = rs.EngineControlPlane(runtime, rs.ControlPlaneConfig(partition_plan=plan))
        whole = plane.checkpoint()
        assert f"{whole.fingerprint.value:#018x}" == entry["whole_fingerprint"]
        found = [
            {
                "id": made.assignment.partition_id.value,
                "row_start": made.assignment.row_start,
                "row_end": made.assignment.row_end,
                "step_index": str(made.step_index),
                "resident_bytes": made.resident_bytes,
                "fingerprint": f"{made.fingerprint.value:#018x}",
            }
            for made in plane.partition_checkpoints()
        ]
        assert found == case["partitions"]
        plane.restore_partitions(plane.partition_checkpoints())
        assert plane.runtime.device_store().checkpoint() == whole.state


# -- the texts, raised by the plane itself -----------------------------------------------------------


def boom(context, columns, rows):
    raise ValueError("no luck")


def boom_on_1(context, columns, rows):
    if context.partition_id == rs.PartitionId(1):
        raise ValueError("no luck")


def panic_on_1(context, columns, rows):
    if context.partition_id == rs.PartitionId(1):
        raise SystemExit("out")


def plane_with(**config):
    return rs.EngineControlPlane(rs.ColumnarRuntime(seed_state()), rs.ControlPlaneConfig(**config))


def stepped(kind, steps=1, **given):
    Plane(kind, store=seed_state(), **given).run(steps)


def tampered(results):
    results[1].checkpoint.state.columns[0][0] += 1
    return results


def verify(entries):
    return rs.ReplayMode.verify([rs.ReplayFingerprint(step, value) for step, value in entries])


def seed_stream(steps):
    made = Plane("runtime", store=seed_state())
    made.run(steps)
    return stream(made.plane)


def endpoint_step(client, endpoint="tcp://a"):
    class Client:
        def execute_partition(self, endpoint, task):
            return client(endpoint, task)

    plan = rs.PartitionPlan.row_ranges(10, 1).with_workers(["w"])
    stepped(
        "executor",
        executor=rs.EndpointPartitionExecutor(Client()),
        partition_plan=plan,
        partition_workers=[rs.PartitionWorker.external("w", endpoint)],
    )


def unreachable(endpoint, task):
    raise ConnectionError(f"cannot reach {endpoint}")


def restored(change, parts=3):
    plane = plane_with(partition_plan=rs.PartitionPlan.row_ranges(10, 3))
    pieces = plane.partition_checkpoints()
    other = plane_with(partition_plan=rs.PartitionPlan.row_ranges(10, parts))
    other.restore_partitions(change(pieces))


def with_piece(pieces, place, **changes):
    pieces[place] = dataclasses.replace(pieces[place], **changes)
    return pieces


def renamed(pieces):
    state = dataclasses.replace(pieces[2].state, column_names=("x", "vx", "y", "vz"))
    return with_piece(pieces, 2, state=state)


def other_schema(pieces):
    columns = tuple(dataclasses.replace(c, unit="m") for c in pieces[2].state.schema.columns)
    state = dataclasses.replace(pieces[2].state, schema=rs.Schema(columns))
    return with_piece(pieces, 2, state=state)


def ragged():
    plane = plane_with()
    made = plane.checkpoint()
    columns = list(made.state.columns)
    columns[1] = columns[1][:9]
    plane.restore(dataclasses.replace(made, state=dataclasses.replace(made.state, columns=tuple(columns))))


CASES = {
    "invalid_config_retained": lambda: plane_with(max_retained_checkpoints=0),
    "invalid_config_interval": lambda: plane_with(checkpoint_policy=rs.CheckpointPolicy.every_steps(0)),
    "invalid_config_order2": lambda: plane_with(
        checkpoint_policy=rs.CheckpointPolicy.every_steps(0),
        partition_plan=rs.PartitionPlan.row_ranges(12, 3),
    ),
    "no_partition_phase": lambda: stepped("partition", phases=()),
    "plan_out_of_bounds": lambda: plane_with(partition_plan=rs.PartitionPlan.row_ranges(12, 3)),
    "plan_empty_range": lambda: plane_with(partition_plan=rs.PartitionPlan.row_ranges(0, 3)),
    "replay_divergence": lambda: stepped(
        "runtime", 3, replay_mode=verify([(s, 1 if s == 3 else v) for s, v in seed_stream(4)])
    ),
    "replay_exhausted": lambda: stepped("runtime", 4, replay_mode=verify(seed_stream(3))),
    "replay_step_mismatch": lambda: stepped("runtime", 1, replay_mode=verify(seed_stream(3)[1:])),
    "runtime": lambda: stepped("runtime", phases=[("boom", boom)]),
    "restore": ragged,
    "pc_step": lambda: restored(lambda pieces: with_piece(pieces, 1, step_index=9)),
    "pc_order": lambda: restored(lambda pieces: [pieces[1], pieces[0], pieces[2]]),
    "pc_schema_names": lambda: restored(renamed),
    "pc_schema": lambda: restored(other_schema),
    "pc_missing_last": lambda: restored(lambda pieces: pieces[:2]),
    "pc_other_plan": lambda: restored(lambda pieces: pieces, parts=2),
    "pc_slice": lambda: seed_state().checkpoint().slice_rows(5, 11),
    "pc_slice_rev": lambda: seed_state().checkpoint().slice_rows(6, 5),
    "missing_worker_executor": lambda: plane_with(
        partition_plan=rs.PartitionPlan.row_ranges(10, 2).with_workers(["w0", "w1"]),
        partition_workers=[rs.PartitionWorker.local_cpu("w0")],
    ),
    "partition_phase": lambda: stepped("partition", phases=[("boom", boom_on_1)]),
    "executor_panic": lambda: stepped("executor", phases=[("boom", panic_on_1)]),
    "executor_count_less": lambda: stepped("executor", executor=TasksOnly(lambda r: r[:1]), parts=2),
    "executor_order": lambda: stepped("executor", executor=TasksOnly(lambda r: r[::-1]), parts=2),
    "executor_tamper": lambda: stepped("executor", executor=TasksOnly(tampered), parts=2),
    "endpoint_client": lambda: endpoint_step(unreachable),
    "missing_endpoint": lambda: endpoint_step(unreachable, endpoint=""),
}
# Entries of plans alone are in test_partition.py. What the rules override:
STRICTER = {
    "executor_panic": ("4294967295", "1"),  # the true partition
    "missing_endpoint": ("PartitionId(3)", "PartitionId(0)"),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_plane_raises_the_references_text(name):
    with pytest.raises(ERROR) as caught:
        CASES[name]()
    old, new = STRICTER.get(name, ("", ""))
    assert str(caught.value) == TEXTS[name].replace(old, new)


def test_every_golden_error_has_a_case_somewhere():
    plans = {name for name in TEXTS if name.startswith("plan_")}
    assert set(TEXTS) == plans | set(CASES)


def test_seed_state_is_the_references():
    assert seed_stream(3)[2] == (3, 0x74F25F822D3AC07F)


# -- what a step returns -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["partition", "executor", "threads", "tasks"])
def test_a_partitioned_step(kind):
    made = Plane(kind, step_index=5)
    made.plane.runtime_mut().add_cpu_phase("first", move)
    if kind != "partition":
        made.plane.add_partition_cpu_phase("second", move)
    step = made.step()
    assert (step.step_index, step.agent_count, step.fingerprint.step_index) == (5, 10, 6)
    assert step.fingerprint == rs.fingerprint_checkpoint(6, made.plane.runtime.device_store())
    base = 1 if kind == "partition" else 2
    found = [(r.partition_id.value, r.phase_index, r.name, r.rows, r.worker) for r in step.phases]
    assert found == [
        (part, base + offset, name, rows, None)
        for part, rows in ((0, 4), (1, 3), (2, 3))
        for offset, name in enumerate(("move", "damp"))
    ]
    assert all(report.backend == rs.PartitionExecutionBackend.local_cpu() for report in step.phases)
    assert step.phases == list(step.phases)
    assert step.phases[-1] == step.phases[5]
    assert step.total_us >= sum(report.elapsed_us for report in step.phases) - len(step.phases)


def test_a_controlled_step():
    made = Plane("runtime", step_index=5)
    step = made.step()
    assert (step.timing.step_index, step.timing.agent_count) == (5, 10)
    assert [(p.phase_index, p.name, p.backend.kind) for p in step.timing.phases] == [
        (0, "move", "Cpu"),
        (1, "damp", "Cpu"),
    ]
    assert step.fingerprint.step_index == 6
    assert step.checkpoint is None


def test_the_three_lists_of_phases_are_separate():
    made = Plane("partition", phases=[("a", lambda c, columns, rows: columns["x"].fill(1))])
    made.plane.runtime_mut().add_cpu_phase("b", lambda c, columns, rows: columns["x"].fill(2))
    made.plane.add_partition_executor_phase("c", lambda c, columns, rows: columns["x"].fill(3))
    for step, value in (
        (made.plane.step, 2),
        (made.plane.step_partitions, 1),
        (lambda: made.plane.step_partitions_with_executor(rs.InlinePartitionExecutor()), 3),
    ):
        step()
        assert set(made.plane.runtime.columns[0].tolist()) == {value}
    assert made.plane.partition_phase_count == 2
    assert made.plane.metrics().phase_count == 3


@pytest.mark.parametrize("kind", KINDS)
def test_run_returns_one_result_a_step_and_iterators_keep_nothing(kind):
    made = Plane(kind)
    assert len(made.run(4)) == 4
    assert made.plane.run(0) == made.plane.run_partitions(0) == []
    if kind == "runtime":
        iterator = made.plane.iter_steps(3)
    else:
        iterator = made.plane.iter_partition_steps(3, made.executor)
    assert [step.fingerprint.step_index for step in iterator] == [5, 6, 7]
    assert stream(made.plane)[-1][0] == 7


def test_replay_off_takes_no_fingerprints():
    made = Plane("partition", replay_mode=rs.ReplayMode.off())
    assert made.step().fingerprint is None
    assert made.plane.recorded_replay() == ()
    assert made.plane.metrics().replay_fingerprints == 0


def test_no_executor_phases():
    with pytest.raises(
        errors.InvalidConfig, match="at least one executor partition phase must be registered"
    ):
        Plane("executor", phases=()).step()


def test_a_step_without_runtime_phases_counts():
    made = Plane("runtime", phases=())
    made.step()
    assert (made.plane.runtime.step_index, made.plane.metrics().steps_completed) == (1, 1)


@pytest.mark.parametrize("what", [None, 3, object(), TasksOnly, rs.InlinePartitionExecutor])
def test_what_is_not_an_executor(what):
    made = Plane("executor")
    with pytest.raises(errors.InvalidConfig, match="not a partition executor"):
        made.plane.step_partitions_with_executor(what)


def test_a_huge_partition_count_is_that_of_the_rows():
    """A loop over the partitions asked for would not end."""
    made = Plane("partition", parts=2**62)
    made.run(3)
    assert made.plane.metrics().partition_count == 10


def _bind(rows):
    workers = [rs.PartitionWorker.local_cpu(f"w{i}") for i in range(rows)]
    plan = rs.PartitionPlan.row_ranges(rows, rows).with_workers([worker.label for worker in workers])
    store = rs.DeviceSoaStore.from_columns(None, {"x": np.zeros(rows, np.float32)})
    made = Plane(
        "partition",
        store=store,
        phases=[("go", boom_on_none)],
        partition_plan=plan,
        partition_workers=workers,
    )
    made.step()


def _calls(made, *arguments):
    """Return how many calls ``made(*arguments)`` makes: a cost that does not depend on the machine."""
    calls, before = [0], sys.getprofile()

    def count(frame, event, argument):
        calls[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        made(*arguments)
    finally:
        sys.setprofile(before)
    return calls[0]


def test_many_partitions_and_workers_bind_in_linear_time():
    """Counted in calls: 4 times the partitions and workers make about 4 times the calls, not 16."""
    _bind(10)  # imports what is imported once
    few, many = _calls(_bind, 100), _calls(_bind, 400)
    assert many < 5 * few


def boom_on_none(context, columns, rows):
    columns[0] += 1


@pytest.mark.parametrize("name", sorted(EXECUTORS))
def test_one_plane_many_executors(name):
    made = Plane("executor", store=golden_store())
    for step in range(12):
        executor = EXECUTORS[name]() if step % 2 else rs.LocalThreadedPartitionExecutor(3)
        made.plane.step_partitions_with_executor(executor)
    assert stream(made.plane) == STREAM[:12]


def test_kinds_of_steps_mix():
    made = Plane("partition", store=golden_store())
    for name, function in (("move", move), ("damp", damp)):
        made.plane.runtime_mut().add_cpu_phase(name, function)
        made.plane.add_partition_executor_phase(name, function)
    for step in range(15):
        if step % 3 == 0:
            made.plane.step()
        elif step % 3 == 1:
            made.plane.step_partitions()
        else:
            made.plane.step_partitions_with_executor(TasksOnly())
    assert stream(made.plane) == STREAM[:15]
    metrics = made.plane.metrics()
    assert (metrics.steps_completed, metrics.partition_steps_completed) == (15, 10)
    assert metrics.partition_rows_processed == 10 * 2 * len(RUN["ids"])
    assert [(p.phase_index, p.name, p.executions) for p in metrics.phases] == [
        (0, "move", 5), (1, "damp", 5), (2, "move", 15), (3, "damp", 15), (4, "move", 15), (5, "damp", 15),
    ]  # fmt: skip


def test_small_store_has_values_that_only_bits_tell_apart():
    state = small_store().checkpoint()
    assert np.isnan(state.column(2)[0])
    assert np.signbit(state.column(3)[-1])
