"""What killed runs leave behind is ignored, swept at the next start, and in nobody's way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import xxhash
from compare_runs import ROOT, command, make_run, write_job

import rustsim_hpc as rs
from rustsim_hpc.errors import RustsimError
from rustsim_hpc.run_folder.record import RECORD


def test_left_overs_of_a_kill_are_swept_when_the_run_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "--steps=4", "--checkpoint-every=2")
    checkpoints = folder / "checkpoints"
    kept = sorted(path.name for path in checkpoints.iterdir())
    for name in (".step_0000000006.h5.77.abcd.rustsim-tmp", "step_0000000006.proof.json"):
        (checkpoints / name).write_text("torn")
    shards = checkpoints / "step_0000000006.shards-0123abcd"
    shards.mkdir()
    (shards / "rank_00000.h5").write_text("torn")
    assert sorted(rs.open_run(folder).checkpoints()) == [2, 4]
    assert command("resume", folder, "--steps=5", "--no-progress")[0] == 0
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {*kept, "step_0000000005.h5", "step_0000000005.proof.json"}


def test_a_start_that_was_killed_before_its_job_file_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".job.toml.77.abcd.rustsim-tmp").write_text("[mod")
    (folder / ".lock").write_text('{"pid": 77, "host": "elsewhere", "token": "x"}')
    make_run(folder)
    assert not list(folder.glob(".job.toml*"))
    (folder / "notes.txt").write_text("mine")
    code, _, err = command("run", write_job(tmp_path), "--out", folder)
    assert code == 2
    assert "is not empty" in err


def test_checkpoints_that_do_not_hold_are_told_and_moved_aside_even_if_none_is_left(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "--steps=4", "--checkpoint-every=2")
    expected = rs.open_run(folder).fingerprint
    for path in rs.open_run(folder).checkpoints().values():
        path.write_bytes(path.read_bytes()[:-1])
    # A fork only reads its parent.
    code, _, err = command("fork", folder, "--set=params.dt=0.2", "--out", tmp_path / "fork")
    assert code == 5
    assert err.count("of the parent is damaged and was skipped") == 2
    assert sorted(rs.open_run(folder).checkpoints()) == [2, 4]
    code, _, err = command("resume", folder, "--steps=5", "--no-progress")
    assert code == 0, err
    assert err.count("is damaged and was moved aside (step_") == 2
    assert len(list((folder / "checkpoints").glob("*.h5.bad"))) == 2
    run = rs.open_run(folder)
    assert run.record["sessions"][-1]["resumed_from"] is None
    assert [entry.value for entry in run.replay().entries if entry.step_index == 4] == [expected]


def test_a_checkpoint_of_a_newer_format_is_refused_and_stays(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "--steps=4", "--checkpoint-every=2")
    proof = folder / "checkpoints" / "step_0000000004.proof.json"
    changed = proof.read_bytes()[46:].replace(b'"version": 1', b'"version": 2')
    proof.write_bytes(proof.read_bytes()[:14] + xxhash.xxh3_128_hexdigest(changed).encode() + changed)
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    code, _, err = command("resume", folder, "--steps=5", "--no-progress")
    assert code == 5
    assert "its format is version 2, this program reads 1" in err
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    assert command("resume", folder, "--steps=5", "--at=2", "--no-progress")[0] == 0


def test_a_stream_that_lacks_steps_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "--steps=4", "--checkpoint-every=2")
    log = folder / "replay.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:3], lines[4]]))
    code, _, err = command("resume", folder, "--steps=5", "--no-progress")
    assert code == 3
    assert "lacks step 3, but the run resumes at step 4" in err
    assert command("resume", folder, "--steps=5", "--at=2", "--no-progress")[0] == 0
    assert [entry.step_index for entry in rs.open_run(folder).replay().entries] == [1, 2, 3, 4, 5]


def test_a_run_that_was_taken_further_goes_on_to_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "--steps=4")
    assert command("resume", folder, "--steps=9", "--time-limit=0", "--no-progress")[0] == 75
    assert rs.open_run(folder).step_index < 9
    assert command("resume", folder, "--no-progress")[0] == 0
    assert rs.open_run(folder).step_index == 9


def test_a_fork_does_not_take_its_parents_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "--steps=4")
    code, _, err = command("fork", folder, "--out", tmp_path / "run" / "." / "checkpoints" / "..", "--force")
    assert code == 2
    assert "cannot take the folder of its parent" in err
    assert sorted(rs.open_run(folder).checkpoints()) == [4]


def test_a_step_that_an_output_lacks_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, whole, failed = ROOT / "drills" / "drill.toml", tmp_path / "whole", tmp_path / "failed"
    assert command("run", job, "--out", whole, "--no-progress")[0] == 0
    with monkeypatch.context() as patch:
        patch.setenv("DRILL_FAULT", "output:raise:8:0")
        code, _, err = command("run", job, "--out", failed, "--no-progress")
    assert code == 3
    assert 'output "curve.csv": cannot make its values: RuntimeError: no luck' in err
    # The series has reductions of the step itself, which a restored state cannot give.
    assert sorted(rs.open_run(failed).checkpoints()) == [3, 6]
    assert command("resume", failed, "--no-progress")[0] == 0
    for name in ("curve.csv", "replay.jsonl"):
        assert (failed / name).read_bytes() == (whole / name).read_bytes()


def _finished(folder: Path) -> Path:
    """Run the drills' job to step 6 in `folder`; return it."""
    job = ROOT / "drills" / "drill.toml"
    assert command("run", job, "--out", folder, "--no-progress", "--steps=6")[0] == 0
    return folder


