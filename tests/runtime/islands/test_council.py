"""What rank 0 observes for all: whom to wait for, for how long, and from whom nothing will come."""

import threading
from typing import Any

from outlast.layout.run import Run
from outlast.runtime.islands.closing import Round, Version
from outlast.runtime.islands.codec import codec
from outlast.runtime.islands.council import Council
from outlast.runtime.islands.inbox import Inbox
from outlast.runtime.islands.neighbours import TRAINING, WAITING, Neighbours, Place
from outlast.runtime.islands.settings import Islands

STEP, BASE, RUN = 12, Version(3, "v"), Run.of(0, 64)


class Alone:
    """A communicator of one rank, for so many votes."""

    rank, size, left = 0, 1, 100

    def gather_json(self, word: Any) -> list[Any]:
        self.left -= 1
        assert self.left, "it waits without end"
        return [word]


def place(state: str, began: int, version: str = "v") -> dict[str, Any]:
    address = ("127.0.0.1", 9)
    return Place(0, "1-a", 1, address, (RUN,), STEP, state, began, (version,), "s").as_json()


def council(me: int, patience_s: float) -> tuple[Council, Neighbours, Inbox]:
    inbox = Inbox(codec("none", 64), [(RUN,)], 5)
    others = [j for j in range(5) if j != me]
    changed = threading.Condition()
    known = Neighbours(64, others, lambda _: None, inbox.clear, changed)
    known.reached(others, 1)
    known.here(Place.from_json(place(TRAINING, 0), 64))
    found = Council(me, Islands(patience_s=patience_s), known, inbox, lambda *_, **__: None, 0.01)
    found.enter(Alone())  # type: ignore[arg-type]
    return found, known, inbox


def contribute(inbox: Inbox, island: int, step: int, began: int = 0, base: str = "v") -> None:
    header = {"type": "contribution", "island": island, "fragment": 0, "step": step, "base": base,
              "weight": 3, "began": began, "start": 0, "stop": 64, "codec": "none"}  # fmt: skip
    inbox.put(header, memoryview(bytes(256)))


AT = Round(0, STEP, BASE, True)


def test_from_whom_nothing_more_will_come() -> None:
    found, known, inbox = council(0, 60.0)
    known.heard(1, place(TRAINING, 0))
    known.heard(2, place(TRAINING, STEP))  # has just taken a state
    known.heard(3, place(WAITING, 0, "other"))  # will take one
    known.heard(4, place(TRAINING, 0))
    contribute(inbox, 4, STEP + 6)  # has gone on
    vote = found.vote(AT, [RUN])
    assert vote["lost"] == [2, 3, 4]
    assert vote["there"] == {"1": 0, "2": STEP, "4": 0}
    known.reached([2, 3, 4], 2)
    assert found.vote(AT, [RUN])["lost"] == [1, 2, 3, 4]


def test_a_fork_does_not_hide_the_closing_of_another() -> None:
    found, known, _ = council(2, 60.0)
    for by, base in ((0, "fork"), (1, "v")):
        closing = {"type": "closing", "fragment": 0, "step": STEP, "base": base, "by": by,
                   "islands": [by]}  # fmt: skip
        known.heard(by, closing)
    assert found.vote(AT, [RUN])["closing"]["by"] == 1


def test_no_number_of_lower_islands_is_waited_for_without_end() -> None:
    found, known, inbox = council(2, 0.0)
    for island in (0, 1, 3):
        known.heard(island, place(TRAINING, 0))
        contribute(inbox, island, STEP)  # they are there, and close nothing
    assert found.decided(AT, [RUN], [found.vote(AT, [RUN])], lambda: None) == (0, 1, 2, 3)


def test_what_is_of_another_past_is_told_by_when_its_island_began() -> None:
    _, known, inbox = council(0, 60.0)
    contribute(inbox, 1, STEP)
    contribute(inbox, 2, STEP, began=6)
    for island in (1, 2):  # both begin anew after step 6: of 1 came the old, of 2 the new
        known.heard(island, place(TRAINING, 6))
    assert not inbox.covers(0, STEP, 1, [RUN])
    assert inbox.covers(0, STEP, 2, [RUN])
    contribute(inbox, 2, STEP, began=0, base="old")
    assert inbox.base(0, STEP, 2) == (3, "v")
