"""Saves that are agreed on by votes: every listed step is whole, whatever the store does."""

import errno
import random
import sys
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outlast.checkpoint import grid as grids
from outlast.checkpoint.steps import Steps
from outlast.cluster.errors import Misuse
from outlast.runtime import saving as module
from outlast.runtime.saving import Next, Phase, Say, agreed

sys.path.insert(0, str(Path(__file__).parent))
from saving_ranks import Ranks, check_steps
from thread_group import on_ranks


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards in small tensors, so that ranks need each other."""
    monkeypatch.setattr(grids, "CHUNK", 16)
    monkeypatch.setattr(grids, "SHARD", 64)


class Unsure:
    """A store that fails, or hangs, when it is asked to write."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mood, self.open = "well", threading.Event()

    def steps(self) -> Steps:
        steps = Steps(str(self.directory))
        draft = steps.draft

        def moody(step: int, tag: str) -> Any:
            made = draft(step, tag)
            for method in ("write", "writing"):
                setattr(made.store, method, self._moody(getattr(made.store, method)))
            return made

        steps.draft = moody  # type: ignore[method-assign]
        return steps

    def _moody(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(name: str, *data: Any) -> Any:
            opens = self.open
            if self.mood == "hangs":
                opens.wait(60)
            if self.mood == "full":
                raise Misuse(f"{name}: {OSError(errno.ENOSPC, 'no space left')}")
            return write(name, *data)

        return wrapped

    def be(self, mood: str) -> None:
        self.mood, before = mood, self.open
        self.open = threading.Event()
        before.set()


def test_what_follows_depends_on_the_set_of_votes_alone() -> None:
    for phases in product(Phase, repeat=3):
        for due in (False, True):
            votes = [Say(phase) for phase in phases[:2]] + [Say(phases[2], due=due)]
            verdict = agreed(votes)
            assert {agreed([votes[i] for i in order]) for order in ((1, 2, 0), (2, 1, 0))} == {
                verdict
            }
            if verdict == Next.START:
                assert set(phases) == {Phase.IDLE}, "one buffer, one save"
            if verdict == Next.PUBLISH:
                assert set(phases) == {Phase.WRITTEN}, "nothing is published that is not written"
            if Phase.FAILED in phases:
                assert verdict == Next.GIVE_UP


@pytest.mark.parametrize(("size", "zero"), [(1, 2), (2, 1), (3, 2), (5, 2), (3, 0)])
def test_what_is_saved_beside_the_steps_is_the_step(tmp_path: Path, size: int, zero: int) -> None:
    ranks = Ranks(size, zero, "3", Unsure(tmp_path).steps)
    for step in range(1, 10):
        ranks.step(step)
        ranks.quiet()
    assert check_steps(tmp_path) == [6, 3], "step 9 is on its way"
    assert ranks.finish() == [""] * size
    assert check_steps(tmp_path) == [9, 6]
    assert [event["step"] for event in ranks.told("saved")] == [3, 6, 9], "each said once"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000000006", "step-000000000009",
    ]  # fmt: skip


def test_the_files_are_the_same_at_any_size(tmp_path: Path) -> None:
    trees = []
    for size, zero in ((1, 0), (3, 2), (4, 1), (3, 0)):
        directory = tmp_path / f"{size}-{zero}"
        ranks = Ranks(size, zero, "", Unsure(directory).steps)
        ranks.step(7)
        assert set(ranks.finish()) == {""}
        files = (path for path in directory.rglob("*") if path.is_file())
        trees.append({str(path.relative_to(directory)): path.read_bytes() for path in files})
    (manifest,) = [name for name in trees[0] if name.endswith("manifest.json")]
    for tree in trees:
        said = tree.pop(manifest)
        assert b'"ranks"' in said
    assert all(tree == trees[0] for tree in trees)


def test_a_full_store_is_told_and_the_next_save_is_due_in_its_time(tmp_path: Path) -> None:
    store = Unsure(tmp_path)
    ranks = Ranks(2, 2, "2", store.steps)
    store.be("full")
    for step in range(1, 7):
        ranks.step(step)
        ranks.quiet()
    assert check_steps(tmp_path) == []
    failed = ranks.told("save_failed")
    assert [event["step"] for event in failed] == [2, 4]
    assert "no space left" in failed[0]["cause"]
    store.be("well")
    for step in range(7, 13):
        ranks.step(step)
        ranks.quiet()
    assert ranks.finish() == ["", ""]
    assert check_steps(tmp_path)[0] == 12
    assert all("part" not in path.name for path in tmp_path.iterdir()), "space is given back"


def test_saves_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    ranks = Ranks(2, 0, "30s", Unsure(tmp_path).steps)
    for step in range(1, 12):
        clock[0] += 10
        ranks.step(step)
        ranks.quiet()
    assert [event["step"] for event in ranks.told("saving")] == [3, 6, 9]
    assert [event["step"] for event in ranks.told("saved")] == [3, 6, 9]


def test_what_is_due_while_a_save_ends_is_taken_with_the_next_step(tmp_path: Path) -> None:
    ranks = Ranks(2, 2, "2", Unsure(tmp_path).steps)
    for step in range(1, 12):
        ranks.step(step)
        ranks.quiet()
    assert [event["step"] for event in ranks.told("saving")] == [2, 5, 8, 11]
    assert not ranks.told("save_skipped")


