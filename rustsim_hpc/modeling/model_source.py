"""Find a model, a Python file or importable name with a function ``model()``, and find it again elsewhere."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from rustsim_hpc.errors import ModelError, named, nearest
from rustsim_hpc.modeling.model import Model


@dataclass(frozen=True)
class ModelReference:
    """How a model is found again in another process.

    Attributes:
        module: path of a Python file, or an importable name.
        sha256: of the module's source file (hex).
    """

    module: str
    sha256: str


def load_model(module: str, expected_sha256: str | None = None) -> tuple[Model, ModelReference]:
    """Import a model's module and call its ``model()``.

    Args:
        module: path of a file (ending in .py) or an importable name.
        expected_sha256: the source that another process has; any if None.

    Raises:
        ModelError: no such module, it cannot be imported, it has no ``model()`` that returns a
            :class:`~rustsim_hpc.modeling.model.Model`, or its source is another one than expected.
    """
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
    except (ModelError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ModelError(f"model {module}: model() failed: {named(error)}") from error
    if not isinstance(model, Model):
        raise ModelError(f"model {module}: model() returned {type(model).__name__}, not a rustsim_hpc.Model")
    return model, reference


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, so that two files of one name do not meet."""
    path = path.resolve()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ModelError(f"model {path}: there is no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # A model may import modules that lie beside it.
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
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
    if isinstance(error, ModelError):
        return error
    line = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == module:
            line = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.lineno:
        line = f", line {error.lineno}"
    return ModelError(f"model {module}{line}: {named(error)}")


def _source_hash(module: ModuleType) -> str:
    path = getattr(module, "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
