"""A run repeated in memory: restored from its nearest proven checkpoint, or initialised, and stepped on.

Nothing of the run's folder is changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from rustsim_hpc.control.config import ControlPlaneConfig
from rustsim_hpc.control.control_plane import EngineControlPlane
from rustsim_hpc.control.runtime import ColumnarRuntime
from rustsim_hpc.divergence.phase_trace import PhaseTrace
from rustsim_hpc.divergence.row_search import Rows, codes_of
from rustsim_hpc.divergence.side import Known, RunSide
from rustsim_hpc.errors import CheckpointFileError, ColumnMemoryError
from rustsim_hpc.executors.threads import LocalThreadedPartitionExecutor
from rustsim_hpc.job.plan import rank_part, size, worker_count
from rustsim_hpc.job.prepared import Prepared, first_store, prepare
from rustsim_hpc.job.restored import restored_store
from rustsim_hpc.modeling.program import plan_program
from rustsim_hpc.proof.fingerprint import digest_value, fnv1a_bytes, fnv1a_header, fnv1a_ids, fnv1a_names
from rustsim_hpc.proof.replay import ReplayMode
from rustsim_hpc.proof.replay_log import IDS
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.state.columns import DeviceSoaStore
from rustsim_hpc.state.partition import PartitionPlan
from rustsim_hpc.storage.header import CheckpointHeader
from rustsim_hpc.storage.restoring import load

Beat = Callable[[str, int], None]


class Replica:
    """A side's run, repeated up to some step; its states are compared with what is known of them."""

    def __init__(self, side: RunSide, prepared: Prepared, store: DeviceSoaStore, step: int) -> None:
        self.side = side
        self.prepared = prepared
        spec = prepared.spec
        self.executor = LocalThreadedPartitionExecutor(worker_count(spec))
        config = ControlPlaneConfig(
            replay_mode=ReplayMode.record(),
            partition_plan=PartitionPlan.row_ranges(spec.run.agents, prepared.partitions),
            fingerprint="digest",
            max_retained_checkpoints=1,
        )
        self.plane = EngineControlPlane(ColumnarRuntime(store, step, team=prepared.team), config)
        self.plane.add_model(prepared.model, checked=spec.run.check, tile_rows=spec.run.tile_rows or 0)
        self.trace = PhaseTrace(self.plane, self.executor, prepared.model.phases, prepared.team)

    @property
    def step(self) -> int:
        """Steps made."""
        return self.plane.runtime.step_index

    def known(self) -> Known:
        """Return the digest of this state, and the digest's sum of each column. Collective."""
        value = self.plane.fingerprint().value
        return Known(value, "digest", dict(self.plane.column_values()))

    def known_next(self, sums: Mapping[str, int]) -> Known:
        """Return the same for the next state, from its columns' sums after the last phase. Collective."""
        model, ids = self.prepared.model, self.known().columns[IDS]
        names, dtypes = model.schema.names, [column.dtype for column in model.schema.columns]
        values = [sums[name] for name in names]
        value = digest_value(self.step + 1, model.agents, names, dtypes, values, ids)
        return Known(value, "digest", {IDS: ids, **dict(zip(names, values, strict=True))})

    def advance(self, beat: Beat) -> None:
        """Make one step, and compare the new state with what is known of it. Collective.

        Raises:
            EngineControlPlaneError: a phase failed.
        """
        beat("step", self.step)
        self.plane.step_partitions_with_executor(self.executor)
        self.plane.forget_recorded()
        self.side.compare(self.step, self.known())

    def rows(self) -> Rows:
        """Return the columns of the current state, views of them."""
        return self.trace.hold(0)

    def check(self, rows: Rows, step: int) -> None:
        """Compare a state with the known FNV-1a value, if that is all that is known of it. Collective."""
        stated = self.side.known.get(step)
        if stated is None or stated.columns or stated.scheme == "digest":
            return
        model, team, part = self.prepared.model, self.prepared.team, self.prepared.part
        value = fnv1a_header(step, model.agents, len(model.schema.names))
        value = team.chain(value, lambda state: fnv1a_ids(state, rows.ids, part.row_start, part.row_stop))
        value = fnv1a_names(value, model.schema.names)
        for name in model.schema.names:
            value = team.chain(value, lambda state, name=name: fnv1a_bytes(state, rows.columns[name]))  # type: ignore[misc]
        self.side.compare(step, Known(value, "fnv1a"))

    def close(self) -> None:
        """Release threads and memory."""
        self.plane.close()
        self.plane.runtime.device_store().close()


