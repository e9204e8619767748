"""What to do about a terminal that is gone."""

from __future__ import annotations

import errno
import os
import termios


def leave_lost_terminal() -> None:
    """Send to nowhere what this process would print on a terminal that is gone: writing there fails."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
