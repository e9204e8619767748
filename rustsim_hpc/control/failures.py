"""Convert phase failures, which arrive as data, into the one typed error that every rank raises."""

from __future__ import annotations

from rustsim_hpc.control.metrics import PhaseKind
from rustsim_hpc.control.runtime import runtime_error
from rustsim_hpc.errors import (
    ExecutorError,
    PartitionExecution,
    Phase,
    Runtime,
    RustsimError,
    Worker,
)
from rustsim_hpc.executors.work import PhaseFailure, PhaseTrace
from rustsim_hpc.ranks.meeting import StepFailed

StepKind = PhaseKind
"""The way to step: which of the three lists of phases runs."""


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
    first, *others = [_one_error(kind, failure, step, phase_base) for failure in failed.failures]
    return first.add_facts(others=tuple(others))


def _one_error(kind: StepKind, failure: PhaseFailure, step: int, phase_base: int) -> RustsimError:
    error: RustsimError
    if failure.error is not None:
        error = failure.error
    elif failure.kind == "worker":
        error = ExecutorError(Worker(failure.partition, failure.message, phase=failure.phase or None))
    elif kind is StepKind.PARTITION:
        error = PartitionExecution(failure.partition, failure.phase, failure.message)
    else:
        error = ExecutorError(Phase(failure.partition, failure.phase, failure.message))
    if failure.phase_index is not None:
        error.add_facts(phase=failure.phase or None, phase_index=phase_base + failure.phase_index)
    if failure.trace:
        (error.source if isinstance(error, ExecutorError) else error).__cause__ = PhaseTrace(failure.trace)
    return error.add_facts(rank=failure.rank, host=failure.host or None, step=step, hint=failure.hint)
