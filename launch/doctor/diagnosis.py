"""What a doctor concludes from what the nodes measured: pure, so that every rule can be tested.

[Note: pairs] Neighbours on a ring exchange data in pairs, so a bad node spoils two pairs and a good
one at most one of its own, unless both its neighbours are bad. A node whose pairs are all bad is
named. For a pair that failed between nodes that are otherwise well both are, as one of the two; if
it is only slow they are warned of, since each has shown that it can be quick.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SLOW_PAIR = 3.0  # times what the others need
FAILED = "failed: "  # begins the text of a measurement that came to nothing
ANSWER, CLOCK, SPEED, NUMBERS, NEIGHBOURS = "answer", "clock", "speed", "numbers", "neighbours"


class Verdict(StrEnum):
    """How bad; only `BAD` makes a node sick."""

    OK = "ok"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Limit:
    """A value beyond `warning` or `bad` is one; beyond means below where `bad` < `warning`."""

    warning: float
    bad: float
    advice: str

    def verdict(self, value: float) -> Verdict:
        """What this value is."""
        sign = 1 if self.bad >= self.warning else -1
        if sign * value > sign * self.bad:
            return Verdict.BAD
        return Verdict.WARNING if sign * value > sign * self.warning else Verdict.OK


NEVER = math.inf
LIMITS: dict[str, Limit] = {
    ANSWER: Limit(NEVER, NEVER, "leave the node out: it does not start programs"),
    CLOCK: Limit(0.1, 5, "let chrony or ntpd set it: logs and file times are compared"),
    "memory": Limit(1.2, 1, "fewer workers per node, or more of sbatch's --mem"),
    "/dev/shm": Limit(256, 16, "mount it larger: data loaders and NCCL need it (MiB free)"),
    "open files": Limit(4096, 512, "ulimit -n 65536; in a service LimitNOFILE"),
    "processes": Limit(2048, 256, "ulimit -u, or pids.max of the control group"),
    "log disk": Limit(10, 0.1, "free space, or choose another --log-dir (GB free)"),
    "load": Limit(0.5, NEVER, "somebody else computes here: see top (share of cores)"),
    "governor": Limit(0, NEVER, "cpupower frequency-set -g performance"),
    "ports": Limit(0, NEVER, "end what is there; let net.ipv4.ip_local_port_range begin at 32768"),
    "host name": Limit(0, NEVER, "outlast needs none, but other programs do: see /etc/hosts"),
    "interface": Limit(999, 0, "choose another one with --interface (Mbit/s)"),
    "torch": Limit(60, NEVER, "slow or busy disk under the installation (seconds to import)"),
    "gemm": Limit(NEVER, NEVER, "take the node out: it computes wrongly"),
    SPEED: Limit(1.5, 4, "look for other processes, clocks, cooling; or leave the node out"),
    "gpu": Limit(NEVER, NEVER, "nvidia-smi -q; dmesg | grep -i xid; take the node out"),
    "gpu memory errors": Limit(0, 0, "reset or replace the GPU: errors that ECC cannot correct"),
    "gpu slowdown": Limit(0, NEVER, "cooling or power: nvidia-smi -q -d PERFORMANCE"),
    "gpu in use": Limit(0, NEVER, "another process is on it: nvidia-smi"),
    NUMBERS: Limit(0, NEVER, "results may differ in their last bits: use equal nodes, versions"),
    NEIGHBOURS: Limit(0, NEVER, "check its cable, port and speed (ethtool), or leave it out"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of one node."""

    node: str
    check: str
    verdict: Verdict
    text: str
    advice: str = ""


Record = Mapping[str, Any]  # "measures": check -> (value, text), "pairs": see `neighbours`


def absent(reason: str) -> dict[str, Any]:
    """The record of a node that wrote none."""
    return {"measures": {ANSWER: (None, FAILED + reason)}, "pairs": []}


