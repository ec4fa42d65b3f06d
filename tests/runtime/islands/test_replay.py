"""What was kept of a round comes back for any ranks, and a broken record is never taken for one."""

import resource
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from outlast.cluster.errors import Corrupt, Misuse, StateLost
from outlast.layout.run import Run
from outlast.runtime.islands.codec import codec
from outlast.runtime.islands.replay import Recorder, Replay
from outlast.runtime.islands.settings import CODECS

GRAIN = 64
UNITS = (Run.of(0, 300), Run.of(300, 364), Run.of(364, 1000))  # two of them with a tail
Ranks = list[list[Run]]


def contributions(islands: Sequence[int]) -> dict[int, Tensor]:
    return {i: torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in islands}


def record(
    directory: Path, name: str, ranks: Ranks, sent: Mapping[int, Tensor], step: int = 30
) -> None:
    """All ranks keep a round of fragment 2."""
    made = codec(name, GRAIN)
    for rank, runs in enumerate(ranks):
        pieces = {
            i: [(run, made.encode(values[run.start : run.stop])) for run in runs]
            for i, values in sent.items()
        }
        Recorder(directory).keep(2, step, tuple(sent), pieces, rank)


@st.composite
def dealt(draw: st.DrawFn) -> Ranks:
    """The units, cut at grains, on up to four ranks, some of which may have nothing."""
    ranks: Ranks = [[] for _ in range(draw(st.integers(1, 4)))]
    for unit in UNITS:
        grains = st.sampled_from(range(unit.start, unit.stop, GRAIN))
        edges = sorted({unit.start, unit.stop, *draw(st.sets(grains, max_size=4))})
        for start, stop in pairwise(edges):
            ranks[draw(st.integers(0, len(ranks) - 1))].append(Run.of(start, stop))
    return ranks


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rounds")


@pytest.mark.parametrize("name", CODECS)
@given(dealt(), dealt(), dealt())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ranks_get_what_any_ranks_have_kept(
    name: str, directory: Path, before: Ranks, writers: Ranks, readers: Ranks
) -> None:
    """Also when the round was made once before by more ranks, or from other contributions."""
    for path in directory.glob("*"):
        path.unlink()
    record(directory, name, before, contributions([1, 2]))
    sent = contributions([0, 2, 5])
    record(directory, name, writers, sent)
    made = codec(name, GRAIN)
    for runs in readers:
        islands, found = Replay(directory, made).round(2, 30, runs)
        assert islands == (0, 2, 5)
        assert found == {
            i: [made.encode(values[run.start : run.stop]) for run in runs]
            for i, values in sent.items()
        }


def test_the_last_attempt_counts_where_attempts_contradict(directory: Path) -> None:
    """Its ranks come first, also where an earlier attempt with more of them knew the same."""
    sent = contributions([0, 1])
    record(directory, "none", [[UNITS[0]], [UNITS[1]], [UNITS[0], UNITS[2]]], sent)
    last = {island: 2 * values for island, values in sent.items()}
    record(directory, "none", [[UNITS[1]], [UNITS[0], UNITS[2]]], last)
    _, found = Replay(directory, codec("none", GRAIN)).round(2, 30, UNITS)
    for island, values in last.items():
        assert b"".join(found[island]) == values.numpy().tobytes()


def test_rounds_are_listed_in_order(directory: Path) -> None:
    assert Replay(directory, codec("none", GRAIN)).rounds() == []
    for step in (60, 30, 1_000_000_000):
        record(directory, "none", [list(UNITS), []], contributions([0]), step)
    (directory / "notes.txt").write_text("mine")
    found = Replay(directory, codec("none", GRAIN)).rounds()
    assert found == [(30, 2), (60, 2), (1_000_000_000, 2)]


def test_what_was_not_kept_is_lost(directory: Path) -> None:
    record(directory, "e3m0", [[UNITS[0]], [UNITS[2]]], contributions([0, 1]))
    replay = Replay(directory, codec("e3m0", GRAIN))
    with pytest.raises(StateLost, match=r"start=300.*was not kept"):
        replay.round(2, 30, [Run.of(0, 364)])
    with pytest.raises(StateLost, match="nothing of fragment 1 of step 30"):
        replay.round(1, 30, UNITS)


def test_a_torn_or_changed_file_is_told(directory: Path) -> None:
    record(directory, "e3m0", [list(UNITS)], contributions([0, 1]))
    (path,) = directory.glob("*.npz")
    whole, replay = path.read_bytes(), Replay(directory, codec("e3m0", GRAIN))
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(Corrupt, match=path.name):
            replay.round(2, 30, UNITS)
    codes = whole.index(b"codes-1.npy") + 200
    path.write_bytes(whole[:codes] + bytes([whole[codes] ^ 1]) + whole[codes + 1 :])
    with pytest.raises(Corrupt, match="Bad CRC-32"):
        replay.round(2, 30, UNITS)
    path.write_bytes(whole)
    assert replay.round(2, 30, UNITS)[0] == (0, 1)


def test_codes_of_another_codec_are_refused(directory: Path) -> None:
    record(directory, "int8", [list(UNITS)], contributions([0]))
    with pytest.raises(Corrupt, match="bytes for 300 elements are not e3m0"):
        Replay(directory, codec("e3m0", GRAIN)).round(2, 30, UNITS)


def test_a_disk_that_is_full_leaves_what_was_there(directory: Path) -> None:
    sent = contributions([0, 1])
    record(directory, "none", [list(UNITS)], sent)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(Misuse, match="cannot be written"):
            record(directory, "none", [list(UNITS)], contributions([2, 3]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Replay(directory, codec("none", GRAIN)).round(2, 30, UNITS)[0] == (0, 1)


def test_a_place_that_takes_nothing_is_told(directory: Path) -> None:
    (directory / "file").write_text("")
    with pytest.raises(Misuse, match="cannot be written"):
        record(directory / "file", "none", [list(UNITS)], contributions([0]))
