"""What every executor must do. A subclass says how to make one, and is a test of it.

::

    class TestMine(ExecutorSuite):
        @pytest.fixture
        def make_executor(self):
            return MyExecutor

Planes are of the model in suite_model.py, whose phases are entries that a worker can find by name, and, where
`kernels` says so, of the one in suite_kernels.py.
"""

import gc
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import suite_observed

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.modeling.bound_model import BoundModel
from rustsim_hpc.modeling.model_source import load_model

HERE = Path(__file__).parent
PHASES = ("first", "kick", "last")
VERIFY, RECORD = rs.ReplayMode.verify, rs.ReplayMode.record()


class Driven:
    """A plane of a suite's model and the executor that steps it."""

    def __init__(
        self,
        suite,
        executor,
        *,
        rows=50,
        parts=3,
        model="suite_model",
        params=None,
        trip=None,
        step_index=0,
        checked=False,
        **config,
    ):
        if model == "suite_model":
            params = {"trip": str(trip or ""), **(params or {})}
        model, reference = load_model(str(HERE / f"{model}.py"))
        bound = BoundModel(model, params or {}, seed=5, agents=rows, reference=reference)
        plan, workers = suite.plan(rows, parts)
        config = {"replay_mode": RECORD, "partition_plan": plan, "partition_workers": workers, **config}
        runtime = rs.ColumnarRuntime(bound.new_store(0, rows), step_index)
        self.plane = rs.EngineControlPlane(runtime, rs.ControlPlaneConfig(**config))
        self.plane.add_model(bound, checked=checked)
        self.executor = executor
        self.trip = trip

    def run(self, steps):
        return self.plane.run_partitions_with_executor(steps, self.executor)

    @property
    def stream(self):
        return list(self.plane.recorded_replay())

    def everything(self):
        """What a step that fails must leave as it was."""
        plane = self.plane
        state = plane.runtime.device_store().checkpoint()
        return state, plane.runtime.step_index, plane.metrics(), plane.recorded_replay(), plane.checkpoints()

    def tripping(self, phase, partitions, how="raise"):
        self.trip.write_text(f"{phase} {','.join(map(str, partitions))} {how}", "utf-8")


