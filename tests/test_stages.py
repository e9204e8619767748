"""Stages as compiled: kernels that share a loop, rows written around the cache, and what becomes of both."""

import math
import platform
import sys
from typing import Any

import numpy as np
import pytest

import rustsim_hpc as rs
from rustsim_hpc.bench.engine import Engine, Setup
from rustsim_hpc.bench.setting import MODELS
from rustsim_hpc.executors import work
from rustsim_hpc.kernels.simple import is_simple
from rustsim_hpc.modeling.bound_model import BoundModel

TYPES = ("bool", "int8", "uint16", "int32", "float32", "int64", "uint64", "float64")


@rs.row_kernel(writes=tuple(f"c{k}" for k in range(len(TYPES))))
def turn(c0, c1, c2, c3, c4, c5, c6, c7, row, step):
    return not c0, c1 + 1, c2 + row, c3 - step, c4 * 0.9, c5 ^ row, c6 + 3, c7 + c4


@rs.row_kernel(writes=("c4", "c7"))
def damp(c3, c4, c7):
    return c4 - 0.001 * c3, c7 if c7 < 50.0 else 0.5 * c7


@rs.row_kernel(writes="c1")
def halve(c1):
    return c1 if c1 < 100 else 0


PHASES = [turn, damp, halve]


def initialise(rows, params, tables, seed):
    row = np.arange(rows.start, rows.stop)
    return {f"c{k}": (row % 97).astype(dtype) for k, dtype in enumerate(TYPES)}


def twin(rows: int, steps: int) -> list[np.ndarray]:
    """The same in plain NumPy, column after column."""
    row = np.arange(rows)
    c = [(row % 97).astype(dtype) for dtype in TYPES]
    for step in range(steps):
        c4 = (c[4].astype(float) * 0.9).astype("float32")  # literals are float64 in kernels
        new = [~c[0], c[1] + np.int8(1), c[2] + row, c[3] - step, c4, c[5] ^ row, c[6] + np.uint64(3)]
        new.append(c[7] + c[4])
        c = [column.astype(dtype) for column, dtype in zip(new, TYPES, strict=True)]
        c[4] = (c[4] - 0.001 * c[3]).astype("float32")
        c[7] = np.where(c[7] < 50.0, c[7], 0.5 * c[7])
        c[1] = np.where(c[1] < 100, c[1], 0).astype("int8")
    return c


