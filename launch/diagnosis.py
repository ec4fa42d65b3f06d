"""What a doctor concludes from what the nodes measured: pure, so that every rule can be tested.

[Note: pairs] Neighbours on a ring exchange data in pairs, so a bad node spoils two pairs and a good
one at most one of its own, unless both its neighbours are bad. A node whose pairs are all bad is
named; for a bad pair between nodes that are otherwise well, both are, as one of the two.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SLOW_PAIR = 3.0  # times what the others need
ANSWER, CLOCK, SPEED = "answer", "clock", "speed"


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
    "memory": Limit(1.2, 1, "fewer workers per node, or more of --mem; the part is needed"),
    "/dev/shm": Limit(256, 16, "mount it larger: data loaders and NCCL need it (MiB free)"),
    "open files": Limit(4096, 512, "ulimit -n 65536; in a service LimitNOFILE"),
    "processes": Limit(2048, 256, "ulimit -u, or pids.max of the control group"),
    "log disk": Limit(10, 0.1, "free space, or choose another --log-dir (GB free)"),
    "load": Limit(0.5, NEVER, "somebody else computes here: see top (share of cores)"),
    "governor": Limit(0, NEVER, "cpupower frequency-set -g performance"),
    "ports": Limit(0, NEVER, "net.ipv4.ip_local_port_range should begin at 32768"),
    "host name": Limit(0, NEVER, "outlast needs none, but other programs do: see /etc/hosts"),
    "interface": Limit(999, 0, "choose a faster one with --interface (Mbit/s)"),
    "torch": Limit(60, NEVER, "slow or busy disk under the installation (seconds to import)"),
    "gemm": Limit(NEVER, NEVER, "take the node out: it computes wrongly"),
    SPEED: Limit(1.5, 4, "look for other processes, clocks, cooling; or leave the node out"),
    "gpu": Limit(NEVER, NEVER, "nvidia-smi -q; dmesg | grep -i xid; take the node out"),
    "gpu memory errors": Limit(0, 0, "reset or replace the GPU: errors that ECC cannot correct"),
    "gpu slowdown": Limit(0, NEVER, "cooling or power: nvidia-smi -q -d PERFORMANCE"),
    "gpu in use": Limit(0, NEVER, "another process is on it: nvidia-smi"),
}
ADVICE_PAIR = "check cable, port and speed of its interface (ethtool), or leave the node out"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of one node."""

    node: str
    check: str
    verdict: Verdict
    text: str
    advice: str = ""


Record = Mapping[str, Any]  # what a node wrote, see `launch.examination`


def diagnose(nodes: Sequence[str], records: Mapping[str, Record]) -> list[Finding]:
    """All findings: those of each node first, then those that only comparison shows."""
    found = []
    for node in nodes:
        if node not in records:
            advice = LIMITS[ANSWER].advice
            found.append(Finding(node, ANSWER, Verdict.BAD, "no answer in time", advice))
        for check, (value, text) in records.get(node, {}).get("measures", {}).items():
            limit = LIMITS[check]
            failed = text.startswith("failed: ")
            verdict = Verdict.BAD if failed else limit.verdict(value) if value is not None \
                else Verdict.OK  # fmt: skip
            advice = limit.advice if verdict != Verdict.OK else ""
            found.append(Finding(node, check, verdict, text, advice))
    found += _speeds(records) + _numbers(records) + _clocks(nodes, records)
    return found + _pairs(pair_seconds(records))


def pair_seconds(records: Mapping[str, Record]) -> dict[tuple[str, str], float]:
    """(left, right) -> seconds of their all-reduce, infinite where either says it failed."""
    seconds: dict[tuple[str, str], float] = {}
    for record in records.values():
        for pair in record["pairs"]:
            ends = (pair["left"], pair["right"])
            took = math.inf if pair["seconds"] is None else float(pair["seconds"])
            seconds[ends] = max(took, seconds.get(ends, 0.0))
    return seconds


def _pairs(seconds: Mapping[tuple[str, str], float]) -> list[Finding]:
    """[Note: pairs]. The two slowest may be those of one bad node: the rest says what is usual."""
    usual = sorted(seconds.values())[max(0, len(seconds) - 3) // 2] if seconds else 0.0
    bad = {ends for ends, took in seconds.items()
           if took == math.inf or (len(seconds) > 2 and took > SLOW_PAIR * usual)}  # fmt: skip
    own = {node: {ends for ends in seconds if node in ends} for ends in seconds for node in ends}
    named = {node for node, pairs in own.items() if len(pairs) > 1 and pairs <= bad}
    found = []
    for ends in sorted(bad):
        guilty = sorted(named & set(ends))
        text = _pair_text(seconds[ends], usual)
        for node in guilty or ends:
            other = ends[ends[0] == node]
            doubt = "" if guilty else ", which may be at fault itself"
            found.append(Finding(node, "neighbours", Verdict.BAD, f"with {other}{doubt}: {text}",
                                 ADVICE_PAIR))  # fmt: skip
    return found


def _pair_text(took: float, usual: float) -> str:
    if took == math.inf:
        return "the all-reduce failed"
    return f"an all-reduce of {1e3 * took:.0f} ms, others {1e3 * usual:.0f} ms"


def _speeds(records: Mapping[str, Record]) -> list[Finding]:
    took = {node: record["measures"]["gemm"][0] for node, record in records.items()
            if record["measures"].get("gemm", [None])[0]}  # fmt: skip
    usual = _middle(took.values()) if len(took) > 2 else NEVER
    return [
        Finding(node, SPEED, verdict, f"{seconds / usual:.1f} times the time of others for a gemm",
                LIMITS[SPEED].advice)
        for node, seconds in took.items()
        if (verdict := LIMITS[SPEED].verdict(seconds / usual)) != Verdict.OK
    ]  # fmt: skip


def _middle(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


def _numbers(records: Mapping[str, Record]) -> list[Finding]:
    kinds = {node: record["numerics"] for node, record in records.items() if record["numerics"]}
    common = Counter(kinds.values()).most_common(1)
    return [
        Finding(node, "numbers", Verdict.WARNING, f"{kind}; elsewhere {common[0][0]}",
                "results may differ in their last bits: use equal nodes and versions")
        for node, kind in kinds.items() if kind != common[0][0]
    ]  # fmt: skip


def _clocks(nodes: Sequence[str], records: Mapping[str, Record]) -> list[Finding]:
    """Offsets add up along the ring; a clock is wrong by its distance from the middle one."""
    steps = {(p["left"], p["right"]): p["offset"] for r in records.values() for p in r["pairs"]
             if p["offset"] is not None}  # fmt: skip
    found, chain = [], dict[str, float]()
    for left, right in zip(nodes, [*nodes[1:], ""], strict=True):
        chain.setdefault(left, 0.0)
        if (left, right) in steps:
            chain[right] = chain[left] + steps[left, right]
            continue
        middle = _middle(chain.values())
        for node, offset in chain.items():
            verdict = LIMITS[CLOCK].verdict(abs(offset - middle))
            if verdict != Verdict.OK:
                found.append(Finding(node, CLOCK, verdict, f"{offset - middle:+.3f} s against the "
                                     "others", LIMITS[CLOCK].advice))  # fmt: skip
        chain = {}
    return found
