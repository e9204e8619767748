"""From "two runs differ" to step, phase, column and rows; and the causes that are recognised."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
from compare_runs import (
    AGENTS,
    STEPS,
    command,
    drill,
    drop_checkpoints,
    drop_log,
    kinds,
    make_run,
    mpirun,
    needs_mpirun,
    report_of,
)

from rustsim_hpc.divergence import replica
from rustsim_hpc.modeling.bound_model import BoundModel


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("clean") / "run", "--checkpoint-every=3")


def different(left: Path, right: Path, tmp_path: Path, *options: object) -> tuple[dict, str]:
    """Compare two runs that differ; return the report and its text."""
    out = tmp_path / "report.json"
    code, text, err = command("diff", left, right, "--out", out, *options)
    assert code == 4, text + err
    return json.loads(out.read_text()), text


# -- planted differences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(4))
def test_planted_difference_is_found_exactly(number: int, tmp_path: Path) -> None:
    flip, described, wrong = drill().trial(random.Random(f"tests {number}"), tmp_path)
    assert wrong == [], f"{flip} ({described})"


def test_flip_that_spreads_in_its_own_step(tmp_path: Path) -> None:
    """A flipped bit of `b` moves every row of `f` by way of the mean; the report names where it began."""
    module = drill()
    job = module.write_job(tmp_path)
    same = ["--agents=700", "--record", "--no-progress"]
    flip = module.Flip(step=4, place=1, row=321, bit=30)
    for name, options in (("a", []), ("b", flip.options())):
        assert command("run", job, *same, *options, "--out", tmp_path / name)[0] == 0
    report, text = different(tmp_path / "a", tmp_path / "b", tmp_path)
    assert report["columns"] == ["b", "f", "h"]
    assert (report["phase"], report["phase_index"]) == ("wander", 1)
    assert [rows["ranges"] for rows in report["rows"]] == [[[321, 322]]]
    # The table is the end of what is printed, values as they read back and as bits.
    head, row = text.splitlines()[-2:]
    assert head.split() == ["row", "id", "column", "left", "right", "left", "bits", "right", "bits"]
    shown = report["table"][0]
    assert row.split() == [
        "321",
        "321",
        "b",
        *(shown[k] for k in ("left", "right", "left_bits", "right_bits")),
    ]
    assert int(shown["left_bits"], 16) ^ int(shown["right_bits"], 16) == 1 << 30


CODED = """
import numpy as np
import rustsim_hpc as rs

@rs.row_kernel(writes="state")
def stay(state):
    return state

def initialise(rows, params, tables, seed):
    return {"state": np.where(np.arange(rows.start, rows.stop) == 3, seed, 0).astype(np.uint8)}

def model():
    codes = {0: "S", 1: "I"}
    return rs.Model(columns=[rs.Column("state", "uint8", codes=codes)], phases=[stay], initialise=initialise)
