"""One leaf: hand the batch to the script's loop, take the gradient that its backward left."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from outlast.cluster.errors import Misuse
from outlast.cluster.failpoint import reach
from outlast.runtime.flat_model import FlatModel
from outlast.runtime.leaf_stack import LeafStack
from outlast.runtime.pulse import Pulse


class LeafGradient:
    """Computes leaves into `stack`; bf16 gradients are widened to float32 before they are added.

    Args:
        pulse: told of every sign of progress.
        testify: takes (leaf, gradient float32 [numel]) before anything is done with it.
    """

    def __init__(
        self,
        model: FlatModel,
        stack: LeafStack,
        pulse: Pulse,
        testify: Callable[[int, Tensor], None],
    ) -> None:
        self._model, self._stack, self._pulse, self._testify = model, stack, pulse, testify
        self._losses: list[Tensor] = []
        self.seconds: list[float] = []  # that the leaves took, until somebody takes them
        self._narrow = None if model.dtype == torch.float32 else torch.empty_like(model.param)

    def compute(self, leaf: int, make: Callable[[], object], keep: bool) -> Iterator[object]:
        """Yield the batch of `leaf` once and push its gradient when the loop comes back.

        Args:
            keep: False where a leaf of another rank is computed again, only to compare.
        """
        self._pulse.begin_leaf()
        target = self._stack.buffer()
        flat = target if self._narrow is None else self._narrow
        self._model.bind_gradients(flat)
        self._losses = []
        yield make()
        self._model.collect_gradients(flat)
        if not self._losses:
            raise Misuse(
                "the loop over step.batches() must call step.backward(loss) for each batch"
            )
        if flat is not target:
            target.copy_(flat)
        if answer := reach("leaf", step=self._stack.step, leaf=leaf):
            _poison(target, str(answer.get("poison")))
        self._testify(leaf, target)
        if keep:
            self._stack.push(leaf, target, sum(float(loss) for loss in self._losses))
        else:
            self._stack.free(target)
        self.seconds.append(self._pulse.end_leaf())

    def backward(self, loss: Tensor) -> None:
        """Backward of one term of the loss of the leaf in flight."""
        loss.backward()  # type: ignore[no-untyped-call]
        self._losses.append(loss.detach())
        self._pulse.beat()


def _poison(gradient: Tensor, how: str) -> None:
    """What a drill asks for: the faults of a processor or a memory that computes wrong numbers."""
    if how == "nan":
        gradient[0] = torch.nan
    elif how == "scale":
        gradient.mul_(1e4)
    elif how == "flip":
        gradient.neg_()
