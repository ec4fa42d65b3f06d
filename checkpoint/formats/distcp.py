"""Shards of torch.distributed.checkpoint: boxes of tensors in files, and the `.metadata` of all.

Every box is a file of torch.save inside a `.distcp`; `.metadata` is a pickle that says which box of
which tensor lies where, and is the last to be written. FSDP2 and Megatron differ in the names that
they give to tensors: see `dcp` and `megatron`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise, product
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np

from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.dtypes import Values, dtype_of
from outlast.checkpoint.formats.folder import Folder, corrupt
from outlast.checkpoint.formats.pickle_writer import dump
from outlast.checkpoint.formats.pickles import BYTES, Opaque, Size, Symbol, TensorRef, load
from outlast.checkpoint.formats.pieces import Piece
from outlast.checkpoint.formats.torch_zip import Fill, append, length, read
from outlast.checkpoint.items import Item
from outlast.checkpoint.source import Tick
from outlast.cluster.errors import Corrupt
from outlast.layout.run import Run

METADATA, NOTE = ".metadata", "outlast"
_TYPES, _STORE = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_RUNS = 1 << 20  # of one box
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint, where its elements are, and in how many boxes."""

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]
    boxes: int


@dataclass(frozen=True, slots=True)
class Shards:
    """All that the metadata name.

    Args:
        tensors: by key, in the order of the state dict if that is known.
        objects: what is not a tensor, by key.
        paths: key -> the keys of the nested dicts that it was made of.
        ranks: that wrote files.
    """

    tensors: dict[str, Stored]
    objects: dict[str, Any]
    paths: dict[str, tuple[str | int, ...]]
    ranks: int


def boxed(shape: Shape, offsets: Shape, sizes: Shape) -> Iterator[tuple[int, Run]]:
    """The box of `sizes` at `offsets` of a row-major array, as runs of it.

    Each comes with the number of its first element in the box, which is row-major, too.

    >>> list(boxed((4, 6), (1, 2), (2, 3)))
    [(0, Run(start=8, length=3, stride=6, count=2))]
    >>> list(boxed((2, 4, 6), (0, 1, 0), (2, 2, 6)))
    [(0, Run(start=6, length=12, stride=24, count=2))]
    """
    if not prod(sizes):
        return
    start, step, steps = 0, 1, [(1, 1)]  # count and stride, from the innermost axis outwards
    for n, at, size in zip(shape[::-1], offsets[::-1], sizes[::-1], strict=True):
        start += at * step
        count, stride = steps[-1]
        if count * stride == step:
            steps[-1] = (count * size, stride)  # goes on where the last one ends
        elif size > 1:
            steps.append((size, step))
        step *= n
    (inside, _), *outer = steps
    (count, stride), *outer = outer or [(1, 0)]
    if prod(n for n, _ in outer) > _RUNS:
        raise ValueError(f"a box in more than {_RUNS} intervals")
    begins = product(*(range(0, n * stride, stride) for n, stride in reversed(outer)))
    for number, begin in enumerate(begins):
        yield number * count * inside, Run(start + sum(begin), inside, stride, count)


def read_shards(folder: Folder) -> Shards:
    """Everything but the tensors' data.

    Raises:
        Corrupt: with file and offset: it is damaged, or not such a checkpoint.
    """
    where, size = folder.path / METADATA, folder.size(METADATA)
    root = load(folder.read(METADATA, 0, min(size, BYTES + 1)), where)
    try:
        told = dict(_state(root, "Metadata", "state_dict_metadata"))
        places = {
            (key.state["fqn"], key.state.get("offset")): info.state
            for key, info in root.state["storage_data"].items()
        }
        _check_apart(folder, places.values())
        paths = dict(root.state.get("planner_data") or {})
        order = [key for key in paths if key in told] or list(told)
        tensors, objects = {}, {}
        for key in dict.fromkeys([*order, *told]):
            if told[key].name == f"{_TYPES}.BytesStorageMetadata":
                objects[key] = _value(folder, places[key, None])
            else:
                tensors[key] = _stored(folder, key, told[key], places)
        ranks = {str(info["relative_path"]).rpartition("_")[0] for info in places.values()}
    except (LookupError, TypeError, ValueError, AttributeError) as cause:
        raise corrupt(where, 0, f"not the metadata of a checkpoint ({cause!r:.200})") from cause
    return Shards(tensors, objects, paths, len(ranks))


