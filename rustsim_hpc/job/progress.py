"""A progress bar on a terminal, and nothing in a log. Imported only where a run starts."""

from __future__ import annotations

import sys
import threading
from typing import IO, Any, Final, Self

from tqdm import tqdm

from rustsim_hpc.job.summary import rate
from rustsim_hpc.texts import shown

_REFRESH_SECONDS: Final = 0.2
_FORMAT: Final = (
    "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
    "[{step_rate} steps/s, {agent_rate} agent-steps/s, {remaining} left]"
)


class Progress:
    """A bar of the steps done, with steps/s, agent-steps/s and the time left.

    A context manager. The bar is shown only if `wanted` and `stream` (standard error by default) is a
    terminal; otherwise `advance` costs one test. Until the first `advance` it says that kernels are compiled;
    the rates leave this time out.
    """

    def __init__(
        self,
        name: str,
        *,
        done: int,
        total: int,
        agents: int,
        wanted: bool = True,
        stream: IO[str] | None = None,
    ) -> None:
        """Prepare a bar at step `done` of `total`; nothing is shown before the `with`."""
        self._stream = sys.stderr if stream is None else stream
        self._name, self._done, self._total, self._agents = shown(name), done, total, agents
        self._shown = wanted and self._stream.isatty()
        self._bar: _Bar | None = None
        self._begun = False

    def __enter__(self) -> Self:
        if self._shown:
            self._bar = _Bar(
                desc=f"{self._name}: first step (compiling)",
                initial=self._done,
                total=self._total,
                agents=self._agents,
                file=self._stream,
                mininterval=_REFRESH_SECONDS,
                dynamic_ncols=True,
                bar_format=_FORMAT,
                leave=False,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more; redraws at most five times a second."""
        if self._bar is None:
            return
        if self._begun:
            self._bar.update(steps)
        else:
            self._begun = True
            self._bar.start(self._name, self._done + steps)


class _Bar(tqdm):  # type: ignore[misc]
    """tqdm's bar with the rate in words, and without its monitor thread and lock between processes."""

    monitor_interval = 0

    def __init__(self, *, agents: int, **options: Any) -> None:
        self._agents = agents
        super().__init__(**options)

    def start(self, name: str, done: int) -> None:
        """Count from step `done` and from now on, under another name."""
        self.initial = self.n = self.last_print_n = done
        self.unpause()
        self.set_description_str(name)

    @property
    def format_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = super().format_dict
        steps = facts["rate"]
        if steps is None and facts["elapsed"] > 0:
            steps = (facts["n"] - facts["initial"]) / facts["elapsed"]
        facts["step_rate"] = rate(steps or 0.0)
        facts["agent_rate"] = rate((steps or 0.0) * self._agents)
        return facts


_Bar.set_lock(threading.RLock())
