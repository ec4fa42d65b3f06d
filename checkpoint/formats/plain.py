"""What pickles hold besides tensors, as JSON and back: tuples, bytes, objects of other programs.

What JSON has is itself; everything else is {"!": what it is, "of": its parts}.

>>> to_json({"betas": (0.9, 0.95), "key": b"ab"})
{'betas': {'!': 'tuple', 'of': [0.9, 0.95]}, 'key': {'!': 'bytes', 'of': 'YWI='}}
>>> from_json(to_json({"betas": (0.9, 0.95), 3: b"ab"}))
{'betas': (0.9, 0.95), 3: b'ab'}
"""

from base64 import b64decode, b64encode
from collections import OrderedDict
from math import isfinite
from typing import Any

from outlast.checkpoint.formats.pickles import Opaque, Size, Symbol, TensorRef

_SEQUENCES = {"size": Size, "tuple": tuple, "set": set, "frozenset": frozenset}  # Size is a tuple


def to_json(value: Any) -> Any:
    """JSON of anything that `pickles.load` returns and that has no tensors.

    Raises:
        TypeError: it has some.
    """
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if type(value) is dict and "!" not in value and all(isinstance(key, str) for key in value):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, dict):
        name = "ordered" if isinstance(value, OrderedDict) else "dict"
        return _tagged(name, [[to_json(k), to_json(v)] for k, v in value.items()])
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return _tagged(name, [to_json(item) for item in value])
    if isinstance(value, bytes):
        return _tagged("bytes", b64encode(value).decode())
    if isinstance(value, Symbol):
        return _tagged("symbol", value.name)
    if isinstance(value, Opaque):
        return _tagged("object", [value.name, to_json(value.args), to_json(value.state)])
    if isinstance(value, TensorRef):
        raise TypeError(f"a tensor {value.shape}")
    if isinstance(value, float) and not isfinite(value):
        return _tagged("float", repr(value))
    return value


def _tagged(name: str, parts: Any) -> dict[str, Any]:
    return {"!": name, "of": parts}


def from_json(value: Any) -> Any:
    """What `to_json` was given."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "!" not in value:
        return {key: from_json(item) for key, item in value.items()}
    name, parts = value["!"], value["of"]
    if name in ("dict", "ordered"):
        pairs = ((from_json(k), from_json(v)) for k, v in parts)
        return OrderedDict(pairs) if name == "ordered" else dict(pairs)
    if name in _SEQUENCES:
        return _SEQUENCES[name](from_json(item) for item in parts)
    if name == "object":
        return Opaque(str(parts[0]), from_json(parts[1]), from_json(parts[2]))
    simple: dict[str, Any] = {"bytes": b64decode, "symbol": Symbol, "float": float}
    return simple[name](parts)
