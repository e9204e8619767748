"""Predictions beside measurements, and the main job's curve to many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rustsim_hpc.bench import ranks
from rustsim_hpc.bench.engine import Setup
from rustsim_hpc.bench.load import machine_of, sample
from rustsim_hpc.bench.measure import Row, Section
from rustsim_hpc.bench.report import Report
from rustsim_hpc.bench.setting import MODELS, Size, flights_module, flights_params
from rustsim_hpc.job.prediction import ASSUMPTIONS, Load, Machine, Network, Prediction, curve, predict, table
from rustsim_hpc.modeling.outputs import Picture
from rustsim_hpc.run_folder.pictures import draw_pictures

CURVE_ROWS = 10_000_000_000
CURVE = tuple(1 << power for power in range(17))
PICTURE = "images/scaling.png"
_ON_PAGE = (1, 2, 16, 256, 4096, 65536)


def predicted(size: Size, before: list[Section]) -> Section:
    """Hold predictions for one rank and for several against measurements.

    before: the sections that the machine's figures are taken from.
    """
    text = (
        "The time of a step as `rustsim-hpc plan --predict` predicts it, from the tables above and from a "
        "few steps of the model on one core, compared to steps measured under mpirun. us_flights has "
        f"{size.agents:,} agents and integrate {size.rows:,} rows in all, on one rank and on "
        f"{size.workers}. The multiple is the measured time divided by the predicted one."
    )
    section = Section("predict", "Predicted and measured", text)
    machine, module = machine_of(before, size.workers), flights_module()
    if machine is None:
        section.rows.append(Row("none", "predictions", note="not made: there are no figures of empty steps"))
        return section
    setups = [("integrate", Setup(MODELS + "integrate", size.rows), 2)]
    if module is not None:
        flights = Setup(str(module), size.agents, params=flights_params(size.agents))
        setups.insert(0, ("us_flights", flights, size.days))
    network = Network(ranks_per_node=size.workers)
    for name, setup, steps in setups:
        load = sample(setup, machine)
        for count in (1, size.workers):
            expected = predict(load, machine, network, setup.rows, count).seconds
            label = f"{name}, {count} rank{'s' if count > 1 else ''}"
            asked = {"module": setup.module, "rows": setup.rows, "params": dict(setup.params)}
            try:
                timing = ranks.start(count, what="steps", steps=steps, rounds=size.rounds, **asked)["step"]
            except OSError as error:
                section.rows.append(Row(f"{name}.{count}", label, note=f"not measured: {error}"))
                continue
            row = Row.of(f"{name}.{count}", label, timing, rate=expected * 1e3, unit="ms predicted")
            row.times = timing.median / expected
            section.rows.append(row)
    return section


def curve_figures(report: Report, size: Size) -> dict[str, Any] | None:
    """Return what the main job's curve is made of, in JSON's types; None where it cannot be made."""
    machine, module = machine_of(report.sections, size.workers), flights_module()
    if machine is None or module is None:
        return None
    load = sample(Setup(str(module), size.agents, params=flights_params(size.agents)), machine)
    return {
        "job": "us_flights",
        "rows": CURVE_ROWS,
        "load": asdict(load),
        "machine": asdict(machine),
        "network": asdict(Network(ranks_per_node=size.workers)),
    }


def predictions(figures: Mapping[str, Any], ranks: tuple[int, ...] = CURVE) -> list[Prediction]:
    """Return the curve that :func:`curve_figures` describes."""
    load, machine = Load(**figures["load"]), Machine(**figures["machine"])
    return curve(load, machine, Network(**figures["network"]), figures["rows"], ranks)


def curve_text(figures: Mapping[str, Any]) -> str:
    """Return the part of the page that shows the curve."""
    load, network = Load(**figures["load"]), Network(**figures["network"])
    assumed = "\n".join(f"- {line}" for line in ASSUMPTIONS)
    return f"""## To 65,536 ranks, predicted

{figures["job"]} with {figures["rows"]:,} agents in all, as `rustsim-hpc plan --predict` predicts it. A row
costs {load.row * 1e9:.2f} ns on one core, a step has {load.meetings} collectives of {load.meeting_bytes:,.0f}
bytes, the network has a latency of {network.latency * 1e6:g} µs and a bandwidth of
{network.bandwidth / 1e9:g} GB/s, and a node has {network.ranks_per_node} ranks. This is a prediction, not a
measurement. It assumes that

{assumed}

![Predicted efficiency]({PICTURE})

```text
{table(predictions(figures, _ON_PAGE))}
```
"""


def draw_curve(figures: Mapping[str, Any], folder: Path) -> None:
    """Draw the curve below a folder of documentation; without matplotlib that is skipped, and said."""
    draw_pictures([Picture(PICTURE, _draw, size=(7.0, 3.2))], folder, predictions(figures))


def _draw(figure: Any, made: list[Prediction]) -> None:
    counts = [p.ranks for p in made]
    times, efficiency = figure.subplots(1, 2)
    for name, values in (
        ("whole step", [p.seconds for p in made]),
        ("rows", [p.rows_seconds for p in made]),
        ("collectives", [p.meeting_seconds for p in made]),
        ("the step itself", [p.step_seconds for p in made]),
    ):
        times.loglog(counts, [value * 1e3 for value in values], label=name)
    times.set(xlabel="ranks", ylabel="ms a step", ylim=(1e-3, None))
    times.legend(fontsize="small")
    efficiency.semilogx(counts, [p.strong for p in made], label="strong: same agents in all")
    efficiency.semilogx(counts, [p.weak for p in made], label="weak: same agents a rank")
    efficiency.set(xlabel="ranks", ylabel="efficiency", ylim=(0, 1.05))
    efficiency.legend(fontsize="small")
