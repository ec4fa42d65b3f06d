"""Racks: from a file, from SLURM, or unknown."""

from pathlib import Path

import pytest

from outlast.cluster.environment import environment
from outlast.cluster.errors import Misuse
from outlast.launch.topology import rack_of, read_racks


def written(folder: Path, text: str) -> str:
    path = folder / "topology.toml"
    path.write_text(text)
    return str(path)


def test_racks_of_a_file(tmp_path: Path) -> None:
    racks = read_racks(written(tmp_path, '[racks]\nr1 = ["a", "b"]\n"r 2" = ["c"]\n'))
    assert racks == {"a": "r1", "b": "r1", "c": "r 2"}
    assert rack_of("c", racks, alone=True) == "r 2"
    with pytest.raises(Misuse, match="node d is in no rack"):
        rack_of("d", racks, alone=False)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("racks = 3", "expected a table"),
        ("", "expected a table"),
        ("[racks", "topology.toml"),
        ('[racks]\nr1 = "a"', "rack r1: expected a list"),
        ('[racks]\nr1 = ["a"]\nr2 = ["a"]', "a is in two racks, r1 and r2"),
        ('[racks]\n"" = ["a"]', "1 to 256 characters"),
    ],
)
def test_a_file_that_makes_no_sense(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(Misuse, match=complaint):
        read_racks(written(tmp_path, text))


def test_no_file() -> None:
    with pytest.raises(Misuse, match="--topology nowhere"):
        read_racks("nowhere")


@pytest.mark.parametrize(
    ("address", "kinds", "rack"),
    [
        ("root.leaf2.node7", "switch.switch.node", "root.leaf2"),
        ("leaf2.node7.example.org", "switch.node", "leaf2"),
        ("node7", "node", ""),
    ],
)
def test_racks_of_slurm(
    monkeypatch: pytest.MonkeyPatch, address: str, kinds: str, rack: str
) -> None:
    variables = {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": kinds}
    assert environment(variables).rack == rack
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert rack_of("node7", {}, alone=False) == rack
    assert rack_of("node7", {}, alone=True) == ""
    assert rack_of("node7", {"node7": "r1"}, alone=False) == "r1"


def test_nothing_is_known() -> None:
    assert environment({}).rack == ""
