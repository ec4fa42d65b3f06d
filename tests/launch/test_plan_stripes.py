"""`outlast plan-stripes` says what the layout functions say, and refuses nonsense in one line."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from outlast.cluster.errors import Misuse
from outlast.launch.cli import commands
from outlast.launch.plan_stripes import byte_count

RACKS = "[racks]\n" + "\n".join(
    f"r{rack} = {json.dumps([f'n{4 * rack + node}' for node in range(4)])}" for rack in range(4)
)


def planned(*arguments: str) -> Result:
    return CliRunner().invoke(commands, ["plan-stripes", *arguments], catch_exceptions=True)


def test_plan_of_racks(tmp_path: Path) -> None:
    topology, written = tmp_path / "racks.toml", tmp_path / "plan.json"
    topology.write_text(RACKS)
    result = planned(
        f"--topology={topology}", "--nproc-per-node=8", "--parity=2", "--group=8",
        "--bytes-per-node=32GB", "-p", "1e-4", "-p", "1e-3", f"--json={written}",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "one of 4 whole racks: any one is survived" in result.output
    assert "n0, n2, n4, n6, n8, n10, n12, n14" in result.output
    plan = json.loads(written.read_text())
    assert [(group["k"], group["m"], len(group["domains"])) for group in plan["groups"]] == [
        (6, 2, 8)
    ] * 2
    assert plan["survival"]["patterns"][:6] == [1, 16, 120, 448, 784, 0]
    assert plan["parity_bytes"] == pytest.approx(32e9 * 2 / 6, rel=1e-6)
    assert plan["sent_bytes"] == pytest.approx(32e9 * 7 / 6, rel=1e-6)
    chances = plan["probabilities"]["0.001"]
    assert chances["these stripes"] < chances["two copies (100 % more)"] < chances["nothing"]


def test_racks_that_cannot_be_survived_are_named(tmp_path: Path) -> None:
    topology = tmp_path / "racks.toml"
    topology.write_text('[racks]\nbig = ["a", "b", "c"]\nsmall = ["d"]\n')
    result = planned(f"--topology={topology}", "--parity=1")
    assert "one of 2 whole racks: fatal for big" in result.output


def test_nothing_is_protected_without_parity() -> None:
    result = planned("--nodes=3", "--parity=0")
    assert result.exit_code == 0, result.output
    assert "nothing is protected" in result.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "how many nodes"),
        (["--nodes=4", "--parity=16"], "--parity < --group"),
        (["--nodes=4", "--nproc-per-node=0"], "at least one worker"),
        (["--nodes=4", "--bytes-per-node=much"], "not a size"),
        (["--nodes=4", "--topology=/nowhere.toml"], "--topology"),
        (["--nodes=4", "--json=/nowhere/plan.json"], "--json"),
    ],
)
def test_misuse(arguments: list[str], reason: str) -> None:
    error = planned(*arguments).exception
    assert isinstance(error, Misuse)
    assert reason in str(error)


def test_number_of_nodes_must_fit_the_topology(tmp_path: Path) -> None:
    topology = tmp_path / "racks.toml"
    topology.write_text(RACKS)
    assert "names 16" in str(planned("--nodes=4", f"--topology={topology}").exception)


@pytest.mark.parametrize(
    ("text", "size"),
    [("32GB", 32 * 10**9), ("32 GiB", 32 << 30), ("1.5k", 1500), ("7", 7), ("2tb", 2 * 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert byte_count(text) == size
