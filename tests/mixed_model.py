"""A model with every kind of phase: row kernels, reductions, derived values, a column phase, a check."""

from typing import Any

import numpy as np

import rustsim_hpc as rs


@rs.row_kernel(writes="x")
def jostle(x: float, noise: float, rng: Any) -> Any:
    return x + noise * rs.random.normal(rng, 0)


@rs.reduction("histogram", bins=4)
def crowd(k: int) -> Any:
    return k


@rs.reduction("sum")
def total(x: float) -> Any:
    return x


@rs.reduction("max")
def highest(x: float) -> Any:
    return x


@rs.derive
def means(total: Any, crowd: Any, step: int) -> Any:
    return {"mean": total / max(1, crowd.sum()), "curve": np.arange(3.0) * step}


@rs.row_kernel(writes=("k", "near"))
def sort(x: float, k: int, crowd: Any, mean: float, curve: Any, weights: Any, row: int) -> Any:
    return (k + row) % 4, x < mean + curve[2] * weights[k] and crowd[k] > 1


@rs.column_phase(writes="x", row_local=True)
def damp(context: Any, columns: Any, rows: int) -> None:
    columns["x"] *= np.float32(0.99)
    columns["x"] += context.random.uniform(0).astype(np.float32) * context.params.noise
    columns["x"] -= np.float32(context.reductions["highest"] * 1e-3)


@rs.reduction("count")
def nearby(near: bool) -> Any:
    return near


@rs.check(reductions=[nearby])
def sane(context: Any) -> bool:
    return 0 <= context.reductions["nearby"] <= context.agent_count


def initialise(rows: Any, params: Any, tables: Any, seed: int) -> dict[str, Any]:
    row = np.arange(rows.start, rows.stop)
    return {
        "x": (row % 1000 / 100).astype(np.float32),
        "k": (row % 4).astype(np.int8),
        "near": np.zeros(len(row), bool),
    }


def model() -> rs.Model:
    return rs.Model(
        columns=[rs.Column("x", "float32"), rs.Column("k", "int8"), rs.Column("near", "bool")],
        params={"noise": rs.Param("float32", 0.1)},
        tables=lambda params: {"weights": np.linspace(0, 1, 4)},
        initialise=initialise,
        phases=[jostle, crowd, total, highest, means, sort, damp],
        checks=[sane],
    )
