"""Workers that have forgotten their sessions at any moment of a run: steps go on, and no bit is another."""

import threading

import pytest

pytest.importorskip("zmq", reason="needs pyzmq: pip install 'rustsim-hpc[remote]'")

from executor_suite import HERE, Driven, ExecutorSuite
from remote_peers import wait_for
from test_endpoint import external

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.remote import server
from rustsim_hpc.remote.executor import RemotePartitionExecutor
from rustsim_hpc.remote.installed import InstalledModels
from rustsim_hpc.remote.server import WorkerLimits, WorkerServer
from rustsim_hpc.run_folder import environment

ROWS = 5000


class ForgetfulWorker:
    """A worker in a thread of this process; what it holds can be taken from it while it waits."""

    def __init__(self):
        self.told, self._stop = [], threading.Event()
        installed = InstalledModels([str(HERE / "mixed_model.py")])
        limits = WorkerLimits(1 << 28)
        self.server = WorkerServer("tcp://127.0.0.1:*", None, installed, limits, self.told.append)
        self._thread = threading.Thread(target=self.server.serve, args=(self._stop.is_set,))
        self._thread.start()

    def forget(self):
        """As if it had been started anew. Nobody may be asking it something."""
        for session in self.server._sessions.values():
            session.held.close()
        self.server._sessions.clear()

    def close(self):
        self._stop.set()
        self._thread.join()
        self.server.close()


@pytest.fixture
def workers():
    made = [ForgetfulWorker() for _ in range(2)]
    yield made
    for worker in made:
        worker.close()
        assert worker.told == []


class Suite(ExecutorSuite):
    def __init__(self, workers):
        self.workers = workers

    def plan(self, rows, parts):
        plan = rs.PartitionPlan.row_ranges(rows, parts)
        return external(plan, [worker.server.endpoint for worker in self.workers])


@pytest.fixture
def drive(workers):
    made = []

    def make(told, **config):
        executor = RemotePartitionExecutor(**config.pop("patience", {}), tell=told.append)
        config = {"rows": ROWS, "parts": 4, "model": "mixed_model", **config}
        made.append(Driven(Suite(workers), executor, **config))
        return made[-1]

    yield make
    for driven in made:
        driven.plane.close()


def preceded(method, forget):
    def wrapped(*given, **named):
        forget()
        return method(*given, **named)

    return wrapped


def forgetting(driven, names, monkeypatch, forget):
    """Call ``forget`` before each of the session's methods of these names; return the session."""
    session = driven.plane.stepper(driven.executor).session
    for name in names:
        monkeypatch.setattr(session, name, preceded(getattr(session, name), forget))
    return session


@pytest.mark.parametrize("scheme", ["fnv1a", "digest"])
@pytest.mark.parametrize("guard", ["rollback", "torn"])
def test_forgetting_before_every_request_changes_nothing(drive, workers, monkeypatch, guard, scheme):
    """Segments of a step, observations, fingerprints, fetches: whichever worker forgets them."""
    told, turn = [], [0]
    given = {"guard": rs.StepGuard(guard), "fingerprint": scheme}
    driven = drive(told, **given)
    driven.run(1)

    def forget():
        turn[0] += 1
        for place, worker in enumerate(workers):
            if turn[0] % 3 != place:  # one of them, the other, both
                worker.forget()

    forgetting(driven, ["run", "fnv1a", "refresh"], monkeypatch, forget)
    driven.run(3)
    driven.plane.observe(driven.executor)
    middle = driven.plane.checkpoint().state
    driven.run(3)
    stream = ExecutorSuite().expected(7, rows=ROWS, model="mixed_model", **given)
    assert driven.stream == stream
    assert driven.plane.fingerprint() == stream[-1]
    assert rs.fingerprint_checkpoint(4, middle, scheme) == stream[3]
    inline = Driven(ExecutorSuite(), rs.InlinePartitionExecutor(), parts=1, rows=ROWS, model="mixed_model")
    inline.run(4)
    inline.plane.observe(inline.executor)
    assert driven.plane.values.keys() == inline.plane.values.keys()
    assert len(told) >= 6 * 3  # two segments and an observation of six steps, each by one at least


def test_machines_that_differ_are_told_once(drive, workers, monkeypatch):
    told, own = [], environment.worker_facts()
    monkeypatch.setattr(server, "worker_facts", lambda: {**own, "cpu": "Abacus 3"})
    driven = drive(told)
    driven.run(1)
    for worker in workers:
        worker.forget()
    driven.run(1)
    ends = [worker.server.endpoint for worker in workers]
    [line] = [line for line in told if "Abacus" in line]
    assert line.startswith("this process and its remote workers have different CPU models: ")
    assert f"Abacus 3 on {', '.join(ends)};" in line
    machines = driven.plane.stepper(driven.executor).session.machines
    assert {name: found["cpu"] for name, found in machines.items()} == dict.fromkeys(ends, "Abacus 3")


def test_without_retries_the_step_fails_and_the_next_one_goes_on(drive, workers):
    told = []
    driven = drive(told, patience={"retries": 0})
    driven.run(2)
    before = driven.everything()
    workers[1].forget()
    with pytest.raises(errors.ExecutorError, match="the session is not known here") as caught:
        driven.run(1)
    assert (caught.value.partition, caught.value.exit_code) == (rs.PartitionId(2), 3)
    assert driven.everything() == before
    driven.run(2)
    assert driven.stream == ExecutorSuite().expected(4, rows=ROWS, model="mixed_model")
    assert told == []


def test_a_worker_that_forgets_again_and_again_ends_the_step(drive, workers, monkeypatch):
    """It is brought its rows so often as there are retries: a step that kills its worker has an end."""
    told = []
    driven = drive(told, patience={"retries": 3})
    driven.run(1)
    session = driven.plane.stepper(driven.executor).session
    running, asked = session._running, []

    def forgetting_first(share, *given):
        asked.append(share.places.start)
        if share.places.start == 2:
            workers[1].forget()
        return running(share, *given)

    monkeypatch.setattr(session, "_running", forgetting_first)
    with pytest.raises(errors.ExecutorError, match="the session is not known here") as caught:
        driven.run(1)
    assert caught.value.partition == rs.PartitionId(2)
    assert asked.count(2) == 1 + 3
    monkeypatch.undo()
    driven.run(2)
    assert driven.stream == ExecutorSuite().expected(3, rows=ROWS, model="mixed_model")
    wait_for(lambda: len(workers[1].server._sessions) == 1)
