"""Many steps: made lazily one by one, or all at once, where an error keeps the results so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from rustsim_hpc.errors import whole_number

T = TypeVar("T")


def repeated(steps: int, make: Callable[[], T]) -> Iterator[T]:
    """Return an iterator that makes ``steps`` steps lazily and keeps no results.

    Raises:
        InvalidConfig: not a number of steps.
    """
    return (make() for _ in range(whole_number("steps", steps)))


def collected(steps: int, make: Callable[[], T]) -> list[T]:
    """Make ``steps`` steps and return their results; an error carries the earlier ones as ``results``.

    Raises:
        InvalidConfig: not a number of steps.
    """
    done: list[T] = []
    try:
        for step in repeated(steps, make):
            done.append(step)  # noqa: PERF402 (the results so far must survive an error)
    except BaseException as error:
        error.results = tuple(done)  # type: ignore[attr-defined]
        raise
    return done
