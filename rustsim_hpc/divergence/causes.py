"""Why two runs may differ: differences in their inputs, or in the environments that they ran in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rustsim_hpc.divergence.side import RunSide
from rustsim_hpc.run_folder.environment import differences, machines_of


@dataclass(frozen=True)
class Cause:
    """A likely cause. kind: a word for scripts; text: for readers."""

    kind: str
    text: str


def causes_of_input(left: RunSide, right: RunSide) -> list[Cause]:
    """Return the differences between the two sides' inputs: agents, columns, seed, parameters, model."""
    found: list[Cause] = []
    if left.agents != right.agents:
        found.append(Cause("agents", f"other number of agents: {left.agents:,} against {right.agents:,}"))
    found += _of_columns(dict(left.layout or ()), dict(right.layout or ()))
    if left.layout and right.layout and left.layout != right.layout and not found:
        found.append(Cause("columns", "the same columns in another order"))
    if left.seed != right.seed:
        found.append(Cause("seed", f"other seed: {left.seed} against {right.seed}"))
    for name in dict.fromkeys((*left.params, *right.params)):
        one, other = left.params.get(name, "absent"), right.params.get(name, "absent")
        if one != other or type(one) is not type(other):
            found.append(Cause("parameters", f"other parameter {name}: {one} against {other}"))
    if left.model and right.model and left.model != right.model:
        found.append(_of_model(left, right))
    return found


def _of_columns(left: Mapping[str, str], right: Mapping[str, str]) -> list[Cause]:
    if not left or not right:
        return []
    return [
        Cause(
            "dtype" if name in left and name in right else "columns",
            f"other column {name}: {left.get(name, 'absent')} against {right.get(name, 'absent')}",
        )
        for name in dict.fromkeys((*left, *right))
        if left.get(name) != right.get(name)
    ]


def _of_model(left: RunSide, right: RunSide) -> Cause:
    """Distinguish a changed source from changed tables: a model's identity covers both."""
    modules = [side.record.get("model") for side in (left, right)]
    same_file = modules[0] == modules[1] and modules[0] is not None
    if same_file and left.params != right.params:
        text = "other tables, which follow from the parameters, or another source of the model"
    elif same_file:
        text = f"the model {modules[0]}, or a table that it reads, changed between the two runs"
    else:
        text = "other source of the model"
    return Cause("model", f"{text} (identity {left.model[:12]}… against {right.model[:12]}…)")


def causes_of_change(side: RunSide, identity_now: str) -> list[Cause]:
    """Return whether a side's model is still what it was when it ran."""
    if not side.model or side.model == identity_now:
        return []
    text = f"the model of {side.name}, or a table that it reads, has changed since that run"
    return [Cause("changed model", f"{text}; what was run again here is the present one")]


def causes_of_environment(left: RunSide, right: RunSide) -> list[Cause]:
    """Return the differences between the two sides' environments: versions, CPU, math library."""
    lines = environment_differences(left.record, right.record)
    return [
        Cause("environment", f"other {line.replace(' then, ', ' against ').removesuffix(' now')}")
        for line in lines
    ]


def environment_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return lines on the differences between two records' versions, CPUs and math libraries."""
    before, after = then.get("versions") or {}, now.get("versions") or {}
    lines = [
        f"version of {name}: {before[name]} then, {after[name]} now"
        for name in before
        if name in after and before[name] != after[name] and name in _MATTERS
    ]
    hosts = [machines_of(record) for record in (then, now)]
    return lines + (differences(hosts[0], hosts[1]) if hosts[0] and hosts[1] else [])


_MATTERS = ("rustsim-hpc", "numpy", "numba", "llvmlite")
