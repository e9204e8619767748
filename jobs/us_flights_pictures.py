"""The pictures of us_flights: the epidemic's curve, and maps of where and when.

No coastline is drawn: the 3,376 airports of data/airports.csv, most of them small, show the country well
enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from us_flights_data import NOT_REACHED, STATES, Floats, I, arrival_days, network, positions

FOOTER = "Populations are departures of 2008, direct legs only: an illustration, not a forecast."
TITLE = "Influenza over the US air network of 2008"
INK, FAINT = "#1f2430", "#8f97a5"
LAYERS = ("R", "I", "E", "S")  # of the stacked plot, from below
# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = {"S": "#56b4e9", "E": "#e69f00", "I": "#d55e00", "R": "#009e73"}
NAMES = {"S": "susceptible", "E": "exposed", "I": "infectious", "R": "recovered"}
LABELLED = {  # airports named on the arrival map: the label's offset from the point (pt), and its alignment
    "JFK": (11, -9, "left"), "ATL": (0, -20, "center"), "ORD": (-10, 6, "right"), "DFW": (-12, -4, "right"),
    "DEN": (0, 12, "center"), "LAX": (-11, -8, "right"), "SEA": (9, 0, "left"), "MIA": (8, -4, "left"),
    "MSP": (0, 10, "center"), "SFO": (-9, -4, "right"),
}  # fmt: skip


@dataclass(frozen=True)
class Region:
    """A part of the map: a window of longitude and latitude, and its box in the panel (None: all of it)."""

    name: str
    west: float
    east: float
    south: float
    north: float
    box: tuple[float, float, float, float] | None = None

    def holds(self, longitude: Floats, latitude: Floats) -> npt.NDArray[np.bool_]:
        """Return which points lie in the window."""
        inside = (longitude > self.west) & (longitude < self.east)
        return inside & (latitude > self.south) & (latitude < self.north)

    def project(self, longitude: Floats, latitude: Floats) -> tuple[Floats, Floats]:
        """Return points on Albers' equal-area conic map of a unit sphere.

        Snyder, "Map projections: a working manual", USGS Professional Paper 1395 (1987), page 100.
        """
        sixth = (self.north - self.south) / 6
        low, high = np.sin(np.radians([self.south + sixth, self.north - sixth]))
        n = (low + high) / 2
        c = 1 - low**2 + 2 * n * low
        rho = np.sqrt(c - 2 * n * np.sin(np.radians(latitude))) / n
        rho_0 = np.sqrt(c - 2 * n * np.sin(np.radians((self.south + self.north) / 2))) / n
        theta = n * np.radians(longitude - (self.west + self.east) / 2)
        return rho * np.sin(theta), rho_0 - rho * np.cos(theta)


REGIONS = (
    Region("", -125.5, -66.4, 24.2, 49.6),
    Region("Alaska", -179.9, -129.9, 51.0, 71.9, (-0.02, -0.05, 0.25, 0.31)),
    Region("Hawaii", -160.6, -154.4, 18.6, 22.5, (0.25, -0.05, 0.14, 0.16)),
    Region("Puerto Rico,\nVirgin Islands", -67.5, -64.4, 17.4, 18.8, (0.89, -0.03, 0.13, 0.09)),
)


# -- The curve ----------------------------------------------------------------------------------------


def draw_curve(figure: Any, run: Any) -> None:
    """Draw who is ill, and the course of the whole population, against the day."""
    curve = run.series("curve.csv")
    day = np.asarray(curve["day"])
    counts = {state: np.asarray(curve[state]) for state in STATES}
    agents = int(sum(counts[state][0] for state in STATES))
    figure.set_layout_engine("none")
    ill, everyone = figure.subplots(
        2,
        1,
        sharex=True,
        height_ratios=(1.5, 1),
        gridspec_kw={"hspace": 0.12, "left": 0.08, "right": 0.97, "top": 0.855, "bottom": 0.13},
    )
    figure.text(0.08, 0.935, TITLE, size=18, weight="bold", color=INK)
    figure.text(0.08, 0.895, subtitle(run.params, agents), size=10.5, color=INK)
    for state in ("I", "E"):
        share = 100 * counts[state] / agents
        ill.fill_between(day, share, color=COLOURS[state], alpha=0.15, lw=0)
        ill.plot(day, share, color=COLOURS[state], lw=2.2, label=NAMES[state])
    ill.set_ylabel("ill at the end of the day (% of agents)")
    _mark_peak(ill, day, counts["I"], agents)
    ill.legend(frameon=False, loc="upper left")
    layers = [100 * counts[state] / agents for state in LAYERS]
    everyone.stackplot(day, layers, colors=[COLOURS[state] for state in LAYERS], lw=0, alpha=0.8)
    everyone.set(xlabel="day", ylabel="all agents (%)", ylim=(0, 100))
    everyone.set_xlim(day[0], max(int(day[-1]), int(day[0]) + 1))
    _name_layers(everyone, day, layers)
    for axes in (ill, everyone):
        axes.spines[["top", "right"]].set_visible(False)
    ill.grid(axis="y", color="#e3e6eb", lw=0.7)
    _footer(figure, 0.08, 0.025)


def subtitle(params: Any, agents: int) -> str:
    """Say in one line what was run."""
    r0 = float(params["beta"]) * float(params["infectious_days"])
    start = f"{int(params['initial_infectious']):,} infectious at {params['seed_airport']} on day 0"
    travel = f"{100 * float(params['p_travel']):.3g} % of those at home leave each day"
    return f"{agents:,} agents at {len(network().codes)} airports, {start}, $R_0$ = {r0:.3g}, {travel}"


def _mark_peak(axes: Any, day: Any, infectious: Any, agents: int) -> None:
    top = int(np.argmax(infectious))
    share = 100 * infectious[top] / agents
    axes.set_ylim(0, max(1.18 * share, 1e-9))
    axes.plot([day[top]], [share], "o", color=COLOURS["I"], ms=7, mec="white", mew=1.5)
    side = "left" if day[top] < day[0] + (day[-1] - day[0]) / 4 else "center"
    text = f"peak on day {day[top]}: {infectious[top]:,} infectious"
    style = {"ha": side, "color": COLOURS["I"], "weight": "bold"}
    axes.annotate(text, (day[top], share), (0, 9), textcoords="offset points", **style)


def _name_layers(axes: Any, day: Any, layers: list[Floats]) -> None:
    """Write the last shares of susceptible and recovered into their areas."""
    bottom = 0.0
    for name, layer in zip(LAYERS, layers, strict=True):
        last, middle = float(layer[-1]), bottom + float(layer[-1]) / 2
        bottom += last
        if name in "RS" and last > 8:
            text = f"{NAMES[name]} {last:.1f} %  "
            axes.text(day[-1], middle, text, ha="right", va="center", weight="bold", color=INK)


# -- The maps -----------------------------------------------------------------------------------------


def map_days(infectious: npt.NDArray[np.int64]) -> list[int]:
    """Return which four samples the map shows: around the peak, or spread evenly where it comes too late."""
    last, peak = len(infectious) - 1, int(np.argmax(infectious))
    if last < 4:
        return list(range(last + 1))
    if peak >= 4 and 1.3 * peak <= last:
        return [round(peak * part) for part in (0.4, 0.7, 1.0, 1.3)]
    return [round(last * part) for part in (0.25, 0.5, 0.75, 1.0)]


def draw_map(figure: Any, run: Any) -> None:
    """Draw the prevalence at each airport on four dates, and the day on which the infection arrived there."""
    from matplotlib.colors import LogNorm

    arrays = run.arrays("airports.h5")
    day, counts = np.asarray(arrays["step"]), np.asarray(arrays["counts"])
    here = counts.sum(axis=2)
    prevalence = 100 * counts[:, :, I] / np.maximum(here, 1)
    agents = int(here[0].sum())
    figure.set_layout_engine("none")
    figure.text(0.03, 0.972, TITLE, size=22, weight="bold", color=INK)
    figure.text(0.03, 0.954, subtitle(run.params, agents), size=12, color=INK)
    _heading(figure, 0.925, "Prevalence", "infectious share of the agents at each airport, end of the day")
    scale = LogNorm(0.02, 10, clip=True)
    for number, sample in enumerate(map_days(counts[:, :, I].sum(axis=1))):
        axes = figure.add_axes((0.02 + 0.455 * (number % 2), 0.68 - 0.27 * (number // 2), 0.44, 0.222))
        _panel(axes, here[sample], prevalence[sample], prevalence[sample] > 0, "viridis_r", scale)
        total = int(counts[sample, :, I].sum())
        title = f"Day {day[sample]}: {total:,} infectious ({100 * total / agents:.2g} %)"
        axes.set_title(title, size=12, loc="left", x=0.03, color=INK)
    label = "infectious (% of the agents there)"
    _colour_bar(figure, (0.93, 0.47, 0.012, 0.38), "viridis_r", scale, label, "both")
    _draw_arrival(figure, here[0], day, np.asarray(arrays["infectious_after_move"]))
    _footer(figure, 0.03, 0.012)


def _draw_arrival(figure: Any, people: Any, day: Any, infectious: Any) -> None:
    from matplotlib.colors import BoundaryNorm

    arrival = arrival_days(day, infectious)
    reached = arrival != NOT_REACHED
    _heading(figure, 0.366, "Arrival", "first day with an infectious agent; hollow: not reached")
    axes = figure.add_axes((0.02, 0.055, 0.6, 0.3))
    last = max(int(day[-1]), 1)
    scale = BoundaryNorm(_bounds(last), 256)
    _panel(axes, people, arrival.astype(np.float64), reached, "viridis", scale, labels=True)
    _colour_bar(figure, (0.645, 0.085, 0.012, 0.25), "viridis", scale, "arrival day", "neither")
    axes = figure.add_axes((0.755, 0.085, 0.215, 0.25))
    known = [int((reached & (arrival <= d)).sum()) for d in day]
    axes.fill_between(day, known, step="post", color="#21918c", alpha=0.2, lw=0)
    axes.step(day, known, where="post", color="#21918c", lw=2)
    axes.axhline(len(arrival), color=FAINT, lw=1, ls=":")
    axes.set(xlim=(day[0], max(last, int(day[0]) + 1)), ylim=(0, len(arrival) * 1.05), xlabel="day")
    axes.set_ylabel("airports reached")
    text = f"{known[-1]} of {len(arrival)} airports reached by day {day[-1]}"
    axes.set_title(text, size=11, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _bounds(last: int) -> list[int]:
    """Return the bounds of the arrival days' colours: some ten of equal, round width, past the end."""
    width = next(w * 10**p for p in range(9) for w in (1, 2, 5) if w * 10**p * 10 > last)
    return list(range(0, last + width + 1, width))


