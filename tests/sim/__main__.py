"""Replay a history, or look for one that goes wrong: `python -m tests.sim --seed S [--count N]`."""

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from sim.simulation import simulate
from sim.world import Violation


def main() -> int:
    """Print the history of one seed, or a line per seed that is red."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    red = 0
    for seed in range(options.seed, options.seed + options.count):
        try:
            history = simulate(seed)
        except Violation as violation:
            red += 1
            print(f"seed {seed}: {violation}")
            if options.count == 1:
                raise
        else:
            if options.count == 1:
                print("\n".join(history.lines))
                print(f"{history.shape}: {history.ended}, trace {history.trace:x}")
    print(f"{options.count - red} green, {red} red")
    return red > 0


if __name__ == "__main__":
    sys.exit(main())
