"""Jobs that end with their test."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from job import Job


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start a job; keyword arguments are environment variables."""
    jobs: list[Job] = []

    def run(*arguments: str, name: str = "logs", **environment: str) -> Job:
        jobs.append(Job(tmp_path / name, *arguments, **environment))
        return jobs[-1]

    yield run
    for job in jobs:
        job.stop()


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """A script with this text."""

    def write(text: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(text)
        return str(path)

    return write
