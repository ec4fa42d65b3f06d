"""The same two runs of DeepSpeed by its own path, the universal format, and by ours: what is left.

Run with -s for the table of docs/checkpoints.md.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import deepspeed_runs as runs
import pytest
from test_deepspeed_write import same, written

from outlast.checkpoint.formats import deepspeed, deepspeed_write

# Two groups, frozen parameters and buffers; the second on another number of ranks.
CASES = [runs.CASES["z3"], replace(runs.CASES["z2_round_robin"], world=3)]
TITLES = {"z3": "ZeRO 3, 2 ranks", "z2_round_robin": "ZeRO 2, round robin, 2 -> 3 ranks"}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How much of a run DeepSpeed has after it loaded a converted checkpoint."""

    trained: str
    frozen: str
    buffers: str
    groups: str
    step: int
    losses: str

    def __str__(self) -> str:
        return " | ".join(str(getattr(self, name)) for name in self.__dataclass_fields__)


def kept(before: Path, after: Path) -> Kept:
    truth, found = runs.truth(before), runs.truth(after)
    told, now = runs.facts(before), runs.facts(after)

    def of(*roles: str) -> str:
        keys = [key for key in truth if key.split("/")[0] in roles]
        return f"{sum(same(truth[key], found[key]) for key in keys)} of {len(keys)}"

    groups = [was == is_ for was, is_ in zip(told["groups"], now["groups"], strict=True)]
    return Kept(
        trained=of("param", "exp_avg", "exp_avg_sq"), frozen=of("frozen"), buffers=of("buffer"),
        groups=f"{sum(groups)} of {len(groups)}", step=int(now["step_after"][0]),
        losses="same" if now["losses"] == told["losses"] else "others",
    )  # fmt: skip


@pytest.fixture(scope="module")
def table(
    deepspeed_saves: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Kept]:
    """What is kept, by run and path."""
    directory = tmp_path_factory.mktemp("beside")
    jobs, theirs = [], directory / "theirs"
    for case in CASES:
        start = deepspeed.find(deepspeed_saves / case.name)
        jobs.append(runs.universal(start, theirs / case.name))
        ours = directory / "ours" / case.name
        written(deepspeed.open(start), ours, deepspeed_write, ranks=case.world, stage=case.stage)
        jobs.append(runs.resume(case, ours, directory / "ours" / f"{case.name}-run"))
        into = directory / "theirs" / f"{case.name}-run"
        jobs.append(runs.resume(case, theirs / case.name, into, universal=True))
    runs.run(jobs)
    found = {
        (case.name, path): kept(deepspeed_saves / case.name, directory / path / f"{case.name}-run")
        for case in CASES
        for path in ("theirs", "ours")
    }
    names = {"theirs": "ds_to_universal, then load_universal", "ours": "outlast convert, then load"}
    for (name, path), row in found.items():
        print(f"| {TITLES[name]} | {names[path]} | {row} |")
    return found


def test_ours_loses_nothing(table: dict[tuple[str, str], Kept]) -> None:
    whole = {"trained": "42 of 42", "frozen": "2 of 2", "buffers": "2 of 2", "groups": "2 of 2"}
    assert table["z3", "ours"] == Kept(**whole, step=6, losses="same")
    # Three ranks read other batches than two: their losses are others.
    assert table["z2_round_robin", "ours"] == Kept(**whole, step=6, losses="others")


def test_theirs_loses_silently(table: dict[tuple[str, str], Kept]) -> None:
    """If this fails because DeepSpeed got better, so does docs/checkpoints.md."""
    rest = {"frozen": "0 of 2", "buffers": "0 of 2"}
    assert table["z3", "theirs"] == Kept(
        trained="42 of 42", **rest, groups="1 of 2", step=9, losses="others"
    )
    round_robin = table["z2_round_robin", "theirs"]
    assert int(round_robin.trained.split()[0]) < 12
    assert replace(round_robin, trained="") == Kept(
        trained="", **rest, groups="2 of 2", step=6, losses="others"
    )
