"""Every kernel of the engine's models and of jobs/ under Numba's CUDA simulator, against the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

from test_cuda_kernels import SOURCES

HERE = Path(__file__).parent
LIMIT = 250
"""Seconds; it takes 20 on a quiet machine."""


def test_kernels_under_the_simulator_give_the_cpus_bits():
    done = subprocess.run(
        [sys.executable, str(HERE / "cuda_simulator.py"), *map(str, SOURCES)],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [[str(path), []] for path in SOURCES]
