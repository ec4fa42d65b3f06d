"""The language of faults: what is written is what is meant, and nonsense is refused in words."""

import random

import pytest

from outlast.cluster.errors import Misuse
from outlast.cluster.failpoint import RECOVERY
from outlast.launch.drill.fault import DRAWN, Order, draw, parse


@pytest.mark.parametrize(
    "text",
    ["kill-worker@step=20", "kill-node@step=30,node=node2", "hang@step=3,how=node", "partition",
     "slow@step=4,factor=5", "poison@step=5,how=flip", "kill-worker@step=7,phase=commit"],
)  # fmt: skip
def test_an_order_is_written_as_it_is_read(text: str) -> None:
    (order,) = parse(text)
    assert str(order) == text


def test_orders_of_a_salvo_share_the_step() -> None:
    salvo = parse("kill-worker@step=84 + kill-node@phase=finish")
    assert [order.kind for order in salvo] == ["kill-worker", "kill-node"]
    assert {order.step for order in salvo} == {84}
    assert salvo[1].within
    assert salvo[1].takes_node


def test_a_phase_of_a_recovery_gets_a_recovery() -> None:
    salvo = parse("kill-node@step=30,phase=move")
    assert salvo == (Order("kill-worker", 30), Order("kill-node", 30, "move"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("explode", "none of"), ("kill-node@when=3", "is not step="), ("kill-node@step=x", "numbers"),
     ("hang@how=twice", "stop, block, node"), ("kill-node@phase=lunch", "phase"),
     ("slow@factor=0.5", "between"), ("kill-node@step=-1", "0 or more"), ("", "none of")],
)  # fmt: skip
def test_nonsense_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(Misuse, match=complaint):
        parse(text)


def test_drawn_faults_are_of_the_kinds_asked_for_and_the_same_for_a_seed() -> None:
    drawn = [draw(random.Random(seed), DRAWN) for seed in range(200)]
    assert drawn == [draw(random.Random(seed), DRAWN) for seed in range(200)]
    assert {salvo[0].kind for salvo in drawn} == set(DRAWN)
    cascades = [salvo for salvo in drawn if len(salvo) == 2]
    assert cascades
    assert all(salvo[1].phase in RECOVERY for salvo in cascades)
