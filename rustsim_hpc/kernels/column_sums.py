"""Lines of source for a generated loop that add up the digest of a column while the loop computes its values.

They use these names of the loop: `in_block`, the tile's first row within its block; `base`, that row in the
whole population; and `digests`. A tile lies in one block.
"""

from __future__ import annotations

from dataclasses import dataclass

from rustsim_hpc.kernels.streaming import TOGETHER


@dataclass(frozen=True)
class ColumnSums:
    """Writes the lines for one column.

    Attributes:
        column: its index.
        itemsize: bytes of its values.
        keys: name of its array of digest keys in the source.
    """

    column: int
    itemsize: int
    keys: str

    @property
    def _sums(self) -> str:
        return f"even{self.column}, odd{self.column}"

    def begin(self) -> str:
        """Return the line before the loop."""
        return f"even{self.column} = odd{self.column} = np.uint64(0)"

    def add_row(self, value: str, place: str) -> str:
        """Return the line that adds one row's value; ``place``: the row in the tile, a uint64."""
        bits, place = f"hashing.bits_of({value})", f"(in_block + {place})"
        if self.itemsize < 8:
            return f"even{self.column} += {bits} * hashing.load_item({self.keys}, {place})"
        key = f"hashing.load_pair({self.keys}, np.uint64(2) * {place})"
        return f"{self._sums} = hashing.add_pair({self._sums}, {bits}, {key}, np.uint64(32))"

    def add_words(self, values: str, place: str) -> list[str]:
        """Return the lines that add :data:`TOGETHER` values of an array, two at a time below 8 bytes."""
        rows, bits = (1, 32) if self.itemsize == 8 else (2, 8 * self.itemsize)
        key = f"hashing.load_pair({self.keys}, np.uint64({2 // rows}) * (in_block + {place} + row))"
        word = f"hashing.load_pair({values}, row), {key}, np.uint64({bits})"
        return [
            f"for row in range(np.uint64(0), np.uint64({TOGETHER}), np.uint64({rows})):",
            f"    {self._sums} = hashing.add_pair({self._sums}, {word})",
        ]

    def end(self) -> str:
        """Return the line after the loop."""
        block = f"np.uint64(base) // hashing.BLOCK_ROWS, np.uint64({self.column + 1})"
        return f"digests[{self.column}] += hashing.block_sum({self._sums}, {self.itemsize == 8}, {block})"
