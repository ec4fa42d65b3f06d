"""Streaming DiLoCo in one process, a step at a time: what the runtime must equal bit for bit.

Islands are copies of the model, and exchange nothing but tensors. Of the product it uses what has
tests of its own: the address space and its fragments, the codecs, the weights of the rules. The
arithmetic is written out, one rounding for each operator. Douillard et al., "Streaming DiLoCo with
overlapping communication" (2025), Algorithm 2.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from outlast.layout.fragments import Fragment, Rounds, fragments
from outlast.layout.run import Run
from outlast.runtime.flat_model import FlatModel
from outlast.runtime.fold import grain_squares, norm
from outlast.runtime.islands.settings import Islands
from outlast.runtime.optimizer import OptimizerFactory

Leaf = Callable[[nn.Module], Tensor]  # model -> the loss of one leaf
Present = Callable[[int, int], Sequence[int]]  # fragment, step -> the islands that count


class Codec(Protocol):
    """Of one run that begins at a grain."""

    def encode(self, values: Tensor) -> bytes: ...
    def decode(self, codes: bytes, count: int) -> Tensor: ...


class Island:
    """One island of one worker: its model, its optimizer, its outer state.

    Args:
        number: of the island.
        module: as every island begins.
        factory: parameters -> the inner optimizer.
        grain: elements over which squares are summed for the norm of the gradient.
    """

    def __init__(
        self, number: int, module: nn.Module, factory: OptimizerFactory, grain: int = 4096
    ) -> None:
        self.number, self.grain = number, grain
        self.flat = FlatModel(module)
        self.param = self.flat.param
        self.runs = [Run.of(unit.start, unit.stop) for unit in self.flat.space.units if unit.numel]
        self.views = [nn.Parameter(part(self.param, run)) for run in self.runs]
        self.optimizer = factory(self.views)
        self.outer = self.param.clone()
        self.momentum = torch.zeros_like(self.param)
        self.residual = torch.zeros_like(self.param)
        self.pseudogradient = torch.zeros_like(self.param)
        self.guards: list[dict[str, Any]] = [{} for _ in self.runs]

    def train(self, leaves: Sequence[Leaf], rate: float, clip: float | None = None) -> float:
        """One inner step at the learning rate `rate`; returns the mean loss of its leaves."""
        sums, losses = [], []
        for leaf in leaves:
            gradient = torch.empty_like(self.param)
            self.flat.bind_gradients(gradient)
            loss = leaf(self.flat.module)
            loss.backward()  # type: ignore[no-untyped-call]
            self.flat.collect_gradients(gradient)
            sums.append(gradient)
            losses.append(loss.item())
        while len(sums) > 1:
            sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
        gradient = sums[0] * (1.0 / len(leaves))
        if clip is not None:
            length = norm(grain_squares(gradient, self.runs, self.grain).tolist())
            gradient *= min(1.0, clip / (length + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for view, run in zip(self.views, self.runs, strict=True):
            view.grad = part(gradient, run)
        self.optimizer.step()
        return sum(losses) / len(losses)

    @contextmanager
    def outside(self, there: bool = True) -> Iterator[nn.Module]:
        """The model with the outer parameters, which are those to evaluate, if `there` are any."""
        kept = self.param.clone()
        self.param.copy_(self.outer if there else self.param)
        yield self.flat.module
        self.param.copy_(kept)


class Reference:
    """Islands in step with each other.

    Args:
        present: which islands count for a fragment that was sent after a step; default all.
        tamper: what an island makes of the values that it sends; default as they are.
    """

    def __init__(
        self,
        islands: Sequence[Island],
        settings: Islands,
        codec: Codec,
        present: Present | None = None,
        tamper: Callable[[int, int, Tensor], Tensor] | None = None,
    ) -> None:
        self.islands, self.settings, self.codec = islands, settings, codec
        space = islands[0].flat.space
        self.fragments: tuple[Fragment, ...] = fragments(space, settings.fragment, settings.order)
        self.rounds = Rounds(settings.every, len(self.fragments))
        self.present = present or (lambda fragment, step: [each.number for each in islands])
        self.tamper = tamper or (lambda island, step, values: values)
        self.sent: dict[tuple[int, int], dict[int, list[Tensor]]] = {}
        self.bytes: dict[int, int] = {}  # step -> of one island, to one other
        self.log: list[tuple[str, int, int, int]] = []  # what, island, fragment, step

    def step(self, step: int) -> None:
        """What comes after the inner optimizer has made `step` steps on every island."""
        for p in self.rounds.sent(step):
            self.sent[p, step] = {each.number: self._send(each, p, step) for each in self.islands}
        count, islands = len(self.fragments), len(self.islands)
        for island in self.islands:
            delays = self.settings.delays(island.number, count, islands)
            for p, sent in self.rounds.due(step, delays):
                self._apply(island, p, sent)
                self.log.append(("applied", island.number, p, step))

    def _send(self, island: Island, p: int, step: int) -> list[Tensor]:
        found, size = [], 0
        for run in self.fragments[p].runs:
            delta = part(island.outer, run) - part(island.param, run)
            residual = part(island.residual, run)
            if self.settings.codec == "topk":
                delta = residual * self.settings.feedback + delta
            codes = self.codec.encode(self.tamper(island.number, step, delta))
            found.append(self.codec.decode(codes, run.length))
            if self.settings.codec == "topk":
                residual.copy_(delta - found[-1])
            part(island.pseudogradient, run).copy_(found[-1])
            size += len(codes)
        self.bytes[step] = self.bytes.get(step, 0) + size * (island is self.islands[0])
        self.log.append(("sent", island.number, p, step))
        return found

    def _apply(self, island: Island, p: int, sent: int) -> None:
        heard = {number: self.sent[p, sent][number] for number in sorted(self.present(p, sent))}
        share = self.settings.mixings(len(self.fragments))[p]
        for index, run in enumerate(self.fragments[p].runs):
            vectors = {number: values[index] for number, values in heard.items()}
            outer, momentum = part(island.outer, run), part(island.momentum, run)
            average = self._average(island, run, vectors)
            if average is None:
                part(island.param, run).copy_(outer)  # rolled back, whatever alpha is
                continue
            momentum.copy_(momentum * self.settings.outer_momentum + average)
            ahead = average + momentum * self.settings.outer_momentum
            outer.copy_(outer - ahead * self.settings.outer_lr)
            param = part(island.param, run)
            param.copy_(param * share + outer * (1.0 - share) if share else outer)

    def _average(self, island: Island, run: Run, vectors: Mapping[int, Tensor]) -> Tensor | None:
        """The pseudogradient of one unit; None where all is to be rolled back."""
        if not vectors:
            return None
        if self.settings.rule == "mean":
            return added(vectors.values()) / len(vectors)
        # Imported here: the plain algorithm needs nothing of the guards.
        from outlast.runtime.islands import rules

        if self.settings.rule == "trimmed":
            return rules.trimmed_mean(torch.stack(list(vectors.values())), (len(vectors) - 1) // 2)
        at = island.runs.index(run)
        gram = rules.total(rules.grain_grams(list(vectors.values()), [run], island.grain))
        weights, island.guards[at], _ = rules.weights(
            self.settings.rule, gram, list(vectors), island.guards[at]
        )
        # A weight of 0 leaves out what may not even be a number.
        counted = [v * float(w) for v, w in zip(vectors.values(), weights, strict=True) if w]
        return added(counted) if counted else None


def added(vectors: Iterable[Tensor]) -> Tensor:
    """Sum of float32 vectors in the order of the islands."""
    first, *others = vectors
    for vector in others:
        first = first + vector
    return first


def part(whole: Tensor, run: Run) -> Tensor:
    """The elements of a run, as a view."""
    return whole[run.start : run.stop]
