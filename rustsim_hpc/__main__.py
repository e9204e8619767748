"""Entry point of the command `rustsim-hpc` (also `python -m rustsim_hpc`); Ctrl-C is handled from here on.

Nothing is imported before the handler is installed: a KeyboardInterrupt during an import ends in a traceback,
or is swallowed by an object's callback.
"""

from __future__ import annotations

# Not the module `signal`, which imports other modules first.
from _signal import SIG_DFL, SIGINT, default_int_handler, getsignal, signal  # type: ignore[import-not-found]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType
    from typing import NoReturn

EXIT_INTERRUPTED = 130  # that of `errors`, which is not imported yet


def _on_interrupt(_number: int, frame: FrameType | None) -> None:
    """Exit at once during an import; otherwise raise `KeyboardInterrupt`."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            from posix import _exit

            _exit(EXIT_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (`sys.argv` if no arguments are given) and exit with its code."""
    # A process started with SIGINT ignored, such as a background job of a shell, keeps ignoring it.
    if getsignal(SIGINT) is default_int_handler:
        signal(SIGINT, _on_interrupt)
    try:
        from rustsim_hpc.cli.main import main as run

        run(arguments)
    finally:
        # The exit code is final: from here on Ctrl-C simply terminates the process.
        if getsignal(SIGINT) is _on_interrupt:
            signal(SIGINT, SIG_DFL)


if __name__ == "__main__":
    main()
