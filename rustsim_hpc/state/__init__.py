"""Columns and rows: the state, its memory, and its division into partitions."""
