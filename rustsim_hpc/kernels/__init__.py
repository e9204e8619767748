"""The only door to numba: compiled stages, reductions, random numbers, hashes."""
