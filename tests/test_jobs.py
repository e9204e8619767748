"""The jobs: each one, small, is bit for bit its plain-NumPy twin; the main job against theory."""

import csv
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
from reference import Influenza, Stream, philox4x32_10

import rustsim_hpc as rs
from rustsim_hpc.errors import ModelError
from rustsim_hpc.modeling.params import bind_params

JOBS = Path(__file__).resolve().parent.parent / "jobs"
COUNT_OF_PLACES = 305
S, E, I, R = range(4)  # noqa: E741


class Outcome(NamedTuple):
    """What a run from the command line came to."""

    code: int
    summary: dict[str, Any]
    errors: str
    folder: Path

    @property
    def run(self) -> Any:
        return rs.open_run(self.folder)


def run_job(job: str, folder: Path, *options: object, pictures: bool = False) -> Outcome:
    """Run a job of the project from the command line into a folder.

    Drawing takes longer than a small run: without ``pictures`` the process has no matplotlib.
    """
    environment = dict(os.environ)
    if not pictures:
        missing = folder.parent / "missing" / "matplotlib"
        missing.mkdir(parents=True, exist_ok=True)
        (missing / "__init__.py").write_text('raise ImportError("left out by a test")\n')
        paths = [str(missing.parent), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "rustsim_hpc", "run", JOBS / f"{job}.toml", "--out", folder, "--json"]
    command += ["--no-progress", *options]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    lines = done.stdout.splitlines()
    return Outcome(done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr, folder)


def run_whole(job: str, folder: Path, *options: object) -> Any:
    """Run a job that must succeed, and return the run's reader."""
    outcome = run_job(job, folder, *options)
    assert outcome.code == 0, outcome.errors
    return outcome.run


def params(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"params.{name}={value}")]


def assert_same_bits(run: Any, twin: reference.State) -> None:
    columns = run.columns()
    assert list(columns) == list(twin)
    for name, expected in twin.items():
        assert columns[name].dtype == expected.dtype, name
        differing = np.flatnonzero(columns[name] != expected)
        assert columns[name].tobytes() == expected.tobytes(), f"{name}: rows {differing[:5]} differ"


@pytest.fixture(scope="module")
def flights() -> Any:
    return imported("us_flights")


@pytest.fixture(scope="module")
def data() -> Any:
    return imported("us_flights_data")


@pytest.fixture(scope="module")
def pictures() -> Any:
    return imported("us_flights_pictures")


