"""The scripts of slurm/, and the engine's launching, signals and resuming, on a real Slurm."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import GPUS, NODES, open_mpi
from slurm_site import SCRIPTS, STEPS, Site

import rustsim_hpc as rs

pytestmark = pytest.mark.slurm

ONE = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem-per-cpu=100M")
PAIR = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem-per-cpu=100M")
SLOW = {"TEST_PACE": "0.2"}


def assert_whole(out: Path, expected: int) -> dict[str, Any]:
    """Check that the run in a folder is the one that nobody interrupted, and return its record."""
    run = rs.open_run(out)
    assert (run.status, run.step_index, run.fingerprint) == ("done", STEPS, expected)
    assert run.series("near")["step"].tolist() == list(range(0, STEPS + 1, 10))
    return run.record


def assert_carried_on(record: dict[str, Any], reason: str) -> None:
    """Check that every session but the last was stopped for this reason, and the next one went on there."""
    sessions = record["sessions"]
    assert len(sessions) > 1
    for before, after in itertools.pairwise(sessions):
        assert (before["status"], before["exit_code"], before["reason"]) == ("stopped", 75, reason)
        assert 0 < before["step_index"] == after["resumed_from"] < STEPS


@dataclass
class LongRuns:
    """Jobs that mostly wait: for their time to be up, and to be started again."""

    site: Site
    requeued: str
    requeued_out: Path
    links: list[str]
    chain_out: Path


@pytest.fixture(scope="module", autouse=True)
def long_runs(session_site: Site, expected: int) -> LongRuns:
    """Begin them before the other tests, so that nobody waits for them."""
    site = session_site
    # A minute is the shortest limit. Slurm looks every half minute whom to warn before it looks again, so
    # these are warned when they are 20 to 50 seconds old.
    requeued_out, chain_out = site.out("requeued"), site.out("chain")
    words = (*PAIR, "--time=1")
    requeued = site.submit("requeue.sbatch", *words, "--signal=B:USR1@10", OUT=requeued_out, **SLOW)
    chain = ["bash", SCRIPTS / "chain.sh", *words, "--signal=USR1@10"]
    code, text = site.run(*chain, LINKS="4", OUT=chain_out, **SLOW)
    assert code == 0, text
    links = text.rpartition("scancel ")[2].split()
    site.jobs.extend(links)
    return LongRuns(site, requeued, requeued_out, links, chain_out)


@pytest.mark.parametrize("name", [path.name for path in sorted(SCRIPTS.glob("*.sbatch"))])
def test_directives_are_what_slurm_takes(site: Site, name: str) -> None:
    code, text = site.run("sbatch", "--test-only", SCRIPTS / name)
    assert code == 0, text
    assert "to start at" in text


def test_cpu_script_on_two_nodes(site: Site, expected: int) -> None:
    out = site.out("cpu")
    words = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem-per-cpu=100M")
    # Nodes that are one machine must not share memory: once a rank's address came through Slurm's PMI-2 torn,
    # between two nodes, with the transports of one machine in it.
    job = site.submit("cpu.sbatch", *words, OUT=out, UCX_TLS="tcp,self")
    assert site.wait(job)["ExitCode"] == "0:0", site.log(job)
    record = assert_whole(out, expected)
    assert (record["ranks"], record["executor"], record["workers"]) == (2, "threads", 2)
    # A finished run that is submitted again prints its summary.
    again = site.submit("cpu.sbatch", *ONE, OUT=out)
    assert site.wait(again)["ExitCode"] == "0:0", site.log(again)
    assert f"{expected:#018x}" in site.log(again)


def test_ensemble_ends_in_one_table(site: Site, expected: int) -> None:
    out, sweep = site.out("sweep"), site.folder / "sweep.txt"
    sweep.write_text("run.seed=0 params.reach=0.25\nrun.seed=5\nparams.reach=0.5 run.steps=20\n")
    job = site.submit("ensemble.sbatch", *ONE, "--array=1-4", OUT=out, SWEEP=sweep)
    site.wait(job)
    codes = {task["ArrayTaskId"]: task["ExitCode"] for task in site.facts(job)}
    assert codes == {"1": "0:0", "2": "0:0", "3": "0:0", "4": "2:0"}, site.log(job)
    assert "has no line 4" in site.log(job)
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["status"], row["step"], row["seed"], row["params.reach"]) for row in rows] == [
        ("1", "done", "300", "0", "0.25"),
        ("2", "done", "300", "5", "0.25"),
        ("3", "done", "20", "0", "0.5"),
    ]
    assert rows[0]["fingerprint"] == f"{expected:#018x}"
    assert [row["near.step"] for row in rows] == ["300", "300", "20"]
    assert len({row["fingerprint"] for row in rows}) == 3


def test_gpu_script_starts_one_rank_a_gpu(site: Site) -> None:
    """What the script starts, with its own directives; the engine is stood in for."""
    tools = site.folder / "gpu-venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "activate").write_text(f"export PATH={tools}:$PATH\n")
    stand_in = tools / "rustsim-hpc"
    stand_in.write_text('#!/bin/sh\necho "$SLURM_NODEID $SLURM_LOCALID $CUDA_VISIBLE_DEVICES $*"\n')
    stand_in.chmod(0o755)
    job = site.submit("gpu.sbatch", OUT="runs/gpu", VENV="gpu-venv")
    assert site.wait(job)["ExitCode"] == "0:0", site.log(job)
    devices = ",".join(map(str, range(GPUS)))
    words = "run walkers.toml --out runs/gpu --backend cuda"
    assert sorted(site.log(job).splitlines()) == [
        f"{node} {rank} {devices} {words}" for node in range(NODES) for rank in range(GPUS)
    ]


def test_gpu_script_plans_and_never_runs_on_the_cpu(site: Site) -> None:
    words = (
        "--nodes=1",
        "--gpus-per-node=2",
        "--ntasks-per-node=2",
        "--cpus-per-task=1",
        "--mem-per-cpu=100M",
    )
    planned = site.submit("gpu.sbatch", *words, engine=("--dry-run",), OUT=site.out("gpu-plan"))
    refused = site.submit("gpu.sbatch", *words, OUT=site.out("gpu-run"))
    assert site.wait(planned)["ExitCode"] == "0:0", site.log(planned)
    assert "2 on 2 ranks" in site.log(planned)
    assert site.wait(refused)["ExitCode"] == "2:0", site.log(refused)
    assert "cuda" in site.log(refused).lower()
    assert not site.out("gpu-run").exists()


def test_cancelled_job_is_not_requeued_and_can_be_resumed(site: Site, expected: int) -> None:
    out = site.out("cancelled")
    job = site.submit("requeue.sbatch", *PAIR, "--time=15", OUT=out, **SLOW)
    site.wait_for_step(out, 20)
    site.run("scancel", job)
    facts = site.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), site.log(job)
    assert rs.open_run(out).status == "stopped"
    code, text = site.engine("resume", out)
    assert code == 0, text
    assert_carried_on(assert_whole(out, expected), "SIGTERM")


def test_killed_job_can_be_resumed(site: Site, expected: int) -> None:
    out = site.out("killed")
    job = site.submit("requeue.sbatch", *PAIR, "--time=15", OUT=out, **SLOW)
    site.wait_for_step(out, 20)
    # One rank is killed; the other, which waits for it, must not wait for ever.
    os.kill(json.loads((out / ".lock").read_text())["pid"], signal.SIGKILL)
    facts = site.wait(job, timeout=60)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "137:0", "0"), site.log(
        job
    )
    assert rs.open_run(out).status == "killed"
    code, text = site.engine("resume", out)
    assert code == 0, text
    record = assert_whole(out, expected)
    assert record["sessions"][1]["resumed_from"] in range(20, STEPS, 20)


def test_printed_script_and_a_signal_among_worker_processes(site: Site, expected: int) -> None:
    out, script = site.out("printed"), site.folder / "printed.sbatch"
    shape = ("--nodes", "1", "--ntasks-per-node", "1", "--cpus-per-task", "2", "--time", "00:05:00")
    made = ("slurm", "walkers.toml", *shape, "--out", out, "--set", "run.executor=processes")
    code, text = site.engine(*made)
    assert code == 0, text
    script.write_text(text)
    job = site.submit(script, **SLOW)
    site.wait_for_step(out, 20)
    # Slurm signals every process of a task, workers too.
    site.run("scancel", "--signal=USR1", job)
    assert site.wait(job)["ExitCode"] == "75:0", site.log(job)
    again = site.submit(script)
    assert site.wait(again)["ExitCode"] == "0:0", site.log(again)
    record = assert_whole(out, expected)
    assert_carried_on(record, "SIGUSR1")
    assert (record["executor"], record["workers"]) == ("processes", 2)


def test_ranks_that_do_not_know_each_other_are_refused(site: Site) -> None:
    words = ("run", "walkers.toml", "--out", site.out("singletons"))
    engine = site.folder / "venv/bin/rustsim-hpc"
    code, text = site.run("srun", "--mpi=none", "--nodes=1", "--ntasks=2", engine, *words)
    assert code == 2, text
    assert "srun started 2 ranks" in text
    assert "--mpi=pmi2 for MPICH" in text
    assert not site.out("singletons").exists()
    # One task alone needs no MPI.
    code, text = site.run("srun", "--mpi=none", "--ntasks=1", engine, *words, "--dry-run")
    assert code == 0, text
    assert "1 ranks" in text


def test_open_mpi_under_pmix(site: Site, expected: int) -> None:
    library = open_mpi()
    if library is None:
        pytest.skip("needs Debian's Open MPI and PMIx (apt-get install libopenmpi3 libpmix-dev)")
    environ = {
        "MPI4PY_MPIABI": "openmpi",
        "MPI4PY_LIBMPI": library,
        # Two nodes that are one machine: no shared memory between them; and ranks that share cores.
        "OMPI_MCA_btl": "self,tcp",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    out, recorded = site.out("pmix"), site.out("expected") / "replay.jsonl"
    engine = (site.folder / "venv/bin/rustsim-hpc", "run", "walkers.toml", "--steps", "30")
    words = ("srun", "--mpi=pmix", "--nodes=2", "--ntasks=2", *engine, "--verify", recorded, "--out", out)
    code, text = site.run(*words, **environ)
    assert code == 0, text
    record = rs.open_run(out).record
    assert (record["status"], record["step_index"], record["ranks"]) == ("done", 30, 2)


def test_requeued_job_ends_as_if_nothing_had_been(long_runs: LongRuns, expected: int) -> None:
    site = long_runs.site
    facts = site.wait(long_runs.requeued)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), site.log(long_runs.requeued)
    assert_carried_on(assert_whole(long_runs.requeued_out, expected), "SIGUSR1")


def test_chain_ends_with_the_link_that_finishes(long_runs: LongRuns, expected: int) -> None:
    site, links = long_runs.site, long_runs.links
    ends = [site.wait(link) for link in links]
    states = [facts["JobState"] for facts in ends]
    done = states.index("COMPLETED")
    assert 1 <= done < len(links) - 1, states
    assert [facts["ExitCode"] for facts in ends[:done]] == ["75:0"] * done
    assert states[done + 1 :] == ["CANCELLED"] * (len(links) - done - 1)
    assert_carried_on(assert_whole(long_runs.chain_out, expected), "SIGUSR1")
