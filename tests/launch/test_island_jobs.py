"""Several islands on one machine, and one by one: what their workers say, and who is lost."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from job import HERE, KEY, Job, all_gone, free_ports
from test_cli import parse

from outlast.cluster.errors import Misuse
from outlast.launch import cli, islands
from outlast.launch.config import LaunchConfig
from outlast.launch.console import Console
from outlast.launch.ending import goes_on

WORKER = str(HERE / "island_worker.py")
Start = Callable[..., Job]
Script = Callable[[str], str]
Capture = pytest.CaptureFixture[str]


class Island(Job):
    """The events of one island of a launch."""

    def __init__(self, job: Job, number: int) -> None:
        self.process, self._output = job.process, job._output
        self.directory = job.directory / f"island{number}"

    def hears(self, holder: int) -> dict[str, Any]:
        """Wait for a message of this worker of another island."""

        def found() -> dict[str, Any] | None:
            heard = self.events("fake_heard")
            return next((e for e in heard if e["message"]["holder"] == holder), None)

        event: dict[str, Any] = self.wait_for(found)
        return event

    def reaches(self, islands: list[int]) -> None:
        """Wait until these are in reach."""
        self.wait_for(lambda: [e["islands"] for e in self.events("fake_reach")][-1:] == [islands])


@pytest.fixture
def end(tmp_path: Path) -> Path:
    """Workers end once this file exists."""
    return tmp_path / "end"


def started(island: Island, count: int = 1) -> dict[str, Any]:
    return island.wait_for_events("fake_started", count)[-1]


def test_an_island_that_is_killed_comes_back_and_hears_everything(start: Start, end: Path) -> None:
    job = start("--islands", "2", "--standalone", "--rdzv-id", "j", "--heartbeat", "0.2",
                WORKER, str(end))  # fmt: skip
    zero, one = Island(job, 0), Island(job, 1)
    first, second = started(zero), started(one)
    told = ("island", "islands", "OUTLAST_ISLANDS", "RANK", "WORLD_SIZE", "island_host")
    assert [first[name] for name in told] == [0, 2, "2", "0", "1", "127.0.0.1"]
    assert (second["island"], second["RANK"]) == (1, "0")
    assert first["island_key"] == second["island_key"]
    assert len(first["island_key"]) == 64
    assert one.hears(first["holder"])["island"] == 0
    assert zero.hears(second["holder"])["island"] == 1
    causes = [e["cause"] for e in zero.wait_for_events("malformed", 3)[:3]]
    assert ["131072" in cause for cause in causes] == [False, True, True]

    (agent,) = one.wait_for_events("started")
    psutil.Process(agent["pid"]).send_signal(signal.SIGKILL)
    zero.reaches([])
    job.wait_for(lambda: "[island 0] island 1 is out of reach" in job.output)
    again = started(one, 2)
    assert again["holder"] != second["holder"]
    zero.hears(again["holder"])
    zero.reaches([1])
    one.wait_for(lambda: len([e for e in one.events("fake_heard")
                              if e["holder"] == again["holder"]]) >= 1)  # fmt: skip
    assert [e["holder"] for e in zero.events("fake_started")] == [first["holder"]]
    assert "island 1 was lost; it is started again" in job.output
    # Said when other islands than before had a share, not every time.
    assert job.output.count("[island 0] step 30: fragment 1 of islands 0, 1 is merged") == 1
    assert "[island 1] job j.island1: 1 node, 1 worker" in job.output
    assert job.output.count("[island 0] island 1 is in reach") == 2
    tree = job.tree()
    end.touch()
    assert job.end() == 0
    assert all_gone(tree, 5)


def test_an_island_that_fails_by_itself_leaves_the_others_alone(start: Start, end: Path) -> None:
    job = start("--islands", "2", "--standalone", "--nnodes", "2", WORKER, str(end), "raise")
    zero, one = Island(job, 0), Island(job, 1)
    holders = {e["holder"] for e in zero.wait_for_events("fake_started", 2)}
    others = {e["holder"] for e in one.wait_for_events("fake_started", 2)}
    pairs = {(here, there) for here in others for there in holders}
    one.wait_for(lambda: pairs == {(e["holder"], e["message"]["holder"])
                                   for e in one.events("fake_heard")})  # fmt: skip
    end.touch()
    assert job.end() == 1
    assert "[island 0] job finished" in job.output
    assert len(one.events("fake_started")) == 2


def test_a_signal_ends_all_islands(start: Start, end: Path) -> None:
    job = start("--islands", "3", "--standalone", WORKER, str(end))
    for number in range(3):
        Island(job, number).reaches([i for i in range(3) if i != number])
    tree = job.tree()
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 143
    assert all_gone(tree, 5)
    assert "started again" not in job.output


def test_who_is_killed_while_the_job_stops_is_not_started_again(
    start: Start, script: Script, tmp_path: Path
) -> None:
    program = """
