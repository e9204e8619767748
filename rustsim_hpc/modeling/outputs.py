"""Outputs that a model writes besides its state: series, arrays, sampled columns, pictures.

These are the declarations that a user writes in ``Model(outputs=[...])``;
`rustsim_hpc.run_folder.output_set` writes them. An output with ``every=k`` is due for each state whose step
index is divisible by k: the first one, at step 0, and then after each such step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rustsim_hpc.errors import ModelError, nearest
from rustsim_hpc.run_folder.sample_journal import checked_array

if TYPE_CHECKING:
    from rustsim_hpc.modeling.model import Reduction

MANIFEST = "outputs.json"
"""The file of a run's folder that lists its outputs."""

_OURS = ("job.toml", "run.json", MANIFEST, "replay.jsonl", "metrics.jsonl", "checkpoints", "crash")


def _check_file(kind: str, file: object, endings: tuple[str, ...]) -> None:
    if not isinstance(file, str) or not file:
        raise ModelError(f"{kind}: the first argument is a file name, got {file!r}")
    path = PurePosixPath(file)
    if path.is_absolute() or any(part.startswith(".") for part in path.parts) or path.parts[0] in _OURS:
        raise ModelError(f'{kind} "{file}": not a name that an output can have in the run\'s folder')
    if path.suffix not in endings:
        raise ModelError(f'{kind} "{file}": expected a name that ends in {" or ".join(endings)}')


def _check_every(kind: str, file: str, every: object) -> None:
    if isinstance(every, bool) or not isinstance(every, int | np.integer) or every < 1:
        raise ModelError(f'{kind} "{file}": every must be an integer of at least 1, got {every!r}')


def _check_names(kind: str, file: str, what: str, names: object) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ModelError(f'{kind} "{file}": {what} must be a sequence of names, got {names!r}')
    for name in names:
        if not isinstance(name, str) or not name or "\n" in name or "\r" in name:
            raise ModelError(f'{kind} "{file}": {name!r} cannot be the name of one of its {what}')
    if len(set(names)) < len(names):
        raise ModelError(f'{kind} "{file}": two of its {what} have one name')
    return tuple(names)


def _check_array_name(kind: str, file: str, name: object) -> None:
    try:
        checked_array(str(name), 0)
    except ValueError as error:
        raise ModelError(f'{kind} "{file}": {error}') from None


def as_reductions(owner: str, given: Any) -> tuple[Reduction, ...]:
    """Return the ``reductions`` of a check or output as a tuple.

    Raises:
        ModelError: it is not a list of reductions.
    """
    # By their attribute: the class is declared above this module.
    if isinstance(given, list | tuple) and all(hasattr(reduction, "kind") for reduction in given):
        return tuple(given)
    raise ModelError(
        f"{owner}: reductions must be a list of reductions, got {given!r}",
        hint="list the decorated functions themselves, as in reductions=[census]",
    )


@dataclass(frozen=True, eq=False)
class Series:
    """A CSV file with one row for the first state and one after each due step.

    Attributes:
        file: its name in the run's folder, ending in ``.csv``.
        row: ``row(context)`` gives a dict of exactly ``columns``, or a sequence in their order, of numbers,
            truth values, strings or None.
        columns: the header.
        every: number of steps between rows.
        reductions: made from the new state for this output, read as ``context.reductions["NAME"]``.

    Raises:
        ModelError: a name, ``every`` or the columns cannot be right.
    """

    file: str
    row: Callable[[Any], Mapping[str, Any] | Sequence[Any]]
    columns: tuple[str, ...]
    every: int = 1
    reductions: tuple[Reduction, ...] = ()

    def __post_init__(self) -> None:
        _check_file("Series", self.file, (".csv",))
        _check_every("Series", self.file, self.every)
        if not callable(self.row):
            raise ModelError(f'Series "{self.file}": row must be a function of the context, got {self.row!r}')
        object.__setattr__(self, "columns", _check_names("Series", self.file, "columns", self.columns))
        object.__setattr__(self, "reductions", as_reductions(f'Series "{self.file}"', self.reductions))


