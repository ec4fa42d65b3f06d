"""Weights for and from the real library, and files that lie."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from held import Held, held
from safetensors import safe_open

from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.dtypes import cast
from outlast.checkpoint.formats import safetensors as format
from outlast.checkpoint.items import Wanted
from outlast.checkpoint.source import Source
from outlast.cluster.errors import Corrupt, Misuse


def written(source: Source, directory: Path, **wanted: object) -> Source:
    for item in reversed(format.plan(source, directory, Wanted(**wanted))):
        for _ in range(2):  # an item may be made again
            made: list[int] = []
            item.make(made.append)
            assert sum(made) == item.size
    place = format.find(directory)
    assert place is not None
    return format.open(place)


def whole(source: Source, array: Array) -> np.ndarray:
    return source.read(array, 0, array.numel).reshape(array.shape)


@pytest.mark.parametrize("file_bytes", [1 << 30, 600])
@pytest.mark.parametrize(("dtype", "wanted"), [("float32", None), ("bfloat16", None),
                                               ("bfloat16", "float16")])  # fmt: skip
def test_the_library_reads_what_is_written(
    tmp_path: Path, dtype: str, wanted: str | None, file_bytes: int
) -> None:
    source = held(dtype)
    result = written(source, tmp_path, dtype=wanted, file_bytes=file_bytes)
    loaded: dict[str, torch.Tensor] = {}
    files = sorted(tmp_path.glob("*.safetensors"))
    for file in files:
        loaded |= safetensors.torch.load_file(file)
        with safe_open(file, "np") as opened:
            assert opened.metadata()["format"] == "pt"
    expected = {a.name: a for a in source.contents.arrays if not a.role.startswith("exp")}
    assert loaded.keys() == expected.keys() == {array.name for array in result.contents.arrays}
    for array in result.contents.arrays:
        was = expected[array.name]
        assert array.role == was.role
        values = cast(source.values[was.key], array.dtype)
        assert str(loaded[array.name].dtype) == f"torch.{array.dtype}"
        raw = loaded[array.name].contiguous().reshape(-1).view(torch.uint8).numpy()
        assert raw.tobytes() == values.tobytes() == whole(result, array).tobytes()
    assert {a.dtype for a in result.contents.of("param")} == {wanted or dtype}
    assert result.contents.aliases == source.contents.aliases
    assert result.contents.step == 7
    if file_bytes == 600:
        index = json.loads((tmp_path / format.INDEX).read_text())
        assert {name for name, file in index["weight_map"].items()} == loaded.keys()
        assert set(index["weight_map"].values()) == {file.name for file in files}
        assert [f.name for f in files] == [
            f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
        ]
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in loaded.values())


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        name.removeprefix("torch."): torch.arange(6).reshape(2, 3).to(getattr(torch, name[6:]))
        for name in map(str, safetensors.torch._TYPES.values())
    }
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.5)}
    safetensors.torch.save_file(tensors, tmp_path / "some.safetensors", {"format": "pt"})
    source = format.open(format.find(tmp_path))
    assert {array.name for array in source.contents.arrays} == tensors.keys()
    for array in source.contents.arrays:
        tensor = tensors[array.name]
        assert array.shape == tuple(tensor.shape)
        assert array.role == ("param" if tensor.is_floating_point() or tensor.is_complex()
                              else "buffer")  # fmt: skip
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert source.read(array, 0, array.numel).tobytes() == raw


def test_which_file_is_meant(tmp_path: Path) -> None:
    assert format.find(tmp_path) is None
    for name in ("adapter.safetensors", "other.safetensors"):
        safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / name)
    with pytest.raises(Misuse, match=r"adapter\.safetensors, other\.safetensors"):
        format.find(tmp_path)
    assert format.find(tmp_path / "other.safetensors") == tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / format.SINGLE)
    assert format.find(tmp_path) == tmp_path / format.SINGLE


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    source = held()
    with pytest.raises(Misuse, match="complex128"):
        format.plan(source, tmp_path, Wanted(dtype="complex128"))
    arrays = (Array("param", "a", (2,), "float32"), Array("buffer", "a", (2,), "float32"))
    with pytest.raises(Misuse, match="same name"):
        format.plan(Held(Contents(0, arrays), {}), tmp_path, Wanted())


TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"a": TENSOR | {"data_offsets": [0, 20]}}, "lies in"),
        ({"a": TENSOR | {"data_offsets": [4, 20]}}, "a gap"),
        ({"a": TENSOR | {"data_offsets": [-4, 12]}}, "lies in"),
        ({"a": TENSOR, "b": TENSOR}, "an overlap"),
        ({"a": TENSOR | {"shape": [2], "data_offsets": [0, 8]}}, "the file at"),
        ({"a": TENSOR | {"shape": [1 << 61, 1 << 61]}}, "lies in"),
        ({"a": TENSOR | {"shape": [-2, -2]}}, "shape"),
        ({"a": TENSOR | {"shape": [2.0, 2]}}, "shape"),
        ({"a": TENSOR | {"shape": [1] * 65}}, "shape"),
        ({"a": TENSOR | {"shape": "4"}}, "no dtype"),
        ({"a": {"dtype": "F32"}}, "no dtype"),
        ({"a": 3}, "no dtype"),
        ({"a": TENSOR, "__metadata__": []}, "not an object"),
        ({"a": TENSOR, "__metadata__": {"outlast": "{"}}, "not JSON"),
        ({"a": TENSOR, "__metadata__": {"outlast": '{"roles": {"a": "exp_avg"}}'}}, "noted as"),
        ({"a": TENSOR, "__metadata__": {"outlast": '{"roles": [1]}'}}, "the note"),
        ({"a": TENSOR, "__metadata__": {"outlast": '{"step": Infinity}'}}, "the note"),
        ({"a": TENSOR, "__metadata__": {"outlast": '{"aliases": {"b": "c"}}'}}, "is not there"),
        ([TENSOR], "not a JSON object"),
        ('{"a": 1, "a": 2}', "a name twice"),
        ('{"\\ud800": 1}', "surrogates"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: object, why: str) -> None:
    text = header if isinstance(header, bytes | str) else json.dumps(header)
    text = text if isinstance(text, bytes) else text.encode()
    path = tmp_path / format.SINGLE
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(Corrupt, match=f"(?s){format.SINGLE}.*{why}|{tmp_path}.*{why}"):
        format.open(path)


def test_sizes_that_lie(tmp_path: Path) -> None:
    path = tmp_path / format.SINGLE
    for data in (b"", b"{}", (1 << 62).to_bytes(8, "little") + b"{}", b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(Corrupt, match=f"{format.SINGLE} at byte 0: "):
            format.open(path)


def test_an_index_that_lies(tmp_path: Path) -> None:
    written(held(), tmp_path, file_bytes=600)
    path = tmp_path / format.INDEX
    index = json.loads(path.read_text())
    names = sorted(index["weight_map"])
    other = next(f for f in index["weight_map"].values() if f != index["weight_map"][names[0]])
    for change, why in [
        ({names[0]: other}, "should not be"),
        ({"more": other}, "more is not in"),
        ({names[0]: "../model.safetensors"}, "leads out"),
        ({names[0]: 3}, "no weight_map"),
    ]:
        path.write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        with pytest.raises(Corrupt, match=why):
            format.open(path)


def test_any_flipped_byte_of_a_header_is_an_error_or_another_header(tmp_path: Path) -> None:
    written(held(), tmp_path)
    path = tmp_path / format.SINGLE
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    chance = random.Random(0)
    for _ in range(300):
        at = chance.randrange(8 + size)
        path.write_bytes(
            data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
        )
        try:
            source = format.open(path)
        except (Corrupt, Misuse) as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
            continue
        for array in source.contents.arrays:
            source.read(array, 0, array.numel)


def test_cut_off_or_longer(tmp_path: Path) -> None:
    written(held(), tmp_path)
    path = tmp_path / format.SINGLE
    data = path.read_bytes()
    for wrong in (data[:-1], data + b"\0", data[:100], data[:4]):
        path.write_bytes(wrong)
        with pytest.raises(Corrupt, match=f"{path} at byte"):
            format.open(path)


def test_weights_alone_go_round(tmp_path: Path) -> None:
    source = held()
    weights = tuple(a for a in source.contents.arrays if not a.role.startswith("exp"))
    facts = {"source": {"format": "safetensors", "files": 1}}
    plain = replace(source.contents, groups=(), arrays=weights, facts=facts)
    assert written(Held(plain, source.values), tmp_path).contents == plain