import os, pathlib, signal, sys
def ask(*_):
    pathlib.Path(sys.argv[1] + os.environ["OUTLAST_ISLAND"]).touch()
signal.signal(signal.SIGTERM, ask)
print("here", flush=True)
while True:
    signal.pause()
"""
    marks = tmp_path / "mark"
    job = start("--islands", "2", "--standalone", script(program), str(marks))
    job.wait_for(lambda: all(f"[island {number}] here\n" in job.output for number in (0, 1)))
    job.process.send_signal(signal.SIGTERM)
    job.wait_for(lambda: all(Path(f"{marks}{number}").exists() for number in (0, 1)))
    for number in (0, 1):
        (agent,) = Island(job, number).wait_for_events("started")
        psutil.Process(agent["pid"]).kill()
    assert job.end() == 143
    assert "started again" not in job.output


def test_islands_that_are_launched_one_by_one_find_each_other(start: Start, end: Path) -> None:
    places = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    flags = ("--rdzv-id", "j", "--islands", "2", "--island-endpoints", places)
    jobs = [
        start(*flags, "--island", str(number), WORKER, str(end), OUTLAST_JOB_KEY=KEY)
        for number in (0, 1)
    ]
    zero, one = (Island(job, number) for number, job in enumerate(jobs))
    one.hears(started(zero)["holder"])
    zero.hears(started(one)["holder"])
    (key,) = {bytes.fromhex(started(island)["island_key"]) for island in (zero, one)}
    assert key != KEY.encode()
    end.touch()
    assert [job.end() for job in jobs] == [0, 0]


def test_another_key_is_another_training(start: Start, end: Path) -> None:
    places = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    flags = ("--rdzv-id", "j", "--islands", "2", "--island-endpoints", places, "--heartbeat", "0.1")
    jobs = [
        start(*flags, "--island", str(number), WORKER, str(end), OUTLAST_JOB_KEY=f"{number}{KEY}")
        for number in (0, 1)
    ]
    for number, job in enumerate(jobs):
        Island(job, number).wait_for_events("island_refused")
        job.wait_for(lambda job=job: "with another key (--rdzv-id and key" in job.output)
        assert {tuple(e["islands"]) for e in Island(job, number).events("fake_reach")} <= {()}
    end.touch()
    assert [job.end() for job in jobs] == [0, 0]
    for job in jobs:
        lines = [line for line in job.output.splitlines() if "is refused" in line]
        assert len(lines) == len(set(lines))


def test_an_island_that_dies_again_and_again_is_given_up(
    tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    monkeypatch.setattr(islands, "LOSSES_MAX", 2)
    text = script("import os, signal; os.kill(os.getppid(), signal.SIGKILL)")
    directory = str(tmp_path / "logs")
    config = LaunchConfig(script=text, standalone=True, job="j", log_dir=directory, islands=1)
    assert islands.run_islands(config, None) == 1
    told = capfd.readouterr().err
    assert told.count("island 0 was lost; it is started again") == 1
    assert "island 0 was lost 2 times without a new step: it stays away" in told


def test_new_steps_are_those_that_the_island_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(islands, "LOSSES_MAX", 2)

    def life(number: int, event: str, step: int) -> None:
        line = json.dumps({"event": event, "step": step}) + "\n"
        (tmp_path / f"events-n-{number}.jsonl").write_text(line + line[:9])

    def revived() -> bool:
        island.agents = []  # as if all had been killed
        started = bool(island.revive(console))
        island.end()
        return started

    life(0, "resumed", 99)  # of an earlier run
    config = LaunchConfig(script="-", standalone=True, job="j", log_dir=str(tmp_path))
    island, console = islands.LocalIsland(config, KEY.encode()), Console()
    for number, event in enumerate(("resumed", "outer", "resumed"), 1):
        life(number, event, number)
        assert revived()
    for number, again in ((10, True), (11, False)):
        life(number, "recovered", number)  # the step of another island, which it has not made
        assert revived() == again
    console.close()


def test_the_config_of_an_island(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTLAST_JOB_KEY", KEY)
    by_hand = ("--rdzv-id", "j", "--islands", "2", "--island", "1", "--log-dir", "logs",
               "--island-endpoints", "a:1/b:2, [::1]:3")  # fmt: skip
    config = parse(*by_hand)
    assert (config.job, config.training, config.log_dir) == ("j.island1", "j", "logs/island1")
    assert config.checkpoint_dir.endswith("/logs/checkpoints/island1")
    assert config.island_addresses() == ((("a", 1), ("b", 2)), (("::1", 3),))
    # Those that join a running job are given its own places and name.
    same = parse(*by_hand, "--rdzv-id", config.job, "--log-dir", config.log_dir,
                 "--checkpoint-dir", config.checkpoint_dir)  # fmt: skip
    assert same == config
    assert config.checkpoint_root.endswith("/logs/checkpoints")
    assert goes_on(config).endswith("/logs/checkpoints goes on")
    remote = parse(*by_hand, "--checkpoint-dir", "s3://bucket/run/")
    assert remote.checkpoint_dir == "s3://bucket/run/island1"
    assert LaunchConfig.from_json(config.as_json()) == config
    assert parse().training.startswith("job-")
    places = ("--islands", "2", "--island", "0", "--rdzv-id", "j", "--island-endpoints", "a,b:1")
    assert parse(*places).island_addresses() == ((("a", 29401),), (("b", 1),))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--islands 0", "--islands must be at least 1"),
        ("--islands 2 --nnodes 2 --rdzv-endpoint a:1", "one `outlast launch` for each"),
        ("--islands 2 --island 1 --island-endpoints a:1,b:1", "--rdzv-id"),
        ("--islands 2 --island 2 --island-endpoints a:1,b:1 --rdzv-id j", "here 0 to 1"),
        ("--islands 2 --island 1 --rdzv-id j", "no --island-endpoints with a"),
        ("--islands 2 --island-endpoints a:1,b:1 --rdzv-id j", "no --island I"),
        ("--island 1 --island-endpoints a:1,b:1", "no --islands 2; no --rdzv-id NAME"),
        ("--islands 3 --island 1 --island-endpoints a:1,b:1 --rdzv-id j", "no --island-endpoints"),
        ("--islands 2 --island 1 --island-endpoints a:1,a:1 --rdzv-id j", "a:1 is there more"),
        ("--islands 2 --island 1 --island-endpoints a,b/a:29401 --rdzv-id j", "a:29401 is there"),
        ("--islands 2 --island 1 --island-endpoints a:1,b:x --rdzv-id j", "--island-endpoints: 'b"),
    ],
)
def test_what_cannot_work_is_said(
    arguments: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTLAST_JOB_KEY", KEY)
    result = CliRunner().invoke(cli.launch, [*arguments.split(), WORKER])
    assert isinstance(result.exception, Misuse)
    assert complaint in str(result.exception)


def test_islands_need_a_key() -> None:
    with pytest.raises(Misuse, match="no --rdzv-id NAME; no secret key"):
        parse("--islands", "2", "--island", "1", "--island-endpoints", "a:1,b:1")


def test_an_island_whose_name_nobody_knows_is_told(start: Start, end: Path) -> None:
    end.touch()
    places = f"127.0.0.1:{free_ports(1)[0]},nowhere.invalid:1"
    job = start("--rdzv-id", "j", "--islands", "2", "--island", "0", "--island-endpoints", places,
                WORKER, str(end), OUTLAST_JOB_KEY=KEY)  # fmt: skip
    assert job.end() == 0
    assert "--island-endpoints: no way from here to nowhere.invalid; check" in job.output
