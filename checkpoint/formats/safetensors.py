"""Hugging Face safetensors: weights, in one file or cut into several with an index.

    u64 size of the header | JSON: name -> dtype, shape, data_offsets | the tensors, end to end

The format has no optimizer. Which tensors were frozen or buffers, which names were tied, and the
step are a note of ours in the metadata, where the format leaves room; without it, whatever is a
floating-point number is a parameter. https://github.com/huggingface/safetensors#format
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outlast.checkpoint.contents import BUFFER, FROZEN, PARAM, Array, Contents
from outlast.checkpoint.dtypes import cast, dtype_of, nbytes
from outlast.checkpoint.formats.folder import Folder, corrupt
from outlast.checkpoint.formats.pieces import Piece, PieceSource
from outlast.checkpoint.items import Item, Wanted
from outlast.checkpoint.source import Source, Tick
from outlast.cluster.errors import Misuse
from outlast.layout.run import Run

LATEST: str | None = None
HEADER_BYTES_MAX = 100_000_000  # as the library has it
SINGLE, INDEX, NOTE = "model.safetensors", "model.safetensors.index.json", "outlast"
_SLICE = 1 << 24  # elements of one item
_PART = 1 << 22  # elements in memory at a time
_ROLES = (PARAM, FROZEN, BUFFER)

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_CODES = {name: code for code, name in _NAMES.items()}


def find(path: Path) -> Path | None:
    """The file of the weights or of their index; None where there is neither."""
    if path.is_file():
        return path if path.name.endswith((".safetensors", ".safetensors.index.json")) else None
    for name in (SINGLE, INDEX):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
    if len(found) > 1:
        raise Misuse(f"{path} has several: name one of {', '.join(file.name for file in found)}")
    return found[0] if found else None


def open(path: Path, follow: bool = False) -> Source:
    """Read the headers below what `find` found.

    Raises:
        Corrupt: with file and offset, wherever they contradict themselves or each other.
    """
    folder = Folder(path.parent, follow)
    entries: dict[str, _Entry] = {}
    note: dict[str, Any] = {}
    listed = _weight_map(folder, path.name) if path.name.endswith(".json") else None
    for file in dict.fromkeys(listed.values()) if listed is not None else [path.name]:
        for entry in _header(folder, file, note):
            if entry.name in entries or (listed is not None and listed.get(entry.name) != file):
                raise corrupt(path, 0, f"{entry.name} is in {file}, where it should not be")
            entries[entry.name] = entry
    if listed is not None and (lost := listed.keys() - entries.keys()):
        raise corrupt(path, 0, f"{min(lost)} is not in {listed[min(lost)]}")
    return PieceSource(folder, *_contents(path, entries, note))


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int


def _weight_map(folder: Folder, name: str) -> dict[str, str]:
    listed = _json(folder, name, 0, folder.size(name)).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise corrupt(folder.path / name, 0, "no weight_map from names to files")
    return listed


def _header(folder: Folder, file: str, note: dict[str, Any]) -> Iterator[_Entry]:
    """The tensors of a file, which they tile; `note` takes up what its metadata say."""
    path, total = folder.path / file, folder.size(file)
    if total < 8:
        raise corrupt(path, 0, "no header")
    size = int.from_bytes(folder.read(file, 0, 8), "little")
    base = 8 + size
    if size > min(HEADER_BYTES_MAX, total - 8):
        raise corrupt(path, 0, f"a header of {size} bytes in a file of {total}")
    header = _json(folder, file, 8, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise corrupt(path, 8, "__metadata__ is not an object")
    if "DCP_SHARDING_INFO" in metadata:
        raise Misuse(f"{path} has slices of tensors: give the consolidated files beside it")
    if isinstance(text := metadata.get(NOTE), str):
        note |= _object(path, 8, text)
    at = base
    entries = [_entry(path, base, name, told) for name, told in header.items()]
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != at:
            raise corrupt(path, at, f"{entry.name} begins at {entry.start}: a gap, or an overlap")
        at = entry.stop
        yield entry
    if at != total:
        raise corrupt(path, at, f"the tensors end here, and the file at {total}")


def _entry(path: Path, base: int, name: str, told: Any) -> _Entry:
    match told:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise corrupt(path, 8, f"{name}: no dtype, shape and data_offsets")
    if code not in _NAMES:
        raise Misuse(f"{path}: {name} is of dtype {code}, which is not supported")
    if len(shape) > 64 or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
        raise corrupt(path, 8, f"{name} has the shape {shape}")
    array = Array(PARAM, name, tuple(shape), _NAMES[code])
    if start < 0 or stop - start != nbytes([array]):
        raise corrupt(path, 8, f"{name} {shape} of {code} lies in [{start}, {stop})")
    return _Entry(name, array.dtype, array.shape, path.name, base + start, base + stop)


def _json(folder: Folder, file: str, offset: int, size: int) -> dict[str, Any]:
    if size > HEADER_BYTES_MAX:
        raise corrupt(folder.path / file, offset, f"{size} bytes of JSON")
    return _object(folder.path / file, offset, folder.read(file, offset, size))


def _object(path: Path, offset: int, text: bytes | str) -> dict[str, Any]:
    """A JSON object without the same name twice in it, or one that cannot be written again."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len(found := dict(pairs)):
            raise ValueError("a name twice")
        "".join(found).encode()
        return found

    try:
        plain = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as cause:
        raise corrupt(path, offset, f"not JSON: {cause}") from cause
    if not isinstance(plain, dict):
        raise corrupt(path, offset, "not a JSON object")
    return plain


