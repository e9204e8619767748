"""What a device does in numbers: a table of one line a kernel, for docs/gpu.md.

`measure` is called by tests/test_gpu.py with a real device, and with a small stand-in on every run of the
tests, so that it works when there is a device at last.
"""

import time
from pathlib import Path

import numpy as np

import rustsim_hpc as rs
from rustsim_hpc.executors.cuda import CudaPartitionExecutor
from rustsim_hpc.kernels.cuda_stage import CudaStage  # noqa: F401 (loaded before a clock runs)
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model_source import load_model
from rustsim_hpc.modeling.program import KernelStage

MODELS = Path(rs.__file__).parent / "bench" / "models"
JOBS = Path(rs.__file__).parent.parent / "jobs"
SOURCES = (MODELS / "integrate.py", MODELS / "orbit.py", MODELS / "walk.py", JOBS / "random_walk.py")


def plane_on_device(path, rows, replay, scheme="digest"):
    model, reference = load_model(str(path))
    bound = BoundModel(model, {}, seed=1, agents=rows, reference=reference)
    workers = (rs.PartitionWorker.cuda_device("gpu", 0),)
    plane = rs.EngineControlPlane(
        rs.ColumnarRuntime(bound.new_store(0, rows)),
        rs.ControlPlaneConfig(
            partition_plan=rs.PartitionPlan.row_ranges(rows, 1).with_workers(["gpu"]),
            partition_workers=workers,
            replay_mode=replay,
            fingerprint=scheme,
        ),
    )
    plane.add_model(bound)
    return plane


def seconds_a_step(plane, executor, steps):
    """The least of three times of some steps, after one that compiles and brings the columns there."""
    plane.step_partitions_with_executor(executor)
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(steps):
            plane.step_partitions_with_executor(executor)
        best = min(best, (time.perf_counter() - start) / steps)
    return best


def bytes_a_step(plane, executor):
    """What the stages of a step read and write of the columns, each once."""
    from rustsim_hpc.executors.device_stage import reads_and_writes

    program = plane.stepper(executor).work.program
    sizes = [dtype.itemsize for dtype in program.schema.dtypes]
    stages = [item for part in program.segments for item in part.items if isinstance(item, KernelStage)]
    places = [place for stage in stages for side in reads_and_writes(stage) for place in side]
    return plane.runtime.agent_count * sum(sizes[column] for column, _ in places)


def copy_rate(device, nbytes):
    """Bytes a second that the device reads and writes in a copy within itself."""
    source, target = device.allocate(nbytes), device.allocate(nbytes)
    best = np.inf
    for _ in range(4):
        start = time.perf_counter()
        device.copy(source, target)
        device.synchronise()
        best = min(best, time.perf_counter() - start)
    device.release(source)
    device.release(target)
    return 2 * nbytes / best


def checkpoint_seconds(plane, device):
    """How long steps wait for a checkpoint, when there are copies on the device; and until it is here."""
    memory = plane.runtime.device_store().memory
    out = [np.zeros_like(place) for place in memory.places()]
    memory.copy_aside(out)()
    start = time.perf_counter()
    arrived = memory.copy_aside(out)
    device.synchronise()
    pause = time.perf_counter() - start
    arrived()
    return pause, time.perf_counter() - start


def measure(open_device, rows, steps=20):
    """Return the lines of a table: the device, then a line a model, then what a step costs without rows."""
    device = open_device(0)
    rate = copy_rate(device, max(rows, 1024) * 16)
    kind = "sm_{}{}".format(*device.compute_capability)
    lines = [
        f"device {device.name}, {kind}, copies {rate / 1e9:.0f} GB/s, {rows:,} rows",
        "| model | ms a step | GB/s | of the copy | with digest | checkpoint: pause | brought here |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    off, record = rs.ReplayMode.off(), rs.ReplayMode.record()
    for path in SOURCES:
        executor = CudaPartitionExecutor(lambda _: device)
        plane = plane_on_device(path, rows, off)
        plain = seconds_a_step(plane, executor, steps)
        moved = bytes_a_step(plane, executor) / plain
        pause, brought = checkpoint_seconds(plane, device)
        plane.close()
        digested = plane_on_device(path, rows, record)
        slower = seconds_a_step(digested, executor, steps)
        digested.close()
        lines.append(
            f"| {path.stem} | {plain * 1e3:.3f} | {moved / 1e9:.1f} | {moved / rate:.0%} "
            f"| {slower * 1e3:.3f} ms | {pause * 1e3:.1f} ms | {brought * 1e3:.1f} ms |"
        )
    executor = CudaPartitionExecutor(lambda _: device)
    small = plane_on_device(SOURCES[0], 1, off)
    lines.append(f"a step of one row: {seconds_a_step(small, executor, steps) * 1e6:.0f} µs")
    small.close()
    return lines
