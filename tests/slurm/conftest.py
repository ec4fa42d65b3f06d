"""One cluster for all tests of this folder; where none can be had they say so.

With CI set they must run: there "not run" is a failure.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import machines
from slurm_cluster import Cluster

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before those are left out that carry no mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def made() -> Iterator[Cluster]:
    if reason := machines.missing():
        if os.environ.get("CI"):
            pytest.fail(f"not run, which is a failure here because CI is set: {reason}")
        pytest.skip(f"not run: {reason}")
    with Cluster(nodes=6) as cluster:
        yield cluster


@pytest.fixture
def cluster(made: Cluster) -> Iterator[Cluster]:
    """Six nodes, all of them idle."""
    yield made
    made.clear()
