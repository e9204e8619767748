"""Load a model, a Python file or importable name with a function ``model()``, in any process."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import threading
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from rustsim_hpc.errors import ModelError, message_of, named, nearest
from rustsim_hpc.files import read_bytes
from rustsim_hpc.modeling.model import Model
from rustsim_hpc.modeling.signatures import raised_at


@dataclass(frozen=True)
class ModelReference:
    """A reference by which another process loads a model.

    Attributes:
        module: path of a Python file, or an importable name.
        sha256: of the module's source file (hex).
    """

    module: str
    sha256: str


_IMPORTED: dict[str, str] = {}
"""Hash of the source of each module imported from a file, by module name."""

_ONE_AT_A_TIME = threading.RLock()
"""Serialises imports: a module is in sys.modules before it has run, and another thread would use it then."""


class _ReadOnce(SourceFileLoader):
    """Runs the source that was hashed; Python's bytecode cache detects changes only by second and size."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the source that was read."""
        code: CodeType = self.source_to_code(self._source, self.get_filename(fullname))
        return code


def load_model(module: str, expected_sha256: str | None = None) -> tuple[Model, ModelReference]:
    """Import a model's module and call its ``model()``.

    Args:
        module: path of a file (ending in .py) or an importable name.
        expected_sha256: hash of the source in another process; None accepts any.

    Raises:
        ModelError: no such module, it cannot be imported, it has no ``model()`` that returns a
            :class:`~rustsim_hpc.modeling.model.Model`, or its source is not the expected one.
    """
    with _ONE_AT_A_TIME:
        found = _import_file(Path(module)) if module.endswith(".py") else _import_name(module)
    reference = ModelReference(module, _source_hash(found))
    if expected_sha256 is not None and reference.sha256 != expected_sha256:
        raise ModelError(
            f"model {module}: its source here is not that of the run (sha256 {reference.sha256[:12]}…, "
            f"expected {expected_sha256[:12]}…)"
        )
    function = getattr(found, "model", None)
    if not callable(function):
        raise ModelError(f"model {module} has no function model(){nearest('model', vars(found))}")
    try:
        model = function()
    except ModelError as error:
        raise _located(error, raised_at(error, function)) from error.__cause__
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        failed = f"model {module}: model() failed: {named(error)}"
        raise ModelError(failed, hint=raised_at(error, function)) from error
    if not isinstance(model, Model):
        raise ModelError(f"model {module}: model() returned {type(model).__name__}, not a rustsim_hpc.Model")
    return model, reference


def _import_file(path: Path) -> ModuleType:
    """Import a file under a unique name, so that files of the same name do not collide."""
    path = path.resolve()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    try:
        source = read_bytes(path)
    except OSError as error:
        raise ModelError(f"model {path}: {error.strerror}") from error
    sha256 = hashlib.sha256(source).hexdigest()
    # A file that has changed since, as beside a notebook, is imported again.
    if name in sys.modules and _IMPORTED.get(name) == sha256:
        return sys.modules[name]
    loader = _ReadOnce(name, str(path), source)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # noqa: S101 (there is none only without a loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name], _IMPORTED[name] = module, sha256
    # A model may import modules in its folder.
    sys.path.insert(0, str(path.parent))
    try:
        loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        raise _failed(str(path), error) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _import_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except BaseException as error:
        raise _failed(name, error) from error


def _failed(module: str, error: BaseException) -> ModelError:
    line = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == module:
            line = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.lineno:
        line = f", line {error.lineno}"
    if isinstance(error, ModelError):
        return _located(error, f"raised at {module}{line}")
    bare = "takes 0 positional arguments but 1 was given" in message_of(error)
    hint = 'a decorator of rs takes arguments: @rs.row_kernel(writes="x")' if bare else None
    return ModelError(f"model {module}{line}: {named(error)}", hint=hint)


def _located(error: ModelError, at: str | None) -> ModelError:
    """Return an error of a model's declaration, its hint completed by where it was raised."""
    if at is not None:
        error.hint = f"{error.hint}; {at}" if error.hint else at
    return error


def _source_hash(module: ModuleType) -> str:
    if module.__name__ in _IMPORTED:
        return _IMPORTED[module.__name__]
    path = getattr(module, "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
