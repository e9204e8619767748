"""States restored from checkpoints: which ones a run accepts, and the lineage of a fork."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

from rustsim_hpc.errors import CheckpointFileError
from rustsim_hpc.job.keys import JobSpec
from rustsim_hpc.job.prepared import Prepared
from rustsim_hpc.proof.fingerprint import StateView, hex64
from rustsim_hpc.proof.state_proof import view_of
from rustsim_hpc.run_folder.environment import differences, machines_of
from rustsim_hpc.run_folder.folder import RunFolder
from rustsim_hpc.run_folder.reader import open_run
from rustsim_hpc.state.columns import DeviceSoaStore
from rustsim_hpc.state.memory import ColumnMemory
from rustsim_hpc.storage.folder import list_checkpoints, move_aside, step_of
from rustsim_hpc.storage.header import CheckpointHeader
from rustsim_hpc.storage.reading import read_header
from rustsim_hpc.storage.restoring import LoadedCheckpoint, load


def rows_for(prepared: Prepared, header: CheckpointHeader) -> tuple[int, int]:
    """Return this rank's rows of a checkpoint, which must be of this run.

    Raises:
        CheckpointFileError: its model, columns, population, seed or parameters differ.
    """
    spec, model = prepared.spec, prepared.model
    for what, theirs, ours in (
        ("seed", header.seed, spec.run.seed),
        ("parameters", dict(header.parameters), model.params.plain()),
        ("model source", header.model.get("identity"), model.identity()),
    ):
        if theirs != ours:
            raise CheckpointFileError(
                f"the checkpoint of step {header.step_index} is of another run: {what} {theirs}, here {ours}",
                damaged=False,
                hint="to continue with changes, use `rustsim-hpc fork`",
            )
    return forked_rows(prepared, header)


def forked_rows(prepared: Prepared, header: CheckpointHeader) -> tuple[int, int]:
    """Return this rank's rows of a checkpoint, which must have the job's columns and population.

    Raises:
        CheckpointFileError: it has others.
    """
    step, spec = header.step_index, prepared.spec
    if header.schema != prepared.model.schema:
        text = f"the checkpoint of step {step} has other columns than the model"
        raise CheckpointFileError(text, damaged=False)
    if header.rows != spec.run.agents:
        text = f"the checkpoint of step {step} has {header.rows} agents, the job {spec.run.agents}"
        raise CheckpointFileError(text, damaged=False)
    return prepared.part.row_start, prepared.part.row_stop


def with_last_goal(spec: JobSpec, folder: Path) -> JobSpec:
    """Return a run's job with the step that its record says to reach, if that is beyond the job file's.

    Raises:
        RunFolderError: the run's record is damaged.
    """
    goal = max(spec.run.steps, int(open_run(folder).record.get("steps") or 0))
    return spec.model_copy(update={"run": spec.run.model_copy(update={"steps": goal})})


def set_aside_later(folder: Path, step: int) -> None:
    """Move checkpoints after a step aside: the run that resumes from it writes them again."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            move_aside(path, f"the run was resumed from step {step}")


def last_sequence(folder: Path) -> int:
    """Return the highest sequence number of a run's checkpoints, from which numbering goes on; else 0."""
    found = 0
    for path in list_checkpoints(folder):
        with suppress(CheckpointFileError):
            found = max(found, read_header(path).sequence)
    return found


def machine_differences(folder: RunFolder) -> list[str]:
    """Return how the machines of this session differ from those of the previous one, on rank 0.

    Remote workers are known only once they are connected: `JobRecords.note_workers` reports those.
    """
    sessions = folder.record.get("sessions", [])
    if len(sessions) < 2 or sessions[-1]["executor"] == "remote":
        return []
    return differences(*map(machines_of, sessions[-2:]))


def lineage_of(parent: Path, prepared: Prepared, loaded: LoadedCheckpoint) -> dict[str, Any]:
    """Return where a fork comes from and what was changed."""
    run = open_run(parent)
    job = tomllib.loads(prepared.spec.to_toml())
    # A job file may leave out parameters, and float32 changes their values: so the effective values are
    # compared, and shown as the job file has them where it does.
    before, after = (
        _flat({**run.job, "params": run.params}),
        _flat({**job, "params": prepared.model.params.plain()}),
    )
    shown, shown_after = before | _flat(run.job), after | _flat(job)
    changes = {
        k: [shown.get(k), shown_after.get(k)]
        for k in sorted({*before, *after})
        if before.get(k) != after.get(k)
    }
    return {
        "parent": str(parent.absolute()),
        "run_id": run.record.get("run_id"),
        "step": loaded.header.step_index,
        "fingerprint": hex64(loaded.header.fingerprint.value),
        "changes": changes,
    }


def _flat(job: dict[str, Any]) -> dict[str, Any]:
    return {f"{table}.{key}": value for table, keys in job.items() for key, value in keys.items()}


def restored_store(path: Path, prepared: Prepared) -> DeviceSoaStore:
    """Return a store of this rank's rows of a checkpoint, proved, that has the job's columns. Collective.

    Raises:
        CheckpointFileError: it does not hold, or has other columns or another population.
    """
    restored = RestoredStore(prepared)
    load(path, prepared.team, lambda header: forked_rows(prepared, header), restored.room_for)
    return restored.take()


class RestoredStore:
    """The store that a checkpoint is read into, made once the checkpoint's header is known.

    Args:
        prepared: the job that it is for.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._store: DeviceSoaStore | None = None

    def room_for(self, header: CheckpointHeader, start: int, stop: int) -> StateView:
        """Return the store's arrays for rows [start, stop) of a checkpoint; frees an earlier attempt's.

        Raises:
            ColumnMemoryError: the memory cannot be allocated.
        """
        if self._store is not None:
            self._store.close()
        schema, ids = self._prepared.model.schema, not header.default_ids
        memory = ColumnMemory(schema, stop - start, self._prepared.kind, with_ids=ids)
        self._store = DeviceSoaStore(memory, row_offset=start, total_rows=header.rows)
        return view_of(self._store, header.step_index)

    def take(self) -> DeviceSoaStore:
        """Return the store that the checkpoint was read into."""
        if self._store is None:
            raise AssertionError("no checkpoint was read")
        return self._store
