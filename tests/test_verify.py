"""`rustsim-hpc verify`: a job run again against a log; what ends it, what it says and what it leaves."""

import json
import shutil
from pathlib import Path

import pytest
from compare_runs import (
    MODEL,
    STEPS,
    command,
    drop_checkpoints,
    kinds,
    make_run,
    mpirun,
    needs_mpirun,
    report_of,
    write_job,
)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("clean") / "run", "--checkpoint-every=3")


def verify(folder: Path, log: Path, *options: object) -> tuple[int, str, str]:
    return command("verify", folder, "--against", log, "--no-progress", *options)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--executor=threads", "--workers=2", "--partitions=5"),
        ("--executor=processes", "--workers=2"),
        ("--guard=torn",),
    ],
)
def test_run_that_is_as_its_log(clean: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    run = shutil.copytree(clean, tmp_path / "run")
    before = content(run)
    code, out, err = verify(run, run / "replay.jsonl", "--json", *options)
    assert (code, err) == (0, "")
    line, last = out.splitlines()
    assert line == f"stray: 10 fingerprints up to step 10 equal to those of {run / 'replay.jsonl'}"
    facts = json.loads(last)
    assert facts["verified"] is True
    assert (facts["checked"], facts["steps"], facts["step_index"]) == (STEPS, STEPS, STEPS)
    assert (facts["fingerprint_scheme"], facts["checkpoints"], facts["outputs"]) == ("digest", [], {})
    recorded = json.loads((run / "run.json").read_text())
    assert facts["fingerprint"] == recorded["fingerprint"]
    assert content(run) == before


def test_a_run_is_checked_while_it_is_made(clean: Path, tmp_path: Path) -> None:
    log, job = clean / "replay.jsonl", write_job(tmp_path)
    same = ("--no-progress", "--verify", log, "--out")
    assert command("run", job, *same, tmp_path / "equal")[0] == 0
    code, _, err = command("run", job, "--seed=2", *same, tmp_path / "other")
    assert code == 4
    assert "replay diverged at step 1:" in err
    hint = f"hint: rustsim-hpc verify {tmp_path / 'other'} --against {log} finds phase and rows"
    assert hint in err.splitlines()
    code, out, _ = verify(tmp_path / "other", log)
    assert code == 4
    assert "other seed: " in out


@needs_mpirun
def test_under_ranks(clean: Path) -> None:
    code, out, err = mpirun(2, "verify", clean, "--against", clean / "replay.jsonl", "--json")
    assert code == 0, err
    facts = json.loads(out.splitlines()[-1])
    assert (facts["verified"], facts["ranks"], facts["checked"]) == (True, 2, STEPS)
    assert out.count("equal to those of") == 1


@pytest.mark.parametrize(("scheme", "interval"), [("fnv1a", 1), ("fnv1a", 4), ("digest", 3)])
def test_log_of_another_scheme_and_interval(clean: Path, tmp_path: Path, scheme: str, interval: int) -> None:
    other = make_run(tmp_path / "other", f"--fingerprint={scheme}", f"--set=replay.interval={interval}")
    code, out, _ = verify(clean, other, "--json")
    facts = json.loads(out.splitlines()[-1])
    assert (code, facts["checked"], facts["fingerprint_scheme"]) == (0, STEPS // interval, scheme)
    code, _, _ = verify(other, clean)
    assert code == 0


def test_interval_that_skips_the_whole_run(clean: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "--set=replay.interval=50")
    code, out, err = verify(clean, other)
    assert (code, out.split(" equal")[0]) == (0, "stray: 0 fingerprints up to step 10")
    assert "nothing was checked" in err


def test_log_that_ends_early(clean: Path, tmp_path: Path) -> None:
    log = tmp_path / "short.jsonl"
    lines = (clean / "replay.jsonl").read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:7]) + lines[7][:20])
    code, out, err = verify(clean, log, "--json")
    assert code == 4
    assert "replay has no expected fingerprint for step 7" in err
    assert "--steps 6" in err
    facts = json.loads(out)
    assert (facts["verified"], facts["checked"], facts["step_index"]) == (False, 6, 6)
    assert facts["error"] == "replay has no expected fingerprint for step 7"
    assert not (clean / "divergence.json").exists()
    code, out, _ = verify(clean, log, "--steps", 6)
    assert (code, out.split(" equal")[0]) == (0, "stray: 6 fingerprints up to step 6")


