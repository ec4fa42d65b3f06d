"""How long planning takes: 8 of 16,384 ranks are lost, over 4e11 elements in 128 units.

The figure is `fill_hole` and `plan` together, in processor seconds (one thread), from a layout of
2 million runs; `alive` is the same plan after a crash, when the lost ranks cannot send.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from outlast.layout.layout import Layout, deal, fill_hole
from outlast.layout.plan import Plan, plan
from outlast.layout.rows import Rows
from outlast.layout.space import Space, Tensor

T = TypeVar("T")


def fresh(layout: Layout) -> Layout:
    """The same layout without what an earlier round has cached."""
    return Layout(layout.holders, Rows(*layout.rows))


def measure(
    rounds: int, ranks: int, lost: int, numel: int, units: int, grain: int
) -> dict[str, float]:
    """Median processor seconds of each part, and what was planned."""
    size = numel // units
    space = Space.of((Tensor(f"block{i}", (size,), "float32") for i in range(units)), unit_of=str)
    holders = [(7919 * rank) % (1 << 48) for rank in range(1, ranks + 1)]
    survivors = [holder for rank, holder in enumerate(holders) if rank % (ranks // lost)]
    times: dict[str, list[float]] = {}

    def clock(name: str, work: Callable[[], T]) -> T:
        start = time.process_time()
        result = work()
        times.setdefault(name, []).append(time.process_time() - start)
        return result

    moves: Plan | None = None
    before = clock("deal_s", partial(deal, space, holders, grain))
    for _ in range(rounds):
        source = fresh(before)
        after = clock("fill_hole_s", partial(fill_hole, source, survivors, space, grain))
        moves = clock("plan_s", partial(plan, source, after))
        clock("alive_plan_s", partial(plan, source, after, alive=set(survivors)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    both = [a + b for a, b in zip(times["fill_hole_s"], times["plan_s"], strict=True)]
    assert moves is not None
    return medians | {
        "fill_hole_and_plan_s": statistics.median(both),
        "runs": len(before.rows.start),
        "moves": len(moves),
        "elements_moved": moves.numel,
        "elements_lost": sum(before.numel(holder) for holder in set(holders) - set(survivors)),
    }


def main() -> None:
    """Prints the table and writes it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=16_384)
    parser.add_argument("--lost", type=int, default=8)
    parser.add_argument("--numel", type=int, default=400_000_000_000)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--grain", type=int, default=4096)
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    options = vars(parser.parse_args())
    path = options.pop("json")
    figures = measure(**options)
    for name, value in figures.items():
        print(f"{name:24}{value:>16,.3f}" if name.endswith("_s") else f"{name:24}{value:>16,}")
    if path:
        with open(path, "w") as file:
            json.dump(options | figures, file, indent=1)


if __name__ == "__main__":
    main()
