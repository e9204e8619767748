#!/usr/bin/env bash
# Set up a virtual environment and run every check of the project: ruff, mypy, import-linter, pytest.
#
#   bash test.sh                        everything
#   bash test.sh -k job                 arguments go to pytest
#   PYTHON=python3.12 bash test.sh      with a Python of your choice (3.11 or newer)
#   RUSTSIM_VENV=/tmp/v bash test.sh    with the environment in another place than .venv
#
# Needs no root and no system package; tests that do are skipped and counted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

venv=${RUSTSIM_VENV:-$PWD/.venv}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    echo "test.sh: no Python 3.11 or newer found; name one: PYTHON=/path/to/python3.12 bash test.sh" >&2
    return 2
}

# The stamp holds the requirements that were installed: a second run starts at once.
stamp=$venv/rustsim-hpc.installed
if ! cmp -s pyproject.toml "$stamp"; then
    python=$(find_python)
    echo "Setting up $venv with $("$python" --version) ..."
    "$python" -m venv "$venv"
    # Dependency groups need pip 25.1; a fresh environment may bring an older one.
    "$venv/bin/python" -m pip install --quiet --upgrade 'pip>=25.1'
    "$venv/bin/python" -m pip install --quiet --editable '.[mpi,plot,remote]' --group dev
    cp pyproject.toml "$stamp"
fi

# mpirun and the other installed commands are found by name.
export PATH=$venv/bin:$PATH

failed=()
check() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

check ruff ruff check .
check mypy mypy
check import-linter lint-imports
check pytest python -m pytest "$@"

if ((${#failed[@]})); then
    echo "test.sh: failed: ${failed[*]}" >&2
    exit 1
fi
