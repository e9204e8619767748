"""Phase failures, as data from anywhere, become the one typed error that every rank raises."""

from __future__ import annotations

from rustsim_hpc.errors import (
    ExecutorError,
    PartitionExecution,
    Phase,
    Runtime,
    RustsimError,
    Worker,
)
from rustsim_hpc.metrics import PhaseKind
from rustsim_hpc.runtime import runtime_error
from rustsim_hpc.stepper import StepFailed
from rustsim_hpc.work import PhaseFailure

StepKind = PhaseKind
"""The three ways to step are the three lists of phases."""


def plane_error(kind: StepKind, failed: StepFailed, step: int, phase_base: int) -> RustsimError:
    """Return the error of a failed step: the first failure in partition order, the others attached.

    Args:
        kind: which list of phases was stepped.
        failed: the failures of all ranks, in partition order.
        step: index before the step.
        phase_base: index of the list's first phase in the combined list.
    """
    if kind is StepKind.RUNTIME:
        return Runtime(runtime_error(failed, step))
    first, *others = [_one_error(kind, failure) for failure in failed.failures]
    for error, failure in zip((first, *others), failed.failures, strict=True):
        error.add_facts(
            rank=failure.rank,
            host=failure.host or None,
            partition=failure.partition,
            phase=failure.phase or None,
            phase_index=phase_base + failure.phase_index,
            step=step,
        )
    return first.add_facts(others=tuple(others))


def _one_error(kind: StepKind, failure: PhaseFailure) -> RustsimError:
    if failure.error is not None:
        return failure.error
    if failure.kind == "worker":
        return ExecutorError(Worker(failure.partition, failure.message))
    if kind is StepKind.PARTITION:
        return PartitionExecution(failure.partition, failure.phase, failure.message)
    return ExecutorError(Phase(failure.partition, failure.phase, failure.message))


