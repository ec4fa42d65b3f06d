"""The steps of a run on storage, newest first; a step is listed only when it is whole.

    URL/step-000000000120/                   complete
        step-000000000130.4-1a2b3c4d.part/   a draft, written by the ranks of generation 4

A directory gets its final name when everything in it is durable; if the step is there already, a
name with the tag, step-000000000130.4-1a2b3c4d, and the one before goes then. An object store
cannot rename: there a draft is written where it stays, under that name, and is listed when its
manifest is there. The tag keeps a writer that is late apart from the next try, and what is complete
from what is being written, also by another start of the job.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from uuid import uuid4

from outlast.checkpoint.contents import Contents
from outlast.checkpoint.formats.folder import corrupt
from outlast.checkpoint.grid import grid
from outlast.checkpoint.manifest import Manifest
from outlast.checkpoint.native import (
    GROUP,
    MANIFEST,
    NAME,
    NativeSource,
    complete,
    shards_of,
    write_metadata,
)
from outlast.checkpoint.pool import at_once
from outlast.checkpoint.source import Tick
from outlast.checkpoint.store import Directory, Store, read_whole, store_at, synchronise
from outlast.cluster.errors import Corrupt, Misuse

# Nothing else is removed.
_OURS = re.compile(r"step-\d{12}(\.\d+-[0-9a-f]{8}((\.old)?\.part)?)?")
_NOTES = "__notes"  # zarr forbids such a name, so no array has it

Digests = Mapping[str, Mapping[int, str]]  # key of an array -> shard -> digest


class Steps:
    """The steps below `url`: a path, or a URL that fsspec knows.

    Args:
        keep: complete steps that stay when one more is published.
    """

    def __init__(self, url: str, keep: int = 2) -> None:
        self.url, self.keep = url, keep
        self.store = store_at(url)

    def names(self) -> list[str]:
        """Of the complete steps, newest first; Misuse where they cannot be listed."""
        return complete(self.store)

    def open(self, name: str) -> NativeSource:
        """A complete step, for reading.

        Raises:
            Corrupt: it is not what was written.
        """
        store, found = self.store.within(name), NAME.fullmatch(name)
        source = NativeSource(store)
        if found is None or int(found[1]) != source.contents.step:
            raise corrupt(store.place(MANIFEST), 0, f"of step {source.contents.step}")
        return source

    def draft(self, step: int, tag: str) -> "Draft":
        """A step to be written by the ranks of a generation, each of which calls this; `tag` is
        "<number of the generation>-<8 hexadecimal digits>", which no other one of any job has."""
        return Draft(self, step, tag)

    def probe(self) -> None:
        """Write a small file and remove it; Misuse, with what to do, where that cannot be done."""
        name = f"step-{0:012}.0-{uuid4().hex[:8]}.part"  # `discard` takes it if a crash leaves it
        try:
            self.store.write(name, b"probe")
            self.store.remove(name)
        except Misuse as error:
            what = "name a directory, or the URL of a prefix, where files can be made and removed"
            raise Misuse(f"{self.url} takes no checkpoints: {error}: {what}") from error

    def discard(self) -> None:
        """Remove what was not completed; no draft is being written."""
        self._clear(lambda names: names)

    def retire(self, newest: str) -> None:
        """Remove what is too old now that `newest` is there, other tries of it, and all drafts. A
        step beyond it is bad, or of another course of the run: it stays, and does not count."""
        step = _step(newest)

        def keeps(names: list[str]) -> list[str]:
            older = [name for name in names if _step(name) < step]
            return [newest, *older[: self.keep - 1], *(n for n in names if _step(n) > step)]

        self._clear(keeps)

    def _clear(self, keeps: Callable[[list[str]], list[str]]) -> None:
        """Remove all drafts, and the steps that are not kept; a manifest goes first, so none is
        half listed. What cannot be removed hinders no other.

        Raises:
            Misuse: something could not be removed.
        """
        found, errors = self.store.children(), []
        kept = keeps(self.names())  # after `found`: what is completed meanwhile is among them
        for name in found:
            if _OURS.fullmatch(name) and name not in kept:
                try:
                    self.store.remove(self._aside(name), first=MANIFEST)
                except Misuse as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def _aside(self, name: str) -> str:
        """The name of a draft that goes: first it gets another one, so that somebody who is late
        neither publishes what is left of it nor keeps it from being removed."""
        aside = f"{name.removesuffix('.part').removesuffix('.old')}.old.part"
        if not (isinstance(self.store, Directory) and name.endswith(".part")):
            return name
        with suppress(OSError):  # the other name is taken, or somebody else was faster
            (self.store.path / name).rename(self.store.path / aside)
        return aside


class Draft:
    """A step that is being written: shards by `native.write_shard` to `store`, a note by every
    rank, and `publish` by one when all have left theirs."""

    def __init__(self, steps: Steps, step: int, tag: str) -> None:
        self._steps, self.step = steps, step
        self.name = f"step-{step:012}"
        assert NAME.fullmatch(f"{self.name}.{tag}"), tag
        self._part = f"{self.name}.{tag}.part"
        if not isinstance(steps.store, Directory):
            self.name = self._part = f"{self.name}.{tag}"
        self.store: Store = steps.store.within(self._part)

    def note(self, rank: int, shards: Digests) -> None:
        """Leave the digests of all shards that a rank wrote, which are durable then; Misuse where
        that fails."""
        self.store.settle()
        self.store.write(f"{_NOTES}/{rank:05}.json", json.dumps(shards).encode())

    def publish(self, contents: Contents, tick: Tick = lambda size: None) -> str:
        """Complete it, remove what is too old; its name. `tick` hears of every file.

        Raises:
            Misuse: a shard was not noted, or twice, or the store fails: it is not listed then.
        """
        assert contents.step == self.step, f"{contents.step}, not {self.step}"
        shards = self._noted(contents)
        write_metadata(self.store, contents, tick)
        self.store.remove(_NOTES)
        self.store.write(MANIFEST, Manifest(contents, shards).to_bytes())
        files = [shard.name for array in contents.arrays for shard in shards_of(array)]
        try:  # Nothing is written behind this, but somebody else may have removed some of it.
            at_once(partial(self._find, name, tick) for name in [GROUP, *files])
        except Misuse:
            self.store.remove(MANIFEST)
            raise
        if isinstance(self._steps.store, Directory):
            self._rename(self._steps.store.path)
        with suppress(Misuse):  # it is there, whatever became of others: the next one tries again
            self._steps.retire(self.name)
        return self.name

    def _noted(self, contents: Contents) -> dict[str, tuple[str, ...]]:
        """The digests of all shards, each of which one rank has noted."""
        noted: dict[tuple[str, int], str] = {}
        for name in self.store.children(_NOTES):
            for at, digest in self._note(f"{_NOTES}/{name}").items():
                if at in noted:
                    raise Misuse(f"{self.name}: two ranks wrote shard {at[1]} of {at[0]}")
                noted[at] = digest
        counts = {array.key: len(grid(array.shape).shards()) for array in contents.arrays}
        wanted = {(key, index) for key, count in counts.items() for index in range(count)}
        if wrong := sorted(wanted ^ noted.keys()):
            who = "nobody" if wrong[0] in wanted else "somebody"
            raise Misuse(f"{self.name}: {who} wrote shard {wrong[0][1]} of {wrong[0][0]}")
        return {key: tuple(noted[key, index] for index in range(n)) for key, n in counts.items()}

    def _note(self, name: str) -> dict[tuple[str, int], str]:
        try:
            note = json.loads(read_whole(self.store, name))
            return {(key, int(at)): str(digest) for key, digests in note.items()
                    for at, digest in digests.items()}  # fmt: skip
        except (Corrupt, ValueError, TypeError, AttributeError) as error:
            raise Misuse(f"{self.store.place(name)} is no note: {error}") from error

    def _find(self, name: str, tick: Tick) -> None:
        if not self.store.holds(name):
            raise Misuse(f"{self.store.place(name)} was removed meanwhile")
        tick(0)

    def _rename(self, root: Path) -> None:
        part = root / self._part
        try:
            # It was whole: it is so under its name, or has got another one meanwhile (`_aside`).
            synchronise(Path(folder) for folder, _, _ in os.walk(part))
            if os.path.lexists(root / self.name):  # the same step, perhaps damaged: it goes later
                self.name = part.stem
            part.rename(root / self.name)
            synchronise([root])
        except OSError as error:
            raise Misuse(f"{root / self.name} cannot be published: {error}") from error


def _step(name: str) -> str:
    return name[: len("step-000000000000")]
