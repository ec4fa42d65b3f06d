"""How much of the time islands compute, by the bandwidth between them: a simulator.

Douillard et al., "Streaming DiLoCo with overlapping communication" (2025), Figure 4 and Table 4.
A step of L layers is a graph of 4 L - 1 nodes. An island computes 3 L - 1 of them, one after
another: forward of every layer; then from the last to the first, backward to the activations (which
the first does not have) and backward to the weights. Each takes a third of a layer's share of the
step. The others are the reductions, one of each layer, on the island's link, which carries one
after another, in the order in which they begin. A reduction begins when the layer's backward to the
weights has ended; the forward of that layer waits for it, `delay` steps later than at once. What is
measured is the steady state.

>>> model = Model(parameters=1e9, layers=24, step_s=0.1)
>>> every_step, seldom = (Exchange(16, at_once(24, every)) for every in (1, 100))
>>> overlapped = Exchange(4, streamed(24, 3, 100), delay=1)
>>> for exchange in (every_step, seldom, overlapped):
...     print(utilisation(model, exchange, np.array([1.0, 10.0, 100.0])).round(3))
[0.006 0.06  0.503]
[0.382 0.865 0.99 ]
[0.782 1.    1.   ]
>>> [round(gbits, 1) for gbits in needed(model, overlapped, (0.5, 0.99))]
[0.4, 3.0]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from outlast.layout.fragments import STRIDED, Rounds, fragments
from outlast.layout.space import Space, Tensor

Array = NDArray[np.float64]

# Cycles that pass before the steady state is measured, or steps for each of `delay`: a link that is
# a little too slow falls behind little by little, by `delay` steps at most, before the island
# waits. Then as many are measured, since some cycles may have longer waits than others.
WARM, WARM_STEPS = 2, 300
# What `needed` looks at, as multiples of the bandwidth at which the link would be busy all the time
# if the island never waited: steps of 1 %.
SEARCHED = np.geomspace(1e-2, 1e4, 1389)


@dataclass(frozen=True, slots=True)
class Model:
    """What an island trains: `parameters` alike in all `layers`, `step_s` seconds for a step if
    nothing had to be waited for."""

    parameters: float
    layers: int
    step_s: float


@dataclass(frozen=True, slots=True)
class Exchange:
    """What goes over the link of an island, and when.

    Args:
        bits: that cross the link, in the busier direction, for each parameter sent.
        layers: those sent in each step of a cycle, which repeats.
        delay: tau, steps between the one that sends and the one that waits.
        whole: sent at the end of its step, awaited before the first layer, as this runtime does it;
            else layer by layer, as the paper simulates it.
        trips: one-way latencies from the last bit on the link to the use of what was sent.
    """

    bits: float
    layers: tuple[tuple[int, ...], ...]
    delay: int = 0
    whole: bool = False
    trips: int = 1

    def mean_bytes(self, model: Model) -> float:
        """Bytes over the link in a step, in the mean."""
        return sum(map(len, self.layers)) / len(self.layers) * self._layer_bytes(model)

    def peak_bytes(self, model: Model) -> float:
        """Bytes over the link for the step that sends most."""
        return max(map(len, self.layers)) * self._layer_bytes(model)

    def _layer_bytes(self, model: Model) -> float:
        return self.bits / 8 * model.parameters / model.layers


def at_once(layers: int, every: int) -> tuple[tuple[int, ...], ...]:
    """Everything in one of `every` steps: DiLoCo, and with 1 data parallel training."""
    return (tuple(range(layers)), *[()] * (every - 1))


def streamed(
    layers: int, size: int, every: int, order: str = STRIDED
) -> tuple[tuple[int, ...], ...]:
    """Fragments of `size` layers, each once in `every` steps, as `layout.fragments` deals them."""
    stack = Space.of([Tensor(f"{layer}", (1,), "float32") for layer in range(layers)], unit_of=str)
    parts = fragments(stack, size, order)
    rounds = Rounds(every, len(parts))
    sent = [rounds.sent(every + step) for step in range(every)]
    return tuple(tuple(sorted(unit for p in now for unit in parts[p].units)) for now in sent)


def utilisation(model: Model, exchange: Exchange, gbits: Array, latency_s: float = 0.0) -> Array:
    """Share of the time in which an island computes.

    Args:
        gbits: float64 [n], bandwidths of the link in Gbit/s.
        latency_s: of the link, one way.
    Returns:
        float64 [n].
    """
    node, cycle = model.step_s / (3 * model.layers), len(exchange.layers)
    layer_s = exchange.bits * model.parameters / model.layers / (gbits * 1e9)
    now = link = begun = np.zeros_like(gbits)
    due: dict[int, dict[int, Array]] = {}  # step -> layer whose forward waits -> until when
    warm = max(WARM, -(-WARM_STEPS * exchange.delay // cycle))
    for step in range(2 * warm * cycle):
        if step == warm * cycle:
            begun = now
        done = 0
        for layer, arrival in sorted(due.pop(step, {}).items()):
            now, done = np.maximum(now + (layer - done) * node, arrival), layer
        turn = now + (model.layers - done) * node
        now = turn + (2 * model.layers - 1) * node
        for layer in reversed(exchange.layers[step % cycle]):
            backward = 2 * (model.layers - layer) - (layer == 0)
            link = np.maximum(link, now if exchange.whole else turn + backward * node) + layer_s
            awaiting = due.setdefault(step + 1 + exchange.delay, {})
            awaiting[0 if exchange.whole else layer] = link + exchange.trips * latency_s
    computed: float = warm * cycle * (3 * model.layers - 1) * node
    return computed / (now - begun)


def needed(
    model: Model, exchange: Exchange, levels: Sequence[float], latency_s: float = 0.0
) -> list[float]:
    """Smallest bandwidth for each utilisation in `levels`, in Gbit/s to 1 %; inf where the latency
    forbids it at any."""
    gbits = SEARCHED * exchange.mean_bytes(model) * 8e-9 / model.step_s
    reached = utilisation(model, exchange, gbits, latency_s)
    return [
        float(gbits[(reached >= level).argmax()]) if (reached >= level).any() else inf
        for level in levels
    ]
