"""Finished leaves of the step in flight: nodes of the leaf tree with their gradient sums and
losses.

The sums are local and survive a change of the generation, so a survivor never computes a leaf
twice. Each node costs one float32 buffer of the model's size; a rank that computes n leaves in
order holds at most log2(n) + 1 of them."""

import torch
from torch import Tensor

from outlast.runtime.leaf_tree import Node, covered, push


class LeafStack:
    """Gradient sums [numel] float32 by node, for step index `step`."""

    def __init__(self, numel: int, device: torch.device) -> None:
        self._numel, self._device = numel, device
        self._free: list[Tensor] = []
        self.step = -1
        self.sums: dict[Node, Tensor] = {}
        self.losses: dict[int, float] = {}
        self.found: dict[int, tuple[float, int | None]] = {}  # leaf -> norm and digest, see `jury`

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Nodes held, oldest first."""
        return tuple(self.sums)

    def start(self, step: int) -> None:
        """Begin step index `step`; what belongs to another step is dropped."""
        if step != self.step:
            self._free += self.sums.values()
            self.sums, self.losses, self.found, self.step = {}, {}, {}, step

    def keep(self, nodes: tuple[Node, ...]) -> None:
        """Keep only `nodes`: the others are held by somebody else, too."""
        for node in [held for held in self.sums if held not in nodes]:
            self._free.append(self.sums.pop(node))

    def forget(self, leaf: int) -> None:
        """Drop the sum that has `leaf` in it, and what was noted of its leaves."""
        gone = {leaf}.union(*(covered([n]) for n in self.sums if leaf in covered([n])))
        self.keep(tuple(node for node in self.sums if leaf not in covered([node])))
        for each in gone:
            self.losses.pop(each, None)
            self.found.pop(each, None)

    def free(self, gradient: Tensor) -> None:
        """Take back a buffer whose gradient is not needed."""
        self._free.append(gradient)

    def buffer(self) -> Tensor:
        """A float32 vector for the gradient of the next leaf, contents undefined."""
        if self._free:
            return self._free.pop()
        return torch.empty(self._numel, dtype=torch.float32, device=self._device)

    def push(self, leaf: int, gradient: Tensor, loss: float) -> None:
        """Add a finished leaf; merges it with its left siblings in tree order."""
        before = list(self.sums.items())
        after = push(self.nodes, leaf)
        while len(before) >= len(after):
            _, left = before.pop()
            left.add_(gradient)
            self._free.append(gradient)
            gradient = left
        self.sums = dict([*before, (after[-1], gradient)])
        self.losses[leaf] = loss

    def release(self) -> None:
        """Free all buffers: between steps only the reduced shard is left (ZeRO 2)."""
        self.start(-1)
        self._free = []
