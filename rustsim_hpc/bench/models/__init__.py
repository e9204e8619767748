"""Models that the benchmarks run; each is what a loop of :mod:`rustsim_hpc.kernels.by_hand` does."""
