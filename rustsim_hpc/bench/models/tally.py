"""A histogram of one int32 column, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np

from rustsim_hpc.modeling.model import Model, reduction
from rustsim_hpc.state.schema import Column

BINS = 1024


@reduction("histogram", bins=BINS)
def tally(key: int) -> int:
    """Count rows by their key."""
    return key


def initialise(rows: Any, params: Any, tables: Any, seed: int) -> dict[str, Any]:  # noqa: ARG001
    """Scatter the keys evenly, in an order that no cache likes better than another."""
    row = np.arange(rows.start, rows.stop, dtype=np.uint64)
    scattered = (row * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(54)
    return {"key": scattered.astype(np.int32)}


def model() -> Model:
    """Return the model."""
    return Model(columns=[Column("key", "int32")], initialise=initialise, phases=[tally])
