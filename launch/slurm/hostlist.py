"""Names of nodes as SLURM abbreviates them: "rack[01-03]n[1,4-5],login" are seven."""

import re
from itertools import product

from outlast.cluster.errors import Misuse

NODES_MAX = 1 << 16


def hostnames(text: str) -> tuple[str, ...]:
    """All names in a host list, in its order; raises Misuse on what is none.

    >>> hostnames("a[1-2,07],b")
    ('a1', 'a2', 'a07', 'b')
    """
    names: list[str] = []
    parts = re.findall(r"(?:[^,\s\[\]]|\[[^\[\]]*\])+", text)
    if not parts or ",".join(parts) != text:
        raise Misuse(f"{text!r} is no list of nodes such as SLURM's node[1-4,7]")
    for part in parts:
        # Split at the brackets, every second piece is what was in some.
        pieces = re.split(r"\[([^\]]*)\]", part)
        choices = [_range(piece, text) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        names += map("".join, product(*choices))
    return tuple(names)


def _range(piece: str, text: str) -> list[str]:
    found: list[str] = []
    for part in piece.split(","):
        low, _, high = part.partition("-") if "-" in part else (part, "", part)
        if not (low.isdecimal() and high.isdecimal() and int(high) - int(low) < NODES_MAX):
            raise Misuse(f"{text!r} is no list of nodes: {part!r} is no range of numbers")
        found += [f"{number:0{len(low)}}" for number in range(int(low), int(high) + 1)]
    return found
