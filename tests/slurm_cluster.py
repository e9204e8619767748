"""A real Slurm of one machine in a temporary folder, which cannot outlive the process that asked for it.

The daemons are children of a keeper, this file run as a program. It holds a pipe to whoever started it: when
the pipe closes, because the cluster is stopped or because its user was killed, the keeper ends every process
below it, jobs included. As a subreaper it also inherits those that make themselves daemons (slurmstepd).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

# What the scripts of slurm/ ask for, whatever this machine has.
NODES, CORES, GPUS, MEMORY = 2, 32, 4, 200_000
_PR_SET_CHILD_SUBREAPER = 36
# A GPU must be a device to Slurm; which one is the same to it.
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")


def why_not() -> str | None:
    """Return why no Slurm can be had here, or None."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "srun", "sbatch") if _program(name) is None]
    if missing:
        return f"needs a Slurm: {', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "needs root, to start a Slurm"


def open_mpi() -> Path | None:
    """Return Debian's Open MPI library, None where it or Slurm's door to it is missing."""
    libraries = sorted(Path("/usr/lib").glob("*/libmpi.so.40"))
    # Slurm loads PMIx by the name that only its development package has.
    pmix = sorted(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so"))
    return libraries[0] if libraries and pmix else None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def configuration(folder: Path) -> str:
    """Return slurm.conf for a cluster of NODES simulated nodes, more cores than there are, and no cgroups."""
    ports = [_free_port() for _ in range(NODES + 1)]
    nodes = [
        f"NodeName=node{k} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={ports[k]} "
        f"CPUs={CORES} RealMemory={MEMORY} Gres=gpu:{GPUS}"
        for k in range(1, NODES + 1)
    ]
    return "\n".join(
        [
            "ClusterName=rustsim",
            f"SlurmctldHost={socket.gethostname()}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            # A requeued job waits as long as a credential may live: two minutes, unless it is told.
            f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool-%n",
            # MPICH names shared memory after the job's number, and a killed job leaves its own behind.
            f"FirstJobId={1000 + secrets.randbelow(10**6)}",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            # Two nodes of one machine must not meet in /tmp.
            f"TmpFS={folder}/local-%n",
            f"SlurmdPidFile={folder}/slurmd-%n.pid",
            f"SlurmctldLogFile={folder}/slurmctld.log",
            f"SlurmdLogFile={folder}/slurmd-%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core_Memory",
            "DefMemPerCPU=100",
            "SlurmdParameters=config_overrides",
            "MpiDefault=pmi2",
            "ReturnToService=2",
            "JobRequeue=1",
            "KillWait=10",
            "GresTypes=gpu",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,defer",
            *nodes,
            "PartitionName=main Nodes=ALL Default=YES State=UP OverSubscribe=NO MaxTime=INFINITE",
            "",
        ]
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Cluster:
    """A running cluster; `stop` ends it.

    env: what its commands (sbatch, srun, scontrol …) need in their environment.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "slurm.conf").write_text(configuration(folder))
        gpus = "".join(f"Name=gpu File={device}\n" for device in _DEVICES[:GPUS])
        (folder / "gres.conf").write_text(gpus)
        self.env = {**_clean(os.environ), "SLURM_CONF": str(folder / "slurm.conf")}
        with (folder / "keeper.log").open("wb") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, __file__, str(folder)],
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_idle()
        except BaseException:
            self.stop()
            raise

    def run(
        self, *words: str | Path, cwd: Path | None = None, timeout: float = 60, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, one of Slurm's or any other; it may fail."""
        return subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env={**self.env, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    def stop(self) -> None:
        """End all daemons and jobs."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait(timeout=30)

    def logs(self) -> str:
        """Return the end of what the daemons wrote."""
        return "\n".join(
            f"{path.name}:\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self._keeper.poll() is None:
            found = self.run("sinfo", "--noheader", "--Node", "--format=%T")
            if found.stdout.split() == ["idle"] * NODES:
                return
            time.sleep(0.2)
        raise RuntimeError(f"the Slurm of the tests did not start:\n{self.logs()}")


def _clean(environ: Any) -> dict[str, str]:
    prefixes = ("SLURM_", "SBATCH_", "PMI_", "OMPI_")
    return {name: value for name, value in environ.items() if not name.startswith(prefixes)}


# -- the keeper ---------------------------------------------------------------------------------------


def keep(folder: Path) -> None:
    """Start the daemons, wait until standard input closes, end everything below this process."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    (folder / "state").mkdir()
    try:
        munged = [f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"]
        _start(
            "munged",
            "--foreground",
            "--force",
            *munged,
            f"--seed-file={folder}/seed",
            f"--log-file={folder}/munged.log",
        )
        while not (folder / "munge.socket").exists():
            time.sleep(0.05)
        _start("slurmctld", "-D", "-i")
        for node in range(1, NODES + 1):
            (folder / f"local-node{node}").mkdir()
            _start("slurmd", "-D", "-N", f"node{node}")
        sys.stdin.buffer.read()
    finally:
        _end_all()


def _start(name: str, *arguments: str) -> None:
    subprocess.Popen([_program(name) or name, *arguments], stdin=subprocess.DEVNULL)


def _end_all() -> None:
    """Kill all descendants until there are none: a process may fork while the list is made."""
    me = psutil.Process()
    deadline = time.monotonic() + 20
    while (below := me.children(recursive=True)) and time.monotonic() < deadline:
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
