"""Record and verify through the plane: every kind of step, every start, every way to go back."""

import pytest
from planes import EXECUTORS, KINDS, Plane, damp, everything, move, reference_stream, small_store, stream

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.proof.replay import ReplayEntry

SCHEMES = ("fnv1a", "digest")


def entries(steps, **given):
    scheme = given.get("fingerprint", "fnv1a")
    return [rs.ReplayFingerprint(step, value, scheme) for step, value in reference_stream(steps, **given)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_verify_works_with_every_kind_of_step(kind, scheme):
    expected = entries(6, fingerprint=scheme)
    made = Plane(kind, replay_mode=rs.ReplayMode.verify(expected), fingerprint=scheme)
    steps = made.run(6)
    assert [step.fingerprint for step in steps] == expected
    assert list(made.plane.recorded_replay()) == expected
    assert made.plane.metrics().replay_fingerprints == 6


def test_verify_through_a_mix_of_steps():
    made = Plane("partition", replay_mode=rs.ReplayMode.verify(entries(9)))
    for name, function in (("move", move), ("damp", damp)):
        made.plane.runtime_mut().add_cpu_phase(name, function)
        made.plane.add_partition_executor_phase(name, function)
    for _ in range(3):
        made.plane.step()
        made.plane.step_partitions()
        made.plane.step_partitions_with_executor(EXECUTORS["threads"]())
    assert list(made.plane.recorded_replay()) == entries(9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plane_on_a_runtime_that_has_begun(kind):
    before = Plane("runtime", replay_mode=rs.ReplayMode.off())
    before.run(3)
    expected = entries(6)
    made = Plane(
        kind,
        store=before.plane.runtime.device_store(),
        step_index=3,
        replay_mode=rs.ReplayMode.verify(expected),
    )
    made.run(3)
    assert list(made.plane.recorded_replay()) == expected[3:]
    with pytest.raises(errors.ReplayExhausted):
        made.step()


@pytest.mark.parametrize("kind", KINDS)
def test_verify_after_a_restore(kind):
    expected = entries(5)
    made = Plane(kind, replay_mode=rs.ReplayMode.verify(expected))
    made.run(2)
    kept = made.plane.checkpoint()
    made.run(3)
    made.plane.restore(kept)
    assert list(made.plane.recorded_replay()) == expected[:2]
    made.run(2)
    made.plane.restore_partitions(made.plane.partition_checkpoints())
    made.run(1)
    assert list(made.plane.recorded_replay()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_making_checkpoints_does_not_move_the_cursor(kind):
    made = Plane(
        kind,
        replay_mode=rs.ReplayMode.verify(entries(6)),
        checkpoint_policy=rs.CheckpointPolicy.every_steps(1),
    )
    for _ in range(6):
        made.plane.partition_checkpoints()
        made.plane.checkpoint()
        made.step()
    assert stream(made.plane) == reference_stream(6)


def test_a_stream_with_a_gap():
    expected = entries(4)
    made = Plane("partition", replay_mode=rs.ReplayMode.verify([expected[0], *expected[2:]]))
    made.run(1)
    before = everything(made.plane)
    with pytest.raises(errors.ReplayStepMismatch) as caught:
        made.step()
    assert everything(made.plane) == before
    assert (caught.value.expected_step, caught.value.actual_step, caught.value.step) == (3, 2, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_stream(kind):
    made = Plane(kind, replay_mode=rs.ReplayMode.verify([]))
    with pytest.raises(errors.ReplayExhausted):
        made.step()
    assert made.plane.runtime.step_index == 0


def test_verify_takes_any_iterable_and_keeps_it():
    expected = entries(3)
    mode = rs.ReplayMode.verify(iter(expected))
    for _ in range(2):
        made = Plane("partition", replay_mode=mode)
        made.run(3)
    assert mode.expected == tuple(expected)


@pytest.mark.parametrize(("ours", "theirs"), [SCHEMES, SCHEMES[::-1]])
def test_two_schemes_are_an_error_and_no_divergence(ours, theirs):
    with pytest.raises(errors.SchemeMismatch):
        Plane("partition", fingerprint=ours, replay_mode=rs.ReplayMode.verify(entries(2, fingerprint=theirs)))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_diverging_digest_names_the_columns(kind, known):
    made = Plane(kind, fingerprint="digest")
    right = made.step().fingerprint
    columns = made.plane.column_values() if known else {}
    assert not known or set(columns) == {"ids", "x", "vx", "y", "vy"}
    entry = ReplayEntry(1, right.value, "digest", columns)
    other = Plane(
        kind, fingerprint="digest", replay_mode=rs.ReplayMode.verify([entry]), phases=[("move", move)]
    )
    before = everything(other.plane)
    with pytest.raises(errors.ReplayDivergence) as caught:
        other.step()
    assert caught.value.columns == (("vx",) if known else ())
    assert everything(other.plane) == before


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_are_those_of_the_state(kind, scheme):
    made = Plane(kind, fingerprint=scheme)
    for step in range(1, 4):
        found = made.step().fingerprint
        assert found == rs.fingerprint_checkpoint(
            step, made.plane.runtime.device_store().checkpoint(), scheme
        )
        assert found.scheme == scheme


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 2, 10])
def test_few_rows(kind, scheme, rows):
    made = Plane(kind, store=small_store(rows), parts=3, fingerprint=scheme)
    steps = made.run(3)
    assert stream(made.plane) == reference_stream(3, store=small_store(rows), fingerprint=scheme)
    if kind != "runtime":
        assert len(steps[0].phases) == 2 * max(1, min(rows, 3))
        assert sum(report.rows for report in steps[0].phases) == 2 * rows
        assert made.plane.metrics().partition_rows_processed == 6 * rows


def test_the_phases_of_an_empty_partition_run():
    seen = []
    made = Plane(
        "partition", store=small_store(0), phases=[("look", lambda *a: seen.append((a[0].row_end, a[2])))]
    )
    made.run(2)
    assert seen == [(0, 0)] * 2
    assert made.plane.metrics().partition_count == 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_columns_and_no_rows(kind, scheme):
    store = rs.DeviceSoaStore.from_columns([2**64 - 1], {})
    made = Plane(kind, store=store, phases=[("nothing", lambda *_: None)], fingerprint=scheme)
    assert made.step().fingerprint == rs.fingerprint_checkpoint(1, store.checkpoint(), scheme)
    made.plane.restore(made.plane.checkpoint())


@pytest.mark.parametrize("kind", KINDS)
def test_an_interval(kind):
    mode = rs.ReplayMode.record(interval=3)
    made = Plane(kind, replay_mode=mode)
    found = [step.fingerprint for step in made.run(7)]
    assert [entry and entry.step_index for entry in found] == [None, None, 3, None, None, 6, None]
    assert stream(made.plane) == [entry for entry in reference_stream(7) if entry[0] % 3 == 0]
    again = Plane(kind, replay_mode=rs.ReplayMode.verify(made.plane.recorded_replay(), interval=3))
    again.run(7)
    assert stream(again.plane) == stream(made.plane)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_beyond_32_bits(kind):
    """Random numbers end there (and column phases that draw them say so); steps do not."""
    made = Plane(kind, step_index=2**40)
    assert made.step().fingerprint.step_index == 2**40 + 1