def imported(name: str) -> ModuleType:
    sys.path.insert(0, str(JOBS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(JOBS))


# -- The twins' own random numbers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Random123's published known-answer vectors (kat_vectors, philox4x32 10).
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_twins_generator_has_the_published_values(
    counter: list[int], key: tuple[int, int], expected: str
) -> None:
    words = philox4x32_10([np.array(word, np.uint32) for word in counter], key)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_the_twins_streams_are_the_packages() -> None:
    ids = np.array([0, 1, 2, 2**32 - 1, 2**32, 2**63 + 5], np.uint64)
    stream = Stream.of(-7, "move", ids, 41)
    rngs = [(rs.random.key_of(-7, "move"), int(row), 41) for row in ids]
    for draw in range(5):
        assert [rs.random.uniform(rng, draw) for rng in rngs] == stream.uniform(draw).tolist()
        assert [rs.random.uniform32(rng, draw) for rng in rngs] == stream.uniform32(draw).tolist()
        for n in (1, 3, 414_521, 2**31 - 1):
            expected = stream.integers(draw, np.full(ids.size, n))
            assert [rs.random.integers(rng, draw, n) for rng in rngs] == expected.tolist()


# -- Data and the first day ---------------------------------------------------------------------------


def test_the_network_is_the_one_of_2008(flights: Any, data: Any) -> None:
    with (JOBS / "data" / "flights-airport.csv").open(newline="") as file:
        routes = list(csv.DictReader(file))
    network = data.network()
    assert len(routes) == 5366
    assert len(network.codes) == COUNT_OF_PLACES
    assert list(network.codes) == sorted(network.codes)
    assert network.dep.sum() == len(network.flight_to) == 7_009_728
    assert [network.codes[k] for k in np.flatnonzero(network.dep == 0)] == ["CYS", "OGD"]
    tables = flights.tables({})
    assert tables["cum"].tolist() == np.cumsum(network.dep).tolist()
    for line in routes[::97]:
        home, to = network.codes.index(line["origin"]), network.codes.index(line["destination"])
        end = tables["cum"][home]
        leaving = tables["flight_to"][end - tables["dep"][home] : end]
        assert np.count_nonzero(leaving == to) == int(line["count"])


def test_airports_without_a_state_are_real(data: Any, pictures: Any) -> None:
    with (JOBS / "data" / "airports.csv").open(newline="") as file:
        without = {line["iata"] for line in csv.DictReader(file) if line["state"] == "NA"}
    assert without & set(data.network().codes) == {"CLD", "HHH", "MQT", "SCE"}
    everywhere, places = data.positions()
    assert everywhere.shape == (3376, 2)
    assert places.shape == (COUNT_OF_PLACES, 2)
    shown = sum(region.holds(*places.T).astype(int) for region in pictures.REGIONS)
    assert (shown == 1).all(), "each airport of the routes is on exactly one part of the map"


class Rows(NamedTuple):
    start: int
    stop: int
    total: int


DEFAULTS: dict[str, Any] = {"seed_airport": "JFK", "initial_infectious": 100}


def test_homes_are_exact_quotas(flights: Any, data: Any) -> None:
    agents = 1_000_000
    tables = flights.tables({})
    state = flights.initialise(Rows(0, agents, agents), DEFAULTS, tables, 1)
    jfk = np.flatnonzero(state["home"] == data.network().codes.index("JFK"))
    assert (jfk[0], jfk[-1]) == (464_099, 481_046)
    assert np.array_equal(jfk, np.arange(464_099, 481_047))
    assert list(flights.residents("JFK", agents, tables["cum"])) == jfk.tolist()
    assert np.flatnonzero(state["state"] != S).tolist() == jfk[:100].tolist()
    assert (state["state"][jfk[:100]] == I).all()
    assert np.array_equal(state["home"], state["place"])
    counted = np.bincount(state["home"], minlength=COUNT_OF_PLACES)
    assert np.abs(counted - agents * tables["dep"] / 7_009_728).max() < 1


@pytest.mark.parametrize("agents", [1, 17, 20_011, 300_000])
def test_the_first_day_does_not_depend_on_the_cut(flights: Any, data: Any, agents: int) -> None:
    tables, given = flights.tables({}), {"seed_airport": "ATL", "initial_infectious": min(agents, 5) // 5}
    whole = flights.initialise(Rows(0, agents, agents), given, tables, 1)
    cuts = [0, agents // 7, agents // 3, agents]
    parts = [flights.initialise(Rows(a, b, agents), given, tables, 1) for a, b in itertools.pairwise(cuts)]
    for name, column in whole.items():
        assert np.concatenate([part[name] for part in parts]).tobytes() == column.tobytes()
    twin = next(reference.us_flights(agents, 1, Influenza(seed_airport="ATL", initial_infectious=0)))
    assert whole["home"].tobytes() == twin.columns["home"].tobytes()
    residents = flights.residents("ATL", agents, tables["cum"])
    place = data.network().codes.index("ATL")
    assert np.flatnonzero(whole["home"] == place).tolist() == list(residents)


def test_quotas_hold_for_very_many_agents(flights: Any, data: Any) -> None:
    """Products of row and T stay inside int64; the bounds agree with arithmetic that cannot overflow."""
    agents, cum = 10**12, flights.tables({})["cum"]
    residents = flights.residents("JFK", agents, cum)
    for row in (residents.start - 1, residents.start, residents.stop - 1, residents.stop):
        home = flights.initialise(Rows(row, row + 1, agents), DEFAULTS, {"cum": cum}, 1)["home"][0]
        flight = row * 7_009_728 // agents
        assert home == int(np.searchsorted(cum, flight, side="right"))
        assert (home == data.network().codes.index("JFK")) == (row in residents)


def test_more_infectious_than_residents_is_refused(flights: Any) -> None:
    tables = flights.tables({})
    with pytest.raises(ModelError, match="1000 is more than the 339 residents of JFK"):
        flights.initialise(Rows(0, 10, 20_000), DEFAULTS | {"initial_infectious": 1000}, tables, 1)
    with pytest.raises(ModelError, match=r'"JKF" is not an airport .*JFK'):
        flights.initialise(Rows(0, 10, 20_000), DEFAULTS | {"seed_airport": "JKF"}, tables, 1)


def test_arrival_days(data: Any) -> None:
    infectious = np.zeros((5, 4), np.int64)
    infectious[0, 0] = 9  # before the first move: does not count
    infectious[1:, 1] = 1
    infectious[3, 2] = 2
    arrival = data.arrival_days(np.arange(5), infectious)
    assert arrival.tolist() == [data.NOT_REACHED, 1, 3, data.NOT_REACHED]
    later = data.arrival_days(np.arange(40, 45), infectious)
    assert later.tolist() == [40, 41, 43, data.NOT_REACHED]
    assert data.arrival_days(np.arange(1), infectious[:1]).tolist() == [data.NOT_REACHED] * 4


# -- Bit for bit --------------------------------------------------------------------------------------

WAYS = [
    ("--executor", "inline", "--check"),
    ("--executor", "threads", "--workers", "2", "--partitions", "7", "--guard", "torn"),
]


@pytest.mark.parametrize("way", WAYS, ids=["inline", "threads"])
def test_particles_equal_their_twin(tmp_path: Path, way: tuple[str, ...]) -> None:
    run = run_whole("particles", tmp_path / "run", "--agents", 5003, "--steps", 30, *way)
    assert_same_bits(run, reference.particles(5003, 30))
    paths = run.samples("paths.h5")
    assert paths["x"].shape == (31, 100)
    assert np.array_equal(paths["x"][17], reference.particles(5003, 17)["x"][paths["rows"]])


@pytest.mark.parametrize("way", WAYS, ids=["inline", "threads"])
def test_random_walk_equals_its_twin(tmp_path: Path, way: tuple[str, ...]) -> None:
    options = ["--agents", 4099, "--steps", 40, "--seed", 12, *params(width=3.0)]
    run = run_whole("random_walk", tmp_path / "run", *options, *way)
    twin = reference.random_walk(4099, 40, seed=12, width=3.0)
    assert_same_bits(run, twin)
    assert twin["x"].min() >= 0
    assert twin["x"].max() <= 3
    squares = (twin["x"] - 1.5) ** 2 + (twin["y"] - 1.5) ** 2
    spread = run.series("spread.csv")
    assert spread["step"].tolist() == list(range(41))
    assert spread["mean_square"][40] == math.fsum(squares) / 4099


class Case(NamedTuple):
    agents: int
    days: int
    seed: int
    params: Influenza


CASES = [
    Case(20_011, 45, 3, Influenza()),
    Case(
        9_001,
        25,
        11,
        Influenza(
            p_travel=0.5, stay_days=1.5, beta=2.5, latent_days=1.0, initial_infectious=7, seed_airport="OGG"
        ),
    ),
]


@pytest.mark.parametrize(("case", "way"), list(zip(CASES, WAYS, strict=True)), ids=["defaults", "fast"])
def test_us_flights_equals_its_twin(tmp_path: Path, case: Case, way: tuple[str, ...]) -> None:
    options = ["--agents", case.agents, "--steps", case.days, "--seed", case.seed]
    run = run_whole("us_flights", tmp_path / "run", *options, *params(**vars(case.params)), *way)
    twin = reference.us_flights(case.agents, case.seed, case.params)
    days = [next(twin) for _ in range(case.days + 1)]
    assert_same_bits(run, days[-1].columns)
    airports, curve = run.arrays("airports.h5"), run.series("curve.csv")
    assert airports["counts"].shape == (case.days + 1, COUNT_OF_PLACES, 4)
    for day in days:
        assert np.array_equal(airports["counts"][day.day], day.counts), day.day
        infectious = airports["infectious_after_move"][day.day]
        assert np.array_equal(infectious, day.moved[:, I] if day.moved is not None else 0 * infectious)
        row = [int(curve[name][day.day]) for name in ("day", "S", "E", "I", "R")]
        assert row == [day.day, *day.counts.sum(axis=0).tolist()]
    # Something has happened in each part of the model.
    totals = days[-1].counts.sum(axis=0)
    assert (totals > 0).all()
    assert np.any(days[-1].columns["place"] != days[-1].columns["home"])


def test_a_resumed_epidemic_equals_its_twin(tmp_path: Path) -> None:
    options = ["--agents", 9001, "--seed", 5, "--checkpoint-every", 4]
    outcome = run_job("us_flights", tmp_path / "run", *options, "--steps", 9)
    assert outcome.code == 0, outcome.errors
    assert "pictures skipped: curve.png, map.png" in outcome.errors
    command = [sys.executable, "-m", "rustsim_hpc", "resume", str(tmp_path / "run"), "--steps", "20"]
    done = subprocess.run(
        [*command, "--no-progress"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    run = rs.open_run(tmp_path / "run")
    twin = reference.us_flights(9001, 5)
    days = [next(twin) for _ in range(21)]
    assert_same_bits(run, days[20].columns)
    airports = run.arrays("airports.h5")
    assert airports["step"].tolist() == list(range(21))
    assert np.array_equal(airports["counts"], [day.counts for day in days])
    moved = [day.moved[:, I] for day in days if day.moved is not None]
    assert np.array_equal(airports["infectious_after_move"][1:], moved)


# -- What the epidemic does ---------------------------------------------------------------------------


def final_size(r0: float, seeded: float) -> float:
    """Return z of 1 - z = (1 - s0) exp(-R0 z), the share ever infected in one well-mixed place."""
    z = 1.0
    for _ in range(200):
        z = 1.0 - (1.0 - seeded) * math.exp(-r0 * z)
    return z


def test_without_travel_one_place_follows_the_final_size(tmp_path: Path, flights: Any, data: Any) -> None:
    """Nobody outside the seed airport is infected; inside, the mean of 3 seeds is within 4 sd of theory."""
    agents, sizes = 100_000, []
    residents = len(flights.residents("ATL", agents, flights.tables({})["cum"]))
    atl = data.network().codes.index("ATL")
    for seed in (1, 2, 3):
        options = ["--agents", agents, "--steps", 230, "--seed", seed, "--checkpoint-every", 0]
        run = run_whole(
            "us_flights", tmp_path / f"{seed}", *options, *params(p_travel=0.0, seed_airport="ATL")
        )
        counts = run.arrays("airports.h5")["counts"]
        assert (counts[:, atl].sum(axis=1) == residents).all()
        assert counts[:, :, [E, I, R]].sum() == counts[:, atl, E:].sum()
        assert counts[-1, atl, E] + counts[-1, atl, I] == 0, "it has died out"
        sizes.append(counts[-1, atl, R] / residents)
    sd = 1.68 / math.sqrt(residents)
    assert np.mean(sizes) == pytest.approx(final_size(1.5, 100 / residents), abs=4 * sd / math.sqrt(3))


@pytest.fixture(scope="module")
def main_run(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The main job as it stands: a million agents, 180 days."""
    outcome = run_job("us_flights", tmp_path_factory.mktemp("main") / "run", pictures=True)
    assert outcome.code == 0, outcome.errors
    return outcome


@pytest.mark.slow
def test_the_main_job_gives_the_reference_figures(main_run: Outcome) -> None:
    """Figures of an independent simulation of the model's text (10 seeds, mean and sd), at 4 sd."""
    agents, run = 1_000_000, main_run.run
    curve = run.series("curve.csv")
    infectious = curve["I"]
    assert len(infectious) == 181
    assert 1 - curve["S"][180] / agents == pytest.approx(0.5771, abs=4 * 0.0026)
    assert int(infectious.argmax()) == pytest.approx(113, abs=4 * 1.7)
    assert int(infectious.max()) == pytest.approx(30_800, abs=4 * 530)
    columns = run.columns(step=180)
    away = np.mean(columns["place"] != columns["home"])
    assert away == pytest.approx(0.0291, abs=4 * math.sqrt(0.0291 * 0.9709 / agents))
    assert set(run.checkpoints()) == {60, 120, 180}


@pytest.mark.slow
def test_the_main_job_conserves_and_never_goes_back(main_run: Outcome) -> None:
    curve = main_run.run.series("curve.csv")
    assert (curve["S"] + curve["E"] + curve["I"] + curve["R"] == 1_000_000).all()
    assert (np.diff(curve["S"]) <= 0).all()
    assert (np.diff(curve["R"]) >= 0).all()
    assert [int(curve[name][0]) for name in "SEIR"] == [999_900, 0, 100, 0]


@pytest.mark.slow
def test_the_main_job_reaches_airports_and_says_which_not(main_run: Outcome, data: Any) -> None:
    airports = main_run.run.arrays("airports.h5")
    arrival = data.arrival_days(airports["step"], airports["infectious_after_move"])
    assert arrival[data.network().codes.index("JFK")] == 1
    assert set(arrival.tolist()) <= {data.NOT_REACHED, *range(1, 181)}
    never = arrival == data.NOT_REACHED
    assert 0 < never.sum() < 40
    assert not airports["infectious_after_move"][:, never].any()


@pytest.mark.slow
def test_the_main_job_draws_its_pictures(main_run: Outcome) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    for name, (width, height) in (("curve.png", (10.5, 7.2)), ("map.png", (14.0, 15.2))):
        image = imread(main_run.folder / name)
        assert image.shape[1] / image.shape[0] == pytest.approx(width / height, rel=0.01)
        inked = np.mean(image[..., :3].min(axis=2) < 0.9)
        assert 0.02 < inked < 0.6, f"{name} is blank, or all ink"
    assert set(main_run.summary["outputs"]) == {"curve.csv", "airports.h5", "curve.png", "map.png"}


def test_mixing_everyone_gives_the_early_growth(tmp_path: Path) -> None:
    """Half of those at home travel each day: I grows by the larger root of (g - 1/2)(g - 2/3) = beta / 2."""
    growth = []
    for seed in (1, 2):
        options = ["--agents", 1_000_000, "--steps", 36, "--seed", seed, "--checkpoint-every", 0]
        run = run_whole("us_flights", tmp_path / f"{seed}", *options, *params(p_travel=0.5))
        curve = run.series("curve.csv")
        ill = curve["E"] + curve["I"]
        growth.append((ill[36] / ill[12]) ** (1 / 24))
    root = (7 / 6 + math.sqrt(49 / 36 - 4 * (1 / 3 - 1 / 4))) / 2
    assert root == pytest.approx(1.0902, abs=5e-5)
    assert np.mean(growth) == pytest.approx(root, abs=4 * GROWTH_SD / math.sqrt(2))


GROWTH_SD = 0.0045
"""Standard deviation of the growth a day between days 12 and 36 over seeds, at a million agents."""


# -- Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"seed_airport": "OGG", "initial_infectious": 5000},
            r"initial_infectious = 5000 is more than the \d+ residents of OGG among 20000 agents",
        ),
        ({"seed_airport": "JFKX"}, 'seed_airport "JFKX" is not an airport .*JFK'),
        ({"p_travel": 1.5}, "p_travel = 1.5 must be <= 1"),
    ],
)
def test_what_the_model_refuses_ends_with_2(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    outcome = run_job("us_flights", tmp_path / "run", "--agents", 20_000, "--steps", 1, *params(**given))
    assert outcome.code == 2, outcome.errors
    assert "Traceback" not in outcome.errors
    assert re.search(message, outcome.errors), outcome.errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"p_travel": -0.01}, "p_travel = -0.01 must be >= 0"),
        ({"stay_days": 0.5}, "stay_days = 0.5 must be >= 1"),
        ({"latent_days": 0.99}, "latent_days = 0.99 must be >= 1"),
        ({"infectious_days": 0.0}, "infectious_days = 0.0 must be >= 1"),
        ({"beta": -0.1}, "beta = -0.1 must be >= 0"),
        ({"beta": math.nan}, "beta must be a number"),
        ({"initial_infectious": -1}, "initial_infectious = -1 must be >= 0"),
        ({"initial_infectious": 1.5}, "initial_infectious must be a whole number"),
        ({"seed_airport": 7}, "seed_airport must be text"),
    ],
)
def test_parameters_have_bounds(flights: Any, given: dict[str, Any], message: str) -> None:
    declared = flights.model().parameters()
    with pytest.raises(ModelError, match=re.escape(message)):
        bind_params(declared, given)


