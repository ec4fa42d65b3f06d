"""Pickles, read and written without `pickle`: an interpreter that has nothing to call.

A pickle is a program, and the library's interpreter imports and calls whatever the program names.
This one knows the opcodes that checkpoints use and a list of names. A function of the list is done
here (`_CALLS`); an object of a class of the list becomes an `Opaque` with what it was made of;
tensors become `TensorRef`s, which say where their bytes lie. Any other name is refused before
anything is made of it. What comes out is a tree of bounded depth and size, also where the file
refers to one object many times.
"""

import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from outlast.checkpoint.dtypes import dtype_of
from outlast.checkpoint.formats.folder import corrupt
from outlast.checkpoint.formats.pieces import Piece
from outlast.layout.run import Run

BYTES = 1 << 28  # of one pickle
_STACK, _MEMO, _DEPTH, _NODES = 1 << 20, 1 << 26, 64, 1 << 20  # nodes besides one per byte

STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip

# Classes whose objects are kept as they are named; of other packages none is.
_CLASSES = re.compile(
    r"""(torch|deepspeed|megatron|transformer_engine)(\.\w+)*\._?[A-Z]\w*
    | deepspeed\.utils\.tensor_fragment\.fragment_address
    | torch\.(device|serialization\._get_layout)
    | torch\.(bfloat|float|complex|u?int|q?u?int)\d\w* | torch\.bool
    | numpy\.(ndarray|dtype|(_core|core)\.(multiarray\._reconstruct|numeric\._frombuffer))
    | pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path | argparse\.Namespace | _io\.BytesIO
    | datetime\.\w+ | builtins\.(bool|int|float|complex|str|bytes|list|tuple|dict|set|range|slice)
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Symbol:
    """A class, a dtype or the like, by its full name: "torch.bfloat16"."""

    name: str


@dataclass(eq=False, slots=True)
class Opaque:
    """An object of a class that is known by its name alone: what it was made of, never the object.

    Args:
        name: of the class, in full.
        args: of its constructor.
        state: what it was filled with afterwards, often the dict of its attributes.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None

    def get(self, key: str, default: Any = None) -> Any:
        """An attribute from a dict of them."""
        return self.state.get(key, default) if isinstance(self.state, dict) else default


class Size(tuple[int, ...]):
    """A torch.Size."""

    __slots__ = ()


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a contiguous tensor, as torch counts them.

    >>> row_major((2, 3, 4))
    (12, 4, 1)
    """
    strides, size = [], 1
    for n in reversed(shape):
        strides.append(size)
        size *= max(n, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor without its data: where in which storage its elements are.

    Args:
        key: of the storage, which tensors may share.
        extent: elements of the storage.
        start: index of the tensor's first element there.
        strides: in elements.
        file: that has the storage; "" in what is to be written.
        offset: of the first element in `file`, in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    key: str
    extent: int
    start: int
    strides: tuple[int, ...]
    file: str = ""
    offset: int = 0

    @classmethod
    def of(cls, dtype: str, shape: Sequence[int], key: str) -> "TensorRef":
        """A contiguous tensor to be written, with a storage of its own."""
        return cls(dtype, tuple(shape), key, prod(shape), 0, row_major(shape))

    @property
    def numel(self) -> int:
        """Elements; a scalar has one."""
        return prod(self.shape)

    def piece(self, run: Run, skip: int = 0) -> Piece:
        """Elements `run` of an array are elements [skip, skip + run.numel) of this tensor.

        Raises:
            Corrupt: it has less, or they do not lie one after the other.
        """
        if not 0 <= skip <= self.numel - run.numel:
            why = f"{self.shape} has no {run.numel} elements from the {skip}th on"
            raise corrupt(self.file, self.offset, why)
        dense = row_major(self.shape)
        if any(n > 1 and a != b for n, a, b in zip(self.shape, self.strides, dense, strict=True)):
            why = f"tensor of strides {self.strides}: only contiguous ones can be read"
            raise corrupt(self.file, self.offset, why)
        return Piece(run, self.file, self.offset + skip * dtype_of(self.dtype).itemsize)


# Of a storage: its key and size in bytes -> file and offset that have it; raises Corrupt.
Storages = Callable[[str, int], tuple[str, int]]


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    extent: int
    file: str
    offset: int


class _Refused(ValueError):
    """What the interpreter does not do; becomes Corrupt with the place."""


def load(data: bytes, where: Path | str, storage: Storages | None = None, base: int = 0) -> Any:
    """The value that a pickle describes; nothing that it names is imported or called.

    Args:
        where: file, for messages; the pickle starts there at byte `base`.
        storage: finds the storages of tensors; without it, tensors are refused.
    Raises:
        Corrupt: it is no pickle, is cut off, names what is not on the list, or is out of bounds.
    """
    if len(data) > BYTES:
        raise corrupt(where, base, f"a pickle of {len(data)} bytes; {BYTES} at most are read")
    machine = _Machine(data, storage)
    try:
        value = machine.run()
        _measure(value, {}, _NODES + len(data))
    except _Refused as cause:
        raise corrupt(where, base + machine.at, str(cause)) from None
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, struct.error) as e:
        raise corrupt(where, base + machine.at, f"not a whole pickle ({e})") from e
    return value


def _measure(value: Any, known: dict[int, int], most: int, depth: int = 0) -> int:
    """Nodes of the tree below a value, shared ones counted every time; _Refused if too many."""
    if isinstance(value, dict):
        children: Iterable[Any] = (*value.keys(), *value.values())
    elif isinstance(value, Opaque):
        children = (value.args, value.state)
    elif isinstance(value, list | tuple):
        children = value
    else:
        return 1
    if depth > _DEPTH:
        raise _Refused(f"nested more than {_DEPTH} deep")
    if id(value) not in known:
        known[id(value)] = most + 1  # if met again below itself
        nodes = 1 + sum(_measure(child, known, most, depth + 1) for child in children)
        known[id(value)] = nodes
    if known[id(value)] > most:
        raise _Refused("refers to itself, or to its parts too often")
    return known[id(value)]


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self, data: bytes, storage: Storages | None) -> None:
        self.data, self.at, self.storage = data, 0, storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.room = _NODES + 4 * len(data)  # for what functions make

    def run(self) -> Any:
        """Interpret to the end; the value that is left."""
        data, codes, stack = self.data, _CODES, self.stack
        while True:
            code = data[self.at]
            if code == 0x2E:  # STOP
                break
            if code not in codes:
                raise _Refused(f"opcode {bytes([code])!r} is none that checkpoints use")
            if len(stack) > _STACK:
                raise _Refused(f"more than {_STACK} values at once")
            self.at += 1
            codes[code](self)
        if len(stack) != 1 or self.marks:
            raise _Refused("leaves more or less than one value")
        return stack[0]

    def take(self, size: int) -> bytes:
        """The next bytes of the program."""
        if not 0 <= size <= len(self.data) - self.at:
            raise _Refused(f"{size} bytes are announced that are not there")
        self.at += size
        return self.data[self.at - size : self.at]

    def spend(self, *parts: Any) -> None:
        """Count what is made of values that the memo may give again and again."""
        self.room -= sum(len(part) for part in parts if isinstance(part, Sized))
        if self.room < 0:
            raise _Refused("makes too much of too few bytes")

    def number(self, form: struct.Struct) -> Any:
        """The next number of the program."""
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def line(self) -> str:
        """The next line of the program, as names are written."""
        end = self.data.index(b"\n", self.at, self.at + 1024)
        text = self.take(end - self.at).decode()
        self.at += 1
        return text

    def popped(self) -> list[Any]:
        """What lies above the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def pop(self) -> Any:
        """The value on top; never from below a mark."""
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise _Refused("takes a value from below a mark")
        return self.stack.pop()

    def keep(self, index: int) -> None:
        """Remember the value on top."""
        if not 0 <= index < _MEMO:
            raise _Refused(f"memo index {index}")
        self.memo[index] = self.stack[-1]


_U1, _U2, _U4, _U8 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q"))
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")


def _key(value: Any) -> Any:
    """A value that may be a key: one whose hash is cheap, which that of nested tuples is not."""
    flat = value if isinstance(value, tuple) else (value,)
    if len(flat) > _DEPTH:
        raise _Refused(f"a key of {len(flat)} parts")
    for item in flat:
        if item is not None and not isinstance(item, str | bytes | int | float | Symbol | Opaque):
            raise _Refused(f"a {type(item).__name__} as a key")
    return value


def _fill(machine: _Machine, items: list[Any]) -> None:
    """APPENDS to a list, SETITEMS of a dict, ADDITEMS to a set."""
    target = machine.stack[-1]
    if isinstance(target, list):
        target += items
    elif isinstance(target, set):
        target |= {_key(item) for item in items}
    elif isinstance(target, dict) and len(items) % 2 == 0:
        target.update((_key(k), v) for k, v in zip(items[::2], items[1::2], strict=True))
    else:
        raise _Refused(f"fills a {type(target).__name__}")


def _symbol(machine: _Machine, module: Any, name: Any) -> None:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise _Refused("a name that is no text")
    machine.spend(module, name)
    full = f"{module.replace('__builtin__', 'builtins')}.{name}"
    if full not in _CALLS and not _is_storage(full) and not _CLASSES.fullmatch(full):
        raise _Refused(f"names {full[:99]!r}, which is none that checkpoints are made of")
    machine.stack.append(Symbol(full))


def _is_storage(name: str) -> bool:
    return name.removeprefix("torch.") in (*STORAGES, "storage.UntypedStorage")


def _make(machine: _Machine, args: Any) -> None:
    """REDUCE and NEWOBJ: the class or function on top with `args`."""
    symbol = machine.pop()
    if not isinstance(symbol, Symbol) or not isinstance(args, tuple):
        raise _Refused("calls what is no name")
    if symbol.name in _CALLS:
        machine.spend(args, *args)
        machine.stack.append(_CALLS[symbol.name](*args))
    else:
        machine.stack.append(Opaque(symbol.name, args))


def _build(machine: _Machine) -> None:
    state, target = machine.pop(), machine.stack[-1]
    if isinstance(target, Opaque) and target.state is None:
        target.state = state
    elif not isinstance(target, OrderedDict):  # those have versions of modules, which are default
        raise _Refused(f"sets the state of a {type(target).__name__}")


def _persistent(machine: _Machine) -> None:
    kind, symbol, key, _location, extent = machine.pop()
    if machine.storage is None or kind != "storage" or not _is_storage(symbol.name):
        raise _Refused("a tensor where none can be")
    if not isinstance(key, str) or not isinstance(extent, int) or extent < 0:
        raise _Refused("a storage without a name or a size")
    dtype = STORAGES.get(symbol.name.removeprefix("torch."), "uint8")
    place = machine.storage(key, extent * dtype_of(dtype).itemsize)
    machine.stack.append(_Storage(dtype, key, extent, *place))


def _tensor(storage: Any, start: int, shape: Any, strides: Any, *rest: Any) -> TensorRef:
    """_rebuild_tensor_v2, and _v3 for dtypes that have no storage class."""
    dtype, extent, size = storage.dtype, storage.extent, dtype_of(storage.dtype).itemsize
    if len(rest) >= 3 and isinstance(rest[2], Symbol):
        dtype = rest[2].name.removeprefix("torch.")
        extent, left = divmod(extent * size, dtype_of(dtype).itemsize)
        if left:
            raise _Refused(f"a storage that does not hold whole elements of {dtype}")
    numbers = (start, *shape, *strides)
    if not len(shape) == len(strides) <= 64 or any(type(n) is not int for n in numbers):
        raise _Refused("a tensor whose shape and strides do not fit each other")
    if not 0 <= min(numbers) <= max(numbers) < 2**63:
        raise _Refused(f"a tensor of shape {shape} and strides {strides} from {start} on")
    last = start + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if prod(shape) and last >= extent:
        raise _Refused(f"a tensor to its element {last} in a storage of {extent}")
    offset = storage.offset + start * dtype_of(dtype).itemsize
    return TensorRef(
        dtype, tuple(shape), storage.key, extent, start, tuple(strides), storage.file, offset
    )


def _typed(function: Symbol, _type: Symbol, args: tuple[Any, ...], _state: Any) -> TensorRef:
    if function.name not in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
        raise _Refused(f"a tensor made by {function.name}")
    return _tensor(*args)


def _parameter(tensor: Any, *_: Any) -> TensorRef:
    if not isinstance(tensor, TensorRef):
        raise _Refused("a parameter that is no tensor")
    return tensor


def _encode(text: str = "", encoding: str = "latin-1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise _Refused("bytes in an encoding that is not latin-1")
    return text.encode("latin-1")


def _scalar(kind: Opaque, data: bytes) -> Any:
    """A number of numpy: as Python's."""
    if kind.name != "numpy.dtype" or not re.fullmatch("[fiub][1248]", kind.args[0]):
        raise _Refused("a scalar that is no number")
    return np.frombuffer(data, dtype=f"<{kind.args[0]}", count=1)[0].item()


def _ordered(pairs: Sequence[Any] = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((_key(key), value) for key, value in pairs)


def _refuse(*_: Any) -> NoReturn:
    raise _Refused("calls a storage")


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": lambda pairs=(): dict(_ordered(tuple(pairs.items()) if pairs else ())),
    "builtins.set": lambda items=(): {_key(item) for item in items},
    "builtins.frozenset": lambda items=(): frozenset(_key(item) for item in items),
    "torch.Size": lambda sizes=(): Size(sizes),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "_codecs.encode": _encode,
    "builtins.bytes": _encode,
    "builtins.bytearray": _encode,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    **{f"torch.{name}": _refuse for name in STORAGES},
    "torch.storage.UntypedStorage": _refuse,
}


# ---- opcodes

_Act = Callable[[_Machine], Any]


def _constant(value: Any) -> _Act:
    return lambda m: m.stack.append(value)


def _empty(kind: Callable[[], Any]) -> _Act:
    return lambda m: m.stack.append(kind())


def _counted(form: struct.Struct, kind: Callable[[bytes], Any]) -> _Act:
    return lambda m: m.stack.append(kind(m.take(m.number(form))))


def _tuple(count: int) -> _Act:
    return lambda m: m.stack.append(tuple([m.pop() for _ in range(count)][::-1]))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _long(data: bytes) -> int:
    if len(data) > 64:
        raise _Refused(f"an integer of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _act(code: bytes, act: _Act) -> tuple[int, _Act]:
    return code[0], act


_CODES: dict[int, _Act] = dict(
    (
        _act(b"\x80", lambda m: m.take(1)),  # PROTO: what it may use is checked by itself
        _act(b"\x95", lambda m: m.take(8)),  # FRAME
        _act(b"(", lambda m: m.marks.append(len(m.stack))),
        _act(b"0", lambda m: m.pop()),
        _act(b"1", lambda m: m.popped()),
        *(_act(c, _constant(v)) for c, v in ((b"N", None), (b"\x88", True), (b"\x89", False))),
        *(
            _act(c, _empty(v))
            for c, v in ((b"}", dict), (b"]", list), (b")", tuple), (b"\x8f", set))
        ),
        _act(b"J", lambda m: m.stack.append(m.number(_I4))),
        _act(b"K", lambda m: m.stack.append(m.number(_U1))),
        _act(b"M", lambda m: m.stack.append(m.number(_U2))),
        _act(b"G", lambda m: m.stack.append(m.number(_F8))),
        *(_act(c, _counted(f, _long)) for c, f in ((b"\x8a", _U1), (b"\x8b", _I4))),
        *(_act(c, _counted(f, _text)) for c, f in ((b"X", _U4), (b"\x8c", _U1), (b"\x8d", _U8))),
        *(_act(c, _counted(f, bytes)) for c, f in ((b"B", _U4), (b"C", _U1), (b"\x8e", _U8))),
        _act(b"\x96", _counted(_U8, bytes)),
        _act(b"t", lambda m: m.stack.append(tuple(m.popped()))),
        *(_act(c, _tuple(n)) for c, n in ((b"\x85", 1), (b"\x86", 2), (b"\x87", 3))),
        *(_act(c, lambda m: _fill(m, m.popped())) for c in (b"e", b"u", b"\x90")),
        _act(b"a", lambda m: _fill(m, [m.pop()])),
        _act(b"s", lambda m: _fill(m, [m.pop(), m.pop()][::-1])),
        _act(b"\x91", lambda m: m.stack.append(frozenset(_key(item) for item in m.popped()))),
        _act(b"q", lambda m: m.keep(m.number(_U1))),
        _act(b"r", lambda m: m.keep(m.number(_U4))),
        _act(b"\x94", lambda m: m.keep(len(m.memo))),
        _act(b"h", lambda m: m.stack.append(m.memo[m.number(_U1)])),
        _act(b"j", lambda m: m.stack.append(m.memo[m.number(_U4)])),
        _act(b"c", lambda m: _symbol(m, m.line(), m.line())),
        _act(b"\x93", lambda m: _symbol(m, *[m.pop(), m.pop()][::-1])),
        *(_act(c, lambda m: _make(m, m.pop())) for c in (b"R", b"\x81")),
        _act(b"b", _build),
        _act(b"Q", _persistent),
    )
)
