"""docs/slurm.md and the scripts of slurm/: what is quoted is there, what can be run is run, all is Bash."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from rustsim_hpc.cli.main import cli
from rustsim_hpc.job import launch
from rustsim_hpc.job.spec import Override, RunOptions, read_job
from rustsim_hpc.ranks.team import SoloTeam
from rustsim_hpc.run_folder import folder as run_folder
from rustsim_hpc.slurm import (
    directive,
    seconds_of,
    tasks_of,
    template,
    unfit_word,
    with_default,
    with_directive,
)

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "slurm").iterdir())}
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = [line.split(">")[0] for block in BLOCKS for line in block.splitlines()]
PRINTED = [line for line in COMMANDS if line.startswith("rustsim-hpc slurm ")]
# Of sbatch and srun, which a machine without Slurm cannot be asked for.
SLURMS = {
    "array", "constraint", "cpus-per-task", "gpus-per-node", "hint", "mem-per-cpu", "mpi", "nodes",
    "ntasks-per-node", "open-mode", "signal", "time",
}  # fmt: skip
PIPS = {"wheel-dir", "no-index", "find-links", "no-binary"}


def assert_bash(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, text=True, check=False, capture_output=True, timeout=10)
    assert (done.returncode, done.stderr) == (0, ""), text


def printed(line: str) -> str:
    """Run `rustsim-hpc slurm …` in this process and return what it prints."""
    done = CliRunner().invoke(cli, shlex.split(line)[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_is_bash(number: int) -> None:
    assert_bash(BLOCKS[number])


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_bash_and_is_described(name: str) -> None:
    assert_bash(SCRIPTS[name])
    assert f"| `slurm/{name}` |" in TEXT


def test_the_quoted_part_is_the_scripts() -> None:
    [quoted] = [block for block in BLOCKS if block.startswith("JOB=${JOB:-")]
    assert quoted in SCRIPTS["cpu.sbatch"]


def test_files_that_are_named_are_there() -> None:
    for name in re.findall(r"\b(?:slurm|jobs|docs)/[\w.-]+\w", TEXT):
        assert (ROOT / name).is_file(), name


def test_variables_are_those_of_the_scripts() -> None:
    rows = re.findall(r"^\| `([A-Z]+)` \| (.*?) \|", TEXT, re.MULTILINE)
    of = {
        name: {script for script, text in SCRIPTS.items() if re.search(rf"\b{name}=\$\{{{name}:-", text)}
        for name, _ in rows
    }
    # The chain hands JOB on without looking at it.
    of["JOB"].add("chain.sh")
    for name, where in rows:
        told = set(re.findall(r"`([\w.]+)`", where))
        everywhere = set(SCRIPTS) - told if where.startswith("all") else told
        assert of[name] == everywhere, name
    defaults = {name for text in SCRIPTS.values() for name in re.findall(r"\b([A-Z]+)=\$\{\1:-", text)}
    assert defaults == set(of)
    for line in COMMANDS:
        for name in re.findall(r"\b([A-Z]+)=", line.partition("sbatch")[0]):
            assert name in of or name == "MPICC", line


def test_options_are_the_engines_slurms_or_pips() -> None:
    own = {
        option.removeprefix("--")
        for command in cli.commands.values()
        for parameter in command.params
        for option in [*parameter.opts, *parameter.secondary_opts]
    }
    named = set(
        re.findall(r"(?<![\w-])--([a-z][a-z-]+)", re.sub(r"`srun --mpi=list`|srun --kill-on\S+", "", TEXT))
    )
    assert named <= own | SLURMS | PIPS, named - own - SLURMS - PIPS


@pytest.mark.parametrize("line", PRINTED)
def test_printed_scripts(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = printed(line)
    assert_bash(text)
    assert f"JOB=${{JOB:-{ROOT}/jobs/us_flights.toml}}" in text
    assert text.count("\nsrun ") == 1
    assert int(directive(text, "mem-per-cpu").removesuffix("M")) >= 256
    words = shlex.split(line)
    for option, value in itertools.pairwise(words):
        if option.removeprefix("--") in {
            "nodes",
            "ntasks-per-node",
            "cpus-per-task",
            "time",
            "array",
            "partition",
        }:
            assert directive(text, option.removeprefix("--")) == value


def test_each_kind_of_script_is_printed_as_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rows = re.findall(r"^\| `slurm/([\w.]+)` \| .* \| ?(.*?) ?\|$", TEXT, re.MULTILINE)
    assert sorted(name for name, _ in rows) == list(SCRIPTS)
    values = {"nothing more": "", "`--requeue`": "--requeue", "`--array`": "--array 1-4"}
    values["`--gpus-per-node`"] = "--gpus-per-node 2"
    for name, option in rows:
        if option:
            made = printed(f"rustsim-hpc slurm jobs/us_flights.toml {values[option]}")
            # What runs is the script's own text, after what is filled in.
            assert made.endswith(SCRIPTS[name].partition("\nsource ")[2])
            directives = [
                re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE) for text in (SCRIPTS[name], made)
            ]
            assert directives[0] == directives[1]


def test_time_shortens_the_warning() -> None:
    assert [seconds_of(text) for text in ("90", "1:30", "02:00:00", "1-12", "1-00:30", "soon")] == [
        5400, 90, 7200, 129600, 88200, None,
    ]  # fmt: skip
    text = printed("rustsim-hpc slurm jobs/us_flights.toml --requeue --time 4:00")
    assert directive(text, "signal") == "B:USR1@60"


def test_only_what_is_meant_is_filled_in() -> None:
    text = template("cpu")
    assert with_directive(text, "nodes", "9") == text.replace("--nodes=2", "--nodes=9")
    added = with_directive(text, "account", "physics").splitlines()
    assert [line for line in added if line not in text.splitlines()] == ["#SBATCH --account=physics"]
    assert with_default(text, "OUT", "a b") == re.sub(
        r"^OUT=.*$", "OUT=${OUT:-'a b'}", text, flags=re.MULTILINE
    )
    with pytest.raises(ValueError, match="no default of X"):
        with_default(text, "X", "y")
    assert unfit_word({"--time": "1:00", "--account": "a; rm"}) == "--account"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--array abc", "--array 'abc' names no tasks"),
        ("--array 5-1", "--array '5-1' names no tasks"),
        ("--array 1-4%0", "--array '1-4%0' names no tasks"),
        ("--array 1-4 --requeue", "each have a script of their own"),
        ("--out ''", "--out must name a folder"),
        ("--time soon", "--time 'soon' is no time limit"),
        ("--nodes -1", "-1 is not in the range"),
        ("--partition 'a b'", "--partition 'a b' is nothing that Slurm could take"),
    ],
)
def test_what_slurm_would_refuse_is_refused(options: str, said: str) -> None:
    words = ["slurm", str(ROOT / "jobs" / "us_flights.toml"), *shlex.split(options)]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2
    assert said in done.output
    for array in ("1-20", "1-100%10", "0-9:3,12", "1,4,7"):
        assert tasks_of(array)


@pytest.mark.parametrize("name", ["it's a", 'a "b" $(touch pwned) `c`', "a}b\\n"])
def test_names_come_through_the_shell_as_they_are(tmp_path: Path, name: str) -> None:
    job, out = tmp_path / f"{name}.toml", f"runs of {name}"
    for end in ("toml", "py"):
        target = job if end == "toml" else tmp_path / "random_walk.py"
        target.write_text((ROOT / "jobs" / f"random_walk.{end}").read_text("utf-8"), "utf-8")
    sets = f"run.name={name}"
    made = CliRunner().invoke(cli, ["slurm", str(job), "--out", out, "--set", sets], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    stand_in = tmp_path / "bin" / "srun"
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environ = {"VENV": str(tmp_path), "SLURM_CPUS_PER_TASK": "1", "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash"], input=made.output, text=True, capture_output=True, check=False, cwd=tmp_path,
        env=environ, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    words = done.stdout.splitlines()
    run = words[words.index("run") :]
    assert run[1:5] == [str(job), "--out", out, f"--set={sets}"]
    assert not (tmp_path / "pwned").exists()


def test_mixed_machines_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = [
        {"host": f"n{k}", "cpu": "Abacus 3" if k else "Abacus 2", "libm": {"library": "glibc 2.17"}}
        for k in range(6)
    ]
    spec, _ = read_job(
        ROOT / "jobs" / "particles.toml",
        [Override.parse(f"run.{key}") for key in ("agents=10", "steps=1")],
        environ={},
    )
    launch.run_job(spec, RunOptions(out=tmp_path / "one", progress=False), SoloTeam())
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(run_folder, "by_host", lambda facts: hosts)
    launch.run_job(spec, RunOptions(out=tmp_path / "mixed", progress=False), SoloTeam())
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: the ranks of this run have different CPU models: "
        "Abacus 2 on n0; Abacus 3 on n1, n2, n3 and 2 more;"
    )
