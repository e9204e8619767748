"""Agreement of the ranks of a team: that no rank failed, and that all have the same job and code."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from rustsim_hpc.errors import LauncherError, RustsimError, TeamError, named

if TYPE_CHECKING:
    from collections.abc import Callable

    from rustsim_hpc.ranks.team import Team

__all__ = ["agree", "agree_hash", "on_all", "on_first"]

T = TypeVar("T")


def agree(team: Team, error: Exception | None) -> None:
    """Raise the same error on all ranks if one of them failed. Collective.

    The error of the first failed rank is raised, with rank and host filled in and the errors of other ranks
    in its `others`; one that is not a `RustsimError` is sent as a `TeamError` with its text. Without a
    failure it is one small allreduce.

    Raises:
        RustsimError: the first failure in rank order.
    """
    if team.size == 1:
        if error is not None:
            raise error
        return
    if not team.sum_int64(np.array([error is not None], np.int64))[0]:
        return
    own = None if error is None else _portable(error).add_facts(rank=team.rank, host=team.host)
    failures = team.allgather(own)
    first, *others = [failure for failure in failures if failure is not None]
    if own is not None and failures.index(first) == team.rank:
        # The original, with its traceback and cause.
        first = own
    raise first.add_facts(others=tuple(others))


def on_all(team: Team, make: Callable[[], T]) -> T:
    """Return `make()`, called on every rank; if it raises on one rank, the same error is raised on all.

    Raises:
        RustsimError: the error of the first rank on which `make` raised.
    """
    failure: Exception | None = None
    made: list[T] = []
    try:
        made.append(make())
    except Exception as error:  # noqa: BLE001 (any error must reach the other ranks)
        failure = error
    agree(team, failure)
    return made[0]


def on_first(team: Team, make: Callable[[], T]) -> T:
    """Return on all ranks what `make` returns on rank 0: files may change between two ranks' reads.

    The result is small and picklable; if `make` raises, the same error is raised on all ranks.

    Raises:
        RustsimError: what `make` raised.
    """
    made = on_all(team, lambda: make() if team.rank == 0 else None)
    return team.bcast(made)  # type: ignore[return-value]


def _portable(error: Exception) -> RustsimError:
    text = named(error)
    if not isinstance(error, RustsimError):
        wrapped = TeamError(message=text)
        wrapped.__cause__ = error
        return wrapped
    try:
        # A round trip: an error that cannot be unpickled would leave the other ranks without an answer.
        pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
    except Exception:  # noqa: BLE001 (an error that cannot be pickled must still be reported)
        return TeamError(message=text)
    return error


def agree_hash(team: Team, name: str, digest: str) -> None:
    """Check that all ranks have the same `digest` of `name` ("job file", "model source", "package version").

    Raises:
        LauncherError: they differ; raised on all ranks, naming the ranks that differ from rank 0.
    """
    expected = team.bcast(digest)
    if not team.sum_int64(np.array([digest != expected], np.int64))[0]:
        return
    found = team.allgather((digest, team.host))
    odd = [rank for rank, (other, _) in enumerate(found) if other != expected]
    first = odd[0]
    raise LauncherError(
        message=f"the {name} on rank{'s' if len(odd) > 1 else ''} {_ranges(odd)} is not that of rank 0: "
        f"rank {first} on {found[first][1]} has {found[first][0]}, rank 0 on {found[0][1]} has {expected}",
        rank=first,
        host=found[first][1],
        hint="all ranks must see the same files and the same installation",
    )


def _ranges(numbers: list[int]) -> str:
    """Write sorted numbers as "1, 3-5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
