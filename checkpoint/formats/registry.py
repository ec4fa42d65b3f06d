"""The formats by name, and which of them a directory holds."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from outlast.checkpoint.contents import PARAM, UNTRAINED, Array, Contents
from outlast.checkpoint.items import Wanted
from outlast.checkpoint.source import Source
from outlast.checkpoint.store import store_at
from outlast.cluster.errors import Misuse

OPTIMIZER, GROUPS, FACTS, RUN = "optimizer", "groups", "facts", "run"


@dataclass(frozen=True, slots=True)
class Format:
    """A format's modules, which are imported when they are used.

    Args:
        module: has `find(path)` and `open(path, follow)`, maybe `disagreements(source)`.
        writing: has `plan(source, directory, wanted)`, `name_of(contents)` and `LATEST`, maybe
            `stored(array, contents, wanted)`: what becomes of an array. "" for `module`.
        choices: fields of `Wanted` that are for it.
        lacks: what it has no place for.
    """

    name: str
    module: str
    writing: str = ""
    choices: frozenset[str] = frozenset()
    lacks: frozenset[str] = frozenset({RUN})

    @property
    def reader(self) -> ModuleType:
        """Its reading module."""
        return import_module(f"outlast.checkpoint.{self.module}")

    @property
    def writer(self) -> ModuleType:
        """Its writing module."""
        return import_module(f"outlast.checkpoint.{self.writing or self.module}")

    def stored(self, contents: Contents, wanted: Wanted) -> dict[str, Array]:
        """Key -> the array as this format holds it, for all that it holds."""
        change: Any = getattr(self.writer, "stored", lambda array, contents, wanted: array)
        kept = {PARAM, *UNTRAINED} if OPTIMIZER in self.lacks else {a.role for a in contents.arrays}
        return {a.key: change(a, contents, wanted) for a in contents.arrays if a.role in kept}


_ALL = (
    Format("native", "native", lacks=frozenset()),
    Format("universal", "formats.universal"),
    Format("deepspeed", "formats.deepspeed", "formats.deepspeed_write",
           choices=frozenset({"ranks", "stage"})),
    Format("megatron", "formats.megatron", choices=frozenset({"ranks"})),
    Format("dcp", "formats.dcp", choices=frozenset({"ranks"})),
    Format("safetensors", "formats.safetensors", choices=frozenset({"dtype"}),
           lacks=frozenset({OPTIMIZER, GROUPS, FACTS, RUN})),
)  # fmt: skip
FORMATS = {each.name: each for each in _ALL}  # what is recognised first is first


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint at `path`, or at a URL, of `format`, open for reading."""

    format: Format
    path: Path | str
    source: Source


def open_checkpoint(place: Path | str, name: str | None = None, follow: bool = False) -> Opened:
    """Open what lies at a path: of the format `name`, or of the one that it looks like.

    At a URL only the native format is read.

    Raises:
        Misuse: it is none, or there are two of different formats.
        Corrupt: it is damaged.
    """
    if "://" in str(place):
        return _remote(str(place), FORMATS["native"])
    path = Path(place)
    tried = [FORMATS[name]] if name else list(FORMATS.values())
    found = [(each, place) for each in tried if (place := each.reader.find(path))]
    if not found:
        what = f"a checkpoint of {name}" if name else f"one of {', '.join(FORMATS)}"
        why = "" if path.exists() else ": it does not exist"
        for file in (path / each.writer.LATEST for each in tried if each.writer.LATEST):
            if file.is_file():
                why = f": {file} names {file.read_text(errors='replace')[:99]!r}"
        raise Misuse(f"{path} is not {what}{why}")
    (first, place), others = found[0], [each.name for each, at in found if at != found[0][1]]
    if others:
        raise Misuse(f"{path} has {first.name} and {', '.join(others)}: choose with --from")
    return Opened(first, place, first.reader.open(place, follow))


def _remote(url: str, native: Format) -> Opened:
    """A step at a URL, or the newest of those below it."""
    store = store_at(url)
    if not store.holds(native.reader.MANIFEST):
        names = native.reader.complete(store)
        if not names:
            raise Misuse(f"{url} has no native checkpoint: another format is copied here first")
        store = store.within(names[0])
    place = store.place("")
    place = place.rstrip("/") if isinstance(place, str) else place
    return Opened(native, place, native.reader.NativeSource(store))