def diagnose(nodes: Sequence[str], records: Mapping[str, Record]) -> list[Finding]:
    """All findings: those of each node first, then those that only comparison shows."""
    silent = absent("not in time")
    measures = [
        (node, check, value, text)
        for node in nodes
        for check, (value, text) in records.get(node, silent)["measures"].items()
    ]
    found = []
    for node, check, value, text in measures:
        verdict = Verdict.OK if value is None else LIMITS[check].verdict(value)
        verdict = Verdict.BAD if text.startswith(FAILED) else verdict
        found.append(_finding(node, check, verdict, text))
    compared = _compared(nodes, records, measures)
    return found + [finding for finding in compared if finding.verdict != Verdict.OK]


def _compared(
    nodes: Sequence[str], records: Mapping[str, Record], measures: Sequence[tuple[Any, ...]]
) -> Iterator[Finding]:
    took = {node: value for node, check, value, _ in measures if check == "gemm" and value}
    usual = _middle(took.values()) if len(took) > 2 else NEVER
    for node, seconds in took.items():
        text = f"{seconds / usual:.1f} times the time of others for a gemm"
        yield _finding(node, SPEED, LIMITS[SPEED].verdict(seconds / usual), text)
    kinds = {node: text for node, check, value, text in measures if check == "torch" and value}
    for node, kind in kinds.items():
        common = Counter(kinds.values()).most_common(1)[0][0]
        verdict = Verdict.OK if kind == common else Verdict.WARNING
        yield _finding(node, NUMBERS, verdict, f"{kind}; elsewhere {common}")
    pairs = [pair for record in records.values() for pair in record["pairs"]]
    for node, offset in _clocks(nodes, pairs).items():
        verdict = LIMITS[CLOCK].verdict(abs(offset))
        yield _finding(node, CLOCK, verdict, f"{offset:+.3f} s against the others")
    yield from _neighbours(pair_seconds(records))


def pair_seconds(records: Mapping[str, Record]) -> dict[tuple[str, str], float]:
    """(left, right) -> seconds of their all-reduce, infinite where either says it failed."""
    seconds: dict[tuple[str, str], float] = {}
    for pair in (pair for record in records.values() for pair in record["pairs"]):
        ends = (pair["left"], pair["right"])
        took = NEVER if pair["seconds"] is None else float(pair["seconds"])
        seconds[ends] = max(took, seconds.get(ends, 0.0))
    return seconds


def _finding(node: str, check: str, verdict: Verdict, text: str) -> Finding:
    advice = "" if verdict == Verdict.OK else LIMITS[check].advice
    return Finding(node, check, verdict, text, advice)


def _neighbours(seconds: Mapping[tuple[str, str], float]) -> Iterator[Finding]:
    """[Note: pairs]. The two slowest may be those of one bad node: the rest says what is usual."""
    usual = sorted(seconds.values())[max(0, len(seconds) - 3) // 2] if seconds else 0.0
    slow = SLOW_PAIR * usual if len(seconds) > 2 else NEVER
    bad = {ends for ends, took in seconds.items() if took == NEVER or took > slow}
    own = {node: {ends for ends in seconds if node in ends} for ends in seconds for node in ends}
    named = {node for node, pairs in own.items() if len(pairs) > 1 and pairs <= bad}
    for ends in sorted(bad):
        took = f"{1e3 * seconds[ends]:.0f} ms, others {1e3 * usual:.0f} ms"
        text = "an all-reduce " + ("failed" if seconds[ends] == NEVER else f"of {took}")
        known = named & {*ends}
        verdict = Verdict.BAD if known or seconds[ends] == NEVER else Verdict.WARNING
        for node in sorted(known) or ends:
            doubt = "" if node in named else ", which may be at fault itself"
            other = f"with {ends[ends[0] == node]}{doubt}"
            yield _finding(node, NEIGHBOURS, verdict, f"{other}: {text}")


def _clocks(nodes: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by which each clock is ahead of the middle one; offsets add up along the ring, and
    what a missing pair separates is not compared."""
    ahead = {(p["left"], p["right"]): p["offset"] for p in pairs if p["offset"] is not None}
    chains: list[dict[str, float]] = []
    for left, right in zip(["", *nodes], nodes, strict=False):
        if (left, right) in ahead:
            chains[-1][right] = chains[-1][left] + ahead[left, right]
        else:
            chains.append({right: 0.0})
    return {node: offset - _middle(chain.values())
            for chain in chains for node, offset in chain.items()}  # fmt: skip


def _middle(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]
