"""Pickles are read without being run: what torch writes comes back, what attacks is refused."""

import io
import json
import struct
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.checkpoint.formats import pickles
from outlast.checkpoint.formats.pickle_writer import dump
from outlast.checkpoint.formats.pickles import Opaque, Size, Symbol, TensorRef, load
from outlast.checkpoint.formats.plain import carried, from_json, to_json
from outlast.cluster.errors import Corrupt, Misuse

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
    | st.text() | st.binary(max_size=300)
)  # fmt: skip
KEYS = st.text(max_size=5) | st.integers(-5, 5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict)
        | st.sets(KEYS, max_size=3)
        | st.sets(KEYS, max_size=3).map(frozenset)
    ),
    max_leaves=12,
)


def pickled(value: Any, protocol: int = 2) -> bytes:
    """As torch pickles it."""
    file = io.BytesIO()
    torch.save(value, file, pickle_protocol=protocol)
    return zipfile.ZipFile(file).read("archive/data.pkl")


def same(a: Any, b: Any) -> bool:
    return typed(a) == typed(b)


def typed(value: Any) -> Any:
    """With the types, which 1 == True and [] == Size() do without; sets have no order."""
    parts: Any = value
    if isinstance(value, dict):
        parts = [(typed(k), typed(v)) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        parts = [typed(item) for item in value]
    elif isinstance(value, set | frozenset):
        parts = sorted(typed(item) for item in value)
    return type(value).__name__, parts if isinstance(parts, list) else repr(parts)


@settings(max_examples=150, deadline=None)
@given(value=VALUES, protocol=st.integers(2, 5))
def test_what_the_real_pickler_writes_is_read(value: Any, protocol: int) -> None:
    assert same(load(pickled(value, protocol), "x"), value)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_what_is_written_is_read(value: Any) -> None:
    assert same(load(dump(value).data, "x"), value)
    assert same(from_json(to_json(value)), value)


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_torch_reads_what_is_written(value: Any) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", dump(value).data)
        archive.writestr("archive/version", "3\n")
    file.seek(0)
    with torch.serialization.safe_globals([frozenset]):
        got = torch.load(file, weights_only=True)
    assert same(got, value)


def test_objects_keep_their_names_and_do_nothing() -> None:
    made = Opaque("deepspeed.utils.tensor_fragment.fragment_address", (), {"numel": 3, "start": 4})
    stage = Opaque("deepspeed.runtime.zero.config.ZeroStageEnum", (2,))
    some = {"a": made, "b": stage, "c": Symbol("torch.bfloat16"), "d": Size((2, 3))}
    again = load(dump(some).data, "x")
    assert (again["a"].name, again["a"].get("start")) == (made.name, 4)
    assert (again["b"].name, again["b"].args) == (stage.name, (2,))
    assert (again["c"], type(again["d"]), again["d"]) == (some["c"], Size, some["d"])
    told = from_json(to_json(again))
    assert (told["a"].state, told["b"].args, told["d"]) == (made.state, (2,), (2, 3))


HANDLER = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"
LAUNDERED: dict[str, Any] = {
    "a class that does something": Opaque(HANDLER, ("/usr/bin/touch",)),
    "a function": Opaque("os.system", ("touch mark",)),
    "the name of a class": Symbol(HANDLER),
    "lines of a program": Symbol("torch.bool\n(S'touch mark'\nios\nsystem\n"),
    "a dtype of addresses": Opaque("numpy.dtype", ("O8", False, True)),
    "a dtype that lies": Opaque("numpy.dtype", ("V8", False, True), (3, "|", None, None, None)),
    "a number that lies": Opaque("numpy.dtype", ("f8",), (3, "<", None, ("a",), {}, 8, 1, 0)),
}


@pytest.mark.parametrize("name", LAUNDERED)
def test_what_may_run_code_is_neither_carried_on_nor_written(name: str) -> None:
    value, notes = LAUNDERED[name], list[str]()
    for some in (value, [value], Opaque("argparse.Namespace", (), {"a": value})):
        with pytest.raises(Misuse, match="might run code"):
            dump(some)
        with pytest.raises(TypeError):
            to_json(some)
    told = {"args": Opaque("argparse.Namespace", (), {"a": value, "b": 1}), "c": 2}
    kept = from_json(carried(told, "state", notes.append))
    assert (kept["args"].state, kept["c"], len(notes)) == ({"b": 1}, 2, 1)
    assert value.name[:9] in notes[0]
    # A checkpoint that another program has written, as JSON with a right checksum.
    body = [value.name, {"!": "tuple", "of": []}, None]
    symbol = isinstance(value, Symbol)
    hostile = {"!": "symbol" if symbol else "object", "of": value.name if symbol else body}
    with pytest.raises(Misuse, match="might run code"):
        dump(from_json({"client_state": hostile}))


@pytest.mark.parametrize("protocol", [2, 4])
def test_values_of_other_classes_are_carried_on(protocol: int) -> None:
    values = {"arrays": np.random.default_rng(0).random((3, 4)), "at": datetime(2020, 1, 1),
              "path": PurePosixPath("/x"), "name": Namespace(a=(1, 2)), "dtype": torch.bfloat16,
              "c": 1 + 2j, "counts": np.arange(3)}  # fmt: skip
    notes: list[str] = []
    kept = carried(load(pickled(values, protocol), "x"), "state", notes.append)
    again = load(dump(from_json(json.loads(json.dumps(kept)))).data, "x")
    assert (notes, kept.keys()) == ([], values.keys())
    assert to_json(again) == kept


@pytest.mark.parametrize(
    "value", [{"!": "x", "of": 1}, {"!": "set"}, {"!": "dict", "of": [1]}, {"!": "bytes", "of": 1},
              {"!": "object", "of": ["a", 5, 5]}, {"!": "set", "of": [[]]}, {"!": {}, "of": 0}],
)  # fmt: skip
def test_json_that_nobody_wrote_is_refused(value: Any) -> None:
    with pytest.raises(Corrupt, match="not understood"):
        from_json({"a": [value]})


PROGRAMS = {
    "a function": b"cos\nsystem\n(S'{}'\ntR.",
    "in torch's protocol": b"\x80\x02cposix\nsystem\nX\x0c\x00\x00\x00touch ./mark\x85R.",
    "by stack": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch ./mark\x85R.",
    "eval": (
        b"\x80\x02cbuiltins\neval\nX\x27\x00\x00\x00__import__('os').system('touch ./mark')\x85R."
    ),
    "a function inside a state": (
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00acposix\nsystem\n"
        b"X\x0c\x00\x00\x00touch ./mark\x85Rsb."
    ),
    "the old way to make an object": b"(X\x0c\x00\x00\x00touch ./markiposix\nsystem\n.",
    "the other old way": b"(cposix\nsystem\nX\x0c\x00\x00\x00touch ./marko.",
    "a chain of attributes": (
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x08builtins\x8c\x0a__import__\x93"
        b"\x8c\x02os\x85R\x8c\x06system\x86R\x8c\x0ctouch ./mark\x85R."
    ),
    "a dotted name": b"\x80\x04\x8c\x06shutil\x8c\x09os.system\x93\x8c\x0ctouch ./mark\x85R.",
    "a call of what a call gave": (
        b"\x80\x02cfunctools\npartial\ncposix\nsystem\nX\x0c\x00\x00\x00touch ./mark\x86R)R."
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_refused_and_not_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = PROGRAMS[name].replace(b"{}", b"touch ./mark")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Corrupt, match=r"file\.pt at byte \d+: "):
        load(program, "file.pt")
    assert not (tmp_path / "mark").exists()
    # The same bytes do run where they are unpickled.
    victim = "import sys, pickle; pickle.loads(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", victim], input=program, cwd=tmp_path, check=True)
    assert (tmp_path / "mark").exists()


