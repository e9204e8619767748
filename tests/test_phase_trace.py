"""A step phase by phase is the step as a whole, changes nothing, and shows what stands after each phase."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from thread_team import ThreadTeam, run_ranks

from rustsim_hpc.control.config import ControlPlaneConfig
from rustsim_hpc.control.control_plane import EngineControlPlane
from rustsim_hpc.control.runtime import ColumnarRuntime
from rustsim_hpc.divergence.phase_trace import PhaseTrace
from rustsim_hpc.errors import ExecutorError
from rustsim_hpc.executors.threads import LocalThreadedPartitionExecutor
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model import column_phase
from rustsim_hpc.modeling.model_source import load_model
from rustsim_hpc.proof.fingerprint import digest_column
from rustsim_hpc.proof.replay import ReplayMode
from rustsim_hpc.ranks.team import SoloTeam, Team
from rustsim_hpc.state.partition import PartitionPlan

ROOT = Path(__file__).parents[1]
MODELS = {
    "mixed": ("tests/mixed_model.py", {}, 5000),
    "stray": ("tests/stray_model.py", {}, 500),
    "particles": ("jobs/particles.py", {}, 5000),
    "walk": ("jobs/random_walk.py", {}, 5000),
    "flights": ("jobs/us_flights.py", {"initial_infectious": 10}, 20000),
}


def plane_of(name: str, team: Team, partitions: int = 3) -> tuple[EngineControlPlane, PhaseTrace, BoundModel]:
    module, params, agents = MODELS[name]
    model = BoundModel(load_model(str(ROOT / module))[0], params, seed=3, agents=agents)
    model.checks = model.outputs = ()
    start, stop = agents * team.rank // team.size, agents * (team.rank + 1) // team.size
    config = ControlPlaneConfig(
        replay_mode=ReplayMode.record(),
        partition_plan=PartitionPlan.row_ranges(agents, partitions),
        fingerprint="digest",
    )
    plane = EngineControlPlane(ColumnarRuntime(model.new_store(start, stop), team=team), config)
    plane.add_model(model)
    executor = LocalThreadedPartitionExecutor(2)
    return plane, PhaseTrace(plane, executor, model.phases, team), model


def keys_of(model: BoundModel) -> dict[str, int]:
    return {name: index + 1 for index, name in enumerate(model.schema.names)}


@pytest.mark.parametrize("name", MODELS)
def test_phases_one_by_one_are_the_step(name: str) -> None:
    plane, trace, model = plane_of(name, SoloTeam())
    executor = LocalThreadedPartitionExecutor(2)
    with plane:
        for _ in range(3):
            before = plane.fingerprint()
            results = trace.run(keys_of(model))
            again = trace.run(keys_of(model), cut=5)
            assert [result.name for result in results] == [phase.name for phase in model.phases]
            assert all(one.same(other) for one, other in zip(results, again, strict=True))
            assert plane.fingerprint() == before
            plane.step_partitions_with_executor(executor)
            values = plane.column_values()
            assert results[-1].columns == {key: values[key] for key in model.schema.names}
            made = {key: value for result in results for key, value in result.values.items()}
            assert made.keys() == plane.values.keys()
            for key, value in made.items():
                np.testing.assert_array_equal(value, plane.values[key])


def test_what_stands_after_each_phase() -> None:
    plane, trace, model = plane_of("mixed", SoloTeam())
    with plane:
        results = trace.run(keys_of(model))
        for count, result in [(0, None), *enumerate(results, start=1)]:
            rows = trace.hold(count)
            for name, key in keys_of(model).items():
                value = digest_column(rows.columns[name], 0, key)
                expected = result.columns[name] if result else plane.column_values().get(name, value)
                assert value == expected
        assert trace.hold(0).columns["x"] is plane.runtime.device_store().columns[0] or np.shares_memory(
            trace.hold(0).columns["x"], plane.runtime.device_store().columns[0]
        )


def test_under_ranks() -> None:
    plane, trace, model = plane_of("mixed", SoloTeam(), partitions=4)
    with plane:
        alone = trace.run(keys_of(model))

    def on_rank(team: ThreadTeam) -> bool:
        plane, trace, model = plane_of("mixed", team, partitions=4)
        with plane:
            results = trace.run(keys_of(model))
            return all(one.same(other) for one, other in zip(results, alone, strict=True))

    assert run_ranks(2, on_rank) == [True, True]


def test_results_compare_by_bits() -> None:
    plane, trace, model = plane_of("mixed", SoloTeam())
    with plane:
        result = next(one for one in trace.run(keys_of(model)) if one.values)
    name = next(iter(result.values))
    value = result.values[name]
    assert result.same(replace(result, values={name: np.array(value)}))
    assert result.differing_values(replace(result, values={name: np.float32(value)})) == (name,)
    assert result.differing_values(replace(result, values={})) == (name,)
    assert result.differing_columns(replace(result, columns={"x": 0, "other": 1})) == ("x",)


def test_phase_that_fails() -> None:
    @column_phase(writes="x", row_local=True)
    def fails(context: object, columns: object, rows: int) -> None:
        raise ValueError("no luck")

    module, params, agents = MODELS["stray"]
    found = load_model(str(ROOT / module))[0]
    model = BoundModel(replace(found, phases=[*found.phases, fails]), params, seed=1, agents=agents)
    plane = EngineControlPlane(ColumnarRuntime(model.new_store(0, agents)))
    plane.add_model(model)
    with plane:
        trace = PhaseTrace(plane, LocalThreadedPartitionExecutor(1), model.phases, SoloTeam())
        with pytest.raises(ExecutorError, match="phase fails failed: no luck") as failed:
            trace.run(keys_of(model))
        assert (failed.value.phase, failed.value.step) == ("fails", 0)