def _panel(
    axes: Any, people: Any, value: Floats, filled: Any, colours: str, scale: Any, *, labels: bool = False
) -> None:
    """Draw one map with its insets: area shows an airport's people, colour its value, hollow: not filled."""
    everywhere, places = positions()
    size = 11 + 3200 * people / max(int(people.sum()), 1)
    order = np.argsort(-people, kind="stable")
    for region in REGIONS:
        part = axes if region.box is None else axes.inset_axes(region.box)
        backdrop = everywhere[region.holds(*everywhere.T)]
        part.scatter(*region.project(*backdrop.T), s=3.5, c="#d3d8df", lw=0, zorder=1)
        x, y = region.project(*places.T)
        mine = order[region.holds(*places[order].T)]
        empty, full = mine[~filled[mine]], mine[filled[mine]]
        hollow = {"facecolors": "white", "edgecolors": FAINT, "lw": 0.7, "zorder": 2}
        part.scatter(x[empty], y[empty], s=size[empty], **hollow)
        coloured = {"cmap": colours, "norm": scale, "edgecolors": INK, "lw": 0.35, "zorder": 3}
        part.scatter(x[full], y[full], s=size[full], c=value[full], **coloured)
        part.set(aspect="equal", xticks=[], yticks=[], facecolor="none")
        part.margins(0.03 if region.box is None else 0.12)
        part.spines[:].set_visible(False)
        if region.box is not None:
            part.set_xlabel(region.name, size=8, color="#5b6270", labelpad=1)
        elif labels:
            _label(part, x, y)


