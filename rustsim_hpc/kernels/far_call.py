"""Calls of compiled functions by address, from compiled code.

A function called by name is compiled again into each of its callers. Functions that a stage calls once for
each tile and that take long to compile are compiled once, cached on disk, and shared by all stages.
"""

from __future__ import annotations

import threading
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_compiling = threading.RLock()


def address_of(dispatcher: Any, *signature: Any) -> int:
    """Return the address of a compiled function of numbers and pointers, for these Numba types."""
    with _compiling:
        dispatcher.compile(signature)
        compiled = dispatcher.overloads[signature]
        return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name))


@intrinsic
def far_call(_context: Any, _address: Any, values: Any) -> Any:
    """Call the function at an address (uint64) with a tuple of arrays and integers; return its uint64.

    The function takes an array as a pointer to its first item, and an integer as uint64.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, place = ir.IntType(64), ir.IntType(8).as_pointer()
        passed = []
        for index, kind in enumerate(signature.args[1]):
            value = builder.extract_value(arguments[1], index)
            if isinstance(kind, types.Array):
                array = context.make_array(kind)(context, builder, value)
                passed.append(builder.bitcast(array.data, place))
            else:
                passed.append(context.cast(builder, value, kind, types.uint64))
        function_type = ir.FunctionType(word, [value.type for value in passed])
        return builder.call(builder.inttoptr(arguments[0], function_type.as_pointer()), passed)

    return types.uint64(types.uint64, values), generate
