"""Who may use a worker, and what the command `worker` says: keys, refusals, exit codes, other models."""

import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("zmq", reason="needs pyzmq: pip install 'rustsim-hpc[remote]'")

from executor_suite import Driven, ExecutorSuite
from remote_workers import ROOT, WorkerProcess
from test_endpoint import SUITE_MODEL, At, external

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.cli.common import Session
from rustsim_hpc.cli.main import _run as run_command
from rustsim_hpc.remote.addresses import parse_endpoint
from rustsim_hpc.remote.executor import RemotePartitionExecutor
from rustsim_hpc.remote.keys import make_keys, read_client_keys, read_worker_keys
from rustsim_hpc.remote.sockets import WorkerSocket, library
from rustsim_hpc.remote.tasks_client import ZmqPartitionClient

QUICK = {"connect_seconds": 2, "answer_seconds": 20}


def driven_at(endpoint, executor, **config):
    return Driven(At(endpoint), executor, **config)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys") / "keys"
    make_keys(folder)
    return folder


@pytest.fixture(scope="module")
def worker(keys):
    """A worker with keys, on all interfaces."""
    one = WorkerProcess("--keys", str(keys), models=(SUITE_MODEL,), bind="tcp://*:*")
    yield one
    assert one.end() == 0


def local(worker):
    return f"tcp://127.0.0.1:{parse_endpoint(worker.endpoint).port}"


def refused(endpoint, executor):
    driven = driven_at(endpoint, executor)
    before = driven.everything()
    with pytest.raises(errors.ExecutorError) as caught:
        driven.run(1)
    assert driven.everything() == before
    driven.plane.close()
    return str(caught.value)


# -- keys ----------------------------------------------------------------------------------------------


def test_files_of_keys(keys, tmp_path):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in keys.rglob("*") if path.is_file()}
    assert modes == {"worker.key": 0o600, "client.key": 0o600, "worker.pub": 0o644, "client.pub": 0o644}
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    ours, theirs = read_client_keys(keys), read_worker_keys(keys)
    assert (ours.worker, theirs.allowed) == (theirs.public, frozenset({ours.public}))
    for secret in (ours.secret, theirs.secret):
        assert secret not in repr((ours, theirs))
        assert secret not in (keys / "worker.pub").read_text() + (keys / "client.pub").read_text()
    make_keys(tmp_path / "other")
    assert read_client_keys(tmp_path / "other").secret != ours.secret
    with pytest.raises(errors.RemoteError, match=r"worker\.key is there already"):
        make_keys(keys)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("client.key", lambda path: path.chmod(0o640), "is a secret that others can read"),
        ("client.key", lambda path: path.unlink(), "cannot read the key"),
        ("client.key", lambda path: path.write_bytes(b"\xff"), "cannot read the key"),
        ("client.key", lambda path: path.write_text('who = "worker"'), "is not the key of a client"),
        ("client.key", lambda path: path.write_text('who = "client"'), "holds no public key"),
        (
            "worker.pub",
            lambda path: path.write_text('who = "worker"\npublic = "short"'),
            "holds no public key",
        ),
    ],
)
def test_keys_that_are_none(tmp_path, name, change, text):
    make_keys(tmp_path)
    change(tmp_path / name)
    with pytest.raises(errors.RemoteError, match=text):
        read_client_keys(tmp_path)
    with pytest.raises(errors.InvalidConfig, match=text):
        RemotePartitionExecutor(tmp_path)


def test_a_worker_needs_somebody_to_let_in(tmp_path):
    make_keys(tmp_path)
    (tmp_path / "allowed" / "client.pub").unlink()
    with pytest.raises(errors.RemoteError, match="nobody could use the worker"):
        read_worker_keys(tmp_path)


# -- who is let in -------------------------------------------------------------------------------------


def test_with_the_right_keys(worker, keys):
    for executor in (
        RemotePartitionExecutor(keys),
        rs.EndpointPartitionExecutor(ZmqPartitionClient(SUITE_MODEL, keys, seed=5)),
    ):
        driven = driven_at(local(worker), executor)
        driven.run(2)
        assert driven.stream == ExecutorSuite().expected(2)
        driven.plane.close()


def test_with_other_keys(worker, keys, tmp_path):
    """A client that is not known, one that takes somebody else for the worker, and one without any keys."""
    make_keys(tmp_path)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    for name, source in (("client.key", tmp_path), ("worker.pub", keys)):
        (stranger / name).write_bytes((source / name).read_bytes())
        (stranger / name).chmod(0o600)
    for _ in range(2):
        assert "cannot shake hands" in refused(local(worker), RemotePartitionExecutor(stranger, **QUICK))
    public = read_client_keys(stranger).public
    said = [line for line in worker.told if "is not let in" in line]
    assert said == [f"worker: a client with the key {public} is not let in"]

    deceived = tmp_path / "deceived"
    deceived.mkdir()
    for name, source in (("client.key", keys), ("worker.pub", tmp_path)):
        (deceived / name).write_bytes((source / name).read_bytes())
        (deceived / name).chmod(0o600)
    assert "worker " in refused(local(worker), RemotePartitionExecutor(deceived, **QUICK))
    assert "worker " in refused(local(worker), RemotePartitionExecutor(**QUICK))
    test_with_the_right_keys(worker, keys)


