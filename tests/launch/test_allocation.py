"""What a launch learns from SLURM's variables, and the script that `outlast submit` writes."""

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from outlast.cluster.errors import Misuse
from outlast.launch import cli
from outlast.launch.config import LaunchConfig
from outlast.launch.ending import Outcome
from outlast.launch.outcome_log import OutcomeLog, read_outcomes
from outlast.launch.slurm import job as slurm_job
from outlast.launch.slurm.hostlist import hostnames
from outlast.launch.slurm.job import SlurmJob
from outlast.launch.slurm.supervisor import Supervisor
from outlast.launch.surroundings import Surroundings, shared_key, surroundings

BATCH = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-5]", "SLURMD_NODENAME": "n1",
    "SLURM_LOCALID": "0", "SLURM_PROCID": "0",
}  # fmt: skip
STEP = BATCH | {
    "SLURMD_NODENAME": "n4", "SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "n4",
    "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_RESTART_COUNT": "1",
}  # fmt: skip


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Any:
    def found(variables: dict[str, str]) -> Surroundings:
        for name in [name for name in os.environ if name.startswith(("SLURM", "PMI", "OMPI"))]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        there = surroundings()
        assert there is not None
        return there

    return found


def config(found: Surroundings, *arguments: str) -> LaunchConfig:
    context = cli.launch.make_context("launch", [*arguments, __file__])
    return cli.config_from_options(context.params, found)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3,07],m", ["n1", "n2", "n3", "n07", "m"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[1-2]-x", ["r1n1-x", "r1n2-x", "r2n1-x", "r2n2-x"]),
    ],
)
def test_host_lists(text: str, names: list[str]) -> None:
    assert list(hostnames(text)) == names


@pytest.mark.parametrize(
    "text", ["", "n[1-2", "n]1", "n[a]", "n[1-]", "a b", "a,,b", "n[1-9999999]"]
)
def test_what_is_no_host_list(text: str) -> None:
    with pytest.raises(Misuse):
        hostnames(text)


def test_outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM", "PMI", "OMPI"))]:
        monkeypatch.delenv(name)
    assert surroundings() is None


def test_a_batch_script_supervises(slurm: Any) -> None:
    found = slurm(BATCH)
    assert found.supervises
    # Shells of salloc are steps for newer SLURMs.
    assert slurm(BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA)}).supervises


def test_a_step_is_an_agent(slurm: Any) -> None:
    found = slurm(STEP)
    assert (found.supervises, found.node, found.nproc, found.requeues) == (False, "n4", 2, 1)
    assert (found.job, found.log_dir) == ("slurm-7-1", "outlast_logs/slurm-7")
    hosts = [endpoint.partition(":")[0] for endpoint in found.endpoints]
    assert hosts == ["n1", "n2", "n3", "n4"]
    ports = {endpoint.partition(":")[2] for endpoint in found.endpoints}
    assert ports == {slurm(STEP | {"SLURMD_NODENAME": "n2"}).endpoints[0].partition(":")[2]}
    assert ports != {slurm(BATCH).endpoints[0].partition(":")[2]}  # an earlier start has another


def test_a_step_of_some_nodes_is_a_job_of_those(slurm: Any) -> None:
    more = {"SLURM_STEP_NODELIST": "n[2-4]", "SLURM_STEP_TASKS_PER_NODE": "1(x3)"}
    assert slurm(STEP | more).nodes == ("n2", "n3", "n4")


def test_several_tasks_of_a_node_are_refused(slurm: Any) -> None:
    with pytest.raises(Misuse, match="--ntasks-per-node=1"):
        slurm(STEP | {"SLURM_STEP_TASKS_PER_NODE": "4(x5)"})


def test_flags_come_first(slurm: Any) -> None:
    found = slurm(STEP)
    plain = config(found)
    assert (plain.min_nodes, plain.max_nodes, plain.nproc_per_node) == (3, 5, 2)
    assert (plain.node, plain.requeues, plain.standalone) == ("n4", 1, False)
    assert config(found, "--spares", "1").max_nodes == 4
    given = config(found, "--nnodes", "2", "--nproc-per-node", "8", "--log-dir", "x")
    assert (given.max_nodes, given.nproc_per_node, given.log_dir) == (2, 8, "x")
    with pytest.raises(Misuse, match="--spares 5"):
        config(found, "--spares", "5")