def test_the_job_file_repeats_the_models_defaults(flights: Any) -> None:
    job = tomllib.loads((JOBS / "us_flights.toml").read_text())
    defaults = {name: param.default for name, param in flights.model().parameters().items()}
    assert job["params"] == defaults == vars(Influenza())


# -- Pictures of small and odd runs -------------------------------------------------------------------


def drawn(pictures: Any, days: list[reference.Day], **changes: object) -> Any:
    """Draw both pictures of some days of a twin, and return the map's figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.array([day.counts for day in days])
    totals = counts.sum(axis=1)
    moved = [day.moved[:, I] if day.moved is not None else np.zeros(COUNT_OF_PLACES, int) for day in days]
    step = np.array([day.day for day in days])
    run = SimpleNamespace(
        params=vars(Influenza(**changes)),  # type: ignore[arg-type]
        series=lambda _: {"day": step, **{name: totals[:, k] for k, name in enumerate("SEIR")}},
        arrays=lambda _: {"step": step, "counts": counts, "infectious_after_move": np.array(moved)},
    )
    for draw in (pictures.draw_curve, pictures.draw_map):
        figure = Figure(figsize=(10, 10), dpi=30, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, run)
        figure.canvas.draw()
    return figure


@pytest.mark.parametrize("last", [0, 2, 5])
def test_pictures_of_short_runs(pictures: Any, last: int) -> None:
    pytest.importorskip("matplotlib")
    twin = reference.us_flights(20_000, 1)
    figure = drawn(pictures, [next(twin) for _ in range(last + 1)])
    texts = " ".join(text.get_text() for text in figure.texts)
    assert pictures.FOOTER in texts
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    dates = [int(title.split()[1].strip(":")) for title in titles if title.startswith("Day")]
    assert dates == sorted(set(dates))
    assert dates[-1] <= last
    assert len(dates) == min(4, last + 1)


def test_the_map_shows_four_dates(pictures: Any) -> None:
    rise_and_fall = np.concatenate([np.arange(114), np.arange(113, 46, -1)])
    assert pictures.map_days(rise_and_fall) == [45, 79, 113, 147]
    assert pictures.map_days(np.arange(101)) == [25, 50, 75, 100]
    for last in range(40):
        for peak in range(last + 1):
            days = pictures.map_days(np.eye(last + 1, dtype=np.int64)[peak])
            assert len(set(days)) == len(days) == min(4, last + 1)
            assert days == sorted(days)
            assert 0 <= days[0] <= days[-1] <= last


def test_a_picture_without_an_epidemic(pictures: Any) -> None:
    pytest.importorskip("matplotlib")
    twin = reference.us_flights(5000, 1, Influenza(initial_infectious=0))
    figure = drawn(pictures, [next(twin) for _ in range(7)], initial_infectious=0)
    assert f"0 of {COUNT_OF_PLACES} airports reached by day 6" in [
        axes.get_title(loc="left") for axes in figure.axes
    ]


def test_the_maps_projection_keeps_areas(pictures: Any) -> None:
    """Small squares of the globe keep their area at any place of a region: Albers' map is equal-area."""
    mainland = pictures.REGIONS[0]
    step = 0.001
    for longitude, latitude in ((-120.0, 48.0), (-96.0, 37.0), (-70.0, 26.0)):
        x, y = mainland.project(
            np.array([longitude, longitude + step, longitude]),
            np.array([latitude, latitude, latitude + step]),
        )
        area = (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])
        expected = np.radians(step) ** 2 * np.cos(np.radians(latitude))
        assert area == pytest.approx(expected, rel=1e-4)
