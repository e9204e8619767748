"""docs/errors.md lists every error with its exit code, and its example runs."""

import inspect
import re
from pathlib import Path

import pytest

from rustsim_hpc import errors

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "errors.md").read_text("utf-8")
ROW = re.compile(r"^\| `(\w+)` \| (\d+) \| (.+) \| (.+) \|$", re.MULTILINE)
SECTIONS = {part.split("\n", 1)[0]: part for part in TEXT.split("\n## ")[1:]}


def rows(text):
    return {name: (int(code), when, todo) for name, code, when, todo in ROW.findall(text)}


CLASSES = {
    cls.__name__: cls
    for cls in vars(errors).values()
    if inspect.isclass(cls) and issubclass(cls, errors.RustsimError) and not cls.__name__.startswith("_")
}


def test_every_error_is_listed_once():
    assert sorted(name for name, *_ in ROW.findall(TEXT)) == sorted(CLASSES)
    assert TEXT.count("\n| `") == len(CLASSES)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_its_exit_code_is_the_class_s(name):
    code, when, todo = rows(TEXT)[name]
    assert code == CLASSES[name].exit_code
    assert when.endswith(".")
    assert todo.endswith(".")


def test_the_sections_are_the_families():
    of_the_plane = rows(SECTIONS["What a control plane raises"])
    assert set(of_the_plane) == {
        name
        for name, cls in CLASSES.items()
        if issubclass(cls, errors.EngineControlPlaneError) and cls is not errors.EngineControlPlaneError
    }
    families = {errors.PartitionPlanError, errors.PartitionExecutorError}
    listed = set(rows(SECTIONS["Sources"]))
    for root in families:
        assert {name for name, cls in CLASSES.items() if issubclass(cls, root)} <= listed


def test_codes_mean_what_the_list_says():
    codes = set(map(int, re.findall(r"(?:^|; )(\d+) ", " ".join(TEXT.split("Exit codes: ")[1].split()))))
    assert codes == {0, 75} | {cls.exit_code for cls in CLASSES.values()}


def test_its_example_runs(capsys):
    block = re.search(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    exec(compile(block[1], "docs/errors.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out == ""


def test_the_attributes_that_it_names_are_there():
    error = errors.InvalidConfig("no")
    for name in re.findall(r"`error\.(\w+)`", TEXT):
        assert hasattr(error, name), name