def _check_apart(folder: Folder, places: Iterable[Mapping[str, Any]]) -> None:
    """Corrupt if places overlap: one object that many refer to would be read as often."""
    found = sorted((str(p["relative_path"]), p["offset"], p["length"]) for p in places)
    for (file, start, size), (other, following, _) in pairwise(found):
        if file == other and following < start + size:
            raise corrupt(folder.path / file, following, "is in two entries of the metadata")


def number(folder: Folder, stored: Stored) -> float | int:
    """The one element of a tensor: a counter."""
    if prod(stored.shape) != 1 or len(stored.pieces) != 1:
        raise Corrupt(f"{folder.path}: a tensor {stored.shape} where a number belongs")
    (piece,), out = stored.pieces, np.empty(1, dtype_of(stored.dtype))
    folder.read_into(piece.file, piece.offset, out.view(np.uint8))
    value: float | int = out[0].item()
    return value


def noted(contents: Contents) -> str:
    """What the format has no place for: kept beside it, so that nothing has to be guessed."""
    return json.dumps(replace(contents, run={}, left_out=()).as_json())


def from_note(
    where: Path, note: Any, tensors: Mapping[str, Stored], key_of: Callable[[Array], str]
) -> tuple[Contents, dict[str, Stored]]:
    """What `noted` was given, and the tensor of every array; Corrupt where they do not fit."""
    try:
        contents = Contents.from_json(json.loads(note))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
            RecursionError) as cause:  # fmt: skip
        raise corrupt(where, 0, f"the entry {NOTE!r} is damaged ({cause!r:.200})") from cause
    found = {array.key: tensors.get(key_of(array)) for array in contents.arrays}
    for array in contents.arrays:
        stored = found[array.key]
        if stored is None or (stored.dtype, stored.shape) != (array.dtype, array.shape):
            raise corrupt(where, 0, f"{array} is not what the entry {NOTE!r} says")
    return contents, {key: stored for key, stored in found.items() if stored}


def _state(made: Any, kind: str, key: str) -> Any:
    if made.name != f"{_TYPES}.{kind}":
        raise ValueError(f"a {made.name:.99} where a {kind} belongs")
    return made.state[key]


def _shape(size: Any) -> Shape:
    if not isinstance(size, Size) or any(type(n) is not int for n in size):
        raise TypeError("a size that is none")
    return tuple(size)


def _value(folder: Folder, info: Mapping[str, Any]) -> Any:
    if info.get("transform_descriptors"):
        raise ValueError("it was compressed or encrypted by an extension of torch")
    return read(folder, info["relative_path"], info["offset"], info["length"])


def _stored(folder: Folder, key: str, told: Any, places: Mapping[Any, Any]) -> Stored:
    """A tensor, with all its boxes."""
    shape = _shape(_state(told, "TensorStorageMetadata", "size"))
    dtype = told.state["properties"].state[0].name.removeprefix("torch.")
    pieces: list[Piece] = []
    for chunk in told.state["chunks"]:
        offsets, sizes = (
            _shape(_state(chunk, "ChunkStorageMetadata", n)) for n in ("offsets", "sizes")
        )
        info = places[key, offsets]
        ref = _value(folder, info)
        inside = all(0 <= a <= a + n <= m for a, n, m in zip(offsets, sizes, shape, strict=True))
        if not isinstance(ref, TensorRef) or (ref.dtype, ref.shape) != (dtype, sizes) or not inside:
            where, at = folder.path / str(info["relative_path"]), info["offset"]
            raise corrupt(where, at, f"is not {dtype} {sizes} at {offsets} of {key:.99} {shape}")
        pieces += [ref.piece(run, skip) for skip, run in boxed(shape, offsets, sizes)]
    return Stored(dtype, shape, tuple(pieces), len(told.state["chunks"]))


# ---- writing


