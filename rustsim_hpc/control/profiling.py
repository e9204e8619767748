"""Profile of a run: time in phases, meetings of the ranks, proof, records and checkpoints, as a table.

Nothing here reads a clock: times come from the step results and from the job's loop.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rustsim_hpc.control.reports import PartitionedStep
from rustsim_hpc.control.stepper import Stepper
from rustsim_hpc.executors.work import Work
from rustsim_hpc.modeling.program import ColumnCall, KernelOp, KernelStage, Program
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.state.memory import Keeper

SPANS = {
    "executor": "phases, as the rank waits for them",
    "ranks": "meetings of the ranks, reductions",
    "checks": "checks, values for outputs",
    "proof": "fingerprint, verification",
    "log": "replay log",
    "outputs": "outputs, metrics",
    "checkpoints": "checkpoints: pauses of the loop",
    "measuring": "digests apart, for this profile",
}
"""Consecutive parts of the step loop, each with its description."""
_PROOF = ("proof", "log")
_APART_EVERY = 8
"""One step in so many is made without digests in the phases' loops, to estimate their cost."""


@dataclass(frozen=True)
class RankProfile:
    """The time of one rank's step loop by part, in seconds.

    Attributes:
        rank, host: the rank, and its host.
        loop: the whole loop.
        compiling: compilation and loading of kernels within the loop; in no span.
        spans: each of :data:`SPANS`.
        phases: each phase, summed over partitions; with workers the total can exceed the loop.
        tile_proof: digests computed beside the phases, while a tile was in cache; summed likewise.
        loop_proof: digests computed in the phases' own loops, hence part of ``phases``: the time that steps
            without them save, times the number of steps with them.
        loops_compared: number of steps without them that this estimate is based on.
        rows: number of rows of the rank.
    """

    rank: int
    host: str
    loop: float
    compiling: float
    spans: Mapping[str, float]
    phases: Mapping[str, float]
    tile_proof: float
    loop_proof: float
    loops_compared: int
    rows: int

    @property
    def busy(self) -> float:
        """Seconds in phases and their digests, over all partitions."""
        return sum(self.phases.values()) + self.tile_proof

    @property
    def proof(self) -> float:
        """Seconds of the loop spent on proof; digests count with their share of the executor's time."""
        share = (self.tile_proof + self.loop_proof) / self.busy if self.busy else 0.0
        return sum(self.spans[name] for name in _PROOF) + self.spans["executor"] * share


class _LoopDigests:
    """Estimates the cost of digests computed in a phase's own loop, which cannot be timed separately.

    Some steps are made without them. Each is compared with the mean of the steps with them just before and
    after it, which cancels a trend; the median of the differences ignores disturbed steps.
    """

    def __init__(self) -> None:
        self._with = 0
        self._before: int | None = None
        self._without: tuple[int, int] | None = None
        self._more: list[float] = []

    def add(self, busy_ns: int, *, apart: bool) -> None:
        """Add a proved step: nanoseconds in phases, and whether its digests were computed separately."""
        if apart:
            self._without = None if self._before is None else (self._before, busy_ns)
            return
        self._with += 1
        if self._without is not None:
            before, without = self._without
            self._more.append((before + busy_ns) / 2 - without)
            self._without = None
        self._before = busy_ns

    def seconds(self) -> tuple[float, int]:
        """Return the estimated seconds over all steps with digests, and the number of comparisons."""
        each = statistics.median(self._more) if self._more else 0.0
        return max(0.0, each) * self._with / 1e9, len(self._more)


