"""The native format under damage: any other byte is an error with its place, whoever wrote it."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import held
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from native_steps import check, cuts, example, files, flip, same, small, write

from outlast.checkpoint import manifest, native
from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.source import digest
from outlast.checkpoint.store import Directory
from outlast.cluster.errors import Corrupt, Misuse


@pytest.fixture
def small_cuts() -> Iterator[None]:
    with cuts(12, 64):
        yield


# ---- files


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    truth, generator = small(), random.Random(0)
    write(truth, tmp_path)
    for name, whole in files(tmp_path).items():
        step = 3 if name.endswith(".json") else 1
        for at in range(generator.randrange(step), len(whole), step):
            flip(tmp_path / name, at, 1 << generator.randrange(8))
            with pytest.raises(Corrupt, match=r"at byte \d+") as error:
                check(tmp_path, truth, 0)
            assert name in str(error.value) or "manifest.json" in name
            (tmp_path / name).write_bytes(whole)
    check(tmp_path, truth)


def unlink(path: Path) -> None:
    path.unlink()


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def absent(path: Path) -> None:
    """As zarr does it, which reads zeros then: the index is right, and says that none is there."""
    path.write_bytes(path.read_bytes()[:-20] + indexed(b"\xff" * 16))


def indexed(index: bytes) -> bytes:
    return index + google_crc32c.value(index).to_bytes(4, "little")


def leave(path: Path) -> None:
    outside = path.parents[3] / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)


def wait(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [unlink, cut_off, lengthen, absent, leave, wait])
@pytest.mark.parametrize("name", ["param/w/c.0.0", "param/w/zarr.json", "zarr.json"])
def test_what_is_not_whole_is_refused(
    tmp_path: Path, harm: Callable[[Path], None], name: str
) -> None:
    truth = small()
    directory = write(truth, tmp_path / "step")
    harm(directory / name)
    with pytest.raises(Corrupt, match=f"{name} at byte"):
        check(directory, truth)


def test_the_cache_of_a_hub_may_be_followed(tmp_path: Path) -> None:
    directory = write(small(), tmp_path / "step")
    leave(directory / "param" / "w" / "c.0.0")
    source = native.open(directory, follow=True)
    assert len(source.read(source.contents.arrays[0], 0, 15)) == 15


offsets = st.integers(0, 300) | st.sampled_from([(1 << 64) - 1, 1 << 63, 1 << 40, (1 << 64) - 8])


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in zarr
@settings(deadline=None, max_examples=60)
@given(index=st.lists(offsets, min_size=12, max_size=12), start=st.integers(0, 50))
def test_an_index_that_lies_with_a_right_sum_leads_nowhere(
    tmp_path_factory: pytest.TempPathFactory, index: list[int], start: int
) -> None:
    with cuts(12, 64):
        array = Array("param", "w", (6, 10), "float32")
        values = np.random.default_rng(0).random(60, "float32")
        truth = held.Held(Contents(1, (array,)), {array.key: values.reshape(6, 10)})
        path = write(truth, tmp_path_factory.mktemp("step"))
        file = path / "param" / "w" / "c.0.0"
        whole = file.read_bytes()
        file.write_bytes(whole[:-100] + indexed(np.array(index, "<u8").tobytes()))
        source = native.open(path)
        for stop in (60, min(start + 7, 60)):
            with suppress(Corrupt):
                same(source.read(array, start, stop), values[start:stop])
        file.write_bytes(whole)
        same(source.read(array, 0, 60), values)


@pytest.mark.parametrize("stop", [56, 5])
@pytest.mark.parametrize("other", ["an older step", "another role"])
def test_files_of_something_else_are_not_taken(
    tmp_path: Path, small_cuts: None, stop: int, other: str
) -> None:
    """Their own checksums are right, and an interval is not all of a shard: the manifest knows."""
    path, older = write(example(3), tmp_path / "3"), write(example(2), tmp_path / "2")
    origin = older / "param" if other == "an older step" else path / "exp_avg"
    shutil.copy(origin / "h%2F0.w%25/c.0.0", path / "param/h%2F0.w%25/c.0.0")
    source = native.open(path)
    array = source.contents.by_key["param/h/0.w%"]
    with pytest.raises(Corrupt, match=r"c\.0\.0 at byte 0: .*this chunk is not what was written"):
        source.read(array, 0, stop)
    if other == "an older step":  # planted: nothing but the manifest tells them apart
        source._manifest.shards[array.key] = native.open(older)._manifest.shards[array.key]
        same(source.read(array, 0, stop), example(2).values[array.key].reshape(-1)[:stop])


# ---- storage that lies


class Liar(Directory):
    """A disk that takes everything, and gives back another byte, or values whose sums are right."""

    def __init__(self, path: Path, change: Callable[[bytes], bytes]) -> None:
        super().__init__(path)
        self._change = change

    def read_into(self, name: str, offset: int, out: Any) -> None:
        given = self._change((self.path / name).read_bytes())
        out[:] = np.frombuffer(given[offset : offset + len(out)], np.uint8)


def ones(file: bytes) -> bytes:
    chunk = np.ones(100, "float32").tobytes()
    return indexed(chunk) + file[404:]


def bit(file: bytes) -> bytes:
    return bytes([file[0] ^ 1]) + file[1:]


@pytest.mark.parametrize("change", [bit, ones])
def test_what_is_not_read_back_is_refused(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    array = Array("param", "w", (100,), "float32")
    with pytest.raises(Misuse, match=r"param/w/c\.0 .*not what was written"):
        native.write_shard(Liar(tmp_path, change), array, 0, np.zeros(100, "float32"))


def test_a_directory_that_takes_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    array = Array("param", "w", (), "float32")
    with pytest.raises(Misuse, match=r"file/param/w/c cannot be written"):
        native.write_shard(Directory(tmp_path / "file"), array, 0, np.zeros(1, "float32"))


# ---- hostile manifests


def forge(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a step, with the right checksum."""
    path = directory / native.MANIFEST
    body = json.loads(path.read_text())["body"]
    change(body)
    text = json.dumps(body)
    sealed = f'{{"checksum": "{xxhash.xxh3_64_hexdigest(text.encode())}", "body": {text}}}'
    path.write_text(sealed)