def _read_everything(folder: Path) -> None:
    run = rs.open_run(folder)
    for read in (run.outputs, run.checkpoints, run.columns, run.replay, run.metrics, run.crashes):
        read()
    for name, kind in run.outputs().items():
        {"series": run.series, "arrays": run.arrays, "sample": run.samples}[kind](name)


def test_pipes_in_place_of_a_runs_files_are_told_and_not_waited_for(tmp_path: Path) -> None:
    whole, old = _finished(tmp_path / "whole"), "checkpoints/step_0000000003"
    names = [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()]
    assert {"job.toml", "run.json", "crowd.h5", "checkpoints/step_0000000006.proof.json"} <= {*names}
    for name in names:
        folder = tmp_path / "piped"
        shutil.copytree(whole, folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        if name not in (".lock", ".lock.ranks", f"{old}.h5", f"{old}.proof.json"):
            with pytest.raises(RustsimError):
                _read_everything(folder)
        for words in (("inspect", folder), ("diff", folder, whole), ("resume", folder, "--steps=7")):
            code, _, err = command(*words)
            assert code in (0, 2, 3, 5), (name, words, err)
            assert "--debug" not in err, (name, words, err)
        shutil.rmtree(folder)


@pytest.mark.parametrize("broken", ["replay.jsonl", "curve.csv", "checkpoints/step_0000000006.h5"])
def test_a_resume_that_fails_leaves_a_finished_runs_record_as_it_is(tmp_path: Path, broken: str) -> None:
    folder = _finished(tmp_path / "run")
    before = (folder / RECORD).read_bytes()
    content = (folder / broken).read_bytes()
    (folder / broken).write_bytes(b"not what it was\n")
    code, _, _ = command("resume", folder, "--steps=8", "--at=6", "--no-progress")
    assert code in (2, 3, 5)
    assert (folder / RECORD).read_bytes() == before
    (folder / broken).write_bytes(content)
    assert command("resume", folder, "--steps=8", "--no-progress")[0] == 0
    assert [session["status"] for session in rs.open_run(folder).record["sessions"]] == ["done", "done"]


def test_a_step_that_fails_leaves_a_finished_runs_record_until_one_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _finished(tmp_path / "run")
    before = (folder / RECORD).read_bytes()
    monkeypatch.setenv("DRILL_FAULT", "middle:raise:6:0")
    assert command("resume", folder, "--steps=9", "--no-progress")[0] == 3
    assert (folder / RECORD).read_bytes() == before
    monkeypatch.setenv("DRILL_FAULT", "middle:raise:7:0")
    assert command("resume", folder, "--steps=9", "--no-progress")[0] == 3
    run = rs.open_run(folder)
    assert (run.status, run.step_index) == ("failed", 7)


def test_what_only_has_the_name_of_a_checkpoint_is_moved_aside(tmp_path: Path) -> None:
    folder = _finished(tmp_path / "run")
    beyond = folder / "checkpoints" / "step_99999999999999999999.h5"
    beyond.write_text("no checkpoint")
    newest = folder / "checkpoints" / "step_0000000006.h5"
    newest.unlink()
    newest.mkdir()
    assert rs.open_run(folder).step_index == 6
    code, _, err = command("resume", folder, "--steps=8", "--no-progress")
    assert code == 0, err
    assert err.count("is damaged and was moved aside") == 2
    run = rs.open_run(folder)
    assert (run.step_index, run.record["sessions"][-1]["resumed_from"]) == (8, 3)
    assert not beyond.exists()
    assert newest.is_file()
