"""A counter of file pieces that this process has handled: shows that a long restore or save progresses."""

from __future__ import annotations


class Pieces:
    """Counts pieces of files, some megabytes each, that were read, proved or written.

    Attributes:
        done: the number so far, over all threads. Not synchronised: concurrent increments may be lost, but
            readers only need to see that the number changes.
    """

    def __init__(self) -> None:
        self.done = 0

    def one_more(self) -> None:
        """Count a piece."""
        self.done += 1


PIECES = Pieces()
"""The counter of this process."""