class Bench:
    """Keeps the replicas of two sides: both if there is memory for both, else the one last used.

    Args:
        team: the ranks.
        beat: called for each step, to tell a watchdog of progress.
    """

    def __init__(self, team: Team, beat: Beat) -> None:
        self.team = team
        self.both = True
        self._beat = beat
        self._alive: dict[int, Replica] = {}
        self._prepared: dict[int, Prepared] = {}

    def prepare(self, sides: tuple[RunSide, RunSide]) -> None:
        """Bind the sides' models, and decide whether both sides fit into memory. Collective.

        Raises:
            RustsimError: a model cannot be bound.
        """
        needed = []
        for side in sides:
            assert side.spec is not None  # noqa: S101 (asked before)
            prepared = prepare(side.spec, self.team)
            prepared.model.checks = prepared.model.outputs = ()
            self._prepared[id(side)] = prepared
            needed.append(_bytes_of(prepared))
        room = min(self.team.allgather(available_memory() // self.team.node_size))
        sizes = [max(self.team.allgather(one)) for one in needed]
        if max(sizes) > room:
            raise ColumnMemoryError(
                f"running it again needs {size(max(sizes))} a rank, and there are {size(room)} left",
                hint="take more ranks",
            )
        self.both = sum(sizes) < room * 0.9

    def prepared(self, side: RunSide) -> Prepared:
        """Return a side's bound model and partitions."""
        return self._prepared[id(side)]

    def at(self, side: RunSide, step: int) -> Replica:
        """Return a side's replica at a step. Collective.

        Raises:
            CheckpointFileError: there is no state to start from.
            EngineControlPlaneError: a phase failed on the way.
        """
        replica = self._alive.get(id(side))
        if replica is None or replica.step > step:
            self._drop(side)
            if not self.both:
                self.close()
            replica = self._alive[id(side)] = self._start(side, step)
        while replica.step < step:
            replica.advance(self._beat)
        return replica

    def rows(self, side: RunSide, step: int, phases: int = 0) -> Rows:
        """Return a side's columns after ``phases`` phases from the state at ``step`` on. Collective.

        Raises:
            RustsimError: as for `at`.
        """
        replica = self.at(side, step)
        if phases:
            self._beat("phases", step)
        return replica.trace.hold(phases)

    def close(self) -> None:
        """Release all replicas."""
        for replica in self._alive.values():
            replica.close()
        self._alive = {}

    def _drop(self, side: RunSide) -> None:
        replica = self._alive.pop(id(side), None)
        if replica is not None:
            replica.close()

    def _start(self, side: RunSide, step: int) -> Replica:
        """Restore the nearest valid checkpoint at or before a step; else initialise."""
        prepared = self.prepared(side)
        for at, path in sorted(side.checkpoints, reverse=True):
            if at > step:
                continue
            try:
                return Replica(side, prepared, restored_store(path, prepared), at)
            except CheckpointFileError as error:
                side.notes.append(f"{side.name}: {path.name} is not used: {error}")
        if side.origin:
            raise CheckpointFileError(
                f"{side.name} has no checkpoint at or before step {step} to start from", damaged=False
            )
        return Replica(side, prepared, first_store(prepared), 0)


def checkpoint_rows(path: Path, team: Team) -> Rows:
    """Read this rank's share of a checkpoint, proved. Collective.

    Raises:
        CheckpointFileError: it does not hold.
    """

    def share(header: CheckpointHeader) -> tuple[int, int]:
        part = rank_part(header.rows, max(1, min(team.size, header.rows)), team.size, team.rank)
        return part.row_start, part.row_stop

    loaded = load(path, team, share)
    view, codes = loaded.rows, codes_of(loaded.header.schema)
    return Rows(dict(zip(view.names, view.columns, strict=True)), view.row_offset, view.ids, codes)


def available_memory() -> int:
    """Return the bytes that this machine, or this process's control group, has left."""
    left: list[int] = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        left += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no group, or one of another kind
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        left += [int(limit) - int(used)] if limit != "max" else []
    return max(0, min(left)) if left else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _bytes_of(prepared: Prepared) -> int:
    """Return the bytes that a side's columns take on this rank, second buffers included."""
    model = prepared.model
    program = plan_program(model.schema, model.phases, two_sided=True, **model.program_options())
    swapped = sum(model.schema.dtypes[index].itemsize for index in program.swapped)
    return (prepared.part.row_stop - prepared.part.row_start) * (model.schema.row_bytes + swapped)