def test_a_client_with_keys_does_not_speak_plainly(keys):
    plain = WorkerProcess(models=(SUITE_MODEL,))
    assert "worker " in refused(plain.endpoint, RemotePartitionExecutor(keys, **QUICK))
    assert plain.end() == 0


def test_nothing_readable_goes_over_the_wire(keys):
    """A column that is sent to a worker with keys is not to be found in the bytes on the wire."""
    marker = b"rustsim-hpc remote"
    seen = {with_keys: wire_of(keys if with_keys else None) for with_keys in (True, False)}
    assert marker in seen[False]
    assert marker not in seen[True]
    assert len(seen[True]) > 1_000


def wire_of(keys):
    """What a client sends to a worker that is behind a relay, whose answers do not come."""
    server = socket.create_server(("127.0.0.1", 0))
    words = () if keys is None else ("--keys", str(keys))
    one = WorkerProcess(*words, models=(SUITE_MODEL,))
    address = parse_endpoint(one.endpoint)
    sent = bytearray()

    def relay(source, target, keep):
        try:
            while data := source.recv(65536):
                if keep:
                    sent.extend(data)
                target.sendall(data)
        except OSError:
            pass

    def run():
        inner, _ = server.accept()
        outer = socket.create_connection((address.host, address.port))
        threads = [
            threading.Thread(target=relay, args=(inner, outer, True)),
            threading.Thread(target=relay, args=(outer, inner, False)),
        ]
        for thread in threads:
            thread.start()
        threads[0].join()
        outer.shutdown(socket.SHUT_RDWR)
        threads[1].join()
        inner.close()
        outer.close()

    thread = threading.Thread(target=run)
    thread.start()
    driven = driven_at(f"tcp://127.0.0.1:{server.getsockname()[1]}", RemotePartitionExecutor(keys))
    driven.run(1)
    assert driven.stream == ExecutorSuite().expected(1)
    driven.plane.close()
    thread.join(20)
    server.close()
    assert one.end() == 0
    return bytes(sent)


def test_plain_connections_stay_on_the_machine():
    with pytest.raises(errors.RemoteError, match="keys are required"):
        WorkerSocket("tcp://*:*", None, lambda who, line: None)
    with pytest.raises(errors.RemoteError, match="keys are required"):
        WorkerSocket("tcp://somewhere.example:5555", None, lambda who, line: None)
    driven = driven_at("tcp://192.0.2.1:5555", RemotePartitionExecutor())
    with pytest.raises(errors.InvalidConfig, match="keys are required"):
        driven.run(1)


@pytest.mark.parametrize(
    ("endpoint", "loopback"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.9.9.9:65535", True),
        ("tcp://localhost:80", True),
        ("tcp://[::1]:80", True),
        ("tcp://0.0.0.0:80", False),
        ("tcp://10.1.2.3:80", False),
        ("tcp://node17:80", False),
        ("tcp://127.0.0.1.example.org:80", False),
        ("tcp://[fe80::1]:80", False),
    ],
)
def test_which_addresses_are_this_machine(endpoint, loopback):
    assert parse_endpoint(endpoint).loopback is loopback


@pytest.mark.parametrize(
    "endpoint",
    ["", "127.0.0.1:5", "tcp://:5", "tcp://a", "tcp://a:0", "tcp://a:65536", "tcp://a:*", "tcp://*:5", "ipc://x",
     "tcp://a:5;eth0", "tcp://a b:5", "tcp://a:5\n", "inproc://x"],
)  # fmt: skip
def test_what_is_no_endpoint(endpoint):
    with pytest.raises(errors.RemoteError):
        parse_endpoint(endpoint)


# -- models that differ --------------------------------------------------------------------------------


def test_another_source_is_refused(worker, keys, tmp_path):
    """One byte more in the model's file: another model. Nothing of it goes over the wire but its hash."""
    other = tmp_path / "suite_model.py"
    other.write_text(Path(SUITE_MODEL).read_text("utf-8") + "\n")
    driven = driven_at(
        local(worker), RemotePartitionExecutor(keys), model=str(other.with_suffix("")), params={"trip": ""}
    )
    with pytest.raises(
        errors.ExecutorError, match=r"no model with the source [0-9a-f]{12}… is installed here"
    ):
        driven.run(1)


