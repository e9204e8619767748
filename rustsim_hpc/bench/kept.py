"""This machine's figures, kept in the user's cache folder for `rustsim-hpc plan`."""

from __future__ import annotations

import json
from pathlib import Path

from rustsim_hpc.bench.report import Report
from rustsim_hpc.files import write_atomic


def cache_path() -> Path:
    """Return where this machine's figures are kept, for `rustsim-hpc plan`."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("rustsim-hpc")) / "bench.json"


def keep(report: Report) -> None:
    """Keep a report as this machine's figures; a cache that cannot be written is no failure."""
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, report.to_json().encode())
    except OSError:
        return


def kept() -> Report | None:
    """Return this machine's figures, None where there are none that can be read."""
    try:
        return Report.from_dict(json.loads(cache_path().read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
