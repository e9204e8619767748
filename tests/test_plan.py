"""The plan of a run: every row on one rank, in the order of the partition plan, and its bytes."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustsim_hpc.job.keys import JobSpec
from rustsim_hpc.job.plan import partition_count, plan_run, rank_part, size, worker_count
from rustsim_hpc.job.spec import resolve_job
from rustsim_hpc.state.partition import PartitionPlan
from rustsim_hpc.state.schema import Column, Schema

SCHEMA = Schema((Column("x", "float32"), Column("y", "float64"), Column("code", "uint8")))


def job(**run: Any) -> JobSpec:
    raw = {"model": {"module": "flock"}, "run": {"agents": 10, "steps": 1, **run}}
    return resolve_job(raw, Path("flock.toml"), environ={})[0]


@given(rows=st.integers(0, 200), wanted=st.integers(1, 40), ranks=st.integers(1, 12))
def test_ranks_cover_the_partition_plan(rows: int, wanted: int, ranks: int) -> None:
    partitions = partition_count(job(agents=rows, partitions=wanted), ranks)
    plan = PartitionPlan.row_ranges(rows, partitions).materialized_assignments(rows)
    assert len(plan) == partitions
    parts = [rank_part(rows, partitions, ranks, rank) for rank in range(ranks)]
    assert [n for part in parts for n in range(part.start, part.stop)] == list(range(partitions))
    assert [n for part in parts for n in range(part.row_start, part.row_stop)] == list(range(rows))
    for part in parts:
        if own := plan[part.start : part.stop]:
            assert (own[0].row_start, own[-1].row_end) == (part.row_start, part.row_stop)
    held = [part.stop - part.start for part in parts]
    assert max(held) - min(held) <= 1
    assert min(held) >= 1 or rows < ranks


def test_bytes_and_groups() -> None:
    plan = plan_run(job(agents=11, partitions=4), SCHEMA, (0, 2), 100, 4)
    assert (plan.row_bytes, plan.undo_row_bytes, plan.step_bytes, plan.checkpoint_bytes) == (
        13,
        5,
        100,
        11 * 13,
    )
    [first, second] = plan.shares
    assert (first.first, first.last, first.partitions, first.rows) == (0, 2, 1, 3)
    assert (second.first, second.last, second.rows) == (3, 3, 2)
    assert (first.state_bytes, first.undo_bytes, first.checkpoint_bytes) == (39, 15, 39)
    assert plan.to_dict()["shares"][1]["state_bytes"] == 26
    assert "0-2" in plan.text()


def test_more_ranks_than_rows() -> None:
    plan = plan_run(job(agents=2), SCHEMA, (), 0, 5)
    assert sum(share.rows * (share.last - share.first + 1) for share in plan.shares) == 2
    assert plan.partitions == 2


def test_many_ranks_stay_a_short_table() -> None:
    plan = plan_run(job(agents=10**9 + 1), SCHEMA, (), 0, 65536)
    assert len(plan.shares) <= 3
    assert sum(share.rows * (share.last - share.first + 1) for share in plan.shares) == 10**9 + 1


def test_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 5})
    assert worker_count(job(workers=7)) == 1
    assert worker_count(job(executor="threads")) == 3
    assert worker_count(job(executor="processes", workers=7)) == 7
    assert partition_count(job(executor="threads"), 2) == 6


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**30, "5.0 GiB"), (2**60, "1048576.0 TiB")],
)
def test_sizes_have_a_fitting_unit(count: int, text: str) -> None:
    assert size(count) == text


def test_on_devices_a_rank_has_one_partition() -> None:
    spec = job(executor="threads", workers=8, backend="cuda")
    assert partition_count(spec, 4) == 4
    assert worker_count(spec) == 1
