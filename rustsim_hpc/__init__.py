"""rustsim-hpc: a deterministic engine for very large agent and particle simulations.

State is a set of columns, a model is a list of phases over them, and every step can be proved: recorded,
verified, checkpointed and restored onto any number of partitions, threads, processes or MPI ranks with the
same bits. Importing the package starts nothing: no MPI, no compiler, no signal handler, no log.
"""

from __future__ import annotations

from rustsim_hpc.version import __version__ as __version__

# Not typing's: the command imports this before it installs its Ctrl-C handler, so the import must be fast.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import typing

    from rustsim_hpc import errors as errors
    from rustsim_hpc import random as random
    from rustsim_hpc.control.checkpoint import CheckpointPolicy, EngineCheckpoint, PartitionCheckpoint
    from rustsim_hpc.control.config import ControlPlaneConfig, StepGuard
    from rustsim_hpc.control.control_plane import EngineControlPlane
    from rustsim_hpc.control.metrics import ColumnarPhaseBackend, EngineMetrics, EnginePhaseMetric
    from rustsim_hpc.control.reports import ControlledStep, PartitionedStep
    from rustsim_hpc.control.runtime import ColumnarPhaseTiming, ColumnarRuntime, ColumnarStepTiming
    from rustsim_hpc.errors import (
        ColumnarRuntimeError,
        DeviceSoaRestoreError,
        EngineControlPlaneError,
        PartitionExecutorError,
        PartitionPlanError,
        RustsimError,
    )
    from rustsim_hpc.executors.base import (
        PartitionExecutablePhase,
        PartitionExecutor,
        PartitionTask,
        PartitionTaskResult,
    )
    from rustsim_hpc.executors.cuda import CudaPartitionExecutor
    from rustsim_hpc.executors.endpoint import EndpointPartitionExecutor, ExternalPartitionClient
    from rustsim_hpc.executors.inline import InlinePartitionExecutor
    from rustsim_hpc.executors.processes import ProcessPartitionExecutor
    from rustsim_hpc.executors.threads import LocalThreadedPartitionExecutor
    from rustsim_hpc.job.calls import fork_run, resume_run, run_job
    from rustsim_hpc.job.summary import RunSummary
    from rustsim_hpc.modeling.bound_model import BoundModel
    from rustsim_hpc.modeling.model import (
        Check,
        ColumnPhase,
        Derive,
        Model,
        Reduction,
        RowKernel,
        check,
        column_phase,
        derive,
        device_phase,
        function,
        reduction,
        row_kernel,
    )
    from rustsim_hpc.modeling.outputs import Arrays, Picture, Sample, Series
    from rustsim_hpc.modeling.params import Param, Params
    from rustsim_hpc.proof.fingerprint import ReplayFingerprint, fingerprint_checkpoint
    from rustsim_hpc.proof.replay import ReplayMode
    from rustsim_hpc.random import philox4x32_10
    from rustsim_hpc.run_folder.reader import open_run
    from rustsim_hpc.state.columns import DeviceSoaCheckpoint, DeviceSoaStore
    from rustsim_hpc.state.partition import (
        PartitionAssignment,
        PartitionExecutionBackend,
        PartitionExecutionContext,
        PartitionId,
        PartitionMode,
        PartitionPhaseReport,
        PartitionPlan,
        PartitionWorker,
    )
    from rustsim_hpc.state.schema import Column, Schema

