"""Schemas, stores and checkpoints: what is kept, what is copied, what is equal, what is refused."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from rustsim_hpc.errors import (
    DeviceSoaRestoreError,
    InvalidConfig,
    ModelError,
    PartitionCheckpointError,
)
from rustsim_hpc.state.columns import DeviceSoaCheckpoint, DeviceSoaStore, same_bits
from rustsim_hpc.state.memory import ColumnMemory
from rustsim_hpc.state.schema import DTYPES, Column, Schema

GOLDEN = json.loads((Path(__file__).parent / "golden/golden.json").read_text("utf-8"))
ERRORS = {entry["id"]: entry["display"] for entry in GOLDEN["errors"]}


def golden_arrays(state):
    ids = np.array([int(one) for one in state["ids"]], dtype=np.uint64)
    columns = [np.array(column, dtype=np.uint32).view(np.float32) for column in state["columns"]]
    return ids, columns


def example(rows: int = 10) -> DeviceSoaStore:
    x = np.arange(rows, dtype=np.float32)
    return DeviceSoaStore.from_columns(np.arange(rows, dtype=np.uint64), {"x": x, "vx": x * 2})


@pytest.mark.parametrize("state", GOLDEN["states"], ids=lambda state: state["name"])
def test_golden_states_keep_every_bit_and_their_size(state):
    ids, columns = golden_arrays(state)
    named = dict(zip(state["column_names"], columns, strict=True))
    store = DeviceSoaStore.from_columns(ids, named)
    assert store.resident_bytes == state["resident_bytes"]
    assert (store.agent_count, store.num_columns) == (len(ids), len(columns))
    assert store.column_names == tuple(state["column_names"])
    checkpoint = store.checkpoint()
    assert checkpoint.resident_bytes == state["resident_bytes"]
    assert not checkpoint.default_ids
    assert same_bits(checkpoint.ids, ids)
    assert all(same_bits(one, two) for one, two in zip(checkpoint.columns, columns, strict=True))
    assert DeviceSoaStore.from_checkpoint(checkpoint).checkpoint() == checkpoint


@pytest.mark.parametrize("kind", ["heap", "shared"])
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_goes_around(dtype, rows, kind):
    values = np.random.default_rng(3).integers(0, 2, rows).astype(dtype)
    store = DeviceSoaStore.from_columns(None, {"a": values, "b": values[::-1]}, kind=kind)
    state = store.checkpoint()
    again = DeviceSoaStore.from_checkpoint(state, kind=kind)
    assert store.schema == again.schema == Schema.plain(["a", "b"], [dtype, dtype])
    assert again.checkpoint() == state
    assert same_bits(store.column(1), values[::-1])
    assert store.resident_bytes == 2 * values.nbytes
    again.close()
    store.close()


def test_the_store_copies_what_it_is_given_and_what_it_gives():
    x = np.zeros(4, dtype=np.float32)
    ids = np.arange(4, dtype=np.uint64)
    store = DeviceSoaStore.from_columns(ids, {"x": x})
    x[0], ids[0] = 5, 9
    assert store.column(0)[0] == 0
    assert store.ids[0] == 0
    state = store.checkpoint()
    store.columns[0][1] = 7
    assert state.column(0)[1] == 0
    other = DeviceSoaStore.from_checkpoint(state)
    state.columns[0][2] = 8
    assert other.column(0)[2] == 0


def test_columns_are_live_and_ids_are_read_only():
    store = example()
    store.columns[1][3] = 99
    assert store.column(1)[3] == store.column(-1)[3] == 99
    with pytest.raises(ValueError, match="read-only"):
        store.ids[0] = 1
    with pytest.raises(IndexError):
        store.column(2)


def test_default_ids_take_no_memory_and_start_at_the_row_offset():
    store = DeviceSoaStore.from_columns(
        columns={"x": np.zeros(3, np.int8)}, row_offset=2**63, total_rows=2**64
    )
    assert store.default_ids
    assert (store.resident_bytes, store.checkpoint().resident_bytes) == (3, 3)
    assert store.ids.tolist() == [2**63, 2**63 + 1, 2**63 + 2]
    assert store.ids.dtype == np.uint64
    state = store.checkpoint()
    assert "ids" not in vars(state)
    assert same_bits(state.ids, store.ids)
    again = DeviceSoaStore.from_checkpoint(state, total_rows=2**64)
    assert (again.default_ids, again.row_offset, again.total_rows) == (True, 2**63, 2**64)


def test_given_ids_that_equal_the_default_are_kept_as_given():
    given, default = (
        example(),
        DeviceSoaStore.from_columns(None, dict(zip("xy", example().columns, strict=True))),
    )
    assert not given.default_ids
    assert given.resident_bytes == default.resident_bytes + 80
    renamed = dataclasses.replace(default.checkpoint(), column_names=given.column_names, schema=given.schema)
    assert renamed == given.checkpoint()


def test_a_store_over_memory_of_a_rank():
    memory = ColumnMemory(Schema.plain(["x"], ["int64"]), 4)
    memory.array(0, 0)[:] = [1, 2, 3, 4]
    memory.array(0, 1)[:] = [5, 6, 7, 8]
    store = DeviceSoaStore(memory, row_offset=6, total_rows=20)
    assert (store.ids.tolist(), store.agent_count, store.total_rows) == ([6, 7, 8, 9], 4, 20)
    memory.swap([0])
    assert store.checkpoint().column(0).tolist() == store.column(0).tolist() == [5, 6, 7, 8]
    for offset, total in ((-1, 20), (18, 20)):
        with pytest.raises(InvalidConfig, match="population of 20"):
            DeviceSoaStore(memory, row_offset=offset, total_rows=total)


def test_no_columns_and_no_rows():
    nothing = DeviceSoaStore.from_columns()
    assert (nothing.agent_count, nothing.num_columns, nothing.resident_bytes) == (0, 0, 0)
    only_ids = DeviceSoaStore.from_columns(range(3), {})
    assert (only_ids.agent_count, only_ids.resident_bytes) == (3, 24)
    assert DeviceSoaStore.from_checkpoint(only_ids.checkpoint()).checkpoint() == only_ids.checkpoint()
    unnumbered = DeviceSoaCheckpoint(None, [], [], rows=5)
    assert DeviceSoaStore.from_checkpoint(unnumbered).ids.tolist() == [0, 1, 2, 3, 4]


F32 = np.float32


@pytest.mark.parametrize(
    ("ids", "columns", "text"),
    [
        (np.arange(3), {"x": np.zeros(4, F32)}, 'column "x" has 4 rows, expected 3'),
        (None, {"x": np.zeros(4, F32), "y": np.zeros(5, F32)}, 'column "y" has 5 rows, expected 4'),
        (None, {"x": np.zeros((2, 2), F32)}, 'column "x" has 2 dimensions, expected 1'),
        (None, {"x": F32(1)}, 'column "x" has 0 dimensions, expected 1'),
        (None, {"x": np.zeros(2, np.float16)}, "dtype float16 is not supported"),
        (None, {"x": np.zeros(2, np.complex64)}, "dtype complex64 is not supported"),
        (None, {"x": np.array(["a"])}, "dtype str"),
        (None, {"x": np.array([object()])}, "dtype object is not supported"),
        (None, {"x": np.zeros(2, ">f4")}, "byte order"),
        (None, {5: np.zeros(2, F32)}, "must be text"),
        (None, {"\ud800": np.zeros(2, F32)}, "UTF-8"),
        (None, {"x": [[1.0], [1.0, 2.0]]}, "inhomogeneous"),
        (np.array([True]), {}, "ids have dtype"),
        (np.array([1.0]), {}, "ids have dtype"),
        (np.array([-1, 2]), {}, "ids must not be negative, got -1"),
        (np.array([1, 2], ">u8"), {}, "ids have dtype >u8"),
        (np.zeros((2, 2), np.uint64), {}, "ids have 2 dimensions"),
        ([True, 2], {}, "got True"),
        ([0, 1.5], {}, "got 1.5"),
        ([-3, 1], {}, "got -3 to 1"),
        ([0, 2**64], {}, "18446744073709551616"),
        (7, {}, "not iterable"),
    ],
)
def test_what_cannot_be_a_store(ids, columns, text):
    with pytest.raises(InvalidConfig) as caught:
        DeviceSoaStore.from_columns(ids, columns)
    assert text in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2


def test_ids_of_other_integers_and_the_largest_one():
    top = 2**64 - 1
    assert DeviceSoaStore.from_columns([0, top], {}).ids.tolist() == [0, top]
    assert DeviceSoaStore.from_columns(np.array([3, 1], np.int8), {}).ids.dtype == np.uint64
    assert DeviceSoaStore.from_columns([], {"x": []}).agent_count == 0


def test_a_given_schema_must_be_the_columns():
    schema = Schema((Column("x", "float32", unit="m", doc="position east"), Column("n", "uint8")))
    store = DeviceSoaStore.from_columns(None, {"x": [1, 2.5], "n": [3, 255]}, schema=schema)
    assert store.schema is schema
    assert store.columns[0].dtype == F32
    bad = [{"n": [1], "x": [1.0]}, {"x": [1.0]}, {"x": [1.0], "n": [256]}, {"x": [1.0], "n": [0.5]}]
    for columns in (*bad, {"x": np.zeros(1), "n": np.zeros(1, np.uint8)}):
        with pytest.raises(InvalidConfig):
            DeviceSoaStore.from_columns(None, columns, schema=schema)


def test_checkpoints_by_hand():
    made = DeviceSoaCheckpoint([4, 7], [[0.5, 1.5]], ["x"], Schema.plain(["x"], [F32]))
    assert (made.agent_count, made.num_columns, made.resident_bytes) == (2, 1, 24)
    assert made.column(0).dtype == F32
    assert made == DeviceSoaStore.from_columns([4, 7], {"x": np.array([0.5, 1.5], F32)}).checkpoint()
    assert DeviceSoaCheckpoint(None, [[1, 2]], ["n"]).schema.columns[0].dtype == "int64"
    own = np.zeros(2, F32)
    assert DeviceSoaCheckpoint([0, 1], [own], ["x"]).columns[0] is own
    for ids, columns in (([0.5], [[1.0]]), ([0], [["a"]])):
        with pytest.raises(DeviceSoaRestoreError):
            DeviceSoaCheckpoint(ids, columns, ["x"])


def test_replace_and_pickle():
    state = example().checkpoint()
    twice = dataclasses.replace(state, columns=[column * 2 for column in state.columns])
    assert twice.ids is state.ids
    assert twice.column(0).tolist() == [2.0 * value for value in range(10)]
    assert state.column(0)[1] == 1
    default = DeviceSoaStore.from_columns(None, {"x": np.zeros(3, F32)}).checkpoint()
    for one in (state, default):
        travelled = pickle.loads(pickle.dumps(one))
        assert travelled == one
        assert travelled.default_ids is one.default_ids
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.columns = ()
    assert repr(state) == "DeviceSoaCheckpoint(10 rows, columns x, vx)"


def floats(*bits: int) -> np.ndarray:
    return np.array(bits, dtype=np.uint32).view(F32)


def test_equality_is_of_bits():
    def state(values, ids=None, name="x", unit="1"):
        schema = Schema((Column(name, values.dtype.name, unit=unit),))
        return DeviceSoaCheckpoint(ids, [values], [name], schema)

    nan = state(floats(0x7FC00001, 0))
    assert nan == state(floats(0x7FC00001, 0))
    assert nan == state(floats(0x7FC00001, 0), ids=[0, 1])
    different = [
        state(floats(0x7FC00002, 0)),
        state(floats(0x7FC00001, 0x80000000)),
        state(floats(0x7FC00001, 0), ids=[0, 2]),
        state(floats(0x7FC00001, 0), name="y"),
        state(floats(0x7FC00001, 0), unit="m"),
        state(floats(0x7FC00001, 0, 0)),
        state(floats(0x7FC00001, 0).view(np.int32)),
        dataclasses.replace(nan, columns=(), column_names=()),
    ]
    assert all(nan != other for other in different)
    assert nan != "nan"
    strided = floats(0x7FC00001, 5, 0, 5)[::2]
    assert nan == state(strided)
    assert state(np.array([0, 1], np.int64)) != state(np.array([0, 1], np.uint64))


def test_ids_of_parts_are_compared_with_their_offsets():
    whole = DeviceSoaStore.from_columns(None, {"x": np.zeros(6, F32)}).checkpoint()
    first, second = whole.slice_rows(0, 3), whole.slice_rows(3, 6)
    assert second.default_ids
    assert second.ids.tolist() == [3, 4, 5]
    assert first != second
    assert whole.slice_rows(2, 2) == whole.slice_rows(5, 5)


def test_slices_are_copies():
    state = example().checkpoint()
    part = state.slice_rows(4, 7)
    assert (part.ids.tolist(), part.column(1).tolist(), part.row_offset) == ([4, 5, 6], [8.0, 10.0, 12.0], 4)
    part.columns[0][:] = -1
    assert state.column(0)[4] == 4


@pytest.mark.parametrize(("start", "stop", "name"), [(5, 11, "pc_slice"), (6, 5, "pc_slice_rev")])
def test_slices_outside_are_refused_in_the_references_words(start, stop, name):
    with pytest.raises(PartitionCheckpointError) as caught:
        example().checkpoint().slice_rows(start, stop)
    assert str(caught.value) == ERRORS[name]


def ragged() -> DeviceSoaCheckpoint:
    state = example().checkpoint()
    return dataclasses.replace(state, columns=(state.columns[0], state.columns[1][:9]))


def test_a_ragged_checkpoint_is_refused_in_the_references_words():
    with pytest.raises(DeviceSoaRestoreError) as caught:
        DeviceSoaStore.from_checkpoint(ragged())
    assert str(caught.value) == ERRORS["restore"].removeprefix("checkpoint restore failed: ")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"column_names": ("x",)}, "2 columns but 1 column names"),
        ({"column_names": ("x", "y")}, "not those of the schema"),
        ({"schema": Schema.plain(["x"], [F32])}, "not those of the schema"),
        ({"schema": Schema.plain(["x", "vx"], [F32, np.float64])}, "dtype float32, expected float64"),
        ({"columns": (np.zeros(10, F32), np.zeros((10, 1), F32))}, "column 1 has 2 dimensions"),
        ({"columns": (np.zeros(10, F32), np.zeros(10, ">f4"))}, "column 1 has dtype >f4, expected float32"),
        ({"ids": np.arange(9, dtype=np.uint64)}, "column 0 has 10 rows, expected 9"),
        ({"ids": np.arange(-1, 9)}, "must not be negative"),
        ({"ids": np.zeros(10)}, "ids have dtype"),
        ({"ids": np.zeros((10, 1), np.uint64)}, "ids have 2 dimensions"),
        ({"row_offset": -1}, "not in a population"),
    ],
)
def test_foreign_and_broken_checkpoints_are_refused(changes, text):
    with pytest.raises(DeviceSoaRestoreError) as caught:
        DeviceSoaStore.from_checkpoint(dataclasses.replace(example().checkpoint(), **changes))
    assert text in str(caught.value)


def test_schema_describes_columns():
    codes = {0: "S", 1: "I"}
    schema = Schema(
        (Column("x", "float32", unit="m", doc="position east"), Column("state", np.uint8, codes=codes))
    )
    assert schema.names == ("x", "state")
    assert schema.dtypes == (np.dtype("float32"), np.dtype("uint8"))
    assert (schema.row_bytes, len(schema), schema.index("state")) == (5, 2, 1)
    assert schema.columns[1].dtype == "uint8"
    codes[2] = "R"
    assert schema.columns[1].codes == {0: "S", 1: "I"}
    assert schema == pickle.loads(pickle.dumps(schema))
    assert hash(schema) == hash(pickle.loads(pickle.dumps(schema)))
    assert schema != dataclasses.replace(schema, columns=schema.columns[::-1])
    with pytest.raises(ModelError, match='no column "stat" \\(did you mean "state"\\?\\)'):
        schema.index("stat")
    with pytest.raises(ModelError, match='two columns are called "x"'):
        Schema((Column("x", "bool"), Column("x", "int8")))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"name": 3}, "must be text"),
        ({"unit": None}, "must be text"),
        ({"dtype": "flaot32"}, 'did you mean "float32"'),
        ({"dtype": "float16"}, "not supported"),
        ({"dtype": ">i4"}, "byte order"),
        ({"codes": {0: "S"}}, "only integer columns"),
        ({"dtype": "uint8", "codes": {256: "S"}}, "code 256 is not a uint8"),
        ({"dtype": "uint8", "codes": {True: "S"}}, "code True"),
        ({"dtype": "uint8", "codes": {1: 2}}, "must be text"),
    ],
)
def test_bad_columns(fields, text):
    with pytest.raises(ModelError) as caught:
        Column(**{"name": "x", "dtype": "float32", **fields})
    assert text in str(caught.value)
