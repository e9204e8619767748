"""The plane on several ranks, as threads: the same bits, the same error everywhere, nobody left waiting."""

import dataclasses
import socket

import numpy as np
import pytest
from planes import KINDS, STREAM, Plane, damp, golden_store, move, reference_stream, small_store, stream
from thread_team import run_ranks

import rustsim_hpc as rs
from rustsim_hpc import errors

RANKS = (2, 3)


class Rank(Plane):
    """One rank's plane over its share of a state: whole partitions of a plan of ``parts`` a rank."""

    def __init__(
        self, team, whole, kind, *, parts=2, phases=(("move", move), ("damp", damp)), step_index=0, **config
    ):
        self.plan = rs.PartitionPlan.row_ranges(whole.agent_count, parts * team.size)
        mine = self.plan.assignments[parts * team.rank : parts * (team.rank + 1)]
        first = mine[0].row_start if mine else whole.agent_count
        last = mine[-1].row_end if mine else first
        state = whole.checkpoint()
        named = {
            name: column[first:last] for name, column in zip(state.column_names, state.columns, strict=True)
        }
        store = rs.DeviceSoaStore.from_columns(
            None if state.default_ids else state.ids[first:last],
            named,
            row_offset=first,
            total_rows=whole.agent_count,
        )
        config = {"partition_plan": self.plan, **config}
        super().__init__(kind, store=store, phases=phases, step_index=step_index, team=team, **config)
        self.runtime, self.team = self.plane.runtime, team

    def caught(self, call=None):
        """Return the error that a step (or a call) ends in."""
        with pytest.raises(rs.RustsimError) as caught:
            self.run(1) if call is None else call()
        return caught.value


