"""Workers of this machine for tests, each a process of its own on a free port of the loopback."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
SUITE = tuple(
    HERE / f"{name}.py" for name in ("suite_model", "suite_kernels", "suite_fused", "suite_observed")
)


class WorkerProcess:
    """``rustsim-hpc worker`` as a process.

    Attributes:
        endpoint: where it listens.
        told: lines of its standard error.
    """

    def __init__(self, *options, models=SUITE, bind="tcp://127.0.0.1:*", cwd=None):
        command = [sys.executable, "-m", "rustsim_hpc", "worker", "--bind", bind, *options]
        for model in models:
            command += ["--model", str(model)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=cwd
        )
        self.told = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        line = self.process.stdout.readline()
        self.endpoint = line.split()[2] if line.startswith("worker at ") else None

    def _read(self):
        for line in self.process.stderr:
            self.told.append(line.rstrip("\n"))

    @property
    def pid(self):
        return self.process.pid

    def end(self, number=signal.SIGTERM):
        """End it; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait(20)
        self._reader.join(5)
        self.process.stdout.close()
        self.process.stderr.close()
        return code
