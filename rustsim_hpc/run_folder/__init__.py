"""A run's folder: what a run leaves behind, file by file, and reading it again."""
