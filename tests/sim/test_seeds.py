"""Seeded histories of whole jobs: all invariants hold, and a seed is a history."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sim.simulation import simulate
from sim.world import Violation

SEEDS, CHUNK = 200, 20
LONG = 100_000
ROOT = Path(__file__).parent.parent.parent


def live(seeds: range) -> None:
    """Live through all, and name every one that is red."""
    red = []
    for seed in seeds:
        try:
            simulate(seed)
        except Violation as violation:
            red.append(f"{violation}\n    replay: python -m tests.sim --seed {seed}")
    assert not red, "\n".join(red)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_seeds(first: int) -> None:
    live(range(first, first + CHUNK))


@pytest.mark.long
@pytest.mark.parametrize("first", range(SEEDS, LONG, 1000))
def test_many_seeds(first: int) -> None:
    live(range(first, first + 1000))


@pytest.mark.parametrize("seed", [3, 11])
def test_a_seed_is_a_history(seed: int) -> None:
    """S18: also in another process, whose hashes of strings are others."""
    once, again = simulate(seed), simulate(seed)
    assert once.lines[5:] == again.lines[5:]
    assert once.trace == again.trace
    command = [sys.executable, "-m", "tests.sim", "--seed", str(seed)]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    told = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert f"trace {once.trace:x}" in told.stdout