class Profiler:
    """Adds up the times of one rank's steps.

    Args:
        stepper: makes the steps; told to compute some digests in a separate pass if they cannot be timed
            otherwise.
        team: the ranks.
    """

    def __init__(self, stepper: Stepper, team: Team) -> None:
        work = stepper.work
        self._compile_seconds = self._compiled_before = stepper.session.compile_seconds
        self._names = work.program.model_phases
        self._team, self._rows = team, work.memory.rows
        self._times = np.zeros(0, np.int64)
        self._spans = dict.fromkeys(SPANS, 0)
        self._loop_digests = _LoopDigests()
        here = not isinstance(stepper.session, Keeper)  # a keeper's columns cannot be read in a pass here
        if all(team.allgather(here and _digests_in_loops(work))):  # all ranks must do the same
            stepper.apart_every = _APART_EVERY
        self._stepper = stepper

    def add(
        self, step: PartitionedStep, compile_seconds: float, log_ns: int, outputs_ns: int, checkpoint_ns: int
    ) -> None:
        """Add a step, and the times of what the loop did after it, in nanoseconds.

        ``compile_seconds``: compilation so far; the increase is subtracted from the step's times.
        """
        times = step.phases.total_ns()
        self._times = times if self._times.size == 0 else self._times + times
        spent = dict(zip(SPANS, (*step.spent, log_ns, outputs_ns, checkpoint_ns, 0), strict=True))
        after = 0 if step.fingerprint is None else step.fingerprint.step_index
        if self._stepper.apart_every and after == step.step_index + 1:
            apart = self._stepper.apart
            self._loop_digests.add(int(times[: len(self._names)].sum()), apart=apart)
            if apart:
                spent["measuring"], spent["proof"] = spent["proof"], 0
        for name, value in spent.items():
            self._spans[name] += value
        compiling = int(1e9 * (compile_seconds - self._compile_seconds))
        if compiling:  # in phases, or where a reduction or fingerprint was first computed
            self._compile_seconds = compile_seconds
            for name in ("executor", "ranks", "proof"):
                taken = min(compiling, self._spans[name])
                self._spans[name] -= taken
                compiling -= taken

    def gather(self, loop: float) -> tuple[RankProfile, ...]:
        """Return the profiles of all ranks, on each of them. Collective. ``loop``: seconds on this one."""
        seconds = [int(value) / 1e9 for value in self._times]
        count = len(self._names)
        loop_proof, loops_compared = self._loop_digests.seconds()
        mine = RankProfile(
            rank=self._team.rank,
            host=self._team.host,
            loop=loop,
            compiling=self._compile_seconds - self._compiled_before,
            spans={name: value / 1e9 for name, value in self._spans.items()},
            phases=dict(zip(self._names, seconds[:count], strict=False)),
            tile_proof=sum(seconds[count:]),
            loop_proof=loop_proof,
            loops_compared=loops_compared,
            rows=self._rows,
        )
        return tuple(self._team.allgather(mine))


