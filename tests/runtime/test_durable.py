"""What is slow on storage and what becomes of it: ranks keep meeting, and leave nothing running."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outlast.checkpoint.records import Role, StateShape
from outlast.cluster.errors import GenerationChanged, Misuse
from outlast.runtime.durable import Durable, _together


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
    meeting: Any = Meeting([True, []])
    result, errors = _together(meeting, lambda wanted: time.sleep(0.1) or "read", 0.01)
    assert (result, errors) == ("read", [])
    assert meeting.left < 999, "more than once while it was slow"


def test_what_goes_wrong_elsewhere_is_wrong_here() -> None:
    meeting: Any = Meeting([True, ["Corrupt: there"]])
    assert _together(meeting, lambda wanted: "read", 0.01) == ("read", ["Corrupt: there"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [Misuse("full"), OSError("gone"), MemoryError()])
def test_work_that_fails_in_any_way_is_no_success(error: Exception) -> None:
    def work(wanted: Callable[[], bool]) -> None:
        raise error

    meeting: Any = Meeting([True, []])
    result, errors = _together(meeting, work, 0.01)
    assert result is None
    assert len(errors) == 1


def test_nothing_fills_the_memory_of_a_later_generation() -> None:
    ended = threading.Event()

    def work(wanted: Callable[[], bool]) -> None:
        while wanted():
            time.sleep(0.01)
        ended.set()

    meeting: Any = Meeting([False, []], meetings=3)
    with pytest.raises(GenerationChanged):
        _together(meeting, work, 0.01)
    assert ended.is_set(), "it had ended before the next generation could begin"


def test_a_step_that_one_rank_does_not_see_is_not_passed_over(tmp_path: Path) -> None:
    shape = StateShape("model", 8, (Role("param", "float32", 4),))
    training: Any = SimpleNamespace(
        link=SimpleNamespace(identity=SimpleNamespace(timing=None, checkpoint_dir=str(tmp_path))),
        state=SimpleNamespace(memory=SimpleNamespace(shape=shape)),
        settings=SimpleNamespace(seed=0, leaves=8, grain=64),
    )
    meeting: Any = Meeting(["step-000000000009", "step-000000000003"])
    assert Durable(training).names(meeting) == ("step-000000000009", "step-000000000003")
