"""A step happens completely or not at all, whatever fails and wherever; then the plane goes on."""

import pickle
import threading
import traceback

import numpy as np
import pytest
from planes import KINDS, Plane, damp, everything, move, reference_stream, small_store, stream

import rustsim_hpc as rs
from rustsim_hpc import errors

ERROR = rs.EngineControlPlaneError
PLACES = [0, 1, 2]


class Trap:
    """A phase that writes, and then raises on some partitions while it is set."""

    def __init__(self, error, partitions=None):
        self.error = error
        self.partitions = partitions
        self.set = False

    def __call__(self, context, columns, rows):
        columns["vy"] -= np.float32(1)
        if self.set and (self.partitions is None or context.partition_id.value in self.partitions):
            columns["x"][:] = 0
            raise self.error


def trapped(kind, trap, place, **given):
    """A plane of three phases, the trap at ``place``, after two good steps, with one checkpoint retained."""
    phases = [("move", move), ("damp", damp)]
    phases.insert(place, ("trap", trap))
    given.setdefault("checkpoint_policy", rs.CheckpointPolicy.every_steps(2))
    made = Plane(kind, phases=phases, **given)
    made.run(2)
    return made


# The runtime's phases run over one partition.
WHERE = [("runtime", 0), *((kind, partition) for kind in KINDS[1:] for partition in PLACES)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("kind", "partition"), WHERE)
def test_a_phase_that_raises_changes_nothing(kind, partition, place):
    trap = Trap(KeyError("no luck"), {partition})
    made = trapped(kind, trap, place)
    before = everything(made.plane)
    trap.set = True
    for _ in range(2):
        with pytest.raises(ERROR) as caught:
            made.step()
        assert everything(made.plane) == before
    error = caught.value
    assert (error.phase, error.step, error.rank, error.others) == ("trap", 2, 0, ())
    assert error.phase_index == place
    assert error.exit_code == 3
    if kind == "runtime":
        assert isinstance(error, errors.Runtime)
        assert str(error) == f"runtime error: phase {place} (trap) failed: 'no luck'"
    else:
        wanted = errors.PartitionExecution if kind == "partition" else errors.ExecutorError
        assert isinstance(error, wanted)
        assert error.partition == rs.PartitionId(partition)
        assert str(error).endswith(f"partition PartitionId({partition}) phase trap failed: 'no luck'")
    if kind != "tasks":  # the executor there is not ours
        assert "raise self.error" in "".join(traceback.format_exception(error))
    trap.set = False
    made.run(3)
    assert stream(made.plane) == reference_stream(5, phases=made_phases(place))
    assert [c.sequence for c in made.plane.checkpoints()] == [1, 2]


def made_phases(place):
    phases = [("move", move), ("damp", damp)]
    phases.insert(place, ("trap", Trap(None)))
    return phases


@pytest.mark.parametrize("kind", ["partition", "executor", "threads", "tasks"])
def test_several_partitions_fail_and_the_first_is_raised(kind):
    trap = Trap(ValueError("no luck"), {0, 2})
    made = trapped(kind, trap, 1, parts=4)
    trap.set = True
    with pytest.raises(ERROR) as caught:
        made.step()
    assert caught.value.partition == rs.PartitionId(0)
    (other,) = caught.value.others
    assert type(other) is type(caught.value)
    assert (other.partition, other.phase, other.step) == (rs.PartitionId(2), "trap", 2)
    assert "also failed: " in caught.value.details()


@pytest.mark.parametrize("kind", ["partition", "executor", "threads", "tasks"])
def test_the_first_in_the_plans_order_is_raised_whatever_the_ids(kind):
    cuts = [(52, 0, 4), (9, 4, 7), (30, 7, 10)]
    plan = rs.PartitionPlan.static(
        [rs.PartitionAssignment(rs.PartitionId(number), start, stop) for number, start, stop in cuts]
    )
    trap = Trap(ValueError("no luck"), {30, 52})
    made = trapped(kind, trap, 1, partition_plan=plan)
    trap.set = True
    with pytest.raises(ERROR, match=r"partition PartitionId\(52\) phase trap failed: no luck") as caught:
        made.step()
    assert [other.partition.value for other in caught.value.others] == [30]


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("not even a text")


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_exception_is_typed_too(kind, raised):
    trap = Trap(raised, {1} if kind != "runtime" else None)
    made = trapped(kind, trap, 1)
    before = everything(made.plane)
    trap.set = True
    with pytest.raises(ERROR) as caught:
        made.step()
    assert everything(made.plane) == before
    assert caught.value.phase == "trap"
    if kind == "runtime":
        assert type(raised).__name__ in str(caught.value)
    else:
        assert isinstance(caught.value.source, rs.PartitionExecutorError.Worker)
        text = "partition PartitionId(1) worker failed: partition worker thread panicked"
        assert str(caught.value) == f"partition executor error: {text}"
    trap.set = False
    made.step()


