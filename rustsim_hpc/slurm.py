"""Batch scripts for Slurm: the scripts of ``slurm/``, with what a job needs filled in.

The scripts are ordinary ones that run as they are; filling in changes ``#SBATCH`` lines, defaults of the form
``NAME=${NAME:-value}``, and the options of the engine, and nothing else.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from rustsim_hpc.job.keys import JobSpec
from rustsim_hpc.job.plan import RunPlan, size

Kind = Literal["cpu", "gpu", "requeue", "ensemble"]

# Python, NumPy, Numba, HDF5, MPI and Matplotlib in a rank that has compiled a model: 300 MiB were measured,
# and 230 in a worker process.
_RANK_BYTES: Final = 400 << 20
_WORKER_BYTES: Final = 250 << 20
_MARGIN: Final = 1.25
_MIB: Final = 1 << 20
# Slurm counts the page cache of files being written, too; and a round number is easier to change.
_LEAST_PER_CORE, _ROUND_TO = 256, 64


@dataclass(frozen=True)
class Request:
    """What a script asks of Slurm; None leaves what the template has.

    nodes, ntasks_per_node, cpus_per_task, gpus_per_node: counts. time, partition, account, array: as sbatch
    takes them. out: the run's folder. sets: keys of the job file, "TABLE.KEY=VALUE".
    """

    kind: Kind = "cpu"
    nodes: int | None = None
    ntasks_per_node: int | None = None
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    array: str | None = None
    out: str | None = None
    sets: tuple[str, ...] = field(default=())


def template(kind: Kind) -> str:
    """Return the script of ``slurm/`` that does this kind of run."""
    package = Path(__file__).parent
    # In a wheel they lie in the package; in a checkout where their readers look for them.
    folder = package / "slurm_scripts"
    if not folder.is_dir():
        folder = package.parent / "slurm"
    return (folder / f"{kind}.sbatch").read_text(encoding="utf-8")


def shape(request: Request, spec: JobSpec) -> tuple[int, int, int]:
    """Return nodes, tasks a node and cores a task: as asked for, else the job's workers or the template's."""
    text = template(request.kind)
    cores = request.cpus_per_task or spec.run.workers
    # One rank a GPU.
    tasks = request.gpus_per_node or request.ntasks_per_node
    return (
        request.nodes or int(directive(text, "nodes")),
        tasks or int(directive(text, "ntasks-per-node")),
        cores or int(directive(text, "cpus-per-task")),
    )


def rank_memory(spec: JobSpec, plan: RunPlan, workers: int) -> int:
    """Return the bytes that the largest rank of a plan needs, with room to spare; tables are not counted.

    State, its second buffers, the copy that a checkpoint is written from, and the processes themselves.
    """
    largest = max(
        share.state_bytes + share.undo_bytes + (share.checkpoint_bytes if spec.checkpoint.asynchronous else 0)
        for share in plan.shares
    )
    processes = _RANK_BYTES + (workers * _WORKER_BYTES if spec.run.executor == "processes" else 0)
    return math.ceil(_MARGIN * largest) + processes


def script(job: Path, spec: JobSpec, plan: RunPlan, request: Request) -> str:
    """Return a batch script that runs a job.

    Args:
        job: the job file.
        spec: the job as resolved.
        plan: of the ranks that `shape` gives.
        request: what to ask of Slurm.
    """
    nodes, tasks, cores = shape(request, spec)
    memory = rank_memory(spec, plan, cores)
    per_core = max(_LEAST_PER_CORE, math.ceil(memory / cores / _MIB / _ROUND_TO) * _ROUND_TO)
    text = template(request.kind)
    for name, value in {
        "job-name": re.sub(r"[^\w.+-]+", "-", spec.run.name),
        "nodes": nodes,
        "gpus-per-node": tasks if request.kind == "gpu" else None,
        "ntasks-per-node": tasks,
        "cpus-per-task": cores,
        "mem-per-cpu": f"{per_core}M",
        "time": request.time,
        "signal": _warning(text, request.time),
        "partition": request.partition,
        "account": request.account,
        "array": request.array,
    }.items():
        if value is not None:
            text = with_directive(text, name, str(value))
    defaults = {"JOB": str(job.absolute()), "OUT": request.out, "VENV": _environment()}
    for name, path in defaults.items():
        if path is not None:
            text = with_default(text, name, path)
    if request.sets:
        words = " ".join(shlex.quote(f"--set={given}") for given in request.sets)
        text = text.replace('"$@")', f'{words} "$@")')
    executor = spec.run.executor if spec.run.executor != "inline" or cores == 1 else "threads"
    text = text.replace("--executor threads", f"--executor {executor}")
    return _with_header(text, job, plan, memory)


def _with_header(text: str, job: Path, plan: RunPlan, memory: int) -> str:
    """Put what the script is for in the place of the template's introduction."""
    first, rest = text.split("\n", 1)
    rest = re.sub(r"\A(?:#(?!SBATCH).*\n)+", "", rest)
    rows, disk = max(share.rows for share in plan.shares), size(plan.checkpoint_bytes)
    lines = [
        first,
        f"# {_one_line(plan.job)} ({_one_line(str(job))}): {plan.agents:,} agents on {plan.ranks:,} ranks,",
        f"# {rows:,} rows and about {size(memory)} of memory each; {disk} on disk for a checkpoint.",
        "# Submit it from a folder that all nodes see; OUT=DIR sbatch SCRIPT continues the run in DIR.",
        "# Exit code 75: the time limit was reached and a checkpoint is saved.",
    ]
    return "\n".join([*lines, rest])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def directive(text: str, name: str) -> str:
    """Return the value of a script's ``#SBATCH --name=value``."""
    found = re.search(rf"^#SBATCH --{name}=(\S+)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the script has no #SBATCH --{name}")
    return found[1]


