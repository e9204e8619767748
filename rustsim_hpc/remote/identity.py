"""Whether two processes would compute the same: one hash over what a bound program depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from rustsim_hpc.executors.work import Work
from rustsim_hpc.modeling.program import ColumnCall, Item, KernelOp
from rustsim_hpc.modeling.source_identity import function_identity


def work_identity(work: Work) -> str:
    """Return a SHA-256 (hex) over a work's columns, phases, their functions, its tables and bins.

    It covers what the hash of the model's own file does not: helpers in other files, and the data that tables
    were made of. Row ranges and the place in memory are no part of it.
    """
    program, digest = work.program, hashlib.sha256()
    for column in program.schema.columns:
        digest.update(f"column\0{column.name}\0{column.dtype}\0".encode())
    digest.update(f"sides\0{program.final_sides}\0bins\0{work.bins}\0".encode())
    for name in program.phase_names:
        digest.update(f"phase\0{name}\0".encode())
    for observation in program.observations:
        digest.update(f"due\0{observation.every}\0{observation.segment.reductions}\0".encode())
    for function in _functions(work):
        digest.update(function_identity(function).encode())
    for name, table in sorted(work.tables.items()):
        digest.update(f"table\0{name}\0{table.dtype}\0{table.shape}\0".encode())
        digest.update(np.ascontiguousarray(table).tobytes())
    return digest.hexdigest()


def _functions(work: Work) -> Iterator[Any]:
    program = work.program
    for segment in (*program.segments, *(each.segment for each in program.observations)):
        for item in segment.items:
            yield from _item_functions(item)


def _item_functions(item: Item) -> Iterator[Any]:
    if isinstance(item, ColumnCall):
        yield item.column_phase.fn
        return
    for op in item.ops:
        if isinstance(op, KernelOp):
            yield op.kernel.fn
        else:
            yield op.reduction.fn
            if callable(op.reduction.key):
                yield op.reduction.key
