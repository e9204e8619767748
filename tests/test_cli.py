"""The command line: what it hands to the engine, exit codes, and what goes to which stream."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

from rustsim_hpc.cli import main as cli
from rustsim_hpc.errors import (
    CheckpointFileError,
    JobError,
    PartitionExecution,
    ReplayDivergence,
    RustsimError,
)
from rustsim_hpc.job.keys import JobSpec
from rustsim_hpc.job.options import OPTION_KEYS
from rustsim_hpc.job.spec import RunOptions
from rustsim_hpc.job.summary import RunSummary
from rustsim_hpc.state.partition import PartitionId

Result = tuple[int, str, str]
Call = Callable[..., Result]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "flock.py").write_text("def model(): ...\n")
    path = tmp_path / "flock.toml"
    path.write_text('[model]\nmodule = "flock.py"\n[run]\nagents = 10\nsteps = 5\n')
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Return a function that runs a command line in this process: (exit code, stdout, stderr)."""
    for name in ("PMI_RANK", "PMI_SIZE", "RUSTSIM_BACKEND"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, printed.out, printed.err

    return run


class Engine(ModuleType):
    """Stands for `rustsim_hpc.job.launch`: keeps what it is called with, and ends as it is told to."""

    def __init__(self) -> None:
        super().__init__("rustsim_hpc.job.launch")
        self.calls: list[tuple[Any, ...]] = []
        self.failure: BaseException | None = None
        self.stopped: str | None = None

    def _end(self, *call: Any) -> RunSummary:
        self.calls.append(call)
        if self.failure is not None:
            raise self.failure
        return summary(self.stopped)

    def run_job(self, spec: JobSpec, options: RunOptions, team: Any) -> RunSummary:
        return self._end("run", spec, options, team.size)

    def resume_run(
        self, folder: Path, spec: JobSpec, options: RunOptions, team: Any, *, at: int | None
    ) -> RunSummary:
        return self._end("resume", folder, spec, at)

    def fork_run(
        self, folder: Path, spec: JobSpec, options: RunOptions, team: Any, *, at: int | None
    ) -> RunSummary:
        return self._end("fork", folder, spec, at)


def summary(stopped: str | None = None) -> RunSummary:
    return RunSummary(
        job="flock",
        folder=Path("runs/flock"),
        steps=5,
        step_index=5,
        agents=10,
        ranks=1,
        executor="inline",
        workers=1,
        partitions=1,
        fingerprint=0xAB,
        fingerprint_scheme="digest",
        seconds=0.5,
        checkpoints=(Path("runs/flock/checkpoints/step_0000000005.h5"),),
        outputs={"curve.csv": Path("runs/flock/curve.csv")},
        stopped=stopped,
    )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setitem(sys.modules, "rustsim_hpc.job.launch", made)
    return made


def test_run_hands_over_the_job(call: Call, engine: Engine, job: Path) -> None:
    code, out, err = call("run", job)
    assert code == 0
    assert err == ""
    assert "0x00000000000000ab" in out
    [(_, spec, options, ranks)] = engine.calls
    assert spec.run.agents == 10
    assert options == RunOptions()
    assert ranks == 1


def test_every_option_sets_its_key(
    call: Call, engine: Engine, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(job.parent)
    given = {
        "--agents": "20",
        "--steps": "7",
        "--seed": "9",
        "--executor": "threads",
        "--workers": "2",
        "--partitions": "3",
        "--guard": "torn",
        "--backend": "cpu",
        "--check": None,
        "--time-limit": "90",
        "--record": None,
        "--verify": "log.jsonl",
        "--fingerprint": "fnv1a",
        "--checkpoint-every": "4",
        "--out": "out",
        "--force": None,
        "--no-progress": None,
        "--profile": None,
        "--json": None,
        "--endpoint": "tcp://127.0.0.1:5555",
        "--keys": "keys",
    }
    assert {*given, "--dry-run"} == set(OPTION_KEYS)
    words = [word for pair in given.items() for word in pair if word is not None]
    code, _, err = call(
        "run", "flock.toml", *words, "--set", "params.dt=0.1", "--set", "checkpoint.keep=9", "--debug"
    )
    assert (code, err) == (0, "")
    [(_, spec, options, _)] = engine.calls
    run = spec.run
    assert (run.agents, run.steps, run.seed) == (20, 7, 9)
    assert (run.executor, run.workers, run.partitions) == ("threads", 2, 3)
    assert (run.guard, run.backend, run.check, run.time_limit) == ("torn", "cpu", True, 90.0)
    assert (spec.replay.mode, spec.replay.fingerprint) == ("record", "fnv1a")
    assert spec.replay.verify == str(job.parent / "log.jsonl")
    assert (spec.checkpoint.every, spec.checkpoint.keep) == (4, 9)
    assert spec.params == {"dt": 0.1}
    assert (spec.remote.endpoints, spec.remote.keys) == (["tcp://127.0.0.1:5555"], str(job.parent / "keys"))
    assert options == RunOptions(
        out=job.parent / "out", force=True, dry_run=False, progress=False, profile=True, json=True, debug=True
    )


def test_json_is_the_last_line(call: Call, engine: Engine, job: Path) -> None:
    code, out, _ = call("run", job, "--json")
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    assert found == summary().to_dict()
    assert set(found) >= {
        "job", "steps", "step_index", "agents", "ranks", "executor", "workers", "partitions", "fingerprint",
        "fingerprint_scheme", "seconds", "agent_steps_per_second", "checkpoints", "resumed_from", "outputs",
    }  # fmt: skip
    assert (found["fingerprint"], found["agent_steps_per_second"]) == ("0x00000000000000ab", 100.0)


def test_stopped_run_ends_with_75(call: Call, engine: Engine, job: Path) -> None:
    engine.stopped = "SIGINT"
    code, out, _ = call("run", job)
    assert code == 75
    assert "rustsim-hpc resume runs/flock" in out


def test_resume_reads_the_folder(call: Call, engine: Engine, job: Path) -> None:
    folder = job.parent / "run"
    folder.mkdir()
    (folder / "job.toml").write_text(job.read_text().replace("flock.py", str(job.parent / "flock.py")))
    assert call("resume", folder, "--steps", 9, "--partitions", 3)[0] == 0
    assert call("fork", folder, "--at", 3, "--set", "params.dt=2.0")[0] == 0
    [(_, given, spec, at), (name, again, changed, step)] = engine.calls
    assert (given, at) == (folder, None)
    assert (spec.run.steps, spec.run.partitions) == (9, 3)
    assert (name, again, changed.params, step) == ("fork", folder, {"dt": 2.0}, 3)
    code, _, err = call("resume", job.parent)
    assert code == 2
    assert "no job.toml" in err


FAILURES: list[tuple[RustsimError, int]] = [
    (JobError("no"), 2),
    (PartitionExecution(PartitionId(1), "move", "no luck", rank=2, step=7), 3),
    (ReplayDivergence(3, 1, 2), 4),
    (CheckpointFileError("torn"), 5),
]


@pytest.mark.parametrize(("failure", "code"), FAILURES)
def test_error_is_a_message_and_a_code(
    call: Call, engine: Engine, job: Path, failure: RustsimError, code: int
) -> None:
    engine.failure = failure
    found, out, err = call("run", job)
    assert found == code
    assert out == ""
    assert err == "\n".join([f"Error: {failure}", *failure.details().splitlines()]) + "\n"


def test_same_error_of_other_ranks_is_told_once(call: Call, engine: Engine, job: Path) -> None:
    engine.failure = JobError("no", rank=0, others=(JobError("no"), JobError("never")))
    assert call("run", job)[2].splitlines() == ["Error: no", "rank: 0", "also failed: never"]


def test_traceback_only_with_debug(call: Call, engine: Engine, job: Path) -> None:
    engine.failure = ZeroDivisionError("by zero")
    code, _, err = call("run", job)
    assert code == 3
    assert err.startswith("Error: ZeroDivisionError: by zero\n")
    assert "Traceback" not in err
    engine.failure = JobError("no")
    assert "Traceback" in call("run", job, "--debug")[2]


def test_an_interrupt_where_nothing_is_to_be_saved_gives_130(call: Call, engine: Engine, job: Path) -> None:
    engine.failure = KeyboardInterrupt()
    assert call("run", job)[0] == 130


@pytest.mark.parametrize("module", ["click", "pydantic", "h5py"])
def test_an_interrupt_while_something_is_imported_gives_130_and_no_traceback(
    tmp_path: Path, job: Path, module: str
) -> None:
    # As with a Ctrl-C at that moment; what could swallow a KeyboardInterrupt stands around it.
    text = "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\n"
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / f"{module}.py").write_text(text)
    (tmp_path / "flock.py").write_text("import h5py\ndef model(): ...\n")
    code = "import sys; from rustsim_hpc.__main__ import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(job)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'shadow'}{os.pathsep}{Path(__file__).parents[1]}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_command_answers_an_interrupt_before_it_imports_anything() -> None:
    code = (
        "import sys; before = set(sys.modules); import rustsim_hpc.__main__; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["__future__", "rustsim_hpc", "rustsim_hpc.__main__", "rustsim_hpc.version"]


def test_mistakes_end_with_2(call: Call, engine: Engine, job: Path) -> None:
    for words, said in [
        (["run", job, "--agnets", "3"], "No such option"),
        (["run"], "Missing argument"),
        (["rn", job], "No such command"),
        (["run", job, "--agents", "many"], "not a valid integer"),
        (["run", job, "--agents", "-3"], "--agents: must be an integer ≥ 0, not -3"),
        (["run", job, "--set", "run.agnets=3"], 'did you mean "agents"?'),
        (["run", job.with_name("none.toml")], "No such file"),
    ]:
        code, out, err = call(*words)
        assert code == 2
        assert out == ""
        assert said in err
    assert engine.calls == []


def test_only_rank_0_speaks(call: Call, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "1")
    assert call("run", job, "--agnets", "3") == (2, "", "")


def test_rank_that_fails_alone_ends_all(
    capsys: pytest.CaptureFixture[str], engine: Engine, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Aborted(BaseException):
        pass

    class TwoRanks:
        rank, size = 1, 2

        def sum_int64(self, array: Any) -> Any:
            return array

        def abort(self, code: int, message: str) -> NoReturn:
            raise Aborted(code, message)

    monkeypatch.setattr("rustsim_hpc.ranks.team.open_team", TwoRanks)
    engine.failure = ZeroDivisionError("by zero")
    with pytest.raises(Aborted) as stop:
        cli.main(["run", str(job)])
    assert stop.value.args == (3, "rank 1: ZeroDivisionError: by zero")


def test_doctor_gives_each_section_as_json(call: Call) -> None:
    code, out, _ = call("doctor", "--json")
    assert code == 0
    report = json.loads(out)
    sections = (
        "python",
        "packages",
        "machine",
        "disk",
        "mpi",
        "remote workers",
        "hdf5",
        "numba",
        "gpu",
        "problems",
    )
    assert tuple(report) == sections
    assert "rustsim-hpc" in call("doctor")[1]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    root = Path(cli.__file__).parents[2]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, timeout=60, env=environ
    )


def children_seconds() -> float:
    """Return the CPU time of finished children: wall time would grow when the machine is busy."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_teaches() -> None:
    seconds = []
    for _ in range(3):
        start = children_seconds()
        done = command("-m", "rustsim_hpc", "--help")
        seconds.append(children_seconds() - start)
        assert done.returncode == 0
    assert "rustsim-hpc run jobs/us_flights.toml" in done.stdout
    assert "75  stopped" in done.stdout
    assert min(seconds) < 0.5
    assert "--checkpoint-every K" in command("-m", "rustsim_hpc", "run", "--help").stdout


IMPORT_PROBE = """
import sys, time
import numpy
start = time.process_time()
import rustsim_hpc
print(time.process_time() - start)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_import_is_quick_and_starts_nothing() -> None:
    seconds = []
    for _ in range(3):
        done = command("-c", IMPORT_PROBE)
        assert done.returncode == 0, done.stderr
        took, loaded = done.stdout.splitlines()
        seconds.append(float(took))
    assert min(seconds) < 0.2
    heavy = {"numba", "llvmlite", "h5py", "mpi4py", "pydantic", "matplotlib", "cupy", "tqdm", "click"}
    assert heavy & set(loaded.split()) == set()


def test_closed_pipe_is_no_error() -> None:
    root = Path(cli.__file__).parents[2]
    line = f"cd {root} && {sys.executable} -m rustsim_hpc doctor | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