def array_as(**changes: Any) -> Callable[[dict[str, Any]], object]:
    """The first array described otherwise; the digests go with its key."""

    def change(body: dict[str, Any]) -> None:
        old = dict(zip(("role", "name", "shape", "dtype"), body["contents"]["arrays"][0],
                       strict=True))  # fmt: skip
        new = old | changes
        body["contents"]["arrays"][0] = list(new.values())
        digests = body["shards"].pop(f"{old['role']}/{old['name']}")
        body["shards"] = {f"{new['role']}/{new['name']}": digests} | body["shards"]

    return change


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a larger array": array_as(shape=[4, 5]),
    "another array of its size": array_as(shape=[5, 3]),
    "a huge array": array_as(shape=[1 << 62]),
    "a shape beyond all numbers": array_as(shape=[10**400]),
    "many axes": array_as(shape=[2] * 500),
    "many axes of one": array_as(shape=[15] + [1] * 40),
    "a negative shape": array_as(shape=[-3, -5]),
    "a fraction": array_as(shape=[3.0, 5.0]),
    "text": array_as(shape=["3", "5"]),
    "no shape": array_as(shape=None),
    "another type": array_as(dtype="float64"),
    "no such type": array_as(dtype="object"),
    "an endless name": array_as(name="w" * 300),
    "a name that is no text": array_as(name="\ud800"),
    "a way out": array_as(name="../../../w"),
    "a twin": lambda body: body["contents"]["arrays"].append(body["contents"]["arrays"][0]),
    "no digests": lambda body: body["shards"].clear(),
    "too many digests": lambda body: body["shards"]["param/w"].append("00"),
    "no hexadecimal digest": lambda body: body["shards"].update({"param/w": ["zz" * 20]}),
    "half a digest": lambda body: body["shards"].update(
        {"param/w": [body["shards"]["param/w"][0][:32]]}
    ),
    "a list": lambda body: body.update(shards=[]),
    "no contents": lambda body: body.pop("contents"),
    "another format": lambda body: body.update(format=3),
    "a step that is text": lambda body: body["contents"].update(step="1"),
    "an endless step": lambda body: body["contents"].update(step=float("inf")),
    "more fields": lambda body: body["contents"].update(more=1),
    "a parameter in no group": lambda body: body["contents"].update(
        groups=[{"names": ["v"], "hyper": {}, "scalars": {}}]
    ),
    "a knot": lambda body: body["contents"].update(aliases={"a": "b"}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_forged_manifest_is_refused(tmp_path: Path, what: str) -> None:
    truth = small()
    forge(write(truth, tmp_path), HOSTILE[what])
    with pytest.raises(Corrupt, match=r"at byte \d+"):
        everything(tmp_path)


def everything(directory: Path) -> None:
    source = native.open(directory)
    for array in source.contents.arrays:
        digest(source, array)


def test_an_honest_forgery_is_read(tmp_path: Path) -> None:
    """Planted: the forger's own work is not what is refused above."""
    forge(write(small(), tmp_path), lambda body: body["contents"].update(run={}))
    truth = small()
    check(tmp_path, held.Held(replace(truth.contents, run={}), truth.values))


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"body'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    (write(small(), tmp_path) / native.MANIFEST).write_bytes(text)
    with pytest.raises(Corrupt, match=r"manifest\.json at byte 0"):
        native.open(tmp_path)


def test_a_manifest_is_not_larger_than_memory(tmp_path: Path) -> None:
    path = write(small(), tmp_path) / native.MANIFEST
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(Corrupt, match="too many"):
        native.open(tmp_path)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_mutated_manifest_is_refused(data: st.DataObject) -> None:
    contents = small().contents
    digests = {array.key: ("0" * 40,) for array in contents.arrays}
    whole = manifest.Manifest(contents, digests).to_bytes()
    assert manifest.Manifest.from_bytes(whole, "here").contents == contents
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    mutated = whole[:start] + data.draw(st.binary(max_size=9)) + whole[stop:]
    if mutated != whole:
        with pytest.raises(Corrupt, match="here at byte 0"):
            manifest.Manifest.from_bytes(mutated, "here")
