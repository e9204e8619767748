"""The fingerprint of the whole population, computed by all ranks from their rows, before or after commit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from rustsim_hpc.errors import RustsimError
from rustsim_hpc.proof.fingerprint import (
    ReplayFingerprint,
    StateView,
    digest_column,
    digest_default_ids,
    digest_value,
    fnv1a_bytes,
    fnv1a_header,
    fnv1a_ids,
    fnv1a_names,
)
from rustsim_hpc.ranks.agreement import agree
from rustsim_hpc.ranks.team import Team
from rustsim_hpc.state.columns import DeviceSoaStore

Array = np.ndarray[Any, Any]


def view_of(store: DeviceSoaStore, step_index: int, columns: tuple[Array, ...] | None = None) -> StateView:
    """Return this rank's rows of the state at a step; ``columns``: in place of the store's current ones."""
    return StateView(
        step_index=step_index,
        rows=store.total_rows,
        names=store.column_names,
        ids=store.memory.ids,
        columns=store.columns if columns is None else columns,
        row_offset=store.row_offset,
        local_rows=store.agent_count,
    )


class StateProof:
    """Fingerprints of one store under one scheme.

    Under "digest" it caches each column's sum over the whole population, so that a step adds up only the
    columns that it wrote, which its stages do while the tiles are in cache.

    Args:
        store: this rank's state.
        team: the ranks that hold the other rows.
        scheme: "fnv1a" or "digest".
    """

    def __init__(self, store: DeviceSoaStore, team: Team, scheme: str) -> None:
        self._store = store
        self._team = team
        self.scheme = scheme
        self._dtypes = store.schema.dtypes
        self._sums: list[int | None] = [None] * (1 + store.num_columns)

    def replace(self, store: DeviceSoaStore) -> None:
        """Use another store from now on."""
        self._store = store
        self._dtypes = store.schema.dtypes
        self.forget()

    def sums_without(self, written: Sequence[int]) -> list[int | None]:
        """Return the cached sums, with None for ``written``, columns that a step wrote without a sum."""
        if self._sums.count(None) == len(self._sums):
            return self._sums
        return [None if k and k - 1 in written else value for k, value in enumerate(self._sums)]

    def forget(self) -> None:
        """Drop all cached sums, as after the state was replaced."""
        self._sums = [None] * (1 + self._store.num_columns)

    def of_current(self, step_index: int, *, afresh: bool = False) -> ReplayFingerprint:
        """Return the fingerprint of the current state (collective); ``afresh`` ignores cached sums."""
        if afresh:
            self.forget()
        sides = [0] * self._store.num_columns
        return self._fingerprint(step_index, sides, self._sums)

    def known(self, step_index: int) -> ReplayFingerprint | None:
        """Return the fingerprint of the current state if all its sums are cached; None under "fnv1a"."""
        if self.scheme != "digest" or None in self._sums:
            return None
        return self.of_current(step_index)

    def of_next(
        self, step_index: int, sides: Sequence[int], written: Sequence[int], digests: Array | None
    ) -> tuple[ReplayFingerprint, list[int | None]]:
        """Return the fingerprint of a state that is not committed yet, and the sums to keep on commit.

        Args:
            step_index: index after the step.
            sides: for each column, the side that holds it: 0 for the current one, 1 for the other.
            written: columns that the step wrote.
            digests: uint64 (columns,): their sums over the whole population, under "digest".
        """
        sums = list(self._sums)
        for column in written:
            sums[1 + column] = None if digests is None else int(digests[column])
        return self._fingerprint(step_index, sides, sums, made=True), sums

    def keep(self, sums: list[int | None]) -> None:
        """Cache the sums of the state that was just committed."""
        self._sums = sums

    def column_values(self) -> dict[str, int]:
        """Return the cached sums of the current state by name ("ids" for the ids)."""
        return self.named(self._sums)

    def named(self, sums: list[int | None]) -> dict[str, int]:
        """Return the known sums by name; empty unless the scheme is the digest."""
        if self.scheme != "digest":
            return {}
        names = ("ids", *self._store.column_names)
        return {name: value for name, value in zip(names, sums, strict=True) if value is not None}

    def _fingerprint(
        self, step_index: int, sides: Sequence[int], sums: list[int | None], *, made: bool = False
    ) -> ReplayFingerprint:
        """Return the fingerprint of the columns on ``sides``; ``made``: they are not committed yet."""
        if self.scheme == "digest":
            value = self._digest(step_index, sides, sums)
        else:
            value = self._fnv1a(step_index, sides, made=made)
        return ReplayFingerprint(step_index, value, self.scheme)

    def _digest(self, step_index: int, sides: Sequence[int], sums: list[int | None]) -> int:
        store = self._store
        missing = [k for k, value in enumerate(sums) if value is None]
        if missing:
            mine = np.array([self._local_sum(k, sides) for k in missing], np.uint64)
            total = self._team.sum_int64(mine.view(np.int64)).view(np.uint64)
            for k, value in zip(missing, total, strict=True):
                sums[k] = int(value)
        known = [value for value in sums if value is not None]
        return digest_value(
            step_index, store.total_rows, store.column_names, self._dtypes, known[1:], known[0]
        )

    def _column(self, column: int, sides: Sequence[int]) -> Array:
        memory = self._store.memory
        return memory.other(column) if sides[column] else memory.current(column)

    def _local_sum(self, k: int, sides: Sequence[int]) -> int:
        store = self._store
        start = store.row_offset
        if k:
            return digest_column(self._column(k - 1, sides), start, k)
        if store.default_ids:
            return digest_default_ids(start, start + store.agent_count)
        return digest_column(store.ids, start, 0)

    def _fnv1a(self, step_index: int, sides: Sequence[int], *, made: bool) -> int:
        """Hash ids and columns in row order, the chain's state passed from rank to rank (8 bytes)."""
        store, team = self._store, self._team
        ids = None if store.default_ids else store.ids
        start, stop = store.row_offset, store.row_offset + store.agent_count
        failures: list[RustsimError] = []

        def carry_on(column: int, state: int) -> int:
            # Uncommitted columns are hashed where they are held: by the keeper, if there is one.
            keeper = store.memory.keeper if made else None
            try:
                if keeper is not None:
                    return keeper.fnv1a(state, column, other=bool(sides[column]))
                return fnv1a_bytes(state, self._column(column, sides))
            except RustsimError as error:
                failures.append(error)
                return state

        value = fnv1a_header(step_index, store.total_rows, store.num_columns)
        value = team.chain(value, lambda state: fnv1a_ids(state, ids, start, stop))
        value = fnv1a_names(value, store.column_names)
        for place in range(store.num_columns):
            value = team.chain(value, partial(carry_on, place))
        agree(team, failures[0] if failures else None)
        return value
