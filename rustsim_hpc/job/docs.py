"""The job file's reference, made from its declarations: `python -m rustsim_hpc.job.docs docs/job_file.md`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

from rustsim_hpc.job.key_errors import fields_of, kind_of, toml_value
from rustsim_hpc.job.keys import JobSpec, job_tables
from rustsim_hpc.job.options import OPTION_KEYS

_HEAD: Final = """\
# The job file

A job is a TOML file: which model, which values of its parameters, how many agents and steps, and how it is
run. A key or table that is not in the list below is refused, with the nearest one that is; so is a value of
another type or out of its bounds. Paths are relative to the job file's folder.

```toml
[model]
module = "flock.py"

[params]
dt = 0.5

[run]
agents = 1_000_000
steps = 100
seed = 1
executor = "threads"
workers = 2

[replay]
mode = "record"

[checkpoint]
every = 50
```

Where the list names an option, the command line sets the key with it; `--set TABLE.KEY=VALUE` sets any key,
with the value as TOML writes it: `--set params.dt=0.1 --set checkpoint.keep=5`. Paths given on the command
line are relative to the working directory. The run's folder keeps the job as resolved in `job.toml`, without
the table `[command]`, which belongs to one start. The model, `[params]`, `agents` and `seed` decide the bits
of a run; everything else decides how it is computed and what is kept.

| key | type | default | meaning | option |
| --- | --- | --- | --- | --- |
"""


def job_file_markdown() -> str:
    """Return docs/job_file.md: one row for each key."""
    return _HEAD + "".join(
        _row(table, key, schema) for table, keys in job_keys().items() for key, schema in keys.items()
    )


def job_keys() -> dict[str, dict[str, dict[str, Any]]]:
    """Return table → key → JSON schema of every key; `[params]` has the one key NAME."""
    result = {table: fields_of(model) for table, model in job_tables().items()}
    meaning = JobSpec.model_fields["params"].description
    result["params"] = {
        "NAME": {"kind": "number, true or false, text", "shown": "the model's", "description": meaning}
    }
    return result


def _row(table: str, key: str, schema: dict[str, Any]) -> str:
    default = schema.get("shown")
    if default is None:
        default = f"`{toml_value(schema['default'])}`" if "default" in schema else "required"
    options = [option for option, target in OPTION_KEYS.items() if target == (table, key)]
    option = f"`{options[0]}`" if options else ""
    kind = kind_of(schema).replace("|", "\\|")
    return f"| `{table}.{key}` | {kind} | {default} | {schema['description']} | {option} |\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(job_file_markdown(), encoding="utf-8")
