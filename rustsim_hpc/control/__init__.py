"""The control plane: steps that happen completely or not at all, checkpoints, counters."""