"""


@pytest.mark.parametrize("again", [True, False])
def test_codes_are_told_by_name(tmp_path: Path, again: bool) -> None:
    (tmp_path / "coded.py").write_text(CODED)
    job = tmp_path / "coded.toml"
    job.write_text('[model]\nmodule = "coded.py"\n[run]\nagents = 9\nsteps = 2\n')
    for name in ("1", "2"):
        assert command("run", job, "--seed", name, "--no-progress", "--out", tmp_path / name)[0] == 0
    if not again:  # the rows then come from checkpoints
        (tmp_path / "coded.py").write_text(CODED + "changed = 1")
    report, text = different(tmp_path / "1", tmp_path / "2", tmp_path)
    assert text.splitlines()[-1].split() == ["3", "3", "state", "1", "(I)", "2", "0x01", "0x02"]
    [row] = report["table"]
    assert (row["left"], row["left_name"], row["right"]) == ("1", "I", "2")
    assert "right_name" not in row


def test_difference_in_a_derived_value(tmp_path: Path) -> None:
    """Other parameters show first in a derived value: it is named with its values, then the rows it moves."""
    job = drill().write_job(tmp_path)
    for name, size in (("a", 1000.0), ("b", 999.0)):
        options = ("--agents=50", "--record", "--no-progress", f"--set=params.size={size}")
        assert command("run", job, *options, "--out", tmp_path / name)[0] == 0
    report, _ = different(tmp_path / "a", tmp_path / "b", tmp_path)
    assert (report["step"], report["phase"]) == (1, "mean")
    [value] = report["values"]
    assert value["name"] == "mean"
    assert float(value["left"]) * 1000.0 == pytest.approx(float(value["right"]) * 999.0)
    assert report["rows_from"] == "phase pull"
    assert report["rows"] == [{"column": "f", "ranges": [[0, 50]], "rows": 50, "exact": True}]
    assert report["causes"] == [{"kind": "parameters", "text": "other parameter size: 1000.0 against 999.0"}]


@needs_mpirun
def test_planted_difference_under_ranks(tmp_path: Path) -> None:
    module = drill()
    job = module.write_job(tmp_path)
    flip = module.Flip(step=5, place=0, row=3500, bit=17)
    same = ["--agents=5000", "--record", "--no-progress", "--checkpoint-every=4"]
    assert command("run", job, *same, "--out", tmp_path / "a")[0] == 0
    assert mpirun(2, "run", job, *same, *flip.options(), "--out", tmp_path / "b")[0] == 0
    code, out, err = mpirun(2, "diff", tmp_path / "a", tmp_path / "b", "--json")
    assert code == 4, err
    assert module.problems_of(tmp_path / "a" / "divergence.json", flip) == []
    assert json.loads(out.splitlines()[-1]) == report_of(tmp_path / "a")
    assert out.count("the runs differ") == 1
    code, out, err = mpirun(2, "verify", tmp_path / "b", "--against", tmp_path / "a" / "replay.jsonl")
    assert code == 4
    assert err.count("Error: replay diverged at step 6") == 1
    assert module.problems_of(tmp_path / "b" / "divergence.json", flip) == []


# -- equal runs ------------------------------------------------------------------------------------------


def test_equal_runs(clean: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "--executor=threads", "--workers=2", "--partitions=7")
    code, out, _ = command("diff", clean, other)
    assert (code, out) == (0, f"{clean} and {other} are equal up to step {STEPS}\n")
    assert not (clean / "divergence.json").exists()
    code, out, _ = command("diff", clean, other, "--json", "--out", tmp_path / "report.json")
    assert code == 0
    report = json.loads(out.splitlines()[-1])
    assert (report["equal"], report["step"], report["compared_to"]) == (True, None, STEPS)
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_equal_as_far_as_both_go(clean: Path, tmp_path: Path) -> None:
    longer = make_run(tmp_path / "longer", "--steps=14", "--set=replay.interval=4")
    assert command("diff", clean, longer)[:2] == (0, f"{clean} and {longer} are equal up to step {STEPS}\n")


def test_runs_without_logs_are_run_again(clean: Path, tmp_path: Path) -> None:
    longer = make_run(tmp_path / "longer", "--steps=14")
    drop_log(longer)
    code, out, err = command("diff", clean, longer)
    assert (code, out) == (0, f"{clean} and {longer} are equal up to step {STEPS}\n")
    assert "running both again" in err


# -- where it starts from --------------------------------------------------------------------------------


def faulty(folder: Path, monkeypatch: pytest.MonkeyPatch, step: int, row: int, *options: object) -> Path:
    """Make a run in which the machine flips a bit of `v`."""
    with monkeypatch.context() as patch:
        patch.setenv("STRAY_FAULT", f"{step} {row}")
        return make_run(folder, *options)


@pytest.mark.parametrize("kept", ["before", "after", "none", "damaged"])
@pytest.mark.parametrize("logs", [True, False])
def test_with_and_without_checkpoints(
    clean: Path, tmp_path: Path, kept: str, logs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = shutil.copytree(clean, tmp_path / "left")
    right = make_run(
        tmp_path / "right", "--checkpoint-every=3", "--set=params.dt=0.2", "--set=params.start=0.0"
    )
    for run in (left, right):
        if kept == "before":
            drop_checkpoints(run, after=1)
        elif kept == "after":
            drop_checkpoints(run, before=9)
        elif kept == "none":
            drop_checkpoints(run)
        else:
            for path in (run / "checkpoints").glob("*.h5"):
                path.write_bytes(path.read_bytes()[:-1] + b"?")
        if not logs:
            drop_log(run)
    before = sorted(path.name for path in (left / "checkpoints").iterdir())
    report, _ = different(left, right, tmp_path)
    # v is 0 at first, so that the first step moves nothing.
    assert (report["step"], report["equal_at"], report["phase"]) == (2, 1, "move")
    assert report["rows"][0]["column"] == "x"
    assert report["rows"][0]["rows"] == AGENTS
    assert sorted(path.name for path in (left / "checkpoints").iterdir()) == before


def test_one_side_at_a_time_where_memory_is_short(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = make_run(tmp_path / "right", "--set=params.dt=0.2")
    drop_log(right)
    alive = []
    close = replica.Replica.close
    start = replica.Replica.__init__

    def count(self: replica.Replica, *rest: object) -> None:
        alive.append(self)
        start(self, *rest)  # type: ignore[arg-type]
        assert len(alive) == 1

    def forget(self: replica.Replica) -> None:
        alive.remove(self)
        close(self)

    monkeypatch.setattr(replica.Replica, "__init__", count)
    monkeypatch.setattr(replica.Replica, "close", forget)
    needs = AGENTS * 20 * 2
    monkeypatch.setattr(replica, "available_memory", lambda: needs + 1000)
    report, _ = different(clean, right, tmp_path)
    assert (report["step"], report["phase"], report["rows"][0]["rows"]) == (2, "move", AGENTS)
    assert alive == []
    monkeypatch.setattr(replica, "available_memory", lambda: needs - 1)
    report, _ = different(clean, right, tmp_path)
    assert (report["step"], report["phase"]) == (10, None)
    assert "not followed further: running it again needs 39.1 KiB a rank" in report["notes"][0]
    assert report["rows_from"] == "the state of step 10"


# -- causes ----------------------------------------------------------------------------------------------


def test_other_seed(clean: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "--seed=8")
    report, text = different(clean, other, tmp_path)
    assert (report["step"], report["phase"], report["columns"]) == (1, "kick", ["v"])
    assert report["causes"] == [{"kind": "seed", "text": "other seed: 0 against 8"}]
    assert "other seed: 0 against 8" in text
    assert (report["left"]["seed"], report["right"]["seed"]) == (0, 8)


def test_other_first_state(clean: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "--set=params.start=0.5")
    report, text = different(clean, other, tmp_path)
    assert (report["step"], report["equal_at"], report["phase"]) == (0, None, "initialise")
    assert report["rows"] == [{"column": "x", "ranges": [[0, AGENTS]], "rows": AGENTS, "exact": True}]
    assert "from their first state on" in text


def test_other_population(clean: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "--agents=999")
    report, _ = different(clean, other, tmp_path)
    assert kinds(report) == ["agents"]
    assert report["step"] == 0


def changed_model(folder: Path, *changes: tuple[str, str]) -> Path:
    text = Path(__file__).with_name("stray_model.py").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(exist_ok=True)
    path = folder / "stray_model.py"
    path.write_text(text)
    return path


def test_other_source(clean: Path, tmp_path: Path) -> None:
    model = changed_model(
        tmp_path / "model", ('columns["n"][0] if', 'columns["n"][1] if'), ("else 1", "else 2")
    )
    other = make_run(tmp_path / "other", model=model)
    report, _ = different(clean, other, tmp_path)
    assert (report["step"], report["phase"], report["columns"]) == (1, "spread", ["n"])
    assert kinds(report) == ["model"]
    assert "other source" in report["causes"][0]["text"]


def test_other_phases(clean: Path, tmp_path: Path) -> None:
    model = changed_model(tmp_path / "model", ("[move, jitter, spread, kick]", "[move, spread, kick]"))
    other = make_run(tmp_path / "other", model=model)
    code, out, _ = command("diff", clean, other)
    assert (code, "equal up to step 10" in out) == (0, True)
    model = changed_model(tmp_path / "model2", ("[move, jitter, spread, kick]", "[move, kick]"))
    report, _ = different(clean, make_run(tmp_path / "fewer", model=model), tmp_path)
    assert (report["step"], report["phase"], report["columns"]) == (1, None, ["n"])
    assert any("phases part at number 2: jitter against kick" in note for note in report["notes"])
    assert report["rows_from"] == "the state of step 1"
    assert report["rows"][0]["column"] == "n"


def test_other_columns(clean: Path, tmp_path: Path) -> None:
    model = changed_model(
        tmp_path / "model",
        ('rs.Column("n", "int32")', 'rs.Column("n", "int64")'),
        ("astype(np.int32)", "astype(np.int64)"),
    )
    other = make_run(tmp_path / "other", model=model)
    report, _ = different(clean, other, tmp_path)
    assert {"dtype", "model"} <= set(kinds(report))
    assert (report["step"], report["columns"]) == (0, ["n"])
    slower = make_run(tmp_path / "slower", "--set=params.dt=0.2", model=model)
    report, _ = different(clean, slower, tmp_path)
    assert (report["step"], report["phase"], report["columns"]) == (2, "move", ["x"])


def test_model_that_changed_since(tmp_path: Path) -> None:
    model = changed_model(tmp_path / "model")
    left = make_run(tmp_path / "left", model=model)
    changed_model(tmp_path / "model", ("else 1", "else 2"))
    forget_module(model)
    right = make_run(tmp_path / "right", model=model)
    report, _ = different(left, right, tmp_path)
    assert report["columns"] == ["n"]
    assert {"changed model", "not reproduced", "model"} <= set(kinds(report))
    assert "changed between the two runs" in next(c["text"] for c in report["causes"] if c["kind"] == "model")
    assert (report["left"]["reproduces"], report["right"]["reproduces"]) == (False, True)


def forget_module(path: Path) -> None:
    """Let a changed model be imported anew, as another process would."""
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) == str(path):
            del sys.modules[name]


def test_environment(clean: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "--seed=8")
    record = json.loads((other / "run.json").read_text())
    record["versions"]["numpy"] = "1.0"
    record["hosts"][0]["cpu"] = "Z80"
    (other / "run.json").write_text(json.dumps(record))
    report, _ = different(clean, other, tmp_path)
    assert kinds(report) == ["seed", "environment", "environment"]
    texts = [cause["text"] for cause in report["causes"]]
    assert texts[1].startswith("other version of numpy: ")
    assert texts[1].endswith("against 1.0")
    assert texts[2].endswith("against Z80")


def test_phase_that_is_not_deterministic(tmp_path: Path) -> None:
    left, right = (
        make_run(tmp_path / name, "--set=params.jitter=4", "--checkpoint-every=3")
        for name in ("left", "right")
    )
    report, _ = different(left, right, tmp_path)
    assert (report["step"], report["phase"], report["columns"]) == (5, "jitter", ["x"])
    assert report["causes"][0]["kind"] == "not deterministic"
    assert "phase jitter is not deterministic" in report["causes"][0]["text"]
    assert report["rows_from"] == "the state of step 6"


def test_first_state_that_is_not_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for number in (1, 2):
        monkeypatch.setenv("STRAY_START", str(number))
        runs.append(make_run(tmp_path / f"run{number}", "--set=params.start=9"))
    calls = iter(range(100))
    new_store = BoundModel.new_store

    def unsteady(self: BoundModel, *rest: object) -> object:
        monkeypatch.setenv("STRAY_START", str(next(calls)))
        return new_store(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(BoundModel, "new_store", unsteady)
    drop_checkpoints(runs[0])
    drop_checkpoints(runs[1])
    report, _ = different(runs[0], runs[1], tmp_path)
    assert (report["step"], report["phase"], kinds(report)) == (0, "initialise", ["not deterministic"])


def test_phase_that_reads_its_partition(tmp_path: Path) -> None:
    left, right = (
        make_run(tmp_path / f"p{count}", "--set=params.spread=true", f"--partitions={count}")
        for count in (1, 2)
    )
    report, _ = different(left, right, tmp_path)
    assert (report["step"], report["phase"], report["columns"]) == (1, "spread", ["n"])
    assert report["causes"][0]["kind"] == "reads other partitions"
    assert "phase spread depends on how the rows are cut into partitions" in report["causes"][0]["text"]
    assert report["rows"] == [
        {"column": "n", "ranges": [[AGENTS // 2, AGENTS]], "rows": AGENTS // 2, "exact": True}
    ]


@pytest.mark.parametrize("swap", [False, True])
def test_fault_of_the_machine(
    clean: Path, tmp_path: Path, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that does not repeat what it recorded: step and columns from the logs, rows from a checkpoint."""
    bad = faulty(tmp_path / "bad", monkeypatch, 4, 77, "--checkpoint-every=3")
    left, right = (bad, clean) if swap else (clean, bad)
    report, _ = different(left, right, tmp_path)
    assert (report["step"], report["equal_at"], report["columns"], report["phase"]) == (5, 4, ["v"], None)
    assert kinds(report) == ["not reproduced"]
    assert str(bad) in report["causes"][0]["text"]
    assert "transient fault" in report["causes"][0]["text"]
    assert report["rows_from"] == "the state of step 6"
    assert [(rows["column"], rows["ranges"]) for rows in report["rows"]] == [
        ("x", [[77, 78]]),
        ("v", [[77, 78]]),
    ]
    # The clean side's state is made anew where it has no checkpoint of that step.
    drop_checkpoints(shutil.copytree(clean, tmp_path / "bare"), after=3)
    report, _ = different(tmp_path / "bare", bad, tmp_path)
    assert (report["rows_from"], report["rows"][0]["ranges"]) == ("the state of step 6", [[77, 78]])
    assert report["table"][0]["row"] == 77
    # A nearer checkpoint of the clean side is of no use: the bad side's state does not come back.
    near = make_run(tmp_path / "near", "--checkpoint-every=5")
    report, _ = different(near, bad, tmp_path)
    assert (report["rows_from"], report["rows"][0]["ranges"]) == ("the state of step 6", [[77, 78]])