def test_log_that_cannot_be_read(clean: Path, tmp_path: Path) -> None:
    for content_, text in ((b"", "no complete header"), (b"{}\n", "not the header"), (b"\xff\n", "line 1")):
        log = tmp_path / "bad.jsonl"
        log.write_bytes(content_)
        code, _, err = verify(clean, log)
        assert (code, text in err) == (2, True), err
    code, _, err = verify(clean, tmp_path / "nowhere.jsonl")
    assert (code, "cannot read replay log" in err) == (2, True)
    (tmp_path / "folder").mkdir()
    code, _, err = verify(clean, tmp_path / "folder")
    assert (code, "has no replay.jsonl" in err) == (2, True)
    code, _, err = verify(tmp_path / "folder", clean)
    assert (code, "not the folder of a run" in err) == (2, True)


def test_divergence(clean: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "--seed=3", "--checkpoint-every=3")
    log = other / "replay.jsonl"
    run = shutil.copytree(clean, tmp_path / "run")
    before = content(run)
    code, out, err = verify(run, log, "--json")
    assert code == 4
    assert "warning: the log is of another run: other seed: 3 against 0" in err
    assert "Error: replay diverged at step 1: expected 0x" in err
    assert "columns: v" in err
    facts = json.loads(out.splitlines()[-1])
    assert (facts["verified"], facts["checked"], facts["step_index"]) == (False, 0, 0)
    assert facts["report"] == str(run / "divergence.json")
    report = report_of(run)
    assert facts["divergence"] == report
    assert (report["step"], report["phase"], report["columns"], kinds(report)) == (1, "kick", ["v"], ["seed"])
    assert (report["left"]["name"], report["right"]["name"]) == (str(log), f"{run}, run again")
    assert report["rows"][0]["rows"] == 1000
    assert content(run) == before | {facts["report"]: Path(facts["report"]).read_bytes()}
    code, _, _ = verify(run, log, "--out", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_log_without_its_folder(clean: Path, tmp_path: Path) -> None:
    """The log's own header tells how its run can be made again, where the model is the same."""
    other = make_run(tmp_path / "other", "--set=params.dt=0.3")
    log = tmp_path / "alone.jsonl"
    shutil.copy(other / "replay.jsonl", log)
    out = tmp_path / "report.json"
    assert verify(clean, log, "--out", out)[0] == 4
    report = json.loads(out.read_text())
    assert (report["step"], report["phase"], report["columns"]) == (2, "move", ["x"])
    assert (kinds(report), report["left"]["folder"]) == (["parameters"], None)
    assert report["rows"][0]["rows"] == 1000
    # Of a model that is not known there is nothing but the log.
    lines = log.read_text().splitlines(keepends=True)
    header = json.loads(lines[0]) | {"model": "0" * 64}
    log.write_text("".join([json.dumps(header) + "\n", *lines[1:]]))
    assert verify(clean, log, "--out", out)[0] == 4
    report = json.loads(out.read_text())
    assert (report["step"], report["phase"], report["columns"]) == (2, None, ["x"])
    assert "there is no run's folder beside the log" in report["notes"][0]


def test_run_that_does_not_repeat_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("STRAY_FAULT", "4 77")
        run = make_run(tmp_path / "run", "--checkpoint-every=3")
    code, out, _ = verify(run, run / "replay.jsonl")
    assert code == 4
    report = report_of(run)
    assert (report["step"], report["equal_at"], report["columns"], report["phase"]) == (5, 4, ["v"], None)
    assert kinds(report) == ["not reproduced"]
    assert "does not repeat its own record" in out
    assert report["rows_from"] == "the state of step 6"
    assert [rows["ranges"] for rows in report["rows"]] == [[[77, 78]], [[77, 78]]]


def test_phase_that_is_not_deterministic(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "--set=params.jitter=4", "--checkpoint-every=3")
    assert verify(run, run / "replay.jsonl")[0] == 4
    report = report_of(run)
    assert (report["step"], report["phase"], report["columns"]) == (5, "jitter", ["x"])
    assert report["causes"][0]["kind"] == "not deterministic"


def test_phase_that_reads_its_partition(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "--set=params.spread=true", "--partitions=2")
    assert verify(run, run / "replay.jsonl", "--partitions=2")[0] == 0
    assert verify(run, run / "replay.jsonl", "--partitions=3")[0] == 4
    report = report_of(run)
    assert (report["step"], report["phase"]) == (1, "spread")
    assert report["causes"][0]["kind"] == "reads other partitions"
    assert report["rows"][0]["ranges"][0][0] == 334  # where the second of three partitions begins


@needs_mpirun
def test_phase_that_reads_its_partition_under_ranks(tmp_path: Path) -> None:
    """Two ranks cannot repeat a run of one partition; the report says why it is another."""
    run = make_run(tmp_path / "run", "--set=params.spread=true", "--partitions=1")
    code, out, err = mpirun(2, "verify", run, "--against", run / "replay.jsonl")
    assert code == 4, err
    assert "depends on how the rows are cut into partitions (here 1 and 2 a rank)" in out
    assert kinds(report_of(run)) == ["reads other partitions", "not reproduced"]


def test_phase_that_may_read_its_partition_is_cut_as_it_was(tmp_path: Path) -> None:
    text = MODEL.read_text().replace('writes="n", row_local=True', 'writes="n"')
    model = tmp_path / "bound_model.py"
    model.write_text(text)
    options = ("--set=params.spread=true", "--executor=threads", "--workers=3")
    run = make_run(tmp_path / "run", *options, model=model)
    assert "partitions" not in (run / "job.toml").read_text()
    assert verify(run, run, "--executor=inline")[0] == 0
    code, out, _ = verify(run, run, "--executor=inline", "--partitions=2")
    assert (code, "depends on how the rows are cut" in out) == (4, True)


def test_log_of_another_population(clean: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "--agents=999")
    out = tmp_path / "report.json"
    assert verify(clean, other, "--out", out)[0] == 4
    assert kinds(json.loads(out.read_text())) == ["agents"]


def test_environment_that_is_another(clean: Path, tmp_path: Path) -> None:
    run = shutil.copytree(clean, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["versions"]["numba"] = "0.1"
    record["hosts"][0]["cpu"] = "Z80"
    record["hosts"][0]["libm"] = {"library": "abacus 1.0"}
    (run / "run.json").write_text(json.dumps(record))
    code, _, err = verify(run, run)
    assert code == 0
    warnings = err.splitlines()
    assert len(warnings) == 3
    assert warnings[0].startswith("warning: version of numba: 0.1 then, ")
    assert warnings[1].startswith("warning: CPU model: Z80 then, ")
    assert warnings[2].startswith("warning: math library: abacus 1.0 (unknown) then, ")


def test_fork(clean: Path, tmp_path: Path) -> None:
    fork = tmp_path / "fork"
    arguments = ("--at", 6, "--set", "params.dt=0.3", "--record", "--no-progress", "--out", fork)
    assert command("fork", clean, *arguments)[0] == 0
    code, out, _ = verify(fork, fork, "--json")
    facts = json.loads(out.splitlines()[-1])
    assert (code, facts["checked"], facts["steps"], facts["step_index"]) == (0, 4, 4, STEPS)
    drop_checkpoints(fork)  # then it begins with its parent's checkpoint
    assert verify(fork, fork)[0] == 0
    moved = shutil.move(clean / "checkpoints", tmp_path / "away")
    try:
        code, _, err = verify(fork, fork)
    finally:
        shutil.move(moved, clean / "checkpoints")
    assert (code, "the state of step 6" in err) == (5, True)


def test_run_that_was_resumed_to_a_later_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert command("resume", run, "--steps", 13, "--no-progress")[0] == 0
    code, out, _ = verify(run, run)
    assert (code, out.split(" equal")[0]) == (0, "stray: 13 fingerprints up to step 13")


def test_log_that_begins_later(clean: Path, tmp_path: Path) -> None:
    fork = tmp_path / "fork"
    assert command("fork", clean, "--at", 6, "--record", "--no-progress", "--out", fork)[0] == 0
    code, _, err = verify(clean, fork)
    assert code == 4
    assert "replay expected step 7 but runtime produced step 1" in err
    assert "the log begins with step 7" in err