def text(value: str) -> bytes:
    return struct.pack("<cI", b"X", len(value)) + value.encode()


def test_a_number_that_nobody_needs_is_not_written() -> None:
    with pytest.raises(Misuse, match="an integer of 376 bytes"):
        dump([2**3000])


def again(made: bytes, name: bytes, times: int) -> bytes:
    """A list of what a function makes of one value, `times` over."""
    known = b"\x80\x02" + made + b"q\x000c" + name + b"q\x010]("
    return known + b"h\x01h\x00\x85R" * times + b"e."


BOMBS = {
    "bytes again and again": again(text("a" * 2**20), b"_codecs\nencode\n", 6),
    "sets again and again": again(
        b"]" + (b"(" + b"K\x01" * 1000 + b"e") * 2, b"__builtin__\nset\n", 900
    ),
    "names again and again": (
        b"\x80\x02"
        + text("torch")
        + b"q\x000"
        + text("A" * 2**20)
        + b"q\x010]("
        + b"h\x00h\x01\x93" * 7
        + b"e."
    ),
    "a key of many parts": b"\x80\x02}(" + b"K\x01" * 65 + b"tNs.",
    "a name of no checkpoint": b"\x80\x02cunknown.package\nClass\n)R.",
    "a function of torch": b"\x80\x02ctorch.hub\nload\n)R.",
    "an extension of copyreg": b"\x80\x02\x82\x01.",
    "an object of the environment": b"\x80\x02" + text("x") + b"Q.",
    "a memo index that would take memory": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a length that is not there": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a length beyond every address": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    "a negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "an integer of a kilobyte": b"\x80\x02\x8b\x00\x04\x00\x00" + b"\x01" * 1024 + b".",
    "too many marks": b"\x80\x02" + b"(" * 2**11 + b".",
    "too many values": b"\x80\x02" + b"]" * 2**11 + b".",
    "nested too deep": b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b".",
    "nested tuples": b"\x80\x02)" + b"\x85" * 10_000 + b".",
    "its own child": b"\x80\x02]q\x00h\x00a.",
    "a trillion references": b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 40 + b"h\x00.",
    "a key that takes for ever to hash": (
        b"\x80\x02})q\x00" + b"0h\x00h\x00\x86q\x00" * 60 + b"Ns."
    ),
    "a list as a key": b"\x80\x02}]Ns.",
    "a memo that is empty": b"\x80\x02h\x05.",
    "an empty stack": b"\x80\x02R.",
    "below a mark": b"\x80\x02N(0.",
    "the state of a list": b"\x80\x02]}b.",
    "two values": b"\x80\x02NN.",
    "no end": b"\x80\x02N",
    "nothing": b"",
    "text of no encoding": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a storage that is called": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "a parameter that is none": b"\x80\x02ctorch._utils\n_rebuild_parameter\nN\x89}\x87R.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_malformed_pickles_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_STACK", 2**10)
    with pytest.raises(Corrupt, match=r"file\.pt at byte \d+: "):
        load(BOMBS[name], "file.pt", base=100)