def _contents(
    path: Path, entries: dict[str, _Entry], note: dict[str, Any]
) -> tuple[Contents, dict[str, list[Piece]]]:
    try:
        roles = {str(name): str(role) for name, role in note.get("roles", {}).items()}
        aliases = {str(a): str(n) for a, n in note.get("aliases", {}).items()}
        step = int(note.get("step", 0))
    except (ValueError, TypeError, AttributeError, OverflowError) as cause:
        raise corrupt(path, 8, f"the note of roles and tied names: {cause}") from cause
    arrays, pieces = [], {}
    weights: Counter[str] = Counter()
    for entry in entries.values():
        trained = entry.dtype.startswith(("float", "bfloat", "complex"))
        role = roles.get(entry.name, PARAM if trained else BUFFER)
        if role not in _ROLES:
            raise corrupt(path, 8, f"{entry.name} is noted as {role}")
        array = Array(role, entry.name, entry.shape, entry.dtype)
        arrays.append(array)
        if array.numel:
            pieces[array.key] = [Piece(Run.of(0, array.numel), entry.file, entry.start)]
        if trained:
            weights[entry.dtype] += array.numel
    arrays.sort(key=lambda array: _ROLES.index(array.role))
    dtype = max(weights, key=weights.__getitem__) if weights else "float32"
    facts = {"source": {"format": "safetensors", "files": len({e.file for e in entries.values()})}}
    return Contents(step, tuple(arrays), (), dtype, aliases, facts), pieces


def name_of(contents: Contents) -> str:
    """Right into the directory that is given."""
    return ""


def stored(array: Array, contents: Contents, wanted: Wanted) -> Array:
    """The array as it is written: an optimizer's masters in the dtype of the model.

    Weights without an optimizer are of the dtypes that the model has, one for each maybe.
    """
    dtype = array.dtype
    if array.role in (PARAM, FROZEN) and dtype.startswith(("float", "bfloat")):
        master = array.role == PARAM and dtype == "float32" and contents.groups
        dtype = wanted.dtype or (contents.dtype if master else dtype)
    return replace(array, dtype=dtype)


def plan(source: Source, directory: Path, wanted: Wanted) -> list[Item]:
    """One item for every header and slice of a tensor; files as transformers names them."""
    contents = source.contents
    arrays = [array for role in _ROLES for array in contents.of(role)]
    if len({array.name for array in arrays}) != len(arrays):
        raise Misuse("a parameter and a buffer have the same name: safetensors cannot tell them")
    files = list(_cut([(a, stored(a, contents, wanted)) for a in arrays], wanted.file_bytes))
    names = [SINGLE] if len(files) == 1 else [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]  # fmt: skip
    roles = {a.name: a.role for a in arrays if a.role != PARAM}
    note = {"roles": roles, "aliases": contents.aliases, "step": contents.step}
    items, total = [], 0
    for name, file in zip(names, files, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt", NOTE: json.dumps(note)}}
        at = 0
        for _, made in file:
            size = _size(made)
            header[made.name] = {"dtype": _CODES[made.dtype], "shape": list(made.shape),
                                 "data_offsets": [at, at + size]}  # fmt: skip
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > HEADER_BYTES_MAX:
            raise Misuse("more tensors than a header holds: fewer bytes to a file")
        path, total = directory / name, total + at
        items.append(_text(name, path, len(text).to_bytes(8, "little") + text))
        for (array, made), entry in zip(file, list(header.values())[1:], strict=True):
            base = 8 + len(text) + entry["data_offsets"][0]
            items += _slices(source, array, made.dtype, path, base)
    if len(files) > 1:
        placed = {a.name: name for name, file in zip(names, files, strict=True) for a, _ in file}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        items.append(_text(INDEX, directory / INDEX, json.dumps(index, indent=2).encode()))
    return items


def _size(array: Array) -> int:
    if array.dtype not in _CODES:
        raise Misuse(f"safetensors has no {array.dtype}, which {array.name} is")
    return nbytes([array])


def _cut(arrays: Sequence[tuple[Array, Array]], limit: int) -> Iterator[list[tuple[Array, Array]]]:
    """Files of at most `limit` bytes, or of one tensor; at least one file."""
    file: list[tuple[Array, Array]] = []
    size = 0
    for pair in arrays:
        if file and size + _size(pair[1]) > limit:
            yield file
            file, size = [], 0
        file.append(pair)
        size += _size(pair[1])
    yield file


def _slices(source: Source, array: Array, dtype: str, path: Path, base: int) -> Iterator[Item]:
    width = dtype_of(dtype).itemsize
    for start in range(0, array.numel, _SLICE):
        stop = min(start + _SLICE, array.numel)

        def make(tick: Tick, start: int = start, stop: int = stop) -> None:
            for at in range(start, stop, _PART):
                values = cast(source.read(array, at, min(at + _PART, stop)), dtype)
                _write(path, base + at * width, memoryview(values.view("u1")))
                tick(values.nbytes)

        yield Item(f"{array.key}[{start}:{stop}]", (stop - start) * width, make)


def _text(name: str, path: Path, text: bytes) -> Item:
    make: Callable[[Tick], None] = lambda tick: _write(path, 0, memoryview(text))  # noqa: E731
    return Item(name, 0, make)


def _write(path: Path, offset: int, data: memoryview) -> None:
    """At its place in the file, which several threads fill."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
    finally:
        os.close(descriptor)
