"""Settings that cannot work are refused when they are made, and on all islands alike."""

from typing import Any

import pytest

from outlast.cluster.errors import Misuse
from outlast.runtime.islands.settings import Islands


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"every": 1.5}, "every=1.5): use whole numbers"),
        ({"every": True}, "every=True): use whole numbers"),
        ({"fragment": "3"}, "fragment='3'): use whole numbers"),
        ({"delay": 1.0}, "delay=1.0): use whole numbers"),
        ({"delay": "11"}, "delay='11'): use whole numbers"),
        ({"delay": [1, False]}, "delay=[1, False]): use whole numbers"),
        ({"delay": {"0": 1}}, "delay={'0': 1}): use whole numbers"),
        ({"delay": {0: [1, 2]}}, "delay={0: [1, 2]}): use whole numbers"),
        ({"delay": {0: 30}}, "less than every=30"),
        ({"mixing": "half"}, "mixing='half'): use numbers"),
        ({"mixing": [0.5, None]}, "mixing=[0.5, None]): use numbers"),
        ({"mixing": [0.5, 1.5]}, "use 0 (the outer"),
        ({"outer_lr": [0.4]}, "outer_lr=[0.4]): use numbers"),
        ({"outer_lr": float("inf")}, "outer_lr=inf"),
        ({"outer_lr": float("nan")}, "outer_lr=nan"),
        ({"patience_s": None}, "patience_s=None): use numbers"),
    ],
)
def test_what_cannot_work_is_said(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Misuse) as raised:
        Islands(**settings)
    assert complaint in str(raised.value)


def test_delays_of_islands_name_all_of_them() -> None:
    settings = Islands(delay={0: 1, 2: 5})
    for island in range(3):
        with pytest.raises(Misuse, match="says nothing of island 1"):
            settings.delays(island, 2, 3)
    assert Islands(delay={0: 1, 1: 5}).delays(1, 2, 2) == (5, 5)
    assert Islands(delay=[1, 2]).delays(0, 2, 2) == (1, 2)
    with pytest.raises(Misuse, match="the model has 3 fragments"):
        Islands(delay=[1, 2]).delays(0, 3, 2)