def test_a_pickle_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "BYTES", 10)
    with pytest.raises(Corrupt, match="10 at most"):
        load(b"\x80\x02" + b"N0" * 10 + b"N.", "file.pt")


def tensor(extent: int, start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    ref = TensorRef("float32", shape, "0", extent, start, strides)
    return dump(ref).data


@pytest.mark.parametrize(
    ("extent", "start", "shape", "strides"),
    [(4, 0, (5,), (1,)), (4, 1, (4,), (1,)), (4, 0, (2, 2), (4, 1)), (4, 0, (-1,), (1,)),
     (4, -1, (1,), (1,)), (4, 0, (2**62, 4), (0, 0)), (4, 0, (2,), (-1,)), (-4, 0, (1,), (1,)),
     (4, 0, (2**80,), (0,)), (4, 0, (2,), (1, 1)), (4, 0, (1,) * 80, (1,) * 80)],
)  # fmt: skip
def test_a_tensor_outside_of_its_storage_is_refused(
    extent: int, start: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    place = lambda key, size: ("data", 0)  # noqa: E731
    data = tensor(extent, start, shape, strides)
    if extent == 4 and start == 0 and shape == (2**62, 4):  # overlapping itself is no lie
        assert load(data, "x", place).shape == shape
        return
    with pytest.raises(Corrupt):
        load(data, "x", place)
    assert load(tensor(9, 1, (2, 2), (4, 1)), "x", place).offset == 4
