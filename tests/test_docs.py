"""What the documents say is true: commands of the README, the job file's table, links."""

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from rustsim_hpc.cli.common import Session
from rustsim_hpc.cli.main import cli
from rustsim_hpc.job.docs import job_file_markdown, job_keys
from rustsim_hpc.job.launch import run_job
from rustsim_hpc.job.spec import Override, RunOptions, read_job, resolve_job
from rustsim_hpc.ranks.team import SoloTeam

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(heading: str) -> list[str]:
    """Return the lines of the first fenced block under a heading of the README."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert section, f"README has no ## {heading}"
    block = re.search(r"^```[a-z]*\n(.*?)^```", section[1], re.DOTALL | re.MULTILINE)
    assert block, f"## {heading} has no fenced block"
    return block[1].splitlines()


def test_commands_are_one_line_each() -> None:
    [run], [test] = fenced("Run it"), fenced("Test it")
    assert "jobs/us_flights.toml" in run
    for command in (run, test):
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=10)
        for word in shlex.split(command):
            if re.fullmatch(r"(jobs|docs)/\S+|\w+\.sh", word):
                assert (ROOT / word).is_file()


def test_test_command_runs_what_it_says() -> None:
    script = (ROOT / "test.sh").read_text(encoding="utf-8")
    for tool in ("ruff check", "mypy", "lint-imports", "python -m pytest"):
        assert re.search(rf"^check \S+ {tool}", script, re.MULTILINE)


def test_ci_runs_the_readme_command(tmp_path: Path) -> None:
    """.ci/run takes the command from the README: in a copy whose command is another, it runs the other."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    text = "## Run it\n```\necho wrong\n```\n\n## Test it\n\n```\necho right in $RUSTSIM_VENV; exit 7\n```\n"
    (tmp_path / "README.md").write_text(text)
    # Neither apt-get nor id is found, so it installs nothing.
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "awk", "mktemp", "rm", "dirname", "tail", "cat"):
        found = next(Path(folder) / name for folder in os.get_exec_path() if (Path(folder) / name).exists())
        (tools / name).symlink_to(found)
    done = subprocess.run(
        [str(tools / "bash"), str(tmp_path / ".ci" / "run")],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 7, done.stderr
    assert re.search(r"right in /\S+/venv", done.stdout)
    assert "will be skipped" in done.stdout


def test_job_file_table_is_the_declaration() -> None:
    text = (ROOT / "docs" / "job_file.md").read_text(encoding="utf-8")
    assert text == job_file_markdown(), "write it anew: python -m rustsim_hpc.job.docs docs/job_file.md"
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \|", text, re.MULTILINE)
    assert rows == [(table, key) for table, keys in job_keys().items() for key in keys]


def test_example_of_the_job_file_is_a_job(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "job_file.md").read_text(encoding="utf-8")
    example = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert example
    (tmp_path / "flock.py").write_text("")
    spec, _ = resolve_job(tomllib.loads(example[1]), tmp_path / "flock.toml", environ={})
    assert (spec.run.executor, spec.run.workers, spec.replay.mode) == ("threads", 2, "record")


@pytest.mark.parametrize(
    "document", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name
)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_readme_lists_the_commands() -> None:
    listed = re.findall(r"^\| `rustsim-hpc (\w+)", README, re.MULTILINE)
    assert sorted(listed) == sorted(cli.commands)
    helps = {name: command.help or "" for name, command in cli.commands.items()}
    assert all(helps.values())
    assert all("Examples:" in (command.epilog or "") for command in cli.commands.values())


@pytest.mark.parametrize("name", ["", *cli.commands])
def test_the_examples_of_a_help_are_command_lines(name: str) -> None:
    epilog = cli.commands[name].epilog if name else cli.epilog
    examples = re.findall(r"^  (?:mpirun -n \d+ )?rustsim-hpc (.*)$", epilog or "", re.MULTILINE)
    assert len(examples) > 1
    for example in examples:
        command, *words = shlex.split(example.partition(" > ")[0], comments=True)
        assert name in ("", "fork", command)
        cli.commands[command].make_context(command, words, obj=Session())


def test_first_model_of_the_readme(tmp_path: Path) -> None:
    code, job = (re.search(rf"```{language}\n(.*?)```", README, re.DOTALL) for language in ("python", "toml"))
    assert code
    assert job
    assert len(code[1].splitlines()) <= 32
    (tmp_path / "walkers.py").write_text(code[1])
    (tmp_path / "walkers.toml").write_text(job[1])
    small = [Override.parse("run.agents=100"), Override.parse("run.steps=3")]
    spec, _ = read_job(tmp_path / "walkers.toml", small, environ={})
    run_job(spec, RunOptions(out=tmp_path / "run", progress=False), SoloTeam())
    [header, *rows] = (tmp_path / "run" / "near.csv").read_text().splitlines()
    assert header == "step,share"
    assert rows[0].split(",") == ["0", "1.0"]
    assert len(rows) == 4
