"""What a checkpoint says of the run that wrote it, and whether a run can go on from it.

The bits of every later step follow from the state, the seed, the leaves and the grain; so these
must be the same where a run goes on. Of a checkpoint that another program wrote, only what it holds
has to fit.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from outlast.checkpoint.contents import Array, Contents, Group
from outlast.checkpoint.records import Averaging, Lineage, SlotRecord
from outlast.cluster.errors import Corrupt, Misuse
from outlast.runtime.determinism import numerics
from outlast.runtime.islands.outer_optimizer import OUTER_ROLES
from outlast.runtime.staging import stored_arrays

if TYPE_CHECKING:
    from outlast.runtime.training import Training

_SAME = ("seed", "leaves", "grain")
_RULE = "samples and random numbers of a leaf follow from (seed, step, leaf) alone"
_SHOWN = 5  # names in a message


def contents_of(training: "Training", record: SlotRecord) -> Contents:
    """The contents of the step that `record` has committed."""
    state, settings = training.state, training.settings
    arrays = [*stored_arrays(state.memory.shape, state.space), *training.untrained.arrays]
    names = tuple(tensor.name for tensor in state.space.tensors)
    hyper = training.optimizer.hyper | {"lr": training.schedule.rate(record.step)}
    # Generations begin anew with every start, so a later one only needs their order.
    lineage = [replace(one, generation=number) for number, one in enumerate(record.lineage)]
    run = {name: getattr(settings, name) for name in _SAME} | {
        "losses": list(record.losses),
        "norms": list(record.norms),
        "lineage": [one.as_json() for one in lineage],
        "outer": record.outer,
        "learning_rate": training.optimizer.base_rate,
        "clip": settings.clip,
        "numerics": numerics(),
        "random": _RULE,
    }
    return Contents(
        record.step,
        tuple(arrays),
        (Group(names, hyper, record.scalars),),
        dtype=str(training.model.dtype).removeprefix("torch."),
        aliases=training.model.aliases,
        facts={"source": {"format": "outlast", "stage": settings.zero,
                          "ranks": len(training.membership.holders)}},
        run=run,
    )  # fmt: skip


def fitting(training: "Training", contents: Contents, where: object) -> dict[str, Array]:
    """Key of every array that this run has -> the array of a checkpoint that goes there.

    Raises:
        Misuse: it is of another run, or of another model.
    """
    state, settings = training.state, training.settings
    dtype = str(training.model.dtype).removeprefix("torch.")
    mine = {name: getattr(settings, name) for name in _SAME} | {"dtype": dtype}
    theirs = contents.run | {"dtype": contents.dtype}
    differ = [f"{name} {theirs.get(name)!r}" for name in mine if theirs.get(name) != mine[name]]
    if contents.run and differ:
        raise Misuse(
            f"{where} is of another run ({', '.join(differ)}): take its model and its arguments of "
            "outlast.init, or another --checkpoint-dir"
        )
    if contents.run.get("numerics", numerics()) != numerics():
        warnings.warn(
            f"{where} was computed with {contents.run['numerics']}, this rank computes with "
            f"{numerics()}: the bits will be others than those of a run without a break",
            stacklevel=2,
        )
    wanted = [*stored_arrays(state.memory.shape, state.space), *training.untrained.arrays]
    # A job may become an island, or an island go on alone.
    there = {array.role for array in contents.arrays}
    wanted = [array for array in wanted if array.role in there or array.role not in OUTER_ROLES]
    mine_too = {array.role for array in wanted}
    found = {array.key: array for array in contents.arrays}
    found |= {f"{a.role}/{name}": a for a in contents.arrays
              for name, target in contents.aliases.items() if target == a.name}  # fmt: skip
    pairs = {array.key: (array, found.get(array.key)) for array in wanted}
    missing = [key for key, (_, array) in pairs.items() if array is None]
    other = [f"{key} {b.dtype}{list(b.shape)} for {a.dtype}{list(a.shape)}"
             for key, (a, b) in pairs.items()
             if b is not None and (a.shape, a.dtype) != (b.shape, b.dtype)]  # fmt: skip
    used = {array for _, array in pairs.values()}
    unread = [array for array in contents.arrays if array not in used]
    extra = [a.key for a in unread if a.role in mine_too or a.role not in OUTER_ROLES]
    scalars = {tuple(sorted(group.scalars.items())) for group in contents.groups}
    told_of = {name for group in scalars for name, _ in group}
    # Before the first step there is nothing to count.
    lacking = sorted({*training.optimizer.state.scalars} - told_of) if contents.step else []
    apart = [str(dict(each)) for each in scalars] if len(scalars) > 1 else []
    flaws = [
        ("it lacks", missing), ("it also has", extra), ("it has", other),
        ("its groups do not say", lacking), ("its groups differ in", apart),
    ]  # fmt: skip
    if told := "; ".join(f"{what} {_some(items)}" for what, items in flaws if items):
        raise Misuse(f"{where} does not fit this model and its optimizer: {told}")
    return {key: array for key, (_, array) in pairs.items() if array is not None}


def record_of(contents: Contents, where: object) -> SlotRecord:
    """The facts of a checkpoint as memory keeps them.

    Raises:
        Corrupt: they are of other kinds than a run writes.
    """
    run = contents.run
    scalars = contents.groups[0].scalars if contents.groups else {}
    try:
        # Generations began anew: what was averaged before is older than all of them.
        count = len(run.get("lineage", ()))
        lineage: Lineage = tuple(
            replace(Averaging.from_json(one), generation=number - count + 1)
            for number, one in enumerate(run.get("lineage", ()))
        )
        losses = [float(loss) for loss in run.get("losses", ())]
        norms = tuple(float(norm) for norm in run.get("norms", ()))
        scalars = {str(name): float(value) for name, value in scalars.items()}
        outer = dict(run.get("outer", {}))
    except (ValueError, TypeError, KeyError, AttributeError) as cause:
        raise Corrupt(f"{where} at byte 0: no facts of a run: {cause}") from cause
    return SlotRecord(contents.step, 0, (), (), {}, scalars, losses, norms, lineage, outer)


def _some(items: Sequence[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
