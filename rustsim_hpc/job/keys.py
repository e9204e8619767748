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
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

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


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("must be a path, which has no NUL character")
    return value


PathText = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]
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

    module: PathText = _key(
        "the model: a Python file (a path ending in .py, relative to the job file) or an importable module; "
        "it must have a function `model()`",
    )


class RunTable(_Table):
    """How much is run, and by what."""

    name: str = _key("the job's name", "job", shown="the job file's name without .toml", min_length=1)
    agents: Count = _key("number of agents, that is rows of the state")
    steps: Count = _key("step index at which the run ends")
    seed: int = _key("seed of all random numbers", 0, ge=-(2**63), le=2**64 - 1)
    executor: Literal["inline", "threads", "processes", "remote"] = _key(
        "what runs the partitions of a rank on CPUs; `remote`: the workers listed in `[remote]`. (Ranks are "
        "started by mpirun or srun.)",
        "inline",
    )
    workers: Positive | None = _key(
        "threads or worker processes of each rank; `inline` has one, `remote` its share of the endpoints",
        None,
        shown="the available cores, divided among the ranks of the node",
    )
    partitions: Positive | None = _key(
        "number of partitions of all rows; each rank runs a contiguous range of them",
        None,
        shown="one per worker of every rank, or per endpoint",
    )
    guard: Literal["rollback", "torn"] = _key(
        "after a failed step: `rollback` keeps the state before it; `torn` needs half the memory, but the "
        "state must then be restored from a checkpoint",
        "rollback",
    )
    backend: Literal["auto", "cpu", "cuda"] = _key(
        f"where partitions run; `auto` takes the environment variable {BACKEND_VARIABLE} if it is set, "
        "else CUDA if there is a device and CuPy, else the CPU",
        "auto",
    )
    fma: bool = _key(
        "on CUDA, allow fused multiply-add in kernels: faster, but other bits than on the CPU (docs/gpu.md)",
        False,
    )
    cuda_graphs: bool = _key(
        "on CUDA, record repeated work as CUDA graphs, which saves driver calls",
        True,
    )
    share_devices: bool = _key(
        "allow ranks to share a CUDA device where a machine has fewer devices than ranks", False
    )
    memory: Literal["auto", "heap", "shared", "device"] = _key(
        "memory of the columns; `auto`: `shared` under MPI and for worker processes, `device` on CUDA, "
        "else `heap`",
        "auto",
    )
    tile_rows: Annotated[int, Field(ge=4096)] | None = _key(
        "rows of a tile, a power of two", None, shown="from the cache size"
    )
    fuse_steps: Positive = _key(
        "how many steps may be made on one tile of rows before the next tile, where no phase needs other "
        "rows and nothing is due in between (fingerprint, check, output, checkpoint); 1: never",
        16,
    )
    check: bool = _key(
        "compile with bounds checks; NaN or values out of range that become integers are errors", False
    )
    time_limit: Duration | None = _key(
        "wall-clock time after which the run saves a checkpoint and stops (exit code 75)",
        None,
        shown="none; under Slurm, the job's limit",
    )
    watchdog_seconds: Seconds = _key(
        "a rank that makes no progress for longer (in its start, a step or a collective) is reported with "
        "its stack, and the job is ended; between steps, computing may take six times as long, and each "
        "piece of a checkpoint file counts as progress; 0: never",
        600.0,
    )

    _tile_rows = field_validator("tile_rows")(_power_of_two)


class ReplayTable(_Table):
    """What is recorded, and what it is checked against."""

    mode: Literal["off", "record"] = _key(
        "`record`: write the fingerprint of each step to replay.jsonl", "off"
    )
    fingerprint: Literal["digest", "fnv1a"] = _key("fingerprint scheme (docs/fingerprints.md)", "digest")
    interval: Positive = _key("record (or verify) every so many steps", 1)
    verify: PathText | None = _key("a replay.jsonl against which each step is checked", None, shown="none")


class CheckpointTable(_Table):
    """When checkpoints are written, how, and which are kept."""

    every: Count = _key("steps between checkpoints; 0: only at the end, and when the run is stopped", 0)
    min_seconds: Seconds = _key(
        "minimum wall-clock time between checkpoints, in seconds; without `every`, one is made this often",
        0.0,
    )
    keep: Positive = _key("number of newest checkpoints to keep", 3)
    keep_every: Count = _key("also keep every checkpoint whose step is divisible by this; 0: none", 0)
    on_error: Literal["stop", "continue"] = _key(
        "if a checkpoint cannot be written: stop (exit code 5), or warn and continue", "stop"
    )
    layout: Literal["auto", "single", "sharded"] = _key(
        "`single`: one file, written by all ranks; `sharded`: several files and a master that joins them; "
        "`auto`: `single` for one rank, else `sharded`",
        "auto",
    )
    shards: Literal["rank", "node"] = _key("one shard for each rank, or for each node", "rank")
    asynchronous: bool = _key("write while the next steps run", True, alias="async")
    compression: Literal["none", "lzf", "gzip"] = _key("compression of the columns", "none")
    compression_columns: list[str] | None = _key("which columns to compress", None, shown="all")
    chunk_rows: Positive = _key("rows in a chunk of a compressed column", 1 << 18)
    alignment: Alignment = _key(
        "columns of 64 KiB and more start at a multiple of so many bytes in the file; use the block or "
        "stripe size of the file system",
        4096,
    )
    hints: Texts = _key(
        'MPI-IO hints for single files written by parallel HDF5: `hints = { striping_factor = "16" }`',
        {},
        shown="none",
    )


class RemoteTable(_Table):
    """The workers of `executor = "remote"`, and how long they are waited for."""

    endpoints: list[str] = _key(
        "addresses of the workers, as tcp://HOST:PORT; they receive the partitions in this order",
        [],
        shown="none",
    )
    keys: PathText | None = _key(
        "a folder made by `rustsim-hpc worker --make-keys`; required for workers on other machines",
        None,
        shown="none: unencrypted, this machine only",
    )
    connect_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = _key(
        "time limit for connecting to a worker", 10.0
    )
    answer_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = _key(
        "time limit for an answer; the first step includes compilation", 600.0
    )
    retries: Annotated[int, Field(ge=0, le=1_000)] = _key(
        "how often an unanswered request is sent again over a new connection before the worker counts as "
        "dead; also how often, in one request, a restarted worker is sent its rows again",
        1,
    )
    rejoin_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _key(
        "time limit for a broken connection to come back: a worker that died can be restarted at its "
        "endpoint within this time, and the step continues",
        15.0,
    )
    keep_steps: Positive = _key(
        "the state is fetched from the workers every so many steps; at most these steps are computed again "
        "when a worker is lost",
        256,
    )

    @field_validator("endpoints")
    @classmethod
    def _each_once(cls, endpoints: list[str]) -> list[str]:
        for place, endpoint in enumerate(endpoints):
            parse_endpoint(endpoint)
            if endpoint in endpoints[:place]:
                raise ValueError(f"{endpoint} is given twice")
        return endpoints


class CommandTable(_Table):
    """The command line's switches; they belong to one start and are not written to the run's folder."""

    out: PathText | None = _key("the run's folder", None, shown="runs/NAME-TIME")
    force: bool = _key("use a folder that is not empty", False)
    dry_run: bool = _key("print the resolved job and its plan without running it", False)
    no_progress: bool = _key("no progress bar", False)
    profile: bool = _key("print where the time went; also in metrics.jsonl and the JSON line", False)
    json_line: bool = _key("print one line of JSON at the end of standard output", False, alias="json")


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
