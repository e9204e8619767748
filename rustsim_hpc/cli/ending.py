"""The end of a process of the command line: nothing speaks after it, and nothing keeps it."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress

_GRACE_SECONDS = 5.0
"""What threads of a model get to end by themselves."""


def flush() -> None:
    """Write what Python holds back of this process's output."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or whatever a model has put there
            stream.flush()


def hush() -> None:
    """Have what is printed from here on, by a model at exit say, go to standard error."""
    flush()
    with suppress(OSError):
        os.dup2(2, 1)


def leave_threads(code: int) -> None:
    """Leave the process where threads of a model do not end: Python would wait for them for ever."""
    deadline = time.monotonic() + _GRACE_SECONDS
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.daemon:
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            sys.stderr.write(f"warning: the thread {thread.name} still runs, and ends with the run\n")
            flush()
            os._exit(code)
