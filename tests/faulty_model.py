"""A model of column phases that go wrong where they are told to; for the drills of worker processes.

``what`` happens in partition ``where`` in step ``at``, once: the file ``marker`` says that it has happened,
and in which process.
"""

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

import rustsim_hpc as rs

FIELD = 20_000


@rs.column_phase(writes="x", row_local=True)
def push(context: Any, columns: Any, rows: int) -> None:
    columns["x"] += np.sqrt(columns["x"]) * context.step_index


@rs.derive
def field(step: int) -> Any:
    """Return more bytes than a pipe holds, the same on each rank."""
    return {"wave": np.arange(FIELD) * (step + 1.0), "height": step + 0.5}


@rs.column_phase(writes=("x", "k"), row_local=True)
def trouble(context: Any, columns: Any, rows: int) -> None:
    columns["x"] += context.reductions["wave"][7] + context.reductions["height"]
    columns["k"] += 1
    params = context.params
    if context.step_index != params.at or params.where not in (-1, context.partition_id.value):
        return
    marker = Path(params.marker)
    if params.what and (params.again or not marker.exists()):
        marker.write_text(str(os.getpid()))
        ACTS[params.what]()


def _raise() -> None:
    raise ValueError("no luck")


def _leave_a_child(fork: Any) -> None:
    """Die while a process that has copies of all descriptors lives on."""
    if fork() == 0:
        time.sleep(200)  # longer than any test waits
        os._exit(0)
    os._exit(9)


def _ask_a_child() -> None:
    """Have a forked process say something over every low descriptor number that is free."""
    pipes = [os.pipe() for _ in range(20)]
    if os.fork() == 0:
        try:
            for _, into in pipes:
                os.write(into, b"x")
        finally:
            os._exit(0)
    for out, into in pipes:
        os.close(into)
        if os.read(out, 1) != b"x":
            raise ValueError("a pipe of the model's was closed")
        os.close(out)
    os.wait()


ACTS = {
    "raise": _raise,
    "exit": lambda: os._exit(7),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "abort": os.abort,
    "wait": lambda: time.sleep(60),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "print": lambda: print("a phase prints"),
    "child": _ask_a_child,
    "fork": lambda: _leave_a_child(os.fork),
    "c fork": lambda: _leave_a_child(ctypes.CDLL(None).fork),
}


def initialise(rows: Any, params: Any, tables: Any, seed: int) -> dict[str, Any]:
    row = np.arange(rows.start, rows.stop)
    return {"x": row / 8, "k": row % 100}


def tables(params: Any) -> dict[str, Any]:
    """Return a table; note which process made it."""
    with Path(params.marker + ".tables").open("a") as file:
        file.write(f"{os.getpid()}\n")
    return {"weights": np.arange(1000)}


def model() -> rs.Model:
    return rs.Model(
        columns=[rs.Column("x", "float64"), rs.Column("k", "int64")],
        params={"what": "", "at": 2, "where": 0, "again": False, "marker": "/nowhere"},
        tables=tables,
        initialise=initialise,
        phases=[push, field, trouble],
    )
