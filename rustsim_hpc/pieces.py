"""How many pieces of files this process has dealt with: what shows that a long restore or save moves."""

from __future__ import annotations


class Pieces:
    """Counts pieces of files, some megabytes each, that were read, proved or written.

    Attributes:
        done: so many so far, over all threads. One that two threads count at the same time may be missing:
            who looks only wants to see that the number changes.
    """

    def __init__(self) -> None:
        self.done = 0

    def one_more(self) -> None:
        """Count a piece."""
        self.done += 1


PIECES = Pieces()
"""Of this process."""
