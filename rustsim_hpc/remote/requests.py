"""The content of a client's "run" requests, and which values of reductions the workers know already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rustsim_hpc.executors.work import Frame
from rustsim_hpc.modeling.program import Program, Segment
from rustsim_hpc.remote.link import LinkError
from rustsim_hpc.remote.messages import Frame as RawFrame
from rustsim_hpc.remote.messages import packed
from rustsim_hpc.state.schema import DTYPES

Request = tuple[dict[str, Any], list[RawFrame]]
"""Fields of a request "run", the side left out, and its raw frames."""


class RunRequests:
    """Makes the requests of one client's sessions, which all get the same.

    Args:
        first: the first segment of a step that workers run.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self._attempt = 0
        self._values: Mapping[str, Any] | None = None
        self._sent: dict[str, Any] = {}

    def forget(self) -> None:
        """Assume from now on that the workers know no values."""
        self._values = None

    def following(self, segment: int, frame: Frame) -> Request:
        """Return the next request to all workers: its values are those that they do not know yet.

        Raises:
            LinkError: a value cannot travel.
        """
        if segment == self._first:
            self._attempt += 1
        afresh = frame.values is not self._values
        if afresh:
            self._values, self._sent = frame.values, {}
        news = {name: value for name, value in frame.values.items() if self._sent.get(name) is not value}
        request = self._request(segment, frame, news, afresh=afresh)
        self._sent = dict(frame.values)
        return request

    def again(self, segment: int, frame: Frame, values: Mapping[str, Any]) -> Request:
        """Return a request of the current step for one worker that knows nothing of it.

        Raises:
            LinkError: a value cannot travel.
        """
        return self._request(segment, frame, values, afresh=True)

    def _request(self, segment: int, frame: Frame, values: Mapping[str, Any], *, afresh: bool) -> Request:
        told, data = _value_fields(values)
        fields = {
            "step": frame.step_index,
            "segment": segment,
            "attempt": self._attempt,
            "repeat": frame.repeat,
            "want_digest": bool(frame.want_digest),
            "afresh": afresh,
            "values": told,
        }
        return fields, data


def values_of(program: Program, segment: Segment) -> list[str]:
    """Return the names of the values that are known after a segment."""
    reduced = [program.reductions[slot].name for slot in segment.reductions]
    return reduced + [name for _, derive in segment.derives for name in derive.names]


def _value_fields(values: Mapping[str, Any]) -> tuple[list[list[Any]], list[RawFrame]]:
    """Return values of reductions and derived values as a field and the frames of a request.

    Raises:
        LinkError: one is of a dtype that does not travel.
    """
    arrays = {name: np.asarray(value) for name, value in values.items()}
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise LinkError(f'cannot be sent the value "{name}", which is {array.dtype}')
    fields = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    return fields, [packed(array) for array in arrays.values()]
