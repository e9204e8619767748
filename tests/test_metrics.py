import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest

from rustsim_hpc.control.metrics import (
    ColumnarPhaseBackend,
    EngineMetrics,
    EnginePhaseMetric,
    Meter,
    PhaseKind,
)

CPU = ColumnarPhaseBackend.cpu()


def times(*partitions: tuple[int, ...]) -> "np.ndarray[Any, Any]":
    """One step's durations: for each partition, each phase's in microseconds."""
    return np.array(partitions, np.int64) * 1000


def refresh(meter: Meter, step: int, phases: tuple[int, int, int]) -> None:
    meter.refresh(current_step=step, agent_count=10, resident_bytes=160, partition_count=2, phases=phases)


def test_a_partition_step_counts_executions_once_a_partition_and_rows_times_phases() -> None:
    meter = Meter()
    refresh(meter, 1, (0, 2, 0))
    meter.step_completed(20, PhaseKind.PARTITION, ("move", "damp"), times((5, 7), (3, 2)), rows=10)
    snapshot = meter.snapshot()
    assert snapshot.steps_completed == snapshot.partition_steps_completed == 1
    assert snapshot.partition_rows_processed == 20
    assert snapshot.phase_count == 2
    assert snapshot.phases == (
        EnginePhaseMetric(0, "move", CPU, 2, 3, 8),
        EnginePhaseMetric(1, "damp", CPU, 2, 2, 9),
    )
    meter.step_completed(10, PhaseKind.RUNTIME, ("x",), times((1,)), rows=10)
    later = meter.snapshot()
    assert (later.total_step_us, later.last_step_us) == (30, 10)
    assert (later.partition_rows_processed, later.partition_steps_completed) == (20, 1)
    assert snapshot.steps_completed == 1, "a snapshot does not change"


def test_counters_stay_with_their_phase_when_an_earlier_list_grows() -> None:
    meter = Meter()
    refresh(meter, 0, (1, 1, 1))
    meter.step_completed(1, PhaseKind.RUNTIME, ("first",), times((4,)))
    meter.step_completed(1, PhaseKind.PARTITION, ("second",), times((5,)), rows=1)
    meter.step_completed(1, PhaseKind.EXECUTOR, ("third",), times((6,)), rows=1)
    assert [(p.phase_index, p.name) for p in meter.snapshot().phases] == [
        (0, "first"),
        (1, "second"),
        (2, "third"),
    ]
    refresh(meter, 3, (2, 2, 1))
    meter.step_completed(1, PhaseKind.RUNTIME, ("first", "added"), times((2, 9)))
    phases = {p.name: (p.phase_index, p.executions, p.total_elapsed_us) for p in meter.snapshot().phases}
    assert phases == {"first": (0, 2, 6), "added": (1, 1, 9), "second": (2, 1, 5), "third": (4, 1, 6)}


def test_checkpoint_sequence_starts_at_one() -> None:
    meter = Meter()
    assert [meter.checkpoint_created(), meter.checkpoint_created()] == [1, 2]
    meter.fingerprint_captured()
    assert meter.snapshot().checkpoints_created == 2
    assert meter.snapshot().replay_fingerprints == 1


def test_snapshots_are_frozen_and_compare_by_value() -> None:
    assert EngineMetrics() == EngineMetrics()
    assert dataclasses.replace(EngineMetrics(), agent_count=3).agent_count == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineMetrics().agent_count = 1  # type: ignore[misc]


def test_json_round_trip_keeps_large_counters_exact() -> None:
    phase = EnginePhaseMetric(3, "möve", ColumnarPhaseBackend.cuda_resident(), 2**60 + 1, 1, 2**63 + 5)
    metrics = EngineMetrics(total_step_us=2**70 + 1, agent_count=7, phases=(phase,))
    assert EngineMetrics.from_dict(json.loads(metrics.to_json())) == metrics
    assert "\n" not in metrics.to_json()
    assert EngineMetrics.from_dict({"agent_count": 7, "of a later version": 1}).agent_count == 7


def test_prometheus_text_is_well_formed() -> None:
    phase = EnginePhaseMetric(0, 'a "b"\\c\nd', CPU, 4, 1, 12_345_678)
    metrics = EngineMetrics(steps_completed=5, total_step_us=10**15 + 1, phases=(phase, phase))
    text = metrics.to_prometheus({"run": "r1"})
    assert text.endswith("\n")
    assert 'rustsim_steps_total{run="r1"} 5\n' in text
    assert 'rustsim_step_seconds_total{run="r1"} 1000000000.000001\n' in text
    assert r'phase="a \"b\"\\c\nd",phase_index="0",backend="Cpu"} 12.345678' in text
    sample = re.compile(r'[a-z_]+(\{([a-z_]+="(\\.|[^"\\\n])*",?)*\})? [0-9.]+')
    types = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in types
            types[name] = kind
        elif not line.startswith("# HELP "):
            assert sample.fullmatch(line), line
            name = re.split("[{ ]", line)[0]
            assert (types[name] == "counter") == name.endswith("_total")
    assert "rustsim_current_step 0\n" in EngineMetrics().to_prometheus()