class ExecutorSuite:
    """Tests of one executor; see the module."""

    kernels = True
    """Whether it runs row kernels and reductions."""

    @pytest.fixture
    def make_executor(self):
        """Return what makes a new executor."""
        raise NotImplementedError

    @pytest.fixture
    def make_other(self):
        """Return what makes an executor of another kind that serves the same plans."""
        return rs.InlinePartitionExecutor

    def plan(self, rows, parts):
        """Return a plan and its workers that the executor serves."""
        return rs.PartitionPlan.row_ranges(rows, parts), ()

    @pytest.fixture
    def drive(self, make_executor, tmp_path):
        """Return what makes a plane and its executor; all are closed in the end."""
        made = []

        def make(**given):
            executor = given.pop("executor", None) or make_executor()
            made.append(Driven(self, executor, trip=tmp_path / f"trip{len(made)}", **given))
            return made[-1]

        yield make
        for driven in made:
            driven.plane.close()
            if hasattr(driven.executor, "close"):
                driven.executor.close()

    def expected(self, steps, **given):
        """The stream of an inline run with one partition, in which nothing goes wrong."""
        plain = ExecutorSuite()
        driven = Driven(plain, rs.InlinePartitionExecutor(), parts=1, **given)
        driven.run(steps)
        return driven.stream

    # -- the same bits -------------------------------------------------------------------------------

    @pytest.mark.parametrize("parts", [1, 2, 3, 7, 16])
    def test_bits_are_those_of_inline(self, drive, parts):
        driven = drive(parts=parts)
        driven.run(6)
        assert driven.stream == self.expected(6)

    @pytest.mark.parametrize("scheme", ["fnv1a", "digest"])
    @pytest.mark.parametrize("guard", ["rollback", "torn"])
    def test_bits_under_both_guards_and_schemes(self, drive, guard, scheme):
        driven = drive(guard=rs.StepGuard(guard), fingerprint=scheme)
        driven.run(5)
        assert driven.stream == self.expected(5, fingerprint=scheme)
        state = driven.plane.runtime.device_store().checkpoint()
        assert driven.stream[-1] == rs.fingerprint_checkpoint(5, state, scheme)

    @pytest.mark.parametrize("rows", [0, 1, 2, 3])
    def test_few_rows(self, drive, rows):
        driven = drive(rows=rows, parts=3)
        steps = driven.run(3)
        assert driven.stream == self.expected(3, rows=rows)
        assert len(steps[0].phases) == 3 * max(1, rows)
        assert driven.plane.metrics().partition_count == max(1, rows)

    def test_kernels_and_reductions(self, drive):
        driven = drive(model="suite_kernels", rows=100, parts=4)
        if not self.kernels:
            with pytest.raises(errors.ExecutorError, match="row kernels, reductions and derived values need"):
                driven.run(1)
            return
        driven.run(4)
        assert driven.stream == self.expected(4, model="suite_kernels", rows=100)

    @pytest.mark.parametrize("guard", ["rollback", "torn"])
    @pytest.mark.parametrize("scheme", ["fnv1a", "digest"])
    def test_several_steps_at_once(self, drive, scheme, guard):
        if not self.kernels:
            return
        given = {"rows": 9000, "fingerprint": scheme, "model": "suite_fused"}
        mode = rs.ReplayMode.record(interval=4)
        driven = drive(replay_mode=mode, guard=rs.StepGuard(guard), **given)
        made = []
        while driven.plane.runtime.step_index < 10:
            before = driven.plane.runtime.step_index
            driven.plane.step_fused(driven.executor, 10 - before)
            made.append(driven.plane.runtime.step_index - before)
        assert made == [4, 4, 2]
        single = self.expected(10, **given)
        assert driven.stream == [entry for entry in single if entry.step_index % 4 == 0]
        assert driven.plane.fingerprint() == single[-1]
        assert driven.plane.metrics().steps_completed == 10
        driven.run(1)
        assert driven.plane.fingerprint() == self.expected(11, **given)[-1]

    @pytest.mark.parametrize("partition", [0, 2])
    def test_several_steps_fail_as_one(self, drive, partition):
        if not self.kernels:
            return
        params, off = {"bad_step": 5, "bad_row": 3000 * partition + 7}, rs.ReplayMode.off()
        driven = drive(rows=9000, model="suite_fused", params=params, checked=True, replay_mode=off)
        driven.plane.step_fused(driven.executor, 3)
        assert driven.plane.runtime.step_index == 3
        before = driven.everything()
        with pytest.raises(errors.ExecutorError) as caught:
            driven.plane.step_fused(driven.executor, 10)
        assert driven.everything() == before
        error = caught.value
        assert (error.partition, error.phase) == (rs.PartitionId(partition), "shake")
        driven.plane.step_fused(driven.executor, 2)
        assert (
            driven.plane.fingerprint() == self.expected(5, rows=9000, model="suite_fused", params=params)[-1]
        )

    def test_only_reductions_that_are_due_are_made(self, drive):
        """Those of suite_observed.py raise where they are not due; a resumed run goes on in the same way."""
        if not self.kernels:
            return
        given = {"model": "suite_observed", "rows": suite_observed.ROWS}
        driven = drive(**given)
        inline = Driven(ExecutorSuite(), rs.InlinePartitionExecutor(), parts=1, **given)
        kept = None
        for step in range(1, 13):
            driven.run(1)
            inline.run(1)
            assert driven.plane.values.keys() == suite_observed.made_at(step)
            for name, value in driven.plane.values.items():
                assert np.array_equal(value, inline.plane.values[name])
                assert name == "spread" or value == [suite_observed.ROWS]  # each row once
            kept = driven.plane.checkpoint() if step == 7 else kept
        assert driven.stream == inline.stream
        other = drive(parts=2, **given)
        other.plane.restore(kept)
        for step in range(8, 13):
            other.run(1)
            assert other.plane.values.keys() == suite_observed.made_at(step)
        assert other.stream == inline.stream[7:]
        other.plane.observe(other.executor)
        assert np.array_equal(other.plane.values["spread"], inline.plane.values["spread"])

    def test_several_steps_at_once_end_where_an_output_is_due(self, drive):
        if not self.kernels:
            return
        given = {"model": "suite_observed", "rows": suite_observed.ROWS}
        driven = drive(replay_mode=rs.ReplayMode.off(), guard=rs.StepGuard.torn(), **given)
        ends = []
        while driven.plane.runtime.step_index < 12:
            driven.plane.step_fused(driven.executor, 12 - driven.plane.runtime.step_index)
            ends.append(driven.plane.runtime.step_index)
            assert driven.plane.values.keys() == suite_observed.made_at(ends[-1])
        assert ends == [2, 3, 4, 6, 8, 9, 10, 12]
        assert driven.plane.fingerprint() == self.expected(12, **given)[-1]

    def test_explicit_ids(self, drive):
        """Random numbers follow the ids, wherever they come from."""
        streams = []
        for driven in (drive(), Driven(ExecutorSuite(), rs.InlinePartitionExecutor())):
            state = driven.plane.runtime.device_store().checkpoint()
            ids = state.ids * 7 + 3
            named = dict(zip(state.column_names, state.columns, strict=True))
            store = rs.DeviceSoaStore.from_columns(ids, named, schema=state.schema)
            driven.plane.runtime_mut().restore_device_store(store, 0)
            driven.run(4)
            streams.append(driven.stream)
        assert streams[0] == streams[1] != self.expected(4)

    # -- what it reports -----------------------------------------------------------------------------

    def test_reports_come_in_partition_order(self, drive):
        driven = drive(parts=5, step_index=4)
        (step,) = driven.run(1)
        assert [(r.partition_id.value, r.phase_index, r.name, r.rows) for r in step.phases] == [
            (part, place, name, 10) for part in range(5) for place, name in enumerate(PHASES)
        ]
        assert (step.step_index, step.agent_count, step.fingerprint.step_index) == (4, 50, 5)
        assert sum(report.elapsed_us for report in step.phases) > 0
        backends = [worker.backend for worker in driven.plane.config.partition_workers]
        assert {report.backend for report in step.phases} == set(
            backends or [rs.PartitionExecutionBackend.local_cpu()]
        )

    def test_metrics(self, drive):
        driven = drive()
        driven.run(4)
        metrics = driven.plane.metrics()
        assert (metrics.steps_completed, metrics.partition_steps_completed) == (4, 4)
        assert metrics.partition_rows_processed == 4 * 50 * 3
        assert [(p.phase_index, p.name, p.executions) for p in metrics.phases] == [
            (place, name, 12) for place, name in enumerate(PHASES)
        ]

    # -- failures ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("phase", PHASES)
    @pytest.mark.parametrize("partition", [0, 1, 2])
    def test_a_failure_changes_nothing_and_the_plane_goes_on(self, drive, phase, partition):
        driven = drive(checkpoint_policy=rs.CheckpointPolicy.every_steps(1))
        driven.run(2)
        before = driven.everything()
        driven.tripping(phase, [partition])
        for _ in range(2):
            with pytest.raises(errors.ExecutorError) as caught:
                driven.run(1)
            assert driven.everything() == before
        error = caught.value
        assert isinstance(error.source, rs.PartitionExecutorError.Phase)
        assert str(error).endswith(
            f"partition PartitionId({partition}) phase {phase} failed: tripped in {phase}"
        )
        found = (error.partition, error.phase, error.phase_index, error.step, error.exit_code)
        assert found == (rs.PartitionId(partition), phase, PHASES.index(phase), 2, 3)
        driven.trip.unlink()
        driven.run(3)
        assert driven.stream == self.expected(5)
        assert [made.sequence for made in driven.plane.checkpoints()] == [2, 3, 4, 5]

    def test_several_failures_come_in_partition_order(self, drive):
        driven = drive(parts=7)
        driven.tripping("kick", [1, 4, 6])
        with pytest.raises(errors.ExecutorError) as caught:
            driven.run(1)
        assert caught.value.partition == rs.PartitionId(1)
        assert [other.partition.value for other in caught.value.others] == [4, 6]

    @pytest.mark.parametrize("partition", [0, 2])
    def test_what_is_no_exception_is_the_workers_failure(self, drive, partition):
        driven = drive()
        before = driven.everything()
        driven.tripping("last", [partition], "exit")
        with pytest.raises(errors.ExecutorError) as caught:
            driven.run(1)
        assert driven.everything() == before
        assert isinstance(caught.value.source, rs.PartitionExecutorError.Worker)
        assert caught.value.partition == rs.PartitionId(partition)
        driven.trip.unlink()
        driven.run(2)
        assert driven.stream == self.expected(2)

    def test_run_keeps_the_results_before_a_failure(self, drive):
        expected = self.expected(2)
        driven = drive(replay_mode=VERIFY(expected))
        with pytest.raises(errors.ReplayExhausted) as caught:
            driven.run(4)
        assert [step.fingerprint for step in caught.value.results] == expected

    def test_a_failed_verify_changes_nothing(self, drive):
        expected = self.expected(4)
        wrong = [*expected[:2], rs.ReplayFingerprint(3, expected[2].value ^ 1), expected[3]]
        driven = drive(replay_mode=VERIFY(wrong))
        driven.run(2)
        before = driven.everything()
        for _ in range(2):
            with pytest.raises(errors.ReplayDivergence):
                driven.run(1)
            assert driven.everything() == before

    def test_verify(self, drive):
        expected = self.expected(5)
        driven = drive(replay_mode=VERIFY(expected))
        driven.run(5)
        assert driven.stream == expected

    def test_torn_accepts_only_a_restore(self, drive):
        driven = drive(guard=rs.StepGuard.torn())
        driven.run(1)
        kept = driven.plane.checkpoint()
        driven.tripping("last", [2])
        with pytest.raises(errors.ExecutorError):
            driven.run(1)
        driven.trip.unlink()
        with pytest.raises(errors.TornState):
            driven.run(1)
        driven.plane.restore(kept)
        driven.run(2)
        assert driven.stream == self.expected(3)

    # -- checkpoints ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("parts", [1, 3, 7])
    def test_checkpoint_and_restore(self, drive, parts):
        driven = drive(parts=parts)
        driven.run(2)
        kept, pieces = driven.plane.checkpoint(), driven.plane.partition_checkpoints()
        driven.run(3)
        driven.plane.restore(kept)
        driven.run(1)
        driven.plane.restore_partitions(pieces)
        driven.run(3)
        assert driven.stream == self.expected(5)
        other = drive(parts=4)
        other.plane.restore(kept)
        other.run(3)
        assert other.stream == self.expected(5)[2:]

    def test_checkpoints_between_change_nothing(self, drive):
        driven = drive(checkpoint_policy=rs.CheckpointPolicy.every_steps(1))
        driven.run(5)
        assert driven.stream == self.expected(5)
        state = driven.plane.latest_checkpoint().state
        driven.run(1)
        assert state == driven.plane.checkpoints()[-2].state
        assert state != driven.plane.latest_checkpoint().state

    # -- life ----------------------------------------------------------------------------------------

    def test_executors_take_turns_on_one_plane(self, drive, make_other):
        driven = drive()
        for _ in range(2):
            driven.run(2)
            driven.plane.run_partitions_with_executor(1, make_other())
        assert driven.stream == self.expected(6)

    def test_one_executor_serves_two_planes(self, drive):
        one = drive()
        two = drive(executor=one.executor, parts=2)
        for _ in range(3):
            one.run(1)
            two.run(1)
        assert one.stream == two.stream == self.expected(3)

    def test_a_closed_plane_starts_again(self, drive):
        driven = drive()
        driven.run(2)
        driven.plane.close()
        driven.run(2)
        assert driven.stream == self.expected(4)

    def test_many_steps_grow_nothing(self, drive):
        driven = drive(replay_mode=rs.ReplayMode.off())
        driven.run(50)
        gc.collect()  # what other tests left for the collector
        before = held()
        driven.tripping("kick", [1])
        for _ in range(10):
            with pytest.raises(errors.ExecutorError):
                driven.run(1)
        driven.trip.unlink()
        driven.run(100)
        gc.collect()
        after = held()
        grown = [now > then for now, then in zip(after[:3], before[:3], strict=True)]
        assert not any(grown), f"threads, descriptors, child processes: {before}, {after}"
        assert after[3] - before[3] < 8 * 2**20, "bytes of memory"

    def test_planes_leave_nothing_behind(self, make_executor, tmp_path):
        for round_ in range(4):
            executor = make_executor()
            driven = Driven(self, executor, trip=tmp_path / "trip")
            driven.run(2)
            if round_ % 2:
                driven.plane.close()
            if hasattr(executor, "close"):
                executor.close()
            del driven, executor
            gc.collect()
            if round_ == 1:
                before = held()
        assert held()[:3] == before[:3]


def held():
    """What this process holds: threads, descriptors, children, bytes."""
    process = psutil.Process()
    return threading.active_count(), process.num_fds(), len(process.children()), process.memory_info().rss
