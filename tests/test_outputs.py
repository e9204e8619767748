"""Outputs: what is declared, what is written, and that no kill doubles, tears or loses a row."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from rustsim_hpc.errors import ModelError, OutputError
from rustsim_hpc.modeling.bound_model import Results
from rustsim_hpc.modeling.outputs import Arrays, Output, Picture, Sample, Series, check_outputs
from rustsim_hpc.run_folder import array_file
from rustsim_hpc.run_folder.array_file import read_samples
from rustsim_hpc.run_folder.output_set import OutputSet
from rustsim_hpc.run_folder.sample_journal import journal_path
from rustsim_hpc.run_folder.series_file import SeriesFile, read_series

ROOT = Path(__file__).parents[1]


def curve(every: int = 1) -> Series:
    return Series("curve.csv", lambda c: {"day": c.step_index, "x": c.step_index / 3}, ("day", "x"), every)


def counts(every: int = 1) -> Arrays:
    return Arrays(
        "counts.h5",
        {"n": lambda c: np.arange(3) + c.step_index, "half": lambda c: np.float32(c.step_index / 2)},
        every,
    )


def positions(every: int = 1) -> Sample:
    return Sample("positions.h5", ("x", "alive"), 4, every)


def sampled(step: int) -> dict[str, dict[str, Any]]:
    return {
        "positions.h5": {
            "x": np.arange(4, dtype=np.float32) + np.float32(step),
            "alive": np.array([1, 0, 1, step % 2], np.bool_),
        }
    }


def run_steps(outputs: OutputSet, first: int, last: int, flush_every: int = 0) -> None:
    for step in range(first, last + 1):
        if outputs.due(step):
            outputs.record(step, step * 0.5, SimpleNamespace(step_index=step), sampled(step))
        if flush_every and step % flush_every == 0:
            outputs.flush()


def opened(folder: Path, declarations: list[Output], resume: int | None = None, first: int = 0) -> OutputSet:
    outputs = OutputSet(declarations, folder, agents=10)
    outputs.open(resume, first)
    return outputs


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.csv")):
        found[path.name] = path.read_bytes()
    for path in sorted(folder.rglob("*.h5")):
        for name, array in read_samples(path).items():
            found[f"{path.name}/{name}"] = (array.dtype.str, array.shape, array.tobytes())
    return found


ALL: list[Output] = [curve(), counts(), positions()]


# --- declarations


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Series("curve.txt", len, ("a",)), "ends in .csv"),
        (lambda: Series("../curve.csv", len, ("a",)), "not a name"),
        (lambda: Series("/curve.csv", len, ("a",)), "not a name"),
        (lambda: Series("checkpoints/curve.csv", len, ("a",)), "not a name"),
        (lambda: Series("", len, ("a",)), "file name"),
        (lambda: Series("c.csv", len, "abc"), "columns must be a sequence"),  # type: ignore[arg-type]
        (lambda: Series("c.csv", len, ()), "columns must be a sequence"),
        (lambda: Series("c.csv", len, ("a", "a")), "one name"),
        (lambda: Series("c.csv", len, ("a\nb",)), "cannot be the name"),
        (lambda: Series("c.csv", len, ("a",), every=0), "every must be"),
        (lambda: Series("c.csv", len, ("a",), every=True), "every must be"),
        (lambda: Series("c.csv", 3, ("a",)), "row must be a function"),  # type: ignore[arg-type]
        (lambda: Arrays("a.h5", {}), "must be functions"),
        (lambda: Arrays("a.h5", {"step": len}), 'named "step"'),
        (lambda: Arrays("a.h5", {"a/b": len}), 'named "a/b"'),
        (lambda: Arrays("a.h5", {"a": 3}), "must be functions"),  # type: ignore[dict-item]
        (lambda: Sample("a.h5", ("rows",)), 'named "rows"'),
        (lambda: Sample("a.h5", ("x",), -1), "rows must be"),
        (lambda: Sample("a.h5", ("x",), [1, -1]), "rows must be"),
        (lambda: Sample("a.h5", ("x",), "abc"), "rows must be"),  # type: ignore[arg-type]
        (lambda: Picture("p.jpg", print), "ends in .png or .svg or .pdf"),
        (lambda: Picture("p.png", print, size=(0, 1)), "greater than zero"),
    ],
)
def test_bad_declarations_are_refused(make: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        make()


def test_outputs_of_one_model_are_checked_together() -> None:
    check_outputs([*ALL, Picture("p.png", print)], ["x", "alive"])
    with pytest.raises(ModelError, match=r'two outputs are called "curve\.csv"'):
        check_outputs([curve(), curve()], [])
    with pytest.raises(ModelError, match=r'no column "alive".*'):
        check_outputs([positions()], ["x", "alife"])
    with pytest.raises(ModelError, match="is not an output"):
        check_outputs([print], [])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("rows", "agents", "expected"),
    [
        (4, 10, [0, 2, 5, 7]),
        (4, 2, [0, 1]),
        (4, 0, []),
        (slice(None, None, 4), 10, [0, 4, 8]),
        (slice(-2, None), 10, [8, 9]),
        ([7, 3], 10, [7, 3]),
        (range(3), 10, [0, 1, 2]),
        ([], 10, []),
    ],
)
def test_sampled_rows(rows: Any, agents: int, expected: list[int]) -> None:
    if isinstance(rows, list) and not rows:
        rows = np.array([], np.int64)
    found = Sample("s.h5", ("x",), rows).rows_of(agents)
    assert found.dtype == np.int64
    assert found.tolist() == expected


def test_a_sampled_row_beyond_the_population_is_refused() -> None:
    with pytest.raises(ModelError, match="no row 10 among 10 agents"):
        Sample("s.h5", ("x",), [10]).rows_of(10)


# --- what is written


def test_files_after_a_run(tmp_path: Path) -> None:
    outputs = opened(tmp_path, ALL)
    run_steps(outputs, 0, 6, flush_every=2)
    outputs.close()
    outputs.close()
    with (tmp_path / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["day"]) for row in rows] == list(range(7))
    assert [float(row["x"]) for row in rows] == [step / 3 for step in range(7)]
    with h5py.File(tmp_path / "counts.h5", "r") as file:
        assert file.attrs["format"] == "rustsim-hpc samples"
        assert file["step"][()].tolist() == list(range(7))
        assert file["time"][()].tolist() == [step / 2 for step in range(7)]
        assert file["n"].dtype == np.int64
        assert file["n"].maxshape == (None, 3)
        np.testing.assert_array_equal(file["n"][()], np.arange(3) + np.arange(7)[:, None])
        assert (file["half"].dtype, file["half"].shape) == (np.float32, (7,))
    with h5py.File(tmp_path / "positions.h5", "r") as file:
        assert file["rows"][()].tolist() == [0, 2, 5, 7]
        assert file["x"][2].tolist() == [2, 3, 4, 5]
        assert file["alive"].dtype == np.bool_
        assert file["alive"][3].tolist() == [True, False, True, True]
    assert set(outputs.files()) == {"curve.csv", "counts.h5", "positions.h5"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing is left over"
    manifest = json.loads((tmp_path / "outputs.json").read_text())
    assert [entry["kind"] for entry in manifest["outputs"]] == ["series", "arrays", "sample"]


def test_rows_of_several_kinds(tmp_path: Path) -> None:
    values = {
        "i": np.int64(-(2**63)),
        "u": 2**64 - 1,
        "f": np.float32(0.1),
        "d": 0.1 + 0.2,
        "nan": float("nan"),
        "inf": -np.inf,
        "b": np.bool_(True),
        "none": None,
        "text": 'a "quoted", one',
    }
    outputs = opened(tmp_path, [Series("k.csv", lambda _: values, tuple(values))])
    run_steps(outputs, 0, 0)
    outputs.close()
    found = read_series(tmp_path / "k.csv")
    assert found["i"].dtype == np.int64
    assert found["i"][0] == -(2**63)
    assert found["u"].dtype == np.uint64
    assert int(found["u"][0]) == 2**64 - 1
    assert found["f"][0] == float(np.float32(0.1))
    assert found["d"][0] == 0.1 + 0.2
    assert np.isnan(found["nan"][0])
    assert found["inf"][0] == -np.inf
    assert found["b"].tolist() == [True]
    assert found["text"][0] == 'a "quoted", one'
    assert found["none"].tolist() == [""]


def test_floats_read_back_bit_for_bit(tmp_path: Path) -> None:
    bits = np.random.default_rng(1).integers(0, 2**63, 300, np.uint64)
    floats = bits.view(np.float64)[~np.isnan(bits.view(np.float64))]
    outputs = opened(tmp_path, [Series("f.csv", lambda c: [floats[c.step_index]], ("v",))])
    run_steps(outputs, 0, len(floats) - 1)
    assert read_series(tmp_path / "f.csv")["v"].tobytes() == floats.tobytes()
    outputs.close()


def test_missing_values_are_nan_and_underscores_are_text(tmp_path: Path) -> None:
    outputs = opened(
        tmp_path, [Series("m.csv", lambda c: [c.step_index or None, f"{c.step_index}_0"], ("a", "b"))]
    )
    run_steps(outputs, 0, 2)
    outputs.close()
    found = read_series(tmp_path / "m.csv")
    np.testing.assert_array_equal(found["a"], [np.nan, 1, 2])
    assert found["b"].tolist() == ["0_0", "1_0", "2_0"]


def test_one_function_may_give_all_arrays(tmp_path: Path) -> None:
    outputs = opened(
        tmp_path, [Arrays("sub/a.h5", lambda c: {"z": np.zeros((2, 0)), "c": 1j * c.step_index})]
    )
    run_steps(outputs, 0, 2)
    outputs.close()
    found = read_samples(tmp_path / "sub" / "a.h5")
    assert found["z"].shape == (3, 2, 0)
    assert found["c"].tolist() == [0, 1j, 2j]


def test_readable_while_it_is_written(tmp_path: Path) -> None:
    outputs = opened(tmp_path, ALL)
    run_steps(outputs, 0, 3, flush_every=2)
    with (tmp_path / "curve.csv").open("ab") as file:
        file.write(b"4,1.3")
    assert read_series(tmp_path / "curve.csv")["day"].tolist() == [0, 1, 2, 3]
    with h5py.File(tmp_path / "counts.h5", "r") as file:
        assert file["step"][()].tolist() == [0, 1, 2], "any tool sees what was flushed"
    found = read_samples(tmp_path / "counts.h5")
    assert found["step"].tolist() == [0, 1, 2, 3], "the reader sees all"
    assert found["n"][3].tolist() == [3, 4, 5]
    assert read_samples(tmp_path / "positions.h5")["rows"].tolist() == [0, 2, 5, 7]
    outputs.close()


@pytest.mark.parametrize(
    ("declaration", "text"),
    [
        (Series("c.csv", lambda c: {"a": 1}, ("a", "b")), "no value for column b"),
        (Series("c.csv", lambda c: {"a": 1, "bb": 2}, ("a", "b")), 'no column "bb"'),
        (Series("c.csv", lambda c: [1, 2, 3], ("a", "b")), "3 values for 2 columns"),
        (Series("c.csv", lambda c: 5, ("a",)), "a row is a dict or a sequence"),  # type: ignore[arg-type, return-value]
        (Series("c.csv", lambda c: [[1]], ("a",)), "column a: .* is not a number"),
        (Series("c.csv", lambda c: ["1\n2"], ("a",)), "more than one line"),
        (Series("c.csv", lambda c: [1 // 0], ("a",)), "ZeroDivisionError"),
        (Arrays("c.h5", {"a": lambda c: "text"}), "numbers or truth values"),
        (Arrays("c.h5", lambda c: [1]), "expected a dict"),  # type: ignore[arg-type, return-value]
        (Sample("c.h5", ("x",), 4), "c.h5"),
    ],
)
def test_a_value_that_cannot_be_written_names_output_and_step(
    tmp_path: Path, declaration: Output, text: str
) -> None:
    outputs = opened(tmp_path, [curve(), declaration])
    with pytest.raises(OutputError, match=text) as caught:
        run_steps(outputs, 0, 0)
    assert 'output "c.' in str(caught.value)
    assert caught.value.step == 0
    assert caught.value.exit_code == 3
    assert len(read_series(tmp_path / "curve.csv")["day"]) == 0, "values are made before any is written"
    outputs.close()


def test_a_sample_that_changes_its_layout_is_refused(tmp_path: Path) -> None:
    outputs = opened(tmp_path, [Arrays("a.h5", {"n": lambda c: np.zeros(3 if c.step_index < 2 else 4)})])
    with pytest.raises(
        OutputError, match=r'array "n" is float64 \(4,\), in the samples before float64 \(3,\)'
    ):
        run_steps(outputs, 0, 2)
    outputs.close()
    assert read_samples(tmp_path / "a.h5")["step"].tolist() == [0, 1]
    outputs = OutputSet([Arrays("a.h5", {"n": lambda c: np.zeros(3, np.float32)})], tmp_path)
    outputs.open(1)
    with pytest.raises(OutputError, match="float32"):
        run_steps(outputs, 2, 2)
    outputs.close()


def test_a_due_step_cannot_be_left_out(tmp_path: Path) -> None:
    outputs = opened(tmp_path, [curve(2)])
    run_steps(outputs, 0, 2)
    with pytest.raises(OutputError, match="wants step 4 next, but got step 6"):
        outputs.record(6, 0.0, SimpleNamespace(step_index=6))
    outputs.close()


# --- resume


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("flush_every", [0, 2])
@pytest.mark.parametrize("closed", [True, False])
def test_resume_equals_an_uninterrupted_run(
    tmp_path: Path, every: int, flush_every: int, closed: bool
) -> None:
    declarations: list[Output] = [curve(every), counts(every), positions(every)]
    whole = tmp_path / "whole"
    whole.mkdir()
    outputs = opened(whole, declarations)
    run_steps(outputs, 0, 12)
    outputs.close()
    expected = content(whole)
    for stop, resume in [(7, 7), (9, 4), (6, 0)]:
        folder = tmp_path / f"{stop}-{resume}"
        folder.mkdir()
        outputs = opened(folder, declarations)
        run_steps(outputs, 0, stop, flush_every)
        if closed:
            outputs.close()
        again = opened(folder, declarations, resume)
        # The restored state is offered again; what is there already is not due.
        run_steps(again, resume, 12, flush_every)
        again.close()
        assert content(folder) == expected, (stop, resume)


def test_the_restored_states_own_row_is_made_up_for(tmp_path: Path) -> None:
    outputs = opened(tmp_path, ALL)
    run_steps(outputs, 0, 4)
    outputs.close()
    again = opened(tmp_path, ALL, resume=5)
    assert len(again.due(5)) == 3
    run_steps(again, 5, 6)
    again.close()
    assert read_series(tmp_path / "curve.csv")["day"].tolist() == list(range(7))
    assert read_samples(tmp_path / "counts.h5")["step"].tolist() == list(range(7))


@pytest.mark.parametrize("file", ["curve.csv", "counts.h5"])
def test_rows_lost_before_the_restored_step_are_an_error(tmp_path: Path, file: str) -> None:
    outputs = opened(tmp_path, [curve(), counts()])
    run_steps(outputs, 0, 4)
    outputs.close()
    with pytest.raises(
        OutputError, match=rf'"{file}" ends at step 4, but the run resumes at step 6'
    ) as caught:
        opened(tmp_path, [d for d in (curve(), counts()) if d.file == file], resume=6)
    assert "--at" in (caught.value.hint or "")
    (tmp_path / file).unlink()
    with pytest.raises(OutputError, match=f'output "{file}"'):
        opened(tmp_path, [curve(), counts()], resume=4)


def test_resume_with_other_outputs_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    outputs = opened(tmp_path, [curve()])
    run_steps(outputs, 0, 4)
    outputs.close()
    before = (tmp_path / "curve.csv").read_bytes()
    for other in (curve(2), counts(), Series("curve.csv", list, ("day", "y"))):
        with pytest.raises(OutputError, match="is not what the run was started with"):
            opened(tmp_path, [other], resume=2)
    (tmp_path / "outputs.json").write_text("{")
    with pytest.raises(OutputError, match="cannot be read"):
        opened(tmp_path, [curve()], resume=2)
    assert (tmp_path / "curve.csv").read_bytes() == before


def test_a_new_run_replaces_old_files(tmp_path: Path) -> None:
    outputs = opened(tmp_path, ALL)
    run_steps(outputs, 0, 9)
    outputs = opened(tmp_path, ALL)
    run_steps(outputs, 0, 1)
    outputs.close()
    assert read_samples(tmp_path / "counts.h5")["step"].tolist() == [0, 1]
    assert read_series(tmp_path / "curve.csv")["day"].tolist() == [0, 1]


def test_a_fork_starts_at_its_step(tmp_path: Path) -> None:
    declarations: list[Output] = [curve(2), counts(5)]
    outputs = opened(tmp_path, declarations, first=7)
    run_steps(outputs, 7, 11, flush_every=3)
    again = opened(tmp_path, declarations, resume=9)
    run_steps(again, 9, 12)
    again.close()
    assert read_series(tmp_path / "curve.csv")["day"].tolist() == [8, 10, 12]
    assert read_samples(tmp_path / "counts.h5")["step"].tolist() == [10]


def test_a_resume_before_any_output_was_opened_begins_there(tmp_path: Path) -> None:
    outputs = opened(tmp_path, [curve()], resume=5)
    run_steps(outputs, 5, 6)
    outputs.close()
    assert read_series(tmp_path / "curve.csv")["day"].tolist() == [5, 6]


# --- journals


def damaged_journal(tmp_path: Path, change: Any) -> list[int]:
    outputs = opened(tmp_path, [counts()])
    run_steps(outputs, 0, 2, flush_every=1)
    run_steps(outputs, 3, 6)
    path = journal_path(tmp_path / "counts.h5")
    path.write_bytes(change(path.read_bytes()))
    steps: list[int] = read_samples(tmp_path / "counts.h5")["step"].tolist()
    return steps


def test_a_torn_journal_is_read_up_to_its_last_whole_sample(tmp_path: Path) -> None:
    size = None
    for cut in (1, 7, 30, 60):
        folder = tmp_path / str(cut)
        folder.mkdir()
        assert damaged_journal(folder, lambda data, cut=cut: data[:-cut]) == [0, 1, 2, 3, 4, 5]
        outputs = opened(folder, [counts()], resume=5)
        run_steps(outputs, 6, 7)
        outputs.close()
        found = read_samples(folder / "counts.h5")
        assert found["n"][:, 0].tolist() == list(range(8))
        size = size or (folder / "counts.h5").stat().st_size
        assert (folder / "counts.h5").stat().st_size == size


def test_every_flipped_byte_of_a_journal_is_found(tmp_path: Path) -> None:
    outputs = opened(tmp_path, [counts()])
    run_steps(outputs, 0, 1, flush_every=1)
    run_steps(outputs, 2, 3)
    path = journal_path(tmp_path / "counts.h5")
    data = path.read_bytes()
    whole = content(tmp_path)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0x40
        path.write_bytes(flipped)
        found = read_samples(tmp_path / "counts.h5")
        steps = found["step"].tolist()
        assert steps in ([0, 1], [0, 1, 2])
        assert found["n"][:, 0].tolist() == steps
    path.write_bytes(data)
    assert content(tmp_path) == whole


def test_a_journal_that_was_folded_but_not_emptied_doubles_nothing(tmp_path: Path) -> None:
    outputs = opened(tmp_path, [counts()])
    run_steps(outputs, 0, 4)
    path = journal_path(tmp_path / "counts.h5")
    stale = path.read_bytes()
    outputs.flush()
    path.write_bytes(stale)
    assert read_samples(tmp_path / "counts.h5")["step"].tolist() == [0, 1, 2, 3, 4]
    outputs = opened(tmp_path, [counts()], resume=4)
    run_steps(outputs, 4, 6)
    path.write_bytes(stale + path.read_bytes())
    assert read_samples(tmp_path / "counts.h5")["step"].tolist() == list(range(7))
    again = opened(tmp_path, [counts()], resume=6)
    again.close()
    assert read_samples(tmp_path / "counts.h5")["n"][:, 0].tolist() == list(range(7))


def test_a_large_journal_is_folded_between_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_file, "LARGE_JOURNAL", 1000)
    monkeypatch.setattr(array_file, "SMALL_FILE", 0)
    monkeypatch.setattr(array_file, "_BATCH", 2500)
    outputs = opened(tmp_path, [Arrays("a.h5", {"n": lambda c: np.full(100, c.step_index)})])
    largest = 0
    for step in range(200):
        run_steps(outputs, step, step)
        largest = max(largest, journal_path(tmp_path / "a.h5").stat().st_size)
        limit = max(1000, (tmp_path / "a.h5").stat().st_size // 2) + 1000
        assert largest <= limit
    with h5py.File(tmp_path / "a.h5", "r") as file:
        assert len(file["step"]) > 90
    outputs.close()
    assert (read_samples(tmp_path / "a.h5")["n"] == np.arange(200)[:, None]).all()


# --- full disks


@pytest.mark.parametrize("shape", [(), (1,), (305, 4), (700, 1001), (3, 5000, 7), (2, 0), (1, 1, 600_001)])
@pytest.mark.parametrize("dtype", [np.bool_, np.float64])
def test_the_room_reserved_for_the_hdf5_file_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: Any
) -> None:
    reserved = []
    original = array_file._reserve
    monkeypatch.setattr(
        array_file, "_reserve", lambda path, size: (reserved.append(size), original(path, size))
    )
    many = 5 if np.prod(shape) > 10_000 else 300
    outputs = opened(tmp_path, [Arrays("a.h5", {"n": lambda c: np.full(shape, c.step_index % 2, dtype)})])
    path = tmp_path / "a.h5"
    for first, last in ((0, 0), (1, 2), (3, many)):
        run_steps(outputs, first, last)
        outputs.flush()
        assert path.stat().st_size <= reserved[-1]
        # What was reserved and not used is given back.
        with h5py.File(path, "r") as file:
            stored = sum(file[name].id.get_storage_size() for name in ("n", "step", "time"))
        assert path.stat().st_size <= stored + (100 << 10)
    outputs.close()
    found = read_samples(path)["n"]
    assert found.shape == (many + 1, *shape)
    assert (found == (np.arange(many + 1) % 2).reshape(-1, *(1 for _ in shape))).all()


def test_no_room_for_the_hdf5_file_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = opened(tmp_path, ALL)
    run_steps(outputs, 0, 3, flush_every=2)

    def full(folder: Path, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(array_file, "_reserve", full)
        with pytest.raises(OutputError, match=r'output "counts\.h5": cannot flush it:.*No space left'):
            outputs.flush()
        run_steps(outputs, 4, 5)
        with pytest.raises(OutputError, match="No space left") as caught:
            outputs.close()
        assert len(caught.value.others) == 1, "the other HDF5 file failed as well"
    assert read_samples(tmp_path / "counts.h5")["step"].tolist() == list(range(6))
    again = opened(tmp_path, ALL, resume=5)
    run_steps(again, 5, 7)
    again.close()
    assert read_samples(tmp_path / "counts.h5")["n"][:, 0].tolist() == list(range(8))
    assert read_series(tmp_path / "curve.csv")["day"].tolist() == list(range(8))


def limited(code: str, limit: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose files cannot grow beyond ``limit`` bytes: a disk that is full for it."""

    def limit_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        preexec_fn=limit_files,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


