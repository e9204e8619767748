"""Which ranks write one file together: all of them, each alone, or those of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rustsim_hpc.ranks.team import Team
from rustsim_hpc.storage.header import StorageOptions


@dataclass(frozen=True)
class Group:
    """Ranks [first, end) of a team, whose rows [start, stop) are one file."""

    first: int
    end: int
    start: int
    stop: int

    def share(self, rank: int, total: int) -> tuple[int, int]:
        """Return a rank's range [first, end) of `total` items that the group shares."""
        place, size = rank - self.first, self.end - self.first
        return place * total // size, (place + 1) * total // size


def groups_of(team: Team, rows: tuple[int, int], population: int, options: StorageOptions) -> list[Group]:
    """Return the group of every rank, by rank. Collective, except for a single file.

    rows: this rank's. population: rows of all ranks.
    """
    if options.layout == "single" or team.size == 1:
        return [Group(0, team.size, 0, population)] * team.size
    facts = team.allgather((team.host, team.node_rank, *rows))
    return _by_machine(facts) if options.shards == "node" else _alone(facts)


def _alone(facts: Sequence[tuple[str, int, int, int]]) -> list[Group]:
    return [Group(rank, rank + 1, start, stop) for rank, (_, _, start, stop) in enumerate(facts)]


def _by_machine(facts: Sequence[tuple[str, int, int, int]]) -> list[Group]:
    """Group ranks that are consecutive on a machine and in the rows; ranks may be placed cyclically."""
    firsts: list[int] = []
    for rank, (host, node_rank, start, _) in enumerate(facts):
        before = facts[rank - 1] if rank else None
        if before is None or (before[0], before[1] + 1, before[3]) != (host, node_rank, start):
            firsts.append(rank)
    found: list[Group] = []
    for first, end in zip(firsts, [*firsts[1:], len(facts)], strict=True):
        found += [Group(first, end, facts[first][2], facts[end - 1][3])] * (end - first)
    return found
