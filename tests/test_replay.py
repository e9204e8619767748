"""Replay modes, the verify cursor and the recorder: pure decisions."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest

from rustsim_hpc.errors import (
    InvalidConfig,
    ReplayDivergence,
    ReplayExhausted,
    ReplayStepMismatch,
    SchemeMismatch,
)
from rustsim_hpc.proof.fingerprint import ReplayFingerprint
from rustsim_hpc.proof.replay import ReplayEntry, ReplayMode, ReplayRecorder, VerifyCursor, differing_columns

GOLDEN = json.loads((Path(__file__).parent / "golden/golden.json").read_text(encoding="utf-8"))


def stream(steps, scheme="fnv1a"):
    return tuple(ReplayFingerprint(step, 1000 + step, scheme) for step in steps)


def golden_text(name):
    return next(error["display"] for error in GOLDEN["errors"] if error["id"] == name)


# -- modes ---------------------------------------------------------------------------------------------


def test_modes_are_frozen_values_that_compare_and_pickle():
    assert ReplayMode.off() == ReplayMode()
    assert ReplayMode.record() != ReplayMode.off()
    verify = ReplayMode.verify(entry for entry in stream([1, 2]))
    assert verify == ReplayMode.verify(list(stream([1, 2])))
    assert verify.expected == stream([1, 2])
    assert pickle.loads(pickle.dumps(verify)) == verify
    assert dataclasses.replace(verify, interval=2).interval == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        verify.kind = "off"


def test_a_fingerprint_is_due_by_the_absolute_step():
    assert not ReplayMode.off().is_due(4)
    assert [s for s in range(1, 7) if ReplayMode.record().is_due(s)] == [1, 2, 3, 4, 5, 6]
    assert [s for s in range(1, 9) if ReplayMode.record(3).is_due(s)] == [3, 6]
    assert [s for s in range(1, 9) if ReplayMode.verify((), 4).is_due(s)] == [4, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "recrod"}, "unknown replay mode 'recrod'"),
        ({"kind": "record", "interval": 0}, "interval must be greater than zero"),
        ({"kind": "record", "expected": stream([1])}, "record takes no expected"),
    ],
)
def test_modes_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(InvalidConfig, match=message):
        ReplayMode(**arguments)


# -- entries -------------------------------------------------------------------------------------------


def test_an_entry_is_a_fingerprint_with_columns():
    given = {"ids": 1, "x": 2}
    entry = ReplayEntry(3, 4, "digest", given)
    given["x"] = 9
    assert dict(entry.columns) == {"ids": 1, "x": 2}
    assert entry == ReplayFingerprint(3, 4, "digest")
    assert ReplayFingerprint(3, 4, "digest") == entry
    assert entry == ReplayEntry(3, 4, "digest")
    assert hash(entry) == hash(ReplayFingerprint(3, 4, "digest"))
    for other in (pickle.loads(pickle.dumps(entry)), copy.deepcopy(entry)):
        assert other == entry
        assert other.columns == entry.columns
    with pytest.raises(TypeError):
        entry.columns["x"] = 5
    with pytest.raises(ValueError, match="64-bit"):
        ReplayEntry(-1, 4)


def test_differing_columns_are_named_in_order():
    one = {"ids": 1, "x": 2, "y": 3}
    assert differing_columns(one, dict(one)) == ()
    assert differing_columns(one, {"ids": 0, "x": 2, "y": 4}) == ("ids", "y")
    assert differing_columns(one, {"ids": 1, "x": 2, "z": 3}) == ("y", "z")
    assert differing_columns(one, {}) == differing_columns({}, one) == ()


# -- the cursor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "start", "position"),
    [((1, 2, 3), 0, 0), ((1, 2, 3), 2, 2), ((1, 2, 3), 3, 3), ((1, 2, 3), 9, 3), ((5, 10), 7, 1), ((), 0, 0)],
)
def test_a_cursor_starts_at_the_first_entry_after_the_state(steps, start, position):
    assert VerifyCursor(stream(steps), start).position == position


def test_check_never_moves_the_cursor():
    cursor = VerifyCursor(stream([1, 2]), 0)
    good, bad, ahead = ReplayFingerprint(1, 1001), ReplayFingerprint(1, 7), ReplayFingerprint(2, 1002)
    for _ in range(3):
        cursor.check(good)
        with pytest.raises(ReplayDivergence):
            cursor.check(bad)
        with pytest.raises(ReplayStepMismatch):
            cursor.check(ahead)
    assert cursor.position == 0
    cursor.advance()
    cursor.check(ahead)
    cursor.seek(0)
    cursor.check(good)


def test_the_texts_are_the_references():
    cursor = VerifyCursor((ReplayFingerprint(3, 1),), 2)
    with pytest.raises(ReplayDivergence) as divergence:
        cursor.check(ReplayFingerprint(3, 0x74F25F822D3AC07F))
    assert str(divergence.value) == golden_text("replay_divergence")
    with pytest.raises(ReplayStepMismatch) as mismatch:
        VerifyCursor(stream([2]), 0).check(ReplayFingerprint(1, 0))
    assert str(mismatch.value) == golden_text("replay_step_mismatch")
    with pytest.raises(ReplayExhausted) as exhausted:
        VerifyCursor(stream([1, 2, 3]), 3).check(ReplayFingerprint(4, 0))
    assert str(exhausted.value) == golden_text("replay_exhausted")
    assert {type(e.value).exit_code for e in (divergence, mismatch, exhausted)} == {4}


def test_a_divergence_names_the_columns_where_both_know_them():
    cursor = VerifyCursor((ReplayEntry(1, 5, "digest", {"ids": 1, "x": 2, "y": 3}),), 0)
    with pytest.raises(ReplayDivergence) as error:
        cursor.check(ReplayEntry(1, 6, "digest", {"ids": 1, "x": 9, "y": 4}))
    assert error.value.columns == ("x", "y")
    with pytest.raises(ReplayDivergence) as error:
        cursor.check(ReplayFingerprint(1, 6, "digest"), {"ids": 1, "x": 2, "y": 4})
    assert error.value.columns == ("y",)
    assert "columns: y" in error.value.details()
    with pytest.raises(ReplayDivergence) as error:
        cursor.check(ReplayFingerprint(1, 6, "digest"))
    assert error.value.columns == ()


def test_another_scheme_is_an_error_of_its_own():
    cursor = VerifyCursor(stream([1], "digest"), 0)
    with pytest.raises(SchemeMismatch) as error:
        cursor.check(ReplayFingerprint(1, 1001, "fnv1a"))
    assert not isinstance(error.value, ReplayDivergence)
    with pytest.raises(SchemeMismatch, match="digest fingerprint with a fnv1a one at step 1"):
        ReplayRecorder(ReplayMode.verify(stream([1], "digest")), "fnv1a", 0)


# -- the recorder --------------------------------------------------------------------------------------


def run(recorder, steps):
    for fingerprint in stream(steps):
        recorder.check(fingerprint)
        recorder.accept(fingerprint)


def test_off_is_off():
    recorder = ReplayRecorder(ReplayMode.off(), "fnv1a", 0)
    assert not recorder.is_due(1)
    assert recorder.recorded == ()


def test_recording_keeps_what_was_accepted():
    recorder = ReplayRecorder(ReplayMode.record(), "fnv1a", 0)
    run(recorder, [1, 2])
    recorder.check(ReplayFingerprint(3, 3))  # a step that failed after its check
    assert recorder.recorded == stream([1, 2])


def test_verifying_records_as_well_and_ends_with_its_stream():
    recorder = ReplayRecorder(ReplayMode.verify(stream([1, 2, 3])), "fnv1a", 0)
    run(recorder, [1, 2, 3])
    assert recorder.recorded == stream([1, 2, 3])
    with pytest.raises(ReplayExhausted):
        recorder.check(ReplayFingerprint(4, 1004))


def test_a_step_that_does_not_verify_can_be_tried_again():
    recorder = ReplayRecorder(ReplayMode.verify(stream([1, 2])), "fnv1a", 0)
    run(recorder, [1])
    with pytest.raises(ReplayDivergence):
        recorder.check(ReplayFingerprint(2, 0))
    assert recorder.recorded == stream([1])
    run(recorder, [2])


def test_a_restore_truncates_the_stream_and_moves_the_cursor():
    recorder = ReplayRecorder(ReplayMode.verify(stream(range(1, 7))), "fnv1a", 0)
    run(recorder, [1, 2, 3, 4])
    recorder.restored(2)
    assert recorder.recorded == stream([1, 2])
    run(recorder, [3, 4, 5])
    assert recorder.recorded == stream([1, 2, 3, 4, 5])
    recorder.restored(5)  # to where it stands: nothing to drop
    run(recorder, [6])
    recorder.restored(0)
    assert recorder.recorded == ()
    run(recorder, [1])


def test_forgetting_what_was_recorded_keeps_the_place():
    recorder = ReplayRecorder(ReplayMode.verify(stream([1, 2, 3])), "fnv1a", 0)
    run(recorder, [1, 2])
    recorder.forget()
    assert recorder.recorded == ()
    run(recorder, [3])
    assert recorder.recorded == stream([3])


def test_a_runtime_that_is_ahead_is_verified_from_there():
    recorder = ReplayRecorder(ReplayMode.verify(stream([1, 2, 3, 4])), "fnv1a", 2)
    run(recorder, [3, 4])
    assert recorder.recorded == stream([3, 4])


def test_an_interval_verifies_only_due_steps():
    recorder = ReplayRecorder(ReplayMode.verify(stream([3, 6]), 3), "fnv1a", 0)
    for step in range(1, 7):
        if recorder.is_due(step):
            run(recorder, [step])
    assert recorder.recorded == stream([3, 6])
