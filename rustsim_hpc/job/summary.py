"""The summary of a run at its end: as text for a reader, and as one line of JSON for a script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rustsim_hpc.control.profiling import RunProfile

EXIT_DONE: Final = 0
EXIT_STOPPED: Final = 75


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended in this process; equal on every rank.

    steps: made by this process. step_index: reached. fingerprint: of the final state, with its scheme.
    seconds: of the step loop, without compilation. resumed_from: the restored step, or None. outputs: the
    model's named outputs and their files. stopped: why the run ended early, after saving a checkpoint.
    profile: where the time went, if requested.
    """

    job: str
    folder: Path
    steps: int
    step_index: int
    agents: int
    ranks: int
    executor: str
    workers: int
    partitions: int
    fingerprint: int
    fingerprint_scheme: str
    seconds: float
    checkpoints: tuple[Path, ...] = ()
    resumed_from: int | None = None
    outputs: Mapping[str, Path] = field(default_factory=dict)
    stopped: str | None = None
    profile: RunProfile | None = None

    @property
    def exit_code(self) -> int:
        """The exit code of the command line: 0, or 75 for a run that `resume` continues."""
        return EXIT_DONE if self.stopped is None else EXIT_STOPPED

    @property
    def agent_steps_per_second(self) -> float:
        """Rows times steps divided by the seconds of the step loop; 0 if no step was made."""
        return self.agents * self.steps / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the summary in JSON's types."""
        return {
            "job": self.job,
            "folder": str(self.folder),
            "steps": self.steps,
            "step_index": self.step_index,
            "agents": self.agents,
            "ranks": self.ranks,
            "executor": self.executor,
            "workers": self.workers,
            "partitions": self.partitions,
            "fingerprint": f"{self.fingerprint:#018x}",
            "fingerprint_scheme": self.fingerprint_scheme,
            "seconds": self.seconds,
            "agent_steps_per_second": self.agent_steps_per_second,
            "checkpoints": [str(path) for path in self.checkpoints],
            "resumed_from": self.resumed_from,
            "outputs": {name: str(path) for name, path in self.outputs.items()},
            "stopped": self.stopped,
            **({} if self.profile is None else {"profile": self.profile.to_dict()}),
        }

    def to_json(self) -> str:
        """Return the summary as one line of JSON."""
        return json.dumps(self.to_dict())

    def text(self) -> str:
        """Return the summary for a reader, a few lines."""
        start = "" if self.resumed_from is None else f" from step {self.resumed_from:,}"
        steps = f"{_count(self.steps, 'step')}{start} to step {self.step_index:,}"
        speed = f"{self.seconds:.2f} s, {rate(self.agent_steps_per_second)} agent-steps/s"
        cut = f"{_count(self.ranks, 'rank')}, {_count(self.partitions, 'partition')}"
        ended = f"{steps}, {_count(self.agents, 'agent')}, {speed}"
        if not self.steps and self.step_index:
            ended = f"it had already reached step {self.step_index:,}; resume --steps N goes on to step N"
        lines = [
            f"{self.job}: {ended}",
            f"executor {self.executor}: {cut}, {_count(self.workers, 'worker')} per rank",
            f"fingerprint {self.fingerprint:#018x} ({self.fingerprint_scheme})",
            f"folder {self.folder}" + "".join(f"\n  {name}" for name in self.outputs),
        ]
        if self.profile is not None:
            lines.append(self.profile.text())
        if self.stopped is not None:
            lines.append(f"stopped: {self.stopped}; continue with: rustsim-hpc resume {self.folder}")
        return "\n".join(lines)


def rate(value: float) -> str:
    """Return a number with three digits and its thousands in words: 24.1 million."""
    for size, word in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if value >= size:
            return f"{value / size:.3g}{word}"
    return f"{value:.3g}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
