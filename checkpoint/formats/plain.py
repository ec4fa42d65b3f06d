"""What pickles hold besides tensors, as JSON and back: tuples, bytes, objects of other programs.

What JSON has is itself; everything else is {"!": what it is, "of": its parts}.

>>> to_json({"betas": (0.9, 0.95), "key": b"ab"})
{'betas': {'!': 'tuple', 'of': [0.9, 0.95]}, 'key': {'!': 'bytes', 'of': 'YWI='}}
>>> from_json(to_json({"betas": (0.9, 0.95), 3: b"ab"}))
{'betas': (0.9, 0.95), 3: b'ab'}
"""

from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import Callable
from math import isfinite
from typing import Any

from outlast.checkpoint.formats.pickle_writer import harmless
from outlast.checkpoint.formats.pickles import Opaque, Size, Symbol, TensorRef
from outlast.cluster.errors import Corrupt

Note = Callable[[str], None]  # told of everything that is left out, one sentence each
_GONE = object()
_SEQUENCES = {"size": Size, "tuple": tuple, "set": set, "frozenset": frozenset}  # Size is a tuple


def to_json(value: Any) -> Any:
    """JSON of anything that `pickles.load` returns and that may be written again.

    Raises:
        TypeError: it has a tensor, or an object that may not be `harmless`.
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
    if isinstance(value, Symbol | Opaque) and not harmless(value):
        raise TypeError(f"an object of {value.name:.99}")
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
    """What `to_json` was given; Corrupt for what it never returns."""
    try:
        return _decoded(value)
    except (LookupError, TypeError, ValueError, AttributeError) as cause:
        raise Corrupt(f"the facts of the source are not understood: {cause!r:.200}") from cause


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "!" not in value:
        return {key: _decoded(item) for key, item in value.items()}
    name, parts = value["!"], value["of"]
    if name in ("dict", "ordered"):
        pairs = ((_decoded(k), _decoded(v)) for k, v in parts)
        return OrderedDict(pairs) if name == "ordered" else dict(pairs)
    if name in _SEQUENCES:
        return _SEQUENCES[name](_decoded(item) for item in parts)
    if name == "object":
        return Opaque(str(parts[0]), tuple(_decoded(parts[1])), _decoded(parts[2]))
    simple: dict[str, Any] = {"bytes": b64decode, "symbol": Symbol, "float": float}
    return simple[name](parts)


def carried(value: Any, what: str, note: Note) -> Any:
    """`to_json` of a value without what has no form there, which is noted; None if it is that."""
    found = _pruned(value, what, note, exact=True)
    return None if found is _GONE else to_json(found)


def plain(value: Any, what: str, note: Note) -> Any:
    """A value without what JSON has no form for, which is noted; tuples become lists.

    >>> told: list[str] = []
    >>> plain({"betas": (0.9, 0.99), "seen": {1, 2}, "at": {5: 1}}, "group", told.append), told
    ({'betas': [0.9, 0.99], 'at': {}}, ["group['seen'] is a set", "group['at'] has the key 5"])
    """
    found = _pruned(value, what, note, exact=False)
    return None if found is _GONE else found


def _pruned(value: Any, what: str, note: Note, exact: bool) -> Any:
    """What is kept of a value: all but tensors, or what is JSON's own; _GONE if nothing is."""
    if isinstance(value, dict):
        kept = {k: _pruned(v, f"{what}[{k!r}]", note, exact) for k, v in value.items()}
        for key in [] if exact else [key for key in kept if not isinstance(key, str)]:
            note(f"{what} has the key {key!r}")
            del kept[key]
        pairs = [(key, inner) for key, inner in kept.items() if inner is not _GONE]
        return OrderedDict(pairs) if exact and isinstance(value, OrderedDict) else dict(pairs)
    if isinstance(value, list | tuple):
        items = [_pruned(item, f"{what}[{i}]", note, exact) for i, item in enumerate(value)]
        if any(item is _GONE for item in items):
            return _GONE  # whole: what is left would stand in the wrong places
        return type(value)(items) if exact else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if exact and isinstance(value, Opaque) and isinstance(value.state, dict):
        value = Opaque(value.name, value.args, _pruned(value.state, what, note, exact))
    if exact and not isinstance(value, TensorRef):
        try:
            to_json(value)
        except TypeError as cause:
            note(f"{what} has {cause}, which is not carried on")
            return _GONE
        return value
    kind = f"tensor of shape {value.shape}" if isinstance(value, TensorRef) else ""
    note(f"{what} is a {kind or getattr(value, 'name', type(value).__name__)}")
    return _GONE
