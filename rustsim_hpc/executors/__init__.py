"""Who runs a rank's partitions: in this thread, a thread pool, worker processes, or somewhere else."""
