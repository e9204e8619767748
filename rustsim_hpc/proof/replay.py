"""Record and verify: the stream of fingerprints of a plane, and the stream that it is checked against.

No I/O here; `replay_log` reads streams from files. The order in a step: `is_due`; compute the fingerprint of
the state that is about to be committed; `check` it, which changes nothing, so that a step that does not
verify can be undone; `accept` it with the step's commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from rustsim_hpc.errors import (
    InvalidConfig,
    ReplayDivergence,
    ReplayExhausted,
    ReplayStepMismatch,
    whole_number,
)
from rustsim_hpc.proof.fingerprint import ReplayFingerprint

_NO_COLUMNS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True, eq=False)
class ReplayEntry(ReplayFingerprint):
    """A fingerprint with the digest's value of each column, "ids" first; empty if they are not known.

    Compared like a fingerprint: the columns are not part of equality.
    """

    columns: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Zero-argument super() fails here, because slots=True creates a new class.
        ReplayFingerprint.__post_init__(self)
        object.__setattr__(self, "columns", MappingProxyType(dict(self.columns)))

    def __reduce__(self) -> tuple[object, ...]:
        return ReplayEntry, (self.step_index, self.value, self.scheme, dict(self.columns))


def columns_of(fingerprint: ReplayFingerprint) -> Mapping[str, int]:
    """Return the values per column of an entry; empty for a plain fingerprint."""
    return fingerprint.columns if isinstance(fingerprint, ReplayEntry) else _NO_COLUMNS


def differing_columns(expected: Mapping[str, int], actual: Mapping[str, int]) -> tuple[str, ...]:
    """Return the names whose values differ, in the order of `expected`; () if either is empty.

    A column that only one of them has counts as different.
    """
    if not expected or not actual:
        return ()
    names = dict.fromkeys((*expected, *actual))
    return tuple(name for name in names if expected.get(name) != actual.get(name))


@dataclass(frozen=True, slots=True)
class ReplayMode:
    """What a plane does with fingerprints: `off()`, `record()` or `verify(entries)`.

    kind: "off", "record" or "verify". expected: the stream to verify against, in step order. interval:
    fingerprints are taken at step indices divisible by it.
    """

    kind: Literal["off", "record", "verify"] = "off"
    expected: tuple[ReplayFingerprint, ...] = ()
    interval: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("off", "record", "verify"):
            raise InvalidConfig(f"unknown replay mode {self.kind!r}", hint="use off, record or verify")
        if self.expected and self.kind != "verify":
            raise InvalidConfig(f"replay mode {self.kind} takes no expected fingerprints")
        for entry in self.expected:
            if not isinstance(entry, ReplayFingerprint):
                raise InvalidConfig(f"expected fingerprints must be ReplayFingerprints, got {entry!r}")
        if whole_number("replay interval", self.interval, signed=True) < 1:
            raise InvalidConfig("replay interval must be greater than zero")

    @classmethod
    def off(cls) -> ReplayMode:
        """Take no fingerprints."""
        return cls("off")

    @classmethod
    def record(cls, interval: int = 1) -> ReplayMode:
        """Record one fingerprint after every `interval`-th step."""
        return cls("record", (), interval)

    @classmethod
    def verify(cls, entries: Iterable[ReplayFingerprint], interval: int = 1) -> ReplayMode:
        """Compare each step with `entries`, recorded with the same interval, and record it as well."""
        given: Any = entries
        if not isinstance(given, Iterable):
            raise InvalidConfig(f"expected fingerprints must be ReplayFingerprints, got {given!r}")
        return cls("verify", tuple(given), interval)

    def is_due(self, step_index: int) -> bool:
        """Whether a fingerprint is taken after the step that leads to `step_index`."""
        return self.kind != "off" and step_index % self.interval == 0

    def require_scheme(self, scheme: str) -> None:
        """Check that all expected fingerprints are of `scheme`.

        Raises:
            SchemeMismatch: one is not.
        """
        for fingerprint in self.expected:
            fingerprint.require_scheme(scheme)


class VerifyCursor:
    """A position in an expected stream. Only `advance`, after a commit, and `seek`, on a restore, move it."""

    __slots__ = ("_position", "expected")

    def __init__(self, expected: tuple[ReplayFingerprint, ...], step_index: int) -> None:
        """Start at the first entry after `step_index`, the state's current step."""
        self.expected = expected
        self.seek(step_index)

    @property
    def position(self) -> int:
        """Index of the next entry."""
        return self._position

    def seek(self, step_index: int) -> None:
        """Go to the first entry after `step_index`; to the end if there is none."""
        later = (i for i, entry in enumerate(self.expected) if entry.step_index > step_index)
        self._position = next(later, len(self.expected))

    def advance(self) -> None:
        """Go to the next entry."""
        self._position += 1

    def check(self, actual: ReplayFingerprint, columns: Mapping[str, int] = _NO_COLUMNS) -> None:
        """Compare a fingerprint with the next entry, without moving the cursor.

        columns: the digest's values per column, for naming those that differ; not needed for a `ReplayEntry`.

        Raises:
            ReplayExhausted: there is no next entry.
            ReplayStepMismatch: it is of another step.
            SchemeMismatch: it is of another scheme.
            ReplayDivergence: it has another value; names the columns if both streams know them.
        """
        if self._position >= len(self.expected):
            raise ReplayExhausted(actual.step_index)
        entry = self.expected[self._position]
        if entry.step_index != actual.step_index:
            raise ReplayStepMismatch(entry.step_index, actual.step_index)
        entry.require_scheme(actual.scheme)
        if entry.value != actual.value:
            differing = differing_columns(columns_of(entry), columns or columns_of(actual))
            raise ReplayDivergence(actual.step_index, entry.value, actual.value, differing)


