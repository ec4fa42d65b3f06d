"""`outlast convert`, `verify` and `inspect` as a person uses them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner, Result

from outlast.launch import cli

sys.path.insert(0, str(Path(__file__).parent.parent / "checkpoint"))
from held import Held, held, into

LEFT_OUT = "the random state of rank 0"


def run(*words: object) -> Result:
    return CliRunner().invoke(cli.commands, [str(word) for word in words])


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A native step, converted from somewhere by two ranks in stage 2."""
    source = {"format": "deepspeed", "ranks": 2, "stage": 2}
    facts = held().contents.facts | {"source": source, "client_state": {"a": {"b": 1}}}
    return into(held("bfloat16", run={"seed": 3}, facts=facts), "native", tmp_path).path


def test_inspect(step: Path) -> None:
    for path in (step, step.parent):  # the newest step of a directory
        shown = run("inspect", path)
        assert shown.exit_code == 0, shown.output
        for text in ["native, step 7, 681 parameters in bfloat16, 8,297 bytes",
                     r"exp_avg_sq +6 +681 +2,724 +float32", r"frozen +1 +40 +80 +bfloat16",
                     r'1 +3 +"lr": 0.0003.*"weight_decay": 0.0', "head.weight is wte.weight",
                     r"seed +3", r'lr_scheduler +"last_epoch": 7',
                     r'client_state +"a": {"b": 1}']:  # fmt: skip
            assert re.search(text, shown.output), text


def test_the_same_digests_in_every_format(step: Path, tmp_path: Path) -> None:
    assert run("convert", step, tmp_path / "dcp", "--to", "dcp").exit_code == 0
    listed = [run("inspect", "--tensors", path).output for path in (step, tmp_path / "dcp")]
    assert sorted(listed[0].splitlines()) == sorted(listed[1].splitlines())
    assert re.search(r"^[0-9a-f]{32}  float32  \[31,8\]  param/wte.weight$", listed[0], re.M)


def test_verify(step: Path) -> None:
    assert run("verify", step).output == f"{step}: step 7, 22 arrays, all right\n"
    file = step / "exp_avg" / "wte.weight" / "c.0.0"
    data = bytearray(file.read_bytes())
    data[17] ^= 1
    file.write_bytes(data)
    told = run("verify", step)
    assert told.exit_code == 1
    assert re.fullmatch(rf"exp_avg/wte.weight: {file} at byte 0: .*\n", told.stdout)


def test_verify_finds_what_is_no_number(tmp_path: Path) -> None:
    source = held()
    for key, value in (("param/scale", np.nan), ("exp_avg/wte.weight", np.inf),
                       ("buffer/cos", -np.inf)):  # fmt: skip
        source.values[key].reshape(-1)[0] = value
    told = run("verify", into(source, "native", tmp_path).path)
    assert told.exit_code == 1
    assert sorted(told.stdout.splitlines()) == [
        "exp_avg/wte.weight: 1 of 248 elements are not finite",
        "param/scale: 1 of 1 elements are not finite",
    ]


def test_verify_finds_a_lost_moment(tmp_path: Path) -> None:
    contents = held().contents
    arrays = tuple(a for a in contents.arrays if a.key != "exp_avg/scale")
    source = Held(replace(contents, arrays=arrays), held().values)
    told = run("verify", into(source, "native", tmp_path).path)
    assert (told.exit_code, told.stdout) == (1, "1 parameters have no exp_avg: scale, …\n")


def test_check_shows_what_would_become_and_writes_nothing(step: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for to, texts in {
        "safetensors": [r"param +6 +681 +float32 +bfloat16", r"exp_avg +6 +681 +float32 +left",
                        "tied: head.weight is wte.weight", "holds weights only"],
        "dcp": [r"param +6 +681 +float32 +float32", "group 1: 3 tensors", "only native keeps"],
        "native": [r"group 0: 3 tensors.*\n.*\n.*\nNothing would be lost. Nothing was written."],
    }.items():  # fmt: skip
        shown = run("convert", "--check", "--to", to, step, out)
        assert shown.exit_code == 0, shown.output
        assert all(re.search(text, shown.output) for text in texts), shown.output
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"origin", "native"}


def test_check_tells_of_what_would_be_lost(tmp_path: Path) -> None:
    source = into(held(left_out=(LEFT_OUT,)), "native", tmp_path)
    shown = run("convert", "--check", "--to", "native", source.path, tmp_path / "out")
    assert shown.exit_code == 1
    assert f"WRONG: left out: {LEFT_OUT}\nNothing was written." in shown.output
    done = run("convert", "--to", "native", source.path, tmp_path / "out")
    assert done.exit_code == 0
    assert f"not carried: {LEFT_OUT}" in done.stderr