def test_the_key_is_one_for_all_and_private(tmp_path: Path) -> None:
    keys: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: keys.append(shared_key(tmp_path / "d" / "key")))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(keys)) == 1
    assert len(keys[0]) == 64
    assert stat.S_IMODE((tmp_path / "d" / "key").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["key"]


def test_outcomes_are_read_as_they_were_written(tmp_path: Path) -> None:
    log = OutcomeLog(tmp_path, "slurm-7-1", 1, "n4")
    log.source = 3
    log.write("x", Outcome(138, "text", signal=10, step=9), 7, ["n1"])
    for n, text in enumerate(['{"torn', "", "[]", '{"code": 1, "of": "another version"}']):
        (tmp_path / "outcomes" / f"{n}.json").write_text(text)
    (record,) = read_outcomes(tmp_path)
    assert (record.node, record.restart, record.code, record.signal) == ("n4", 1, 138, 10)
    assert (record.step, record.source, record.stopped, record.lost) == (9, 3, True, ())


def test_each_agent_writes_a_file_of_its_own(tmp_path: Path) -> None:
    """Several machines that append to one file of NFS overwrite each other's lines."""
    for n in range(3):
        OutcomeLog(tmp_path, "slurm-7-0", 0, "n1").write(f"agent{n}", Outcome(75), n, [])
    found = read_outcomes(tmp_path)
    assert [(record.agent, record.step) for record in found] == [
        (f"agent{n}", n) for n in range(3)
    ]
    assert len(list((tmp_path / "outcomes").iterdir())) == 3


def test_nodes_that_join_know_which_start_it_is(slurm: Any) -> None:
    slurm(BATCH)
    arguments = ["--rdzv-endpoint", "n1:2", "--nnodes", "2", "--rdzv-id"]
    for name, restart in (("slurm-17-2", 2), ("slurm-17-0", 0), ("mine-3", 0), ("none", 0)):
        context = cli.launch.make_context("launch", [*arguments, name, __file__])
        assert cli.config_from_options(context.params).requeues == restart


def supervisor(slurm: Any, directory: Path, monkeypatch: Any, *flags: str) -> Supervisor:
    found = slurm(BATCH)
    arguments = ["--log-dir", str(directory), *flags, __file__]
    monkeypatch.setattr(sys, "argv", ["outlast", "launch", *arguments])
    context = cli.launch.make_context("launch", arguments)
    return Supervisor(cli.config_from_options(context.params, found), found, context.params)


def test_nodes_that_join_get_the_key_that_is_used(
    slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(*flags: str) -> str:
        given = supervisor(slurm, tmp_path, monkeypatch, *flags).job(1).flags
        return dict(zip(given[::2], given[1::2], strict=True)).get("--job-key-file", "")

    monkeypatch.delenv("OUTLAST_JOB_KEY", raising=False)
    assert key() == str(tmp_path / "key")
    monkeypatch.setenv("OUTLAST_JOB_KEY", "x" * 64)
    assert key() == "", "theirs comes by the environment, too"
    assert key("--job-key-file", "mine") == str(Path("mine").absolute())


def test_a_full_disk_does_not_end_the_supervisor(
    slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ours = supervisor(slurm, tmp_path, monkeypatch)
    for step in ours.steps:
        (tmp_path / f"console-{step.node}.log").write_text("one\ntwo\npart")
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        for step in ours.steps * 2:
            ours.attempt(step.copy)
    assert capfd.readouterr().err.count("No space left") == 1
    for step in ours.steps * 2:
        ours.attempt(step.copy)
    assert capfd.readouterr().out == "one\ntwo\n" * len(ours.steps), "each line once, later"


def test_outcomes_that_cannot_be_read_for_a_while_do_not_end_the_supervisor(
    slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In place of srun, a program that has the log directory fail as long as it runs."""
    ours = supervisor(slurm, tmp_path / "logs", monkeypatch, "--no-requeue")
    (tmp_path / "logs").mkdir()
    folder = tmp_path / "logs" / "outcomes"
    srun = tmp_path / "srun"
    srun.write_text(f"#!/bin/sh\ntouch {folder}\nsleep 2\nrm -f {folder}\n")
    srun.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert ours.run() == 75, "it concludes, as nobody has left a word"
    said = capfd.readouterr().err
    assert said.count("goes on in spite of") == 1
    assert "no agent is left that could say why" in said


def submitted(*arguments: str) -> str:
    result = CliRunner().invoke(cli.commands, ["submit", "--print", *arguments])
    assert result.exit_code == 0, result.exception
    return result.output


def test_the_script(tmp_path: Path) -> None:
    text = submitted(
        "--nodes", "4", "--spares", "1", "--time", "2:00:00", "--gpus-per-node", "8",
        "--heartbeat", "0.2", "--rebalance", "--sbatch", "--exclude=n9 --comment='a b'",
        "--", "train.py", "--text", "it's",
    )  # fmt: skip
    directives = [line.split(maxsplit=1)[1] for line in text.splitlines() if "#SBATCH " in line]
    for wanted in (
        "--nodes=5", "--time=2:00:00", "--gpus-per-node=8", "--no-kill", "--requeue",
        "--open-mode=append", "--signal=USR1@90", "--exclude=n9", "'--comment=a b'",
    ):  # fmt: skip
        assert wanted in directives
    command = text.splitlines()[-1]
    assert "launch --spares 1 --heartbeat 0.2 --rebalance --shutdown-timeout 60 train.py" in command
    (tmp_path / "script").write_text(text)
    subprocess.run(["bash", "-n", tmp_path / "script"], check=True)
    words = subprocess.run(
        ["bash", "-c", command.replace("exec ", "printf '%s\\n' ")], capture_output=True, text=True
    ).stdout.splitlines()
    assert words[-3:] == ["train.py", "--text", "it's"]


def begun(directory: Path) -> SlurmJob:
    job = SlurmJob(
        job="slurm-7-0", number="7", restart=0, nodes=("n1",), supervisor="n1:1", tries=3,
        requeue=True, drain=False, here="/data/run", flags=("--rdzv-endpoint", "n1:2"),
        arguments=("--spares", "1", "train.py"),
    )  # fmt: skip
    job.begin(directory)
    return job


def test_a_job_is_concluded_although_the_first_to_do_so_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(slurm_job, "PROBE_S", 0.01)
    job = begun(tmp_path)
    OutcomeLog(tmp_path, job.job, 0, "n1").write("x", Outcome(0), 7, [])
    if (child := os.fork()) == 0:
        slurm_job.preempted = lambda number: os._exit(9)  # type: ignore[assignment]
        job.conclude(tmp_path)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    try:
        assert job.conclude(tmp_path) == 0
        job.end(tmp_path)
        assert job.conclude(tmp_path) is None, "it has been"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outcomes_that_cannot_be_read_are_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "outcomes").write_text("no folder")
    with pytest.raises(OSError, match="Not a directory"):
        read_outcomes(tmp_path)


def test_the_script_of_newcomers(tmp_path: Path) -> None:
    begun(tmp_path)
    text = submitted("--join", "7", "--log-dir", str(tmp_path), "--time", "1:00")
    assert "#SBATCH --chdir=/data/run" in text
    assert "#SBATCH --signal=TERM@90" in text  # SIGUSR1 would stop the job as a whole
    assert text.endswith("launch --rdzv-endpoint n1:2 --spares 1 train.py\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--nodes", "2"], "outlast submit --nodes 4 train.py"),
        (["train.py"], "outlast submit --nodes 4 train.py"),
        (["--join", "7", "--log-dir", "/nowhere"], "/nowhere"),
    ],
)
def test_one_line_says_what_to_do(arguments: list[str], complaint: str) -> None:
    command = [sys.executable, "-c", "from outlast.launch.cli import main; main()", "submit"]
    done = subprocess.run([*command, "--print", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
