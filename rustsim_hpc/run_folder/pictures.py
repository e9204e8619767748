"""Draw a run's pictures: the only door to matplotlib, without pyplot and with the Agg backend."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rustsim_hpc.errors import OutputError, named
from rustsim_hpc.files import write_atomic
from rustsim_hpc.modeling.outputs import Picture

HINT = "pip install 'rustsim-hpc[plot]'"


def draw_pictures(pictures: Sequence[Picture], folder: Path, run: Any) -> None:
    """Draw all pictures of a finished run.

    Without matplotlib they are skipped, with one line on standard error: the run's results do not depend on
    them, and they can be drawn later.

    Raises:
        OutputError: a picture's function failed or its file cannot be written; the others are drawn, and
            further failures are attached.
    """
    if not pictures:
        return
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        names = ", ".join(picture.file for picture in pictures)
        sys.stderr.write(f"pictures skipped: {names}: no matplotlib ({error}); hint: {HINT}\n")
        return
    failures: list[OutputError] = []
    for picture in pictures:
        try:
            _draw(picture, folder, run)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 (a user's function may raise anything)
            failure = OutputError(
                f'picture "{picture.file}": {named(error)}',
                hint="the run's other results are whole",
            )
            failure.__cause__ = error
            failures.append(failure)
    if failures:
        raise failures[0].add_facts(others=tuple(failures[1:]))


def _draw(picture: Picture, folder: Path, run: Any) -> None:
    # Not pyplot: it keeps every figure, and picks a backend for a screen that a cluster does not have.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=picture.size, dpi=picture.dpi, layout="constrained")
    FigureCanvasAgg(figure)
    picture.draw(figure, run)
    image = io.BytesIO()
    figure.savefig(image, format=Path(picture.file).suffix[1:], dpi=picture.dpi)
    path = folder / picture.file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, image.getvalue())