@dataclass(frozen=True)
class RunProfile:
    """The profile of a run: the ranks' profiles, and the bytes that its phases move.

    Attributes:
        ranks: one entry per rank.
        steps: steps made by this process.
        row_bytes: by phase, bytes of columns read and written per row and step; None where unknown.
    """

    ranks: tuple[RankProfile, ...]
    steps: int
    row_bytes: Mapping[str, int | None]

    @property
    def loop(self) -> float:
        """Seconds of the loop, the mean over ranks (which all end it at the same step)."""
        return sum(rank.loop for rank in self.ranks) / len(self.ranks)

    @property
    def compiling(self) -> float:
        """Seconds of compilation, the mean over ranks."""
        return sum(rank.compiling for rank in self.ranks) / len(self.ranks)

    @property
    def proof_share(self) -> float:
        """Share of the ranks' loops, without compilation, that was spent on proof."""
        stepping = sum(rank.loop - rank.compiling for rank in self.ranks)
        return sum(rank.proof for rank in self.ranks) / stepping if stepping > 0 else 0.0

    @property
    def imbalance(self) -> float:
        """Time in phases of the slowest rank, relative to the mean over ranks."""
        busy = [rank.busy for rank in self.ranks]
        return max(busy) * len(busy) / sum(busy) if sum(busy) else 1.0

    def span(self, name: str) -> float:
        """Return the seconds of one of :data:`SPANS`, the mean over ranks."""
        return sum(rank.spans[name] for rank in self.ranks) / len(self.ranks)

    def phase_rows(self) -> list[tuple[str, float, float | None]]:
        """Return (phase, seconds, bytes per second), seconds summed over partitions and ranks."""
        made = []
        for name in self.ranks[0].phases:
            seconds = sum(rank.phases.get(name, 0.0) for rank in self.ranks)
            width = self.row_bytes.get(name)
            moved = None if width is None else width * self.steps * sum(rank.rows for rank in self.ranks)
            made.append((name, seconds, moved / seconds if moved and seconds else None))
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as JSON types."""
        return {
            "loop_seconds": self.loop,
            "compile_seconds": self.compiling,
            "proof_share": self.proof_share,
            "imbalance": self.imbalance,
            "row_bytes": dict(self.row_bytes),
            "ranks": [asdict(rank) for rank in self.ranks],
        }

    def text(self) -> str:
        """Return the profile as a table."""
        busy = sum(rank.busy for rank in self.ranks) or 1.0
        lines = ["profile", f"  {'phase':24}{'seconds':>10}{'share':>8}{'GB/s':>8}"]
        for name, seconds, speed in self.phase_rows():
            moved = "" if speed is None else f"{speed / 1e9:.1f}"
            lines.append(f"  {name:24}{seconds:10.3f}{seconds / busy:8.1%}{moved:>8}".rstrip())
        tile_proof = sum(rank.tile_proof for rank in self.ranks)
        if tile_proof:
            lines.append(f"  {'digests of tiles':24}{tile_proof:10.3f}{tile_proof / busy:8.1%}")
        compared = sum(rank.loops_compared for rank in self.ranks)
        if compared:
            loop_proof = sum(rank.loop_proof for rank in self.ranks)
            lines.append(f"  {'of it, digests in loops':24}{loop_proof:10.3f}{loop_proof / busy:8.1%}")
        lines.append(f"  {'the loop':40}{'seconds':>10}{'share':>8}")
        parts = [(meaning, self.span(name)) for name, meaning in SPANS.items()]
        parts.append(("compilation", self.compiling))
        rest = self.loop - sum(seconds for _, seconds in parts)
        parts.append(("the loop itself", max(0.0, rest)))
        lines += [f"  {meaning:40}{seconds:10.3f}{self._share(seconds):8.1%}" for meaning, seconds in parts]
        if len(self.ranks) > 1:
            lines += self._rank_lines()
        told = f" (digests in loops estimated from {compared} steps without them)" if compared else ""
        lines.append(f"  {self.proof_share:.1%} of the time went into proof{told}")
        return "\n".join(lines)

    def _share(self, seconds: float) -> float:
        return seconds / self.loop if self.loop else 0.0

    def _rank_lines(self) -> list[str]:
        lines = [f"  {'rank':24}{'busy s':>10}{'meets s':>10}"]
        lines += [
            f"  {f'{rank.rank} on {rank.host}':24}{rank.busy:10.3f}{rank.spans['ranks']:10.3f}"
            for rank in self.ranks
        ]
        return [*lines, f"  the slowest rank is busy {self.imbalance:.2f} x as long as the mean"]


def _digests_in_loops(work: Work) -> bool:
    """Return whether any phase computes digests in its own loop."""
    from rustsim_hpc.kernels.simple import is_one_loop

    stages = [item for segment in work.program.segments for item in segment.items]
    return any(
        isinstance(stage, KernelStage) and stage.digests and is_one_loop(stage, checked=work.checked)
        for stage in stages
    )


def row_bytes(program: Program) -> dict[str, int | None]:
    """Return the bytes of columns that each phase reads and writes per row; None for column phases."""
    widths = [dtype.itemsize for dtype in program.schema.dtypes]
    made: dict[str, int | None] = {}
    for segment in program.segments:
        for item in segment.items:
            if isinstance(item, ColumnCall):
                made[program.phase_names[item.phase]] = None
                continue
            for op in item.ops:
                reads = op.reads if isinstance(op, KernelOp) else (*op.reads, *op.key_reads)
                read = {binding.index for binding in reads if binding.source == "column"}
                moved = sum(widths[column] for column in read)
                if isinstance(op, KernelOp):
                    moved += sum(widths[column] for column, _ in op.writes)
                made[program.phase_names[op.phase]] = moved
    return made
