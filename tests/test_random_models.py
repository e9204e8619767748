"""Models drawn at random, run in every way, against their own functions called row by row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import SEED, Source, Twin
from thread_team import run_ranks

import rustsim_hpc as rs
from rustsim_hpc.executors import work
from rustsim_hpc.job.plan import rank_part
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model_source import load_model
from rustsim_hpc.ranks.team import SoloTeam, Team

ROWS, STEPS = 130, 3


class Ways:
    """One random model and the ways to run it."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.source = Source(seed)
        path.write_text(self.source.text, "utf-8")
        model, _ = load_model(str(path))
        self.ids = np.arange(ROWS, dtype=np.uint64)
        if seed % 2:
            self.ids = self.ids[::-1] * np.uint64(2**61 + 1)
        self.twin = Twin(self.source, model, rs.random.key_of, self.ids)

    def plane(self, team: Team, parts: int, guard: str, scheme: str, **given: Any) -> rs.EngineControlPlane:
        model, reference = load_model(str(self.path))
        bound = BoundModel(model, {}, seed=SEED, agents=ROWS, reference=reference)
        bound.share_tables(team)
        part = rank_part(ROWS, parts, team.size, team.rank)
        rows = slice(part.row_start, part.row_stop)
        named = dict(zip(bound.schema.names, bound.initialise(rows.start, rows.stop), strict=True))
        store = rs.DeviceSoaStore.from_columns(
            self.ids[rows], named, schema=bound.schema, row_offset=rows.start, total_rows=ROWS
        )
        config = rs.ControlPlaneConfig(
            replay_mode=rs.ReplayMode.record(),
            partition_plan=rs.PartitionPlan.row_ranges(ROWS, parts),
            guard=rs.StepGuard(guard),
            fingerprint=scheme,
        )
        plane = rs.EngineControlPlane(rs.ColumnarRuntime(store, team=team), config)
        plane.add_model(bound, **given)
        return plane


def assert_value(got: Any, right: Any, name: str) -> None:
    """Equal as bits, but that a NaN is a NaN."""
    assert np.asarray(got).dtype == np.asarray(right).dtype, name
    np.testing.assert_array_equal(got, right, err_msg=name)
    zeros = np.asarray(right) == 0
    assert (np.signbit(np.asarray(got, float)) == np.signbit(np.asarray(right, float)))[zeros].all(), name


def run(plane: rs.EngineControlPlane, executor: Any, again: int = -1) -> list[rs.ReplayFingerprint]:
    """Make all steps, one of them twice; return the stream."""
    with plane:
        for step in range(STEPS):
            kept = plane.checkpoint() if step == again else None
            plane.run_partitions_with_executor(1, executor)
            if kept is not None:
                plane.restore(kept)
                plane.run_partitions_with_executor(1, executor)
        assert plane.recorded_replay()[-1] == plane.fingerprint()
        return list(plane.recorded_replay())


@pytest.mark.parametrize("seed", [0, 29, 47])
def test_a_random_model_is_its_functions_in_every_way(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = Ways(tmp_path / f"random_{seed}.py", seed)
    inline, threads = rs.InlinePartitionExecutor(), rs.LocalThreadedPartitionExecutor(3)
    solo = SoloTeam()

    first = ways.plane(solo, 1, "rollback", "fnv1a")
    for _ in range(STEPS):
        first.run_partitions_with_executor(1, inline)
        ways.twin.advance()
        made = {name: ways.twin.values[name] for name in first.values}
        assert set(made) == {name for name in ways.source.names if name.startswith("p")}
        for name, right in made.items():
            assert_value(first.values[name], right, name)
        for (name, _), got in zip(ways.source.columns, first.runtime.device_store().columns, strict=True):
            assert_value(got, ways.twin.columns[name], name)
    bits = list(first.recorded_replay())
    assert bits[-1] == rs.fingerprint_checkpoint(STEPS, first.runtime.device_store().checkpoint())
    first.close()

    assert run(ways.plane(solo, 7, "torn", "fnv1a", tile_rows=4096), threads, again=1) == bits
    digests = run(ways.plane(solo, 3, "rollback", "digest"), threads, again=2)
    ranks = run_ranks(
        2, lambda team: run(ways.plane(team, 2, "rollback", "digest"), rs.InlinePartitionExecutor())
    )
    assert ranks == [digests, digests]
    monkeypatch.setattr(work, "_CACHES_TO_STREAM", 0)
    assert run(ways.plane(solo, 2, "rollback", "digest"), inline) == digests
