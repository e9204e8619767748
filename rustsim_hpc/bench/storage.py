"""What checkpoints cost: the pause in the step loop, what is written behind it, and the way back."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rustsim_hpc.bench.engine import Engine, Setup
from rustsim_hpc.bench.measure import Row, Section, Timing
from rustsim_hpc.bench.setting import MODELS, Size
from rustsim_hpc.proof.fingerprint import ReplayFingerprint, StateView
from rustsim_hpc.proof.state_proof import view_of
from rustsim_hpc.ranks.team import SoloTeam
from rustsim_hpc.storage.header import CheckpointHeader
from rustsim_hpc.storage.restoring import load_newest
from rustsim_hpc.storage.writer import CheckpointWriter

Array = np.ndarray[Any, Any]
_PIECE = 8 << 20


def checkpoints(size: Size, folder: Path) -> Section:
    """Measure checkpoints of integrate's state, written into a folder of their own below ``folder``."""
    place = Path(tempfile.mkdtemp(prefix="rustsim-bench-", dir=folder))
    try:
        return _checkpoints(size, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _checkpoints(size: Size, place: Path) -> Section:
    seconds: dict[str, list[float]] = {}

    def clock(key: str, call: Callable[[], object], units: float = 1.0) -> float:
        start = time.perf_counter()
        call()
        spent = time.perf_counter() - start
        seconds.setdefault(key, []).append(spent / units)
        return spent

    with Engine(Setup(MODELS + "integrate", size.rows)) as engine:
        store = engine.plane.runtime.device_store()
        room = [np.zeros_like(column) for column in store.columns]
        writer = CheckpointWriter(place / "checkpoints", SoloTeam())
        writer.folder.mkdir()
        writer.reserve(_view(engine))
        engine.step(2)
        for turn in range(1 + max(3, size.rounds // 2)):
            clock("copy", partial(_copy, room, store.columns))
            clock("step", partial(engine.step, 4), 4)
            pause = clock("pause", lambda: writer.submit(_header(engine), _view(engine)))
            clock("finish", writer.finish)
            seconds.setdefault("write", []).append(pause + seconds["finish"][-1])
            path = writer.paths[-1]
            written = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
            clock("plain", partial(_write, place / "plain", written, room))
            engine.step(2)
            writer.submit(_header(engine), _view(engine))
            clock("meanwhile", partial(engine.step, 4), 4)
            writer.finish()
            read = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
            clock("read", partial(_read, path.parent))
            clock("restore", partial(_restore, path.parent, size.rows))
            shutil.rmtree(path.parent)
            path.parent.mkdir()
            if turn == 0:  # memory and folders are there now
                seconds.clear()
    timings = {key: Timing(tuple(values)) for key, values in seconds.items()}
    return _section(size, timings, written, read)


def _section(size: Size, timings: dict[str, Timing], written: int, read: int) -> Section:
    def row(key: str, name: str, base: str = "", moved: int = 0) -> Row:
        found = Row.of(key, name, timings[key], timings[base] if base else None)
        if moved:
            found.rate, found.unit = moved / timings[key].median / 1e6, "MB/s"
        return found

    rows = [
        row("copy", "np.copyto of the columns", "copy"),
        row("pause", "pause of the step loop", "copy"),
        row("plain", "one plain file of as many bytes, fsync", "plain", written),
        row("write", "a checkpoint, from due to published", "plain", written),
        row("step", "a step, nothing written behind it", "step"),
        row("meanwhile", "a step while a checkpoint is written", "step"),
        row("read", "reading as many bytes", "read", read),
        row("restore", "restore, both proofs", "read", read),
    ]
    text = (
        f"Integrate, {size.rows:,} rows, inline, guard rollback, replay off. A checkpoint has "
        f"{written / 1e6:.0f} MB (default ids take almost no room) and is written in the background to the "
        "disk of the working directory. The pause is how long the step loop stops for a checkpoint, compared "
        "to np.copyto of the columns. Writing and reading are compared to one plain file of the same size, "
        "in pieces of 8 MiB. Steps that run while a checkpoint is written share the cores with the writer."
    )
    return Section("checkpoint", "Checkpoints", text, rows)


def _view(engine: Engine) -> StateView:
    runtime = engine.plane.runtime
    return view_of(runtime.device_store(), runtime.step_index)


def _header(engine: Engine) -> CheckpointHeader:
    plane, store = engine.plane, engine.plane.runtime.device_store()
    return CheckpointHeader(
        step_index=plane.runtime.step_index,
        rows=store.total_rows,
        schema=store.schema,
        fingerprint=ReplayFingerprint(plane.runtime.step_index, 0, "digest"),
        fingerprint_due=True,
        sequence=plane.count_checkpoint(),
    )


def _write(path: Path, size: int, columns: Sequence[Array]) -> None:
    """Write ``size`` bytes as `dd conv=fsync` does."""
    memory = columns[0].view(np.uint8).data
    with path.open("wb", buffering=0) as file:
        left = size
        while left:
            left -= file.write(memory[: min(left, _PIECE, len(memory))])
        os.fsync(file.fileno())


def _copy(targets: Sequence[Array], sources: Sequence[Array]) -> None:
    for target, source in zip(targets, sources, strict=True):
        np.copyto(target, source)


def _read(folder: Path) -> None:
    room = bytearray(_PIECE)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(room):
                    pass


def _restore(folder: Path, rows: int) -> None:
    loaded = load_newest(folder, SoloTeam(), lambda _: (0, rows))
    if loaded is None:
        raise FileNotFoundError(f"{folder}: no checkpoint")
