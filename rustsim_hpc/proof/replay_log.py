"""The recorded stream as a file, `replay.jsonl`: its format, reading it, and comparing two.

::

    {"format": "rustsim-hpc replay", "version": 1, "scheme": "digest", "scheme_version": 1, "job": "flock",
     "model": "9f86…", "agents": 1000, "seed": 1, "interval": 1, "params": {"dt": 0.5},
     "columns": [{"name": "x", "dtype": "float32"}, …], "notes": []}
    {"step": 1, "value": "0x4c5f…", "columns": {"ids": "0x…", "x": "0x…"}}
    {"step": 2, …

The header is one line, and each entry is one. An entry's `columns` are the digest's values per column
(docs/fingerprints.md); `fnv1a` has none. An incomplete last line, left by a killed process, is ignored. Any
other line that does not have this format is an error that names the line. An entry of the digest with columns
is verified, since its value follows from them. `replay_writer` writes logs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rustsim_hpc.errors import ReplayLogError
from rustsim_hpc.files import parse_json, whole_lines
from rustsim_hpc.proof.fingerprint import SCHEMES, digest_value, hex64
from rustsim_hpc.proof.replay import ReplayEntry, ReplayMode
from rustsim_hpc.state.schema import DTYPES

FORMAT = "rustsim-hpc replay"
VERSION = 1
SCHEME_VERSION = 1
IDS = "ids"

_HEX64 = re.compile(r"0x[0-9a-f]{16}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ReplayHeader:
    """The run that a stream was recorded from.

    scheme: of the fingerprints. job, model: identities, equal for the same job and the same model source.
    agents: rows of the whole state. seed: of the run. interval: steps between entries. params: the model's
    resolved parameters. columns: (name, dtype name) in schema order. notes: reasons why other runs may have
    another stream, such as a column phase that reads a whole partition. first_step: the step index at which
    recording began, so that entries start after it; None in logs of earlier versions.

    Raises:
        ReplayLogError: a column is named "ids", which in a log means the rows' ids.
    """

    scheme: str
    job: str
    model: str
    agents: int
    seed: int
    columns: tuple[tuple[str, str], ...]
    interval: int = 1
    params: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    first_step: int | None = None

    def __post_init__(self) -> None:
        if IDS in dict(self.columns):
            raise ReplayLogError(
                f'a column named "{IDS}" cannot be recorded: the name stands for the rows\' ids'
            )

    @property
    def value_names(self) -> tuple[str, ...]:
        """Names of an entry's values: "ids", then the columns."""
        return (IDS, *(name for name, _ in self.columns))

    def line(self) -> bytes:
        """Return the header as the log's first line."""
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "scheme": self.scheme,
            "scheme_version": SCHEME_VERSION,
            "job": self.job,
            "model": self.model,
            "agents": self.agents,
            "seed": self.seed,
            "interval": self.interval,
            "params": dict(self.params),
            "columns": [{"name": name, "dtype": dtype} for name, dtype in self.columns],
            "notes": list(self.notes),
            **({} if self.first_step is None else {"first_step": self.first_step}),
        }
        return json.dumps(facts, ensure_ascii=False).encode() + b"\n"