def test_fault_without_a_later_checkpoint(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = faulty(tmp_path / "bad", monkeypatch, 4, 77)
    drop_checkpoints(bad)
    report, _ = different(shutil.copytree(clean, tmp_path / "bare"), bad, tmp_path)
    # The clean side's own next checkpoint has nothing to be compared with.
    assert (report["step"], report["columns"], kinds(report)) == (5, ["v"], ["not reproduced"])
    assert report["rows"] == []
    assert any("no later checkpoint" in note for note in report["notes"])


# -- forks, and what cannot be compared -----------------------------------------------------------------


def test_fork_and_its_parent(clean: Path, tmp_path: Path) -> None:
    fork = tmp_path / "fork"
    arguments = ("--at", 6, "--set", "params.dt=0.3", "--record", "--no-progress", "--out", fork)
    assert command("fork", clean, *arguments)[0] == 0
    report, _ = different(clean, fork, tmp_path)
    assert (report["step"], report["equal_at"], report["phase"]) == (7, 6, "move")
    assert kinds(report) == ["parameters"]
    # Without its own first state the fork starts from its parent's.
    drop_checkpoints(fork)
    report, _ = different(clean, fork, tmp_path)
    assert (report["step"], report["equal_at"], report["phase"]) == (7, 6, "move")


def test_model_that_is_gone(tmp_path: Path) -> None:
    model = changed_model(tmp_path / "model")
    left = make_run(tmp_path / "left", "--checkpoint-every=3", model=model)
    right = make_run(tmp_path / "right", "--checkpoint-every=3", "--seed=5", model=model)
    model.unlink()
    report, _ = different(left, right, tmp_path)
    assert (report["step"], report["columns"], report["phase"]) == (1, ["v"], None)
    assert report["rows_from"] == "the state of step 3"
    assert any("cannot be run again" in note for note in report["notes"])
    drop_log(left)
    drop_checkpoints(left)
    report, _ = different(left, right, tmp_path)
    assert (report["step"], report["columns"]) == (STEPS, [])  # the final fingerprints are all there is
    drop_checkpoints(right)
    drop_log(right)
    record = json.loads((right / "run.json").read_text())
    (right / "run.json").write_text(json.dumps(record | {"fingerprint": None}))
    code, _, err = command("diff", left, right)
    assert code == 2
    assert "it is unknown whether" in err


def test_what_is_no_run(clean: Path, tmp_path: Path) -> None:
    code, _, err = command("diff", clean, tmp_path / "nowhere")
    assert code == 2
    assert "is not a run's folder" in err
    damaged = shutil.copytree(clean, tmp_path / "damaged")
    record = json.loads((damaged / "run.json").read_text())
    (damaged / "run.json").write_text(json.dumps(record | {"lineage": {"parent": 7}, "agents": "many"}))
    code, _, err = command("diff", clean, damaged)
    assert code == 2
    assert "is damaged: agents" in err


def test_report_that_cannot_be_written(clean: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "--seed=8")
    code, out, err = command("diff", clean, other, "--out", tmp_path / "nowhere" / "report.json")
    assert code == 4
    assert "warning: cannot write" in err
    assert "first in phase kick" in out
