"""The parts of an agent that need no job: latch, logs, memory, keys, environment, console."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from outlast.cluster.errors import Misuse
from outlast.cluster.latch import Latch
from outlast.cluster.view import Member, View, Worker
from outlast.launch.config import LaunchConfig
from outlast.launch.console import Console
from outlast.launch.memory_holder import MemoryHolder
from outlast.launch.metrics_log import MetricsLog
from outlast.launch.progress import Progress
from outlast.launch.store_relay import StoreRelay
from outlast.launch.torch_environment import master_port, torch_environment

HOLDS = """
import sys, time
from outlast.cluster.latch import Latch
latch = Latch(int(sys.argv[1])); latch.hold(); ballast = b"1" * (1 << 28); print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, None])
def test_latch_fires_when_its_holder_dies(how: signal.Signals | None) -> None:
    latch, fired, news = Latch(), threading.Event(), []
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(latch.file)], pass_fds=(latch.file,),
        stdout=subprocess.PIPE, stdin=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    latch.watch(lambda died: (news.append((died, time.monotonic())), fired.set()))
    time.sleep(0.05)
    assert not fired.is_set()
    began = time.monotonic()
    if how is None:
        holder.communicate()  # an orderly end releases the main thread's latch too
    else:
        holder.send_signal(how)
    assert fired.wait(5)
    holder.communicate()
    assert news[0][0] is True
    print(f"latch after {(news[0][1] - began) * 1000:.1f} ms, whole end {time.monotonic() - began}")
    latch.close()


def test_a_closed_latch_keeps_no_descriptor() -> None:
    """Also while no garbage is collected: an idle agent would keep one for every dead worker."""
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            latch, fired = Latch(), threading.Event()
            latch.watch(lambda died, fired=fired: fired.set())  # type: ignore[misc]
            assert fired.wait(5)
            latch.close()
        deadline = time.monotonic() + 5
        while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) <= before
    finally:
        gc.enable()


def test_latch_that_nobody_holds_is_no_death() -> None:
    latch, fired, news = Latch(), threading.Event(), []
    latch.watch(lambda died: (news.append(died), fired.set()))
    assert fired.wait(5)
    assert news == [False]


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_metrics_once_and_in_order_across_writers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first, second = MetricsLog(path), MetricsLog(path)
    for step in range(5):
        for log in (first, second):
            log.record(step, {"loss": step})
            log.record(step, {"loss": -1})  # another rank's report of the same step
        first.write()
    with path.open("a") as torn:
        torn.write('{"step": 5, "lo')  # the writer died here
    for step in (5, 6):
        second.record(step, {"loss": step})
    second.write()
    first.record(5, {})  # was suspended, wakes up
    first.write()
    assert steps(path) == list(range(7))
    assert json.loads(path.read_text().splitlines()[3])["loss"] == 3


def test_metrics_of_an_earlier_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for begin, count in ((0, 3), (4, 1), (0, 1)):  # runs, goes on, starts over
        log = MetricsLog(path)
        log.founding = True
        for step in range(begin, begin + count):
            log.record(step, {})
            log.write()
            log.write()
        log.record(begin + count, {})
        log.write()
        aside = [p for p in tmp_path.iterdir() if p != path]
        if begin:
            assert not aside
            assert steps(path) == [0, 1, 2, 3, 4, 5]
    assert len(aside) == 1
    assert steps(path) == [0, 1]


def test_memory_outlives_its_worker_until_released() -> None:
    memory = MemoryHolder()
    before = set(os.listdir("/proc/self/fd"))
    file = memory.allocate(7, 1 << 30)  # sparse
    assert os.fstat(file).st_size == 1 << 30
    memory.allocate(8, 4096)
    memory.keep(7, 3)
    memory.forget(8)
    assert [kept.holder for kept in memory.kept] == [7]
    assert memory.release(3) == 0
    assert memory.release(4) == 1
    for size in (0, -1, 1 << 63, 1 << 80):
        with pytest.raises((OSError, OverflowError, ValueError)):
            memory.allocate(9, size)
    memory.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_keys_of_older_generations_are_gone() -> None:
    relay = StoreRelay()
    old, new = ({"kind": "store", "generation": g, "key": "k", "value": "eA=="} for g in (2, 3))
    assert relay.put(old)
    assert relay.put(new)
    relay.install(3)
    assert relay.replay() == [new]
    assert not relay.put(old)
    with pytest.raises(Misuse):
        relay.put({**new, "value": "?"})


def test_environment_of_a_view() -> None:
    members = [
        Member(f"a{i}", f"n{i}", f"h{i}", 1, tuple(Worker(10 * i + j, j) for j in range(2 + i)))
        for i in range(2)
    ]
    view, config = View(1, tuple(members)), LaunchConfig(script="x", standalone=True, job="j")
    values = torch_environment(view, members[1], 2, config, {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"})
    assert values["RANK"] == "4"
    assert values["LOCAL_RANK"] == "2"
    assert values["WORLD_SIZE"] == values["ROLE_WORLD_SIZE"] == "5"
    assert values["LOCAL_WORLD_SIZE"] == "3"
    assert (values["GROUP_RANK"], values["GROUP_WORLD_SIZE"]) == ("1", "2")
    assert values["MASTER_ADDR"] == "h0"
    assert values["OMP_NUM_THREADS"] == "1"
    assert "TORCH_NCCL_DUMP_ON_TIMEOUT" not in values
    again = View(9, (members[0], Member("a1", "n1", "h1", 1, members[1].workers, restarts=1)))
    assert master_port(again, "j") != master_port(view, "j")
    newcomer = Member("b", "m", "h", 1, (Worker(99, 0),))
    values = torch_environment(view, newcomer, 0, config, {})
    assert (values["RANK"], values["WORLD_SIZE"]) == ("5", "6")


def test_what_is_said_of_islands(capfd: pytest.CaptureFixture[str]) -> None:
    console = Console("[island 0] ")
    progress = Progress(console, "j", "logs", "a")
    progress.told("island_refused", {"cause": "another key"})
    progress.reach([], [1, 2])
    progress.install(View(1, (Member("a", "n", "h", 1, (Worker(7, 0),)),)), 0.0, 0.0)
    for index in range(40):
        progress.told("outer", {
            "step": 10 * index, "fragment": index % 2, "islands": [0, 1], "waited_s": 0.25,
            "bytes": 100_000 * index,
        })  # fmt: skip
    progress.reach([1, 2], [2])
    for cause in ("another key", "another name"):
        progress.told("island_refused", {"cause": cause})
    console.close()
    lines = [
        line.removeprefix("outlast: [island 0] ") for line in capfd.readouterr().err.split("\n")
    ]
    assert lines == [
        "job j: 1 node, 1 worker; logs in logs",
        "an island is refused: another key",
        "island 1 is in reach",
        "island 2 is in reach",
        "step 0: fragment 0 of islands 0, 1 is merged",
        "step 180: 19 rounds so far, waited 4.8 s, 1.8 MB sent by rank 0",
        "step 380: 39 rounds so far, waited 9.8 s, 3.8 MB sent by rank 0",
        "island 1 is out of reach",
        "an island is refused: another name",
        "",
    ]
