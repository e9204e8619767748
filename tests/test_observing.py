"""When the reductions of checks and outputs are made: for whom, at which step, how often."""

import functools
from collections import Counter
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import suite_observed
from executor_suite import Driven, ExecutorSuite
from thread_team import run_ranks

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.executors.partition_run import PartitionRun
from rustsim_hpc.job.plan import rank_part
from rustsim_hpc.kernels import stage as stages
from rustsim_hpc.kernels.stage_source import op_name
from rustsim_hpc.modeling import program
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.observing import observed_reductions

ROWS = suite_observed.ROWS
OBSERVED = ("halves", "thirds", "spread", "shared")


@rs.reduction("sum")
def total(x):
    return x


@rs.reduction("max", name="top")
def highest(x):
    return x


def asking(function, every=1, reductions=()):
    return rs.check(every=every, reductions=reductions)(function)


OFTEN = asking(lambda context: True, 10, [total])
RARELY = asking(lambda context: True, 100, [highest])


def due(*owners):
    checks = [owner for owner in owners if not isinstance(owner, rs.Series | rs.Arrays)]
    outputs = [owner for owner in owners if isinstance(owner, rs.Series | rs.Arrays)]
    return {reduction.name: every for reduction, every in observed_reductions(checks, outputs).items()}


def test_each_is_due_where_those_that_declare_it_are():
    series = rs.Series("a.csv", lambda context: (1,), columns=("a",), every=np.int64(25), reductions=[total])
    arrays = rs.Arrays("a.h5", {"a": lambda context: 1}, every=20, reductions=[highest, total])
    assert due(OFTEN, RARELY, series, arrays) == {"total": (10, 25), "top": (20,)}
    assert due(OFTEN) == {"total": (10,)}
    assert due() == {}


NAME = "top"


def helper(context):
    return context.reductions["top"]


def by_constant(context):
    return context.reductions[NAME] > 0


def by_helper(context):
    return helper(context) > 0


def by_reduction(context):
    return context.reductions[highest.name] > 0


def by_argument(name, context):
    return context.reductions[name] > 0


def by_default(context, name="top"):
    return context.reductions[name] > 0


def by_one_of(context):
    return [context.reductions[name] for name in ("total", "top")] != []


def by_inner(context):
    def inner():
        return context.reductions["top"]

    return inner() > 0


def by_captured():
    name = "top"
    return lambda context: context.reductions[name] > 0


def by_module():
    made = ModuleType("helpers_of_a_model")
    made.__file__ = __file__
    made.helper = helper
    return lambda context: made.helper(context) > 0


@functools.lru_cache(maxsize=1)
def kept(context):
    return context.reductions["top"]


def by_wrapped(context):
    return kept(context) > 0


class Reader:
    def read(self, context):
        return context.reductions["top"] > 0


@pytest.mark.parametrize(
    "function",
    [
        helper,
        by_constant,
        by_helper,
        by_reduction,
        by_default,
        by_one_of,
        by_inner,
        by_wrapped,
        functools.partial(by_argument, "top"),
        by_captured(),
        by_module(),
        Reader().read,
    ],
)
def test_whoever_names_a_reduction_of_another_gets_it(function):
    series = rs.Series("a.csv", function, columns=("a",), every=7)
    assert due(RARELY, series) == {"top": (7, 100)}
    assert due(RARELY, rs.Arrays("a.h5", {"a": function}, every=7)) == {"top": (7, 100)}
    assert due(RARELY, rs.Arrays("a.h5", function, every=50)) == {"top": (50,)}


def test_what_nobody_names_is_left_to_those_that_declare_it():
    other = asking(lambda context: np.isfinite(len("stop")) and mock.call, 1, [total])
    assert due(RARELY, other) == {"top": (100,), "total": (1,)}


def bound(checks=(), outputs=()):
    model = rs.Model(
        columns=[rs.Column("x", "float64")],
        phases=[rs.row_kernel(writes="x", name="grow")(lambda x: x + 1)],
        initialise=lambda rows, params, tables, seed: [np.zeros(len(rows))],
        checks=checks,
        outputs=outputs,
    )
    return BoundModel(model, {}, seed=1, agents=10)


def plane_of(model):
    plane = rs.EngineControlPlane(rs.ColumnarRuntime(model.new_store(0, model.agents)))
    plane.add_model(model)
    return plane


def test_a_check_reads_what_a_rarer_one_declares():
    seen = []

    def look(context):
        seen.append(float(context.reductions["top"]))
        return True

    with plane_of(bound([RARELY, asking(look, 2)])) as plane:
        plane.run_partitions_with_executor(4, rs.InlinePartitionExecutor())
    assert seen == [2, 4]


