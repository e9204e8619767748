"""The list of a run's outputs, ``outputs.json``, and reading it strictly.

::

    {"format": "rustsim-hpc outputs", "version": 1, "first_step": 0,
     "outputs": [{"file": "curve.csv", "kind": "series", "every": 1, "columns": ["step", "I"]}, …]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from rustsim_hpc.files import read_json
from rustsim_hpc.modeling.outputs import MANIFEST

FORMAT: Final = "rustsim-hpc outputs"
VERSION: Final = 1

_KINDS: Final = ("series", "arrays", "sample", "picture")


@dataclass(frozen=True)
class OutputManifest:
    """The content of ``outputs.json``. first_step: where the outputs begin. entries: one for each file."""

    first_step: int
    entries: Mapping[str, Mapping[str, Any]]

    def kinds(self) -> dict[str, str]:
        """Return file to kind ("series", "arrays", "sample" or "picture")."""
        return {file: str(entry["kind"]) for file, entry in self.entries.items()}


def read_manifest(folder: Path) -> OutputManifest:
    """Return the list of outputs of the run in a folder.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else; the text says what.
    """
    content = read_json(folder / MANIFEST)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError("it is not the list of a run's outputs")
    if (version := content.get("version")) != VERSION or type(version) is not int:
        raise ValueError(f"it has version {version}, expected {VERSION}")
    first_step, outputs = content.get("first_step"), content.get("outputs")
    if type(first_step) is not int or first_step < 0:
        raise ValueError(f"first_step is {first_step!r}")
    if not isinstance(outputs, list):
        raise ValueError("outputs are not a list")
    entries: dict[str, Mapping[str, Any]] = {}
    for number, entry in enumerate(outputs, start=1):
        file = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(file, str) or entry.get("kind") not in _KINDS:
            raise ValueError(f"entry {number} does not have the file and the kind of an output")
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\0" in file or not path.name:
            raise ValueError(f"entry {number} names {file!r}, which is not a file of the run's folder")
        if not _is_described(entry):
            raise ValueError(f"{file!r} does not have the steps and columns of an output")
        if file in entries:
            raise ValueError(f"{file!r} is named twice")
        entries[file] = entry
    return OutputManifest(first_step, entries)


def _is_described(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry has what its kind has, as `output_set.describe` writes it."""
    kind, every, columns = entry["kind"], entry.get("every"), entry.get("columns")
    if kind != "picture" and (type(every) is not int or every < 1):
        return False
    return kind not in ("series", "sample") or (
        isinstance(columns, list) and all(isinstance(name, str) for name in columns)
    )
