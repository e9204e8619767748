"""CuPy kernels as column phases on devices: their parameters are bound by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from rustsim_hpc.errors import ModelError, nearest
from rustsim_hpc.modeling.device_random import RNG
from rustsim_hpc.state.schema import Schema

PLACES: Final = ("rows", "row_start", "step")
"""Names of int64 values that a kernel may take beside columns, parameters, tables, results and its phase's
stream of random numbers: rows of the partition, global row of the first, step index (also by pointer)."""

_TYPES: Final = {
    "bool": "bool", "char": "int8", "signed char": "int8", "int8_t": "int8",
    "unsigned char": "uint8", "uint8_t": "uint8", "short": "int16", "int16_t": "int16",
    "unsigned short": "uint16", "uint16_t": "uint16", "int": "int32", "int32_t": "int32",
    "unsigned": "uint32", "unsigned int": "uint32", "uint32_t": "uint32",
    "long": "int64", "long long": "int64", "int64_t": "int64",
    "unsigned long": "uint64", "unsigned long long": "uint64", "uint64_t": "uint64", "size_t": "uint64",
    "float": "float32", "double": "float64",
}  # fmt: skip
_EXTERN: Final = re.compile(r'\bextern\s*"C"')
_COMMENT: Final = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_QUALIFIER: Final = re.compile(r"\b(?:const|volatile|__restrict__|__restrict|restrict)\b")


@dataclass(frozen=True)
class KernelParameter:
    """One parameter of a kernel. dtype: None accepts any. array: an array, not one item or a number."""

    name: str
    dtype: str | None
    array: bool
    writes: bool


@dataclass(frozen=True, eq=False)
class DeviceKernel:
    """A kernel for CUDA devices, given instead of a function.

    Attributes:
        name: name of its entry.
        code: CUDA C, or an ElementwiseKernel's operation.
        parameters: its parameters, in order.
        elementwise: whether it is an ElementwiseKernel, called with items of columns.
        made: the CuPy kernel that was given; None if source was given.
    """

    name: str
    code: str
    parameters: tuple[KernelParameter, ...]
    elementwise: bool = False
    made: Any = None

    @property
    def identity(self) -> str:
        """Text that covers everything that the kernel's meaning depends on."""
        options = getattr(self.made, "options", "") or getattr(self.made, "kwargs", "")
        preamble = getattr(self.made, "preamble", "")
        return f"{self.name} {self.code} {self.parameters} {self.elementwise} {options} {preamble}"

    def problem(
        self,
        schema: Schema,
        writes: Collection[str] | None,
        params: Mapping[str, Any],
        tables: Mapping[str, Any],
    ) -> str:
        """Return in one line why this cannot be bound to a model, or ""; results are checked in a step."""
        for parameter in self.parameters:
            found = self._misfit(parameter, schema, writes, params, tables)
            if found:
                return f"kernel {self.name}: {parameter.name} {found}"
        return ""

    def _misfit(
        self,
        parameter: KernelParameter,
        schema: Schema,
        writes: Collection[str] | None,
        params: Mapping[str, Any],
        tables: Mapping[str, Any],
    ) -> str:
        name = parameter.name
        if parameter.dtype == RNG:
            if self.made is not None:
                return f"is {RNG}, which CUDA C given as text can take"
            return "" if parameter.array and not parameter.writes else f"is const {RNG}*: take it so"
        if name in schema.names:
            if parameter.writes and writes is not None and name not in writes:
                return "is not among the columns that its phase writes: take it as const"
            needs_array = not self.elementwise
            return _mismatch(
                parameter, schema.dtypes[schema.index(name)], array=needs_array or parameter.array
            )
        if parameter.writes:
            return "is no column: take it as const"
        if name in PLACES:
            by_pointer = parameter.array and name == "step" and not self.elementwise
            return _mismatch(parameter, np.dtype(np.int64), array=by_pointer)
        if name in params:
            return _mismatch(parameter, np.asarray(params[name]).dtype, array=False)
        if name in tables:
            return _mismatch(parameter, tables[name].dtype, array=tables[name].ndim > 0)
        return ""


def _mismatch(parameter: KernelParameter, dtype: Any, *, array: bool) -> str:
    if parameter.array != array:
        return (
            f"is {'an array' if array else 'one number'}: take it {'by a pointer' if array else 'by value'}"
        )
    if parameter.dtype is not None and np.dtype(parameter.dtype) != dtype:
        return f"is {dtype}, and the kernel takes {parameter.dtype}"
    return ""


def as_device_kernel(given: Any, phase: str) -> DeviceKernel | None:
    """Return a kernel from CUDA C, a RawKernel or an ElementwiseKernel; None for anything else.

    Args:
        given: what the user gave; the entry of CUDA C text has the name of the phase.
        phase: the phase's name.

    Raises:
        ModelError: there is no such entry, or a parameter has a type that no column has.
    """
    if isinstance(given, str):
        return DeviceKernel(phase, given, _raw_parameters(given, phase))
    if hasattr(given, "in_params") and hasattr(given, "out_params"):
        parameters = tuple(
            KernelParameter(
                p.name, None if p.dtype is None else np.dtype(p.dtype).name, bool(p.raw), not p.is_const
            )
            for p in (*given.in_params, *given.out_params)
        )
        return DeviceKernel(str(given.name), str(given.operation), parameters, elementwise=True, made=given)
    if hasattr(given, "code") and hasattr(given, "name") and not hasattr(given, "__code__"):
        if not isinstance(given.code, str):
            raise ModelError(
                f"phase {phase}: its RawKernel does not tell its source", hint="give the source itself"
            )
        return DeviceKernel(given.name, given.code, _raw_parameters(given.code, given.name), made=given)
    return None


def _raw_parameters(code: str, entry: str) -> tuple[KernelParameter, ...]:
    plain = _COMMENT.sub(" ", code)
    found = re.search(rf"__global__\b[^;{{}}]*?\b{re.escape(entry)}\s*\(([^)]*)\)\s*{{", plain)
    if found is None:
        entries = re.findall(r"__global__\b[^;{}()]*?\b(\w+)\s*\(", plain)
        raise ModelError(f"the CUDA C of phase {entry} has no kernel {entry}{nearest(entry, entries)}")
    if not _EXTERN.search(plain[: found.start(1)]):
        raise ModelError(
            f'kernel {entry} is not extern "C": in C++ its name would be another one',
            hint=f'extern "C" __global__ void {entry}(...)',
        )
    texts = [text for text in found.group(1).split(",") if text.strip()]
    return tuple(_raw_parameter(text, entry) for text in texts)


def _raw_parameter(text: str, entry: str) -> KernelParameter:
    words = _QUALIFIER.sub(" ", text).replace("*", " ").split()
    ctype, name = " ".join(words[:-1]), words[-1]
    if ctype not in (*_TYPES, RNG) or text.count("*") > 1:
        raise ModelError(
            f"kernel {entry} takes {' '.join(text.split())}: no column or number is of that type"
        )
    array = "*" in text
    constant = "const" in text.split("*", maxsplit=1)[0].split()
    return KernelParameter(name, _TYPES.get(ctype, ctype), array, array and not constant)
