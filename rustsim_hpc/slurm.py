"""Batch scripts for Slurm: the templates of ``slurm/`` with a job's values filled in.

The templates are scripts that can be run unchanged; filling in changes only the introductory comment,
``#SBATCH`` lines, defaults of the form ``NAME=${NAME:-value}``, and options of the engine.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
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
# A minimum, since Slurm also counts the page cache of written files; rounded for readability. In MiB.
_LEAST_PER_CORE, _ROUND_TO = 256, 64


@dataclass(frozen=True)
class Request:
    """The resources that a script requests from Slurm; None keeps the template's value.

    nodes, ntasks_per_node, cpus_per_task, gpus_per_node: counts. time, partition, account, array: in sbatch's
    format. out: the run's folder. sets: keys of the job file, "TABLE.KEY=VALUE".
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
    sets: tuple[str, ...] = ()


def template(kind: Kind) -> str:
    """Return the template of ``slurm/`` for this kind of run."""
    package = Path(__file__).parent
    # In a wheel the templates are in the package; in a checkout, in the folder slurm/.
    folder = package / "slurm_scripts"
    if not folder.is_dir():
        folder = package.parent / "slurm"
    return (folder / f"{kind}.sbatch").read_text(encoding="utf-8")


def shape(request: Request, spec: JobSpec) -> tuple[int, int, int]:
    """Return nodes, tasks per node and cores per task: as requested, else from the job or the template."""
    text = template(request.kind)
    cores = request.cpus_per_task or spec.run.workers
    # One rank per GPU.
    tasks = request.gpus_per_node or request.ntasks_per_node
    return (
        request.nodes or int(directive(text, "nodes")),
        tasks or int(directive(text, "ntasks-per-node")),
        cores or int(directive(text, "cpus-per-task")),
    )


def rank_memory(spec: JobSpec, plan: RunPlan, workers: int) -> int:
    """Return the bytes that the largest rank of a plan needs, with a margin; tables are not counted.

    Counted are the state, its second buffers, the copy that an asynchronous checkpoint is written from, and
    the processes themselves.
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
        plan: the plan for the number of ranks that `shape` gives.
        request: the resources to request.
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
    """Replace the template's introductory comment by a description of the job."""
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
    """Return the script with ``#SBATCH --name`` changed, or added after the last ``#SBATCH`` line."""
    line = f"#SBATCH --{name}={value}"
    changed, count = re.subn(rf"^#SBATCH --{name}=.*$", lambda _: line, text, flags=re.MULTILINE)
    if count:
        return changed
    head, last, tail = text.rpartition("#SBATCH ")
    rest, newline, after = tail.partition("\n")
    return f"{head}{last}{rest}{newline}{line}\n{after}"


def with_default(text: str, name: str, value: str) -> str:
    """Return the script with the default of an environment variable changed."""
    line = f"{name}=${{{name}:-{shlex.quote(value)}}}"
    changed, count = re.subn(rf"^{name}=\$\{{{name}:-.*\}}$", lambda _: line, text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"the script has no default of {name}")
    return changed


def _environment() -> str | None:
    """Return the virtual environment of this process, or None."""
    return sys.prefix if (Path(sys.prefix) / "bin" / "activate").is_file() else None


def seconds_of(limit: str) -> int | None:
    """Return the seconds of a time limit in sbatch's format, or None if it is invalid.

    The format is minutes[:seconds], hours:minutes:seconds, or days-hours[:minutes[:seconds]].
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit, re.ASCII)
    if found is None:
        return None
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] is not None or found[4] is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second


def _warning(text: str, limit: str | None) -> str | None:
    """Return ``--signal`` for a time limit, with a shorter warning time if the limit is short."""
    seconds = None if limit is None else seconds_of(limit)
    if seconds is None:
        return None
    signal, _, ahead = directive(text, "signal").rpartition("@")
    return f"{signal}@{min(int(ahead), max(1, seconds // 4))}"


def tasks_of(array: str) -> bool:
    """Return whether a text is valid for sbatch's --array: 1-20, 0-9:3, 1,4,7-9; %5: five at a time."""
    found = re.fullmatch(r"([\d,:-]+?)(?:%[1-9]\d*)?", array, re.ASCII)
    if found is None:
        return False
    for part in found[1].split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+)(?::[1-9]\d*)?)?", part, re.ASCII)
        if ends is None or (ends[2] is not None and int(ends[2]) < int(ends[1])):
            return False
    return True


def unfit_word(values: Mapping[str, str | None]) -> str | None:
    """Return the first option whose value is not a single word that Slurm accepts, or None."""
    for name, value in values.items():
        if value is not None and not re.fullmatch(r"[\w.,:%+@/=-]+", value):
            return name
    return None
