"""Jobs with remote workers: the bits of inline, checkpoints, and workers that die."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("zmq", reason="needs pyzmq: pip install 'rustsim-hpc[remote]'")

from remote_peers import wait_for
from remote_workers import ROOT, WorkerProcess

from rustsim_hpc.cli.common import Session
from rustsim_hpc.cli.main import _run as run_command
from rustsim_hpc.job.launch import plan_job
from rustsim_hpc.job.spec import Override, read_job
from rustsim_hpc.proof.replay_log import read_replay_log
from rustsim_hpc.run_folder.environment import worker_facts
from rustsim_hpc.run_folder.reader import open_run

FLIGHTS = ROOT / "jobs" / "us_flights.toml"
MODEL = ROOT / "jobs" / "us_flights.py"
SMALL = ("--agents", "20000", "--no-progress")


@pytest.fixture(scope="module")
def workers():
    made = [WorkerProcess(models=(MODEL,)) for _ in range(2)]
    yield made
    assert [worker.end() for worker in made] == [0, 0]


@pytest.fixture(scope="module")
def inline(tmp_path_factory):
    """The folder of an inline run of 30 steps."""
    folder = tmp_path_factory.mktemp("inline") / "run"
    done = rustsim("run", FLIGHTS, *SMALL, "--steps", 30, "--executor", "inline", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def rustsim(*words, ranks=None, timeout=120):
    command = [sys.executable, "-m", "rustsim_hpc", *map(str, words)]
    if ranks is not None:
        command = ["mpirun", "-n", str(ranks), *command]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=env)


def remote(*workers):
    return ("--executor", "remote", *(word for one in workers for word in ("--endpoint", one.endpoint)))


def entries(folder):
    return read_replay_log(folder / "replay.jsonl").entries


def test_stream_is_that_of_inline(workers, inline, tmp_path):
    every = ("--checkpoint-every", 10)
    done = rustsim(
        "run", FLIGHTS, *SMALL, *every, "--steps", 30, *remote(*workers), "--out", tmp_path, "--json"
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["executor"], said["workers"], said["partitions"]) == ("remote", 2, 2)
    assert entries(tmp_path) == entries(inline)
    one, other = open_run(tmp_path), open_run(inline)
    assert sorted(one.checkpoints()) == [10, 20, 30]
    for name in ("state", "place", "home"):
        assert (one.columns(name, step=30) == other.columns(name, step=30)).all()
    assert (tmp_path / "curve.csv").read_text() == (inline / "curve.csv").read_text()


def test_resumed_and_verified(workers, inline, tmp_path):
    stopped = rustsim("run", FLIGHTS, *SMALL, "--steps", 12, *remote(*workers), "--out", tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    record = json.loads((tmp_path / "run.json").read_text())
    assert [one["endpoint"] for one in record["remote_workers"]] == [one.endpoint for one in workers]
    assert record["remote_workers"][0] == {**worker_facts(), "ranks": [0], "endpoint": workers[0].endpoint}
    assert record["sessions"][0]["remote_workers"] == record["remote_workers"]
    record["sessions"][0]["remote_workers"][1]["cpu"] = "Abacus 3"
    (tmp_path / "run.json").write_text(json.dumps(record))
    # The folder remembers its workers.
    resumed = rustsim("resume", tmp_path, "--steps", 30, "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert "warning: CPU model: " in resumed.stderr
    assert "Abacus 3" in resumed.stderr
    said = json.loads(resumed.stdout.splitlines()[-1])
    assert (said["resumed_from"], said["executor"]) == (12, "remote")
    assert entries(tmp_path) == entries(inline)
    verified = rustsim("verify", inline, "--against", tmp_path / "replay.jsonl", *remote(*workers))
    assert verified.returncode == 0, verified.stderr
    assert "30 fingerprints up to step 30 equal" in verified.stdout


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
def test_ranks_share_the_endpoints(workers, inline, tmp_path):
    words = ("run", FLIGHTS, *SMALL, "--steps", 30, *remote(*workers), "--out", tmp_path, "--json")
    done = rustsim(*words, ranks=2)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["ranks"], said["workers"], said["partitions"]) == (2, 1, 2)
    assert entries(tmp_path) == entries(inline)


def test_runs_that_share_a_worker_do_not_meet(workers, inline, tmp_path):
    """Two runs at once, of one seed and of another, whose sessions are on one worker."""

    def run(seed):
        words = ("run", FLIGHTS, *SMALL, "--steps", 8, "--seed", seed, *remote(workers[0]), "--partitions", 2)
        return rustsim(*words, "--out", tmp_path / str(seed))

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(run, (1, 2)))
    assert [one.returncode for one in done] == [0, 0], done
    assert entries(tmp_path / "1") == entries(inline)[:8]
    other = ("verify", tmp_path / "2", "--against", tmp_path / "2", "--executor", "inline", "--no-progress")
    assert rustsim(*other).returncode == 0


def test_a_worker_killed_in_a_run(inline, tmp_path):
    """Exit 3, one line that names the worker, the last complete step saved; the run goes on inline."""
    worker = WorkerProcess(models=(MODEL,))
    words = ("run", FLIGHTS, *SMALL, "--steps", 1_000_000, *remote(worker), "--out", tmp_path)
    quick = ("--set", "remote.connect_seconds=2", "--set", "remote.rejoin_seconds=0.2")
    command = [sys.executable, "-m", "rustsim_hpc", *map(str, words), *quick]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env)
    log = tmp_path / "replay.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 20, 100)
    assert worker.end(signal.SIGKILL) == -signal.SIGKILL
    _, told = run.communicate(timeout=60)
    assert run.returncode == 3, told
    [line] = [line for line in told.splitlines() if line.startswith("Error: ")]
    assert f'worker "remote-0" at {worker.endpoint} ' in line
    assert "partition PartitionId(0)" in line
    assert "restart the worker there and continue (a job: with `resume`)" in told
    saved = max(open_run(tmp_path).checkpoints())
    assert saved >= 15
    resumed = rustsim("resume", tmp_path, "--executor", "inline", "--steps", saved + 10)
    assert resumed.returncode == 0, resumed.stderr
    verified = rustsim(
        "verify", tmp_path, "--executor", "inline", "--against", inline / "replay.jsonl", "--steps", 30
    )
    assert verified.returncode == 0, verified.stderr


def test_a_worker_restarted_in_a_run(inline, tmp_path):
    """The run goes on by itself; stream and outputs are those of a run that lost nobody."""
    workers, log = [WorkerProcess(models=(MODEL,)) for _ in range(2)], tmp_path / "replay.jsonl"
    words = ("run", FLIGHTS, *SMALL, "--steps", 1_000_000, *remote(*workers), "--out", tmp_path)
    patient = ("--set", "remote.rejoin_seconds=100")
    command = [sys.executable, "-m", "rustsim_hpc", *map(str, words), *patient]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env)
    try:
        wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 5, 100)
        assert workers[1].end(signal.SIGKILL) == -signal.SIGKILL
        workers.append(WorkerProcess(models=(MODEL,), bind=workers[1].endpoint))
        made = len(log.read_text().splitlines())
        wait_for(lambda: len(log.read_text().splitlines()) > max(made + 5, 40), 100)
        run.send_signal(signal.SIGTERM)
        _, told = run.communicate(timeout=100)
    finally:
        run.kill()
        ended = [worker.end() for worker in workers]
    assert ended == [0, -signal.SIGKILL, 0]
    assert run.returncode == 75, told
    assert "Traceback" not in told
    assert entries(tmp_path)[:30] == entries(inline)
    assert (tmp_path / "curve.csv").read_text().startswith((inline / "curve.csv").read_text())


# -- the job file --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "--executor: no remote workers are given"),
        (("--endpoint", "nonsense"), '--endpoint: "nonsense" is not an endpoint of a remote worker'),
        (("--endpoint", "tcp://*:5555"), "names no single worker"),
        (("--endpoint", "tcp://[::1]:1", "--endpoint", "tcp://[::1]:1"), "is given twice"),
        (("--endpoint", "tcp://192.0.2.1:5555"), "may not be on this machine: keys are required"),
        (("--endpoint", "tcp://[::1]:1", "--keys", "nowhere"), "cannot read the key"),
        (("--endpoint", "tcp://[::1]:1", "--set", "remote.retries=-1"), "must be an integer ≥ 0, not -1"),
        (("--endpoint", "tcp://[::1]:1", "--set", "remote.answer_seconds=0"), "must be a number > 0, not 0"),
        (("--endpoint", "tcp://[::1]:1", "--set", "remote.endpoint=1"), "there is no such key"),
        (
            ("--endpoint", "tcp://[::1]:1", "--endpoint", "tcp://[::1]:2", "--partitions", "1"),
            "--partitions: 1 are too few for 2 endpoints",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(words, text, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["run", str(FLIGHTS), "--executor", "remote", "--out", str(out), *words]
    assert run_command(Session(), arguments) == 2
    told = capsys.readouterr().err
    assert text in told
    assert "Traceback" not in told
    assert not out.exists()


def test_plan_deals_out_the_partitions():
    given = ["run.executor=remote", 'remote.endpoints=["tcp://[::1]:1", "tcp://[::1]:2", "tcp://[::1]:3"]']
    spec, _ = read_job(FLIGHTS, map(Override.parse, given), environ={})
    assert [(plan_job(spec, ranks).workers, plan_job(spec, ranks).partitions) for ranks in (1, 2, 5)] == [
        (3, 3),
        (2, 3),
        (1, 5),
    ]


def test_keys_are_found_beside_the_job_file(tmp_path: Path):
    text = FLIGHTS.read_text().replace('"us_flights.py"', f'"{MODEL}"')
    (tmp_path / "job.toml").write_text(f'{text}\n[remote]\nkeys = "secrets"\n')
    spec, _ = read_job(tmp_path / "job.toml", environ={})
    assert spec.remote.keys == str(tmp_path / "secrets")
