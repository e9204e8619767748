"""What docs/gpu.md says: its example, its command, and which functions have the CPU's bits."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_planes import Devices, needs_compiler
from ptx_machine import Machine

from rustsim_hpc.kernels.cuda_bodies import cuda_names
from rustsim_hpc.kernels.cuda_compile import compile_ptx
from rustsim_hpc.state import cupy_device

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "gpu.md").read_text("utf-8")
OPEN_ENDED = re.compile(r"\bfma\.|\.approx\b")


def block(language, place=0):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[place]


def row(start):
    [found] = [line for line in PAGE.splitlines() if line.startswith(f"| {start}")]
    return re.findall(r"`(\w+)`", found.split("|")[1])


@needs_compiler
def test_the_example(monkeypatch, tmp_path):
    devices = Devices()
    monkeypatch.setattr(cupy_device, "CupyDevice", devices)
    path = tmp_path / "example.py"
    path.write_text(block("python"), "utf-8")
    namespace = {"__name__": "example"}
    exec(compile(block("python"), str(path), "exec"), namespace)  # noqa: S102 (the page's own text)
    assert devices.made[0].counts["launch"] == 2 * 5
    step = np.float32(0.1) * np.float32(1) + np.float32(0.0)
    expected = np.arange(1000, dtype=np.float32)
    for _ in range(5):
        expected = expected + step
        expected += np.float32(0.5)
    assert np.array_equal(namespace["x"], expected)


def test_the_command_finds_its_tests():
    command = block("bash", -1).split()
    assert command[:3] == ["python", "-m", "pytest"]
    done = subprocess.run(
        [sys.executable, *command[1:], "--collect-only", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.count("test_gpu.py::") > 60


def ptx_of(name):
    arguments = "a[i], b[i]" if name in ("copysign", "atan2", "hypot", "pow") else "a[i]"
    owner = "np" if name == "rint" else "math"
    call = f"round({arguments})" if name == "round" else f"{owner}.{name}({arguments})"
    source = f"def k(o, a, b):\n    i = cuda.grid(1)\n    o[i] = {call}\n"
    namespace = {**cuda_names(), "math": math}
    exec(source, namespace)  # noqa: S102 (our own text)
    from numba import types

    kind = types.Array(types.float64, 1, "C")
    return compile_ptx(namespace["k"], [kind] * 3, (9, 0), identity=source).ptx.decode()


@needs_compiler
@pytest.mark.parametrize("start", ["`sqrt`", "`exp`"])
def test_which_functions_have_the_cpus_bits(start):
    names = [name for name in row(start) if name not in ("rs", "random")]
    assert len(names) > 9
    for name in names:
        text = ptx_of(name)
        assert Machine(text).entry == "stage"
        assert bool(OPEN_ENDED.search(text)) is (start == "`exp`"), name
