"""The programs that are compared: what each needs, runs on, draws its numbers with, and promises."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

from rustsim_hpc.bench.ranks import mpirun


@dataclass(frozen=True)
class Program:
    """One program.

    key: for the command line and the figures. name: for people; "{cores}" is the number of cores. module: of
    competitors/. kind: "hand" (a loop by hand), "engine" or "library". needs: packages, as they are imported.
    dists: the same as they are installed. several: runs on several cores. ranks: by mpirun. part: rows are
    divided by it, where a row is an object. workloads: those that it does. draws: its random numbers, and
    their bits. bits: what is known of a run's bits. more: what else it gives.
    """

    key: str
    name: str
    module: str
    kind: str
    needs: tuple[str, ...] = ()
    dists: tuple[str, ...] = ()
    several: bool = False
    ranks: bool = False
    part: int = 1
    workloads: tuple[str, ...] = ("integrate", "walk", "sir")
    draws: str = ""
    bits: str = ""
    more: str = ""

    def missing(self) -> str:
        """Return why the program cannot run here, nothing if it can."""
        for name in self.needs:
            if find_spec(name) is None:
                return f"not installed: {name}"
        return "not installed: mpirun" if self.ranks and mpirun() is None else ""


_NUMBA = Program(
    "numba",
    "Numba by hand, 1 core",
    "numba_loops",
    "hand",
    needs=("numba",),
    dists=("numba",),
    draws="splitmix64 of row and step, written by hand; 24",
    bits="the same on any number of cores or ranks",
    more="nothing: one loop over the columns in place",
)
_JAX = Program(
    "jax",
    "JAX, 1 core",
    "jax_arrays",
    "library",
    needs=("jax",),
    dists=("jax", "jaxlib"),
    draws="Threefry-2x32 of key and position; 23",
    bits="the same on any number of cores; x + vx dt is contracted, other last bits than NumPy's",
    more="the same code on GPU and TPU; derivatives",
)
_TAICHI = Program(
    "taichi",
    "Taichi, 1 core",
    "taichi_fields",
    "library",
    needs=("taichi",),
    dists=("taichi",),
    draws="xorshift, a state a thread; 24",
    bits="the same on one core; on two, another result each run",
    more="the same code on GPU; fast maths is its default",
)
_ENGINE = Program(
    "engine",
    "engine, 1 core",
    "engine",
    "engine",
    needs=("numba",),
    dists=("rustsim-hpc",),
    draws="Philox4x32-10 of seed, stream, step and row; 24",
    bits="the same on any number of threads, processes, ranks and partitions, and after a restore",
    more="a step happens completely or not at all: it is undone after any error",
)

PROGRAMS = (
    _NUMBA,
    Program(
        "numba.random",
        "Numba by hand, np.random, 1 core",
        "numba_random",
        "hand",
        needs=("numba",),
        dists=("numba",),
        workloads=("walk", "sir"),
        draws="Mersenne Twister, Numba's np.random; 53",
        bits="the same for a seed, on one core",
        more="nothing",
    ),
    Program(
        "numpy",
        "NumPy, 1 core",
        "numpy_arrays",
        "library",
        dists=("numpy",),
        draws="PCG64; 24",
        bits="the same for a seed",
        more="",
    ),
    _JAX,
    _TAICHI,
    Program(
        "mesa",
        "Mesa, 1 core",
        "mesa_agents",
        "library",
        needs=("mesa",),
        dists=("mesa",),
        part=100,
        draws="Mersenne Twister, Python's; 53",
        bits="the same for a seed",
        more="agents are objects: born, dying, of different kinds, in spaces; their numbers are float64",
    ),
    _ENGINE,
    replace(_NUMBA, key="numba.all", name="Numba by hand, prange, {cores} cores", several=True),
    Program(
        "numba.ranks",
        "mpi4py and Numba by hand, {cores} ranks",
        "numba_mpi",
        "hand",
        needs=("numba", "mpi4py"),
        dists=("mpi4py", "numba"),
        several=True,
        ranks=True,
        draws=_NUMBA.draws,
        bits=_NUMBA.bits,
        more="ranks on other machines; SIR's meet once a step, the others' never",
    ),
    replace(_JAX, key="jax.all", name="JAX, {cores} cores", several=True),
    replace(_TAICHI, key="taichi.all", name="Taichi, {cores} cores", several=True),
    Program(
        "dask",
        "Dask, {cores} cores",
        "dask_arrays",
        "library",
        needs=("dask",),
        dists=("dask",),
        several=True,
        draws="PCG64, one a chunk; 24",
        bits="the same for a seed and chunks, on any number of cores",
        more="chunks on other machines, arrays larger than memory",
    ),
    Program(
        "mesa.frames",
        "mesa-frames, {cores} cores",
        "mesa_frames_polars",
        "library",
        needs=("mesa_frames",),
        dists=("mesa-frames", "polars"),
        several=True,
        draws="PCG64, NumPy's; 24",
        bits="the same for a seed, on any number of cores",
        more="agents are rows of a data frame: born, dying, on grids; numbers are drawn on one core",
    ),
    Program(
        "repast4py",
        "repast4py, {cores} ranks",
        "repast_agents",
        "library",
        needs=("repast4py",),
        dists=("repast4py",),
        several=True,
        ranks=True,
        part=100,
        draws="PCG64, NumPy's, one a rank; 53",
        bits="the same for a seed and number of ranks",
        more="agents are objects that move between ranks, in spaces and networks; their numbers are float64",
    ),
    replace(_ENGINE, key="engine.threads", name="engine, {cores} threads", several=True),
    replace(
        _ENGINE,
        key="engine.ranks",
        name="engine, {cores} ranks",
        several=True,
        ranks=True,
        needs=("numba", "mpi4py"),
        more="the same; an error on one rank undoes the step on all, so the ranks meet in each step",
    ),
    replace(
        _ENGINE,
        key="engine.digest",
        name="engine, {cores} threads, digest",
        module="engine_digest",
        several=True,
        more="the same; and a digest of the whole state after each step, to prove the run with",
    ),
)
