"""What each rank of a run will hold: rows, memory and checkpoint bytes, computed without running it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rustsim_hpc.job.keys import JobSpec
from rustsim_hpc.state.schema import Schema


@dataclass(frozen=True)
class RankShare:
    """Ranks first to last (inclusive) with equal shares; bytes are per rank.

    state_bytes: the columns. undo_bytes: second buffers of columns that a step overwrites.
    checkpoint_bytes: what it writes to a checkpoint (the ids take next to nothing).
    """

    first: int
    last: int
    partitions: int
    rows: int
    state_bytes: int
    undo_bytes: int
    checkpoint_bytes: int


@dataclass(frozen=True)
class RunPlan:
    """The plan of a job on `ranks` ranks. step_bytes: what a rank contributes to a step's collectives."""

    job: str
    agents: int
    ranks: int
    partitions: int
    executor: str
    workers: int
    guard: str
    row_bytes: int
    undo_row_bytes: int
    step_bytes: int
    shares: tuple[RankShare, ...]

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a whole checkpoint, without its headers."""
        return self.agents * self.row_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in JSON's types."""
        return {**asdict(self), "checkpoint_bytes": self.checkpoint_bytes}

    def text(self) -> str:
        """Return the plan as a table for a reader."""
        head = ("ranks", "partitions", "rows", "state", "undo", "checkpoint")
        rows = [
            (
                f"{share.first}" if share.first == share.last else f"{share.first}-{share.last}",
                f"{share.partitions:,}",
                f"{share.rows:,}",
                size(share.state_bytes),
                size(share.undo_bytes),
                size(share.checkpoint_bytes),
            )
            for share in self.shares
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        table = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in (head, *rows)
        ]
        return "\n".join(
            [
                f"job           {self.job}, {self.agents:,} rows, guard {self.guard}",
                f"partitions    {self.partitions:,} on {self.ranks:,} ranks",
                f"executor      {self.executor}, workers per rank: {self.workers}",
                f"each row      {self.row_bytes} bytes, plus {self.undo_row_bytes} for undoing a step",
                f"checkpoint    {size(self.checkpoint_bytes)}",
                f"each step     {size(self.step_bytes)} from each rank to the others",
                "",
                *table,
            ]
        )


def plan_run(spec: JobSpec, schema: Schema, swapped: Collection[int], step_bytes: int, ranks: int) -> RunPlan:
    """Return what each of `ranks` ranks will hold.

    swapped: indices of the columns that have a second buffer. step_bytes: what a rank contributes to
    the collectives of one step (results of reductions, the digest, the status).
    """
    row_bytes, undo_bytes = schema.row_bytes, sum(schema.dtypes[index].itemsize for index in swapped)
    partitions = partition_count(spec, ranks)
    shares = [
        RankShare(
            first=first,
            last=last,
            partitions=held,
            rows=rows,
            state_bytes=rows * row_bytes,
            undo_bytes=rows * undo_bytes,
            checkpoint_bytes=rows * row_bytes,
        )
        for first, last, held, rows in _alike(spec.run.agents, partitions, ranks)
    ]
    return RunPlan(
        job=spec.run.name,
        agents=spec.run.agents,
        ranks=ranks,
        partitions=partitions,
        executor="cuda" if spec.run.backend == "cuda" else spec.run.executor,
        workers=worker_count(spec, ranks=ranks),
        guard=spec.run.guard,
        row_bytes=row_bytes,
        undo_row_bytes=undo_bytes,
        step_bytes=step_bytes,
        shares=tuple(shares),
    )


def worker_count(spec: JobSpec, cores: int | None = None, ranks: int = 1) -> int:
    """Return the number of workers of a rank: 1 inline or on CUDA, else the job's value or one per core.

    cores: this rank's share; all that this process may use if None. Of remote workers, the most that any of
    ``ranks`` ranks talks to.
    """
    if spec.run.executor == "inline" or spec.run.backend == "cuda":  # a rank has one device
        return 1
    if spec.run.executor == "remote":
        return max(1, -(-len(spec.remote.endpoints) // ranks))
    return spec.run.workers or cores or len(os.sched_getaffinity(0))


def partition_count(spec: JobSpec, ranks: int, workers: int | None = None) -> int:
    """Return the partitions of a job: one per worker of every rank, or per endpoint, unless the job says.

    workers: of a rank, if `worker_count` is known already.

    There are at least as many as ranks and at most as many as rows; without rows there is one, empty.
    """
    remote = len(spec.remote.endpoints) if spec.run.executor == "remote" else 0
    wanted = max(spec.run.partitions or remote or (workers or worker_count(spec)) * ranks, ranks)
    return min(wanted, max(spec.run.agents, 1))


@dataclass(frozen=True)
class RankPart:
    """One rank's partitions [start, stop) and their rows [row_start, row_stop)."""

    start: int
    stop: int
    row_start: int
    row_stop: int


def rank_part(rows: int, partitions: int, ranks: int, rank: int) -> RankPart:
    """Return a rank's contiguous run of the partitions of `PartitionPlan.row_ranges(rows, partitions)`.

    Ranks differ by one partition at most, partitions by one row.
    """
    each, left = divmod(rows, partitions)
    start, stop = partitions * rank // ranks, partitions * (rank + 1) // ranks
    return RankPart(start, stop, start * each + min(start, left), stop * each + min(stop, left))


def _alike(rows: int, partitions: int, ranks: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first, last, partitions, rows) of neighbouring ranks that hold the same, in order."""
    first, held = 0, (-1, -1)
    for rank in range(ranks):
        part = rank_part(rows, partitions, ranks, rank)
        its = (part.stop - part.start, part.row_stop - part.row_start)
        if its != held:
            if rank:
                yield first, rank - 1, *held
            first, held = rank, its
    yield first, ranks - 1, *held


def size(count: int) -> str:
    """Return a number of bytes in the unit that fits: 5.2 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