@pytest.mark.parametrize("raised", [Mute(), ValueError(), MemoryError()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_exceptions_without_a_text(kind, raised):
    trap = Trap(raised)
    made = trapped(kind, trap, 0)
    trap.set = True
    with pytest.raises(ERROR, match=f"failed: {type(raised).__name__}$"):
        made.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_verify_changes_nothing(kind):
    right = reference_stream(6)
    entries = [rs.ReplayFingerprint(step, value ^ (step == 4)) for step, value in right]
    made = Plane(
        kind, replay_mode=rs.ReplayMode.verify(entries), checkpoint_policy=rs.CheckpointPolicy.every_steps(1)
    )
    made.run(3)
    before = everything(made.plane)
    for _ in range(3):
        with pytest.raises(errors.ReplayDivergence) as caught:
            made.step()
        assert everything(made.plane) == before
    error = caught.value
    assert (error.step_index, error.expected, error.actual) == (4, right[3][1] ^ 1, right[3][1])
    assert (error.step, error.exit_code) == (3, 4)
    assert stream(made.plane) == right[:3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_ends_changes_nothing(kind):
    entries = [rs.ReplayFingerprint(*entry) for entry in reference_stream(2)]
    made = Plane(kind, replay_mode=rs.ReplayMode.verify(entries))
    made.run(2)
    before = everything(made.plane)
    with pytest.raises(errors.ReplayExhausted) as caught:
        made.run(4)
    assert everything(made.plane) == before
    assert (caught.value.step_index, caught.value.results) == (3, ())


@pytest.mark.parametrize("kind", KINDS)
def test_run_keeps_the_earlier_results(kind):
    entries = [rs.ReplayFingerprint(*entry) for entry in reference_stream(3)]
    made = Plane(kind, replay_mode=rs.ReplayMode.verify(entries))
    with pytest.raises(errors.ReplayExhausted) as caught:
        made.run(5)
    assert [step.fingerprint.step_index for step in caught.value.results] == [1, 2, 3]
    twin = pickle.loads(pickle.dumps(caught.value))
    assert (twin.results, str(twin)) == (caught.value.results, str(caught.value))


# -- the torn guard ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_torn_refuses_everything_but_restore(kind):
    trap = Trap(ValueError("no luck"))
    made = trapped(kind, trap, 2, guard=rs.StepGuard.torn())
    plane, (kept,) = made.plane, made.plane.checkpoints()
    pieces = plane.partition_checkpoints()
    counted, recorded = plane.metrics(), plane.recorded_replay()
    trap.set = True
    with pytest.raises(ERROR, match="no luck"):
        made.step()
    assert (plane.metrics(), plane.recorded_replay(), plane.checkpoints()) == (counted, recorded, (kept,))
    trap.set = False
    refused = [made.step, plane.checkpoint, plane.partition_checkpoints, plane.step, lambda: made.run(2)]
    if kind == "partition":
        refused.append(plane.step_partitions)
    for call in refused:
        with pytest.raises(errors.TornState, match="no luck") as caught:
            call()
        assert caught.value.hint
    broken = [pieces[0]]
    with pytest.raises(errors.PartitionCheckpointError):
        plane.restore_partitions(broken)
    with pytest.raises(errors.TornState):
        made.step()
    if kind == "partition":
        plane.restore_partitions(pieces)
    else:
        plane.restore(kept)
    made.run(3)
    assert stream(plane) == reference_stream(5, phases=made_phases(2))


@pytest.mark.parametrize("kind", KINDS)
def test_torn_by_a_failed_verify(kind):
    entries = [rs.ReplayFingerprint(step, value ^ (step == 2)) for step, value in reference_stream(3)]
    made = Plane(kind, replay_mode=rs.ReplayMode.verify(entries), guard=rs.StepGuard.torn())
    start = made.plane.checkpoint()
    made.step()
    with pytest.raises(errors.ReplayDivergence):
        made.step()
    with pytest.raises(errors.TornState):
        made.step()
    made.plane.restore(start)
    made.step()
    assert stream(made.plane) == reference_stream(1)


def test_torn_holds_for_every_kind_of_step():
    trap = Trap(ValueError("no luck"))
    made = trapped("partition", trap, 0, guard=rs.StepGuard.torn())
    made.plane.add_partition_executor_phase("move", move)
    trap.set = True
    with pytest.raises(errors.PartitionExecution):
        made.step()
    with pytest.raises(errors.TornState):
        made.plane.step()
    with pytest.raises(errors.TornState):
        made.plane.step_partitions_with_executor(rs.InlinePartitionExecutor())


# -- phases that use the plane that runs them --------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "what", ["step", "restore", "checkpoint", "partition_checkpoints", "add", "add_executor"]
)
def test_a_phase_cannot_use_its_plane(kind, what):
    found = []

    def meddle(context, columns, rows):
        if not found:
            return
        plane, kept = found
        {
            "step": plane.step,
            "restore": lambda: plane.restore(kept),
            "checkpoint": plane.checkpoint,
            "partition_checkpoints": plane.partition_checkpoints,
            "add": lambda: plane.add_partition_cpu_phase("more", move),
            "add_executor": lambda: plane.add_partition_executor_phase("more", move),
        }[what]()

    made = Plane(kind, phases=[("move", move), ("meddle", meddle), ("damp", damp)])
    found += [made.plane, made.plane.checkpoint()]
    made.plane.runtime_mut()
    before = everything(made.plane)
    with pytest.raises(ERROR, match="in the middle of a step"):
        made.step()
    assert everything(made.plane) == before
    found.clear()
    made.step()
    assert made.plane.runtime.step_index == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_phase_cannot_replace_the_state_that_is_stepped(kind):
    made = Plane(kind, phases=[("move", move), ("swap", lambda c, columns, rows: swap())])
    other = Plane(kind).plane.runtime.device_store()
    mine = made.plane.runtime.device_store()

    def swap():
        made.plane.runtime_mut().restore_device_store(other, 7)

    before = everything(made.plane)
    with pytest.raises(ERROR, match="in the middle of a step"):
        made.step()
    assert everything(made.plane) == before
    assert made.plane.runtime.device_store() is mine


@pytest.mark.parametrize("kind", KINDS)
def test_a_phase_cannot_make_a_step_of_the_runtime(kind):
    made = Plane(kind, phases=[("move", move), ("again", lambda *_: made.plane.runtime.step())])
    made.plane.runtime.add_cpu_phase("move", move)
    before = everything(made.plane)
    with pytest.raises(ERROR, match="in the middle of a step"):
        made.step()
    assert everything(made.plane) == before


def test_a_phase_of_a_bare_runtime_cannot_step_it():
    runtime = rs.ColumnarRuntime(small_store())
    runtime.add_cpu_phase("again", lambda *_: runtime.step())
    with pytest.raises(errors.ColumnarRuntimeError, match=r"\(again\) failed: .*middle of a step"):
        runtime.step()
    assert runtime.step_index == 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_follows_the_last_step_index(kind):
    made = Plane(kind, step_index=2**64 - 2)
    made.plane.runtime.add_cpu_phase("more", move)
    made.step()
    before = everything(made.plane)
    for step in (made.step, made.plane.runtime.step):
        with pytest.raises(errors.InvalidConfig, match="no step after step index 18446744073709551615"):
            step()
    assert everything(made.plane) == before
    assert made.plane.checkpoint().step_index == 2**64 - 1


def test_two_threads_cannot_step_one_plane():
    inside, go_on = threading.Event(), threading.Event()

    def wait(context, columns, rows):
        inside.set()
        assert go_on.wait(20)

    made = Plane("partition", phases=[("wait", wait)], parts=1)
    thread = threading.Thread(target=made.step)
    thread.start()
    assert inside.wait(20)
    with pytest.raises(errors.InvalidConfig, match="in the middle of a step"):
        made.step()
    go_on.set()
    thread.join()
    assert made.plane.runtime.step_index == 1


def test_a_runtime_phase_that_adds_runtime_phases():
    made = Plane("runtime", phases=[("grow", lambda *_: made.plane.runtime.add_cpu_phase("move", move))])
    step = made.step()
    assert [phase.name for phase in step.timing.phases] == ["grow"]
    assert [phase.name for phase in made.step().timing.phases] == ["grow", "move"]


# -- a state that is changed behind the plane's back -------------------------------------------------


@pytest.mark.parametrize("fingerprint", ["fnv1a", "digest"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_runtime_that_is_changed_directly(kind, fingerprint):
    made = Plane(kind, fingerprint=fingerprint)
    made.run(2)
    other = Plane("runtime").plane.runtime.device_store()
    made.plane.runtime_mut().restore_device_store(other, 7)
    assert made.plane.fingerprint() == rs.fingerprint_checkpoint(7, other.checkpoint(), fingerprint)
    step = made.step()
    assert step.fingerprint == rs.fingerprint_checkpoint(8, other, fingerprint)
    made.plane.runtime.add_cpu_phase("damp", damp)
    made.plane.runtime.step()
    assert made.step().fingerprint == rs.fingerprint_checkpoint(10, other, fingerprint)
    made.plane.restore(made.plane.checkpoint())
    small = rs.DeviceSoaStore.from_columns(
        None, {name: np.zeros(4, np.float32) for name in ("x", "vx", "y", "vy")}
    )
    made.plane.runtime_mut().restore_device_store(small, 0)
    if kind != "runtime":
        with pytest.raises(errors.PlanError):
            made.step()


def test_a_checkpoint_proves_itself_even_after_a_stray_write():
    made = Plane("partition", fingerprint="digest")
    made.run(2)
    made.plane.runtime.device_store().columns[2][3] = 9
    kept = made.plane.checkpoint()
    assert kept.fingerprint == rs.fingerprint_checkpoint(2, kept.state, "digest")
    made.plane.restore(kept)
