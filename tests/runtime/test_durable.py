"""What a checkpoint of a run holds, which runs may go on from it, and from whose checkpoints."""

import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from outlast.checkpoint import native
from outlast.checkpoint.contents import Array, Contents, Group
from outlast.checkpoint.items import Wanted
from outlast.checkpoint.steps import Steps
from outlast.cluster.errors import Misuse, StateLost
from outlast.runtime.determinism import seed_all
from outlast.runtime.link import SoloLink
from outlast.runtime.run import Run
from outlast.runtime.training import Settings
from outlast.runtime.untrained import Untrained

sys.path.insert(0, str(Path(__file__).parent))
from thread_group import on_ranks


class Model(nn.Module):
    """Trained, tied and frozen parameters, buffers that are kept and one that is not."""

    def __init__(self, flavour: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.full((8, 8), flavour), requires_grad=False)
        self.register_buffer("shift", torch.full((8,), flavour, dtype=torch.float64).float())
        self.register_buffer("count", torch.tensor(int(flavour), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        shift: Any = self.shift
        out: Tensor = self.head((self.embedding(index) + shift) @ self.frozen * self.scale)
        return out


class Told(SoloLink):
    """A job of one that has storage, and remembers what it told."""

    def __init__(self, directory: Path, every: str) -> None:
        super().__init__()
        self.identity = replace(
            self.identity, checkpoint_dir=str(directory), checkpoint_every=every
        )
        self.told: list[dict[str, Any]] = []

    def send(self, **message: Any) -> None:
        self.told.append(message)


def train(
    directory: Path, steps: int, every: str = "2", flavour: float = 1.0, seed: int = 3,
    dtype: torch.dtype | None = None,
) -> tuple[Run, Any, Told]:  # fmt: skip
    link = Told(directory, every)
    seed_all(seed)
    run = Run(link, Settings(seed=seed, leaves=2, grain=64))
    model = run.prepare(
        Model(flavour), optimizer=partial(torch.optim.AdamW, lr=0.01),
        schedule=lambda step: 1 / (1 + step), dtype=dtype,
    )  # fmt: skip
    for step in run.steps(steps):
        with step:
            for batch in step.batches(list(torch.arange(9)), batch_size=3):
                step.backward(nn.functional.cross_entropy(model(batch).float(), batch))
    return run, model, link


class Other:
    """A checkpoint with other contents, as another program may leave it."""

    def __init__(self, source: native.NativeSource, contents: Contents) -> None:
        self.contents, self._source = contents, source

    def read(self, array: Array, start: int, stop: int) -> Any:
        known = self._source.contents.by_key.get(array.key)
        if known is None:
            return np.zeros(stop - start, dtype=array.dtype)
        return self._source.read(known, start, stop)

    def stored_digest(self, array: Array) -> None:
        return None

    def close(self) -> None:
        self._source.close()


def rewritten(directory: Path, change: Callable[[Contents], Contents]) -> Path:
    """The newest step of `directory`, written anew with other contents, as the only one."""
    steps = Steps(str(directory))
    source: Any = steps.open(steps.names()[0])
    fresh = directory.with_name("rewritten")
    with closing(Other(source, change(source.contents))) as other:
        step = fresh / native.name_of(other.contents)
        step.mkdir(parents=True)
        for item in native.plan(other, step, Wanted()):
            item.make(lambda size: None)
    return fresh


def test_what_a_step_says_and_holds(tmp_path: Path) -> None:
    run, model, _ = train(tmp_path, 5)
    steps = Steps(str(tmp_path))
    assert steps.names()[0] == "step-000000000005"
    with closing(steps.open(steps.names()[0])) as source:
        contents = source.contents
        assert [array.key for array in contents.arrays] == [
            *(f"{role}/{name}" for role in ("param", "exp_avg", "exp_avg_sq")
              for name in ("scale", "embedding.weight")),
            "frozen/frozen", "buffer/shift", "buffer/count",
        ]  # fmt: skip
        assert (contents.step, contents.dtype) == (5, "float32")
        assert contents.aliases == {"head.weight": "embedding.weight"}
        (group,) = contents.groups
        assert group.scalars == {"step": 5.0}
        assert group.hyper["lr"] == pytest.approx(0.01 / 6), "that of the next step"
        assert group.hyper["betas"] == [0.9, 0.999]
        assert contents.facts["source"] == {"format": "outlast", "stage": 2, "ranks": 1}
        assert contents.run["losses"] == list(run.training.losses)
        assert (contents.run["seed"], contents.run["leaves"], contents.run["grain"]) == (3, 2, 64)
        found = source.read(contents.by_key["param/embedding.weight"], 0, 72)
        assert found.tobytes() == model.head.weight.detach().numpy().tobytes()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_not_trained_comes_back(tmp_path: Path, dtype: torch.dtype | None) -> None:
    whole, _, _ = train(tmp_path / "whole", 7, "", dtype=dtype)
    train(tmp_path / "cut", 4, dtype=dtype)
    run, model, link = train(tmp_path / "cut", 7, flavour=9.0, dtype=dtype)
    assert run.digest() == whole.digest(), "the steps since are those with the first flavour"
    assert (model.frozen == 1).all()
    assert (model.shift == 1).all()
    assert model.count.item() == 1
    assert run.training.durable.changed
    (loaded,) = [message for message in link.told if message.get("event") == "loaded"]
    assert (loaded["step"], loaded["foreign"]) == (4, False)
    again, _, _ = train(tmp_path / "cut", 7, dtype=dtype)
    assert not again.training.durable.changed, "this script has the same by itself"


def test_a_newcomer_gets_what_is_not_trained_from_the_others() -> None:
    models = [Model(2.0), Model(7.0), Model(2.0)]
    models[1].frozen.data = models[1].frozen.data.t()  # laid out column by column
    untrained = [Untrained(model) for model in models]
    on_ranks(3, lambda group: untrained[group.rank].share(group, 2, [1]))
    for model in models:
        assert (model.frozen == 2).all()
        assert model.count.item() == 2


def foreign(contents: Contents) -> Contents:
    """As another program says it: two groups, in another order, under the other of tied names."""

    def renamed(name: str) -> str:
        return "head.weight" if name == "embedding.weight" else name

    arrays = tuple(replace(a, name=renamed(a.name)) for a in contents.arrays)
    (group,) = contents.groups
    groups = [Group((renamed(name),), group.hyper, group.scalars) for name in group.names]
    return replace(
        contents, arrays=arrays, groups=tuple(reversed(groups)), run={}, facts={},
        aliases={"embedding.weight": "head.weight"},
    )  # fmt: skip


def test_a_run_goes_on_from_another_programs_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, _ = train(tmp_path / "whole", 7, "")
    train(tmp_path / "cut", 4)
    real = Other.read

    def read(self: Other, array: Array, start: int, stop: int) -> Any:
        name = "embedding.weight" if array.name == "head.weight" else array.name
        return real(self, replace(array, name=name), start, stop)

    monkeypatch.setattr(Other, "read", read)
    run, _, link = train(rewritten(tmp_path / "cut", foreign), 7)
    assert run.digest() == whole.digest()
    assert [m["foreign"] for m in link.told if m.get("event") == "loaded"] == [True]


def without(contents: Contents, role: str) -> Contents:
    return replace(contents, run={}, arrays=tuple(a for a in contents.arrays if a.role != role))


def apart(contents: Contents) -> Contents:
    (group,) = contents.groups
    groups = [replace(group, names=(name,), scalars={"step": float(n)})
              for n, name in enumerate(group.names)]  # fmt: skip
    return replace(contents, run={}, groups=tuple(groups))


MISFITS: dict[str, tuple[Callable[[Contents], Contents], str]] = {
    "missing": (lambda c: without(c, "exp_avg"), "it lacks exp_avg/scale, exp_avg/embedding.w"),
    "extra": (
        lambda c: replace(c, run={}, arrays=(*c.arrays, Array("buffer", "more", (2,), "float32"))),
        "it also has buffer/more",
    ),
    "shape": (
        lambda c: replace(c, run={}, arrays=tuple(
            replace(a, shape=(4, 16)) if a.key == "frozen/frozen" else a for a in c.arrays)),
        r"it has frozen/frozen float32\[4, 16\] for float32\[8, 8\]",
    ),
    "groups": (apart, r"its groups differ in .*'step': 0.0"),
    "no groups": (lambda c: replace(c, run={}, groups=()), "its groups do not say step"),
    "seed": (lambda c: replace(c, run=c.run | {"seed": 1}), "seed 1.*--checkpoint-dir"),
    "dtype": (lambda c: replace(c, dtype="bfloat16"), "dtype 'bfloat16'.*another run"[:16]),
    "lineage": (lambda c: replace(c, run=c.run | {"lineage": [7]}), "no facts of a run"),
    "losses": (lambda c: replace(c, run=c.run | {"losses": ["?"]}), "no facts of a run"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, name: str) -> None:
    change, said = MISFITS[name]
    train(tmp_path / "steps", 2)
    with pytest.raises(StateLost, match=said):
        train(rewritten(tmp_path / "steps", change), 4)


def test_a_node_without_the_flag_is_told_of(tmp_path: Path) -> None:
    run, _, link = train(tmp_path, 1)
    durable = run.training.durable
    assert durable.heed([durable.say(4), {}], 4) is None
    skipped = [message for message in link.told if message.get("event") == "save_skipped"]
    assert [(message["step"], message["ranks"]) for message in skipped] == [(4, [1])]


def test_a_step_that_one_rank_does_not_see_is_not_passed_over(tmp_path: Path) -> None:
    run, _, _ = train(tmp_path / "none", 1)

    class Meeting:
        """A communicator of two ranks, the other of which sees two steps."""

        rank = 1

        def gather_json(self, value: Any) -> list[Any]:
            done = isinstance(value, list) and len(value) == 2 and isinstance(value[0], bool)
            theirs = [True, ""] if done else ["step-000000000009", "step-000000000003"]
            return [value, theirs]

    meeting: Any = Meeting()
    names = run.training.durable.names(meeting)
    assert names == ("step-000000000009", "step-000000000003", "step-000000000001")


def test_a_run_that_was_stopped_before_its_first_step_begins(tmp_path: Path) -> None:
    stopped, _, _ = train(tmp_path, 0)
    durable, group = stopped.training.durable, stopped.training.membership.generation.communicator
    assert durable.saving.finish(group) == ""
    assert Steps(str(tmp_path)).names() == ["step-000000000000"]
    run, _, link = train(tmp_path, 4)
    assert [told["step"] for told in link.told if told.get("event") == "loaded"] == [0]
    alone, _, _ = train(tmp_path / "alone", 4)
    assert run.digest() == alone.digest()


def test_who_goes_on_from_an_older_step_says_why(tmp_path: Path) -> None:
    train(tmp_path, 4)
    newest, *_ = Steps(str(tmp_path)).names()
    for shard in (tmp_path / newest / "param" / "scale").glob("c*"):
        shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    _, _, link = train(tmp_path, 6)
    told = [(told["step"], told["cause"]) for told in link.told
            if told.get("event") == "passed_over"]  # fmt: skip
    assert [step for step, _ in told] == [2]
    assert "param/scale" in told[0][1]
    assert newest in told[0][1]


def test_a_buffer_that_cannot_be_stored_is_known_before_the_first_step(tmp_path: Path) -> None:
    class Odd(Model):
        def __init__(self) -> None:
            super().__init__(1.0)
            self.register_buffer("odd", torch.zeros(2, dtype=torch.complex32))

    run = Run(Told(tmp_path, "2"), Settings(leaves=2, grain=64))
    with pytest.raises(Misuse, match="complex32"):
        run.prepare(Odd(), optimizer=partial(torch.optim.AdamW, lr=0.01))


def test_a_place_that_takes_nothing_is_told_at_the_start(tmp_path: Path) -> None:
    nowhere = Path("/proc/outlast")  # nothing can be made there, and nothing is there
    _, _, link = train(nowhere, 1, "100")
    deadline = time.monotonic() + 30
    while not (told := [m for m in link.told if m.get("event") == "save_failed"]):
        assert time.monotonic() < deadline
    assert "takes no checkpoints" in told[0]["cause"]


def test_other_numerics_are_told(tmp_path: Path) -> None:
    train(tmp_path / "steps", 2)

    def other(contents: Contents) -> Contents:
        return replace(contents, run=contents.run | {"numerics": "of another age"})

    with pytest.warns(UserWarning, match="of another age.*the bits will be others"):
        train(rewritten(tmp_path / "steps", other), 3)
