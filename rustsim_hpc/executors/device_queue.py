"""What one partition queues on its device between two meetings: in as few CUDA graphs as can be, or by calls.

A *piece* is an item of the program, prepared: all that it needs is on the device, and to queue it takes
nothing but what a graph can record. Pieces on end that queue the same the third time become one graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rustsim_hpc.errors import DeviceError
from rustsim_hpc.executors.device_partition import Partition

if TYPE_CHECKING:
    from rustsim_hpc.executors.device_stage import DeviceStage

_BY_CALLS = 2
"""So often pieces are queued by calls before they become a graph: kernels are loaded then, times known."""


@dataclass(frozen=True)
class Piece:
    """An item of the program that is prepared.

    Attributes:
        phases: in order.
        queue: queues it, with nothing but `give`, `take`, `copy` and `launch`.
        key: pieces with equal keys queue the same; None: it is another one in each step.
        stages: which count something that is to be settled.
        moves: it takes an array made by the step, which may get another place.
    """

    phases: tuple[int, ...]
    queue: Callable[[], None]
    key: Hashable
    stages: tuple[DeviceStage, ...] = ()
    moves: bool = False


@dataclass
class Series:
    """Pieces on end that may become a graph; nanoseconds that each took when it was last queued by calls.

    It keeps the pieces: what their keys stand for stays alive.
    """

    pieces: tuple[Piece, ...]
    spent: list[int]
    times: int = 0
    graph: Any = None

    @property
    def moves(self) -> bool:
        """Whether it takes an array that may get another place."""
        return any(piece.moves for piece in self.pieces)


@dataclass(frozen=True)
class Flight:
    """What was queued up to a mark. series, at: whose piece it is, if it was queued by calls; at -1: all."""

    phases: tuple[int, ...]
    stages: tuple[tuple[int, DeviceStage], ...]
    mark: Any
    series: Series | None = None
    at: int = -1

    def share(self, spent: int) -> list[tuple[int, int]]:
        """Return how much each phase took of some nanoseconds.

        Of a graph nobody can say it: its pieces get what they took when they were queued by calls, and
        phases of one launch equal parts.
        """
        if self.series is None or self.at >= 0:
            if self.series is not None:
                self.series.spent[self.at] = spent
            return [(phase, spent // len(self.phases)) for phase in self.phases]
        weights = self.series.spent if any(self.series.spent) else [1] * len(self.series.spent)
        parts = [spent * weight // sum(weights) for weight in weights]
        return [
            (phase, part // len(piece.phases))
            for piece, part in zip(self.series.pieces, parts, strict=True)
            for phase in piece.phases
        ]


@dataclass
class DeviceQueue:
    """Queues pieces of one partition.

    Attributes:
        own: the partition.
        flights: what was queued and is not settled.
        unsettled: the phases of all that was started and is not settled.
        begun: mark behind what has been waited for.
        at: the phase that is being queued.
    """

    own: Partition
    flights: list[Flight] = field(default_factory=list)
    unsettled: list[int] = field(default_factory=list)
    begun: Any = None
    at: int | None = None
    _pending: list[Piece] = field(default_factory=list)
    _series: dict[tuple[Hashable, ...], Series] = field(default_factory=dict)
    _moved: int = 0

    def begin(self) -> None:
        """Forget what a segment before has left."""
        self.flights, self.unsettled, self.begun, self.at, self._pending = [], [], None, None, []

    def start(self, phases: Sequence[int]) -> None:
        """Note what is going to be prepared; the first time set the mark from which time counts."""
        self.unsettled += phases
        if self.begun is None:
            self.begun = self.own.device.mark()

    def add(self, piece: Piece) -> None:
        """Have a piece queued by the next `flush`."""
        self._pending.append(piece)

    def called(self, phase: int) -> None:
        """Set a mark behind a phase that has queued by itself what it is, after a `flush`."""
        self.flights.append(Flight((phase,), (), self.own.device.mark()))

    def flush(self) -> None:
        """Queue what was added: as graphs what is the same each time.

        Raises:
            DeviceError: the device has failed; `at` is the phase then. A kernel may raise anything else.
        """
        pending, self._pending = self._pending, []
        if self._moved != self.own.moved:
            still = {key: series for key, series in self._series.items() if not series.moves}
            self._series, self._moved = still, self.own.moved
        for stays, group in groupby(pending, key=lambda piece: piece.key is not None):
            pieces = tuple(group)
            if stays and self.own.graphs:
                self._queue_series(self._known(pieces))
            else:
                self._queue_each(pieces, None)

    def _known(self, pieces: tuple[Piece, ...]) -> Series:
        key = tuple(piece.key for piece in pieces)
        if key not in self._series:
            self._series[key] = Series(pieces, [0] * len(pieces))
        return self._series[key]

    def _queue_series(self, series: Series) -> None:
        series.times += 1
        if series.graph is None and series.times > _BY_CALLS:
            self._record(series)
        if series.graph is None:
            self._queue_each(series.pieces, series)
            return
        self.at = series.pieces[0].phases[0]
        self.own.device.replay(series.graph)
        phases = tuple(phase for piece in series.pieces for phase in piece.phases)
        stages = tuple((piece.phases[0], staged) for piece in series.pieces for staged in piece.stages)
        self.flights.append(Flight(phases, stages, self.own.device.mark(), series))

    def _queue_each(self, pieces: Sequence[Piece], series: Series | None) -> None:
        self.at = pieces[0].phases[0]
        self.own.send_step_values()
        for k, piece in enumerate(pieces):
            self.at = piece.phases[0]
            piece.queue()
            stages = tuple((self.at, staged) for staged in piece.stages)
            self.flights.append(Flight(piece.phases, stages, self.own.device.mark(), series, k))

    def _record(self, series: Series) -> None:
        """Make pieces a graph; where the driver makes none, go on without."""

        def queue() -> None:
            self.own.send_step_values()
            for piece in series.pieces:
                piece.queue()

        try:
            series.graph = self.own.device.capture(queue)
        except DeviceError as error:
            self.own.graphs = False
            warnings.warn(f"steps are made without CUDA graphs: {error}", RuntimeWarning, stacklevel=2)

    def clear(self) -> None:
        """Forget all, graphs too."""
        self.begin()
        self._series.clear()
