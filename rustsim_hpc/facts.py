"""What every error of the package carries: its facts, the one line made from them, and how it travels.

`rustsim_hpc.errors` declares the errors themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, dataclass_transform

if TYPE_CHECKING:
    from collections.abc import Iterable

_FACTS = ("rank", "host", "partition", "phase_index", "phase", "step", "hint", "others")


class PartitionLike(Protocol):
    """What an error needs of a partition id: its number, and a repr such as `PartitionId(3)`."""

    @property
    def value(self) -> int:
        """The partition's number."""


def _unknown() -> None:
    return None


@dataclass_transform(eq_default=False, field_specifiers=(field,))
class _Declared(Exception):
    """Make every subclass a dataclass that compares by identity, as exceptions do."""

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        super().__init_subclass__()
        dataclass(eq=False, repr=False, kw_only=kw_only)(cls)


class RustsimError(_Declared, kw_only=True):
    """Root of all deliberate errors. Subclasses declare further fields, and a `template` that makes the text.

    All facts are optional keywords of every subclass, and None where unknown. rank, host: where. partition: a
    `PartitionId`. phase: a phase's name; phase_index: its place in the combined phase list. step: the step
    index before the step that failed. hint: what to do. others: further failures of the same step, in
    partition order. `exit_code` is what the command line ends with.
    """

    exit_code: ClassVar[int] = 3
    template: ClassVar[str] = "{message}"
    # A variant that redeclares some of these as required takes them by position in this order. A function
    # makes the defaults, because a value would stay on the class and become the variant's default too.
    rank: int | None = field(default_factory=_unknown)
    host: str | None = field(default_factory=_unknown)
    partition: PartitionLike | None = field(default_factory=_unknown)
    phase_index: int | None = field(default_factory=_unknown)
    phase: str | None = field(default_factory=_unknown)
    step: int | None = field(default_factory=_unknown)
    hint: str | None = field(default_factory=_unknown)
    others: tuple[BaseException, ...] = ()

    def __post_init__(self) -> None:
        self.args = (self.text(),)

    def text(self) -> str:
        """Return the error's one line, made from its fields."""
        return self.template.format(**self.__dict__)

    def add_facts(self, **facts: Any) -> Self:
        """Fill in facts that are not known yet; known ones stay. Returns the error itself."""
        for name, value in facts.items():
            if name not in _FACTS:
                raise TypeError(f"{name} is not a fact of an error")
            if getattr(self, name) in (None, ()):
                setattr(self, name, value)
        return self

    def all_facts(self) -> dict[str, Any]:
        """Return every fact by name, for `add_facts` of another error."""
        return {name: getattr(self, name) for name in _FACTS}

    def known_facts(self) -> list[tuple[str, str]]:
        """Return the facts that are known as (label, text), in the order in which `details` prints them."""
        names = ("rank", "host", "partition", "phase", "step", "columns")
        known = [(name, getattr(self, name, None)) for name in names]
        return [
            (name, ", ".join(value) if isinstance(value, tuple) else str(value))
            for name, value in known
            if value not in (None, ())
        ]

    def details(self) -> str:
        """Return the known facts one a line, then the other failures of the same step, then the hint."""
        lines = [f"{label}: {text}" for label, text in self.known_facts()]
        lines += [f"also failed: {other}" for other in self.others]
        return "\n".join(lines + ([f"hint: {self.hint}"] if self.hint else []))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ would call the class with the finished text as its first field.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[RustsimError], args: tuple[Any, ...], state: dict[str, Any]) -> RustsimError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ` (did you mean "x"?)` for the candidate that is most like `name`, or "" if none is."""
    matches = get_close_matches(name, list(candidates), n=1)
    return f' (did you mean "{matches[0]}"?)' if matches else ""
