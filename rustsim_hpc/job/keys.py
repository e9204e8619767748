"""The keys of a job file, each declared once: its type, its bounds, its default and its meaning.

The command line's options are overrides of keys; the table in docs/job_file.md is made from these
declarations, and so are the error texts. A key that is not declared is refused, with the nearest one that is.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Annotated, Any, Final, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from rustsim_hpc.remote.addresses import parse_endpoint

ParamValue = bool | int | float | str

BACKEND_VARIABLE: Final = "RUSTSIM_BACKEND"
_INT64_MAX: Final = 2**63 - 1
_CLOCK: Final = re.compile(r"(?:(?P<d>\d+)-)?(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+(?:\.\d+)?)")
_UNITS: Final = re.compile(
    r"(?=\d)(?:(?P<d>\d+)d)?\s*(?:(?P<h>\d+)h)?\s*(?:(?P<m>\d+)m(?:in)?)?\s*(?:(?P<s>\d+(?:\.\d+)?)s?)?"
)


def parse_duration(value: object) -> object:
    """Turn "90", "90s", "1h30m", "01:30:00" or "1-00:00:00" into seconds; leave anything else as it is."""
    if not isinstance(value, str):
        return value
    match = _CLOCK.fullmatch(value) or _UNITS.fullmatch(value)
    if match is None:
        return value
    days, hours, minutes, seconds = (float(match[name] or 0) for name in "dhms")
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _power_of_two(value: int | None) -> int | None:
    if value is not None and value & (value - 1):
        raise ValueError("must be a power of two")
    return value


Count = Annotated[int, Field(ge=0, le=_INT64_MAX)]
Positive = Annotated[int, Field(ge=1, le=_INT64_MAX)]
Alignment = Annotated[int, Field(ge=1, le=1 << 26, json_schema_extra={"kind": "integer from 1 to 67108864"})]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Duration = Annotated[
    Seconds,
    BeforeValidator(parse_duration),
    Field(json_schema_extra={"kind": 'seconds ≥ 0, or a text such as "90s", "1h30m", "01:30:00"'}),
]


Texts = Annotated[dict[str, str], Field(json_schema_extra={"kind": "table of texts"})]


def _key(meaning: str, default: Any = ..., *, shown: str | None = None, **more: Any) -> Any:
    """Declare one key; `shown` is what the docs give as its default where that is not a plain value."""
    if shown:
        more["json_schema_extra"] = {"shown": shown}
    return Field(default, description=meaning, **more)


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelTable(_Table):
    """Which model the job runs."""

    module: str = _key(
        "the model: a Python file (path ending in .py, relative to the job file) or an importable name; "
        "it has a function `model()`",
        min_length=1,
    )


class RunTable(_Table):
    """How much is run, and by what."""

    name: str = _key("the job's name", "job", shown="the job file's name without .toml", min_length=1)
    agents: Count = _key("number of rows of the state")
    steps: Count = _key("step index to reach")
    seed: int = _key("seed of all random numbers", 0, ge=-(2**63), le=2**64 - 1)
    executor: Literal["inline", "threads", "processes", "remote"] = _key(
        "what runs a rank's partitions on CPUs; ranks come from the launcher (mpirun, srun); `remote`: the "
        "workers of `[remote]`",
        "inline",
    )
    workers: Positive | None = _key(
        "threads or worker processes of a rank; `inline` has one, `remote` its part of the endpoints",
        None,
        shown="the cores this rank may use, shared among the node's ranks",
    )
    partitions: Positive | None = _key(
        "partitions of the state's rows; each rank runs a contiguous part of them",
        None,
        shown="one per worker of every rank, or per endpoint",
    )
    guard: Literal["rollback", "torn"] = _key(
        "what a failed step leaves: `rollback`: the state before it; `torn`: a state that only a restore "
        "mends, for half the memory",
        "rollback",
    )
    backend: Literal["auto", "cpu", "cuda"] = _key(
        f"where partitions run; `auto` asks the environment's {BACKEND_VARIABLE}, then takes CUDA where a "
        "device and CuPy are",
        "auto",
    )
    fma: bool = _key(
        "on CUDA, let products and sums of a kernel be fused: faster, and not the CPU's bits (docs/gpu.md)",
        False,
    )
    cuda_graphs: bool = _key(
        "on CUDA, make what is queued in the same way each step a graph: fewer calls of the driver",
        True,
    )
    share_devices: bool = _key("let ranks of a machine with fewer CUDA devices than ranks share them", False)
    memory: Literal["auto", "heap", "shared", "device"] = _key(
        "where columns live; `auto`: `shared` under MPI and for worker processes, `device` on CUDA, "
        "else `heap`",
        "auto",
    )
    tile_rows: Annotated[int, Field(ge=4096)] | None = _key(
        "rows of a tile, a power of two", None, shown="by the size of the cache"
    )
    fuse_steps: Positive = _key(
        "so many steps at most are made on a tile of rows before the next tile, where nothing between them "
        "is due and no phase needs the rest of the world; 1: never",
        16,
    )
    check: bool = _key(
        "compile with bounds checks, and refuse NaN or values out of range where they become integers", False
    )
    time_limit: Duration | None = _key(
        "wall-clock time after which the run saves a checkpoint and stops (exit code 75)",
        None,
        shown="none; Slurm's own",
    )
    watchdog_seconds: Seconds = _key(
        "a rank that stays in its start, a step or a collective for longer is reported with its stack and "
        "ends the job; 0: never",
        600.0,
    )

    _tile_rows = field_validator("tile_rows")(_power_of_two)


class ReplayTable(_Table):
    """What is recorded, and what it is checked against."""

    mode: Literal["off", "record"] = _key("whether each step's fingerprint is written to replay.jsonl", "off")
    fingerprint: Literal["digest", "fnv1a"] = _key("scheme of the fingerprints", "digest")
    interval: Positive = _key("steps from one recorded fingerprint to the next", 1)
    verify: str | None = _key("a replay.jsonl to check each step against", None, shown="none", min_length=1)


class CheckpointTable(_Table):
    """When checkpoints are written, how, and which are kept."""

    every: Count = _key("steps between checkpoints; 0: only at the end and on signals", 0)
    min_seconds: Seconds = _key("wall-clock time that must have passed since the last one", 0.0)
    keep: Positive = _key("how many of the newest stay", 3)
    keep_every: Count = _key("checkpoints of steps divisible by it stay for ever; 0: none does", 0)
    on_error: Literal["stop", "continue"] = _key(
        "after a checkpoint that cannot be written: stop (exit code 5), or warn and go on", "stop"
    )
    layout: Literal["auto", "single", "sharded"] = _key(
        "`single`: one file written by all ranks; `sharded`: several under one master; `auto`: `single` for "
        "one rank, else `sharded`",
        "auto",
    )
    shards: Literal["rank", "node"] = _key(
        "a shard for each rank, or for all ranks of a node together", "rank"
    )
    asynchronous: bool = _key("write behind the running steps", True, alias="async")
    compression: Literal["none", "lzf", "gzip"] = _key("filter of the columns", "none")
    compression_columns: list[str] | None = _key("columns that are compressed", None, shown="all")
    chunk_rows: Positive = _key("rows of a chunk of a compressed column", 1 << 18)
    alignment: Alignment = _key(
        "bytes; columns of 64 KiB and more start at a multiple of it in their file: the block or stripe size "
        "of the file system",
        4096,
    )
    hints: Texts = _key(
        "MPI-IO hints by name, for single files that parallel HDF5 writes: "
        '`hints = { striping_factor = "16" }`',
        {},
        shown="none",
    )


class RemoteTable(_Table):
    """The workers of `executor = "remote"`, and how long they are waited for."""

    endpoints: list[str] = _key(
        "where workers listen, as tcp://HOST:PORT; the partitions are dealt out to them in this order",
        [],
        shown="none",
    )
    keys: str | None = _key(
        "a folder made by `rustsim-hpc worker --make-keys`; needed for workers beyond the loopback",
        None,
        shown="none: plain connections on the loopback",
        min_length=1,
    )
    connect_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = _key(
        "until a connection to a worker must stand", 10.0
    )
    answer_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = _key(
        "until a worker must have answered; compiling is part of its first step", 600.0
    )
    retries: Annotated[int, Field(ge=0, le=1_000)] = _key(
        "how often an unanswered request is sent again, over a fresh connection, before its worker counts as "
        "dead, and how often in a request a worker that was started anew is brought its rows again",
        1,
    )
    rejoin_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _key(
        "until a connection that broke must stand again: a worker that has died may be started anew at its "
        "endpoint meanwhile, and the step goes on",
        15.0,
    )
    keep_steps: Positive = _key(
        "after so many steps the state is fetched from the workers; no more than these have to be made again "
        "when one is lost",
        256,
    )

    @field_validator("endpoints")
    @classmethod
    def _each_once(cls, endpoints: list[str]) -> list[str]:
        for place, endpoint in enumerate(endpoints):
            parse_endpoint(endpoint)
            if endpoint in endpoints[:place]:
                raise ValueError(f"{endpoint} stands twice: a worker is named once")
        return endpoints


class CommandTable(_Table):
    """The command line's switches; they belong to one start and are not written to the run's folder."""

    out: str | None = _key("the run's folder", None, shown="runs/NAME-TIME", min_length=1)
    force: bool = _key("use a folder that is not empty", False)
    dry_run: bool = _key("print the resolved job and its plan, and run nothing", False)
    no_progress: bool = _key("no progress bar", False)
    profile: bool = _key(
        "end with a table of where the time went; metrics.jsonl and the line of JSON have it too", False
    )
    json_line: bool = _key("end standard output with one line of JSON", False, alias="json")


class JobSpec(_Table):
    """A job as resolved: what a run's folder keeps as job.toml. Frozen; compares by value."""

    model: ModelTable
    params: dict[str, ParamValue] = Field(
        default={},
        description="the value of the model's parameter NAME",
        json_schema_extra={"shown": "the model's"},
    )
    run: RunTable
    replay: ReplayTable = ReplayTable()
    checkpoint: CheckpointTable = CheckpointTable()
    remote: RemoteTable = RemoteTable()

    @field_validator("params", mode="before")
    @classmethod
    def _scalars(cls, params: object) -> object:
        for name, value in params.items() if isinstance(params, dict) else ():
            if not isinstance(value, ParamValue):
                raise ValueError(f"{name}: must be one number, true, false or text, not {value!r}")
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{name}: must be a number, not nan")
        return params

    def to_toml(self) -> str:
        """Return the job as TOML text that reads back equal; a key without a value is left out."""
        return tomli_w.dumps(self.model_dump(by_alias=True, exclude_none=True))

    def sha256(self) -> str:
        """Return the hash by which ranks find out that they read different jobs (64 hex digits)."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()


def job_tables() -> dict[str, Any]:
    """Return the tables of a job file by name, in the order in which docs give them."""
    return {
        **{name: field.annotation for name, field in JobSpec.model_fields.items()},
        "command": CommandTable,
    }