FULL_DISK = """
import sys
from pathlib import Path
import test_outputs as t
outputs = t.OutputSet(t.ALL, Path(sys.argv[1]), agents=10)
try:
    outputs.open()
    for step in range(100000):
        t.run_steps(outputs, step, step, flush_every=7)
except t.OutputError as error:
    print("STEP", error.step, error)
    try:
        outputs.close()
    except t.OutputError as second:
        print("CLOSE", second)
"""


@pytest.mark.parametrize("limit", [3000, 9000, 20011])
def test_a_file_that_cannot_grow_is_a_typed_error_and_a_resume_goes_on(tmp_path: Path, limit: int) -> None:
    done = limited(FULL_DISK, limit, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout, done.stdout
    assert "\n" not in done.stdout.split("STEP")[1].split("CLOSE")[0].strip(), "one clear line"
    if not (tmp_path / "outputs.json").exists():
        assert done.stdout.startswith("STEP None"), "the very first files did not fit"
        return
    reached = int(done.stdout.split()[1])
    have = min(len(read_series(tmp_path / "curve.csv")["day"]), reached)
    resume = max(0, have - 1)
    again = opened(tmp_path, ALL, resume)
    run_steps(again, resume, reached + 5)
    again.close()
    assert read_series(tmp_path / "curve.csv")["day"].tolist() == list(range(reached + 6))
    assert read_samples(tmp_path / "counts.h5")["step"].tolist() == list(range(reached + 6))


# --- kills

KILLED = """
import sys
from pathlib import Path
import test_outputs as t
from rustsim_hpc.files import write_atomic
folder, resume = Path(sys.argv[1]), int(sys.argv[2])
checkpoint = folder / "checkpoint"
outputs = t.opened(folder, t.ALL, resume if resume else None)
print("open", flush=True)
for step in range(resume, 1000000):
    t.run_steps(outputs, step, step)
    if step % 5 == 0:
        outputs.flush()
        write_atomic(checkpoint, str(step))
    t.time.sleep(0.0003)
"""


def test_killed_at_random_moments_and_resumed(tmp_path: Path) -> None:
    rng = random.Random(5)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    resume = 0
    for kills in range(80):
        if kills >= 8 and resume > 20:  # on a busy machine it takes more of them to come so far
            break
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(resume)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        if rng.random() < 0.8:
            assert process.stdout.readline() == "open\n"
            time.sleep(rng.uniform(0, 0.25))
        else:
            time.sleep(rng.uniform(0.3, 1.0))
        process.kill()
        process.wait()
        process.stdout.close()
        checkpoint = tmp_path / "checkpoint"
        resume = int(checkpoint.read_text()) if checkpoint.exists() else 0
        if resume:
            steps = read_samples(tmp_path / "counts.h5")["step"]
            assert len(steps) > resume
            assert (steps == np.arange(len(steps))).all()
    assert resume > 20
    last = resume + 3
    outputs = opened(tmp_path, ALL, resume)
    run_steps(outputs, resume, last)
    outputs.close()
    whole = tmp_path / "whole"
    whole.mkdir()
    reference = opened(whole, ALL)
    run_steps(reference, 0, last)
    reference.close()
    expected = content(whole)
    for path in whole.iterdir():
        path.unlink()
    assert content(tmp_path) == expected


# --- pictures


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    seen = []

    def draw(figure: Any, run: Any) -> None:
        seen.append(run)
        figure.subplots().plot([1, 2, 3])

    outputs = opened(tmp_path, [Picture("a.png", draw, size=(2, 1), dpi=50), Picture("plots/b.svg", draw)])
    outputs.close()
    outputs.draw_pictures("the run")
    assert seen == ["the run", "the run"]
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (100, 50)
    assert b"<svg" in (tmp_path / "plots" / "b.svg").read_bytes()
    assert set(outputs.files()) == {"a.png", "plots/b.svg"}
    assert "matplotlib.pyplot" not in sys.modules


def test_a_picture_that_fails_does_not_keep_the_others_away(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    def draw(figure: Any, run: Any) -> None:
        raise KeyError("no such series")

    outputs = opened(
        tmp_path,
        [Picture("bad.png", draw), Picture("good.png", lambda f, r: None), Picture("worse.png", draw)],
    )
    with pytest.raises(OutputError, match=r'picture "bad\.png": KeyError') as caught:
        outputs.draw_pictures(None)
    assert [str(other) for other in caught.value.others] == [
        "picture \"worse.png\": KeyError: 'no such series'"
    ]
    assert (tmp_path / "good.png").exists()
    assert not (tmp_path / "bad.png").exists()


def test_without_matplotlib_pictures_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outputs = opened(tmp_path, [Picture("a.png", print)])
    outputs.draw_pictures(None)
    error = capsys.readouterr().err
    assert error.startswith("pictures skipped: a.png: no matplotlib (")
    assert error.count("\n") == 1
    assert "rustsim-hpc[plot]" in error
    assert outputs.files() == {}


def test_a_result_that_is_not_there_is_told_with_those_that_are() -> None:
    results = Results(census=3, oldest=7)
    assert results["census"] == 3
    assert results.get("crowd") is None
    with pytest.raises(KeyError, match=r"no result crowd here, only: census, oldest"):
        results["crowd"]


@pytest.mark.parametrize("damage", [b"7", b"1,2,3", b"", b"\xff\xfe,1", b'"' + b"x" * 200_000 + b'",1'])
def test_a_damaged_line_of_a_series_is_told_with_its_number_and_not_gone_on_with(
    tmp_path: Path, damage: bytes
) -> None:
    path = tmp_path / "curve.csv"
    series = SeriesFile(path, ("day", "x"))
    series.start()
    for line in (b"0,0.0\n", damage + b"\n", b"2,0.5\n"):
        series.append(line)
    series.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 3"):
        read_series(path)
    with pytest.raises(ValueError, match="line 3"):
        SeriesFile(path, ("day", "x")).resume(3)
    assert path.read_bytes() == before


def test_flipped_bits_of_a_samples_file_are_an_error_or_change_nothing(tmp_path: Path) -> None:
    outputs = opened(tmp_path, [positions()])
    run_steps(outputs, 0, 9, flush_every=3)
    outputs.close()
    [path] = tmp_path.glob("*.h5")
    data, whole, rng = path.read_bytes(), read_samples(path), random.Random(4)
    found = 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 20))):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            same = read_samples(path)
        except (OSError, ValueError):
            found += 1
            continue
        assert same.keys() == whole.keys()
        assert all(same[name].tobytes() == whole[name].tobytes() for name in whole)
    assert found > 50
