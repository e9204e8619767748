"""What every error of the package carries: its facts, the one line made from them, and how it travels.

`rustsim_hpc.errors` declares the errors themselves.
"""

from __future__ import annotations

from dataclasses import Field, field
from difflib import get_close_matches
from inspect import get_annotations
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, dataclass_transform

if TYPE_CHECKING:
    from collections.abc import Iterable

_FACTS = ("rank", "host", "partition", "worker", "phase_index", "phase", "step", "hint", "others")


class PartitionLike(Protocol):
    """What an error needs of a partition id: its number, and a repr such as `PartitionId(3)`."""

    @property
    def value(self) -> int:
        """The partition's number."""


_REQUIRED = object()


@dataclass_transform(eq_default=False, field_specifiers=(field,))
class _Declared(Exception):
    """An exception whose fields are its class's annotations, as in a dataclass.

    Fields are positional in the order of declaration, except the root's and those of `field(kw_only=True)`.
    `dataclass` could do all this, but it compiles a constructor for each of some fifty classes, which took a
    good part of the time that importing the package may take.
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
    # Type checkers take facts that a variant redeclares by position in this order: variants keep to it.
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
        names = ("rank", "host", "partition", "worker", "phase", "step", "columns")
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
    # Not cls.__new__: where MemoryError is a base as well that is MemoryError's, which refuses the class.
    error = Exception.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


def message_of(error: BaseException) -> str:
    """Return the text of any exception, one that has none or whose `str` fails included.

    One that is no `Exception`, as `SystemExit`, is named: its text says little.
    """
    name = type(error).__name__
    try:
        text = str(error)
        return text if text and isinstance(error, Exception) else f"{name}: {text}" if text else name
    except Exception:  # noqa: BLE001 (somebody else's code, while its failure is being reported)
        return type(error).__name__


def named(error: BaseException) -> str:
    """Return the type and the text of any exception."""
    name, text = type(error).__name__, message_of(error)
    return text if text.startswith(name) else f"{name}: {text}"


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ` (did you mean "x"?)` for the candidate that is most like `name`, or "" if none is."""
    matches = get_close_matches(name, list(candidates), n=1)
    return f' (did you mean "{matches[0]}"?)' if matches else ""
