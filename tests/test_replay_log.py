"""The replay log: round trips, reading while it grows, torn and damaged files, cutting back."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from rustsim_hpc.errors import OutputError, ReplayExhausted, ReplayLogError
from rustsim_hpc.proof.fingerprint import ReplayFingerprint, StateView, digest_sums, fingerprint_view
from rustsim_hpc.proof.replay import ReplayEntry, ReplayMode, ReplayRecorder
from rustsim_hpc.proof.replay_log import (
    ReplayHeader,
    header_differences,
    read_replay_log,
)
from rustsim_hpc.proof.replay_writer import ReplayLogWriter

ROOT = Path(__file__).parent.parent
FNV = ReplayHeader(
    scheme="fnv1a",
    job="flock",
    model="ab12",
    agents=3,
    seed=-7,
    columns=(("x", "float32"), ('Länge"', "int8")),
)
DIGEST = dataclasses.replace(FNV, scheme="digest", params={"dt": 0.5, "on": True, "n": 3}, notes=("a note",))


def entry(step, header=DIGEST, salt=0):
    """An entry as a run of this header would make it, of some state."""
    rng = np.random.default_rng([step, salt])
    columns = tuple(rng.integers(0, 100, header.agents).astype(dtype) for _, dtype in header.columns)
    names = tuple(name for name, _ in header.columns)
    view = StateView(step, header.agents, names, None, columns)
    fingerprint = fingerprint_view(view, header.scheme)
    if header.scheme == "fnv1a":
        return ReplayEntry(step, fingerprint.value)
    return ReplayEntry(
        step, fingerprint.value, "digest", dict(zip(header.value_names, digest_sums(view), strict=True))
    )


def write(path, steps, header=DIGEST, salt=0):
    with ReplayLogWriter(path, header) as writer:
        for step in steps:
            writer.append(entry(step, header, salt))
    return path


def steps_of(path):
    return [e.step_index for e in read_replay_log(path).entries]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "replay.jsonl"


# -- round trips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [FNV, DIGEST, dataclasses.replace(DIGEST, columns=(), agents=0, interval=5)]
)
def test_what_is_written_is_read(path, header):
    steps = [header.interval * k for k in (1, 2, 7)]
    log = read_replay_log(write(path, steps, header))
    assert log.path == path
    assert log.header == header
    assert log.entries == tuple(entry(step, header) for step in steps)
    assert [e.columns for e in log.entries] == [entry(step, header).columns for step in steps]


def test_the_lines_are_the_documented_ones(path):
    write(path, [1])
    head, line = (json.loads(text) for text in path.read_text(encoding="utf-8").splitlines())
    assert list(head) == [
        "format", "version", "scheme", "scheme_version", "job", "model", "agents", "seed", "interval",
        "params", "columns", "notes",
    ]  # fmt: skip
    assert head["columns"] == [{"name": "x", "dtype": "float32"}, {"name": 'Länge"', "dtype": "int8"}]
    made = entry(1)
    assert line == {
        "step": 1,
        "value": str(made),
        "columns": {name: f"{value:#018x}" for name, value in made.columns.items()},
    }


def test_columns_may_come_beside_a_bare_fingerprint_or_not_at_all(path):
    made = entry(1)
    with ReplayLogWriter(path, DIGEST) as writer:
        writer.append(ReplayFingerprint(1, made.value, "digest"), made.columns)
        writer.append(ReplayFingerprint(2, 5, "digest"))
    first, second = read_replay_log(path).entries
    assert first.columns == made.columns
    assert dict(second.columns) == {}


def test_a_log_is_readable_after_every_entry(path):
    with ReplayLogWriter(path, DIGEST, sync=True) as writer:
        assert steps_of(path) == []
        for step in (1, 2, 3):
            writer.append(entry(step))
            assert steps_of(path) == list(range(1, step + 1))
        writer.sync()


def test_a_new_log_replaces_an_old_one(path):
    write(path, [1, 2, 3])
    write(path, [5])
    assert steps_of(path) == [5]


# -- what the writer refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry(2), "does not come after step 2"),
        (entry(1), "does not come after step 2"),
        (ReplayFingerprint(3, 1, "fnv1a"), "has scheme fnv1a, the log has digest"),
        (ReplayEntry(3, 1, "digest", {"ids": 1, "x": 2}), "has values of ids, x, expected ids, x, L"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused_and_leaves_the_log(path, bad, message):
    with ReplayLogWriter(path, DIGEST) as writer:
        writer.append(entry(2))
        with pytest.raises(ReplayLogError, match=message):
            writer.append(bad)
        writer.append(entry(3))
    assert steps_of(path) == [2, 3]


def test_an_entry_between_intervals_is_refused(path):
    header = dataclasses.replace(FNV, interval=4)
    with ReplayLogWriter(path, header) as writer, pytest.raises(ReplayLogError, match="interval of 4 steps"):
        writer.append(entry(6, header))


def test_a_column_called_ids_is_refused():
    with pytest.raises(ReplayLogError, match='a column named "ids" cannot be recorded'):
        dataclasses.replace(FNV, columns=(("ids", "uint64"),))


def test_a_full_disk_is_a_typed_error_and_leaves_whole_lines(path, monkeypatch):
    writer = ReplayLogWriter(path, DIGEST)
    writer.append(entry(1))
    room = 30
    real = os.write

    def write_until_full(descriptor, data):
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(descriptor, data[: min(room, len(data))])
        room -= count
        return count

    monkeypatch.setattr("rustsim_hpc.files.os.write", write_until_full)
    with pytest.raises(OutputError, match=r"cannot write replay log .*: No space left on device") as error:
        writer.append(entry(2))
    assert error.value.step == 2
    monkeypatch.undo()
    assert path.read_bytes().endswith(b"\n")
    writer.append(entry(2))
    writer.close()
    assert steps_of(path) == [1, 2]


def test_a_folder_that_is_not_there_is_a_typed_error(tmp_path):
    with pytest.raises(OutputError, match="cannot write replay log"):
        ReplayLogWriter(tmp_path / "absent" / "replay.jsonl", DIGEST)


def test_a_closed_writer_says_so(path):
    writer = ReplayLogWriter(path, DIGEST)
    writer.close()
    writer.close()
    with pytest.raises(OutputError, match="is closed"):
        writer.append(entry(1))


# -- torn and damaged files ----------------------------------------------------------------------------


@pytest.mark.parametrize("header", [FNV, DIGEST])
def test_a_file_cut_at_any_byte_keeps_its_whole_lines(path, header):
    write(path, [1, 2], header)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        if whole == 0:
            with pytest.raises(ReplayLogError, match="line 1: there is no complete header"):
                read_replay_log(path)
        else:
            assert steps_of(path) == [1, 2][: whole - 1]


def test_a_flipped_bit_in_any_byte_of_a_digest_log_is_refused_or_harmless(path):
    """The entries prove themselves; of the header, what no entry depends on (job, model, …) may change."""
    data = write(path, [1, 2]).read_bytes()
    first = data.index(b"\n") + 1
    wanted = read_replay_log(path)
    for place in range(first, len(data)):
        for bit in (0, place % 7 + 1):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                found = read_replay_log(path).entries
            except ReplayLogError:
                continue
            assert found == wanted.entries[: len(found)]
            assert len(found) == 2 or (place == len(data) - 1 and len(found) == 1)
    for place in range(first):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            found = read_replay_log(path)
        except ReplayLogError:
            continue
        assert found.entries == wanted.entries
        assert (found.header.agents, found.header.columns) == (wanted.header.agents, wanted.header.columns)


def replaced(path, number, old, new):
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new)
    path.write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("number", "old", "new", "message"),
    [
        (1, '"rustsim-hpc replay"', '"another"', "line 1: this is not the header of a replay log"),
        (1, '"version": 1', '"version": 2', "line 1: format version 2 is not known"),
        (1, '"scheme": "fnv1a"', '"scheme": "md5"', "line 1: fingerprint scheme md5"),
        (1, '"scheme_version": 1', '"scheme_version": 3', "line 1: fingerprint scheme fnv1a version 3"),
        (1, '"agents": 3', '"agents": true', "line 1: agents is not of type int"),
        (1, '"agents": 3', '"agents": -3', "line 1: agents must be a 64-bit unsigned integer"),
        (1, '"agents": 3', '"agents": 18446744073709551616', "line 1: agents must be a 64-bit"),
        (1, '"interval": 1', '"interval": 0', "line 1: .* interval at least 1"),
        (1, '"int8"', '"int7"', "line 1: dtype int7 is not known"),
        (1, '"seed": -7, ', "", "line 1: seed is missing"),
        (1, '"dtype": "int8"', '"type": "int8"', "line 1: columns must have a name and a dtype"),
        (2, '"step": 1', '"step": 2', "line 3: step 2 does not come after step 2"),
        (3, '"step": 2', '"step": "2"', "line 3: step is not of type int"),
        (3, '"step": 2', '"step": -2', "line 3: step_index must be a 64-bit unsigned"),
        (3, '"step": 2, ', "", "line 3: step is missing"),
        (3, '"0x', '"0x0', "line 3: '0x0[0-9a-f]+' is not 0x and 16"),
        (3, '"value"', '"valeu"', "line 3: an entry has step, value and columns, and nothing else"),
        (2, "}", "", "line 2: Expecting"),
        (2, "{", "[", "line 2: "),
        (3, "}", ', "columns": {"ids": "0x0000000000000000"}}', "line 3: columns are ids, expected"),
    ],
)
def test_damage_is_refused_with_the_line(path, number, old, new, message):
    write(path, [1, 2], FNV)
    replaced(path, number, old, new)
    with pytest.raises(ReplayLogError, match=message) as error:
        read_replay_log(path)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "text", ["", "\n", "null\n", "[]\n", "\xff\n", "[" * 100_000 + "\n", "9" * 10_000 + "\n"]
)
def test_what_is_no_log_is_refused(path, text):
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ReplayLogError, match="line 1: "):
        read_replay_log(path)


def test_a_value_that_does_not_follow_from_its_columns_is_refused(path):
    write(path, [1, 2])
    other = f"{entry(1).value ^ 1:#018x}"
    replaced(path, 2, str(entry(1)), other)
    with pytest.raises(ReplayLogError, match=f"line 2: the value {other} does not follow from the columns"):
        read_replay_log(path)


def test_a_log_that_is_not_there_or_a_folder_is_a_typed_error(tmp_path):
    with pytest.raises(ReplayLogError, match="No such file"):
        read_replay_log(tmp_path / "absent.jsonl")
    with pytest.raises(ReplayLogError, match="Is a directory"):
        read_replay_log(tmp_path)


# -- restore and resume --------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3])])
def test_truncating_keeps_the_entries_up_to_the_step(path, step, kept):
    with ReplayLogWriter(path, DIGEST) as writer:
        for k in (1, 2, 3):
            writer.append(entry(k))
        writer.truncate_after(step)
        assert steps_of(path) == kept
        following = (kept or [0])[-1] + 1
        writer.append(entry(following))
        assert steps_of(path) == [*kept, following]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("torn", [0, 1, 40])
def test_resume_goes_on_without_duplicates(path, torn):
    """A killed run: a checkpoint at step 2, the log already at step 4, its last line torn."""
    write(path, [1, 2, 3, 4])
    path.write_bytes(path.read_bytes()[: -torn or None])
    with ReplayLogWriter(path, DIGEST, resume_step=2) as writer:
        assert steps_of(path) == [1, 2]
        for step in (3, 4, 5):
            writer.append(entry(step))
    resumed = path.read_bytes()
    assert resumed == write(path, [1, 2, 3, 4, 5]).read_bytes()


def test_resume_cuts_a_torn_line_even_at_its_own_step(path):
    write(path, [1, 2])
    with path.open("ab") as file:
        file.write(b'{"step": 3, "val')
    with ReplayLogWriter(path, DIGEST, resume_step=2) as writer:
        writer.append(entry(3))
    assert steps_of(path) == [1, 2, 3]


def test_resume_without_a_log_begins_one(path):
    with ReplayLogWriter(path, DIGEST, resume_step=5) as writer:
        writer.append(entry(6))
    assert steps_of(path) == [6]


@pytest.mark.parametrize(("steps", "missing"), [([1, 2], 3), ([1, 3, 4, 5, 6, 7], 2), ([3, 4, 5, 7, 8], 6)])
def test_resume_refuses_a_log_with_a_gap_and_leaves_it(path, steps, missing):
    before = write(path, steps).read_bytes()
    with pytest.raises(OutputError, match=rf"lacks step {missing}, but the run resumes at step 7"):
        ReplayLogWriter(path, DIGEST, resume_step=7)
    assert path.read_bytes() == before


def test_resume_refuses_the_log_of_another_run_and_leaves_it(path):
    before = write(path, [1, 2]).read_bytes()
    other = dataclasses.replace(DIGEST, seed=8, params={"dt": 0.25, "on": True, "n": 3})
    with pytest.raises(
        ReplayLogError, match=r"of another run: seed: -7 against 8; params.dt: 0.5 against 0.25"
    ):
        ReplayLogWriter(path, other, resume_step=1)
    assert path.read_bytes() == before


def test_a_cut_that_fails_leaves_the_log(path, monkeypatch):
    writer = ReplayLogWriter(path, DIGEST)
    for step in (1, 2):
        writer.append(entry(step))
    before = path.read_bytes()

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("rustsim_hpc.files.publish", fail)
    with pytest.raises(OutputError, match=r"cannot cut back replay log .*: Input/output error"):
        writer.truncate_after(1)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    monkeypatch.undo()
    writer.truncate_after(1)
    writer.append(entry(2))
    writer.close()
    assert path.read_bytes() == before


def test_a_log_survives_sigkill(path):
    """A process that appends until it is killed leaves whole lines, and all that `append` returned from."""
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from rustsim_hpc.proof.fingerprint import ReplayFingerprint
        from rustsim_hpc.proof.replay_log import ReplayHeader
        from rustsim_hpc.proof.replay_writer import ReplayLogWriter
        header = ReplayHeader(scheme="fnv1a", job="j", model="m", agents=1, seed=1, columns=())
        writer = ReplayLogWriter(Path(sys.argv[1]), header)
        for step in range(1, 10**9):
            writer.append(ReplayFingerprint(step, step))
            print(step, flush=True)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        while int(process.stdout.readline()) < 50:
            pass
        process.kill()
        reported = max(map(int, process.stdout.read().split() or ["50"]))
    found = steps_of(path)
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= reported


# -- verifying and comparing ---------------------------------------------------------------------------


def test_a_run_is_verified_against_a_log_and_a_log_that_ends_early_is_exhausted(path):
    mode = read_replay_log(write(path, [2, 4], dataclasses.replace(DIGEST, interval=2))).verify_mode()
    assert mode == ReplayMode.verify([entry(2), entry(4)], 2)
    recorder = ReplayRecorder(mode, "digest", 0)
    for step in (2, 4):
        recorder.check(entry(step))
        recorder.accept(entry(step))
    with pytest.raises(ReplayExhausted) as error:
        recorder.check(entry(6))
    assert error.value.exit_code == 4


def test_headers_say_in_what_runs_differ_from_the_start():
    assert header_differences(DIGEST, DIGEST) == ()
    other = dataclasses.replace(
        DIGEST,
        model="cd34",
        seed=8,
        params={"dt": 0.5, "on": 1, "m": 2},
        columns=(("x", "float64"), ("y", "int8")),
        notes=("another note",),
    )
    assert header_differences(DIGEST, other) == (
        "model: ab12 against cd34",
        "seed: -7 against 8",
        "params.on: True against 1",
        "params.n: 3 against absent",
        "params.m: absent against 2",
        "column x: float32 against float64",
        'column Länge": int8 against absent',
        "column y: absent against int8",
    )
    swapped = dataclasses.replace(DIGEST, columns=DIGEST.columns[::-1])
    assert header_differences(DIGEST, swapped) == ("columns: the same ones in another order",)


# -- the document --------------------------------------------------------------------------------------


def test_the_documents_example_is_a_log(path):
    text = (ROOT / "docs/replay.md").read_text(encoding="utf-8")
    path.write_text(text.split("```json\n", 1)[1].split("```", 1)[0], encoding="utf-8")
    log = read_replay_log(path)
    x = np.array([0.5, 1.5, 2.5], np.float32)
    for entry in log.entries:
        view = StateView(entry.step_index, 3, ("x", "state"), None, (x, np.array([0, 1, 0], np.uint8)))
        assert fingerprint_view(view, "digest") == entry
        assert list(entry.columns.values()) == digest_sums(view)
        x = x + np.float32(1)
    assert len(log.entries) == 2
    for name in json.loads(log.header.line()):
        assert f"| `{name}` |" in text


@pytest.mark.parametrize(
    ("first", "steps", "missing"), [(0, [3, 4, 5], 1), (0, [], 1), (2, [3, 5], 4), (2, [3], 4)]
)
def test_a_log_that_says_where_it_begins_may_not_lack_its_first_entries(path, first, steps, missing):
    header = dataclasses.replace(DIGEST, first_step=first)
    with ReplayLogWriter(path, header) as writer:
        for step in steps:
            writer.append(entry(step))
    with pytest.raises(OutputError, match=rf"lacks step {missing}, but the run resumes at step 5"):
        ReplayLogWriter(path, header, resume_step=5)
    assert read_replay_log(path).header.first_step == first


def test_a_run_may_go_back_before_its_log_began(path):
    header = dataclasses.replace(DIGEST, first_step=6)
    with ReplayLogWriter(path, header) as writer:
        writer.append(entry(7))
    with ReplayLogWriter(path, dataclasses.replace(DIGEST, first_step=4), resume_step=4) as writer:
        for step in (5, 6, 7):
            writer.append(entry(step))
    assert read_replay_log(path).missing_step(7) is None
    assert read_replay_log(path).missing_step(8) == 8