def on_ranks(ranks, kind, body, whole=small_store, **given):
    """Return what ``body(rank)`` returns on each of some ranks."""
    return run_ranks(ranks, lambda team: body(Rank(team, whole(), kind, **given)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", RANKS)
def test_the_run_is_the_references(ranks, kind):
    def body(rank):
        rank.run(10)
        return stream(rank.plane)

    assert on_ranks(ranks, kind, body, whole=golden_store) == [STREAM[:10]] * ranks


@pytest.mark.parametrize("guard", ["rollback", "torn"])
@pytest.mark.parametrize("scheme", ["fnv1a", "digest"])
@pytest.mark.parametrize("rows", [0, 1, 4, 10])
def test_few_rows_and_both_schemes(rows, scheme, guard):
    def body(rank):
        rank.run(3)
        rank.plane.restore(rank.plane.checkpoint())
        return stream(rank.plane)

    given = {"fingerprint": scheme, "guard": rs.StepGuard(guard)}
    found = on_ranks(3, "partition", body, whole=lambda: small_store(rows), **given)
    assert found == [reference_stream(3, store=small_store(rows), fingerprint=scheme)] * 3


def boom_on(*partitions):
    def boom(context, columns, rows):
        if context.partition_id.value in partitions:
            raise ValueError(f"no luck on {context.partition_id.value}")

    return boom


@pytest.mark.parametrize("kind", ["partition", "executor", "threads", "tasks"])
@pytest.mark.parametrize("partitions", [(0,), (3,), (1, 2), (0, 5)])
def test_a_failure_on_one_rank_is_the_same_error_on_all(kind, partitions):
    def body(rank):
        rank.run(0)
        before = rank.plane.runtime.device_store().checkpoint()
        error = rank.caught()
        assert rank.plane.runtime.device_store().checkpoint() == before
        assert (rank.runtime.step_index, rank.plane.recorded_replay()) == (0, ())
        others = [other.partition.value for other in error.others]
        return str(error), error.partition.value, error.rank, error.host, error.phase, error.step, others

    found = on_ranks(3, kind, body, phases=[("move", move), ("boom", boom_on(*partitions))])
    first, *others = partitions
    text, *facts = found[0]
    assert text.endswith(f"partition PartitionId({first}) phase boom failed: no luck on {first}")
    assert facts == [first, first // 2, socket.gethostname(), "boom", 0, others]
    assert found == [found[0]] * 3


def test_a_runtime_phase_that_fails_on_one_rank():
    def boom(context, columns, rows):
        if context.row_start > 0:
            raise ValueError("no luck")

    found = on_ranks(2, "runtime", lambda rank: rank.caught(), phases=[("boom", boom)])
    assert {(type(error), str(error), error.rank) for error in found} == {
        (errors.Runtime, "runtime error: phase 0 (boom) failed: no luck", 1)
    }


@pytest.mark.parametrize("scheme", ["fnv1a", "digest"])
def test_a_failed_verify_is_everybodys(scheme):
    right = reference_stream(3, fingerprint=scheme)
    entries = [rs.ReplayFingerprint(step, value ^ (step == 3), scheme) for step, value in right]

    def body(rank):
        rank.run(2)
        return str(rank.caught()), rank.runtime.step_index, stream(rank.plane)

    found = on_ranks(3, "threads", body, replay_mode=rs.ReplayMode.verify(entries), fingerprint=scheme)
    assert found == [found[0]] * 3
    assert found[0][0].startswith("replay diverged at step 3")
    assert found[0][1:] == (2, right[:2])


# -- checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["fnv1a", "digest"])
@pytest.mark.parametrize("kind", ["partition", "threads"])
def test_checkpoint_and_restore(kind, scheme):
    def body(rank):
        rank.run(2)
        kept, pieces = rank.plane.checkpoint("here"), rank.plane.partition_checkpoints()
        assert [piece.assignment for piece in pieces] == list(rank.plan.assignments[2 * rank.team.rank :][:2])
        rank.run(2)
        rank.plane.restore(kept)
        rank.run(1)
        rank.plane.restore_partitions(pieces)
        rank.run(2)
        return stream(rank.plane), kept.fingerprint.value, kept.sequence

    expected = reference_stream(4, fingerprint=scheme)
    found = on_ranks(3, kind, body, fingerprint=scheme)
    assert found == [(expected, expected[1][1], 1)] * 3


def tampered(made):
    columns = [column.copy() for column in made.state.columns]
    columns[0][0] += 1
    return dataclasses.replace(made, state=dataclasses.replace(made.state, columns=tuple(columns)))


def shorter(made):
    return dataclasses.replace(made, state=made.state.slice_rows(0, made.state.rows - 1))


def ragged(made):
    columns = (made.state.columns[0][:-1], *made.state.columns[1:])
    return dataclasses.replace(made, state=dataclasses.replace(made.state, columns=columns))


@pytest.mark.parametrize("change", [tampered, shorter, ragged, lambda made: None])
@pytest.mark.parametrize("bad", [0, 2])
def test_a_checkpoint_that_is_wrong_on_one_rank_is_refused_on_all(bad, change):
    def body(rank):
        rank.run(1)
        kept = rank.plane.checkpoint()
        rank.run(1)
        before = rank.runtime.device_store().checkpoint()
        error = rank.caught(lambda: rank.plane.restore(change(kept) if rank.team.rank == bad else kept))
        assert rank.runtime.device_store().checkpoint() == before
        rank.run(1)
        return type(error), str(error), stream(rank.plane)

    found = on_ranks(3, "partition", body)
    assert found == [found[0]] * 3
    assert found[0][0] is errors.RestoreError
    assert found[0][2] == reference_stream(3)


@pytest.mark.parametrize(
    "change", [lambda pieces: pieces[:1], lambda pieces: pieces[::-1], lambda pieces: []]
)
def test_partitions_that_are_wrong_on_one_rank_are_refused_on_all(change):
    def body(rank):
        pieces = rank.plane.partition_checkpoints()
        error = rank.caught(
            lambda: rank.plane.restore_partitions(change(pieces) if rank.team.rank == 1 else pieces)
        )
        rank.run(1)
        return type(error), str(error), stream(rank.plane)

    found = on_ranks(3, "partition", body)
    assert found == [found[0]] * 3
    assert found[0][0] is errors.PartitionCheckpointError


def test_partitions_of_different_steps_on_different_ranks():
    def body(rank):
        early = rank.plane.partition_checkpoints()
        rank.run(1)
        late = rank.plane.partition_checkpoints()
        error = rank.caught(lambda: rank.plane.restore_partitions(late if rank.team.rank else early))
        assert rank.runtime.step_index == 1
        return str(error)

    found = on_ranks(3, "partition", body)
    assert set(found) == {"partition checkpoint error: the ranks' partitions are of different steps: [0, 1]"}


def test_a_checkpoint_that_fails_on_one_rank_fails_on_all(monkeypatch):
    copy, full = rs.DeviceSoaStore.checkpoint, []

    def checkpoint(store, *args):
        if full and store.row_offset == 0:
            raise MemoryError
        return copy(store, *args)

    monkeypatch.setattr(rs.DeviceSoaStore, "checkpoint", checkpoint)

    def body(rank):
        rank.team.barrier()
        full.append(True)
        rank.run(2)
        error = rank.caught()
        assert rank.runtime.step_index == 2
        rank.team.barrier()
        full.clear()
        rank.team.barrier()
        rank.run(2)
        return str(error), rank.plane.latest_checkpoint().sequence, stream(rank.plane)

    found = on_ranks(3, "partition", body, checkpoint_policy=rs.CheckpointPolicy.every_steps(2))
    assert found == [("checkpoint write failed: step 2: MemoryError", 1, reference_stream(4))] * 3


# -- what does not fit -------------------------------------------------------------------------------


def test_a_plan_that_does_not_cut_at_the_ranks():
    def body(team):
        given = Rank(team, small_store(), "partition").runtime
        odd = rs.PartitionPlan.row_ranges(10, 3)
        plane = rs.EngineControlPlane(given, rs.ControlPlaneConfig(partition_plan=odd))
        plane.add_partition_cpu_phase("move", move)
        with pytest.raises(errors.InvalidConfig) as caught:
            plane.step_partitions()
        return str(caught.value)

    assert all("lies across" in text for text in run_ranks(2, body))


def test_an_executor_that_cannot_start_on_one_rank():
    class Moody(rs.InlinePartitionExecutor):
        def attach(self, work):
            if work.first_row:
                raise OSError("no such device")
            return super().attach(work)

    def body(rank):
        error = rank.caught(lambda: rank.plane.step_partitions_with_executor(Moody()))
        rank.run(1)
        return type(error), str(error)

    found = on_ranks(2, "executor", body)
    assert found == [found[0]] * 2
    assert found[0][0] is errors.ExecutorError
    assert "cannot start: no such device" in found[0][1]


def test_metrics_are_of_the_rank_and_the_population():
    def body(rank):
        rank.run(2)
        metrics = rank.plane.metrics()
        return metrics.agent_count, metrics.partition_count, metrics.partition_rows_processed

    assert on_ranks(3, "partition", body) == [(10, 6, 2 * 2 * rows) for rows in (4, 4, 2)]
    assert np.isnan(small_store().column(2)[0])
