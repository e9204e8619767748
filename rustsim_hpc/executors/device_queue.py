"""Queue the work of one partition on its device between two meetings, in few CUDA graphs or call by call.

A *piece* is a prepared item of the program: all that it needs is on the device, and queueing it takes only
operations that a graph can record. Consecutive pieces become one graph the third time they are queued alike.
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
"""Times that pieces are queued by calls before they become a graph: this loads kernels and takes times."""


@dataclass(frozen=True)
class Piece:
    """A prepared item of the program.

    Attributes:
        phases: its phases, in order.
        queue: queues it, using only `give`, `take`, `copy` and `launch`.
        key: pieces with equal keys queue the same operations; None if they differ in each step.
        stages: stages whose results are to be settled.
        moves: it takes an array made by the step, which may be reallocated.
    """

    phases: tuple[int, ...]
    queue: Callable[[], None]
    key: Hashable
    stages: tuple[DeviceStage, ...] = ()
    moves: bool = False


@dataclass
class Series:
    """Consecutive pieces that may become a graph.

    ``spent``: nanoseconds that each piece took when it was last queued by calls. The pieces are kept so that
    the objects in their keys stay alive.
    """

    pieces: tuple[Piece, ...]
    spent: list[int]
    times: int = 0
    graph: Any = None

    @property
    def moves(self) -> bool:
        """Whether it takes an array that may be reallocated."""
        return any(piece.moves for piece in self.pieces)


@dataclass(frozen=True)
class Flight:
    """What was queued up to a mark. series, at: its series and piece in it; at -1: the whole series."""

    phases: tuple[int, ...]
    stages: tuple[tuple[int, DeviceStage], ...]
    mark: Any
    series: Series | None = None
    at: int = -1

    def share(self, spent: int) -> list[tuple[int, int]]:
        """Return (phase, nanoseconds) for each phase, given the time of the flight.

        The time of a graph is divided among its pieces in proportion to the times they took when queued by
        calls, and the time of a launch equally among its phases.
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
    """Queues the pieces of one partition.

    Attributes:
        own: the partition.
        flights: what is queued and not settled.
        unsettled: phases that were started and are not settled.
        begun: mark after the last flight that has been waited for.
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
        """Discard what an earlier segment has left."""
        self.flights, self.unsettled, self.begun, self.at, self._pending = [], [], None, None, []

    def start(self, phases: Sequence[int]) -> None:
        """Note what is going to be prepared; the first time set the mark from which time counts."""
        self.unsettled += phases
        if self.begun is None:
            self.begun = self.own.device.mark()

    def add(self, piece: Piece) -> None:
        """Add a piece for the next `flush` to queue."""
        self._pending.append(piece)

    def called(self, phase: int) -> None:
        """Set a mark after a phase that has queued its own work, following a `flush`."""
        self.flights.append(Flight((phase,), (), self.own.device.mark()))

    def flush(self) -> None:
        """Queue what was added, using graphs for what repeats.

        Raises:
            DeviceError: the device has failed; `at` is then the phase. A kernel may raise anything else.
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
        """Record pieces as a graph; if the driver cannot, warn and continue without graphs."""

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
        """Discard everything, including graphs."""
        self.begin()
        self._series.clear()
