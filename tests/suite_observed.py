"""The fourth model of the executor suite: reductions of checks and outputs, at steps of their own.

All but `spread` fail where they are made though they are not due, in whichever process that is.
"""

import numpy as np

import rustsim_hpc as rs

ROWS = 9000


@rs.row_kernel(writes=("x", "age"))
def grow(x, age, rng):
    return x + rs.random.uniform(rng, 0), age + 1


@rs.reduction("histogram", bins=1)
def halves(age):
    return 0 if age % 2 == 0 or age % 9 == 0 else 2


@rs.reduction("histogram", bins=1)
def thirds(age):
    return age % 3


@rs.reduction("sum")
def spread(x):
    return x


@rs.reduction("histogram", bins=1)
def shared(age):
    return min(age % 3, age % 4)


@rs.check(every=2, reductions=[halves])
def even(context):
    return context.reductions["halves"][0] == context.agent_count


def ninth(context):
    """The reduction of the check, which is not due at every step of this output."""
    return context.step_index, context.reductions["halves"][0]


def made_at(step):
    """Return the names of the reductions that are due for the state after ``step`` steps."""
    every = {"halves": (2, 9), "thirds": (3,), "spread": (3,), "shared": (3, 4)}
    return {name for name, steps in every.items() if any(step % n == 0 for n in steps)}


def initialise(rows, params, tables, seed):
    return [(np.arange(rows.start, rows.stop) % 97).astype(np.float32), np.zeros(len(rows), np.int64)]


def model():
    return rs.Model(
        columns=[rs.Column("x", "float32"), rs.Column("age", "int64")],
        initialise=initialise,
        phases=[grow],
        checks=[even],
        outputs=[
            rs.Series(
                "thirds.csv",
                lambda context: (context.step_index, context.reductions["spread"]),
                columns=("step", "spread"),
                every=3,
                reductions=[thirds, spread, shared],
            ),
            rs.Arrays(
                "fourths.h5",
                {"shared": lambda context: context.reductions["shared"]},
                every=4,
                reductions=[shared],
            ),
            rs.Series("ninths.csv", ninth, columns=("step", "halves"), every=9),
        ],
    )
