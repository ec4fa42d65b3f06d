"""The counterpart of `pickles.load`: its values as a pickle that torch, too, reads.

Written are protocol 2 and only opcodes that torch.load(weights_only=True) knows. Classes appear
under their names, tensors as references to storages that `torch_zip.write` puts beside the pickle.
What is written may be loaded by who runs what pickles say, and it may come from a checkpoint that
nobody should trust: named are only classes that hold what they are given (`harmless`).
"""

import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from outlast.checkpoint.dtypes import dtype_of
from outlast.checkpoint.formats.pickles import STORAGES, Opaque, Size, Symbol, TensorRef
from outlast.cluster.errors import Misuse

_CLASS_OF = {dtype: name for name, dtype in STORAGES.items()}

_HARMLESS = re.compile(
    r"""torch\.(bool|device|(bfloat|float|complex|q?u?int)\d\w*|serialization\._get_layout)
    | torch\.distributed\.checkpoint\.filesystem\._StorageInfo
    | torch\.distributed\.checkpoint\.metadata\.(((Bytes|Tensor|Chunk)Storage)?Metadata
        | MetadataIndex | TensorProperties | StorageMeta | _MEM_FORMAT_ENCODING)
    | deepspeed\.runtime\.(zero\.config\.ZeroStageEnum|fp16\.loss_scaler\.(Dynamic)?LossScaler)
    | deepspeed\.utils\.tensor_fragment\.fragment_address
    | deepspeed\.checkpoint\.universal_checkpoint\.SubparamShape
    | megatron\.core\.(transformer\.)?enums\.[A-Z]\w*
    | megatron\.core\.rerun_state_machine\.Rerun(Diagnostic|Mode|State|ValidationStatus)
    | numpy\.(ndarray|dtype|(_core|core)\.(multiarray\._reconstruct|numeric\._frombuffer))
    | pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path | argparse\.Namespace | _io\.BytesIO
    | datetime\.(date|time|datetime|timedelta|timezone)
    | builtins\.(complex|range|slice)
    """,
    re.VERBOSE,
)


def harmless(value: Symbol | Opaque) -> bool:
    """Whether a program that loads it can only get an object that holds what it was given.

    numpy believes what the state of a dtype says of itself: only numbers are known to be fine.
    """
    if isinstance(value, Opaque) and value.name in ("numpy.dtype", "numpy.ndarray"):
        kind, state = str(value.args[:1]), value.state
        usual = isinstance(state, tuple) and state[2:] == (None, None, None, -1, -1, 0)
        number = value.name == "numpy.dtype" and re.fullmatch(r"\('[biufc]\d+',\)", kind)
        return bool(number) and (state is None or usual)
    return _HARMLESS.fullmatch(value.name) is not None


@dataclass(frozen=True, slots=True)
class Dumped:
    """A pickle, and the storages that it refers to: key -> dtype and elements of each."""

    data: bytes
    storages: dict[str, tuple[str, int]]


def dump(value: Any) -> Dumped:
    """Pickle what `pickles.load` can return; numbers, texts, containers, `Opaque`, `TensorRef`.

    Raises:
        Misuse: it has an object that may not be `harmless`; or two tensors differ about their
            storage.
    """
    writer = _Writer()
    writer.put(value)
    return Dumped(b"\x80\x02%b." % b"".join(writer.out), writer.storages)


class _Writer:
    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.memo: dict[Any, int] = {}
        self.storages: dict[str, tuple[str, int]] = {}

    def put(self, value: Any) -> None:
        """Append a value of any kind."""
        for kind, put in _PUTS:
            if isinstance(value, kind):
                put(self, value)
                return
        raise Misuse(f"a {type(value).__name__} cannot be written: use plain values")

    def once(self, value: Any, code: bytes) -> None:
        """Append `code` the first time, later a reference to what it made."""
        if value in self.memo:
            self.out.append(b"j" + struct.pack("<I", self.memo[value]))
            return
        self.memo[value] = len(self.memo)
        self.out.append(code + b"r" + struct.pack("<I", self.memo[value]))

    def name(self, full: str) -> None:
        """Append a class or function, which is known to be harmless."""
        module, _, name = full.replace("builtins.", "__builtin__.").rpartition(".")
        self.once((module, name), f"c{module}\n{name}\n".encode())

    def call(self, name: str, *args: Any, code: bytes = b"R") -> None:
        """Append a call of a class or function, which is known to be harmless."""
        self.name(name)
        self.put(args)
        self.out.append(code)


