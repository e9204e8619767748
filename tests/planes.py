"""Planes for tests: the golden model, small states, an executor of tasks, all that must not change."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import rustsim_hpc as rs
from rustsim_hpc.ranks.team import Team

GOLDEN = json.loads((Path(__file__).parent / "golden/golden.json").read_text("utf-8"))
TEXTS = {entry["id"]: entry["display"] for entry in GOLDEN["errors"]}
RUN = GOLDEN["run"]
STREAM = [(int(step), int(value, 16)) for step, value in RUN["streams"][0]["stream"]]
KINDS = ("runtime", "partition", "executor", "threads", "tasks")
F32 = np.float32


def move(context: Any, columns: Any, rows: int) -> None:
    columns["x"] += columns["vx"] * F32(0.5)


def damp(context: Any, columns: Any, rows: int) -> None:
    columns["vx"] *= F32(0.99)


def f32(bits: Sequence[int]) -> np.ndarray:
    return np.array(bits, np.uint32).view(F32)


def golden_store() -> rs.DeviceSoaStore:
    named = dict(zip(RUN["column_names"], map(f32, RUN["columns"]), strict=True))
    return rs.DeviceSoaStore.from_columns(np.array([int(i) for i in RUN["ids"]], np.uint64), named)


def small_store(rows: int = 10) -> rs.DeviceSoaStore:
    """A state of four columns with ids that are not the default ones, NaN and -0.0 among the values."""
    rng = np.random.default_rng(7)
    named = {name: rng.normal(size=rows).astype(F32) for name in ("x", "vx", "y", "vy")}
    named["y"][:1] = np.nan
    named["vy"][-1:] = -0.0
    return rs.DeviceSoaStore.from_columns(
        np.arange(rows, dtype=np.uint64) * np.uint64(3) + np.uint64(5), named
    )


def seed_state() -> rs.DeviceSoaStore:
    """The state of the reference's error tests: model_state(10, 77), after the "lcg" of golden.json."""
    state, values = 77, []
    for _ in range(40):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        values.append(F32(state >> 40) * F32(2.0**-23) - F32(1))
    columns = np.array(values, F32).reshape(4, 10)
    return rs.DeviceSoaStore.from_columns(
        np.arange(10, dtype=np.uint64), dict(zip(("x", "vx", "y", "vy"), columns, strict=True))
    )


class TasksOnly:
    """An executor that has nothing but ``execute``."""

    def __init__(self, change: Callable[[list[Any]], Any] | None = None) -> None:
        self.change = change
        self.seen: list[Any] = []

    def execute(self, tasks: Sequence[rs.PartitionTask]) -> Any:
        self.seen = list(tasks)
        results = rs.InlinePartitionExecutor().execute(tasks)
        return results if self.change is None else self.change(results)


EXECUTORS: dict[str, Callable[[], Any]] = {
    "executor": rs.InlinePartitionExecutor,
    "threads": lambda: rs.LocalThreadedPartitionExecutor(2),
    "tasks": TasksOnly,
}


class Plane:
    """A plane with one and the same list of phases for one kind of step, and how to make that step."""

    def __init__(
        self,
        kind: str = "partition",
        *,
        store: rs.DeviceSoaStore | None = None,
        phases: Sequence[tuple[str, Any]] = (("move", move), ("damp", damp)),
        parts: int = 3,
        step_index: int = 0,
        executor: Any = None,
        team: Team | None = None,
        **config: Any,
    ) -> None:
        store = store or small_store()
        config.setdefault("partition_plan", rs.PartitionPlan.row_ranges(store.agent_count, parts))
        config.setdefault("replay_mode", rs.ReplayMode.record())
        runtime = rs.ColumnarRuntime(store, step_index, team=team)
        self.plane = rs.EngineControlPlane(runtime, rs.ControlPlaneConfig(**config))
        self.executor = executor if executor is not None else EXECUTORS.get(kind, lambda: None)()
        self.kind = "executor" if executor is not None else kind
        for name, function in phases:
            self.add(name, function)

    def add(self, name: str, function: Any) -> None:
        if self.kind == "runtime":
            self.plane.runtime_mut().add_cpu_phase(name, function)
        elif self.kind == "partition":
            self.plane.add_partition_cpu_phase(name, function)
        else:
            self.plane.add_partition_executor_phase(name, function)

    def step(self) -> Any:
        return self.run(1)[0]

    def run(self, steps: int) -> list[Any]:
        if self.kind == "runtime":
            return self.plane.run(steps)
        if self.kind == "partition":
            return self.plane.run_partitions(steps)
        return self.plane.run_partitions_with_executor(steps, self.executor)


@dataclass
class Everything:
    """What a failed step must leave as it was."""

    state: rs.DeviceSoaCheckpoint
    step_index: int
    metrics: rs.EngineMetrics
    recorded: tuple[rs.ReplayFingerprint, ...]
    checkpoints: tuple[rs.EngineCheckpoint, ...]


def everything(plane: rs.EngineControlPlane) -> Everything:
    return Everything(
        plane.runtime.device_store().checkpoint(),
        plane.runtime.step_index,
        plane.metrics(),
        plane.recorded_replay(),
        plane.checkpoints(),
    )


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def stream(plane: rs.EngineControlPlane) -> list[tuple[int, int]]:
    return [(entry.step_index, entry.value) for entry in plane.recorded_replay()]


def reference_stream(
    steps: int, store: rs.DeviceSoaStore | None = None, **given: Any
) -> list[tuple[int, int]]:
    """What a plane that nothing happened to records, by the runtime phases."""
    made = Plane("runtime", store=store, parts=1, **given)
    made.run(steps)
    return stream(made.plane)
