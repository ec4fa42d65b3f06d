"""What a rank makes of what others say of themselves."""

import threading
from dataclasses import replace

from outlast.layout.run import Run
from outlast.runtime.islands.neighbours import DONE, TRAINING, WAITING, Neighbours, Place

EVERY = 6


def place(step: int, state: str, versions: tuple[str, ...]) -> Place:
    runs = (Run.of(0, 8),)
    return Place(0, "1-a", 1, ("127.0.0.1", 9), runs, step, state, 0, versions, "settings")


def neighbours() -> Neighbours:
    found = Neighbours(8, range(1, 9), lambda _: None, lambda *_: None, threading.Condition())
    found.reached(range(1, 9), 1)
    found.here(place(7, TRAINING, ("v", "w")))
    return found


def test_who_is_about_to_begin_takes_part() -> None:
    near = neighbours()
    like, other = place(3, WAITING, ("v", "w")), place(3, WAITING, ("v", "x"))
    far, astray = replace(like, step=1), replace(like, versions=())
    train, done = place(90, TRAINING, ("y", "z")), place(7, DONE, ("v", "w"))
    for island, said in enumerate((like, other, far, astray, train, done, like), start=1):
        near.heard(island, said.as_json())
    near.reached(range(1, 7), 2)
    assert sorted(near.partners(EVERY)) == [1, 5]
    near.heard(1, replace(like, state=TRAINING, versions=()).as_json())
    assert near.partners(EVERY)[1].state == TRAINING


def test_who_has_not_begun_waits_for_nobody_by_the_versions() -> None:
    fresh = Neighbours(8, [1], lambda _: None, lambda *_: None, threading.Condition())
    fresh.reached([1], 1)
    fresh.heard(1, place(0, WAITING, ("v",)).as_json())
    assert not fresh.partners(EVERY)


def test_who_was_lost_is_waited_for_when_its_workers_are_back_and_not_before() -> None:
    found = neighbours()
    there = place(7, TRAINING, ("v", "w"))
    found.heard(1, there.as_json())
    found.reached(range(2, 9), 2)
    found.reached(range(1, 9), 3)  # its agent is back
    assert not found.partners(EVERY)
    found.heard(1, replace(there, holder=4).as_json())
    assert sorted(found.partners(EVERY)) == [1]
