"""A drill of a job that really trains, by the command that a user types."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

SCRIPT = str(Path(__file__).parent.parent / "runtime" / "training_script.py")
DRILL = [sys.executable, "-c", "from outlast.launch.cli import main; main()", "drill"]
LIMIT_S = 400.0  # for machines that do much else


def drill(out: Path, *flags: str, steps: int = 40) -> tuple[int, dict[str, Any], str]:
    command = [*DRILL, "--nodes", "3", "--log-dir", str(out), *flags, SCRIPT, f"--steps={steps}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    file = out / "verdict.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    return done.returncode, result, done.stdout + done.stderr


def test_faults_strike_and_the_bits_are_those_of_the_twin(tmp_path: Path) -> None:
    flags = ["--pace=0.2", "--fault=kill-worker@step=3,phase=commit"]
    flags += ["--fault=kill-worker@step=6+kill-node@phase=move", "--fault=partition@step=9"]
    code, result, output = drill(tmp_path / "out", *flags)
    assert code == 3, output
    assert not any(result["violations"].values()), output
    assert "the bits of the twin" in result["violations"]
    assert [e["took_effect"] for e in result["events"]] == [True, True, True, False]
    assert result["events"][-1]["why"].startswith("not run: a partition needs --namespaces")
    assert "passed" not in output.splitlines()[-1]
    assert (tmp_path / "out" / "report.html").exists()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info)]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [(["--fault=explode"], "none of"), ([], "nothing to do"), (["--mtbf=5"], "--duration"),
     (["--rounds=1", "--kinds=dance"], "--kinds"), (["--rounds=1", "--nodes=2"], "at least 3")],
)  # fmt: skip
def test_misuse_is_one_line_and_code_2(tmp_path: Path, flags: list[str], complaint: str) -> None:
    code, _, output = drill(tmp_path, *flags)
    assert code == 2
    assert complaint in output
    assert output.count("\n") == 1


def test_a_training_that_is_too_short_is_no_success(tmp_path: Path) -> None:
    code, result, output = drill(tmp_path / "out", "--fault=kill-worker@step=500", steps=5)
    assert code == 1
    assert "more steps" in output
    assert result["violations"]["the drill came to its end"]
