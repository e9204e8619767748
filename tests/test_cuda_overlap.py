"""Devices that work at once: a segment is queued on all of them before anybody waits for one."""

import numpy as np
import pytest
from cuda_planes import Devices, needs_compiler

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.executors.cuda import CudaPartitionExecutor
from rustsim_hpc.modeling.bound_model import BoundModel

pytestmark = needs_compiler

ROWS = 400


@rs.row_kernel(writes="x")
def move(x, vx, dt):
    return x + vx * dt


def bounced(context, columns, rows):
    columns["vx"] *= np.float32(-1)


@rs.column_phase(writes="vx", row_local=True, device=bounced)
def bounce(context, columns, rows):
    WATCHED.append([device.busy for device in DEVICES.made.values()])
    bounced(context, columns, rows)


@rs.row_kernel(writes="x")
def push(x, vx):
    return x - vx


@rs.reduction("histogram", bins=4)
def crowd(x):
    return int(abs(x)) % 4


@rs.row_kernel(writes="vx")
def avoid(x, vx, crowd):
    return vx + crowd[int(abs(x)) % 4]


@rs.row_kernel(writes="x")
def again(x, crowd):
    return x + crowd[0]


@rs.reduction("sum")
def total(x):
    return x


PHASES = [move, bounce, push, crowd, avoid, total, again]
"""Two segments: `avoid` needs the crowd of all. The first one has two stages around a column phase."""
WATCHED: list[list[bool]] = []
DEVICES = Devices()


def plane_of(labels, executor=None, phases=PHASES):
    """Return a plane of one partition a label: a device's number, or None for this CPU; and its executor."""
    model = rs.Model(
        params={"dt": rs.Param("float32", default=0.1)},
        columns=[rs.Column("x", "float32"), rs.Column("vx", "float32")],
        initialise=lambda rows, *_: [
            np.arange(rows.start, rows.stop, dtype=np.float32),
            np.ones(rows.stop - rows.start, np.float32),
        ],
        phases=list(phases),
    )
    bound = BoundModel(model, {}, seed=1, agents=ROWS)
    workers = tuple(
        rs.PartitionWorker.local_cpu(f"w{k}")
        if number is None
        else rs.PartitionWorker.cuda_device(f"w{k}", number)
        for k, number in enumerate(labels)
    )
    plan = rs.PartitionPlan.row_ranges(ROWS, len(labels)).with_workers([worker.label for worker in workers])
    config = rs.ControlPlaneConfig(
        partition_plan=plan,
        partition_workers=workers,
        fingerprint="digest",
        replay_mode=rs.ReplayMode.record(),
    )
    plane = rs.EngineControlPlane(rs.ColumnarRuntime(bound.new_store(0, ROWS)), config)
    plane.add_model(bound)
    return plane, executor or CudaPartitionExecutor(DEVICES)


def stream_of(steps):
    plane, executor = plane_of([None], rs.InlinePartitionExecutor())
    plane.run_partitions_with_executor(steps, executor)
    return plane.recorded_replay()


@pytest.fixture(autouse=True)
def fresh():
    DEVICES.made.clear()
    WATCHED.clear()


def test_all_is_queued_on_all_devices_before_anybody_waits(monkeypatch):
    plane, executor = plane_of([0, 1, 0, 1])
    plane.run_partitions_with_executor(2, executor)
    at_waits = []
    wait = type(DEVICES.made[0]).wait

    def watched(device, mark):
        at_waits.append([known.busy for known in DEVICES.made.values()])
        wait(device, mark)

    monkeypatch.setattr(type(DEVICES.made[0]), "wait", watched)
    DEVICES.calls.clear()
    plane.run_partitions_with_executor(1, executor)
    steps = [call for call in DEVICES.calls if call[1] in ("launch", "wait", "synchronise", "download")]
    # Four partitions: move, the digest of vx, push and crowd; then avoid, total and again. One wait an item.
    first = [(device, "launch") for device in (0, 1, 0, 1) for _ in range(2)]
    first += [(device, "wait") for device in (0, 1, 0, 1) for _ in range(3)]
    second = [(device, "launch") for device in (0, 1, 0, 1)] + [(device, "wait") for device in (0, 1, 0, 1)]
    assert steps == first + second
    assert at_waits[0] == [True, True], "both devices have work when the first wait begins"
    assert at_waits[12] == [True, True]
    plane.run_partitions_with_executor(2, executor)
    assert plane.recorded_replay() == stream_of(5)
    plane.close()


def test_this_cpu_works_while_devices_do():
    plane, executor = plane_of([0, None, 1])
    plane.run_partitions_with_executor(3, executor)
    assert WATCHED == [[True, True]] * 3
    assert plane.recorded_replay() == stream_of(3)
    plane.close()


def test_a_value_goes_to_a_device_once_a_step():
    plane, executor = plane_of([0])
    plane.run_partitions_with_executor(2, executor)
    before = dict(DEVICES.made[0].counts)
    plane.run_partitions_with_executor(3, executor)
    assert DEVICES.made[0].counts["upload"] - before["upload"] == 3, "crowd, which two phases take"
    plane.close()


def test_a_failure_names_the_phases_that_were_queued():
    plane, executor = plane_of([0, 1])
    plane.run_partitions_with_executor(2, executor)
    kept = plane.fingerprint()
    broken = DEVICES.made[1]
    broken.faults["kernel"] = broken.counts["launch"] + 2
    with pytest.raises(
        errors.ExecutorError, match=r"illegal memory access .*in one of the phases push, crowd\)"
    ) as caught:
        plane.run_partitions_with_executor(1, executor)
    assert (caught.value.phase, caught.value.step, caught.value.partition) == ("push", 2, rs.PartitionId(1))
    assert plane.fingerprint() == kept
    broken.faults["kernel"] = broken.counts["launch"] + 1
    with pytest.raises(errors.ExecutorError, match=r"in one of the phases move, bounce\)"):
        plane.run_partitions_with_executor(1, executor)
    plane.run_partitions_with_executor(2, executor)
    assert plane.recorded_replay() == stream_of(4)
    plane.close()


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_failure_in_the_order_of_phases_counts(first):
    """A key out of range is known when it is waited for, later than what the next phase raises."""

    def out_of_range(context, columns, rows):
        if context.step_index == 1:
            raise RuntimeError("raised at once")

    phases = [wrong_key, rs.column_phase(writes="vx", row_local=True, device=out_of_range)(noted)]
    plane, executor = plane_of([first, 1 - first], phases=phases)
    plane.run_partitions_with_executor(1, executor)
    with pytest.raises(
        errors.ExecutorError, match=r"key 7 of row \d+ is outside \[0, 4\) in step 1"
    ) as caught:
        plane.run_partitions_with_executor(1, executor)
    assert caught.value.phase == "wrong_key"
    assert len(caught.value.others) == 1
    plane.close()


@rs.reduction("histogram", bins=4)
def wrong_key(x, row, step):
    return 7 if row % 200 == 199 and step == 1 else 0


def noted(context, columns, rows):
    raise AssertionError("the CPU's")