def test_check_tells_of_what_cannot_be_written(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    shown = run("convert", "--check", "--to", "deepspeed", tmp_path / "a.safetensors", tmp_path)
    assert (shown.exit_code, "WRONG: " in shown.output) == (1, True), shown.output


def test_check_looks_where_it_would_be_written(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("convert", "--check", "--to", "native", step)
    shown = run(*words, step.parent)
    assert (shown.exit_code, f"WRONG: {step} exists" in shown.output) == (1, True), shown.output
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    shown = run(*words, tmp_path / "a" / "b")
    assert (shown.exit_code, "100 bytes free" in shown.output) == (1, True), shown.output


def test_ranks_that_nobody_has(tmp_path: Path) -> None:
    source = into(held(facts={"source": {"ranks": 10**9}}), "native", tmp_path)
    assert run("convert", source.path, tmp_path / "out", "--to", "dcp").exit_code == 0
    assert len(list((tmp_path / "out").glob("*.distcp"))) == 1


def test_ranks_and_stage_are_those_of_the_source(step: Path, tmp_path: Path) -> None:
    for flags, files in {(): 2, ("--ranks", 3): 3, ("--stage", 3): 2}.items():
        out = tmp_path / "-".join(map(str, ("out", *flags)))
        assert run("convert", "--to", "deepspeed", *flags, step, out).exit_code == 0
        place = out / (out / "latest").read_text()
        assert len(list(place.glob("*optim_states.pt"))) == files
        stage = "3" if "--stage" in flags else "2"
        assert re.search(rf'"stage": {stage}', run("inspect", out).output)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["convert", "none", "out", "--to", "dcp"], "does not exist"),
        (["convert", ".", "out", "--to", "zip"], "--to"),
        (["convert", "{step}", "out", "--to", "native", "--dtype", "float32"], "--dtype"),
        (["convert", "{step}", "out", "--to", "safetensors", "--stage", "3"], "--stage"),
        (["convert", "{step}", "out", "--to", "universal", "--ranks", "3"], "--ranks"),
        (["convert", "{step}", "s3://bucket/a", "--to", "dcp"], "s3://bucket/a is a URL"),
        (["convert", "{step}", "{step}/out", "--to", "dcp"], "lies in the source"),
        (["inspect", "{step}", "--from", "dcp"], "is not a checkpoint of dcp"),
        (["verify", "."], "is not one of native"),
    ],
)
def test_misuse_is_one_line(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], why: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["outlast", *(word.format(step=step) for word in words)])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert (raised.value.code, len(lines)) == (2, 1), lines
    assert why in lines[0]


def test_damage_is_one_line(step: Path, tmp_path: Path) -> None:
    (step / "manifest.json").write_text("{}")
    for command, *words in (["inspect"], ["verify"], ["convert", tmp_path, "--to", "dcp"]):
        told = run(command, step, *words)
        assert told.exit_code == 1
        assert re.fullmatch(r"outlast: .*manifest.json at byte \d+: .*\n", told.stderr)


def test_names_are_no_orders_to_a_terminal(tmp_path: Path) -> None:
    name = "a\x1b]0;title\x07[red]b[/red]"
    safetensors.numpy.save_file({name: np.full(3, np.nan, np.float32)}, tmp_path / "a.safetensors")
    for words in (["inspect", "--tensors"], ["verify"]):
        told = run(*words, tmp_path)
        assert "\x1b" not in told.output
        assert r"param/a\x1b]0;title\x07[red]b[/red]" in told.output


def test_a_checkpoint_in_a_bucket(step: Path, tmp_path: Path) -> None:
    """What can be done with a URL; buckets themselves: tests/checkpoint/test_steps.py."""
    bucket = tmp_path.name  # this store is the whole process's
    fsspec.filesystem("memory").put(str(step.parent), f"/{bucket}/run", recursive=True)
    for url in (f"memory://{bucket}/run", f"memory://{bucket}/run/{step.name}"):
        assert run("inspect", "--tensors", url).output == run("inspect", "--tensors", step).output
    assert run("verify", f"memory://{bucket}/run").exit_code == 0
    assert run("convert", f"memory://{bucket}/run", tmp_path / "u", "--to", "dcp").exit_code == 0
    assert run("inspect", f"file://{step}").output == run("inspect", step).output
    told = run("inspect", f"memory://{bucket}")
    assert (told.exit_code, "no native checkpoint" in str(told.exception)) == (1, True)


def test_links_of_a_download_cache_are_followed_when_asked(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    blob = tmp_path / "blobs" / "3f2a"
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, blob)
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    told = run("verify", tmp_path / "snapshot")
    assert (told.exit_code, "--follow-links" in told.stderr) == (1, True)
    assert run("verify", "--follow-links", tmp_path / "snapshot").exit_code == 0


SLOW = """
import sys, time
from outlast.checkpoint.formats.pieces import PieceSource
read = PieceSource.read
PieceSource.read = lambda *arguments: (time.sleep(0.5), read(*arguments))[1]
from outlast.launch.cli import main
main()
"""


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": np.full((4, 4), i, np.float32) for i in range(30)}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    words = ["convert", "--to", "native", tmp_path / "a.safetensors", tmp_path / "out"]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, words)], text=True,
                               stderr=subprocess.PIPE, env=os.environ)  # fmt: skip
    journal = tmp_path / "out" / ".step-000000000000.part" / "journal"
    while not journal.exists() or journal.read_text().count("\n") < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == (
        f"outlast: interrupted; what is done is kept in {journal.parent}: "
        "the same command goes on\n"
    )
    assert run(*words).exit_code == 0
    assert run("verify", tmp_path / "out").exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["step-000000000000"]
