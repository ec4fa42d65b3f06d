"""Checkpoints of real DeepSpeed runs, made once for all tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import deepspeed_runs


@pytest.fixture(scope="session")
def deepspeed_saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one subdirectory for each of `deepspeed_runs.CASES`."""
    directory = tmp_path_factory.mktemp("deepspeed")
    cases = deepspeed_runs.CASES.values()
    deepspeed_runs.run([deepspeed_runs.save(case, directory / case.name) for case in cases])
    return directory
