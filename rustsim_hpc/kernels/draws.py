"""Which random draws of a row function can be made for a whole tile before the function's own loop."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache

from rustsim_hpc.kernels.philox import MAX_READY
from rustsim_hpc.modeling.model import Reduction, RowKernel


@lru_cache(maxsize=256)
def ready_draws(described: RowKernel | Reduction) -> int:
    """Return how many of `uniform`'s draws 0, 1 a row function names in its source: 0, 1 or 2.

    They can be made for a whole tile beforehand; a draw that is not seen here is made where it is asked for.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(described.fn)))
    except (OSError, SyntaxError, TypeError):
        return 0
    ready = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) == 2 and isinstance(node.args[1], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            draw = node.args[1].value
            if name == "uniform" and type(draw) is int and 0 <= draw < MAX_READY:
                ready = max(ready, draw + 1)
    return ready
