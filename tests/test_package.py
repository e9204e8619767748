"""The package's face: names that are loaded when they are used, and are what type checkers see."""

import ast
from pathlib import Path

import pytest

import rustsim_hpc as rs


def test_names_are_what_type_checkers_see() -> None:
    tree = ast.parse(Path(rs.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {(f"rustsim_hpc.{module}", name) for module, names in rs._HOMES.items() for name in names}
    homes |= {("rustsim_hpc", name) for name in rs._SUBMODULES}
    assert seen == homes
    assert {name for _, name in homes} == set(rs.__all__)
    assert len(set(rs.__all__)) == len(rs.__all__)


@pytest.mark.parametrize("name", rs.__all__)
def test_name_is_there(name: str) -> None:
    assert getattr(rs, name) is not None
    assert name in dir(rs)


def test_a_wrong_name_is_told_with_a_near_one() -> None:
    with pytest.raises(AttributeError, match=r'no attribute .Colum. \(did you mean "Column"\?\)'):
        _ = rs.Colum  # type: ignore[attr-defined]
    assert not hasattr(rs, "nothing_like_it")