def _label(axes: Any, x: Floats, y: Floats) -> None:
    from matplotlib.patheffects import withStroke

    codes = network().codes
    for code, (right, up, side) in LABELLED.items():
        place = codes.index(code)
        style = {"ha": side, "size": 10, "weight": "bold", "color": INK, "zorder": 5}
        label = axes.annotate(code, (x[place], y[place]), (right, up), textcoords="offset points", **style)
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _heading(figure: Any, y: float, what: str, meaning: str) -> None:
    figure.text(0.03, y, what, size=14, weight="bold", color=INK)
    figure.text(0.125 if what == "Prevalence" else 0.09, y, meaning, size=12, color=INK)


def _colour_bar(
    figure: Any, box: tuple[float, ...], colours: str, scale: Any, label: str, extend: str
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FuncFormatter, NullFormatter

    bar = figure.colorbar(ScalarMappable(scale, colours), cax=figure.add_axes(box), extend=extend)
    bar.set_label(label, size=11)
    bar.outline.set_visible(False)
    if extend == "both":
        bar.set_ticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10])
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _footer(figure: Any, x: float, y: float) -> None:
    source = "Data: US DOT, Bureau of Transportation Statistics."
    figure.text(x, y, f"{FOOTER} {source}", size=9, color="#5b6270")
