"""A failpoint costs nothing unarmed, stands still when armed, and never waits for a dead drill."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.cluster import failpoint
from outlast.cluster.environment import environment
from outlast.cluster.errors import Misuse


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoint.arm(None)


def test_an_armed_point_tells_who_and_where_and_takes_the_answer(tmp_path: Path) -> None:
    heard = []
    with socket.socket(socket.AF_UNIX) as drill:
        drill.bind(str(tmp_path / "drill"))
        drill.listen()

        def answer() -> None:
            line, _ = drill.accept()
            with line, line.makefile("rwb") as stream:
                heard.append(json.loads(stream.readline()))
                stream.write(b'{"poison": "nan"}\n')

        thread = threading.Thread(target=answer)
        thread.start()
        armed = environment({"OUTLAST_DRILL": f"{tmp_path / 'drill'}:leaf,move"}).drill
        failpoint.arm(armed, node="node1")
        assert failpoint.drilled()
        assert failpoint.reach("commit", step=3) == {}
        assert failpoint.reach("leaf", step=3) == {"poison": "nan"}
        thread.join()
    assert (heard[0]["point"], heard[0]["node"], heard[0]["step"]) == ("leaf", "node1", 3)


def test_a_drill_that_is_gone_holds_nobody_up(tmp_path: Path) -> None:
    failpoint.arm(failpoint.Drill(str(tmp_path / "nobody"), frozenset({"leaf"})))
    assert failpoint.reach("leaf") == {}


def test_a_job_without_a_drill_has_nothing_armed() -> None:
    assert environment({}).drill is None
    failpoint.arm(None)
    assert not failpoint.drilled()
    assert failpoint.reach("leaf") == {}


@pytest.mark.parametrize("text", ["no colon", "/tmp/x:nowhere"])
def test_a_variable_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(Misuse, match="OUTLAST_DRILL"):
        environment({"OUTLAST_DRILL": text})
