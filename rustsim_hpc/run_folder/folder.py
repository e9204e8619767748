"""A run's folder, as written by the run: creating or reopening it, and its record.

::

    job.toml          the job as resolved; written first, so that a folder with it is a run's
    run.json          the record: what runs, on what, and how far; replaced as a whole
    outputs.json      which outputs there are, and the outputs themselves
    metrics.jsonl     the engine's counters
    replay.jsonl      the recorded stream
    divergence.json   what `verify` or `diff` found
    checkpoints/      step_0000000100.h5 and its proof
    crash/            what failing ranks left
    .lock .lock.ranks see `rustsim_hpc.run_folder.lock`

`rustsim_hpc.run_folder.reader` reads it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rustsim_hpc.errors import OutputError, RunFolderError
from rustsim_hpc.files import (
    TEMPORARY_SUFFIX,
    NotAFileError,
    fsync_folder,
    sweep_temporary,
    write_atomic,
)
from rustsim_hpc.modeling.outputs import MANIFEST
from rustsim_hpc.ranks.agreement import agree
from rustsim_hpc.run_folder import crash, metrics_log
from rustsim_hpc.run_folder.environment import by_host, host_facts
from rustsim_hpc.run_folder.lock import (
    OWNER,
    RANKS,
    WAIT_SECONDS,
    FolderLock,
    holder_text,
    is_locked,
    read_holder,
)
from rustsim_hpc.run_folder.manifest import read_manifest
from rustsim_hpc.run_folder.record import (
    RECORD,
    RunFacts,
    Status,
    begin_session,
    new_record,
    now,
    read_record,
    write_record,
)

if TYPE_CHECKING:
    from rustsim_hpc.ranks.team import Team

JOB = "job.toml"
REPLAY = "replay.jsonl"
DIVERGENCE = "divergence.json"
CHECKPOINTS = "checkpoints"


class RunFolder:
    """A run's folder that this rank holds; `create` and `reopen` are called by all ranks together.

    Attributes:
        path: the folder.
        lock: this rank's hold on it; worker processes must inherit ``lock.descriptors``.
        record: the content of ``run.json``; on rank 0 only, empty elsewhere.

    The record of a finished run stays on the disk as it is until `begin`.
    """

    def __init__(self, path: Path, lock: FolderLock, record: dict[str, Any], *, begun: bool) -> None:
        self.path = path
        self.lock = lock
        self.record = record
        self._begun = begun

    @classmethod
    def create(
        cls,
        path: Path,
        job_text: str,
        facts: RunFacts,
        team: Team,
        *,
        force: bool = False,
        wait_seconds: float = WAIT_SECONDS,
    ) -> Self:
        """Make the folder of a new run, lock it, and write ``job.toml`` and ``run.json``.

        With ``force`` a folder that is not empty is used all the same; files of an older run are removed,
        other files stay.

        Raises:
            RunFolderError: the folder is not empty, in use, or cannot be written; the same on every rank.
        """

        def begin() -> tuple[FolderLock, dict[str, Any]]:
            _refuse_if_taken(path, force)
            ours = bool(read_holder(path))
            path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock.claim(path, wait_seconds)
            try:
                if not force and _entries(path):
                    raise _not_empty(path)
                if ours:
                    _clear(path)
                sweep_temporary(path)
                write_atomic(path / JOB, job_text)
                (path / CHECKPOINTS).mkdir(exist_ok=True)
            except BaseException:
                lock.release()
                raise
            return lock, new_record()

        return cls._enter(path, facts, team, begin, wait_seconds)

    @classmethod
    def reopen(
        cls,
        path: Path,
        facts: RunFacts,
        team: Team,
        *,
        wait_seconds: float = WAIT_SECONDS,
    ) -> Self:
        """Lock an existing run's folder to continue the run; remove what a killed writer left.

        The record of a finished run is not changed before `begin`: a failure until then leaves it as it was.

        Raises:
            RunFolderError: it is no run's folder, its record is damaged, or it is in use; the same on every
                rank.
        """

        def begin() -> tuple[FolderLock, dict[str, Any]]:
            if not (path / JOB).is_file():
                raise RunFolderError(f"{path} is not a run's folder: it has no {JOB}")
            lock = FolderLock.claim(path, wait_seconds)
            try:
                sweep_temporary(path)
                return lock, read_record(path) if (path / RECORD).exists() else new_record()
            except BaseException:
                lock.release()
                raise

        return cls._enter(path, facts, team, begin, wait_seconds)

    @classmethod
    def _enter(
        cls,
        path: Path,
        facts: RunFacts,
        team: Team,
        begin: Callable[[], tuple[FolderLock, dict[str, Any]]],
        wait_seconds: float,
    ) -> Self:
        """Let rank 0 begin, the others join, and rank 0 write the record; if one fails, all raise."""
        lock: FolderLock | None = None
        record: dict[str, Any] = {}
        error: RunFolderError | None = None
        try:
            if team.rank == 0:
                lock, record = begin()
        except (RunFolderError, OSError) as caught:
            error = _folder_error(path, caught)
        agree(team, error)
        token = team.bcast(lock.token if lock is not None else "")
        try:
            if lock is None:
                lock = FolderLock.join(path, token, wait_seconds)
        except (RunFolderError, OSError) as caught:
            error = _folder_error(path, caught)
        hosts = team.gather(host_facts(facts.device))
        begun = record.get("status") != "done"
        if team.rank == 0 and hosts is not None:
            begin_session(record, facts, by_host(hosts), team.size)
            try:
                if begun:
                    write_record(path, record)
            except OSError as caught:
                error = _folder_error(path, caught)
        try:
            agree(team, error)
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        assert lock is not None  # noqa: S101 (agree has raised where there is none)
        return cls(path, lock, record, begun=begun)

    @property
    def replay_log(self) -> Path:
        """Path of the replay log."""
        return self.path / REPLAY

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def begin(self) -> None:
        """Write this session to the record, before it changes anything that the run left.

        Raises:
            OutputError: the record cannot be written; the file is as before.
        """
        if not self._begun:
            self._begun = True
            self._write()

    def takes_back(self, step_index: int) -> bool:
        """Return whether a finished run continues from a step before its last; False except on rank 0."""
        return not self._begun and step_index < int(self.record.get("step_index") or 0)

    def update(self, **facts: Any) -> None:
        """Add facts to the record on rank 0, else do nothing. ``session=`` updates the current session.

        Raises:
            OutputError: the record cannot be written; the file is as before.
        """
        if not self.record:
            return
        self.record["sessions"][-1].update(facts.pop("session", {}))
        self.record.update(facts)
        if self._begun:
            self._write()

    def _write(self) -> None:
        if not self.record:
            return
        try:
            write_record(self.path, self.record)
        except OSError as error:
            raise OutputError(f"cannot write {self.path / RECORD}: {error.strerror}") from error

    def finish(
        self,
        status: Status,
        *,
        exit_code: int,
        step_index: int,
        fingerprint: int | None = None,
        reason: str | None = None,
    ) -> None:
        """Record how this session ended, unless it failed before it changed anything.

        Raises:
            OutputError: the record cannot be written.
        """
        if status == "failed" and not self._begun:
            return
        self._begun = True
        value = None if fingerprint is None else f"{fingerprint:#018x}"
        end = {"status": status, "step_index": step_index, "fingerprint": value, "ended": now()}
        self.update(**end, session={**end, "exit_code": exit_code, "reason": reason})

    def release(self) -> None:
        """Release the folder; workers that inherited the lock hold it until they end."""
        self.lock.release()


def fresh_folder(job: str, parent: Path = Path("runs")) -> Path:
    """Make and return a new empty folder PARENT/JOB-TIME, for a run that was not given one. On rank 0.

    Raises:
        RunFolderError: it cannot be made.
    """
    name = job.replace("/", "_").replace("\0", "_")
    stem = f"{name}-{datetime.now(UTC).astimezone():%Y%m%d-%H%M%S}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, 1000):
            path = parent / (stem if number == 1 else f"{stem}-{number}")
            with suppress(FileExistsError):
                path.mkdir()
                return path
    except OSError as error:
        raise _folder_error(parent / stem, error) from error
    raise RunFolderError(f"there are too many folders like {parent / stem}")


def _entries(path: Path) -> list[str]:
    """Return the names in a folder, except the lock files and temporary files of a killed start."""
    names = {entry.name for entry in path.iterdir()} - {OWNER, RANKS}
    return sorted(name for name in names if not name.endswith(TEMPORARY_SUFFIX))


def _not_empty(path: Path) -> RunFolderError:
    return RunFolderError(
        f"the folder {path} is not empty",
        hint="give another one with --out, take it with --force, or go on with its run: "
        f"rustsim-hpc resume {path}",
    )


def _refuse_if_taken(path: Path, force: bool) -> None:
    """Raise RunFolderError if the folder cannot be used, as far as that is known without changing it."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunFolderError(f"{path} is not a folder")
    if not _entries(path):
        return
    if not force:
        if is_locked(path):
            raise RunFolderError(
                f"the folder {path} is in use by {holder_text(path)}", hint="give another one with --out"
            )
        raise _not_empty(path)
    if not read_holder(path):
        foreign = [name for name in _entries(path) if name in _RESERVED]
        if foreign:
            raise RunFolderError(
                f"{path} is no run's folder, but has {foreign[0]}", hint="give another one with --out"
            )


