"""Checkpoints as files: what is written is read, and what is not whole is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash
from storage_cases import ALL, bounds, cut, header_of, same_bits, state
from storage_cases import layout as options_of
from thread_team import ThreadTeam, run_ranks

from rustsim_hpc.errors import CheckpointFileError, ColumnMemoryError, JobError
from rustsim_hpc.proof.fingerprint import StateView
from rustsim_hpc.ranks.team import SoloTeam, Team
from rustsim_hpc.state.schema import Column, Schema
from rustsim_hpc.storage import (
    CheckpointHeader,
    CheckpointWriter,
    StorageOptions,
    checkpoint_path,
    list_checkpoints,
    load,
    load_newest,
    move_aside,
    proof_path,
    prove,
    read_header,
    read_rows,
    retain,
    steps_to_drop,
    sweep,
    verify,
    write_checkpoint,
)
from rustsim_hpc.storage import proof as proof_module
from rustsim_hpc.storage import reading as reading_module
from rustsim_hpc.storage import restoring as restoring_module
from rustsim_hpc.storage.proof import BLOCK_BYTES, Manifest, parse_manifest, render_manifest


def write(
    folder: Path, rows: int, size: int = 1, layout: str = "auto", **choices: object
) -> CheckpointHeader:
    """Write a state of SMALL by `size` ranks; return the header as it was given."""
    view = state(rows, **choices)  # type: ignore[arg-type]
    header = header_of(view)

    def rank(team: ThreadTeam) -> None:
        write_checkpoint(folder, header, cut(view, *bounds(rows, size, team.rank)), team, options_of(layout))

    run_ranks(size, rank)
    return header


def write_all(folder: Path, view: StateView, schema: Schema, size: int) -> Path:
    """Write a whole state by `size` ranks; return its path."""
    header = header_of(view, schema)
    shares = [cut(view, *bounds(view.rows, size, rank)) for rank in range(size)]
    return run_ranks(size, lambda team: write_checkpoint(folder, header, shares[team.rank], team))[0]


def whole(header: CheckpointHeader) -> tuple[int, int]:
    return 0, header.rows


LAYOUTS = [
    (1, "auto"), (1, "sharded"), (2, "auto"), (3, "sharded"), (2, "single"), (3, "single"),
    (1, "node"), (3, "node"),
]  # fmt: skip


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
@pytest.mark.parametrize("scheme", ["digest", "fnv1a"])
@pytest.mark.parametrize("custom_ids", [False, True])
def test_every_dtype_comes_back_from_every_layout_on_any_ranks(
    tmp_path: Path, size: int, layout: str, scheme: str, custom_ids: bool
) -> None:
    view = state(1000, ALL, custom_ids=custom_ids)
    header = header_of(view, ALL, scheme)

    def write_rank(team: ThreadTeam) -> Path:
        part = cut(view, *bounds(1000, size, team.rank))
        return write_checkpoint(tmp_path, header, part, team, options_of(layout))

    paths = run_ranks(size, write_rank)
    assert set(paths) == {tmp_path / "step_0000000100.h5"}

    for readers in (1, 2, 5):

        def read_rank(team: ThreadTeam, readers: int = readers) -> bool:
            found = load(paths[0], team, lambda header: bounds(header.rows, readers, team.rank))
            assert found.header.parameters == {"dt": float(np.float32(0.1)), "bins": 8, "on": True}
            assert (found.header.label, found.header.seed, found.header.schema) == ("a label", 7, ALL)
            assert found.header.fingerprint == header.fingerprint
            return same_bits(found.rows, cut(view, *bounds(1000, readers, team.rank)))

        assert all(run_ranks(readers, read_rank))


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_any_hdf5_tool_reads_whole_columns(tmp_path: Path, size: int, layout: str) -> None:
    write(tmp_path, 50, size, layout)
    view = state(50)
    with h5py.File(tmp_path / "step_0000000100.h5", "r") as file:
        assert file["ids"][:].tolist() == list(range(50))
        assert file["columns/x"][:].tobytes() == view.columns[0].tobytes()
        assert file["columns/state"][:].tobytes() == view.columns[1].tobytes()
        assert list(file["columns"]) == ["x", "state"]
        assert file["columns/x"].attrs["unit"] == "m"
        assert json.loads(file["columns/state"].attrs["codes"]) == {"0": "S", "1": "I"}
        assert file.attrs["step_index"] == 100
        assert file.attrs["rows"] == 50
        assert file.attrs["label"] == "a label"
        assert json.loads(file.attrs["parameters"])["bins"] == 8
        written = read_header(tmp_path / "step_0000000100.h5")
        assert file.attrs["fingerprint"] == written.fingerprint.value
        assert (file["ids"].attrs["digest"], file["columns/x"].attrs["digest"]) == written.digests[:2]


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_fewer_rows_than_ranks(tmp_path: Path, rows: int, size: int, layout: str) -> None:
    write(tmp_path, rows, size, layout)
    path = checkpoint_path(tmp_path, 100)

    def rank(team: ThreadTeam) -> bool:
        found = load(path, team, lambda header: bounds(header.rows, 4, team.rank))
        return same_bits(found.rows, cut(state(rows), *bounds(rows, 4, team.rank)))

    assert all(run_ranks(4, rank))
    with h5py.File(path, "r") as file:
        assert file["columns/x"].shape == (rows,)


def test_no_columns_at_all(tmp_path: Path) -> None:
    view = state(5, Schema(()))
    path = write_checkpoint(tmp_path, header_of(view, Schema(())), view, SoloTeam())
    assert same_bits(load(path, SoloTeam(), whole).rows, view)


@pytest.mark.parametrize("name", ["a/b", ".", "..", "", "50%", "%2F", "Höhe", "nul\0", "a b"])
def test_any_column_name(tmp_path: Path, name: str) -> None:
    schema = Schema((Column(name, "float32"), Column("x", "int8")))
    view = state(9, schema)
    for size in (1, 2):
        header = header_of(view, schema, label="nul\0 and \ud800")

        def rank(team: ThreadTeam, size: int = size, header: CheckpointHeader = header) -> Path:
            return write_checkpoint(tmp_path, header, cut(view, *bounds(9, size, team.rank)), team)

        path = run_ranks(size, rank)[0]
        found = load(path, SoloTeam(), whole)
        assert same_bits(found.rows, view)
        assert found.header.label == "nul\0 and \ud800"


def test_a_plan_of_more_than_64_kib(tmp_path: Path) -> None:
    view = state(3)
    header = header_of(view)
    header.plan["ranges"] = list(range(50_000))  # type: ignore[index]
    path = write_checkpoint(tmp_path, header, view, SoloTeam())
    assert read_header(path).plan["ranges"][-1] == 49_999
    with h5py.File(path, "r") as file:
        assert len(json.loads(file.attrs["plan"])["ranges"]) == 50_000


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_ranges_of_rows_and_columns(tmp_path: Path, size: int, layout: str) -> None:
    write(tmp_path, 101, size, layout, custom_ids=True)
    path, view = checkpoint_path(tmp_path, 100), state(101, custom_ids=True)
    for start, stop in [(0, 101), (0, 0), (101, 101), (33, 34), (30, 70), (49, 51), (0, 1), (100, 101)]:
        assert same_bits(read_rows(path, start, stop), cut(view, start, stop))
    found = read_rows(path, 5, columns=["state"])
    assert found.names == ("state",)
    assert found.columns[0].tobytes() == view.columns[1][5:].tobytes()
    for start, stop in [(-1, 4), (4, 102), (7, 6)]:
        with pytest.raises(CheckpointFileError, match="it has no rows"):
            read_rows(path, start, stop)
    with pytest.raises(CheckpointFileError, match="it has no column y; it has x, state"):
        read_rows(path, columns=["x", "y"])


def test_default_ids_are_numbers_only_where_asked_for(tmp_path: Path) -> None:
    write(tmp_path, 20, 2)
    path = checkpoint_path(tmp_path, 100)
    assert read_rows(path, 5, 15).ids is None
    ids = read_rows(path, 5, 15, ids=True).ids
    assert ids is not None
    assert ids.tolist() == list(range(5, 15))


def test_only_the_shards_that_are_needed_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 100, 5)
    opened: list[str] = []
    read_file = reading_module.read_file

    def spy(path: Path, *arguments: object) -> None:
        opened.append(path.name)
        read_file(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reading_module, "read_file", spy)
    read_rows(checkpoint_path(tmp_path, 100), 25, 45)
    assert opened == ["rank_00001.h5", "rank_00002.h5"]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("text", ["gzip", "gzip:9", "lzf"])
def test_compressed_columns(tmp_path: Path, size: int, text: str) -> None:
    view = state(5000, ALL)
    header = header_of(view, ALL)
    options = StorageOptions(compression={"*": text, "ids": "gzip", "c_int8": "lzf"}, chunk_rows=1024)

    def rank(team: ThreadTeam) -> Path:
        return write_checkpoint(tmp_path, header, cut(view, *bounds(5000, size, team.rank)), team, options)

    path = run_ranks(size, rank)[0]
    assert same_bits(load(path, SoloTeam(), whole).rows, view)
    shard = path if size == 1 else next(tmp_path.glob("*.shards-*")) / "rank_00001.h5"
    with h5py.File(shard, "r") as file:
        assert file["columns/c_float32"].compression == text.partition(":")[0]
        assert file["columns/c_int8"].compression == "lzf"
        assert file["ids"].id.get_storage_size() < 8 * file["ids"].shape[0] / 4


def test_a_shared_file_cannot_be_compressed_without_parallel_hdf5(tmp_path: Path) -> None:
    view = state(10)
    header, options = header_of(view), StorageOptions("single", {"x": "gzip"})

    def rank(team: ThreadTeam) -> str:
        with pytest.raises(JobError, match="parallel HDF5") as caught:
            write_checkpoint(tmp_path, header, cut(view, *bounds(10, 2, team.rank)), team, options)
        return str(caught.value)

    assert len(set(run_ranks(2, rank))) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "choices",
    [
        {"layout": "singel"},
        {"shards": "nodes"},
        {"compression": {"x": "zip"}},
        {"compression": {"x": "gzip:10"}},
        {"compression": {"x": "lzf:1"}},
        {"chunk_rows": 0},
        {"keep": -1},
    ],
)
def test_settings_that_cannot_be_right(choices: dict[str, object]) -> None:
    with pytest.raises(JobError):
        StorageOptions(**choices)  # type: ignore[arg-type]


MACHINES = [
    # Ranks by machine, in the order of their numbers, and the first ranks of the shards that this makes.
    ("aabb", [0, 2]),
    ("aabbb", [0, 2]),
    ("abab", [0, 1, 2, 3]),
    ("aaab", [0, 3]),
    ("aa", [0]),
]


@pytest.mark.parametrize(("machines", "firsts"), MACHINES)
@pytest.mark.parametrize("rows", [0, 1, 3, 1000])
def test_a_shard_for_each_machine(tmp_path: Path, machines: str, firsts: list[int], rows: int) -> None:
    view, size = state(rows, ALL), len(machines)
    header = header_of(view, ALL)

    def rank(team: ThreadTeam) -> Path:
        team.host = machines[team.rank]
        team.node_rank = machines[: team.rank].count(team.host)
        part = cut(view, *bounds(rows, size, team.rank))
        return write_checkpoint(tmp_path, header, part, team, options_of("node"))

    path = run_ranks(size, rank)[0]
    assert same_bits(load(path, SoloTeam(), whole).rows, view)
    shards = {int(shard.stem.removeprefix("node_")) for shard in tmp_path.glob("*.shards-*/*.h5")}
    ends = [*firsts[1:], size]
    with_rows = {
        a
        for a, b in zip(firsts, ends, strict=True)
        if bounds(rows, size, a)[0] < bounds(rows, size, b - 1)[1]
    }
    assert shards == with_rows
    for size_of_team in (1, 3):

        def read(team: ThreadTeam, size_of_team: int = size_of_team) -> bool:
            mine = bounds(rows, size_of_team, team.rank)
            return same_bits(load(path, team, lambda header: mine).rows, cut(view, *mine))

        assert all(run_ranks(size_of_team, read))


def test_compressed_columns_have_no_shard_for_a_machine(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="need a shard for each rank"):
        run_ranks(2, lambda team: CheckpointWriter(tmp_path, team, options_of("node", {"x": "gzip"})))


def test_columns_start_where_the_settings_say(tmp_path: Path) -> None:
    view = state(100_000, custom_ids=True)
    write_checkpoint(tmp_path, header_of(view), view, SoloTeam(), StorageOptions(alignment=1 << 20))
    with h5py.File(checkpoint_path(tmp_path, 100), "r") as file:
        assert [file[name].id.get_offset() % (1 << 20) for name in ("ids", "columns/x")] == [0, 0]


# What does not fit is not written.


def test_a_state_that_is_not_the_headers_is_refused(tmp_path: Path) -> None:
    view, other = state(10), state(10, seed=1)
    for wrong in (header_of(state(11)), header_of(state(10, step=99)), header_of(state(10, custom_ids=True))):
        with pytest.raises(CheckpointFileError, match="the header is not that of the state"):
            write_checkpoint(tmp_path, wrong, view, SoloTeam())
    with pytest.raises(CheckpointFileError, match="the state to be written has the fingerprint"):
        write_checkpoint(tmp_path, header_of(other), view, SoloTeam())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["single", "sharded", "node"])
@pytest.mark.parametrize("cuts", [(0, 4, 5, 10), (0, 6, 5, 10), (0, 5, 5, 9), (1, 5, 5, 10)])
def test_rows_that_do_not_cover_the_population_are_refused(
    tmp_path: Path, layout: str, cuts: tuple[int, ...]
) -> None:
    view = state(10)
    header = header_of(view)

    def rank(team: ThreadTeam) -> None:
        part = cut(view, *cuts[2 * team.rank : 2 * team.rank + 2])
        with pytest.raises(CheckpointFileError, match="ranks wrote"):
            write_checkpoint(tmp_path, header, part, team, options_of(layout))

    run_ranks(2, rank)
    assert list(tmp_path.iterdir()) == []


# What is not whole is refused.


def refuse(path: Path, text: str | None = None) -> CheckpointFileError:
    """Check that a checkpoint is refused in one line that names a file of it."""
    with pytest.raises(CheckpointFileError, match=text) as caught:
        load(path, SoloTeam(), whole)
    assert "\n" not in str(caught.value)
    assert str(path.parent) in str(caught.value)
    return caught.value


@pytest.mark.parametrize(("size", "layout", "stride"), [(1, "single", 1), (2, "sharded", 7), (3, "node", 7)])
def test_flipped_bytes_are_refused(tmp_path: Path, size: int, layout: str, stride: int) -> None:
    write(tmp_path, 6, size, layout)
    path, tried = checkpoint_path(tmp_path, 100), 0
    for name in sorted(found for found in tmp_path.rglob("*") if found.is_file()):
        with name.open("r+b", buffering=0) as file:
            for position, byte in list(enumerate(file.readall()))[::stride]:
                os.pwrite(file.fileno(), bytes([byte ^ 1 << position % 8]), position)
                # Nothing of HDF5 is reached.
                with pytest.raises(CheckpointFileError):
                    prove(path)
                os.pwrite(file.fileno(), bytes([byte]), position)
                tried += 1
    assert tried > 1000
    assert same_bits(load(path, SoloTeam(), whole).rows, state(6))


@pytest.mark.parametrize(("size", "layout"), [(1, "single"), (2, "sharded")])
def test_files_of_another_length_are_refused(tmp_path: Path, size: int, layout: str) -> None:
    write(tmp_path, 6, size, layout)
    path = checkpoint_path(tmp_path, 100)
    for file in sorted(found for found in tmp_path.rglob("*") if found.is_file()):
        data = file.read_bytes()
        for length in (0, 1, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:length])
            assert refuse(path).damaged
        file.write_bytes(data + b"\0")
        refuse(path)
        file.unlink()
        refuse(path, "no such file|No such file")
        file.mkdir()
        refuse(path)
        file.rmdir()
        file.write_bytes(data)
    load(path, SoloTeam(), whole)


def test_blocks_beyond_the_first_are_proven_too(tmp_path: Path) -> None:
    schema = Schema((Column("x", "float64"),))
    view = state(BLOCK_BYTES // 8 * 4, schema)
    path = write_checkpoint(tmp_path, header_of(view, schema), view, SoloTeam())
    size = path.stat().st_size
    for position in (0, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 5, size - 1):
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 8]))
        block = position // BLOCK_BYTES * BLOCK_BYTES
        refuse(path, rf"its bytes {block} to {min(block + BLOCK_BYTES, size)} are not those")
        for size_of_team in (2, 3):
            with pytest.raises(CheckpointFileError, match="are not those"):
                run_ranks(size_of_team, lambda team: prove(path, team))
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([byte]))
    assert same_bits(load(path, SoloTeam(), whole).rows, view)


def test_a_size_without_end_is_refused_although_its_checksum_holds(tmp_path: Path) -> None:
    write(tmp_path, 8)
    [path] = list_checkpoints(tmp_path)
    proof = proof_path(path)
    text = proof.read_bytes()
    changed = re.sub(rb'"bytes": \d+', b'"bytes": 1e999', text[46:])
    assert changed != text[46:]
    proof.write_bytes(text[:14] + xxhash.xxh3_128_hexdigest(changed).encode() + changed)
    with pytest.raises(CheckpointFileError, match="the proof is not understood: OverflowError"):
        verify(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "step_0000000001.h5"
    with h5py.File(foreign, "w") as file:
        file["x"] = 1
    refuse(foreign, "nothing proves the checkpoint")
    proof_path(foreign).write_text('{"some": "json"}')
    refuse(foreign, "not the proof of a checkpoint")
    folder = tmp_path / "step_0000000002.h5"
    folder.mkdir()
    assert refuse(folder, "it is a folder").damaged
    assert not refuse(tmp_path / "step_0000000003.h5", "no such file").damaged
    refuse(tmp_path / "nul\0", "no such file")


def resealed(path: Path, change: tuple[str, str]) -> None:
    """Change the text of a proof and give it the checksum of the new one, as another program might."""
    text = proof_path(path).read_bytes()
    changed = text.replace(change[0].encode(), change[1].encode())
    assert changed != text
    import xxhash

    proof_path(path).write_bytes(
        changed[:14] + xxhash.xxh3_128_hexdigest(changed[46:]).encode() + changed[46:]
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (('"version": 1', '"version": 2'), "its format is version 2, this program reads 1"),
        (("rustsim-hpc checkpoint proof", "another proof"), "the proof of something else: another proof"),
        (('"rows": 6', '"rows": 7'), "the files hold 6 rows of 7"),
        (('"rows": 6', '"rows": -6'), "-6 is not a count"),
        (('"rows": 6', '"lines": 6'), "not understood: KeyError"),
        (('"float32"', '"float31"'), "not understood"),
        (
            ('"name": "step_0000000100.h5"', '"name": "../step_0000000100.h5"'),
            "outside of the checkpoint's folder",
        ),
        (('"name": "step_0000000100.h5"', '"name": "step_0000000200.h5"'), "that of step_0000000200.h5"),
        (('"fingerprint": {', '"fingerprint": 5, "old": {'), "not understood"),
        (('{\n "format"', '[{\n "format"'), "not understood"),
        # What it says is whole, but the files are not so.
        (('"float32"', '"float64"'), "/columns/x is float32"),
        (('"name": "state"', '"name": "status"'), "it has no /columns/status"),
        (('"step_index": 100', '"step_index": 101'), "its fingerprint is 0x"),
        (('"rows": [\n    0,\n    6', '"rows": [\n    0,\n    5'), "the files hold 5 rows of 6"),
    ],
)
def test_a_proof_that_says_something_else_is_refused(
    tmp_path: Path, change: tuple[str, str], text: str
) -> None:
    write(tmp_path, 6)
    path = checkpoint_path(tmp_path, 100)
    resealed(path, change)
    refuse(path, text)


def test_values_that_hdf5_reads_otherwise_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 6)
    path, read_file = checkpoint_path(tmp_path, 100), reading_module.read_file

    def misread(
        file: Path, header: CheckpointHeader, start: int, out: dict[int, np.ndarray], at: int, done: Any
    ) -> None:
        def also_wrong(index: int, first: int, end: int) -> None:
            if index == 1:
                out[1][3] ^= 1
            done(index, first, end)

        read_file(file, header, start, out, at, also_wrong)

    monkeypatch.setattr(reading_module, "read_file", misread)
    refuse(path, "what was read of state is not what was written")


def test_the_manifest_is_the_same_after_a_round_trip(tmp_path: Path) -> None:
    write(tmp_path, 6, 2)
    manifest = prove(checkpoint_path(tmp_path, 100))
    assert isinstance(manifest, Manifest)
    assert manifest.layout == "sharded"
    assert parse_manifest(render_manifest(manifest), tmp_path) == manifest
    assert [(file.start, file.stop) for file in manifest.files] == [(0, 0), (0, 3), (3, 6)]


@pytest.mark.parametrize("data", [b"", b"{", b'{"xxh3_128": "', b"\xff" * 100, b"null", b"[" * 100_000])
def test_any_bytes_as_a_proof_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CheckpointFileError):
        parse_manifest(data, tmp_path / "proof")


@pytest.mark.parametrize("scheme", ["digest", "fnv1a"])
def test_a_checkpoint_is_verified_piece_by_piece(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring_module, "_PIECE_ROWS", 7)
    view = state(100, ALL, custom_ids=True)
    header = header_of(view, ALL, scheme)
    path = run_ranks(
        2, lambda team: write_checkpoint(tmp_path, header, cut(view, *bounds(100, 2, team.rank)), team)
    )[0]
    for readers in (1, 3):
        manifests = run_ranks(readers, lambda team: verify(path, team))
        assert {manifest.header.fingerprint.value for manifest in manifests} == {header.fingerprint.value}
    for change, text in (
        (('"step_index": 100', '"step_index": 99'), "its fingerprint is"),
        (('"c_int8"', '"x"'), "no /columns/x"),
    ):
        resealed(path, change)
        for readers in (1, 3):
            with pytest.raises(CheckpointFileError, match=text):
                run_ranks(readers, lambda team: verify(path, team))
        resealed(path, change[::-1])


# The folder.


def test_newest_first_and_other_files_do_not_count(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nowhere") == []
    for step in (5, 20, 12_345_678_901):
        write(tmp_path, 3, step=step)
    (tmp_path / "step_1.h5").touch()
    (tmp_path / "notes.txt").touch()
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step_12345678901.h5", "step_0000000020.h5", "step_0000000005.h5"]


@pytest.mark.parametrize(
    ("keep", "every", "dropped"),
    [
        (0, 0, []),
        (0, 5, []),
        (1, 0, [5, 10, 15, 20]),
        (2, 0, [5, 10, 15]),
        (9, 0, []),
        (1, 10, [5, 15]),
        (2, 15, [5, 10]),
    ],
)
def test_what_retention_drops(keep: int, every: int, dropped: list[int]) -> None:
    assert steps_to_drop([25, 20, 15, 10, 5], keep, every) == dropped


def test_retention_removes_all_of_a_checkpoint(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, 4, 2, step=step)
    assert retain(tmp_path, 2, 0) == [checkpoint_path(tmp_path, 5)]
    assert not list(tmp_path.glob("step_0000000005*"))
    view = state(4, step=20)
    write_checkpoint(tmp_path, header_of(view), view, SoloTeam(), StorageOptions(keep=1, keep_every=10))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_0000000020.h5", "step_0000000010.h5"]
    assert sweep(tmp_path) == []


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    for size, layout in [*LAYOUTS, (1, "single"), (2, "sharded"), (3, "sharded")]:
        write(tmp_path, 12, size, layout, seed=size)
        found = load(checkpoint_path(tmp_path, 100), SoloTeam(), whole)
        assert same_bits(found.rows, state(12, seed=size))
        shards = 1 if size > 1 and layout != "single" else 0
        assert len(list(tmp_path.iterdir())) == 2 + shards
        assert sweep(tmp_path) == []


def test_left_overs_are_swept_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 8, 2)
    keep = sorted(tmp_path.rglob("*"))
    (tmp_path / "notes.txt").touch()
    bad = tmp_path / "step_0000000050.h5.bad"
    bad.touch()
    litter = [
        tmp_path / ".step_0000000100.h5.77.abcd.rustsim-tmp",
        tmp_path / "step_0000000300.proof.json",
        tmp_path / "step_0000000300.previous.proof.json",
    ]
    for path in litter:
        path.touch()
    for name in ("step_0000000300.shards-00ff", "step_0000000100.shards-00ff"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank_00000.h5").touch()
        litter.append(tmp_path / name)
    assert sorted(sweep(tmp_path)) == sorted(litter)
    assert sorted(tmp_path.rglob("*")) == sorted([*keep, tmp_path / "notes.txt", bad])
    assert sweep(tmp_path / "nowhere") == []


def test_the_shards_of_a_damaged_checkpoint_are_not_swept(tmp_path: Path) -> None:
    write(tmp_path, 8, 2)
    path = checkpoint_path(tmp_path, 100)
    proof_path(path).write_text("gone")
    before = sorted(tmp_path.rglob("*"))
    assert sweep(tmp_path) == []
    assert sorted(tmp_path.rglob("*")) == before


def test_the_newest_that_holds_is_loaded_and_the_others_moved_aside(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, 8, 2, step=step)
    damaged = next(tmp_path.glob("step_0000000030.shards-*")) / "rank_00001.h5"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    proof_path(checkpoint_path(tmp_path, 20)).unlink()

    rejected: list[str] = []

    def reject(path: Path, reason: str) -> None:
        rejected.append(move_aside(path, reason).name)

    def rank(team: ThreadTeam) -> int:
        found = load_newest(tmp_path, team, lambda header: bounds(header.rows, 3, team.rank), None, reject)
        assert found is not None
        assert same_bits(found.rows, cut(state(8, step=10), *bounds(8, 3, team.rank)))
        return found.header.step_index

    assert run_ranks(3, rank) == [10] * 3
    assert rejected == ["step_0000000030.h5.bad", "step_0000000020.h5.bad"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_0000000010.h5"]
    assert (tmp_path / "step_0000000030.h5.bad").exists()
    assert list(tmp_path.glob("step_0000000030.shards-*.bad/rank_00001.h5"))
    assert "rank_00001.h5: it has" in (tmp_path / "step_0000000030.h5.bad.txt").read_text()
    sweep(tmp_path)
    assert (tmp_path / "step_0000000030.proof.json.bad").exists()


def test_one_step_may_be_asked_for(tmp_path: Path) -> None:
    assert load_newest(tmp_path, SoloTeam(), whole) is None
    for step in (10, 20):
        write(tmp_path, 8, step=step)
    found = load_newest(tmp_path, SoloTeam(), whole, at=10)
    assert found is not None
    assert found.header.step_index == 10
    with pytest.raises(CheckpointFileError, match="no checkpoint of step 15") as caught:
        load_newest(tmp_path, SoloTeam(), whole, at=15)
    assert caught.value.hint == "there are steps 10, 20; checkpoint.keep says how many are kept"
    checkpoint_path(tmp_path, 10).write_bytes(b"")
    with pytest.raises(CheckpointFileError, match="it has 0 bytes"):
        load_newest(tmp_path, SoloTeam(), whole, at=10)


def test_what_is_out_of_reach_is_not_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 8)

    def deny(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("rustsim_hpc.storage.proof.read_bytes", deny)
    with pytest.raises(CheckpointFileError, match="Permission denied") as caught:
        load_newest(tmp_path, SoloTeam(), whole)
    assert not caught.value.damaged
    assert len(list_checkpoints(tmp_path)) == 1


def test_two_bad_ones_of_the_same_step_have_two_names(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        write(tmp_path, 8)
        names.append(move_aside(checkpoint_path(tmp_path, 100), "why not").name)
    assert names == [f"step_0000000100.h5.bad{number}" for number in ("", "2", "3")]
    assert (tmp_path / "step_0000000100.proof.json.bad3").exists()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("custom_ids", [True, False])
def test_rows_are_read_to_where_they_stay(tmp_path: Path, size: int, custom_ids: bool) -> None:
    given = state(100, ALL, custom_ids=custom_ids)
    path = write_all(tmp_path, given, ALL, 2)

    def rank(team: Team) -> None:
        mine = bounds(100, size, team.rank)
        rooms: list[StateView] = []

        def room_for(header: CheckpointHeader, start: int, stop: int) -> StateView:
            rooms.append(restoring_module.fresh_room(header, start, stop))
            return rooms[-1]

        found = load(path, team, lambda header: mine, room_for)
        assert found.rows is rooms[0]
        assert same_bits(rooms[0], cut(given, *mine))

    run_ranks(size, rank)


def test_threads_that_find_memory_beside_the_proof_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 9 * BLOCK_BYTES // 16
    monkeypatch.setattr(proof_module, "_THREADED_BLOCKS", 1)
    schema = Schema((Column("x", "float64"), Column("flag", "bool")))
    given = state(rows, schema, seed=5)
    path = write_all(tmp_path, given, schema, 1)
    assert same_bits(load(path, SoloTeam(), lambda header: (0, rows)).rows, given)
    parts = [(0, rows // 3 + 1), (rows // 3 + 1, rows - 5), (rows - 5, rows)]

    def rank(team: Team) -> None:
        found = load(path, team, lambda header: parts[team.rank])
        assert same_bits(found.rows, cut(given, *parts[team.rank]))

    run_ranks(3, rank)
    with path.open("r+b") as file:
        file.seek(-BLOCK_BYTES // 2, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 64]))
    refuse(path, "are not those that were written")


def test_room_that_cannot_be_had_on_one_rank_is_told_to_all(tmp_path: Path) -> None:
    write(tmp_path, 8, 2)
    path = checkpoint_path(tmp_path, 100)

    def rank(team: Team) -> int | None:
        def room_for(header: CheckpointHeader, start: int, stop: int) -> StateView:
            if team.rank == 1:
                raise ColumnMemoryError("no more")
            return restoring_module.fresh_room(header, start, stop)

        with pytest.raises(ColumnMemoryError, match="no more") as caught:
            load(path, team, lambda header: bounds(8, 2, team.rank), room_for)
        return caught.value.rank

    assert run_ranks(2, rank) == [1, 1]
    # A file that does not hold is told first: it is to be moved aside, whoever asks for it.
    with path.open("r+b") as file:
        file.write(b"?")
    with pytest.raises(CheckpointFileError, match="are not those that were written"):
        run_ranks(2, rank)


def test_a_failure_to_read_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    write(tmp_path, 8, 2)
    path = checkpoint_path(tmp_path, 100)

    def rank(team: Team) -> str:
        def rows_for(header: CheckpointHeader) -> tuple[int, int]:
            return (0, 99) if team.rank == 1 else (0, 8)

        with pytest.raises(CheckpointFileError, match="no rows 0 to 99") as caught:
            load(path, team, rows_for)
        return f"{caught.value} on {caught.value.rank}"

    assert len(set(run_ranks(3, rank))) == 1
