"""Find the random draws of a row function that can be computed for a whole tile before its loop."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache

from rustsim_hpc.kernels.philox import MAX_READY
from rustsim_hpc.modeling.model import Reduction, RowKernel


@lru_cache(maxsize=256)
def ready_draws(described: RowKernel | Reduction) -> int:
    """Return how many of `uniform`'s draws 0 and 1 to precompute for a row function: 0, 1 or 2.

    These are the draws that its source names as literals; any other draw is computed at its call.
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