def test_a_name_that_is_made_up_while_it_runs_is_a_typed_error():
    look = asking(lambda context: context.reductions["pot"[::-1]] > 0)
    with plane_of(bound([RARELY, look])) as plane, pytest.raises(errors.CheckFailed) as caught:
        plane.run_partitions_with_executor(1, rs.InlinePartitionExecutor())
    assert "there is no result top here" in str(caught.value)
    assert "reductions=[...]" in str(caught.value)


def test_the_model_of_the_suite_raises_where_too_much_is_made(monkeypatch):
    """So the tests of the executors can fail."""
    monkeypatch.setattr(program, "is_due", lambda every, step: True)
    driven = Driven(ExecutorSuite(), rs.InlinePartitionExecutor(), rows=ROWS, model="suite_observed")
    with pytest.raises(errors.ExecutorError, match="in the state at step 1"):
        driven.run(1)


@pytest.fixture
def ran(monkeypatch):
    """Which reductions of checks and outputs were made, by step, once for each partition."""
    made = Counter()
    plain = PartitionRun._run_stage

    def counted(run, stage, frame, status):
        names = [op_name(op) for op in stage.ops if op_name(op) in OBSERVED]
        made.update((frame.step_index, name) for name in names)
        return plain(run, stage, frame, status)

    monkeypatch.setattr(PartitionRun, "_run_stage", counted)
    return made


def expected(steps, partitions):
    return Counter(
        {(step, name): partitions for step in range(1, steps + 1) for name in suite_observed.made_at(step)}
    )


@pytest.mark.parametrize("threads", [None, 2])
def test_each_is_made_once_a_partition_where_it_is_due(ran, threads, monkeypatch):
    built, plain = [], stages.build_stage
    monkeypatch.setattr(stages, "build_stage", lambda *a, **b: built.append(a[0]) or plain(*a, **b))
    executor = rs.LocalThreadedPartitionExecutor(threads) if threads else rs.InlinePartitionExecutor()
    driven = Driven(ExecutorSuite(), executor, rows=ROWS, parts=4, model="suite_observed")
    driven.run(36)
    driven.plane.close()
    assert ran == expected(36, 4)
    assert len(built) == 4, "the kernel, and one stage for each of (2, 9), (3,) and (3, 4)"


@pytest.mark.parametrize("agents", [ROWS, 2])
def test_the_ranks_make_the_same_and_meet_once_for_all_that_is_due(ran, agents):
    """Also with a rank that has no rows."""
    meetings = []

    def body(team):
        model = BoundModel(suite_observed.model(), {}, seed=5, agents=agents)
        count = min(team.size, agents)
        part = rank_part(agents, count, team.size, team.rank)
        runtime = rs.ColumnarRuntime(model.new_store(part.row_start, part.row_stop), team=team)
        config = rs.ControlPlaneConfig(
            replay_mode=rs.ReplayMode.record(), partition_plan=rs.PartitionPlan.row_ranges(agents, count)
        )
        plane = rs.EngineControlPlane(runtime, config)
        plane.add_model(model)
        plain, sums, values = team.sum_int64, [], []
        team.sum_int64 = lambda array: sums.append(1) or plain(array)
        for _ in range(36):
            before = len(sums)
            plane.run_partitions_with_executor(1, rs.InlinePartitionExecutor())
            values.append(dict(plane.values))
            meetings.append((plane.runtime.step_index, len(sums) - before))
        return values, list(plane.recorded_replay())

    inline = Driven(
        ExecutorSuite(), rs.InlinePartitionExecutor(), rows=agents, parts=1, model="suite_observed"
    )
    inline.run(36)
    ran.clear()
    for values, recorded in run_ranks(3, body):
        assert recorded == inline.stream
        assert [set(made) for made in values] == [suite_observed.made_at(step) for step in range(1, 37)]
        assert all(np.array_equal(values[-1][name], inline.plane.values[name]) for name in OBSERVED)
    assert ran == expected(36, min(3, agents))
    by_step = dict(meetings)
    assert len(set(meetings)) == 36, "the same number on every rank"
    nothing, outputs, check, everything = (by_step[step] for step in (1, 3, 2, 36))
    assert outputs == nothing + 1
    assert check == everything, "what is due together is one meeting"


def test_a_resumed_run_leaves_the_same_outputs(tmp_path):
    job = {
        "model": {"module": str(Path(suite_observed.__file__))},
        "run": {"agents": 100, "steps": 18},
        "checkpoint": {"every": 7},
        "replay": {"mode": "record"},
    }
    whole = rs.run_job(job, out=tmp_path / "whole").folder
    part = rs.run_job(job, out=tmp_path / "part", steps=7).folder
    assert rs.resume_run(part, steps=18, executor="threads", workers=2).resumed_from == 7
    for name in ("thirds.csv", "ninths.csv", "replay.jsonl"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    assert (whole / "ninths.csv").read_text("utf-8").split() == ["step,halves", "0,100", "9,100", "18,100"]
    made = rs.open_run(part).series("thirds.csv")
    assert made["step"].tolist() == list(range(0, 19, 3))