def test_another_helper_is_refused(tmp_path):
    """The model's file is the same, what it imports is not."""
    name = f"helper_of_{tmp_path.name}".replace("-", "_")
    text = (
        f"import numpy as np\nimport rustsim_hpc as rs\nfrom {name} import step\n\n"
        "@rs.row_kernel(writes='x')\ndef move(x):\n    return step(x)\n\n"
        "def model():\n    return rs.Model(columns=[rs.Column('x', 'float64')], phases=[move],\n"
        "        initialise=lambda rows, params, tables, seed: {'x': np.zeros(rows.stop - rows.start)})\n"
    )
    for side, factor in (("here", 1.0), ("there", 2.0)):
        (tmp_path / side).mkdir()
        (tmp_path / side / "moved.py").write_text(text)
        body = f"import rustsim_hpc as rs\n\n@rs.function\ndef step(x):\n    return x + {factor}\n"
        (tmp_path / side / f"{name}.py").write_text(body)
    one = WorkerProcess(models=(tmp_path / "there" / "moved.py",))
    driven = driven_at(one.endpoint, RemotePartitionExecutor(), model=str(tmp_path / "here" / "moved"))
    with pytest.raises(
        errors.ExecutorError, match="the same file here, but its helpers, tables or parameters"
    ):
        driven.run(1)
    driven.plane.close()
    assert one.end() == 0


def test_phases_that_are_no_models_are_refused(worker, keys):
    runtime = rs.ColumnarRuntime(rs.DeviceSoaStore.from_columns(None, {"x": [0.0, 1.0]}))
    plan, workers = external(rs.PartitionPlan.row_ranges(2, 2), [local(worker)])
    plane = rs.EngineControlPlane(
        runtime, rs.ControlPlaneConfig(partition_plan=plan, partition_workers=workers)
    )
    plane.add_partition_executor_phase("move", lambda context, columns, rows: None)
    with pytest.raises(errors.ExecutorError, match='phase "move" is not an entry of a model'):
        plane.step_partitions_with_executor(RemotePartitionExecutor(keys))
    plane.close()


# -- the command ---------------------------------------------------------------------------------------


def rustsim(*words, **more):
    command = [sys.executable, "-m", "rustsim_hpc", "worker", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)


def test_help():
    done = rustsim("--help")
    assert done.returncode == 0
    for word in (
        "--bind",
        "--model",
        "--keys",
        "--make-keys",
        "--threads",
        "--memory",
        "--once",
        "Examples:",
    ):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "a worker needs --bind and --model, or --make-keys alone"),
        (("--bind", "tcp://127.0.0.1:*"), "a worker needs --bind and --model"),
        (("--bind", "nonsense", "--model", SUITE_MODEL), "is not an endpoint"),
        (
            ("--bind", "tcp://*:*", "--model", SUITE_MODEL),
            "can be reached from other machines: keys are required",
        ),
        (("--bind", "tcp://192.0.2.1:5", "--model", SUITE_MODEL), "keys are required"),
        (("--bind", "tcp://127.0.0.1:*", "--model", "nowhere.py"), "nowhere.py"),
        (("--bind", "tcp://127.0.0.1:*", "--model", SUITE_MODEL, "--keys", "nowhere"), "cannot read the key"),
        (("--bind", "tcp://127.0.0.1:*", "--model", SUITE_MODEL, "--memory", "nan"), "memory"),
        (("--bind", "tcp://127.0.0.1:*", "--model", SUITE_MODEL, "--threads", "0"), "threads"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_2(words, text, capsys):
    assert run_command(Session(), ["worker", *words]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert text in told


def test_started_twice_on_one_port():
    one = WorkerProcess(models=(SUITE_MODEL,))
    done = rustsim("--bind", one.endpoint, "--model", SUITE_MODEL)
    assert done.returncode == 2
    assert f"cannot listen at {one.endpoint}: Address already in use" in done.stderr
    assert one.end() == 0


def test_make_keys(tmp_path):
    done = rustsim("--make-keys", tmp_path / "keys")
    assert done.returncode == 0
    assert [line.rsplit("/", 1)[1] for line in done.stdout.splitlines()] == [
        "worker.key", "worker.pub", "client.key", "client.pub", "client.pub",
    ]  # fmt: skip
    again = rustsim("--make-keys", tmp_path / "keys")
    assert again.returncode == 2
    assert "keys are not overwritten" in again.stderr


def test_once_ends_with_its_clients():
    one = WorkerProcess("--once", "--threads", "2", models=(SUITE_MODEL,))
    driven = driven_at(one.endpoint, RemotePartitionExecutor())
    driven.run(2)
    assert driven.stream == ExecutorSuite().expected(2)
    assert one.process.poll() is None
    driven.plane.close()
    assert one.process.wait(20) == 0
    one.end()


def test_without_pyzmq(monkeypatch):
    library.cache_clear()
    monkeypatch.setitem(sys.modules, "zmq", None)
    try:
        with pytest.raises(errors.InvalidConfig, match="need the package pyzmq, which is not installed"):
            RemotePartitionExecutor()
    finally:
        library.cache_clear()
