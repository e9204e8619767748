"""docs/replay.md says what is true of the report."""

import json
import re
from pathlib import Path

from compare_runs import command, make_run

from rustsim_hpc.divergence import causes
from rustsim_hpc.divergence import search as divergence
from rustsim_hpc.divergence import side as run_side

TEXT = (Path(__file__).parents[1] / "docs" / "replay.md").read_text(encoding="utf-8")


def table_after(heading: str) -> list[str]:
    """Return the names in the first cells of the table below a heading."""
    section = TEXT.split(f"### {heading}\n", 1)[1].split("\n### ", 1)[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([\w ]+)`", cell) if name != "kind"]


def test_every_key_of_the_report_is_described(tmp_path: Path) -> None:
    left, right = make_run(tmp_path / "left"), make_run(tmp_path / "right", "--seed=2")
    assert command("diff", left, right)[0] == 4
    report = json.loads((left / "divergence.json").read_text())
    assert table_after("`divergence.json`") == [
        "format", "version", "equal", "compared_to", "left", "right", "step", "equal_at", "columns", "phase",
        "phase_index", "values", "rows_from", "rows", "table", "causes", "notes",
    ]  # fmt: skip
    assert set(table_after("`divergence.json`")) == set(report)
    described = TEXT.split("| `left`, `right` |", 1)[1].split("|", 1)[0]
    assert set(re.findall(r"`(\w+)`", described)) == set(report["left"])
    described = TEXT.split("| `table` |", 1)[1].split("|", 1)[0]
    assert set(re.findall(r"`(\w+)`", described)) <= set(report["table"][0])


def test_every_cause_is_described() -> None:
    sources = [Path(str(module.__file__)).read_text() for module in (causes, divergence, run_side)]
    made = set(re.findall(r'Cause\(\s*"([a-z ]+)"', "".join(sources))) | {"dtype"}
    assert set(table_after("Causes that are recognised")) == made
