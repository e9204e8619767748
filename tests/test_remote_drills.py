"""What a control plane does about workers that are no workers, lie, come late, stop, die, or forget."""

import os
import random
import signal
import threading
import time

import pytest

pytest.importorskip("zmq", reason="needs pyzmq: pip install 'rustsim-hpc[remote]'")

from contextlib import nullcontext

from executor_suite import Driven, ExecutorSuite, held
from remote_peers import OPENED, FalseWorker, TcpServer, answer_to, wait_for
from remote_workers import SUITE, WorkerProcess
from test_endpoint import SUITE_MODEL, At

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.remote.executor import RemotePartitionExecutor
from rustsim_hpc.remote.sockets import ClientSocket
from rustsim_hpc.remote.tasks_client import ZmqPartitionClient

ROWS = 60


def resident(**patience):
    return RemotePartitionExecutor(**patience)


def tasks(**patience):
    return rs.EndpointPartitionExecutor(ZmqPartitionClient(SUITE_MODEL, seed=5, **patience))


@pytest.fixture
def plane(tmp_path, worker):
    """Return what makes a plane over endpoints; all are closed in the end, before their workers are ended."""
    assert worker
    made = []

    def make(executor, *endpoints, **config):
        config = {"rows": ROWS, "parts": len(endpoints), **config}
        made.append(Driven(At(*endpoints), executor, trip=tmp_path / f"trip{len(made)}", **config))
        return made[-1]

    yield make
    for driven in made:
        driven.plane.close()


def expected(steps, **config):
    return ExecutorSuite().expected(steps, rows=ROWS, **config)


def fails(driven, text, *, partition=0, steps=1, within=15):
    """A step fails with the typed error that names the partition, in time, and has changed nothing."""
    before, begun = driven.everything(), time.monotonic()
    with pytest.raises(errors.ExecutorError) as caught:
        driven.run(steps)
    assert time.monotonic() - begun < within
    assert driven.everything() == before
    error = caught.value
    assert isinstance(error.source, rs.PartitionExecutorError.Worker)
    assert (error.partition, error.exit_code) == (rs.PartitionId(partition), 3)
    assert text in str(error)
    return error


NOBODY = {"connect_seconds": 0.3}
SILENT = {"connect_seconds": 20, "answer_seconds": 0.3}
BOTH = pytest.mark.parametrize("executor", [resident, tasks])


# -- what is no worker ---------------------------------------------------------------------------------


@pytest.fixture
def serving():
    """Return what keeps servers until the end of the test."""
    made = []

    def keep(server):
        made.append(server)
        return server

    yield keep
    for server in made:
        server.close()


@BOTH
def test_nobody_there(plane, executor, serving):
    server = serving(TcpServer(lambda connection: None))
    server.close()
    fails(plane(executor(**NOBODY), server.endpoint), "could not be reached within 0.3 s")


@BOTH
def test_silence(plane, executor, serving):
    server = serving(TcpServer(lambda connection: None))
    fails(plane(executor(**NOBODY), server.endpoint), "could not be reached within 0.3 s")


@BOTH
@pytest.mark.parametrize(
    ("garbage", "text"),
    [(b"\xff" * 4096, "cannot shake hands"), (random.Random(1).randbytes(4096), "with what is no answer")],
    ids=["handshake", "frames"],
)
def test_garbage(plane, executor, serving, garbage, text):
    server = serving(TcpServer(lambda connection: connection.sendall(garbage)))
    fails(plane(executor(connect_seconds=5), server.endpoint), text)


@BOTH
def test_no_answer(plane, executor, serving):
    worker = serving(FalseWorker(lambda request: None))
    fails(plane(executor(**SILENT, retries=2), worker.endpoint), "did not answer within 0.3 s")
    assert [request.kind for request in worker.requests][:3] == ["open"] * 3
    assert len({request.number for request in worker.requests[:3]}) == 1


def late(request):
    time.sleep(1.2)
    return answer_to(request, "opened", **OPENED)


@BOTH
def test_a_late_answer(plane, executor, serving):
    fails(
        plane(executor(**SILENT, retries=0), serving(FalseWorker(late)).endpoint),
        "did not answer within 0.3 s",
    )


