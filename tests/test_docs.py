"""What the documents say is true: commands of the README, the job file's table, links."""

import os
import re
import runpy
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from rustsim_hpc.bound_model import BoundModel
from rustsim_hpc.job import resolve_job
from rustsim_hpc.job_docs import job_file_markdown, job_keys

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
    assert text == job_file_markdown(), "write it anew: python -m rustsim_hpc.job_docs docs/job_file.md"
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


def test_first_model_of_the_readme(tmp_path: Path) -> None:
    code, job = (re.search(rf"```{language}\n(.*?)```", README, re.DOTALL) for language in ("python", "toml"))
    assert code
    assert job
    assert len(code[1].splitlines()) <= 32
    path = tmp_path / "walkers.py"
    path.write_text(code[1])
    spec, _ = resolve_job(tomllib.loads(job[1]), tmp_path / "walkers.toml", environ={})
    assert spec.model.module == str(path)
    model = runpy.run_path(str(path))["model"]()
    bound = BoundModel(model, spec.params, seed=spec.run.seed, agents=10)
    assert bound.params["reach"] == 0.5
    assert not bound.new_store(0, 10).column(0).any()
