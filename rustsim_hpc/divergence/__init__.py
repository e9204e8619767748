"""From "two runs differ" to the step, the phase, the column and the rows; verify and diff."""