def test_a_store_that_hangs_holds_nothing_up(tmp_path: Path) -> None:
    store = Unsure(tmp_path)
    ranks, before = Ranks(2, 2, "2", store.steps), threading.active_count()
    store.be("hangs")
    buffers = set()
    for step in range(1, 12):
        ranks.step(step)
        buffers |= {id(s._staging[1]) for s in ranks.savings if s._staging is not None}
    skipped = ranks.told("save_skipped")
    assert [event["step"] for event in skipped] == [4, 6, 8, 10]
    assert all(event["saving"] == 2 and event["ranks"] == [0, 1] for event in skipped)
    ranks.change(3)
    for step in range(12, 16):
        ranks.step(step)
        buffers |= {id(s._staging[1]) for s in ranks.savings if s._staging is not None}
    assert len(buffers) == 2, "no more memory for a store that hangs, whatever happens"
    assert threading.active_count() < before + 11
    store.be("well")
    ranks.quiet()
    for step in range(16, 22):
        ranks.step(step)
        ranks.quiet()
    assert check_steps(tmp_path)[0] >= 16, "what was dropped is due as soon as it can be"
    assert not any(event["step"] == 2 for event in ranks.told("saved"))


def test_the_end_does_not_wait_for_a_store_that_hangs(tmp_path: Path) -> None:
    store = Unsure(tmp_path)
    ranks = Ranks(2, 2, "", store.steps)
    ranks.step(4)
    store.be("hangs")
    ends = on_ranks(2, lambda group: ranks.savings[group.rank].finish(group, limit_s=0.3))
    assert all("nothing got on" in end for end in ends)
    assert len(ranks.told("save_failed")) == 1
    store.be("well")
    ranks.quiet()


def test_a_new_generation_drops_the_save_and_begins_another(tmp_path: Path) -> None:
    store = Unsure(tmp_path)
    ranks = Ranks(3, 2, "5", store.steps)
    for step in range(1, 6):
        store.be("hangs") if step == 5 else "well"
        ranks.step(step)
    ranks.change(2)
    store.be("well")
    for step in range(6, 10):
        ranks.quiet()
        ranks.step(step)
    ranks.quiet()
    (saved,) = ranks.told("saved")
    assert 5 < saved["step"] < 9
    assert check_steps(tmp_path) == [saved["step"]]


def live(seed: int, directory: Path, steps: int = 30) -> Ranks:
    """A job in which anything may happen between two steps."""
    chance, store = random.Random(seed), Unsure(directory)
    ranks = Ranks(chance.randint(1, 4), chance.choice([0, 2]), chance.choice("123"), store.steps)
    for step in range(1, steps):
        ranks.step(step)
        event = chance.random()
        if event < 0.4:
            store.be(chance.choice(["full", "hangs", "well", "well"]))
        elif event < 0.5:
            ranks.change(chance.randint(1, 4))
        elif event < 0.9 and store.mood != "hangs":
            ranks.quiet()
        found = check_steps(directory)
        known = {saving.saved for saving in ranks.savings} - {-1}
        assert not known or max(known) <= max(found), "what a rank takes for saved is there"
    store.be("well")
    ranks.quiet()
    return ranks


@pytest.mark.parametrize("seed", range(6))
def test_every_listed_step_is_whole_whatever_happens(seed: int, tmp_path: Path) -> None:
    ranks = live(seed, tmp_path)
    assert set(ranks.finish()) == {""}
    assert check_steps(tmp_path)[0] == 29


Plant = Callable[[pytest.MonkeyPatch], None]


def buffers_of_a_later_step(patch: pytest.MonkeyPatch) -> None:
    real = module.Save._shards

    def late(self: Any) -> Any:
        time.sleep(0.01)
        self._untrained = self._untrained and self._training.untrained.copy()
        return real(self)

    patch.setattr(module.Save, "_shards", late)


def write_from_what_goes_on_changing(patch: pytest.MonkeyPatch) -> None:
    def fill(self: Any, half: int, group: Any) -> None:
        memory, runs = self._state.memory, self._runs
        (run,) = runs or (None,)
        for role in memory.shape.roles if run else ():
            whole = memory.run_bytes(half, role, run)
            self._buffers[role.name] = whole.view(self._buffers[role.name].dtype)

    patch.setattr(module.Staging, "fill", fill)


def a_round_goes_astray(patch: pytest.MonkeyPatch) -> None:
    real = module.Staging._put

    def put(self: Any, role: Any, run: Any, values: Any) -> None:
        real(self, role, run, values if run in self._own else values[::-1])

    patch.setattr(module.Staging, "_put", put)


@pytest.mark.parametrize(
    "plant",
    [buffers_of_a_later_step, write_from_what_goes_on_changing, a_round_goes_astray],
)  # fmt: skip
def test_a_planted_bug_is_found(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)

    def some() -> None:
        for seed in range(12):
            live(seed, tmp_path / str(seed))

    with pytest.raises((AssertionError, ValueError)):
        some()
