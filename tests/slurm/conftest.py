"""A Slurm for the tests of this folder, and a place to submit from."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, why_not
from slurm_site import ROOT, Site, furnish

import rustsim_hpc as rs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="rustsim-slurm-"))
    cluster = Cluster(folder / "cluster")
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def place(cluster: Cluster) -> Path:
    folder = cluster.folder.parent / "site"
    furnish(folder)
    return folder


@pytest.fixture(scope="session")
def environ(place: Path) -> dict[str, str]:
    """What all jobs have in their environment: compiled once, for all."""
    return {
        "JOB": "walkers.toml",
        "VENV": "venv",
        "PYTHONPATH": str(ROOT),
        "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", str(place / "numba")),
    }


@pytest.fixture(scope="session")
def session_site(place: Path, cluster: Cluster, environ: dict[str, str]) -> Site:
    """A site whose jobs go on until the cluster is stopped."""
    return Site(place, cluster, environ)


@pytest.fixture
def site(place: Path, cluster: Cluster, environ: dict[str, str]) -> Iterator[Site]:
    """A site whose jobs end with the test."""
    site = Site(place, cluster, environ)
    yield site
    if site.jobs:
        site.run("scancel", *site.jobs)


@pytest.fixture(scope="session")
def expected(session_site: Site) -> int:
    """The fingerprint of the run that nobody interrupted; it is recorded in runs/expected."""
    code, text = session_site.engine("run", "walkers.toml", "--record", "--out", "runs/expected")
    assert code == 0, text
    fingerprint = rs.open_run(session_site.out("expected")).fingerprint
    assert fingerprint is not None
    return fingerprint
