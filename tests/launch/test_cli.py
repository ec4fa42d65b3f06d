"""The command line: torchrun's flags, its variables, and errors of one line."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from job import COMMAND

from outlast.cluster.errors import Misuse
from outlast.launch import cli
from outlast.launch.config import LaunchConfig, captured, host_and_port, node_range


def parse(*arguments: str) -> LaunchConfig:
    context = cli.launch.make_context("launch", [*arguments, __file__, "--its", "own"])
    return cli.config_from_options(context.params)


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--nnodes", "2:4", "--standalone"], "max_nodes", 4),
        (["--nproc-per-node", "3"], "nproc_per_node", 3),
        (["--nproc_per_node=3"], "nproc_per_node", 3),
        (["--max_restarts", "2"], "max_restarts", 2),
        (["--rdzv_id", "j", "--rdzv-endpoint", "a:1,b:2"], "endpoints", ("a:1", "b:2")),
        (["--nnodes", "2", "--master-addr", "a", "--master_port", "7"], "endpoints", ("a:7",)),
        (["--local_ranks_filter", "0,2"], "local_ranks_filter", (0, 2)),
        (["-m"], "module", True),
        (["-r", "3", "-t", "0:1"], "tee", "0:1"),
        (["--heartbeat", "0.2"], "heartbeat_s", 0.2),
        (["--spares", "2"], "spares", 2),
        (["--rebalance"], "rebalance", True),
        ([], "rebalance", False),
        (["--poison", "report"], "poison", "report"),
        ([], "poison", "evict"),
        ([], "racks", {}),
        (["--rdzv-backend", "c10d", "--rdzv-conf", "timeout=9", "--monitor_interval", "1"],
         "script_args", ("--its", "own")),
    ],
)  # fmt: skip
def test_flags(arguments: list[str], field: str, value: object) -> None:
    assert getattr(parse(*arguments), field) == value


def test_pet_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NPROC_PER_NODE", "5")
    monkeypatch.setenv("PET_MAX_RESTARTS", "2")
    monkeypatch.setenv("PET_STANDALONE", "1")
    config = parse("--max-restarts", "3")
    assert (config.nproc_per_node, config.max_restarts, config.standalone) == (5, 3, True)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere.py"], "'nowhere.py' does not exist"),
        (["--nproc-per-nod", "2", "x"], "--nproc-per-node"),
        (["--nnodes", "4:2", "--standalone", __file__], "--nnodes"),
        (["--nnodes", "x", __file__], "--nnodes"),
        (["--nproc-per-node", "many", __file__], "--nproc-per-node"),
        (["--max-restarts", "x", __file__], "--max-restarts"),
        (["--tee", "7", __file__], "--tee"),
        (["--heartbeat", "0", __file__], "--heartbeat"),
        (["--spares", "-1", __file__], "--spares"),
        (["--poison", "no", __file__], "--poison"),
        (["--topology", "/nowhere", __file__], "--topology /nowhere"),
        (["--checkpoint-every", "5 minutes", __file__], "--checkpoint-every: '5 minutes'"),
        (["--checkpoint-every", "0", __file__], "--checkpoint-every"),
        (["--checkpoint-keep", "0", __file__], "--checkpoint-keep"),
        (["--nnodes", "2", __file__], "--rdzv-endpoint"),
        (["--nnodes", "2", "--rdzv-endpoint", "a:1", __file__], "openssl rand -hex 32"),
        (["--nnodes", "2", "--rdzv-endpoint", "a:x", __file__], "'a:x'"),
        (["--job-key-file", "/nowhere", __file__], "--job-key-file"),
        (["--rdzv-conf", "x", __file__], "--rdzv-conf"),
        ([], "Missing argument 'SCRIPT'"),
    ],
)
def test_one_line_says_what_to_do(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["outlast", "launch", *arguments])
    monkeypatch.delenv("OUTLAST_JOB_KEY", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert complaint in error
    assert error.count("\n") == 1


def test_flag_list_is_frozen() -> None:
    """A flag more or less is a decision: change it here too."""
    help_text = CliRunner().invoke(cli.launch, ["--help"]).output
    names = [name for name, *_ in cli.OPTIONS]
    assert len(names) == 40
    assert all(f"--{name}" in help_text for name in names)


def test_help_is_quick_and_without_torch() -> None:
    began = time.monotonic()
    subprocess.run([*COMMAND[:-1], "--help"], check=True, capture_output=True)
    print(f"outlast --help: {time.monotonic() - began:.3f} s")
    program = "import sys, outlast.launch.cli; assert not {'torch', 'asyncio'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_config_survives_json() -> None:
    config = parse("--nnodes", "2", "--standalone", "--local-ranks-filter", "1", "--spares", "1")
    config = replace(config, racks={"node0": "r1"})
    assert LaunchConfig.from_json(config.as_json()) == config


def test_small_readers() -> None:
    assert captured("0:1,1:2", 1) == 2
    assert captured("3", 5) == 3
    assert captured("0:1", 1) == 0
    assert node_range("3") == (3, 3)
    assert host_and_port("h") == ("h", 29400)
    assert host_and_port("[::1]:80") == ("::1", 80)
    with pytest.raises(Misuse):
        host_and_port(":1")


def test_key_file(tmp_path: Path) -> None:
    config = parse("--nnodes", "2", "--rdzv-endpoint", "a:1")
    path = tmp_path / "key"
    path.write_text("k" * 32 + "\n")
    assert cli.job_key(str(path), config) == b"k" * 32
    path.write_text("short")
    with pytest.raises(Misuse, match="shorter"):
        cli.job_key(str(path), config)
