"""What is kept of what arrives, against a dict of elements; hostile parcels change nothing."""

import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.layout.run import Run
from outlast.runtime.islands.codec import codec
from outlast.runtime.islands.inbox import STEPS_KEPT, Inbox

GRAIN, ISLANDS = 8, 3
# Two fragments of two units each; the last unit of either has a tail.
FRAGMENTS = ((Run.of(0, 32), Run.of(56, 75)), (Run.of(32, 56), Run.of(75, 100)))
CODECS = ("e3m0", "int8", "none", "topk")


def inbox(name: str = "none") -> Inbox:
    return Inbox(codec(name, GRAIN), FRAGMENTS, ISLANDS)


def values_of(run: Run, salt: float) -> torch.Tensor:
    """Of one contribution; each element has its own value."""
    return torch.sin(torch.arange(run.start, run.stop) * 1.7 + salt)


def header(piece: Run, fragment: int = 0, **more: Any) -> dict[str, Any]:
    made = {
        "type": "contribution", "island": 1, "fragment": fragment, "step": 30, "base": "b0",
        "weight": 4, "began": 0, "start": piece.start, "stop": piece.stop, "codec": "none",
    }  # fmt: skip
    return made | more


def put(box: Inbox, piece: Run, salt: float = 0.0, **more: Any) -> None:
    codes = codec(more.get("codec", "none"), GRAIN).encode(values_of(piece, salt))
    box.put(header(piece, **more), memoryview(codes))


@st.composite
def pieces(draw: st.DrawFn, fragment: int) -> Run:
    """A piece of one unit, cut at grains."""
    unit = draw(st.sampled_from(FRAGMENTS[fragment]))
    cuts = [*range(unit.start, unit.stop, GRAIN), unit.stop]
    first = draw(st.integers(0, len(cuts) - 2))
    return Run.of(cuts[first], cuts[draw(st.integers(first + 1, len(cuts) - 1))])


