"""What a conversion keeps and what it cannot, before; and that it did, after.

Nothing is taken on trust: the result is opened by the reader of its format, its contents are
compared with the source's, and so is every element, in the precision that the format stores.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from outlast.checkpoint.contents import UNTRAINED, Array, Contents
from outlast.checkpoint.dtypes import Values, cast, dtype_of
from outlast.checkpoint.formats.registry import FACTS, GROUPS, OPTIMIZER, RUN, Format, Opened
from outlast.checkpoint.grid import grid
from outlast.checkpoint.items import Wanted
from outlast.checkpoint.pool import spread
from outlast.checkpoint.source import Source, Tick, digest
from outlast.cluster.errors import Corrupt, Misuse

KEPT_FACTS = ("lr_scheduler", "client_state")


def left_behind(contents: Contents, target: Format, wanted: Wanted) -> Iterator[str]:
    """What the source has and the format has no place for, one sentence each."""
    stored = target.stored(contents, wanted)
    casts = Counter((a.role, a.dtype, stored[a.key].dtype) for a in contents.arrays
                    if a.key in stored)  # fmt: skip
    for (role, was, now), count in casts.items():
        if not np.can_cast(dtype_of(was), dtype_of(now), "safe"):
            yield f"{role}: {count} of {was} are rounded to {now}"
    roles = contents.optimizer_roles
    if OPTIMIZER in target.lacks and roles:
        yield f"{target.name} holds weights only: {', '.join(roles)} stay behind"
    if GROUPS in target.lacks and contents.groups:
        yield f"{target.name} has no hyper-parameters: {len(contents.groups)} groups stay behind"
    if FACTS in target.lacks and (facts := [f for f in KEPT_FACTS if contents.facts.get(f)]):
        yield f"{target.name} has no place for {', '.join(facts)}"
    if RUN in target.lacks and contents.run:
        yield f"only native keeps what outlast knows of a run: {', '.join(contents.run)}"


def differences(
    contents: Contents, result: Contents, target: Format, wanted: Wanted
) -> Iterator[str]:
    """How `result` is not what `contents` must become in `target`; nothing where all is right."""
    expected = target.stored(contents, wanted)
    for key in sorted(expected.keys() ^ result.by_key.keys()):
        yield f"{key} is {'missing' if key in expected else 'too much'}"
    for key in expected.keys() & result.by_key.keys():
        if expected[key] != result.by_key[key]:
            yield f"{expected[key]} became {result.by_key[key]}"
    if contents.aliases != result.aliases:
        yield f"tied names {contents.aliases} became {result.aliases}"
    if contents.step != result.step:
        yield f"step {contents.step} became {result.step}"
    if GROUPS not in target.lacks:
        if [g.names for g in contents.groups] != [g.names for g in result.groups]:
            yield "the parameter groups hold other parameters"
        for index, (was, now) in enumerate(zip(contents.groups, result.groups, strict=False)):
            yield from _changed(f"group {index}", was.hyper | was.scalars, now.hyper | now.scalars)
    if FACTS not in target.lacks:
        facts = {name: contents.facts[name] for name in KEPT_FACTS if contents.facts.get(name)}
        yield from _changed("facts", facts, result.facts)


def _changed(what: str, was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name, value in was.items():
        if name not in now or json.dumps(value) != json.dumps(now[name]):
            yield f"{what}: {name} {value!r} became {now.get(name)!r}"


def unlike(source: Source, result: Source, workers: int, tick: Tick) -> Iterator[str]:
    """Arrays of `result` whose elements are not those of `source`, cast to the result's dtype."""

    def compare(was: Array, now: Array, start: int, stop: int, tick: Tick) -> int:
        values = cast(source.read(was, start, stop), now.dtype).view("u1")
        unequal = np.count_nonzero(values != result.read(now, start, stop).view("u1"))
        tick(values.nbytes)
        return unequal

    tasks = [
        (now, partial(compare, source.contents.by_key[now.key], now, start, stop))
        for now in result.contents.arrays
        for start, stop in grid(now.shape).shards()
    ]
    for array, unequal in spread(tasks, workers, tick):
        if unequal:
            yield f"{array.key}: {unequal} bytes are not the source's"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a whole reading of an array says: its digest, and its elements that are no numbers."""

    digest: str
    unfinite: int


def survey(opened: Opened, workers: int, tick: Tick) -> Iterator[tuple[Array, Finding | Corrupt]]:
    """Read every array, in any order: a finding, or the error that its file is."""
    source = opened.source

    def look(array: Array, tick: Tick) -> Finding | Corrupt:
        unfinite = 0

        def count(values: Values) -> None:
            nonlocal unfinite
            if array.dtype.startswith(("float", "bfloat", "complex")):
                unfinite += int(np.count_nonzero(~np.isfinite(values)))
            tick(values.nbytes)

        try:
            return Finding(digest(source, array, count), unfinite)
        except Corrupt as error:
            return error

    yield from spread([(a, partial(look, a)) for a in source.contents.arrays], workers, tick)


def problems(opened: Opened, workers: int, tick: Tick) -> Iterator[str]:
    """What is wrong with a checkpoint, one line each; reads all of it."""
    source = opened.source
    for array, found in survey(opened, workers, tick):
        if isinstance(found, Corrupt):
            yield f"{array.key}: {found}"
            continue
        if (said := source.stored_digest(array)) is not None and said != found.digest:
            yield f"{array.key}: its digest is {found.digest}, not {said} as the manifest says"
        if found.unfinite and array.role not in UNTRAINED:
            yield f"{array.key}: {found.unfinite} of {array.numel} elements are not finite"
    yield from incomplete(source.contents)
    yield from disagreements(opened)


def incomplete(contents: Contents) -> Iterator[str]:
    """Parameters without the optimizer's state that others have."""
    named = {array.name for array in contents.of("param")}
    for role in contents.optimizer_roles:
        lacking = named - {array.name for array in contents.of(role)}
        if lacking:
            yield f"{len(lacking)} parameters have no {role}: {min(lacking)}, …"


def disagreements(opened: Opened) -> Iterator[str]:
    """Where a checkpoint holds the same thing twice and differently, as far as its format can."""
    check: Callable[[Source], Iterator[str]] | None
    check = getattr(opened.format.reader, "disagreements", None)
    try:
        yield from check(opened.source) if check else ()
    except Corrupt as error:
        yield str(error)


def planned(opened: Opened, target: Format, wanted: Wanted) -> tuple[int, list[str]]:
    """Bytes that would be written in the format `target`, or why nothing can be."""
    with TemporaryDirectory() as nowhere:
        try:
            items = target.writer.plan(opened.source, Path(nowhere), wanted)
        except (Misuse, Corrupt) as error:
            return 0, [str(error)]
    return sum(item.size for item in items), []
