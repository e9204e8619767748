"""What predictions rest on: this machine's figures, and what a row of a model costs."""

from __future__ import annotations

import time

from rustsim_hpc.bench.engine import Engine, Setup
from rustsim_hpc.bench.kept import kept
from rustsim_hpc.bench.measure import Section, figure
from rustsim_hpc.bench.report import Report
from rustsim_hpc.errors import JobError
from rustsim_hpc.job.keys import JobSpec
from rustsim_hpc.job.prediction import Load, Machine
from rustsim_hpc.modeling.reductions import meeting_bytes

_SAMPLE_ROWS = 1_000_000
_SAMPLE_SECONDS = 0.5
_SAMPLE_STEPS = 200


def machine_of(sections: list[Section], workers: int) -> Machine | None:
    """Return the machine that a report speaks of, None where it lacks what a prediction needs."""

    def seconds(section: str, row: str) -> float | None:
        found = figure(sections, section, row)
        return None if found is None else found.seconds

    def best(cores: str) -> float:
        found = (figure(sections, "memory", f"{kind}.{cores}") for kind in ("copy", "triad", "update"))
        return max((row.rate or 0.0 for row in found if row is not None), default=0.0) * 1e9

    alone, ranks = seconds("empty", "inline"), seconds("empty", "ranks")
    allreduce = seconds("empty", "allreduce")
    if alone is None or ranks is None or allreduce is None or not best("one"):
        return None
    return Machine(max(alone, ranks - allreduce), allreduce, best("one"), best("all"), workers)


def kept_machine() -> Machine:
    """Return this machine's kept figures.

    Raises:
        JobError: there are none.
    """
    report: Report | None = kept()
    machine = None if report is None else machine_of(report.sections, int(report.settings["workers"]))
    if machine is None:
        raise JobError(
            "there are no figures of this machine to predict from", hint="run `rustsim-hpc bench` here first"
        )
    return machine


def job_load(spec: JobSpec, machine: Machine, ranks: int) -> Load:
    """Return what a job's step asks for, by making some steps of a part of it on one core.

    Raises:
        RustsimError: the model cannot be run.
    """
    rows = max(1, min(-(-spec.run.agents // ranks), _SAMPLE_ROWS))
    replay = spec.replay.fingerprint if spec.replay.mode == "record" else "off"
    return sample(
        Setup(spec.model.module, rows, guard=spec.run.guard, replay=replay, params=spec.params), machine
    )


def sample(setup: Setup, machine: Machine) -> Load:
    """Return what a model's step asks for, by making its first steps on one core, for half a second or so."""
    with Engine(setup) as engine:
        engine.step(2)
        start, steps = time.perf_counter(), 0
        while steps < _SAMPLE_STEPS and (steps < 2 or time.perf_counter() - start < _SAMPLE_SECONDS):
            engine.step(1)
            steps += 1
        spent = (time.perf_counter() - start) / steps
        return _load(engine, max(spent - machine.step, 0.0) / setup.rows)


def _load(engine: Engine, row_seconds: float) -> Load:
    work = engine.plane.stepper(engine.executor).work
    program = work.program
    schema = program.schema
    moved = schema.row_bytes + sum(schema.dtypes[column].itemsize for column in program.written)
    collectives = sum(1 + bool(segment.derives) for segment in program.segments)
    if program.observations:
        collectives += 1
    size = meeting_bytes(program, work.params) / collectives
    return Load(row_seconds, moved, collectives, size)