def plane(rows: int, partitions: int, scheme: str, guard: str) -> rs.EngineControlPlane:
    columns = [rs.Column(f"c{k}", dtype) for k, dtype in enumerate(TYPES)]
    model = rs.Model(columns=columns, initialise=initialise, phases=PHASES)
    bound = BoundModel(model, {}, seed=1, agents=rows)
    config = rs.ControlPlaneConfig(
        replay_mode=rs.ReplayMode.record(),
        partition_plan=rs.PartitionPlan.row_ranges(rows, partitions),
        guard=rs.StepGuard(guard),
        fingerprint=scheme,
    )
    made = rs.EngineControlPlane(rs.ColumnarRuntime(bound.new_store(0, rows)), config)
    made.add_model(bound)
    return made


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("rows", [1, 63, 64, 9001])
def test_rows_around_the_cache_are_the_same(
    rows: int, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks begin at cache lines wherever partitions do, and what is left over takes the usual way."""
    monkeypatch.setattr(work, "_CACHES_TO_STREAM", 0 if streams else 1e9)
    expected = twin(rows, 3)
    values = set()
    for partitions, scheme, guard in (
        (1, "digest", "rollback"),
        (3, "digest", "rollback"),
        (2, "digest", "torn"),
    ):
        with plane(rows, partitions, scheme, guard) as made:
            made.run_partitions_with_executor(3, rs.InlinePartitionExecutor())
            for column, right in zip(made.runtime.device_store().columns, expected, strict=True):
                np.testing.assert_array_equal(column, right)
            assert made.recorded_replay()[-1] == made.fingerprint()
            made.runtime_mut()  # forgets the sums that the steps left
            assert made.recorded_replay()[-1] == made.fingerprint()
            values.add(made.fingerprint().value)
    assert len(values) == 1
    with plane(rows, 2, "fnv1a", "rollback") as made:
        made.run_partitions_with_executor(3, rs.InlinePartitionExecutor())
        assert made.recorded_replay()[-1] == made.fingerprint()


def test_fused_steps_are_the_same_around_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_CACHES_TO_STREAM", 0)
    setup = Setup(MODELS + "integrate", 5001)
    with Engine(setup) as fused, Engine(setup) as single:
        fused.step_fused(7)
        single.step(7)
        assert fused.plane.fingerprint() == single.plane.fingerprint()


def test_kernels_that_share_a_loop_share_its_time() -> None:
    with Engine(Setup(MODELS + "orbit", 200_000)) as engine:
        engine.step(1)
        step = engine.plane.step_partitions_with_executor(engine.executor)
    times = [report.elapsed_us for report in step.phases]
    assert len(times) == 8
    assert max(times) - min(times) <= 1
    assert 0 < sum(times) <= step.total_us + 8


# -- what may share a loop --------------------------------------------------------------------------------


@rs.function
def helper(x):
    return x if x > 0.0 else -x


@rs.function
def raising(x):
    if x > 1.0:
        raise ValueError("too large")
    return x


def calls_helper(x, dt):
    return helper(x) + np.float32(dt) * math.sqrt(abs(x)) ** 2


def calls_raising(x):
    return raising(x)


def loops(x):
    for _ in range(3):
        x *= 0.5
    return x


def looks_up(x, table):
    return table[int(x)]


def takes_exponential(x):
    return math.exp(x)


def divides_integers(x):
    return x // 3


def calls_shadowed(x):
    min = helper  # noqa: A001
    return min(x)


@pytest.mark.parametrize("fn", [calls_helper, helper.fn, turn.fn, damp.fn])
def test_functions_that_only_compute_are_simple(fn: Any) -> None:
    assert is_simple(fn)


@pytest.mark.parametrize(
    "fn",
    [calls_raising, loops, looks_up, takes_exponential, divides_integers, calls_shadowed, abs, lambda x: x],
)
def test_functions_that_do_more_are_not(fn: Any) -> None:
    assert not is_simple(fn)


@pytest.mark.parametrize("module", ["integrate", "orbit"])
def test_hot_kernels_vectorise(module: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the standard set's figures rest on: packed arithmetic, and stores around the cache."""
    if platform.machine() != "x86_64":
        pytest.skip("looks for instructions of x86-64")
    from numba import njit, typeof

    monkeypatch.setattr(work, "_CACHES_TO_STREAM", 0)
    with Engine(Setup(MODELS + module, 5000)) as engine:
        engine.step(1)
        [run] = engine.plane.stepper(engine.executor).session.runs
        [call] = run._calls.values()
        function, values = call.function, call.values
        assert function.one_loop
        fresh = njit(error_model="numpy", nogil=True)(
            function.function.py_func
        )  # code from the cache has no text
        fresh.compile(tuple(map(typeof, values)))
        [assembly] = fresh.inspect_asm().values()
    assert "mulps" in assembly
    assert "movntps" in assembly
    assert sys.modules[function.module.__name__] is function.module


def test_a_key_out_of_range_says_whether_the_step_or_its_result_is_meant() -> None:
    @rs.row_kernel(writes="x")
    def rise(x: int) -> int:
        return x + 1

    @rs.reduction("histogram", bins=3)
    def after(x: int) -> int:
        return x

    model = rs.Model(
        columns=[rs.Column("x", "int32")],
        phases=[rise],
        initialise=lambda rows, params, tables, seed: {"x": np.zeros(len(rows), np.int32)},
        checks=[rs.check(reductions=[after])(lambda context: True)],
    )
    bound = rs.BoundModel(model, {}, seed=1, agents=10)
    with rs.EngineControlPlane(rs.ColumnarRuntime(bound.new_store(0, 10))) as plane:
        plane.add_model(bound)
        plane.run_partitions_with_executor(2, rs.InlinePartitionExecutor())
        with pytest.raises(rs.EngineControlPlaneError, match=r"key 3 .* in the state at step 3$") as caught:
            plane.step_partitions_with_executor(rs.InlinePartitionExecutor())
    assert caught.value.step == 2


@rs.reduction("histogram", bins=3)
def by_itself(key):
    return key


@rs.reduction("sum", key="key", bins=3)
def by_column(key):
    return 1


@rs.reduction("count", key=lambda key: key, bins=3)
def by_function(key):
    return True


@pytest.mark.parametrize("reduction", [by_itself, by_column, by_function], ids=lambda one: one.name)
@pytest.mark.parametrize(("dtype", "key"), [("uint64", 2**63), ("uint64", 2**64 - 1), ("int64", -(2**63))])
def test_a_key_out_of_range_is_told_as_it_is(reduction: Any, dtype: str, key: int) -> None:
    model = rs.Model(
        columns=[rs.Column("key", dtype)],
        initialise=lambda rows, params, tables, seed: {"key": np.full(len(rows), key, dtype)},
        phases=[reduction],
    )
    bound = BoundModel(model, {}, seed=1, agents=5)
    with rs.EngineControlPlane(rs.ColumnarRuntime(bound.new_store(0, 5))) as plane:
        plane.add_model(bound)
        with pytest.raises(rs.EngineControlPlaneError, match=rf"key {key} of row 0 is outside \[0, 3\)"):
            plane.step_partitions_with_executor(rs.InlinePartitionExecutor())


@rs.reduction("sum")
def everyone():
    return 1


@rs.reduction("min")
def least(c1):
    return 3


@rs.reduction("histogram", bins=2)
def all_in_one():
    return 1


@rs.reduction("sum", bins=2, key=lambda c1: 0)
def keyed(c1):
    return 2


def test_reductions_of_a_constant() -> None:
    """Numba calls what ``return 1`` gives the literal 1; it is an int64 like others."""
    model = rs.Model(
        columns=[rs.Column("c1", "int8")],
        initialise=lambda rows, params, tables, seed: {"c1": np.zeros(rows.stop - rows.start, np.int8)},
        phases=[everyone, least, all_in_one, keyed],
    )
    bound = BoundModel(model, {}, seed=1, agents=10)
    config = rs.ControlPlaneConfig(partition_plan=rs.PartitionPlan.row_ranges(10, 3))
    with rs.EngineControlPlane(rs.ColumnarRuntime(bound.new_store(0, 10)), config) as made:
        made.add_model(bound)
        made.step_partitions_with_executor(rs.InlinePartitionExecutor())
        values = {name: np.asarray(value).tolist() for name, value in made.values.items()}
    assert values == {"everyone": 10, "least": 3, "all_in_one": [0, 10], "keyed": [20, 0]}


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("columns", None),
        ("columns", ["x"]),
        ("phases", None),
        ("checks", 3),
        ("params", []),
        ("step_length", "1"),
    ],
)
def test_a_model_of_the_wrong_kinds(field: str, given: Any) -> None:
    fields = {"columns": [rs.Column("c1", "int8")], "initialise": initialise, "phases": [halve], field: given}
    with pytest.raises(rs.RustsimError, match=r"must be|not a Column"):
        BoundModel(rs.Model(**fields), {}, seed=1, agents=1)