@dataclass(frozen=True)
class ReplayLog:
    """A log as read: path, header, and the entries of all whole lines, in step order."""

    path: Path
    header: ReplayHeader
    entries: tuple[ReplayEntry, ...]

    def verify_mode(self) -> ReplayMode:
        """Return the replay mode that verifies a run against this log."""
        return ReplayMode.verify(self.entries, self.header.interval)

    def missing_step(self, last: int | None = None) -> int | None:
        """Return the first step that lacks its entry, up to `last` (None: the last entry's), or None."""
        steps = [entry.step_index for entry in self.entries]
        interval, first = self.header.interval, self.header.first_step
        if last is None:
            last = steps[-1] if steps else -1
        begins = steps[:1] if first is None else [(first // interval + 1) * interval, *steps[:1]]
        known = set(steps)
        due = range(min(begins, default=last + 1), last + 1, interval)
        return next((step for step in due if step not in known), None)


def read_replay_log(path: Path) -> ReplayLog:
    """Read a log, also while it is being written; an incomplete last line is ignored.

    Raises:
        ReplayLogError: it cannot be read, or a complete line is invalid; names the line.
    """
    try:
        lines = whole_lines(path)
        header = _parsed(path, 1, next(lines, None), _header_from)
        return ReplayLog(path, header, tuple(_entries(path, header, lines)))
    except OSError as error:
        raise ReplayLogError(f"cannot read replay log {path}: {error.strerror or error}") from error


def header_differences(expected: ReplayHeader, actual: ReplayHeader) -> tuple[str, ...]:
    """Return one line for each difference of two headers, the likely causes of a divergence."""
    found = [
        f"{name}: {getattr(expected, name)} against {getattr(actual, name)}"
        for name in ("scheme", "job", "model", "agents", "seed", "interval")
        if getattr(expected, name) != getattr(actual, name)
    ]
    for label, one, other in (
        ("params.", dict(expected.params), dict(actual.params)),
        ("column ", dict(expected.columns), dict(actual.columns)),
    ):
        for name in dict.fromkeys((*one, *other)):
            left, right = one.get(name, "absent"), other.get(name, "absent")
            if left != right or type(left) is not type(right):
                found.append(f"{label}{name}: {left} against {right}")
    if dict(expected.columns) == dict(actual.columns) and expected.columns != actual.columns:
        found.append("columns: the same ones in another order")
    return tuple(found)


def _parsed(path: Path, number: int, line: bytes | None, parse: Any) -> Any:
    """Return `parse` of a line's JSON object; a parse error becomes an error that names the line."""
    try:
        if line is None:
            raise ValueError("there is no complete header")
        facts = parse_json(line.decode())
        if not isinstance(facts, dict):
            raise ValueError("not an object")
        return parse(facts)
    except ValueError as error:
        raise ReplayLogError(f"replay log {path}, line {number}: {error}") from error


def _entries(path: Path, header: ReplayHeader, lines: Iterator[bytes]) -> Iterator[ReplayEntry]:
    last = -1

    def parse(facts: dict[str, Any]) -> ReplayEntry:
        entry = _entry_from(facts, header)
        if entry.step_index <= last:
            raise ValueError(f"step {entry.step_index} does not come after step {last}")
        return entry

    for number, line in enumerate(lines, start=2):
        entry: ReplayEntry = _parsed(path, number, line, parse)
        last = entry.step_index
        yield entry


def _header_from(facts: dict[str, Any]) -> ReplayHeader:
    if facts.get("format") != FORMAT:
        raise ValueError("this is not the header of a replay log")
    if (version := facts.get("version")) != VERSION:
        raise ValueError(f"format version {version} is not known; this package reads version {VERSION}")
    scheme = _fact(facts, "scheme", str)
    if scheme not in SCHEMES or facts.get("scheme_version") != SCHEME_VERSION:
        raise ValueError(f"fingerprint scheme {scheme} version {facts.get('scheme_version')} is not known")
    columns = _fact(facts, "columns", list)
    if not all(isinstance(c, dict) and c.keys() == {"name", "dtype"} for c in columns):
        raise ValueError("columns must have a name and a dtype each")
    header = ReplayHeader(
        scheme=scheme,
        job=_fact(facts, "job", str),
        model=_fact(facts, "model", str),
        agents=_fact(facts, "agents", int),
        seed=_fact(facts, "seed", int),
        interval=_fact(facts, "interval", int),
        params=_fact(facts, "params", dict),
        columns=tuple((_fact(c, "name", str), _fact(c, "dtype", str)) for c in columns),
        notes=tuple(str(note) for note in _fact(facts, "notes", list)),
        first_step=_fact(facts, "first_step", int) if "first_step" in facts else None,
    )
    if not 0 <= header.agents < 1 << 64 or header.interval < 1:
        raise ValueError("agents must be a 64-bit unsigned integer, and interval at least 1")
    if header.first_step is not None and header.first_step < 0:
        raise ValueError("first_step is below 0")
    if unknown := [dtype for _, dtype in header.columns if dtype not in DTYPES]:
        raise ValueError(f"dtype {unknown[0]} is not known")
    return header


def _entry_from(facts: dict[str, Any], header: ReplayHeader) -> ReplayEntry:
    if not facts.keys() <= {"step", "value", "columns"}:
        raise ValueError("an entry has step, value and columns, and nothing else")
    step = _fact(facts, "step", int)
    if step % header.interval:
        raise ValueError(f"step {step} is not in the interval of {header.interval} steps")
    columns = {name: _hex(value) for name, value in _fact(facts, "columns", dict, {}).items()}
    entry = ReplayEntry(step, _hex(facts.get("value")), header.scheme, columns)
    if columns:
        _require_proof(entry, header)
    return entry


def _require_proof(entry: ReplayEntry, header: ReplayHeader) -> None:
    """Raise ValueError unless the digest's value follows from the values of the columns."""
    names = header.value_names
    if header.scheme != "digest" or entry.columns.keys() != set(names):
        raise ValueError(f"columns are {', '.join(entry.columns)}, expected {', '.join(names)}")
    ids, *values = (entry.columns[name] for name in names)
    dtypes: Sequence[str] = [dtype for _, dtype in header.columns]
    value = digest_value(entry.step_index, header.agents, names[1:], dtypes, values, ids)
    if value != entry.value:
        raise ValueError(f"the value {hex64(entry.value)} does not follow from the columns")


def _fact(facts: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = facts.get(name, default)
    if type(value) is not kind:  # bool is a subclass of int, but not a number here
        raise ValueError(f"{name} is missing" if value is None else f"{name} is not of type {kind.__name__}")
    return value


def _hex(value: Any) -> int:
    if not isinstance(value, str) or not _HEX64.fullmatch(value):
        raise ValueError(f"{value!r} is not 0x and 16 hexadecimal digits")
    return int(value, 16)
