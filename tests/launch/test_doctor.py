"""The doctor finds what is planted, names the node, and lets a healthy one pass."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from job import COMMAND

from outlast.launch.doctor.diagnosis import LIMITS, Limit, Verdict, diagnose
from outlast.launch.doctor.neighbours import Talk, answer_pings, clock_offset, rounds
from outlast.launch.drill import namespaces
from outlast.launch.drill.namespaces import Namespaces

DOCTOR = [*COMMAND[:-1], "doctor"]
WELL, SLOW, DEAD = 0.01, 0.05, None


# ---- the rules


def ring(
    count: int, seconds: Mapping[tuple[int, int], float | None], skew: int = -1
) -> tuple[list[str], dict[str, Any]]:
    """Nodes and records of a ring whose pairs took so long; the clock of `skew` is 9 s ahead."""
    nodes = [f"n{number}" for number in range(count)]
    records: dict[str, Any] = {
        node: {"measures": {"gemm": (0.01, "10 ms"), "torch": (1.0, "avx2")}, "pairs": []}
        for node in nodes
    }
    for _, left, right in rounds(nodes):
        pair = nodes.index(left), nodes.index(right)
        took = seconds.get(pair, WELL)
        offset = 9.0 * ((pair[1] == skew) - (pair[0] == skew))
        records[left]["pairs"].append(
            {"left": left, "right": right, "seconds": took, "offset": offset}
        )
    return nodes, records


def sick(nodes: list[str], records: Mapping[str, Any]) -> list[str]:
    found = diagnose(nodes, records)
    return sorted({finding.node for finding in found if finding.verdict == Verdict.BAD})


@pytest.mark.parametrize("took", [SLOW, DEAD])
def test_a_node_that_spoils_both_its_pairs_is_named(took: float | None) -> None:
    for count in range(3, 9):
        assert sick(*ring(count, {})) == []
        for bad in range(count):
            spoilt = {(bad, (bad + 1) % count): took, ((bad - 1) % count, bad): took}
            assert sick(*ring(count, spoilt)) == [f"n{bad}"], (count, bad)


def test_of_one_bad_pair_either_may_be_at_fault() -> None:
    assert sick(*ring(5, {(1, 2): DEAD})) == ["n1", "n2"]
    assert sick(*ring(2, {(0, 1): DEAD})) == ["n0", "n1"]
    assert sick(*ring(2, {(0, 1): SLOW})) == [], "nothing to compare with"
    nodes, records = ring(5, {(1, 2): SLOW})
    found = [found for found in diagnose(nodes, records) if found.check == "neighbours"]
    assert [(f.node, f.verdict) for f in found] == [
        ("n1", Verdict.WARNING), ("n2", Verdict.WARNING),
    ]  # fmt: skip
    assert all("may be at fault itself" in f.text for f in found)


def test_who_does_not_answer_is_named() -> None:
    nodes, records = ring(4, {})
    del records["n2"]
    assert sick(nodes, records) == ["n2"]


def test_a_clock_is_wrong_by_its_distance_from_the_others() -> None:
    for count in range(3, 7):
        for bad in range(count):
            assert sick(*ring(count, {}, skew=bad)) == [f"n{bad}"], (count, bad)


def test_a_slow_node_and_one_with_other_numbers() -> None:
    nodes, records = ring(4, {})
    records["n1"]["measures"]["gemm"] = (0.05, "50 ms")
    records["n3"]["measures"]["torch"] = (1.0, "avx512")
    found = {(f.node, f.check): f.verdict for f in diagnose(nodes, records)
             if f.verdict != Verdict.OK}  # fmt: skip
    assert found == {("n1", "speed"): Verdict.BAD, ("n3", "numbers"): Verdict.WARNING}


def test_a_limit_bounds_from_below_or_above() -> None:
    most, least = Limit(1, 5, ""), Limit(10, 3, "")
    assert [most.verdict(value) for value in (1, 2, 6)] == list(Verdict)
    assert [least.verdict(value) for value in (10, 9, 2)] == list(Verdict)
    assert all(limit.advice for limit in LIMITS.values())


@pytest.mark.parametrize("count", range(2, 10))
def test_a_node_is_in_one_pair_at_a_time(count: int) -> None:
    nodes = [f"n{number}" for number in range(count)]
    pairs = rounds(nodes)
    assert len({frozenset(pair[1:]) for pair in pairs}) == (1 if count == 2 else count)
    for number in {pair[0] for pair in pairs}:
        busy = [node for round_, *pair in pairs if round_ == number for node in pair]
        assert len(busy) == len(set(busy))
    assert rounds(["alone"]) == []


def test_clocks_are_compared_over_a_connection() -> None:
    deadline = time.monotonic() + 10
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as left,
        server.accept()[0] as right,
    ):
        arguments = Talk(right, deadline), lambda: time.time() + 7
        ahead = threading.Thread(target=answer_pings, args=arguments)
        ahead.start()
        assert clock_offset(Talk(left, deadline)) == pytest.approx(7, abs=0.5)
        ahead.join()


# ---- one node


def doctor(
    folder: Path, *flags: str, before: str = "", prefix: tuple[str, ...] = ()
) -> tuple[int, dict[str, tuple[str, str]], str]:
    """Exit code, check -> (verdict, text), output; `before` is run by its shell."""
    shell = [*prefix, "sh", "-c", f'{before}\nexec "$@"', "sh"]
    words = [*shell, *DOCTOR, "--json", str(folder / "found.json"), *flags]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, timeout=120)
    try:
        told = json.loads((folder / "found.json").read_text())
    except FileNotFoundError:
        return done.returncode, {}, done.stdout + done.stderr
    found = {f["check"]: (f["verdict"], f["text"]) for f in told["findings"]}
    return done.returncode, found, done.stdout + done.stderr


def test_a_healthy_node(tmp_path: Path) -> None:
    code, found, output = doctor(tmp_path, "--bytes-per-worker", "1MB")
    assert code == 0, output
    assert {"clock", "memory", "/dev/shm", "open files", "ports", "gemm", "gpu"} <= set(found)
    assert "bad" not in {verdict for verdict, _ in found.values()}
    assert f"healthy: {socket.gethostname()}" in output


@pytest.mark.gpu
@pytest.mark.skipif(not any(Path("/proc/driver/nvidia/gpus").glob("*")), reason="not run: no GPU")
def test_gpus_of_this_node(tmp_path: Path) -> None:
    code, found, output = doctor(tmp_path)
    assert found["gpu"][0] == "ok", output
    assert " x " in found["gpu"][1]
    assert code == 0


IN_NAMESPACES = ("unshare", "--mount", "--net")
POWERSAVE = (
    "cd /sys/devices/system/cpu; mount -t tmpfs none .; cd ../cpu; mkdir -p cpu0/cpufreq; "
    "echo powersave > cpu0/cpufreq/scaling_governor"
)


@pytest.mark.parametrize(
    ("check", "flags", "before", "prefix"),
    [
        ("memory", ("--bytes-per-worker", "9TB"), "", ()),
        ("open files", (), "ulimit -n 256", ()),
        ("log disk", ("--log-dir", "/proc/none"), "", ()),
        ("/dev/shm", (), "mount -t tmpfs -o size=4k none /dev/shm", IN_NAMESPACES),
        ("interface", ("--interface", "ib0"), "", ()),
        ("governor", (), POWERSAVE, IN_NAMESPACES),
        ("ports", (), "echo 15000 60999 > /proc/sys/net/ipv4/ip_local_port_range", IN_NAMESPACES),
    ],
)  # fmt: skip
def test_what_is_planted_is_found(
    tmp_path: Path, check: str, flags: tuple[str, ...], before: str, prefix: tuple[str, ...]
) -> None:
    if prefix and namespaces.missing():
        pytest.skip(f"not run: {namespaces.missing()}")
    code, found, output = doctor(tmp_path, *flags, before=before, prefix=prefix)
    verdict = "warning" if check in ("governor", "ports") else "bad"
    assert found[check][0] == verdict, output
    assert code == (verdict == "bad")


def test_misuse_is_one_line(tmp_path: Path) -> None:
    for flags in (("--nodes", "a,b"), ("--nodes", "a,b", "--node-name", "a"),
                  ("--bytes-per-worker", "much")):  # fmt: skip
        code, found, output = doctor(tmp_path, *flags)
        assert (code, found, output.count("\n")) == (2, {}, 1), output


# ---- several nodes


class Ward:
    """Nodes in namespaces, of which each runs the doctor."""

    def __init__(self, network: Namespaces, nodes: list[str], folder: Path) -> None:
        self.network, self.nodes, self.folder = network, nodes, folder
        hosts = "".join(f"{network.address(node)} {node}\n" for node in nodes)
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + hosts)

    def start(self, node: str) -> subprocess.Popen[str]:
        become = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts; exec "$@"']
        words = [*DOCTOR, "--nodes", ",".join(self.nodes), "--node-name", node, "--meet", "meet"]
        return subprocess.Popen(
            [*self.network.prefix(node), *become, str(self.folder / "hosts"), *words,
             "--json", f"found-{node}"],
            cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def examine(self) -> tuple[list[int], dict[str, Any], str]:
        running = [self.start(node) for node in self.nodes]
        output = "".join(process.communicate(timeout=150)[0] for process in running)
        (told,) = [json.loads(p.read_text()) for p in self.folder.glob("found-*")]
        return [process.returncode for process in running], told, output


@pytest.fixture
def ward(tmp_path: Path) -> Any:
    if namespaces.missing():
        pytest.skip(f"not run: {namespaces.missing()}")
    nodes = [f"node{number}" for number in range(4)]
    with Namespaces(nodes) as network:
        yield Ward(network, nodes, tmp_path)


def test_neighbours_that_are_well(ward: Ward) -> None:
    codes, told, output = ward.examine()
    assert codes == [0, 0, 0, 0], output
    assert told["healthy"]
    assert output.count("healthy:") == 1, "one of them prints"


def test_a_slow_network_is_traced_to_its_node(ward: Ward) -> None:
    ward.network.slow(["node2"], megabits=30)
    codes, told, output = ward.examine()
    assert told["sick"] == ["node2"], output
    assert codes == [1, 1, 1, 1]


@pytest.mark.long
def test_a_cut_node_is_named_and_nobody_hangs(ward: Ward) -> None:
    ward.network.cut(["node1"])
    codes, told, output = ward.examine()
    assert told["sick"] == ["node1"], output
    assert codes == [1, 1, 1, 1]


@pytest.mark.long
def test_a_stopped_node_is_named_and_nobody_hangs(ward: Ward) -> None:
    """The others wait for it as long as a slow disk may take, and no longer."""
    running = {node: ward.start(node) for node in ward.nodes}
    os.kill(running["node3"].pid, signal.SIGSTOP)
    try:
        outputs = [running[node].communicate(timeout=150)[0] for node in ward.nodes[:3]]
    finally:
        running["node3"].kill()
    assert "sick: node3" in outputs[0], outputs
