"""The fixed binary tree over the leaves of a step, and who computes which leaf.

A step has `leaves` micro-batches, a power of two. Their gradients are added along one complete
binary tree that only depends on that number: node (level, index) is the sum of leaves [index <<
level, (index + 1) << level). A rank adds its own leaves as far as the tree allows and keeps the
maximal nodes; whoever owns an interval of the model adds the rest in tree order. Addition of two
floats is commutative, so fixing the association fixes the bits.

>>> push(push((), 0), 1)
((1, 0),)
>>> push(push(push((), 0), 1), 2)
((1, 0), (0, 2))
>>> assign(8, {}, [1.0, 1.0, 1.0])
[[0, 1, 2], [3, 4, 5], [6, 7]]
"""

from collections.abc import Iterable, Mapping, Sequence

Node = tuple[int, int]


def push(nodes: Sequence[Node], leaf: int) -> tuple[Node, ...]:
    """Nodes a rank holds after it finished `leaf`, the newest merged with its left siblings."""
    held = list(nodes)
    node = (0, leaf)
    while held and node[1] & 1 and held[-1] == (node[0], node[1] - 1):
        held.pop()
        node = (node[0] + 1, node[1] >> 1)
    return (*held, node)


def push_all(nodes: Sequence[Node], leaves: Iterable[int]) -> tuple[Node, ...]:
    """Nodes a rank holds after it finished all of `leaves`, in that order."""
    held = tuple(nodes)
    for leaf in leaves:
        held = push(held, leaf)
    return held


def covered(nodes: Iterable[Node]) -> set[int]:
    """Leaves whose sums the nodes are."""
    return {leaf for level, i in nodes for leaf in range(i << level, (i + 1) << level)}


def assign(
    leaves: int, kept: Mapping[int, Sequence[Node]], weights: Sequence[float]
) -> list[list[int]]:
    """Leaves that each rank still has to compute, contiguous where nothing is kept.

    Args:
        leaves: number of leaves of the step.
        kept: rank -> nodes of this step that it already holds.
        weights: relative speed of each rank; zero means no leaf at all.
    """
    assert any(weight > 0 for weight in weights), "nobody may compute"
    done = {rank: covered(nodes) for rank, nodes in kept.items()}
    taken = set().union(*done.values()) if done else set()
    if not taken:
        return _contiguous(leaves, weights)
    load = [float(len(done.get(rank, ()))) for rank in range(len(weights))]
    todo: list[list[int]] = [[] for _ in weights]
    for leaf in range(leaves):
        if leaf not in taken:
            rank = min(
                (r for r in range(len(weights)) if weights[r] > 0),
                key=lambda r: ((load[r] + 1) / weights[r], r),
            )
            todo[rank].append(leaf)
            load[rank] += 1
    return todo


def _contiguous(leaves: int, weights: Sequence[float]) -> list[list[int]]:
    """Largest-remainder shares of [0, leaves) in rank order."""
    total = sum(weights)
    exact = [leaves * weight / total for weight in weights]
    share = [int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda r: (share[r] - exact[r], r))
    for rank in by_remainder[: leaves - sum(share)]:
        share[rank] += 1
    starts = [sum(share[:rank]) for rank in range(len(share))]
    return [list(range(start, start + n)) for start, n in zip(starts, share, strict=True)]
