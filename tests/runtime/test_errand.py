"""What is slow on storage and what becomes of it: ranks keep meeting, and wait for nothing."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from outlast.cluster.errors import GenerationChanged, Misuse
from outlast.runtime.errand import Errand, StillWanted, together


class Meeting:
    """A communicator of two ranks: the other one says `other`, until the generation is over."""

    def __init__(self, other: Any, meetings: int = 1000) -> None:
        self.other, self.left = other, meetings

    def gather_json(self, value: object) -> list[Any]:
        self.left -= 1
        if self.left < 0:
            raise GenerationChanged("a newer view has arrived")
        return [value, self.other]


def test_all_meet_until_the_last_one_is_done() -> None:
    meeting: Any = Meeting([True, ""])
    result, errors = together(meeting, lambda wanted: time.sleep(0.1) or "read", 0.01)
    assert (result, errors) == ("read", [])
    assert meeting.left < 999, "more than once while it was slow"


def test_what_goes_wrong_elsewhere_is_wrong_here() -> None:
    meeting: Any = Meeting([True, "Corrupt: there"])
    assert together(meeting, lambda wanted: "read", 0.01) == ("read", ["Corrupt: there"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [Misuse("full"), OSError("gone"), MemoryError(), ValueError()])
def test_work_that_fails_in_any_way_is_no_success(error: Exception) -> None:
    def work(wanted: StillWanted) -> None:
        raise error

    meeting: Any = Meeting([True, ""])
    result, errors = together(meeting, work, 0.01)
    assert result is None
    assert len(errors) == 1


@pytest.mark.parametrize("hangs", [True, False])
def test_nothing_fills_the_memory_of_a_later_generation(hangs: bool) -> None:
    memory, store, began = [0], threading.Event(), time.monotonic()
    ended = threading.Event()

    def read(wanted: StillWanted) -> None:
        try:
            while True:
                store.wait(60.0 if hangs else 0.001)  # may never come back
                with wanted.held():
                    memory[0] += 1
        finally:
            ended.set()

    meeting: Any = Meeting([False, ""], meetings=3)
    with pytest.raises(GenerationChanged):
        together(meeting, read, 0.01)
    assert time.monotonic() - began < 30, "nobody waits for a store that hangs"
    seen = memory[0]
    store.set()  # it comes back after all
    assert ended.wait(30)
    assert memory[0] == seen


def test_dropping_waits_for_what_is_being_changed_and_for_nothing_else() -> None:
    inside, leave, order = threading.Event(), threading.Event(), list[str]()

    def work(wanted: StillWanted) -> None:
        with wanted.held():
            inside.set()
            leave.wait(30)
            order.append("changed")

    errand = Errand(work)
    assert inside.wait(30)
    threading.Timer(0.05, leave.set).start()
    errand.wanted.drop()
    order.append("dropped")
    assert order == ["changed", "dropped"]


def check(work: Callable[[StillWanted], Any]) -> Errand[Any]:
    errand = Errand(work)
    errand.wait(30)
    assert errand.done
    return errand


def test_an_errand_has_a_result_or_an_error() -> None:
    assert (check(lambda wanted: 7).result, check(lambda wanted: 7).error) == (7, "")
    assert "full" in check(lambda wanted: (_ for _ in ()).throw(Misuse("full"))).error