ARRIVALS = st.lists(
    st.integers(0, 1).flatmap(
        lambda fragment: st.tuples(
            st.just(fragment),
            pieces(fragment),
            st.integers(0, ISLANDS - 1),
            st.sampled_from([30, 60, 90]),
            st.sampled_from(["b0", "b0", "b0", "b1"]),
            st.sampled_from([0.0, 0.0, 1.0]),
        )
    ),
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(arrivals=ARRIVALS, name=st.sampled_from(CODECS), data=st.data())
def test_like_a_dict_of_elements(
    arrivals: list[tuple[int, Run, int, int, str, float]], name: str, data: st.DataObject
) -> None:
    box, made = inbox(name), codec(name, GRAIN)
    oracle: dict[tuple[int, int], dict[int, tuple[str, dict[int, float]]]] = {}
    for fragment, piece, island, step, base, salt in arrivals:
        put(box, piece, salt, fragment=fragment, island=island, step=step, base=base, codec=name)
        steps = oracle.setdefault((fragment, island), {})
        if step not in steps or steps[step][0] != base:
            steps[step] = (base, {})
        decoded = made.decode(made.encode(values_of(piece, salt)), piece.numel).tolist()
        steps[step][1].update(zip(range(piece.start, piece.stop), decoded, strict=True))
        for old in sorted(steps)[:-STEPS_KEPT]:
            del steps[old]
    assert not box.refused
    for fragment in range(2):
        for island in range(ISLANDS):
            steps = oracle.get((fragment, island), {})
            assert box.newest(fragment, island) == max(steps, default=-1)
            wanted = data.draw(st.lists(pieces(fragment), max_size=3))
            for step in (30, 60, 90):
                base, there = steps.get(step, ("", {}))
                assert box.base(fragment, step, island) == ((4, base) if base else None)
                every = all(a in there for run in wanted for a in range(run.start, run.stop))
                covered = bool(base) and every
                assert box.covers(fragment, step, island, wanted) == covered
                if covered:
                    found = box.codes(fragment, step, island, wanted)
                    expected = [[there[a] for a in range(r.start, r.stop)] for r in wanted]
                    assert [each.tolist() for each in found] == expected
                elif wanted:
                    with pytest.raises(ValueError, match="not all"):
                        box.codes(fragment, step, island, wanted)


HOSTILE: dict[str, dict[str, Any]] = {
    "no type": {"type": None},
    "another type": {"type": "view"},
    "type that cannot be looked up": {"type": ["contribution"]},
    "island below": {"island": -1},
    "island beyond": {"island": ISLANDS},
    "island of a text": {"island": "1"},
    "island of a bool": {"island": True},
    "fragment beyond": {"fragment": 2},
    "fragment of another unit": {"fragment": 1},
    "fraction of a step": {"step": 30.0},
    "step below": {"step": -1},
    "step without end": {"step": 1 << 80},
    "no base": {"base": ""},
    "base of a book": {"base": "b" * 1000},
    "no weight": {"weight": None},
    "weight below": {"weight": -1},
    "another codec": {"codec": "e3m0"},
    "start below": {"start": -8},
    "empty": {"start": 32},
    "backwards": {"start": 24, "stop": 16},
    "beyond its unit": {"stop": 40},
    "beyond everything": {"start": 96, "stop": 1 << 60},
    "start within a grain": {"start": 4},
    "stop within a grain": {"stop": 28},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_contribution(change: dict[str, Any]) -> None:
    box, run = inbox(), Run.of(0, 32)
    made = header(run) | change
    count = made["stop"] - made["start"]
    fitting = Run.of(0, count if 0 < count < 1000 else 32)  # the size is never what is wrong
    box.put(made, memoryview(codec("none", GRAIN).encode(values_of(fitting, 0.0))))
    assert len(box.refused) == 1
    assert all(box.newest(p, island) == -1 for p in range(2) for island in range(ISLANDS))
    put(box, run)
    assert box.covers(0, 30, 1, [run])


@pytest.mark.parametrize("payload", [b"", bytes(127), bytes(129), b"\xff" * 128])
def test_codes_that_cannot_be(payload: bytes) -> None:
    box = inbox()
    box.put(header(Run.of(0, 32)), memoryview(payload))
    assert len(box.refused) == 1
    assert box.base(0, 30, 1) is None


def test_what_an_island_may_fill_is_bounded() -> None:
    box = inbox()
    for step in range(1, 200):
        for stop in range(8, 40, 8):
            for start in range(0, stop, 8):
                put(box, Run.of(start, stop), step, step=step)
        put(box, Run.of(56, 75), step, step=step)
    kept = box._rounds[0, 1]
    assert sorted(kept) == [198, 199]
    assert all(sum(run.numel for run in one.pieces) <= 2 * (32 + 19) for one in kept.values())
    assert box.covers(0, 199, 1, FRAGMENTS[0])
    box.refused.clear()
    for _ in range(1000):
        box.put({"type": "x" * 10_000, "island": "y" * 10_000}, memoryview(b""))
    assert sum(map(len, box.refused)) < 100_000


def test_pieces_that_overlap_without_end() -> None:
    """Neither hides the other; they may not pile up all the same."""
    wide = Inbox(codec("none", GRAIN), [[Run.of(0, 8000)]], ISLANDS)
    for start in range(0, 4000, 8):
        put(wide, Run.of(start, start + 4000))
    assert sum(run.numel for run in wide._rounds[0, 1][30].pieces) <= 16000
    assert wide.covers(0, 30, 1, [Run.of(3992, 7992)])


def test_of_contradicting_pieces_the_later_counts() -> None:
    box, first, second = inbox(), Run.of(0, 24), Run.of(8, 32)
    for piece, salt in ((first, 1.0), (second, 2.0), (first, 3.0)):
        put(box, piece, salt)
    found = box.codes(0, 30, 1, [Run.of(0, 32)])[0]
    assert torch.equal(found[:24], values_of(first, 3.0))
    assert torch.equal(found[24:], values_of(second, 2.0)[16:])
    assert len(box._rounds[0, 1][30].pieces) == 2


def test_what_an_island_sent_is_forgotten_when_it_goes_back() -> None:
    box, run = inbox(), Run.of(0, 32)
    for island in (1, 2):
        for step in (60, 90):
            put(box, run, island=island, step=step)
    put(box, run, step=30)
    assert not box.covers(0, 30, 1, [run])
    box.clear(1, after=60)
    assert [box.newest(0, 1), box.newest(0, 2)] == [60, 90]
    put(box, run, step=30)
    assert box.covers(0, 30, 1, [run])


def test_whoever_waits_is_told() -> None:
    box, _ = expecting()
    for arrive in (
        lambda: put(box, Run.of(0, 32)),
        lambda: put_state(box, "param", Run.of(0, 100)),
        lambda: put_facts(box),
    ):
        with box.changed:
            thread = threading.Thread(target=arrive)
            thread.start()
            assert box.changed.wait(30)
        thread.join()


# ---- the state of an island


class Home:
    """Where a state is written: a float32 of each role for every element."""

    def __init__(self) -> None:
        self.values = {"param": torch.full((100,), -1.0), "exp_avg": torch.full((100,), -1.0)}
        self.writes = 0

    def write(self, role: str, run: Run, data: memoryview) -> None:
        self.writes += 1
        found = torch.frombuffer(bytearray(data), dtype=torch.float32)
        self.values[role][run.start : run.stop] = found


WIDTHS = {"param": 4, "exp_avg": 4}
WANTED = [Run.of(8, 24), Run.of(60, 75)]


def expecting() -> tuple[Inbox, Home]:
    box, home = inbox(), Home()
    box.expect("n1", 1, WANTED, WIDTHS, home.write)
    return box, home


def put_state(
    box: Inbox, role: str, piece: Run, step: int = 50, change: dict[str, Any] | None = None
) -> None:
    salt = {"param": 0.0, "exp_avg": 5.0}[role] + step
    made = {
        "type": "state", "island": 1, "nonce": "n1", "step": step, "role": role,
        "start": piece.start, "stop": piece.stop,
    }  # fmt: skip
    data = values_of(piece, salt).numpy().tobytes()
    box.put(made | (change or {}), memoryview(data))


def put_facts(box: Inbox, step: int = 50, **more: Any) -> None:
    made = {"type": "facts", "island": 1, "nonce": "n1", "step": step, "facts": {"step": step}}
    box.put(made | more, memoryview(b""))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_state_comes_in_any_pieces(data: st.DataObject) -> None:
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, 99), max_size=5))), 100]
    cut = [Run.of(a, b) for a, b in pairwise(edges)]
    parts: list[tuple[str, Run] | None] = [(role, piece) for role in WIDTHS for piece in cut]
    order = data.draw(st.permutations([*parts, *parts, None]))  # some twice
    box, home = expecting()
    there: set[tuple[str, int]] = set()
    facts = False
    for part in order:
        if part is None:
            put_facts(box)
            facts = True
        else:
            put_state(box, *part)
            there |= {(part[0], a) for a in range(part[1].start, part[1].stop)}
        wanted = {(role, a) for role in WIDTHS for r in WANTED for a in range(r.start, r.stop)}
        assert (box.state("n1") == {"step": 50}) == (facts and wanted <= there)
    for role, salt in (("param", 50.0), ("exp_avg", 55.0)):
        expected = torch.full((100,), -1.0)
        for run in WANTED:
            expected[run.start : run.stop] = values_of(run, salt)
        assert torch.equal(home.values[role], expected)
    assert not box.refused


