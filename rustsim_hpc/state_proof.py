"""The fingerprint of a whole population from one rank's share of it, committed or not yet committed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rustsim_hpc.columns import DeviceSoaStore
from rustsim_hpc.fingerprint import (
    ReplayFingerprint,
    digest_column,
    digest_default_ids,
    digest_value,
    fnv1a_bytes,
    fnv1a_header,
    fnv1a_ids,
    fnv1a_names,
)
from rustsim_hpc.team import Team

Array = np.ndarray[Any, Any]


class StateProof:
    """Fingerprints of one store under one scheme.

    Under "digest" it remembers each column's sum over the whole population, so that a step has to add up only
    the columns that it wrote, which its stages do while they are in cache.

    Args:
        store: this rank's state.
        team: the ranks that hold the other rows.
        scheme: "fnv1a" or "digest".
    """

    def __init__(self, store: DeviceSoaStore, team: Team, scheme: str) -> None:
        self._store = store
        self._team = team
        self.scheme = scheme
        self._sums: list[int | None] = [None] * (1 + store.num_columns)

    def replace(self, store: DeviceSoaStore) -> None:
        """Look at another store from now on."""
        self._store = store
        self.forget()

    def sums_without(self, written: Sequence[int]) -> list[int | None]:
        """Return the remembered sums but for columns that a step wrote without adding them up."""
        return [None if k and k - 1 in written else value for k, value in enumerate(self._sums)]

    def forget(self) -> None:
        """Forget all sums: the state was replaced."""
        self._sums = [None] * (1 + self._store.num_columns)

    def of_current(self, step_index: int, *, afresh: bool = False) -> ReplayFingerprint:
        """Return the fingerprint of the current state (collective); ``afresh`` trusts no remembered sum."""
        if afresh:
            self.forget()
        columns = [self._store.memory.current(c) for c in range(self._store.num_columns)]
        return self._fingerprint(step_index, columns, self._sums)

    def of_next(
        self, step_index: int, sides: Sequence[int], written: Sequence[int], digests: Array | None
    ) -> tuple[ReplayFingerprint, list[int | None]]:
        """Return the fingerprint of a state that is not committed yet, and the sums to keep if it is.

        Args:
            step_index: index after the step.
            sides: for each column the side that holds it.
            written: columns that the step wrote.
            digests: uint64 (columns,): their sums over the whole population, under "digest".
        """
        memory = self._store.memory
        columns = [memory.other(c) if side else memory.current(c) for c, side in enumerate(sides)]
        sums = list(self._sums)
        for column in written:
            sums[1 + column] = None if digests is None else int(digests[column])
        return self._fingerprint(step_index, columns, sums), sums

    def keep(self, sums: list[int | None]) -> None:
        """Remember the sums of the state that was just committed."""
        self._sums = sums

    def column_values(self) -> dict[str, int]:
        """Return the known sums of the current state by name ("ids" for the ids)."""
        return self.named(self._sums)

    def named(self, sums: list[int | None]) -> dict[str, int]:
        """Return sums by name, those that are known; none of them under another scheme than the digest."""
        if self.scheme != "digest":
            return {}
        names = ("ids", *self._store.column_names)
        return {name: value for name, value in zip(names, sums, strict=True) if value is not None}

    def _fingerprint(
        self, step_index: int, columns: list[Array], sums: list[int | None]
    ) -> ReplayFingerprint:
        if self.scheme == "digest":
            value = self._digest(step_index, columns, sums)
        else:
            value = self._fnv1a(step_index, columns)
        return ReplayFingerprint(step_index, value, self.scheme)

    def _digest(self, step_index: int, columns: list[Array], sums: list[int | None]) -> int:
        store = self._store
        missing = [k for k, value in enumerate(sums) if value is None]
        if missing:
            mine = np.array([self._local_sum(k, columns) for k in missing], np.uint64)
            total = self._team.sum_int64(mine.view(np.int64)).view(np.uint64)
            for k, value in zip(missing, total, strict=True):
                sums[k] = int(value)
        known = [value for value in sums if value is not None]
        dtypes = [column.dtype for column in columns]
        return digest_value(step_index, store.total_rows, store.column_names, dtypes, known[1:], known[0])

    def _local_sum(self, k: int, columns: list[Array]) -> int:
        store = self._store
        start = store.row_offset
        if k:
            return digest_column(columns[k - 1], start, k)
        if store.default_ids:
            return digest_default_ids(start, start + store.agent_count)
        return digest_column(store.ids, start, 0)

    def _fnv1a(self, step_index: int, columns: list[Array]) -> int:
        """Hash ids and columns in row order, the chain's state passed from rank to rank (8 bytes)."""
        store, team = self._store, self._team
        ids = None if store.default_ids else store.ids
        start, stop = store.row_offset, store.row_offset + store.agent_count
        value = fnv1a_header(step_index, store.total_rows, store.num_columns)
        value = team.chain(value, lambda state: fnv1a_ids(state, ids, start, stop))
        value = fnv1a_names(value, store.column_names)
        for column in columns:
            value = team.chain(value, lambda state, data=column: fnv1a_bytes(state, data))  # type: ignore[misc]
        return value
