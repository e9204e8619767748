"""Writes a checkpoint in a process that is ended at its k-th call of the operating system, for every k.

Prints one line of JSON a k: what a reader finds right after, and what is there when it was swept. Run with a
folder, the case ("new", "replace" or "retain") and the number of ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from storage_cases import bounds, cut, header_of, same_bits, state
from thread_team import ThreadTeam, run_ranks

from rustsim_hpc.errors import CheckpointFileError
from rustsim_hpc.ranks.team import SoloTeam
from rustsim_hpc.storage import StorageOptions, list_checkpoints, load, sweep, write_checkpoint

ROWS = 9
CALLS = ("open", "pwrite", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "ftruncate", "link")


def write(folder: Path, size: int, step: int, seed: int, keep: int) -> None:
    view = state(ROWS, step=step, seed=seed)
    header, options = header_of(view), StorageOptions(keep=keep)
    run_ranks(
        size,
        lambda team: write_checkpoint(
            folder, header, cut(view, *bounds(ROWS, size, team.rank)), team, options
        ),
    )


def end_at(count: int) -> None:
    """End this process before its `count`-th call from now."""
    left = [count]

    def ending(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return function(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, ending(getattr(os, name)))


def found(folder: Path) -> list[list[int]]:
    """Return [step, seed] of every checkpoint that is there; each must hold, and be one that was written."""
    result = []
    for path in list_checkpoints(folder):
        view = load(path, SoloTeam(), lambda header: (0, header.rows)).rows
        seeds = [seed for seed in (1, 2) if same_bits(view, state(ROWS, step=view.step_index, seed=seed))]
        result.append([view.step_index, *seeds])
    return sorted(result)


def drill(base: Path, case: str, size: int) -> None:
    step, keep = {"new": (20, 0), "replace": (10, 0), "retain": (20, 1)}[case]
    # Everything is loaded, and compiled, before the first fork.
    write(base / "before", size, 10, 1, 0)
    found(base / "before")
    for count in range(1, 1000):
        folder = base / f"kill{count}"
        shutil.copytree(base / "before", folder)
        child = os.fork()
        if child == 0:
            end_at(count)
            write(folder, size, step, 2, keep)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        try:
            at_once = found(folder)
            sweep(folder)
            swept = found(folder)
        except CheckpointFileError as error:
            at_once, swept = [[str(error)]], []  # type: ignore[list-item]
        left = len(list(folder.iterdir()))
        print(json.dumps({"count": count, "code": code, "at_once": at_once, "swept": swept, "entries": left}))
        shutil.rmtree(folder)
        if code == 0:
            return


if __name__ == "__main__":
    assert ThreadTeam
    drill(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
