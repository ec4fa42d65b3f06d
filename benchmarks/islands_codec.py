"""What the codecs of islands cost and keep: bits, GB of float32 per processor second, error.

    python benchmarks/islands_codec.py [--mib 64] [--rounds 7] [--json FILE]

Times are seconds of this thread's processor, and torch has one thread, so that waiting for a core
does not count; memcpy of the same round is beside them. Decode includes the check that the codes
are such as the encoder makes. The values are noise, Gaussian or, as pseudogradients have them, with
heavy tails (Student's t, 3 degrees of freedom), whose scale differs by a factor of 10 from block to
block. The error is that of one exchange, ||decoded - values|| / ||values||; what topk leaves out
comes with a later one. "after 30" is the error of the mean of 30 exchanges of the same values, with
error feedback where the codec is topk.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from outlast.runtime.islands.codec import Codec, codec
from outlast.runtime.islands.settings import CODECS

GRAIN = 4096
LATER = 30


def noises(count: int) -> dict[str, Tensor]:
    """float32 [count] by name."""
    torch.manual_seed(0)
    scales = 10 ** torch.rand(count // GRAIN, 1)
    tails = torch.distributions.StudentT(3.0).sample((count // GRAIN, GRAIN))
    return {"Gaussian": torch.randn(count), "heavy tails": (tails * scales).flatten()}


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of this thread for one call."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def speeds(tested: Codec, values: Tensor, rounds: int) -> dict[str, list[float]]:
    """GB of float32 per second, by kind of work."""
    codes, target = tested.encode(values), torch.empty_like(values)
    works: dict[str, Callable[[], object]] = {
        "memcpy": lambda: target.copy_(values),
        "encode": lambda: tested.encode(values),
        "decode": lambda: tested.decode(codes, len(values)),
    }
    gigabytes = 4 * len(values) / 1e9
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(gigabytes / seconds(work))
    return found


def errors(tested: Codec, values: Tensor) -> list[float]:
    """Relative error of one exchange; with error feedback also of the mean of LATER."""
    residual, arrived, found = torch.zeros_like(values), torch.zeros_like(values), []
    times = LATER if tested.name == "topk" else 1
    for round_ in range(1, times + 1):
        wanted = values + residual
        sent = tested.decode(tested.encode(wanted), len(values))
        residual = wanted - sent
        arrived += sent
        if round_ in (1, LATER):
            found.append(float((arrived / round_ - values).norm() / values.norm()))
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=64, help="of float32 (default: 64)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write the single values here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    noise = noises(options.mib * 2**20 // 4)
    found = {}
    print(f"| codec | bits | encode GB/s | decode GB/s | error, {' | error, '.join(noise)} |")
    print("| --- " * (4 + len(noise)) + "|")
    for name in CODECS:
        tested = codec(name, GRAIN)
        values = noise["Gaussian"]
        speed = speeds(tested, values, options.rounds)
        error = {kind: errors(tested, sample[: 256 * GRAIN]) for kind, sample in noise.items()}
        bits = 8 * tested.size(len(values)) / len(values)
        found[name] = {"bits": bits, "speeds": speed, "errors": error}
        median = {kind: statistics.median(times) for kind, times in speed.items()}
        told = " | ".join(
            ", later ".join(f"{100 * one:.2f} %" for one in several) for several in error.values()
        )
        print(f"| {name} | {bits:.3f} | {median['encode']:.2f} | {median['decode']:.2f} | {told} |")
    copied = [speed for row in found.values() for speed in row["speeds"]["memcpy"]]
    print(f"\nmemcpy: {statistics.median(copied):.1f} GB/s")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