class ReplayRecorder:
    """A plane's replay: the recorded fingerprints and, when verifying, the cursor in the expected stream."""

    def __init__(self, mode: ReplayMode, scheme: str, step_index: int) -> None:
        """Begin at a state's step.

        Raises:
            SchemeMismatch: the expected stream is not of `scheme`.
        """
        mode.require_scheme(scheme)
        self.mode = mode
        self._entries: list[ReplayFingerprint] = []
        self._cursor = VerifyCursor(mode.expected, step_index) if mode.kind == "verify" else None

    @property
    def recorded(self) -> tuple[ReplayFingerprint, ...]:
        """Fingerprints of committed steps, in step order."""
        return tuple(self._entries)

    def is_due(self, step_index: int) -> bool:
        """Whether a fingerprint is taken after the step that leads to `step_index`."""
        return self.mode.is_due(step_index)

    def check(self, fingerprint: ReplayFingerprint, columns: Mapping[str, int] = _NO_COLUMNS) -> None:
        """Verify a fingerprint before its commit; changes nothing. Does nothing unless verifying.

        Raises:
            EngineControlPlaneError: it does not verify, see `VerifyCursor.check`.
            SchemeMismatch: the expected one is of another scheme.
        """
        if self._cursor is not None:
            self._cursor.check(fingerprint, columns)

    def accept(self, fingerprint: ReplayFingerprint) -> None:
        """Record the fingerprint of a step that is committed."""
        self._entries.append(fingerprint)
        if self._cursor is not None:
            self._cursor.advance()

    def forget(self) -> None:
        """Drop the recorded fingerprints, which are kept elsewhere; the cursor does not move."""
        self._entries = []

    def restored(self, step_index: int) -> None:
        """Adapt to a restore: drop the entries after `step_index`, and verify from there on."""
        self._entries = [entry for entry in self._entries if entry.step_index <= step_index]
        if self._cursor is not None:
            self._cursor.seek(step_index)