@dataclass(frozen=True, eq=False)
class Arrays:
    """An HDF5 file with a dataset for each array; the first axis is the sample, as for ``/step``, ``/time``.

    Attributes:
        file: its name in the run's folder, ending in ``.h5`` or ``.hdf5``.
        arrays: a function of the context for each array, or one function that gives a dict of arrays. Shapes
            and dtypes (numbers or truth values) must be the same in every sample.
        every: a sample after every so many steps.
        reductions: made from the new state for this output, read as ``context.reductions["NAME"]``.

    Raises:
        ModelError: a name, ``every`` or the arrays cannot be right.
    """

    file: str
    arrays: Mapping[str, Callable[[Any], Any]] | Callable[[Any], Mapping[str, Any]]
    every: int = 1
    reductions: tuple[Reduction, ...] = ()

    def __post_init__(self) -> None:
        _check_file("Arrays", self.file, (".h5", ".hdf5"))
        _check_every("Arrays", self.file, self.every)
        wanted = self.arrays.values() if isinstance(self.arrays, Mapping) else [self.arrays]
        if not wanted or not all(callable(function) for function in wanted):
            raise ModelError(f'Arrays "{self.file}": arrays must be functions of the context')
        for name in self.arrays if isinstance(self.arrays, Mapping) else ():
            _check_array_name("Arrays", self.file, name)
        object.__setattr__(self, "reductions", as_reductions(f'Arrays "{self.file}"', self.reductions))


@dataclass(frozen=True, eq=False)
class Sample:
    """An HDF5 file with the values of some rows: ``/NAME`` (samples, rows), ``/rows``, ``/step``, ``/time``.

    Attributes:
        file: its name in the run's folder, ending in ``.h5`` or ``.hdf5``.
        columns: names of the model's columns.
        rows: a number of rows, spread evenly over all; a slice of the rows; or a list of global rows.
        every: a sample after every so many steps.

    Raises:
        ModelError: a name, ``every``, the columns or the rows cannot be right.
    """

    file: str
    columns: tuple[str, ...]
    rows: int | slice | Sequence[int] = 100
    every: int = 1

    def __post_init__(self) -> None:
        _check_file("Sample", self.file, (".h5", ".hdf5"))
        _check_every("Sample", self.file, self.every)
        object.__setattr__(self, "columns", _check_names("Sample", self.file, "columns", self.columns))
        for name in self.columns:
            _check_array_name("Sample", self.file, name)
        if isinstance(self.rows, slice):
            return
        try:
            valid = np.asarray(self.rows).dtype.kind in "iu" and np.all(np.asarray(self.rows) >= 0)
        except ValueError:
            valid = False
        if not valid or np.ndim(self.rows) > 1:
            raise ModelError(f'Sample "{self.file}": rows must be a count, a slice or row numbers')

    def rows_of(self, agents: int) -> npt.NDArray[np.int64]:
        """Return the global rows to sample from a population of ``agents``, in the order of the file.

        Raises:
            ModelError: a row is not in the population.
        """
        if isinstance(self.rows, slice):
            return np.arange(*self.rows.indices(agents), dtype=np.int64)
        if isinstance(self.rows, int | np.integer):
            count = min(int(self.rows), agents)
            return np.array([k * agents // count for k in range(count)], np.int64)
        rows = np.asarray(self.rows, np.int64)
        if rows.size and rows.max() >= agents:
            raise ModelError(f'Sample "{self.file}": there is no row {rows.max()} among {agents} agents')
        return rows


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture drawn with matplotlib when the run ends.

    Attributes:
        file: its name in the run's folder, ending in ``.png``, ``.svg`` or ``.pdf``.
        draw: ``draw(figure, run)`` with a ``matplotlib.figure.Figure`` and the run's reader
            (`rustsim_hpc.open_run`).
        size: width and height in inches.
        dpi: dots per inch.

    Raises:
        ModelError: the name, the function or the size cannot be right.
    """

    file: str
    draw: Callable[[Any, Any], object]
    size: tuple[float, float] = (8.0, 5.0)
    dpi: float = 120.0

    def __post_init__(self) -> None:
        _check_file("Picture", self.file, (".png", ".svg", ".pdf"))
        if not callable(self.draw):
            raise ModelError(f'Picture "{self.file}": draw must be a function, got {self.draw!r}')
        if np.shape(self.size) != (2,) or min(*self.size, self.dpi) <= 0:
            raise ModelError(f'Picture "{self.file}": size and dpi must be greater than zero')


Output = Series | Arrays | Sample | Picture
Recorded = Series | Arrays | Sample


def check_outputs(declarations: Sequence[Output], columns: Sequence[str]) -> None:
    """Check the outputs of a model against each other and its columns.

    Raises:
        ModelError: something is not an output, two outputs have the same file, or a sampled column does not
            exist.
    """
    files: set[str] = set()
    for declaration in declarations:
        if not isinstance(declaration, Output):
            raise ModelError(
                f"outputs: {declaration!r} is not an output", hint="use Series, Arrays, Sample or Picture"
            )
        if declaration.file in files:
            raise ModelError(f'outputs: two outputs are called "{declaration.file}"')
        files.add(declaration.file)
        for name in declaration.columns if isinstance(declaration, Sample) else ():
            if name not in columns:
                raise ModelError(
                    f'Sample "{declaration.file}": there is no column "{name}"{nearest(name, columns)}'
                )
