"""Columns and rows: what a state is, where it lies, how it is cut."""
