"""The job file's reference, generated from its keys: `python -m rustsim_hpc.job.docs docs/job_file.md`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

from rustsim_hpc.job.key_errors import fields_of, kind_of, toml_value
from rustsim_hpc.job.keys import JobSpec, job_tables
from rustsim_hpc.job.options import OPTION_KEYS

_HEAD: Final = """\
# The job file

A job is a TOML file: which model, the values of its parameters, how many agents and steps, and how to run it.
Unknown keys and tables are refused, and so are values of the wrong type or out of bounds; the message
suggests the nearest name. Paths are relative to the folder of the job file.

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

The last column of the table names the command-line option that sets the key. `--set TABLE.KEY=VALUE` sets any
key, with the value written as in TOML: `--set params.dt=0.1 --set checkpoint.keep=5`. Paths on the command
line are relative to the working directory.

The folder of a run keeps the resolved job in `job.toml`, without the table `[command]`, which is for one
start only. The model, `[params]`, `agents` and `seed` determine the bits of a run. All other keys determine
how it is computed and what is kept.

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
