"""Step programs on devices that are none, with faults and restores in between, and see the CPU's bits.

    python drills/devices.py 40

Each trial takes one of three programs of the tests (stages, reductions, derived values, CUDA C, CuPy phases)
on one to three partitions, some of them on the CPU, under either guard; it steps, restores, looks, and lets a
call of a device fail, at random, for long enough that graphs are replayed. Compared with a plane of one
partition on this CPU are state, results and the recorded stream. Needs g++ and a compiler for CUDA.
"""

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "tests"))
import test_cuda_graphs as programs
from common import Drill, arguments
from cuda_planes import Devices
from test_cuda_kernels import assert_same, plane_of

import rustsim_hpc as rs
from rustsim_hpc import errors
from rustsim_hpc.executors.cuda import CudaPartitionExecutor
from rustsim_hpc.kernels.cuda_compile import why_no_compiler

PROGRAMS: tuple[tuple[str, Callable[[], Any]], ...] = (
    ("one graph", lambda: programs.whole_steps(programs.STIR)),
    ("graphs and calls", lambda: programs.whole_steps(programs.BY_VALUE)),
    ("a phase of CuPy", programs.taking_model),
)
ACTIONS = ("step", "step", "step", "keep", "back", "look", "fail")
FAULTS = ("replay", "launch", "kernel", "wait", "give", "take", "copy", "upload")


class Trial:
    """A program here and there: on this CPU, and on devices that are none."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.name, make = chance.choice(PROGRAMS)
        bound, parts, mixed = make(), chance.choice([1, 2, 3]), chance.random() < 0.3
        guard = chance.choice(["rollback", "rollback", "torn"])
        config = {
            "guard": rs.StepGuard(guard),
            "fingerprint": chance.choice(["digest", "fnv1a"]),
            "replay_mode": rs.ReplayMode.record(chance.choice([1, 3])),
        }
        self.devices = Devices(seed=chance.randrange(1000))
        workers = tuple(
            rs.PartitionWorker.local_cpu(f"w{k}")
            if mixed and k % 3 == 1
            else rs.PartitionWorker.cuda_device(f"w{k}", k % 2)
            for k in range(parts)
        )
        self.described = f"{self.name}, {parts} partitions{', some here' * (mixed and parts > 1)}, {guard}"
        self.may_fail = guard == "rollback"
        self.there, self.here = plane_of(bound, parts, workers, **config), plane_of(bound, 1, **config)
        self.executors = CudaPartitionExecutor(self.devices), rs.InlinePartitionExecutor()
        self.kept: tuple[Any, Any] | None = None
        self.failed = 0

    def step(self, count: int) -> None:
        self.there.run_partitions_with_executor(count, self.executors[0])
        self.here.run_partitions_with_executor(count, self.executors[1])

    def fail(self) -> None:
        """Let one of the next calls of a device fail, if there are so many in a step."""
        device = self.chance.choice(list(self.devices.made.values()))
        what = self.chance.choice(FAULTS)
        known = device.counts.get("launch" if what == "kernel" else what, 0)
        device.faults[what] = known + self.chance.randint(1, 4)
        try:
            self.step(1)
        except errors.ExecutorError:
            self.failed += 1
        device.faults.clear()

    def act(self, what: str) -> None:
        if what == "step":
            self.step(self.chance.randint(1, 6))
        elif what == "keep":
            self.kept = self.there.checkpoint(), self.here.checkpoint()
        elif what == "back" and self.kept is not None:
            self.there.restore(self.kept[0])
            self.here.restore(self.kept[1])
        elif what == "look":
            assert_same(self.here, self.there)
        elif what == "fail" and self.may_fail and self.devices.made:
            self.fail()

    def run(self) -> list[str]:
        """Return what was wrong."""
        try:
            for _ in range(self.chance.randint(5, 14)):
                self.act(self.chance.choice(ACTIONS))
            assert_same(self.here, self.there)
        except AssertionError as error:
            return [str(error) or "state, results or stream differ"]
        finally:
            self.there.close()
            self.here.close()
        return []


def main(count: int, seed: int = 1, keep: Path | None = None) -> int:
    """Run the drill; return its exit code."""
    drill = Drill("programs gave the CPU's bits on devices that are none", seed=seed, keep=keep)
    missing = why_no_compiler() or ("" if shutil.which("g++") else "there is no g++")
    if missing:
        print(f"skipped: all of it, {missing}")
        return 0
    for number in range(count):
        trial = Trial(drill.random(number))
        wrong = trial.run()
        replayed = sum(device.counts.get("replay", 0) for device in trial.devices.made.values())
        drill.trial(f"{trial.described}, {replayed} graphs replayed, {trial.failed} steps failed", wrong)
    return drill.end()


if __name__ == "__main__":
    given = arguments(__doc__, 40)
    sys.exit(main(given.count, given.seed, given.keep))