@dataclass(frozen=True, slots=True)
class Entry:
    """Something to be stored under `path`, the keys of nested dicts.

    Args:
        array: what it is, if it is a tensor; else `value` is stored.
        fill: gives the tensor's elements [start, stop).
        whole: in the file of the first rank, as what is not sharded is.
    """

    path: tuple[str | int, ...]
    value: Any = None
    array: Array | None = None
    fill: Fill | None = None
    whole: bool = False

    @property
    def key(self) -> str:
        """As torch names it."""
        return ".".join(map(str, self.path))

    def boxes(self, ranks: int) -> Iterator[tuple[int, Shape, Shape]]:
        """Rank, offsets and sizes of the parts: of the rows, as FSDP2 cuts them."""
        shape = self.array.shape if self.array else ()
        if self.whole or not shape:
            yield 0, (0,) * len(shape), shape
            return
        rows = max(ceil(shape[0] / ranks), 1)
        for rank, first in enumerate(range(0, max(shape[0], 1), rows)):
            size = (min(rows, shape[0] - first), *shape[1:])
            yield rank, (first, *(0 for _ in shape[1:])), size


@dataclass(slots=True)
class _File:
    """A `.distcp` that is to be written: what follows what, and what the metadata say of it."""

    name: str
    parts: list[tuple[Any, dict[str, Fill]]] = field(default_factory=list)
    length: int = 0
    data: int = 0  # bytes of storages

    def add(self, value: Any, storages: dict[str, Fill]) -> Opaque:
        """Append a file of torch.save; where it will be."""
        size = length(value)
        if storages:
            self.data += value.numel * dtype_of(value.dtype).itemsize
        place = {"relative_path": self.name, "offset": self.length, "length": size}
        self.parts.append((value, storages))
        self.length += size
        return Opaque(f"{_STORE}._StorageInfo", (), place)

    def write(self, directory: Path, tick: Tick) -> None:
        with (directory / self.name).open("wb") as file:
            for value, storages in self.parts:
                append(file, value, storages, tick)
            if file.tell() != self.length:
                raise AssertionError(f"{self.name} has {file.tell()} bytes and not {self.length}")


def plan_shards(directory: Path, entries: Sequence[Entry], ranks: int) -> list[Item]:
    """Items that write a checkpoint: a file for each rank, and the metadata."""
    files = [_File(f"__{rank}_0.distcp") for rank in range(ranks)]
    told, places = {}, {}
    for entry in entries:
        if entry.array is None or entry.fill is None:
            told[entry.key] = _made("BytesStorageMetadata")
            places[_index(entry.key, None)] = files[0].add(entry.value, {})
            continue
        array, chunks = entry.array, []
        inner = prod(array.shape[1:])
        for number, (rank, offsets, sizes) in enumerate(entry.boxes(ranks)):
            first = offsets[0] * inner if offsets else 0
            fill = partial(_shifted, entry.fill, first)
            ref = TensorRef.of(array.dtype, sizes, "0")
            places[_index(entry.key, offsets, number)] = files[rank].add(ref, {"0": fill})
            chunks.append(_made("ChunkStorageMetadata", offsets=Size(offsets), sizes=Size(sizes)))
        told[entry.key] = _made(
            "TensorStorageMetadata", properties=_properties(array.dtype),
            size=Size(array.shape), chunks=chunks,
        )  # fmt: skip
    root = _made(
        "Metadata", state_dict_metadata=told, storage_data=places, version="1.0.0",
        planner_data={entry.key: entry.path for entry in entries},
        storage_meta=_made("StorageMeta", checkpoint_id=None, save_id=None, load_id=None,
                           modules=[]),
    )  # fmt: skip
    pickled, place = dump(root).data, directory / METADATA
    items = [Item(file.name, file.data, partial(file.write, directory)) for file in files]
    return [*items, Item(METADATA, len(pickled), partial(put, place, pickled))]


def _shifted(fill: Fill, first: int, start: int, stop: int) -> Values:
    return fill(first + start, first + stop)


def put(path: Path, data: bytes, tick: Tick) -> None:
    """Make a small file."""
    path.write_bytes(data)
    tick(len(data))


def _made(kind: str, **state: Any) -> Opaque:
    return Opaque(f"{_TYPES}.{kind}", (), state)


def _index(key: str, offsets: Shape | None, number: int | None = None) -> Opaque:
    offset = None if offsets is None else Size(offsets)
    return _made("MetadataIndex", fqn=key, offset=offset, index=number)


def _properties(dtype: str) -> Opaque:
    strided = Opaque("torch.serialization._get_layout", ("torch.strided",))
    contiguous = Opaque(f"{_TYPES}._MEM_FORMAT_ENCODING", (0,))
    state = (Symbol(f"torch.{dtype}"), strided, False, contiguous, False)
    return Opaque(f"{_TYPES}.TensorProperties", (), state)
