"""Compile a stage to one function, which runs all its row kernels and reductions tile by tile.

The source is written by :mod:`rustsim_hpc.kernels.stage_source` and is kept in the cache folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from rustsim_hpc.errors import KernelError
from rustsim_hpc.kernels.compiling import checking, compile_row_function, load_generated, one_compiler
from rustsim_hpc.kernels.diagnose import explain
from rustsim_hpc.kernels.stage_source import FIXED, Argument, StageWriter, Variant, op_name
from rustsim_hpc.modeling.program import KernelStage
from rustsim_hpc.modeling.source_identity import function_identity
from rustsim_hpc.state.schema import Schema


@dataclass
class StageFunction:
    """A stage ready to be called: ``function(*FIXED, *arguments)``.

    Attributes:
        stage: the stage.
        arguments: arguments after the fixed ones.
        module: the generated module with the function and the dispatchers of its row functions.
        path: the module's file.
        checked: whether it is compiled with bounds checks.
        one_loop: whether it is a single loop over a tile.
        by_blocks: whether a tile must be one of the digest's blocks of rows.
    """

    stage: KernelStage
    arguments: tuple[Argument, ...]
    module: ModuleType
    path: Path
    checked: bool
    one_loop: bool
    by_blocks: bool
    _dtypes: dict[tuple[Any, ...], dict[int, str]] = field(default_factory=dict)

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return any(argument.source == "key" for argument in self.arguments)

    @property
    def function(self) -> Any:
        """The compiled function (a Numba dispatcher)."""
        return self.module.stage

    def compile_for(self, values: Sequence[Any]) -> dict[int, str]:
        """Compile, or load from the disk cache, for the types of these arguments.

        Returns:
            For each reduction slot of the stage the dtype of the values that are reduced.

        Raises:
            KernelError: a row function does not compile; names phase, argument and line.
        """
        from numba import typeof

        signature = tuple(typeof(value) for value in values)
        if signature not in self._dtypes:
            self._dtypes[signature] = self._compile(signature)
        return self._dtypes[signature]

    def _compile(self, signature: tuple[Any, ...]) -> dict[int, str]:
        from numba.core.errors import NumbaError

        by_name = dict(zip((*FIXED, *(a.name for a in self.arguments)), signature, strict=True))
        with one_compiler(self.path) as notes, checking(checked=self.checked):
            name = str(signature)
            if name not in notes:
                # Not compiled before: report errors in the user's terms, not in Numba's.
                found = explain(self.stage, by_name, vars(self.module))
                notes[name] = {str(slot): dtype for slot, dtype in found.items()}
            try:
                if signature not in self.function.overloads:
                    self.function.compile(signature)
            except NumbaError as error:
                explain(self.stage, by_name, vars(self.module))
                names = ", ".join(op_name(op) for op in self.stage.ops)
                raise KernelError(f"phases {names} do not compile together: {error}") from error
            return {int(slot): dtype for slot, dtype in notes[name].items()}


def build_stage(
    stage: KernelStage, variant: Variant, schema: Schema, *, default_ids: bool, checked: bool
) -> StageFunction:
    """Generate and load one function of a stage (it is compiled at its first use)."""
    writer = StageWriter(stage, variant, schema, default_ids=default_ids, checked=checked)
    source = writer.source()
    # Cached machine code looks the modules of its functions up by name.
    identity = "\n".join(f"{fn.__module__} {function_identity(fn)}" for fn in writer.functions.values())
    names: dict[str, Any] = {
        name: compile_row_function(fn, checked=checked) for name, fn in writer.functions.items()
    }
    module, path = load_generated(source, f"{identity}\n{checked}", names)
    arguments = tuple(writer.arguments.values())
    return StageFunction(stage, arguments, module, path, checked, writer.one_loop, writer.by_blocks)
