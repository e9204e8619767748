"""`MpiTeam`: what each rank sees, and that a failure on one of them reaches all."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest

from rustsim_hpc.errors import CheckpointFileError, LauncherError, TeamError
from rustsim_hpc.ranks.team import Team, agree, agree_hash, detect_launcher, open_team

pytestmark = pytest.mark.mpi


def test_the_world_is_what_the_launcher_says(team: Team) -> None:
    launcher = detect_launcher(os.environ)
    assert launcher is not None
    assert (team.rank, team.size) == (launcher.rank, launcher.size)
    assert team.allgather(team.rank) == list(range(team.size))
    assert team.host == socket.gethostname()
    assert team.native.Get_size() == team.size


def test_node_ranks_number_the_ranks_of_each_machine(team: Team) -> None:
    # Ranks may be dealt to machines in blocks or in turn: a machine of n ranks has node ranks 0 to n - 1.
    seen = team.allgather((team.node_size, team.node_rank))
    for size in {node_size for node_size, _ in seen}:
        machines = seen.count((size, 0))
        expected = [(size, node_rank) for node_rank in range(size) for _ in range(machines)]
        assert sorted(node for node in seen if node[0] == size) == expected


def test_sums_are_in_place_and_wrap_around(team: Team) -> None:
    values = np.array([team.rank, 1, -(2**63) if team.rank == 0 else -1], np.int64)
    result = team.sum_int64(values)
    assert result is values
    below = -(2**63) - (team.size - 1)
    wrapped = (below + 2**63) % 2**64 - 2**63
    assert values.tolist() == [team.size * (team.size - 1) // 2, team.size, wrapped]
    assert team.sum_int64(np.zeros(0, np.int64)).size == 0


def test_small_objects_travel(team: Team) -> None:
    gathered = team.gather({"rank": team.rank})
    assert gathered == ([{"rank": rank} for rank in range(team.size)] if team.rank == 0 else None)
    last = team.size - 1
    assert team.bcast(("from", team.rank), root=last) == ("from", last)
    team.barrier()
    team.node_barrier()


def test_a_chain_goes_through_the_ranks_in_order(team: Team) -> None:
    # Not commutative: any other order gives another number.
    expected = 2**64 - 3
    for rank in range(team.size):
        expected = (expected * 31 + rank) % 2**64
    assert team.chain(2**64 - 3, lambda value: value * 31 + team.rank) == expected
    # Only rank 0's start counts.
    assert team.chain(team.rank * 7, lambda value: value + 1) == team.size


def test_a_chain_that_fails_on_one_rank_fails_on_all(team: Team) -> None:
    for bad in range(team.size):

        def link(value: int, bad: int = bad) -> int:
            if team.rank == bad:
                raise OverflowError("no luck")
            return value

        with pytest.raises(OverflowError if team.rank == bad else TeamError) as caught:
            team.chain(1, link)
        assert ("no luck" in str(caught.value)) == (team.rank == bad)
    assert team.chain(0, lambda value: value + 1) == team.size


def test_agreeing_on_success_is_silent(team: Team) -> None:
    agree(team, None)


def test_one_failure_is_the_same_error_everywhere(team: Team) -> None:
    for bad in range(team.size):
        mine = CheckpointFileError(message="truncated", step=7) if team.rank == bad else None
        with pytest.raises(CheckpointFileError, match="truncated") as caught:
            agree(team, mine)
        # Of a single rank there is nothing to tell.
        assert (caught.value.rank, caught.value.step) == (bad if team.size > 1 else None, 7)
        assert caught.value.others == ()
        assert (caught.value is mine) == (team.rank == bad)


def test_several_failures_the_first_rank_is_raised_the_others_attached(team: Team) -> None:
    with pytest.raises(TeamError, match="bad 0") as caught:
        agree(team, TeamError(message=f"bad {team.rank}"))
    assert [str(other) for other in caught.value.others] == [
        f"team error: bad {k}" for k in range(1, team.size)
    ]


def test_other_exceptions_travel_as_their_text(team: Team) -> None:
    last = team.size - 1
    with pytest.raises(TeamError if last else ValueError, match="bad luck") as caught:
        agree(team, ValueError("bad luck") if team.rank == last else None)
    assert ("ValueError" in str(caught.value)) == (team.size > 1)


def test_an_error_that_cannot_travel_is_told_by_its_text(team: Team) -> None:
    last = team.size - 1
    error = (
        CheckpointFileError(message="odd", others=(RuntimeError(lambda: None),))
        if team.rank == last
        else None
    )
    with pytest.raises(TeamError if team.size > 1 else CheckpointFileError, match="odd"):
        agree(team, error if team.rank == last else None)


def test_hashes_that_agree_and_hashes_that_do_not(team: Team) -> None:
    agree_hash(team, "job file", "abc")
    if team.size == 1:
        return
    with pytest.raises(LauncherError) as caught:
        agree_hash(team, "model source", "abc" if team.rank == 0 else f"other{team.rank}")
    ranks = "rank 1" if team.size == 2 else f"ranks 1-{team.size - 1}"
    assert f"the model source on {ranks} is not that of rank 0" in str(caught.value)
    assert "has other1" in str(caught.value)
    assert caught.value.rank == 1


@pytest.mark.parametrize("dtype", ["float64", "bool", "uint8", "S3"])
def test_a_table_is_there_once_a_machine_and_read_only(team: Team, dtype: str) -> None:
    table = np.arange(6).reshape(2, 3).astype(dtype)
    shared = team.node_shared_array(table if team.node_rank == 0 else None)
    assert shared.dtype == table.dtype
    assert shared.shape == (2, 3)
    assert (shared == table).all()
    with pytest.raises(ValueError, match="read-only"):
        shared[0, 0] = 1


def test_an_empty_table_is_shared_too(team: Team) -> None:
    shared = team.node_shared_array(np.empty((0, 4), np.int32) if team.node_rank == 0 else None)
    assert shared.shape == (0, 4)


def test_a_table_that_cannot_be_shared_is_refused_on_all_ranks(team: Team) -> None:
    with pytest.raises(TeamError, match="cannot be shared"):
        team.node_shared_array(np.array([{}], object))
    with pytest.raises(TeamError, match="must bring the array"):
        team.node_shared_array(None)


def test_a_full_shared_memory_is_an_error_and_not_a_crash(team: Team) -> None:
    # No memory is touched: a broadcast view that says it has 8 PB.
    huge = np.broadcast_to(np.zeros(1, np.float64), (2**50,))
    with pytest.raises(TeamError, match="no room"):
        team.node_shared_array(huge if team.node_rank == 0 else None)


def test_a_world_of_another_size_than_the_launcher_started_is_refused(team: Team) -> None:
    environ = {"PMI_SIZE": str(team.size + 3), "PMI_RANK": str(team.rank)}
    with pytest.raises(LauncherError, match=rf"started {team.size + 3} ranks.* sees {team.size}") as caught:
        open_team(environ)
    assert caught.value.rank == team.rank
    assert "mpirun" in (caught.value.hint or "")