def with_directive(text: str, name: str, value: str) -> str:
    """Return the script with another value of ``#SBATCH --name``, or with that line behind the last one."""
    line = f"#SBATCH --{name}={value}"
    changed, count = re.subn(rf"^#SBATCH --{name}=.*$", lambda _: line, text, flags=re.MULTILINE)
    if count:
        return changed
    head, last, tail = text.rpartition("#SBATCH ")
    rest, newline, after = tail.partition("\n")
    return f"{head}{last}{rest}{newline}{line}\n{after}"


def with_default(text: str, name: str, value: str) -> str:
    """Return the script with another default of a variable that the environment may set."""
    line = f"{name}=${{{name}:-{shlex.quote(value)}}}"
    changed, count = re.subn(rf"^{name}=\$\{{{name}:-.*\}}$", lambda _: line, text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"the script has no default of {name}")
    return changed


def _environment() -> str | None:
    """Return the virtual environment that this process is of, None outside of any."""
    return sys.prefix if (Path(sys.prefix) / "bin" / "activate").is_file() else None


def seconds_of(limit: str) -> int | None:
    """Return the seconds of a time limit as sbatch takes it, None where it is none.

    minutes[:seconds], hours:minutes:seconds, or days-hours[:minutes[:seconds]].
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit, re.ASCII)
    if found is None:
        return None
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] is not None or found[4] is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second


def _warning(text: str, limit: str | None) -> str | None:
    """Return a script's ``--signal`` for a time limit: a job must not be warned as soon as it has begun."""
    seconds = None if limit is None else seconds_of(limit)
    if seconds is None:
        return None
    signal, _, ahead = directive(text, "signal").rpartition("@")
    return f"{signal}@{min(int(ahead), max(1, seconds // 4))}"


def tasks_of(array: str) -> bool:
    """Return whether a text names tasks as sbatch takes them: 1-20, 0-9:3, 1,4,7-9; %5: five at a time."""
    found = re.fullmatch(r"([\d,:-]+?)(?:%[1-9]\d*)?", array, re.ASCII)
    if found is None:
        return False
    for part in found[1].split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+)(?::[1-9]\d*)?)?", part, re.ASCII)
        if ends is None or (ends[2] is not None and int(ends[2]) < int(ends[1])):
            return False
    return True


def unfit_word(values: Mapping[str, str | None]) -> str | None:
    """Return the first option whose value is no single word that Slurm could take, or None."""
    for name, value in values.items():
        if value is not None and not re.fullmatch(r"[\w.,:%+@/=-]+", value):
            return name
    return None
