"""The steps of a run on storage, newest first; a step is listed only when it is whole.

    URL/step-000000000120/                   complete
        step-000000000130.4-1a2b3c4d.part/   a draft, written by the ranks of generation 4

A directory gets its final name when everything in it is durable. An object store cannot rename:
there a draft is written where it stays, step-000000000130.4-1a2b3c4d, and is listed when its
manifest is there. The tag in the name keeps a writer that is late apart from the next try, and
what is complete apart from what is being written, also by another job.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from outlast.checkpoint.contents import Contents
from outlast.checkpoint.formats.folder import corrupt
from outlast.checkpoint.grid import grid
from outlast.checkpoint.manifest import Manifest
from outlast.checkpoint.native import (
    AT_ONCE,
    MANIFEST,
    NAME,
    NativeSource,
    complete,
    shards_of,
    write_metadata,
)
from outlast.checkpoint.pool import at_once
from outlast.checkpoint.store import Directory, Store, read_whole, store_at
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

    def discard(self) -> None:
        """Remove what was not completed; no draft is being written."""
        self.clear({*self.names()})

    def clear(self, kept: set[str]) -> None:
        """Remove all steps and drafts but those; a manifest goes first, so none is half listed."""
        for name in self.store.children():
            if _OURS.fullmatch(name) and name not in kept:
                self.store.remove(self._aside(name), first=MANIFEST)

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
        self._part = f"{self.name}.{tag}.part"
        if not isinstance(steps.store, Directory):
            self.name = self._part = f"{self.name}.{tag}"
        self.store: Store = steps.store.within(self._part)

    def note(self, rank: int, shards: Digests) -> None:
        """Leave the digests of all shards that a rank wrote; Misuse where that fails."""
        self.store.write(f"{_NOTES}/{rank:05}.json", json.dumps(shards).encode())

    def publish(self, contents: Contents) -> str:
        """Complete it, remove what is too old; its name.

        Raises:
            Misuse: a shard was not noted, or twice, or the store fails: it is not listed then.
        """
        assert contents.step == self.step, f"{contents.step}, not {self.step}"
        shards = self._noted(contents)
        write_metadata(self.store, contents)
        self.store.remove(_NOTES)
        self.store.write(MANIFEST, Manifest(contents, shards).to_bytes())
        if isinstance(self._steps.store, Directory):
            files = [shard.name for array in contents.arrays for shard in shards_of(array)]
            self._rename(self._steps.store.path, files)
        self._steps.clear({self.name, *self._steps.names()[: self._steps.keep]})
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

    def _rename(self, root: Path, files: list[str]) -> None:
        part, path = root / self._part, root / self.name
        try:
            # Nothing is written behind this: what is whole here is whole under its name, or it has
            # got another one meanwhile (`_aside`) and cannot be renamed.
            if gone := [name for name in files if not (part / name).is_file()]:
                raise FileNotFoundError(f"{gone[0]} was removed meanwhile")
            at_once((partial(_sync, folder) for folder, _, _ in os.walk(part)), AT_ONCE)
            if path.exists():  # the same step, which may have been damaged since
                path.rename(part.with_suffix(".old.part"))
            part.rename(path)
            _sync(root)
        except OSError as error:
            raise Misuse(f"{path} cannot be published: {error}") from error


def _sync(directory: Path | str) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
