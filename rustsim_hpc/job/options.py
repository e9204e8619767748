"""Which command-line option sets which key of the job file.

Only data: the command line needs it before anything heavy is imported, and docs/job_file.md shows it.
"""

from typing import Final

OPTION_KEYS: Final[dict[str, tuple[str, str]]] = {
    "--agents": ("run", "agents"),
    "--steps": ("run", "steps"),
    "--seed": ("run", "seed"),
    "--executor": ("run", "executor"),
    "--workers": ("run", "workers"),
    "--partitions": ("run", "partitions"),
    "--guard": ("run", "guard"),
    "--backend": ("run", "backend"),
    "--endpoint": ("remote", "endpoints"),
    "--keys": ("remote", "keys"),
    "--check": ("run", "check"),
    "--time-limit": ("run", "time_limit"),
    "--record": ("replay", "mode"),
    "--verify": ("replay", "verify"),
    "--fingerprint": ("replay", "fingerprint"),
    "--checkpoint-every": ("checkpoint", "every"),
    "--out": ("command", "out"),
    "--force": ("command", "force"),
    "--dry-run": ("command", "dry_run"),
    "--no-progress": ("command", "no_progress"),
    "--profile": ("command", "profile"),
    "--json": ("command", "json"),
}
"""Option → (table, key). Every other key is set with `--set TABLE.KEY=VALUE`."""

RUN_OPTIONS: Final = (
    "--agents", "--steps", "--seed", "--executor", "--workers", "--partitions", "--guard", "--backend",
    "--endpoint", "--keys", "--check", "--time-limit", "--record", "--verify", "--fingerprint",
    "--checkpoint-every", "--out", "--force", "--dry-run", "--no-progress", "--profile", "--json",
)  # fmt: skip
"""Options of `run`, in the order of its help."""

RESUME_OPTIONS: Final = (
    "--steps", "--executor", "--workers", "--partitions", "--guard", "--backend", "--endpoint", "--keys",
    "--check", "--time-limit", "--checkpoint-every", "--no-progress", "--profile", "--json",
)  # fmt: skip
"""Options of `resume`."""

FORK_OPTIONS: Final = (
    "--steps", "--seed", "--executor", "--workers", "--partitions", "--guard", "--backend", "--endpoint",
    "--keys", "--check", "--time-limit", "--record", "--fingerprint", "--checkpoint-every", "--out",
    "--force", "--no-progress", "--profile", "--json",
)  # fmt: skip
"""Options of `fork`."""
