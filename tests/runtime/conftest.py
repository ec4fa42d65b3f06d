"""Jobs that really train, stopped at the end of their test."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from training_job import TrainingJob

Start = Callable[..., TrainingJob]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a standalone job of so many nodes and workers on each."""
    jobs: list[TrainingJob] = []

    def run(nodes: int, per_node: int, *script: str, launch: tuple[str, ...] = ()) -> TrainingJob:
        shape = ["--standalone", "--nnodes", str(nodes), "--nproc-per-node", str(per_node)]
        directory = tmp_path / f"job{len(jobs)}"
        jobs.append(TrainingJob(directory, [*shape, *launch], list(script)))
        return jobs[-1]

    yield run
    for job in jobs:
        job.stop()