# A name's module is loaded when the name is first used, to keep the import of the package fast.
_HOMES = {
    "control.checkpoint": ("CheckpointPolicy", "EngineCheckpoint", "PartitionCheckpoint"),
    "state.columns": ("DeviceSoaCheckpoint", "DeviceSoaStore"),
    "control.config": ("ControlPlaneConfig", "StepGuard"),
    "control.control_plane": ("EngineControlPlane",),
    "errors": (
        "ColumnarRuntimeError",
        "DeviceSoaRestoreError",
        "EngineControlPlaneError",
        "PartitionExecutorError",
        "PartitionPlanError",
        "RustsimError",
    ),
    "executors.base": (
        "PartitionExecutablePhase",
        "PartitionExecutor",
        "PartitionTask",
        "PartitionTaskResult",
    ),
    "executors.endpoint": ("EndpointPartitionExecutor", "ExternalPartitionClient"),
    "executors.cuda": ("CudaPartitionExecutor",),
    "executors.inline": ("InlinePartitionExecutor",),
    "executors.processes": ("ProcessPartitionExecutor",),
    "executors.threads": ("LocalThreadedPartitionExecutor",),
    "proof.fingerprint": ("ReplayFingerprint", "fingerprint_checkpoint"),
    "control.metrics": ("ColumnarPhaseBackend", "EngineMetrics", "EnginePhaseMetric"),
    "job.calls": ("fork_run", "resume_run", "run_job"),
    "job.summary": ("RunSummary",),
    "modeling.bound_model": ("BoundModel",),
    "modeling.model": (
        "Check",
        "ColumnPhase",
        "Derive",
        "Model",
        "Reduction",
        "RowKernel",
        "check",
        "column_phase",
        "derive",
        "device_phase",
        "function",
        "reduction",
        "row_kernel",
    ),
    "modeling.outputs": ("Arrays", "Picture", "Sample", "Series"),
    "modeling.params": ("Param", "Params"),
    "state.partition": (
        "PartitionAssignment",
        "PartitionExecutionBackend",
        "PartitionExecutionContext",
        "PartitionId",
        "PartitionMode",
        "PartitionPhaseReport",
        "PartitionPlan",
        "PartitionWorker",
    ),
    "random": ("philox4x32_10",),
    "proof.replay": ("ReplayMode",),
    "run_folder.reader": ("open_run",),
    "control.reports": ("ControlledStep", "PartitionedStep"),
    "control.runtime": ("ColumnarPhaseTiming", "ColumnarRuntime", "ColumnarStepTiming"),
    "state.schema": ("Column", "Schema"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}
_SUBMODULES = ("errors", "random")

__all__ = [
    "Arrays",
    "BoundModel",
    "Check",
    "CheckpointPolicy",
    "Column",
    "ColumnPhase",
    "ColumnarPhaseBackend",
    "ColumnarPhaseTiming",
    "ColumnarRuntime",
    "ColumnarRuntimeError",
    "ColumnarStepTiming",
    "ControlPlaneConfig",
    "ControlledStep",
    "CudaPartitionExecutor",
    "Derive",
    "DeviceSoaCheckpoint",
    "DeviceSoaRestoreError",
    "DeviceSoaStore",
    "EndpointPartitionExecutor",
    "EngineCheckpoint",
    "EngineControlPlane",
    "EngineControlPlaneError",
    "EngineMetrics",
    "EnginePhaseMetric",
    "ExternalPartitionClient",
    "InlinePartitionExecutor",
    "LocalThreadedPartitionExecutor",
    "Model",
    "Param",
    "Params",
    "PartitionAssignment",
    "PartitionCheckpoint",
    "PartitionExecutablePhase",
    "PartitionExecutionBackend",
    "PartitionExecutionContext",
    "PartitionExecutor",
    "PartitionExecutorError",
    "PartitionId",
    "PartitionMode",
    "PartitionPhaseReport",
    "PartitionPlan",
    "PartitionPlanError",
    "PartitionTask",
    "PartitionTaskResult",
    "PartitionWorker",
    "PartitionedStep",
    "Picture",
    "ProcessPartitionExecutor",
    "Reduction",
    "ReplayFingerprint",
    "ReplayMode",
    "RowKernel",
    "RunSummary",
    "RustsimError",
    "Sample",
    "Schema",
    "Series",
    "StepGuard",
    "check",
    "column_phase",
    "derive",
    "device_phase",
    "errors",
    "fingerprint_checkpoint",
    "fork_run",
    "function",
    "open_run",
    "philox4x32_10",
    "random",
    "reduction",
    "resume_run",
    "row_kernel",
    "run_job",
]


def __getattr__(name: str) -> typing.Any:
    """Load a public name at its first access."""
    from importlib import import_module

    if name in _SUBMODULES:
        return import_module(f"rustsim_hpc.{name}")
    if name not in _MODULE_OF:
        from rustsim_hpc.errors import nearest

        raise AttributeError(f"module 'rustsim_hpc' has no attribute '{name}'{nearest(name, __all__)}")
    value = getattr(import_module(f"rustsim_hpc.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return [*__all__, "__version__"]
