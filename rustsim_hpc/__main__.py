"""Where the command `rustsim-hpc` (also `python -m rustsim_hpc`) begins: Ctrl-C is answered from here on.

Nothing is imported before the handler is there: a KeyboardInterrupt in the middle of an import ends in a
traceback, or in an object's callback that swallows it.
"""

from __future__ import annotations

# Not the module `signal`: that one imports others first.
from _signal import SIG_DFL, SIGINT, default_int_handler, getsignal, signal  # type: ignore[import-not-found]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType
    from typing import NoReturn

EXIT_INTERRUPTED = 130


def _on_interrupt(_number: int, frame: FrameType | None) -> None:
    """Leave at once where something is being imported; elsewhere raise `KeyboardInterrupt`."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            from posix import _exit

            _exit(EXIT_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (`sys.argv` where no arguments are given) and exit with its code."""
    # One that was started with the signal ignored, as a shell's background job is, stays so.
    if getsignal(SIGINT) is default_int_handler:
        signal(SIGINT, _on_interrupt)
    try:
        from rustsim_hpc.cli.main import main as run

        run(arguments)
    finally:
        # The exit code is decided: a late Ctrl-C only ends what is left of the process.
        if getsignal(SIGINT) is _on_interrupt:
            signal(SIGINT, SIG_DFL)


if __name__ == "__main__":
    main()
