"""docs/remote.md: its commands and its program run, its table of messages is that of the code."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("zmq", reason="needs pyzmq: pip install 'rustsim-hpc[remote]'")

from remote_workers import ROOT, WorkerProcess

from rustsim_hpc.remote.messages import ANSWER_OF, ANSWERS, MAX_FRAME, MAX_MESSAGE, REQUESTS
from rustsim_hpc.remote.server import WorkerLimits
from rustsim_hpc.remote.watch import MOST_UNREAD, MOST_UNREAD_IN_ALL

TEXT = (ROOT / "docs" / "remote.md").read_text(encoding="utf-8")
SMALL = ["--agents", "20000", "--steps", "3", "--no-progress", "--out"]


def free_ports(text: str) -> str:
    """Return a text with each of its ports replaced by one that is free here."""
    for port in sorted(set(re.findall(r"tcp://[^:]+:(\d+)", text))):
        with socket.create_server(("127.0.0.1", 0)) as server:
            text = text.replace(f":{port}", f":{server.getsockname()[1]}")
    return text


@pytest.mark.parametrize("block", re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL), ids=["plain", "keys"])
def test_commands(block: str, tmp_path: Path) -> None:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    workers = []
    try:
        for line in free_ports(block).splitlines():
            program, command, *words = shlex.split(line)
            assert program == "rustsim-hpc"
            if command == "worker" and "--bind" in words:
                bind = words.pop(words.index("--bind") + 1)
                words.remove("--bind")
                workers.append(WorkerProcess(*words, bind=bind, models=(), cwd=tmp_path))
                assert workers[-1].endpoint is not None, workers[-1].told
                continue
            small = [*SMALL, "out"] if command == "run" else []
            done = subprocess.run(
                [sys.executable, "-m", "rustsim_hpc", command, *words, *small],
                cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        assert (tmp_path / "out" / "run.json").exists()
    finally:
        codes = [worker.end() for worker in workers]
    assert codes == [0] * len(workers)


def test_program() -> None:
    [program] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    one = WorkerProcess(models=(ROOT / "jobs" / "particles.py",))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program.replace("tcp://127.0.0.1:5558", one.endpoint)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert one.end() == 0
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"0x[0-9a-f]{16}\n", done.stdout)


def test_table_of_messages() -> None:
    lines = re.findall(r"^\| `\w+` \|.*`\w+` \|.*$", TEXT, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {row[0].strip("`"): row[3].strip("`") for row in rows} == ANSWER_OF
    for kind, fields, _, answer, told, _ in rows:
        assert [name for name in fields.split(", ") if name] == list(REQUESTS[kind.strip("`")])
        assert [name for name in told.split(", ") if name] == list(ANSWERS[answer.strip("`")])


def test_figures() -> None:
    limits = WorkerLimits(0)
    for figure in (
        f"{MAX_FRAME >> 20} MiB",
        f"A message has at most {MAX_MESSAGE >> 20} MiB",
        f"more than {MOST_UNREAD >> 20} MiB",
        f"sent {MOST_UNREAD_IN_ALL >> 30} GiB",
        f"{limits.sessions} sessions",
    ):
        assert figure in " ".join(TEXT.split())
    assert limits.idle_seconds == 3600
