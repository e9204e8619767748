"""Reading a run's folder from Python, also while the run goes on: `open_run`.

::

    run = rs.open_run("runs/us_flights-20260101-120000")
    run.params["beta"], run.seed, run.status
    run.series("curve")["I"]                    # one array a column of curve.csv
    run.arrays("airports")["counts"]            # (samples, ...), with "step" and "time"
    run.columns("x", "y", step=100)             # whole columns, from a proven checkpoint

Nothing is kept: each call reads what is there now.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rustsim_hpc.errors import RunFolderError, RustsimError, nearest
from rustsim_hpc.files import is_file, is_folder, read_bytes
from rustsim_hpc.modeling.outputs import MANIFEST
from rustsim_hpc.run_folder import crash, metrics_log
from rustsim_hpc.run_folder.array_file import read_samples
from rustsim_hpc.run_folder.folder import CHECKPOINTS, JOB, REPLAY
from rustsim_hpc.run_folder.lock import is_locked
from rustsim_hpc.run_folder.manifest import read_manifest
from rustsim_hpc.run_folder.metrics_log import read_metrics
from rustsim_hpc.run_folder.record import RECORD, read_record
from rustsim_hpc.run_folder.series_file import read_series

if TYPE_CHECKING:
    from rustsim_hpc.proof.replay_log import ReplayLog

Array = npt.NDArray[Any]


def open_run(path: str | Path) -> Run:
    """Return a reader of the run's folder ``path``.

    Raises:
        RunFolderError: it is no run's folder, or its record is damaged.
    """
    return Run(Path(path))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except RustsimError:
        raise
    except (OSError, ValueError, KeyError, RecursionError) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise RunFolderError(f"cannot read {path}: {text}") from error


class Run:
    """One run's folder; make it with `open_run`.

    Attributes:
        path: the folder.
        record: the content of ``run.json`` when the run was opened; `reload` reads it anew.
        job: the content of ``job.toml``: the job as resolved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_file(path / JOB):
            what = f"it has no {JOB}" if is_folder(path) else "there is no such folder"
            raise RunFolderError(f"{path} is not a run's folder: {what}")
        with _reading(path / JOB):
            self.job: dict[str, Any] = tomllib.loads(read_bytes(path / JOB).decode())
        self.record: dict[str, Any] = {}
        self.reload()

    def __repr__(self) -> str:
        return f"<Run {self.path}: {self.name}, step {self.step_index} of {self.steps}, {self.status}>"

    def reload(self) -> None:
        """Read the record anew.

        Raises:
            RunFolderError: it is damaged.
        """
        # A run that was killed right after its start has none.
        self.record = read_record(self.path) if (self.path / RECORD).exists() else {}

    @property
    def name(self) -> str:
        """The job's name."""
        return str(self.record.get("job", self.path.name))

    @property
    def params(self) -> dict[str, Any]:
        """The model's parameters by name."""
        return dict(self.record.get("params") or self.job.get("params", {}))

    @property
    def seed(self) -> int:
        """The seed."""
        return int(self._fact("seed"))

    @property
    def agents(self) -> int:
        """The number of agents of all ranks together."""
        return int(self._fact("agents"))

    @property
    def steps(self) -> int:
        """The step that the run is to reach."""
        return int(self._fact("steps"))

    @property
    def step_length(self) -> float:
        """The time that one step stands for, in `time_unit`."""
        return float(self.record.get("step_length", 1.0))

    @property
    def time_unit(self) -> str:
        """The unit of times: of ``time`` in outputs, and of a context."""
        return str(self.record.get("time_unit", "step"))

    @property
    def step_index(self) -> int:
        """The last step known to be reached: the record's or, unless done, the newest checkpoint's."""
        recorded = int(self.record.get("step_index") or 0)
        return recorded if self.record.get("status") == "done" else max(recorded, *self.checkpoints(), 0)

    @property
    def status(self) -> str:
        """One of running, done, stopped (`resume` goes on), failed, and killed (its processes are gone)."""
        status = str(self.record.get("status", "running"))
        if status == "running" and not is_locked(self.path):
            # It may have ended between the two looks.
            self.reload()
            status = str(self.record.get("status", "running"))
            return "killed" if status == "running" else status
        return status

    @property
    def fingerprint(self) -> int | None:
        """The fingerprint of the final state, None before the run has ended."""
        value = self.record.get("fingerprint")
        return None if value is None else int(value, 16)

    @property
    def lineage(self) -> dict[str, Any] | None:
        """Of a fork: parent, run_id, step, fingerprint and changes; else None."""
        return self.record.get("lineage")

    def outputs(self) -> dict[str, str]:
        """Return the outputs of the model: file to kind ("series", "arrays", "sample" or "picture").

        Raises:
            RunFolderError: the list of outputs is damaged.
        """
        path = self.path / MANIFEST
        with _reading(path):
            return read_manifest(self.path).kinds() if path.exists() else {}

    def series(self, name: str) -> dict[str, Array]:
        """Return a series as one array for each column; ``name`` is its file's, with or without the ending.

        Raises:
            RunFolderError: there is none of that name, or it cannot be read.
        """
        return self._read(name, "series", read_series)

    def arrays(self, name: str) -> dict[str, Array]:
        """Return arrays by name, first axis = sample, with ``step`` and ``time``.

        Raises:
            RunFolderError: there are none of that name, or they cannot be read.
        """
        return self._read(name, "arrays", read_samples)

    def samples(self, name: str) -> dict[str, Array]:
        """Return sampled columns by name, (samples, rows), with ``rows`` (global), ``step`` and ``time``.

        Raises:
            RunFolderError: there are none of that name, or they cannot be read.
        """
        return self._read(name, "sample", read_samples)

    def checkpoints(self) -> dict[int, Path]:
        """Return the checkpoints: step to path, oldest first.

        Raises:
            RunFolderError: their folder cannot be read.
        """
        from rustsim_hpc.storage import list_checkpoints, step_of

        folder = self.path / CHECKPOINTS
        with _reading(folder):
            return {step_of(path): path for path in reversed(list_checkpoints(folder))}

    def columns(self, *names: str, step: int | None = None) -> Any:
        """Return columns of the whole population from the checkpoint of ``step`` (None: the newest).

        The files are proven before they are read. One name gives its array, several (or none: all columns)
        a dict of arrays by name; ``ids`` (uint64) is not a column, see `ids`.

        Raises:
            RunFolderError: there is no such checkpoint.
            CheckpointFileError: it does not hold, or has no such column.
            TypeError: a name is not a text.
        """
        from rustsim_hpc.storage import read_rows

        given: tuple[object, ...] = names
        if strange := [name for name in given if not isinstance(name, str)]:
            raise TypeError(f'columns takes names one by one, as in columns("x", "y"), not {strange[0]!r}')
        view = read_rows(self._checkpoint(step), columns=names or None)
        found = dict(zip(view.names, view.columns, strict=True))
        return found[names[0]] if len(names) == 1 else found

    def ids(self, step: int | None = None) -> npt.NDArray[np.uint64]:
        """Return the ids (uint64, one a row) from the checkpoint of ``step`` (None: the newest).

        Raises:
            RunFolderError: there is no such checkpoint.
            CheckpointFileError: it does not hold.
        """
        from rustsim_hpc.storage import read_rows

        return np.asarray(read_rows(self._checkpoint(step), columns=(), ids=True).ids, np.uint64)

    def replay(self) -> ReplayLog:
        """Return the recorded stream: ``header`` and ``entries`` (step_index, value, values of the columns).

        Raises:
            RunFolderError: the run records none.
            ReplayLogError: it cannot be read.
        """
        from rustsim_hpc.proof.replay_log import read_replay_log

        path = self.path / REPLAY
        if not path.exists():
            raise RunFolderError(f"{self.path} has no {REPLAY}", hint="run the job with --record")
        return read_replay_log(path)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the entries of ``metrics.jsonl``.

        Raises:
            RunFolderError: it cannot be read.
        """
        with _reading(self.path / metrics_log.FILE):
            return read_metrics(self.path)

    def crashes(self) -> list[dict[str, Any]]:
        """Return the crash bundles that ranks left, by rank."""
        return crash.read_crash_bundles(self.path)

    def _fact(self, name: str) -> Any:
        for source in (self.record, self.job.get("run", {})):
            if source.get(name) is not None:
                return source[name]
        raise RunFolderError(f"{self.path}: neither {RECORD} nor {JOB} says {name}")

    def _checkpoint(self, step: int | None) -> Path:
        found = self.checkpoints()
        if not found or (step is not None and step not in found):
            at = "" if step is None else f" of step {step}"
            has = f"there are those of {', '.join(map(str, found))}" if found else "there is none yet"
            raise RunFolderError(f"{self.path} has no checkpoint{at}: {has}")
        return found[max(found) if step is None else step]

    def _read(self, name: str, kind: str, read: Callable[[Path], dict[str, Array]]) -> dict[str, Array]:
        path = self._output(name, kind)
        with _reading(path):
            return read(path)

    def _output(self, name: str, kind: str) -> Path:
        files = [file for file, found in self.outputs().items() if found == kind]
        matches = [file for file in files if file == name] or [f for f in files if Path(f).stem == name]
        if len(matches) == 1:
            return self.path / matches[0]
        if matches:
            raise RunFolderError(f'{self.path}: "{name}" may mean {" or ".join(matches)}')
        has = f"it has {', '.join(files)}" if files else "it has none"
        raise RunFolderError(f'{self.path} has no {kind} "{name}"{nearest(name, files)}: {has}')
