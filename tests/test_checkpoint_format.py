"""docs/checkpoint_format.md against real files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import h5py
import pytest
from storage_cases import SMALL, bounds, cut, header_of, state
from storage_cases import layout as options_of
from thread_team import ThreadTeam, run_ranks

from rustsim_hpc.job.keys import CheckpointTable
from rustsim_hpc.storage import FORMAT_NAME, FORMAT_VERSION, StorageOptions, write_checkpoint
from rustsim_hpc.storage.proof import BLOCK_BYTES

TEXT = (Path(__file__).parents[1] / "docs" / "checkpoint_format.md").read_text(encoding="utf-8")


def block(heading: str, number: int = 0) -> list[str]:
    """Return the lines of a fenced block below a heading."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    return section.split("```\n")[2 * number + 1].splitlines()


def write(folder: Path, size: int, layout: str) -> None:
    view = state(12)
    header = header_of(view, SMALL)

    def rank(team: ThreadTeam) -> None:
        part = cut(view, *bounds(12, size, team.rank))
        write_checkpoint(folder / "checkpoints", header, part, team, options_of(layout))

    run_ranks(size, rank)


@pytest.mark.parametrize(
    ("size", "layout", "number"), [(1, "auto", 0), (2, "single", 0), (2, "sharded", 1), (2, "node", 2)]
)
def test_the_folder_is_as_documented(tmp_path: Path, size: int, layout: str, number: int) -> None:
    write(tmp_path, size, layout)
    documented, parents = set(), [tmp_path]
    for line in block("Files", number):
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0].replace("1f3a9c2e", "NONCE").rstrip("/")
        parents = [*parents[: depth + 1], parents[depth] / name]
        documented.add(parents[-1])
    found = {Path(re.sub(r"shards-[0-9a-f]{8}", "shards-NONCE", str(path))) for path in tmp_path.rglob("*")}
    assert found == documented


def documented_tree() -> dict[str, dict[str, bool]]:
    """Return object to attribute to whether it is only in whole files."""
    tree: dict[str, dict[str, bool]] = {}
    current = ""
    for line in block("Contents of a file"):
        if line.startswith("/"):
            current = line.split()[0]
            tree[current] = {}
        attribute = line[44:].split("  ")[0].strip() if line[44:45].strip() else ""
        match = re.match(r"(\w+)( +\* | {2,})", line[44:] + "  ")
        if match and (not line.startswith("/") or current == "/"):
            assert attribute
            tree[current][match[1]] = "*" in match[2]
    return tree


def real_tree(path: Path) -> dict[str, set[str]]:
    tree = {}
    with h5py.File(path, "r") as file:
        tree["/"] = set(file.attrs)
        file.visititems(lambda name, item: tree.__setitem__(f"/{name}", set(item.attrs)))
    return tree


@pytest.mark.parametrize(("size", "layout"), [(1, "auto"), (2, "single"), (2, "sharded"), (2, "node")])
def test_the_file_is_as_documented(tmp_path: Path, size: int, layout: str) -> None:
    write(tmp_path, size, layout)
    tree = documented_tree()
    assert list(tree) == ["/", "/ids", "/columns", "/columns/NAME"]
    files = sorted((tmp_path / "checkpoints").rglob("*.h5"))
    assert len(files) == {"sharded": 3, "node": 2}.get(layout, 1)
    for path in files:
        shard = path.name.startswith(("rank_", "node_"))

        def attributes(name: str, shard: bool = shard) -> set[str]:
            return {attribute for attribute, only_whole in tree[name].items() if not (shard and only_whole)}

        assert real_tree(path) == {
            "/": attributes("/"),
            "/ids": attributes("/ids"),
            "/columns": attributes("/columns"),
            "/columns/x": attributes("/columns/NAME") - {"codes"},
            "/columns/state": attributes("/columns/NAME"),
        }
        with h5py.File(path, "r") as file:
            assert file.attrs["format"] == (f"{FORMAT_NAME} shard" if shard else FORMAT_NAME)
            assert file.attrs["format_version"] == FORMAT_VERSION


def test_the_proof_is_as_documented(tmp_path: Path) -> None:
    write(tmp_path, 2, "sharded")
    text = (tmp_path / "checkpoints" / "step_0000000100.proof.json").read_text()
    documented = "\n".join(block("The proof"))
    body = json.loads(text)["proof"]
    assert list(json.loads(text)) == re.findall(r'^[ {]"(\w+)":', documented, re.MULTILINE)
    assert list(body) == re.findall(r'^  "(\w+)":', documented, re.MULTILINE)
    assert list(body["files"][0]) == re.findall(r'"(\w+)": (?:\.\.\.|\[)', documented.split('"files"')[1])
    assert f'"version": {FORMAT_VERSION},' in documented
    assert f'"block_bytes": {BLOCK_BYTES},' in documented
    assert TEXT.count(f"This is version {FORMAT_VERSION} of the format") == 1


def test_every_setting_is_documented() -> None:
    documented = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)))
    assert sorted(documented) == sorted(StorageOptions.__dataclass_fields__)
    assert set(documented) <= set(CheckpointTable.model_fields)
    for name, default in re.findall(
        r"^\| `(layout|shards|chunk_rows|alignment)` \| `?([^`|]+)`? \|", TEXT, re.MULTILINE
    ):
        assert str(CheckpointTable.model_fields[name].default) == default.strip('" ')