def test_a_state_is_of_one_step() -> None:
    box, home = expecting()
    for role in WIDTHS:
        put_state(box, role, Run.of(0, 70), step=50)
    put_facts(box, step=50)
    put_state(box, "param", Run.of(70, 100), step=51)  # the donor has begun again
    put_state(box, "exp_avg", Run.of(70, 100), step=50)
    assert box.state("n1") is None
    put_state(box, "param", Run.of(0, 70), step=51)
    put_state(box, "exp_avg", Run.of(0, 100), step=51)
    assert box.state("n1") is None
    put_facts(box, step=50)
    assert box.state("n1") is None
    put_facts(box, step=51)
    assert box.state("n1") == {"step": 51}
    assert torch.equal(home.values["param"][60:75], values_of(Run.of(60, 75), 51.0))


def test_nothing_is_written_once_all_is_there_or_given_up() -> None:
    box, home = expecting()
    for role in WIDTHS:
        put_state(box, role, Run.of(0, 100))
    put_facts(box)
    before = home.writes
    put_state(box, "param", Run.of(0, 100))
    put_state(box, "param", Run.of(0, 100), step=51)
    assert home.writes == before
    assert box.state("n1") == {"step": 50}
    box.forget("n1")
    assert box.state("n1") is None
    put_state(box, "param", Run.of(0, 100))
    assert home.writes == before


STRANGE_STATES: dict[str, dict[str, Any]] = {
    "another nonce": {"nonce": "n2"},
    "no nonce": {"nonce": None},
    "another island": {"island": 2},
    "another role": {"role": "grad"},
    "no role": {"role": {}},
    "no step": {"step": None},
    "more than it has": {"stop": 101},
    "less than it has": {"stop": 99},
    "backwards": {"start": 100, "stop": 0},
    "below": {"start": -10, "stop": 90},
}


@pytest.mark.parametrize("change", STRANGE_STATES.values(), ids=STRANGE_STATES.keys())
def test_a_state_nobody_asked_for(change: dict[str, Any]) -> None:
    box, home = expecting()
    put_state(box, "param", Run.of(0, 100), change=change)
    assert len(box.refused) == 1
    assert home.writes == 0


def test_facts_that_are_none() -> None:
    box, _ = expecting()
    for role in WIDTHS:
        put_state(box, role, Run.of(0, 100))
    for change in ({"facts": []}, {"facts": None}, {"step": "50"}, {"island": 0}):
        put_facts(box, **change)
    assert len(box.refused) == 4
    assert box.state("n1") is None
