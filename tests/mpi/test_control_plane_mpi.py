"""The control plane on ranks: the bits of one process, and one and the same error on all."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
from rank_planes import AGENTS, STEPS, RankPlane, alone

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.ranks.agreement import on_all
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.state import backing

pytestmark = pytest.mark.mpi

# -- the same bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("agents", [0, 1, 3, AGENTS])
@pytest.mark.parametrize("scheme", ["digest", "fnv1a"])
@pytest.mark.parametrize("guard", ["rollback", "torn"])
def test_ranks_give_the_stream_of_one_process(team: Team, agents: int, scheme: str, guard: str) -> None:
    mine = RankPlane(team, agents, fingerprint=scheme, guard=rs.StepGuard(guard)).run()
    expected = alone(agents, scheme)
    assert mine.stream == expected.stream
    assert mine.plane.fingerprint() == expected.plane.fingerprint()
    column = expected.plane.runtime.device_store().column(0)
    assert mine.plane.runtime.device_store().column(0).tobytes() == column[slice_of(mine)].tobytes()
    for name, value in expected.plane.values.items():
        found = np.asarray(mine.plane.values[name])
        assert (found.dtype, found.tobytes()) == (np.asarray(value).dtype, np.asarray(value).tobytes()), name
    rows = team.allgather((mine.rows.start, mine.rows.stop))
    assert [row for first, end in rows for row in range(first, end)] == list(range(agents))


def slice_of(mine: RankPlane) -> slice:
    return slice(mine.rows.start, mine.rows.stop)


@pytest.mark.parametrize("partitions", [5, 8])
@pytest.mark.parametrize("threads", [0, 2])
def test_any_cut_within_the_ranks(team: Team, partitions: int, threads: int) -> None:
    executor = rs.LocalThreadedPartitionExecutor(threads) if threads else rs.InlinePartitionExecutor()
    mine = RankPlane(team, partitions=partitions, executor=executor).run()
    assert mine.stream == alone().stream
    mine.plane.close()


def test_the_state_in_heap_memory(team: Team) -> None:
    assert RankPlane(team, kind="heap").run().stream == alone().stream


# -- one error on all ---------------------------------------------------------------------------------

COLUMN_PHASES = ["first", "middle"]
TEXTS = {"raise": "no luck", "memory": "no room", "exit": "panicked"}


def demand(patch: pytest.MonkeyPatch, where: str, how: str, step: int, who: int) -> None:
    patch.setenv("DRILL_FAULT", f"{where}:{how}:{step}:{who}")


def raised_everywhere(team: Team, plane: RankPlane, steps: int = 1) -> Any:
    """Make a step that has to fail; return its error, which must be the same on all ranks."""
    with pytest.raises(errors.EngineControlPlaneError) as caught:
        plane.run(steps)
    error = caught.value
    told = [line for line in error.details().splitlines() if "pid" not in line]
    everyone = team.allgather((type(error), str(error), told))
    assert all(other == everyone[0] for other in everyone), everyone
    return error


@pytest.mark.parametrize("where", [*COLUMN_PHASES, "kernel"])
@pytest.mark.parametrize("guard", ["rollback", "torn"])
def test_a_phase_that_raises_on_one_rank(
    team: Team, where: str, guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bad in range(team.size):
        mine = RankPlane(team, partitions=2 * team.size, guard=rs.StepGuard(guard)).run(1)
        saved = mine.plane.checkpoint()
        before = mine.everything()
        row = team.bcast(mine.rows.start, bad)
        with monkeypatch.context() as patch:
            demand(patch, where, "raise", 1, row)
            error = raised_everywhere(team, mine)
        assert isinstance(error, errors.ExecutorError)
        assert "no luck" in str(error)
        facts = (error.rank, error.host, error.partition, error.phase, error.step)
        phase = "change" if where == "kernel" else where
        assert facts == (bad, team.host, rs.PartitionId(2 * bad), phase, 1)
        if guard == "torn":
            with pytest.raises(errors.TornState):
                mine.run(1)
            mine.plane.restore(saved)
        else:
            assert mine.everything() == before
        assert mine.run(STEPS - 1).stream == alone().stream


def test_the_first_step_fails_before_anything_is_compiled(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reductions of a rank that has compiled are laid out otherwise than those of one that has not.
    mine = RankPlane(team)
    row = team.bcast(mine.rows.start, team.size - 1)
    with monkeypatch.context() as patch:
        demand(patch, "first", "raise", 0, row)
        assert raised_everywhere(team, mine).rank == team.size - 1
    assert mine.run().stream == alone().stream


@pytest.mark.parametrize("how", ["memory", "exit"])
def test_whatever_a_phase_raises_is_typed(team: Team, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = RankPlane(team).run(1)
    with monkeypatch.context() as patch:
        demand(patch, "middle", how, 1, mine.plane.partition_plan.assignments[-1].row_start)
        error = raised_everywhere(team, mine)
    assert isinstance(error, errors.ExecutorError)
    assert TEXTS[how] in str(error)
    assert (error.phase, error.step, error.rank) == ("middle", 1, team.size - 1)
    assert mine.run(STEPS - 1).stream == alone().stream


def test_several_ranks_fail_the_first_is_raised_the_others_attached(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = RankPlane(team).run(1)
    with monkeypatch.context() as patch:
        demand(patch, "middle", "raise", 1, mine.rows.start)
        error = raised_everywhere(team, mine)
    assert error.rank == 0
    assert [other.rank for other in error.others] == list(range(1, team.size))


def test_a_key_out_of_range_names_its_row(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = RankPlane(team).run(1)
    row = AGENTS - 1
    with monkeypatch.context() as patch:
        demand(patch, "kernel", "key", 1, row)
        error = raised_everywhere(team, mine)
    assert f"key -1 of row {row} is outside [0, 4) in step 1" in str(error)
    assert (error.rank, error.phase) == (team.size - 1, "kinds")
    assert mine.run(STEPS - 1).stream == alone().stream


@pytest.mark.parametrize(("where", "kind"), [("derive", errors.Runtime), ("check", errors.CheckFailed)])
def test_what_every_rank_computes_fails_on_one(
    team: Team, where: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    for bad in range(team.size):
        mine = RankPlane(team).run(1)
        before = mine.everything()
        with monkeypatch.context() as patch:
            demand(patch, where, "raise", 1, bad)
            error = raised_everywhere(team, mine)
        assert isinstance(error, kind)
        assert "no luck" in str(error)
        assert error.step == 1
        assert error.rank == (bad if team.size > 1 else None)
        assert mine.everything() == before
        assert mine.run(STEPS - 1).stream == alone().stream


def test_no_memory_on_one_rank_for_the_state(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in range(team.size):
        with monkeypatch.context() as patch:
            if team.rank == bad:
                patch.setattr(backing, "claim", full)
            with pytest.raises(errors.ColumnMemoryError, match="shared memory") as caught:
                on_all(team, lambda: alone().model.new_store(0, 10, "shared"))
        assert caught.value.rank == (bad if team.size > 1 else None)


def full(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_no_memory_on_one_rank_to_undo_a_step(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = team.size - 1
    mine = RankPlane(team, kind="shared")
    before = mine.everything()
    with monkeypatch.context() as patch:
        if team.rank == bad:
            patch.setattr(backing, "claim", full)
        error = raised_everywhere(team, mine)
    assert "shared memory" in str(error)
    assert (error.rank, error.step) == (bad, 0)
    assert mine.everything() == before
    assert mine.run().stream == alone().stream


# -- verify, checkpoint, restore ----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["digest", "fnv1a"])
def test_ranks_verify_the_stream_of_one_process(team: Team, scheme: str) -> None:
    entries = list(alone(AGENTS, scheme).plane.recorded_replay())
    mine = RankPlane(team, fingerprint=scheme, replay=rs.ReplayMode.verify(entries)).run()
    assert mine.stream == alone(AGENTS, scheme).stream
    entries[2] = replace(entries[2], value=entries[2].value ^ 1)
    mine = RankPlane(team, fingerprint=scheme, replay=rs.ReplayMode.verify(entries)).run(2)
    before = mine.everything()
    error = raised_everywhere(team, mine)
    assert isinstance(error, errors.ReplayDivergence)
    assert mine.everything() == before


@pytest.mark.parametrize("scheme", ["digest", "fnv1a"])
def test_checkpoint_and_restore(team: Team, scheme: str) -> None:
    mine = RankPlane(team, fingerprint=scheme, checkpoint_policy=rs.CheckpointPolicy.every_steps(2)).run()
    stream = alone(AGENTS, scheme).stream
    assert [kept.step_index for kept in mine.plane.checkpoints()] == [2, 4]
    second = mine.plane.checkpoints()[0]
    assert (second.step_index, second.fingerprint.value) == stream[1]
    assert second.state.agent_count == len(mine.rows), "each rank keeps its own rows"
    mine.plane.restore(second)
    assert mine.stream == stream[:2]
    assert mine.run(2).stream == stream
    assert [kept.sequence for kept in mine.plane.checkpoints()] == [1, 2, 3], "numbers go on"


@pytest.mark.parametrize("scheme", ["digest", "fnv1a"])
def test_a_checkpoint_that_was_tampered_with_on_one_rank_is_refused_on_all(team: Team, scheme: str) -> None:
    mine = RankPlane(team, fingerprint=scheme).run(2)
    saved = mine.plane.checkpoint()
    mine.run(1)
    before = mine.everything()
    for bad in range(team.size):
        state = saved.state
        if team.rank == bad:
            columns = [column.copy() for column in state.columns]
            columns[3][-1] ^= 1
            state = replace(state, columns=tuple(columns))
        with pytest.raises(errors.RestoreError) as caught:
            mine.plane.restore(replace(saved, state=state))
        assert len(set(team.allgather(str(caught.value)))) == 1
        assert mine.everything() == before
    mine.plane.restore(saved)
    assert mine.run(STEPS - 2).stream == alone(AGENTS, scheme).stream


def test_each_rank_brings_its_partitions(team: Team) -> None:
    mine = RankPlane(team, partitions=2 * team.size).run(2)
    parts = mine.plane.partition_checkpoints()
    mine.run(1)
    mine.plane.restore_partitions(parts)
    assert mine.run(STEPS - 2).stream == alone().stream
    before = mine.everything()
    short = parts[:-1] if team.rank == team.size - 1 else parts
    with pytest.raises(errors.EngineControlPlaneError) as caught:
        mine.plane.restore_partitions(short)
    assert len(set(team.allgather(str(caught.value)))) == 1
    assert mine.everything() == before


# -- memory -------------------------------------------------------------------------------------------


def test_tables_are_there_once_a_machine(team: Team) -> None:
    mine = RankPlane(team)
    table = mine.model.tables["weights"]
    assert not table.flags.writeable
    team.node_barrier()
    if team.node_rank == 0:
        ctypes.c_double.from_address(table.ctypes.data).value = 42.0
    team.node_barrier()
    assert table[0] == 42.0, "what the first rank of a machine writes, its neighbours see"


def test_no_growth_in_many_steps(team: Team) -> None:
    mine = RankPlane(team).run(10)
    process = psutil.Process()
    gc.collect()  # what earlier tests left is not to go in between
    before, resident = held(process), process.memory_info().rss
    mine.run(50)
    assert held(process) == before
    assert process.memory_info().rss - resident < 8 << 20


def held(process: psutil.Process) -> tuple[int, int, int]:
    return process.num_fds(), process.num_threads(), len(process.children())
