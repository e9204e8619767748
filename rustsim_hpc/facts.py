"""The base of all errors of the package: their facts, the one-line text made from them, and pickling.

`rustsim_hpc.errors` declares the errors themselves.
"""

from __future__ import annotations

import re
from dataclasses import Field, field
from inspect import get_annotations
from typing import Any, ClassVar, Protocol, Self, dataclass_transform

_FACTS = ("rank", "host", "partition", "worker", "phase_index", "phase", "step", "hint", "others")
_OTHERS_SHOWN = 20


class PartitionLike(Protocol):
    """The interface of a partition id in an error: its number, and a repr such as `PartitionId(3)`."""

    @property
    def value(self) -> int:
        """The partition's number."""


_REQUIRED = object()


@dataclass_transform(eq_default=False, field_specifiers=(field,))
class _Declared(Exception):
    """An exception whose fields are its class's annotations, as in a dataclass.

    Fields are positional in the order of declaration, except those of `RustsimError` and of
    `field(kw_only=True)`. `dataclass` would do the same, but it compiles a constructor for each of some fifty
    classes, which took too large a share of the package's import time.
    """

    _positional: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        super().__init_subclass__()
        positional, defaults = list(cls._positional), dict(cls._defaults)
        for name, annotation in get_annotations(cls).items():
            if annotation.startswith("ClassVar"):
                continue
            default: Any = cls.__dict__.get(name, _REQUIRED)
            keyword = kw_only
            if isinstance(default, Field):
                default, keyword = default.default, bool(default.kw_only)
            defaults[name] = default
            if not keyword and name not in positional:
                positional.append(name)
        cls._positional, cls._defaults = tuple(positional), defaults

    def __init__(self, *values: Any, **facts: Any) -> None:
        name = type(self).__name__
        if len(values) > len(self._positional):
            raise TypeError(
                f"{name} takes {', '.join(self._positional) or 'keywords'}; got {len(values)} values"
            )
        given = dict(zip(self._positional, values, strict=False))
        if wrong := [fact for fact in facts if fact in given or fact not in self._defaults]:
            raise TypeError(f"{name} got {', '.join(wrong)} twice, or has no such field")
        fields = self._defaults | given | facts
        if missing := [fact for fact, value in fields.items() if value is _REQUIRED]:
            raise TypeError(f"{name} needs {', '.join(missing)}")
        self.__dict__.update(fields)
        self._complete()

    def _complete(self) -> None:
        """Finish an error whose fields are set."""


class RustsimError(_Declared, kw_only=True):
    """Base class of all deliberate errors. Subclasses declare more fields, and a `template` for the text.

    All facts are optional keywords of every subclass, and None where unknown. rank, host: where. partition: a
    `PartitionId`; worker: its worker's label. phase: a phase's name; phase_index: its place in the combined
    phase list. step: the step index before the step that failed. hint: what to do. others: further failures
    of the same step, in partition order. `exit_code` is what the command line ends with.
    """

    exit_code: ClassVar[int] = 3
    template: ClassVar[str] = "{message}"
    # Type checkers order positional facts that a variant redeclares as here, so variants use this order.
    rank: int | None = None
    host: str | None = None
    partition: PartitionLike | None = None
    worker: str | None = None
    phase_index: int | None = None
    phase: str | None = None
    step: int | None = None
    hint: str | None = None
    others: tuple[BaseException, ...] = ()

    def _complete(self) -> None:
        self.args = (self.text(),)

    def text(self) -> str:
        """Return the error's one-line text, made from its fields."""
        return self.template.format(**self.__dict__)

    def add_facts(self, **facts: Any) -> Self:
        """Fill in facts that are not known yet; known ones are kept. Returns the error itself."""
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
        """Return the known facts as (label, text), in the order in which `details` prints them."""
        names = ("rank", "host", "partition", "worker", "phase", "step", "columns")
        known = [(name, getattr(self, name, None)) for name in names]
        return [
            (name, ", ".join(value) if isinstance(value, tuple) else str(value))
            for name, value in known
            if value not in (None, ())
        ]

    def details(self) -> str:
        """Return the known facts, one per line, then the other failures of the same step, then the hint.

        Failures that differ from this one in the partition alone are only counted.
        """
        lines = [f"{label}: {text}" for label, text in self.known_facts()]
        own = str(self)
        others = [other for other in self.others if str(other) != own]
        different = [other for other in others if _anywhere(str(other)) != _anywhere(own)]
        lines += [f"also failed: {other}" for other in different[:_OTHERS_SHOWN]]
        if len(different) > _OTHERS_SHOWN:
            lines.append(f"also failed: {len(different) - _OTHERS_SHOWN:,} more")
        if same := len(others) - len(different):
            lines.append(f"also failed: {same:,} other partition{'s' * (same > 1)}, in the same way")
        return "\n".join(lines + ([f"hint: {self.hint}"] if self.hint else []))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ would call the class with the finished text as its first field.
        return _rebuild, (type(self), self.args, self.__dict__)


def _anywhere(text: str) -> str:
    """Return the text of an error without the number of its partition."""
    return re.sub(r"PartitionId\(\d+\)", "", text)


def _rebuild(cls: type[RustsimError], args: tuple[Any, ...], state: dict[str, Any]) -> RustsimError:
    # Not cls.__new__: in subclasses of MemoryError it is MemoryError's, which rejects these classes.
    error = Exception.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class NoSuchName(KeyError):
    """A KeyError whose text is a sentence; `str` of a plain one puts it in quotes."""

    def __str__(self) -> str:
        return str(self.args[0])
