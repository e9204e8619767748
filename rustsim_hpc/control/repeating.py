"""Many steps: one after the other as they are asked for, or all at once and none of them lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from rustsim_hpc.errors import whole_number

T = TypeVar("T")


def repeated(steps: int, make: Callable[[], T]) -> Iterator[T]:
    """Return an iterator that makes each of so many steps when it is asked for it, and keeps none.

    Raises:
        InvalidConfig: not a number of steps.
    """
    return (make() for _ in range(whole_number("steps", steps)))


def collected(steps: int, make: Callable[[], T]) -> list[T]:
    """Make so many steps and return their results; an error carries those before it as ``results``.

    Raises:
        InvalidConfig: not a number of steps.
    """
    done: list[T] = []
    try:
        for step in repeated(steps, make):
            done.append(step)  # noqa: PERF402 (what was done must survive the error)
    except BaseException as error:
        error.results = tuple(done)  # type: ignore[attr-defined]
        raise
    return done
