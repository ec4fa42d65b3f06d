"""The simulator against a graph that is walked node by node, and against what can be computed."""

import doctest
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outlast.layout import utilisation as module
from outlast.layout.fragments import ORDERS
from outlast.layout.utilisation import (
    WARM,
    Exchange,
    Model,
    at_once,
    needed,
    streamed,
    utilisation,
)

EXAMPLES = settings(max_examples=60, deadline=None)
GBITS = np.geomspace(1e-2, 1e3, 40)


def walked(model: Model, exchange: Exchange, gbits: float, latency_s: float, warm: int) -> float:
    """Utilisation by the definition: every node ends its duration after the last that it needs.

    Of `warm` cycles after `warm` cycles.
    """
    last, cycle = model.layers - 1, len(exchange.layers)
    node = model.step_s / 3 / model.layers
    transfer = exchange.bits * model.parameters / model.layers / gbits / 1e9

    def sent(step: int) -> tuple[int, ...]:
        return exchange.layers[step % cycle] if step >= 0 else ()

    computed = [("forward", layer) for layer in range(model.layers)]
    for layer in range(last, -1, -1):
        computed += [("activations", layer)] if layer else []
        computed += [("weights", layer)]

    @cache
    def end(step: int, index: int) -> float:
        """Of the node `index` of the processors' chain."""
        if step < 0:
            return 0.0
        before = end(step, index - 1) if index else end(step - 1, len(computed) - 1)
        kind, layer = computed[index]
        origin = step - 1 - exchange.delay
        waited = [
            arrived(origin, place)
            for place, of in enumerate(sent(origin))
            if kind == "forward" and layer == (0 if exchange.whole else of)
        ]
        return max([before, *waited]) + node

    @cache
    def transferred(step: int, place: int) -> float:
        """When the link is done with one of the layers of a step; the last goes first."""
        if step < 0:
            return 0.0
        layers = sent(step)
        if not layers:
            return transferred(step - 1, 0)
        first = place == len(layers) - 1
        before = transferred(step - 1, 0) if first else transferred(step, place + 1)
        known = -1 if exchange.whole else computed.index(("weights", layers[place]))
        return max(before, end(step, known % len(computed))) + transfer

    def arrived(step: int, place: int) -> float:
        return transferred(step, place) + exchange.trips * latency_s

    for step in range(2 * warm * cycle):  # in order, so that nothing recurses deeply
        for index in range(len(computed)):
            end(step, index)
        transferred(step, 0)
    begun = end(warm * cycle - 1, len(computed) - 1)
    ended = end(2 * warm * cycle - 1, len(computed) - 1)
    return warm * cycle * len(computed) * node / (ended - begun)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Model, Exchange, float]:
    layers, every = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    model = Model(draw(st.sampled_from([1e8, 1e9])), layers, draw(st.sampled_from([0.01, 0.1])))
    order, size = draw(st.sampled_from(ORDERS)), draw(st.integers(1, layers))
    sent = draw(st.sampled_from([streamed(layers, size, every, order), at_once(layers, every)]))
    exchange = Exchange(
        draw(st.sampled_from([4.0, 16.0])), sent, draw(st.integers(0, 3)), draw(st.booleans()),
        draw(st.integers(1, 2)),
    )  # fmt: skip
    return model, exchange, draw(st.sampled_from([0.0, 0.02]))