def _integer(writer: _Writer, value: int) -> None:
    if 0 <= value < 256:
        writer.out.append(b"K%c" % value)
    elif -(2**31) <= value < 2**31:
        writer.out.append(struct.pack("<ci", b"J", value))
    else:
        size = value.bit_length() // 8 + 1
        if size > 64:  # as they are read
            raise Misuse(f"an integer of {size} bytes is not written")
        writer.out.append(b"\x8a%c" % size + value.to_bytes(size, "little", signed=True))


def _text(writer: _Writer, value: str) -> None:
    data = value.encode("utf-8", "surrogatepass")
    writer.once(value, struct.pack("<cI", b"X", len(data)) + data)


def _symbol(writer: _Writer, value: Symbol) -> None:
    _refuse_harm(value)
    writer.name(value.name)


def _refuse_harm(value: Symbol | Opaque) -> None:
    if not harmless(value):
        name = ascii(value.name[:99])
        raise Misuse(f"{name} is not written: whoever loads it might run code that way")


def _items(writer: _Writer, values: Any, code: bytes) -> None:
    writer.out.append(b"(")
    for value in values:
        writer.put(value)
    writer.out.append(code)


def _sequence(writer: _Writer, value: list[Any]) -> None:
    writer.out.append(b"]")
    _items(writer, value, b"e")


def _mapping(writer: _Writer, value: dict[Any, Any]) -> None:
    if isinstance(value, OrderedDict):
        writer.call("collections.OrderedDict")
    else:
        writer.out.append(b"}")
    _items(writer, (part for pair in value.items() for part in pair), b"u")


def _opaque(writer: _Writer, value: Opaque) -> None:
    _refuse_harm(value)
    # A class with arguments is called, as enums need it; one without them is only allocated.
    writer.call(value.name, *value.args, code=b"R" if value.args else b"\x81")
    if value.state is not None:
        writer.put(value.state)
        writer.out.append(b"b")


def _tensor(writer: _Writer, ref: TensorRef) -> None:
    typed = ref.dtype in _CLASS_OF
    name = _CLASS_OF.get(ref.dtype, "storage.UntypedStorage")
    extent = ref.extent if typed else ref.extent * dtype_of(ref.dtype).itemsize
    known = writer.storages.setdefault(ref.key, (ref.dtype, ref.extent))
    if known != (ref.dtype, ref.extent):
        raise Misuse(f"storage {ref.key} is {known} and {(ref.dtype, ref.extent)}: name it twice")
    writer.name(f"torch._utils._rebuild_tensor_v{2 if typed else 3}")
    writer.out.append(b"((")
    writer.put("storage")
    writer.name(f"torch.{name}")
    for place in (ref.key, "cpu", extent):
        writer.put(place)
    writer.out.append(b"tQ")
    rest: tuple[Any, ...] = (ref.start, tuple(ref.shape), ref.strides, False, OrderedDict())
    for part in rest:
        writer.put(part)
    if not typed:
        writer.put(Symbol(f"torch.{ref.dtype}"))
    writer.out.append(b"tR")


_PUTS: list[tuple[type | tuple[type, ...], Callable[[_Writer, Any], Any]]] = [
    (type(None), lambda w, v: w.out.append(b"N")),
    (bool, lambda w, v: w.out.append(b"\x88" if v else b"\x89")),
    (int, _integer),
    (float, lambda w, v: w.out.append(struct.pack(">cd", b"G", v))),
    (str, _text),
    (bytes, lambda w, v: w.call("_codecs.encode", v.decode("latin-1"), "latin1")),
    (Symbol, _symbol),
    (TensorRef, _tensor),
    (Opaque, _opaque),
    (Size, lambda w, v: w.call("torch.Size", tuple(v))),
    (tuple, lambda w, v: _items(w, v, b"t")),
    (list, _sequence),
    (dict, _mapping),
    (set, lambda w, v: w.call("builtins.set", sorted(v, key=repr))),
    (frozenset, lambda w, v: w.call("builtins.frozenset", sorted(v, key=repr))),
]