LIES = {
    "is no message": lambda request: [b"hello"],
    "of another version": lambda request: [b"rustsim-hpc remote 1\n{}"],
    "another kind": lambda request: answer_to(request, "closed"),
    "another session": lambda request: [
        frame.replace(request.session.encode(), b"0" * 32) for frame in answer_to(request, "opened", **OPENED)
    ],
    "a later question": lambda request: [
        frame.replace(b'"number":1', b'"number":7') for frame in answer_to(request, "opened", **OPENED)
    ],
    "other fields": lambda request: answer_to(request, "opened", cpu="", libm="", host=3),
    "nothing at all": lambda request: [b""],
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("lie", LIES)
def test_lies(plane, executor, lie, serving):
    worker = serving(FalseWorker(LIES[lie]))
    fails(plane(executor(connect_seconds=5, answer_seconds=5), worker.endpoint), "answered")


@BOTH
def test_a_worker_whose_state_is_another(plane, executor, serving):
    """Digests of what has arrived are compared with those of what was sent."""

    def answer(request):
        if request.kind == "open":
            return answer_to(request, "opened", **OPENED)
        if request.kind == "load":
            return answer_to(request, "loaded")
        return answer_to(request, "begun", [bytes(8 * 6)])

    driven = plane(executor(connect_seconds=5, answer_seconds=5), serving(FalseWorker(answer)).endpoint)
    fails(driven, "answered what cannot be")


def test_a_refusal_is_told(plane, serving):
    def refuse(request):
        return answer_to(request, "refused", code="limits", text="no more\n\x1b[2Jtoday")

    driven = plane(resident(connect_seconds=5), serving(FalseWorker(refuse)).endpoint)
    fails(driven, "no more \N{REPLACEMENT CHARACTER}[2Jtoday")


# -- workers that stop, die and forget -----------------------------------------------------------------


@pytest.fixture(scope="module")
def survivor():
    """A worker that sees the end of the drills."""
    one = WorkerProcess(models=(SUITE_MODEL,))
    yield one
    assert one.end() == 0


@pytest.fixture
def worker():
    """Return what starts workers; all are ended."""
    made = []

    def start(*options, models=(SUITE_MODEL,), **more):
        made.append(WorkerProcess(*options, models=models, **more))
        return made[-1]

    yield start
    for one in made:
        one.end(signal.SIGKILL)


@BOTH
def test_killed_between_steps(plane, survivor, worker, executor):
    """The step fails; a worker started anew at the same place goes on from the same state."""
    first, second = survivor, worker()
    driven = plane(executor(connect_seconds=1, rejoin_seconds=1), first.endpoint, second.endpoint)
    driven.run(3)
    second.end(signal.SIGKILL)
    fetching = (
        pytest.warns(RuntimeWarning, match="are made again here") if executor is resident else nullcontext()
    )
    with fetching:
        fails(driven, second.endpoint, partition=1)
    fails(driven, "could not be reached within 1 s", partition=1)
    again = worker(bind=second.endpoint)
    assert again.endpoint == second.endpoint
    driven.run(2)
    assert driven.stream == expected(5)


@pytest.mark.parametrize(("executor", "guard"), [(resident, "rollback"), (resident, "torn"), (tasks, "torn")])
def test_killed_in_a_step(plane, survivor, worker, executor, guard):
    """A worker that dies while it runs a phase: the error names its partition; a restore always helps."""
    first, second = survivor, worker()
    patience = {"connect_seconds": 1, "rejoin_seconds": 1}
    driven = plane(executor(**patience), first.endpoint, second.endpoint, guard=rs.StepGuard(guard))
    driven.run(2)
    kept = driven.plane.checkpoint()
    driven.tripping("kick", [1], "kill")
    with pytest.raises(errors.ExecutorError) as caught:
        driven.run(1)
    assert caught.value.partition == rs.PartitionId(1)
    driven.trip.unlink()
    assert second.process.wait(10) == -signal.SIGKILL
    worker(bind=second.endpoint)
    driven.plane.restore(kept)
    driven.run(2)
    assert driven.stream == expected(4)


@BOTH
def test_stopped_for_some_seconds(plane, survivor, executor):
    driven = plane(executor(), survivor.endpoint)
    driven.run(1)
    os.kill(survivor.pid, signal.SIGSTOP)
    began = time.monotonic()
    threading.Timer(3, os.kill, (survivor.pid, signal.SIGCONT)).start()
    driven.run(1)
    assert time.monotonic() - began > 2.5
    driven.run(1)
    assert driven.stream == expected(3)


def test_stopped_for_longer_than_it_may_take(plane, survivor):
    """The request is sent again over a fresh connection; the worker makes the step once, whatever it gets."""
    one = survivor
    driven = plane(resident(connect_seconds=30, answer_seconds=1.5, retries=3), one.endpoint)
    driven.run(1)
    os.kill(one.pid, signal.SIGSTOP)
    threading.Timer(3, os.kill, (one.pid, signal.SIGCONT)).start()
    driven.run(2)
    assert driven.stream == expected(3)
    assert survivor.told == []


def test_restarted_between_steps(plane, worker):
    """A worker that was started anew gets its rows again, and the step goes on: the run is told of it."""
    one, told = worker(), []
    driven = plane(resident(connect_seconds=3, tell=told.append), one.endpoint)
    driven.run(2)
    assert one.end() == 0
    worker(bind=one.endpoint)
    driven.run(2)
    assert driven.stream == expected(4)
    again = f"the worker at {one.endpoint} was restarted and has its rows again, step 2 continues"
    assert told == [again]


def test_restarted_while_it_runs_a_phase(plane, survivor, worker):
    """A worker that dies in a phase, and is there again some time later: the step goes on."""
    second = worker()
    driven = plane(resident(rejoin_seconds=60, tell=print), survivor.endpoint, second.endpoint)
    driven.run(1)
    driven.tripping("kick", [1], "kill")

    def start_anew():
        second.process.wait(60)
        driven.trip.unlink()
        worker(bind=second.endpoint)

    starting = threading.Thread(target=start_anew)
    starting.start()
    driven.run(2)
    starting.join()
    assert second.process.returncode == -signal.SIGKILL
    assert driven.stream == expected(3)


def test_a_worker_that_dies_of_a_step_ends_it(plane, worker):
    """However often somebody starts it anew: so often as there are retries, and then the step fails."""
    made = [worker()]
    driven = plane(resident(rejoin_seconds=60, retries=2, tell=print), made[0].endpoint)
    driven.run(1)
    driven.tripping("kick", [0], "kill")
    failed = threading.Event()

    def start_anew():
        while not failed.is_set():
            if made[-1].process.poll() is not None:
                made.append(worker(bind=made[0].endpoint))
            failed.wait(0.05)

    starting = threading.Thread(target=start_anew)
    starting.start()
    try:
        fails(driven, made[0].endpoint, within=100)
    finally:
        failed.set()
        starting.join()
    driven.trip.unlink()
    driven.run(1)
    assert driven.stream == expected(2)


def test_tasks_of_a_restarted_worker_are_sent_again(plane, worker):
    one = worker()
    driven = plane(tasks(), one.endpoint)
    driven.run(2)
    assert one.end() == 0
    worker(bind=one.endpoint)
    driven.run(2)
    assert driven.stream == expected(4)


def test_a_lost_workers_rows_are_made_again(plane, worker):
    """State is fetched from a live worker, and made again where it is lost: no bit is another."""
    first, second = worker(models=SUITE), worker(models=SUITE)
    config = {"model": "suite_kernels", "guard": rs.StepGuard.rollback()}
    patience = {"connect_seconds": 1, "rejoin_seconds": 1}
    driven = plane(resident(**patience), first.endpoint, second.endpoint, **config)
    driven.run(5)
    first.end(signal.SIGKILL)
    with pytest.warns(RuntimeWarning, match=f"{first.endpoint} .*its rows of step 5 are made again here"):
        state = driven.plane.runtime.device_store().checkpoint()
    assert rs.fingerprint_checkpoint(5, state) == expected(5, model="suite_kernels")[-1]
    worker(models=SUITE, bind=first.endpoint)
    driven.run(2)
    assert driven.stream == expected(7, model="suite_kernels")


def test_losing_workers_grows_nothing(plane, serving):
    worker_ = serving(FalseWorker(lambda request: None))
    driven = plane(resident(connect_seconds=5, answer_seconds=0.05, retries=0), worker_.endpoint)
    fails(driven, "did not answer")
    time.sleep(0.5)
    before = held()
    for _ in range(20):
        fails(driven, "did not answer")
    wait_for(lambda: held()[1] <= before[1])
    assert held()[0] <= before[0]


def test_only_control_travels_between_steps(plane, survivor, monkeypatch):
    """After the first step has brought the rows, a step is a few kilobytes, however many rows there are."""
    travelled = [0, 0]
    send, receive = ClientSocket.send, ClientSocket.receive

    def counted_send(self, frames):
        travelled[0] += sum(len(frame) for frame in frames)
        return send(self, frames)

    def counted_receive(self):
        frames = receive(self)
        travelled[1] += sum(len(frame) for frame in frames or ())
        return frames

    monkeypatch.setattr(ClientSocket, "send", counted_send)
    monkeypatch.setattr(ClientSocket, "receive", counted_receive)
    rows = 20_000
    driven = plane(resident(), survivor.endpoint, rows=rows, parts=2, fingerprint="digest")
    driven.run(1)
    assert travelled[0] > rows * 13  # a row is x, vx, kicks and even at least
    travelled[:] = [0, 0]
    driven.run(10)
    assert max(travelled) < 10 * 1_000
    travelled[:] = [0, 0]
    state = driven.plane.checkpoint().state
    assert travelled[1] > rows * 13
    assert driven.stream == ExecutorSuite().expected(11, rows=rows, fingerprint="digest")
    assert rs.fingerprint_checkpoint(11, state, "digest") == driven.stream[-1]


def test_rows_that_are_not_those_that_were_reported(plane, survivor):
    """A worker whose rows do not have the digests that it reported is given up; they are made again here."""
    driven = plane(resident(), survivor.endpoint, fingerprint="digest")
    driven.run(3)
    [share] = driven.plane.stepper(driven.executor).session._shares
    step, digests = share.promise
    assert step == 3
    share.promise = (step, [value ^ 1 for value in digests])
    with pytest.warns(RuntimeWarning, match="has reported: its rows of step 3 are made again here"):
        state = driven.plane.runtime.device_store().checkpoint()
    assert share.link is None
    assert rs.fingerprint_checkpoint(3, state, "digest") == expected(3, fingerprint="digest")[-1]
    driven.run(1)
    assert share.link is not None
    driven.plane.runtime.device_store().checkpoint()
    assert share.link is not None
    assert driven.stream == expected(4, fingerprint="digest")