@EXAMPLES
@given(cases(), st.sampled_from([0.3, 3.0, 30.0, 300.0]))
def test_graph_walked_node_by_node(case: tuple[Model, Exchange, float], gbits: float) -> None:
    model, exchange, latency_s = case
    warm = max(WARM, 10 * exchange.delay)
    expected = walked(model, exchange, gbits, latency_s, warm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WARM_STEPS", 10 * len(exchange.layers))
        found = utilisation(model, exchange, np.array([gbits]), latency_s)
    assert found == pytest.approx([expected], rel=1e-9)


@EXAMPLES
@given(cases())
def test_what_helps_never_harms(case: tuple[Model, Exchange, float]) -> None:
    model, exchange, latency_s = case
    found = utilisation(model, exchange, GBITS, latency_s)
    later = Exchange(exchange.bits, exchange.layers, exchange.delay + 1, exchange.whole)
    fewer = Exchange(exchange.bits / 4, exchange.layers, exchange.delay, exchange.whole)
    assert (np.diff(found) >= -1e-9).all()  # more bandwidth
    assert ((found > 0) & (found <= 1 + 1e-9)).all()
    for better in (later, fewer):
        assert (utilisation(model, better, GBITS) >= found - 0.01).all()


@EXAMPLES
@given(cases())
@example((Model(1e8, 1, 0.01), Exchange(4, ((0,),), 2), 0.02))  # repeats every 3 cycles
@example((Model(1e8, 2, 0.01), Exchange(4, ((0,), (1,), ()), 3, trips=2), 0.02))
def test_what_is_measured_is_the_steady_state(case: tuple[Model, Exchange, float]) -> None:
    model, exchange, latency_s = case
    found = utilisation(model, exchange, GBITS, latency_s)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WARM", 40), ("WARM_STEPS", 1001)):
            patch.setattr(module, name, value)
        assert utilisation(model, exchange, GBITS, latency_s) == pytest.approx(found, abs=0.004)


def test_closed_forms() -> None:
    """Of everything sent at the ends of steps, a step of 23/24 s of 8 layers, 16 Gbit."""
    model, computed = Model(1e9, 8, 1.0), 23 / 24
    blocking, hidden = (Exchange(16, at_once(8, 10), tau, whole=True) for tau in (0, 2))
    gbits = np.array([1.0, 4.0, 16.0, 1e6])
    assert utilisation(model, blocking, gbits) == pytest.approx(
        10 * computed / (10 * computed + 16 / gbits), rel=1e-4
    )
    waits = np.maximum(16 / gbits - 2 * computed, 0)
    assert utilisation(model, hidden, gbits) == pytest.approx(
        10 * computed / (10 * computed + waits), rel=1e-4
    )
    assert utilisation(model, blocking, gbits[-1:], 0.5)[0] == pytest.approx(
        10 * computed / (10 * computed + 0.5), rel=1e-3
    )


def test_needed_is_the_first_bandwidth_that_is_enough() -> None:
    model, exchange = Model(1e9, 24, 0.1), Exchange(4, streamed(24, 3, 100), delay=1)
    levels = (0.5, 0.8, 0.9, 0.95, 0.99)
    found = np.array(needed(model, exchange, levels))
    assert (utilisation(model, exchange, found) >= levels).all()
    assert (utilisation(model, exchange, found / 1.02) < levels).all()
    late = Exchange(4, streamed(24, 3, 100), delay=1, whole=True, trips=2)
    assert needed(model, late, (0.3, 0.99), latency_s=0.5) == [pytest.approx(0.3, rel=0.5), np.inf]


def test_bytes() -> None:
    model = Model(1e9, 24, 0.1)
    parallel, diloco, stream = (
        Exchange(16, at_once(24, 1)), Exchange(16, at_once(24, 100)),
        Exchange(4, streamed(24, 3, 100)),
    )  # fmt: skip
    assert parallel.mean_bytes(model) / stream.mean_bytes(model) == pytest.approx(400)
    assert diloco.peak_bytes(model) / stream.peak_bytes(model) == pytest.approx(4 * 8)
    assert parallel.peak_bytes(model) == parallel.mean_bytes(model) == pytest.approx(2e9)


def test_each_layer_has_its_turn_once() -> None:
    for order in ORDERS:
        sent = streamed(11, 3, 6, order)
        assert sorted(layer for layers in sent for layer in layers) == list(range(11))
        assert len(sent) == 6
        assert max(map(len, sent)) == 3
    assert len(streamed(12, 1, 4)) == 4  # more fragments than steps: several in one


def test_examples() -> None:
    assert doctest.testmod(module).attempted
    assert not doctest.testmod(module).failed
