"""Job files: keys, types, bounds, defaults, overrides, and the one line that each mistake gets."""

import pickle
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rustsim_hpc.errors import JobError
from rustsim_hpc.job.keys import CommandTable, JobSpec, job_tables, parse_duration
from rustsim_hpc.job.spec import Override, RunOptions, read_job, resolve_job

MINIMAL = """\
[model]
module = "flock.py"
[run]
agents = 10
steps = 5
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "flock.py").write_text("def model(): ...\n")
    path = tmp_path / "flock.toml"
    path.write_text(MINIMAL)
    return path


def mistake(path: Path, text: str, *sets: Override, environ: dict[str, str] | None = None) -> str:
    """Return the error text of a job file, which must be one line."""
    path.write_text(text)
    with pytest.raises(JobError) as caught:
        read_job(path, sets, environ=environ or {})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_job_file_leaves_out_has_its_default(job: Path) -> None:
    spec, options = read_job(job, environ={})
    assert spec.run.name == "flock"
    assert (spec.run.agents, spec.run.steps, spec.run.seed) == (10, 5, 0)
    assert (spec.run.executor, spec.run.workers, spec.run.partitions) == ("inline", None, None)
    assert (spec.run.guard, spec.run.backend, spec.run.memory, spec.run.check) == (
        "rollback",
        "auto",
        "auto",
        False,
    )
    assert (spec.replay.mode, spec.replay.fingerprint, spec.replay.verify) == ("off", "digest", None)
    assert (spec.checkpoint.every, spec.checkpoint.keep, spec.checkpoint.on_error) == (0, 3, "stop")
    assert spec.params == {}
    assert options == RunOptions()


def test_every_key_is_read(job: Path, tmp_path: Path) -> None:
    text = """
        [model]
        module = "flock.py"
        [params]
        dt = 0.5
        n = 3
        airport = "JFK"
        on = true
        [run]
        name = "birds"
        agents = 1_000_000
        steps = 100
        seed = -1
        executor = "threads"
        workers = 2
        partitions = 4
        guard = "torn"
        backend = "cpu"
        fma = true
        cuda_graphs = false
        share_devices = true
        memory = "heap"
        tile_rows = 8192
        fuse_steps = 4
        check = true
        time_limit = "1h30m"
        watchdog_seconds = 5
        [replay]
        mode = "record"
        fingerprint = "fnv1a"
        interval = 10
        verify = "old/replay.jsonl"
        [checkpoint]
        every = 50
        min_seconds = 1.5
        keep = 2
        keep_every = 100
        on_error = "continue"
        layout = "sharded"
        async = false
        compression = "gzip"
        compression_columns = ["x"]
        chunk_rows = 1000
        shards = "node"
        alignment = 65536
        hints = { romio_cb_write = "enable" }
        [remote]
        endpoints = ["tcp://127.0.0.1:5555", "tcp://[::1]:5555"]
        keys = "keys"
        connect_seconds = 1.5
        rejoin_seconds = 0
        answer_seconds = 60
        retries = 2
        keep_steps = 100
        [command]
        out = "here"
        force = true
        dry_run = true
        no_progress = true
        profile = true
        json = true
    """
    raw = tomllib.loads(text)
    declared = {table: model.model_fields for table, model in job_tables().items() if table != "params"}
    for table, fields in declared.items():
        assert len(raw[table]) == len(fields), f"the test misses a key of [{table}]"
    job.write_text(text)
    spec, options = read_job(job, environ={})
    kept = spec.model_dump(by_alias=True)
    for table in ("params", "run", "replay", "checkpoint", "remote"):
        wanted = dict(raw[table])
        wanted |= {
            "run": {"time_limit": 5400.0},
            "replay": {"verify": str(tmp_path / "old/replay.jsonl")},
            "remote": {"keys": str(tmp_path / "keys")},
        }.get(table, {})
        assert kept[table] == wanted
    assert spec.model.module == str(tmp_path / "flock.py")
    on = {"force": True, "dry_run": True, "profile": True, "json": True}
    assert options == RunOptions(out=tmp_path / "here", progress=False, **on)


def test_a_spec_cannot_be_changed(job: Path) -> None:
    spec, _ = read_job(job)
    with pytest.raises(ValueError, match="frozen"):
        spec.run.agents = 11  # type: ignore[misc]


def test_importable_module_stays(job: Path) -> None:
    job.write_text(MINIMAL.replace("flock.py", "package.flock"))
    assert read_job(job)[0].model.module == "package.flock"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("agents", "agnets", '[run] agnets: there is no such key (did you mean "agents"?)'),
        ("[run]", "[rum]", 'there is no table [rum] (did you mean "run"?)'),
        ("steps = 5", "steps = 5\nkeep = 1", "[run] keep: there is no such key (it belongs to [checkpoint])"),
        ("agents = 10", "agents = -1", "[run] agents: must be an integer ≥ 0, not -1"),
        ("agents = 10", "agents = 1e6", "[run] agents: must be an integer ≥ 0, not 1000000.0"),
        ("agents = 10", "agents = true", "[run] agents: must be an integer ≥ 0, not true"),
        ("agents = 10", 'agents = "10"', '[run] agents: must be an integer ≥ 0, not "10"'),
        ("agents = 10", f"agents = {2**63}", "[run] agents: must be an integer ≥ 0"),
        ("steps = 5", "steps = -5", "[run] steps: must be an integer ≥ 0, not -5"),
        ("steps = 5", "steps = 5\nworkers = 0", "[run] workers: must be an integer ≥ 1, not 0"),
        ("steps = 5", "steps = 5\nseed = 18446744073709551616", "[run] seed: must be an integer of 64 bits"),
        ("steps = 5", "steps = 5\ntile_rows = 5000", "[run] tile_rows: must be a power of two"),
        ("steps = 5", 'steps = 5\ncheck = "yes"', '[run] check: must be true or false, not "yes"'),
        ("steps = 5", 'steps = 5\nexecutor = "thread"', 'not "thread" (did you mean "threads"?)'),
        ("steps = 5", 'steps = 5\ntime_limit = "soon"', "[run] time_limit: must be seconds ≥ 0"),
        ("steps = 5", "steps = 5\ntime_limit = nan", "[run] time_limit: must be seconds ≥ 0"),
        ("steps = 5\n", "", "[run] steps: is missing"),
        ('module = "flock.py"\n', "", "[model] module: is missing"),
        ('module = "flock.py"', 'module = ""', '[model] module: must be text, not ""'),
        ("flock.py", "flock\\u0000.py", "[model] module: must be a path, which has no NUL character"),
        ("[run]", f"[params]\ndt = {'[' * 2000}{']' * 2000}\n[run]", "not TOML"),
        ("flock.py", "flok.py", 'flok.py (did you mean "flock.py"?)'),
        ("[run]", "[params]\ndt = nan\n[run]", "[params] dt: must be a number, not nan"),
        (
            "[run]",
            "[params]\ndt = [1]\n[run]",
            "[params] dt: must be one number, true, false or text, not [1]",
        ),
        ("[model]", "params = 3\n[model]", "params must be a table ([params]), not 3"),
        ("[model]", "run = 3\n[model]", "not TOML"),
        ("steps = 5", "steps =", "not TOML"),
    ],
)
def test_one_line_for_a_mistake(job: Path, old: str, new: str, said: str) -> None:
    text = MINIMAL.replace(old, new)
    assert text != MINIMAL
    message = mistake(job, text)
    assert said in message
    assert message.startswith(str(job))


def test_every_mistake_is_told(job: Path) -> None:
    job.write_text(MINIMAL.replace("agents", "agnets").replace("5", '"5"') + "keep = 3\n")
    with pytest.raises(JobError) as caught:
        read_job(job)
    lines = str(caught.value).splitlines()
    assert [line.partition("[run] ")[2].split(":")[0] for line in lines] == ["steps", "agnets", "keep"]


def test_file_that_cannot_be_read(tmp_path: Path, job: Path) -> None:
    with pytest.raises(JobError, match="No such file") as caught:
        read_job(tmp_path / "flok.toml")
    assert str(job) in (caught.value.hint or "")
    with pytest.raises(JobError, match="Is a directory"):
        read_job(tmp_path)
    job.write_bytes(b"\xff\xfe")
    with pytest.raises(JobError, match="not a TOML file"):
        read_job(job)


def test_overrides(job: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    sets = [
        Override("run", "agents", 20, "--agents"),
        Override("replay", "verify", "log.jsonl", "--verify"),
        Override("command", "out", "out", "--out"),
        Override.parse("params.beta=0.3"),
        Override.parse("params.airport = LAX"),
        Override.parse("params.on=true"),
        Override.parse('params.text="1"'),
        Override.parse("checkpoint.async=false"),
    ]
    spec, options = read_job(job, sets)
    assert spec.run.agents == 20
    assert spec.params == {"beta": 0.3, "airport": "LAX", "on": True, "text": "1"}
    assert spec.checkpoint.asynchronous is False
    # The command line's paths belong to the working directory, the file's to its own folder.
    assert spec.replay.verify == str(elsewhere / "log.jsonl")
    assert options.out == elsewhere / "out"
    assert spec.model.module == str(tmp_path / "flock.py")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (Override("run", "agents", -1, "--agents"), "--agents: must be an integer ≥ 0, not -1"),
        (Override.parse("run.agnets=3"), '--set run.agnets: there is no such key (did you mean "agents"?)'),
        (Override.parse("params.x=nan"), "[params] x: must be a number, not nan"),
        (Override.parse("parms.x=1"), 'there is no table [parms] (did you mean "params"?)'),
        (Override.parse("model.module=flok.py"), "--set model.module: there is no file"),
    ],
)
def test_mistake_of_the_command_line(job: Path, override: Override, said: str) -> None:
    assert said in mistake(job, MINIMAL, override)


@pytest.mark.parametrize("text", ["beta=3", "params.beta", "=3", ".x=3", "params.=3", ""])
def test_set_of_another_form(text: str) -> None:
    with pytest.raises(JobError, match=r"must be TABLE\.KEY=VALUE"):
        Override.parse(text)


def test_backend_of_the_environment(job: Path) -> None:
    assert read_job(job, environ={"RUSTSIM_BACKEND": "cpu"})[0].run.backend == "cpu"
    said = mistake(job, MINIMAL, environ={"RUSTSIM_BACKEND": "cudda"})
    assert said.startswith("RUSTSIM_BACKEND: must be")
    chosen = [Override("run", "backend", "cuda", "--backend")]
    assert read_job(job, chosen, environ={"RUSTSIM_BACKEND": "cpu"})[0].run.backend == "cuda"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("1.5s", 1.5),
        ("30m", 1800),
        ("1h30m", 5400),
        ("1h 30min", 5400),
        ("2d", 172800),
        ("01:30", 90),
        ("01:30:00", 5400),
        ("1-00:00:01", 86401),
    ],
)
def test_a_duration_is_read_as_people_write_it(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("value", ["", "s", "h", "1x", "soon", "-5", "1m1h", 3, None])
def test_what_is_no_duration_is_refused(value: object) -> None:
    assert parse_duration(value) is value


names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
values = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)


@given(
    params=st.dictionaries(names, values, max_size=4),
    run=st.fixed_dictionaries(
        {"agents": st.integers(0, 2**63 - 1), "steps": st.integers(0, 2**40)},
        optional={
            "seed": st.integers(-(2**63), 2**64 - 1),
            "executor": st.sampled_from(["inline", "threads", "processes"]),
            "workers": st.integers(1, 64),
            "time_limit": st.floats(0, 1e9),
            "tile_rows": st.sampled_from([4096, 65536]),
        },
    ),
    checkpoint=st.fixed_dictionaries({}, optional={"every": st.integers(0, 99), "async": st.booleans()}),
)
def test_written_job_reads_back_equal(params: Any, run: Any, checkpoint: Any) -> None:
    raw = {"model": {"module": "flock"}, "params": params, "run": run, "checkpoint": checkpoint}
    spec, _ = resolve_job(raw, Path("a.toml"), environ={})
    again, options = resolve_job(tomllib.loads(spec.to_toml()), Path("b.toml"), environ={})
    assert again == spec
    assert {name: type(value) for name, value in again.params.items()} == {
        name: type(value) for name, value in params.items()
    }
    assert again.sha256() == spec.sha256()
    assert options == RunOptions()


def test_hash_tells_jobs_apart(job: Path) -> None:
    spec, _ = read_job(job)
    other, _ = read_job(job, [Override("run", "seed", 1, "--seed")])
    assert spec.sha256() != other.sha256()


def test_spec_travels(job: Path) -> None:
    spec, _ = read_job(job)
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_switches_are_not_part_of_the_job(job: Path) -> None:
    spec, _ = read_job(job, [Override("command", "force", True, "--force")])
    assert "command" not in tomllib.loads(spec.to_toml())
    assert not set(CommandTable.model_fields) & set(JobSpec.model_fields)


def test_a_model_given_as_a_job_is_told_what_a_job_is(tmp_path: Path) -> None:
    (tmp_path / "flock.py").write_text("import numpy as np\n")
    with pytest.raises(JobError, match=r"flock\.py: not TOML") as caught:
        read_job(tmp_path / "flock.py", environ={})
    assert 'module = "flock.py"' in (caught.value.hint or "")