_RESERVED = (JOB, RECORD, MANIFEST, REPLAY, metrics_log.FILE, CHECKPOINTS, crash.FOLDER)


def _clear(path: Path) -> None:
    """Remove an older run's files, the record last: after a kill in between, it is there for the next try."""
    (path / JOB).unlink(missing_ok=True)
    sweep_temporary(path)
    for file in _outputs_of(path):
        target = path / file
        target.unlink(missing_ok=True)
        target.with_name(f".{target.name}.journal").unlink(missing_ok=True)
    for name in (CHECKPOINTS, crash.FOLDER):
        # The folder itself may be a link to a larger disk.
        for entry in (path / name).iterdir() if (path / name).is_dir() else ():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    for name in (MANIFEST, REPLAY, DIVERGENCE, metrics_log.FILE, RECORD):
        (path / name).unlink(missing_ok=True)
    fsync_folder(path)


def _outputs_of(path: Path) -> Iterable[str]:
    try:
        return list(read_manifest(path).entries)
    except (OSError, ValueError):
        return []


def _folder_error(path: Path, error: Exception) -> RunFolderError:
    if isinstance(error, RunFolderError):
        return error
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, NotAFileError):
        text = f"{Path(error.filename).name}: {text}"
    wrapped = RunFolderError(f"cannot use the folder {path}: {text}", hint="give another one with --out")
    wrapped.__cause__ = error
    return wrapped
