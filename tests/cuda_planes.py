"""Planes whose partitions are on devices that are none."""

import pytest
from executor_suite import Driven, ExecutorSuite
from standin_device import StandInDevice

import rustsim_hpc as rs
from rustsim_hpc.executors.cuda import CudaPartitionExecutor
from rustsim_hpc.kernels.cuda_compile import why_no_compiler
from rustsim_hpc.state import cuda_found, cupy_device

needs_compiler = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler())


class Devices:
    """Makes stand-ins, and keeps them to be looked at."""

    def __init__(self, **given):
        self.given = given
        self.made = {}
        self.calls = []

    def __call__(self, ordinal):
        if ordinal not in self.made:
            self.made[ordinal] = StandInDevice(ordinal, **self.given)
            self.made[ordinal].calls = self.calls
        return self.made[ordinal]


def facts_of(ordinal):
    """Return what a record says of a stand-in."""
    return {
        "ordinal": ordinal, "name": "stand-in", "compute_capability": "9.0", "uuid": f"GPU-{ordinal}",
        "pci_bus_id": f"0000:0{ordinal}:00.0", "memory_bytes": 64 * 2**20, "driver": "550.1",
        "cuda_driver": "12.4", "cuda_runtime": "12.9", "cupy": "14.2.0",
    }  # fmt: skip


def see(monkeypatch, names):
    """Let this process see devices that are none, told apart by their names; return them."""
    devices = Devices()
    monkeypatch.setattr(cuda_found, "visible_devices", lambda: tuple(names))
    monkeypatch.setattr(cuda_found, "why_no_device", lambda ordinal=0: "")
    monkeypatch.setattr(cuda_found, "device_facts", facts_of)
    monkeypatch.setattr(cupy_device, "CupyDevice", devices)
    return devices


class CudaSuite(ExecutorSuite):
    """Plans of CUDA devices; every third partition on the CPU where ``mixed`` says so."""

    def __init__(self, *, devices=2, mixed=False):
        self.devices = devices
        self.mixed = mixed

    def plan(self, rows, parts):
        plan = rs.PartitionPlan.row_ranges(rows, parts)
        workers = [
            rs.PartitionWorker.local_cpu(f"w{k}")
            if self.mixed and k % 3 == 1
            else rs.PartitionWorker.cuda_device(f"w{k}", k % self.devices)
            for k in range(plan.partition_count)
        ]
        return plan.with_workers([worker.label for worker in workers]), tuple(workers)


def cuda(devices=None, *, mixed=False, given=None, **config):
    """Return a plane on stand-ins and the stand-ins."""
    devices = devices or Devices(**(given or {}))
    driven = Driven(CudaSuite(mixed=mixed), CudaPartitionExecutor(devices), **config)
    return driven, devices


def expected(steps, **config):
    """Return the recorded stream of the same on the CPU."""
    return ExecutorSuite().expected(steps, **config)


def session(driven):
    """Return what runs a plane's partitions now."""
    return driven.plane.stepper(driven.executor).session
