"""What the erasure code costs: GB of data per processor second, against memcpy in the same round.

    python benchmarks/codec.py [--codes 3,1 4,2] [--mib 32] [--rounds 7] [--json FILE]

A round times a copy of the data of all units, then encode and decode of every backend, each in
seconds of this thread's processor, so that waiting for a core does not count; the ratio to memcpy
is of the same round, because neighbours on the machine slow both. Decode rebuilds min(k, m) data
units, the most there can be, from parity. Data counts once: k units of `--mib` each. Units lie on
huge pages at staggered addresses: at equal ones modulo 4 KiB they would evict each other from the
cache. The table has medians; every round compares what was decoded with the data.
"""

import argparse
import json
import mmap
import statistics
import time
from collections.abc import Callable

import numpy as np

from outlast.checkpoint import code, isal
from outlast.checkpoint.code import Code
from outlast.checkpoint.isal import Backend

STAGGER = 4352  # 4 KiB and four cache lines
CODES = ("3,1", "4,2", "8,2", "8,3", "10,4")


def units(count: int, size: int) -> list[np.ndarray]:
    """Touched memory for `count` units of `size` bytes."""
    total = count * (size + STAGGER)
    memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    whole[:] = 0
    return [whole[index * (size + STAGGER) :][:size] for index in range(count)]


def seconds(work: Callable[[], None]) -> float:
    """Processor seconds of this thread for one call."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def measure(
    k: int, m: int, size: int, rounds: int, backends: list[Backend]
) -> dict[str, dict[str, list[float]]]:
    """GB/s of each round, by backend ("memcpy" is one) and kind of work."""
    lost = min(k, m)
    memory = units(k + m + lost, size)
    data, parity, again = memory[:k], memory[k : k + m], memory[k + m :]
    rng = np.random.default_rng(0)
    for unit in data:
        unit[:] = rng.integers(0, 256, size, np.uint8)
    tested = Code(k, m)
    left = {index: data[index] for index in range(lost, k)}
    rows, out = dict(enumerate(parity)), dict(enumerate(again))

    def copy() -> None:
        for index, unit in enumerate(data):
            parity[index % m][:] = unit

    def encode() -> None:
        tested.encode(data, parity)

    def decode() -> None:
        tested.decode(left, rows, out)

    found: dict[str, dict[str, list[float]]] = {"memcpy": {"copy": []}}
    for _ in range(rounds):
        found["memcpy"]["copy"].append(k * size / seconds(copy) / 1e9)
        for backend in backends:
            code.backend = lambda chosen=backend: chosen
            rates = found.setdefault(backend.name, {"encode": [], "decode": []})
            for name, work in (("encode", encode), ("decode", decode)):
                rates[name].append(k * size / seconds(work) / 1e9)
            assert all(np.array_equal(out[index], data[index]) for index in out)
    return found


def lines(k: int, m: int, found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Rows of the table for one code."""
    copies = found["memcpy"]["copy"]
    rows = []
    for name, rates in found.items():
        if name != "memcpy":
            cells = []
            for work in ("encode", "decode"):
                ratios = [a / b for a, b in zip(rates[work], copies, strict=True)]
                cells += [
                    f"{statistics.median(rates[work]):.1f}",
                    f"{statistics.median(ratios):.2f}",
                ]
            rows.append(f"| ({k},{m}) | {name} | " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codes", nargs="+", default=CODES, metavar="K,M")
    parser.add_argument("--mib", type=int, default=32, help="MiB of a unit")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write the single values here")
    args = parser.parse_args()
    chosen = isal.backend()
    backends = list({chosen.name: chosen, "numpy": isal.portable()}.values())
    results = {}
    print("| code | backend | encode GB/s | of memcpy | decode GB/s | of memcpy |")
    print("| --- | --- | --- | --- | --- | --- |")
    for text in args.codes:
        k, m = (int(number) for number in text.split(","))
        results[text] = measure(k, m, args.mib << 20, args.rounds, backends)
        print("\n".join(lines(k, m, results[text])), flush=True)
    copies = [rate for found in results.values() for rate in found["memcpy"]["copy"]]
    print(f"\nmemcpy {statistics.median(copies):.1f} GB/s; chosen backend: {chosen.name}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"mib": args.mib, "chosen": chosen.name, "rates": results}, file, indent=1)


if __name__ == "__main__":
    main()
