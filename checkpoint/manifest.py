"""The manifest of the native format: what a step holds, and a digest of every file of values.

    {"checksum": xxh3-64 of the body's text, "body": {"format": 2, "contents": ..., "shards": ...}}

It is written last: a step is there when its manifest is. It has one form only, so that any other
byte in it is an error, also one that JSON would not mind.
"""

import json
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import xxhash

from outlast.checkpoint.contents import Contents
from outlast.checkpoint.grid import grid
from outlast.cluster.errors import Corrupt

FORMAT = 2
BYTES_MAX = 1 << 28


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents, and key of each array -> one digest per shard, in order (`native.write_shard`)."""

    contents: Contents
    shards: dict[str, tuple[str, ...]]

    def to_bytes(self) -> bytes:
        """Its file; `from_bytes` reads it back."""
        shards = {array.key: self.shards[array.key] for array in self.contents.arrays}
        body = {"format": FORMAT, "contents": self.contents.as_json(), "shards": shards}
        return _sealed(body)

    @classmethod
    def from_bytes(cls, data: bytes, where: object) -> Self:
        """What `to_bytes` wrote; `where` is the file, for messages.

        Raises:
            Corrupt: it is anything else, or contradicts itself.
        """
        try:
            body = json.loads(data)["body"]
            if _sealed(body) != data:
                raise Corrupt(f"{where} at byte 0: is not what was written")
            if body["format"] != FORMAT:
                raise Corrupt(f"{where} at byte 0: of format {body['format']}, not {FORMAT}")
            contents = Contents.from_json(body["contents"])
            shards = {str(key): tuple(map(str, found)) for key, found in body["shards"].items()}
            if flaw := next(iter(contents.flaws()), None):
                raise Corrupt(f"{where} at byte 0: {flaw}")
            manifest = cls(contents, shards)
            if manifest.to_bytes() != data:
                raise Corrupt(f"{where} at byte 0: values of other types than were written")
            for array in contents.arrays:
                count = _shard_count(array.shape)
                if len(shards[array.key]) != count:
                    why = f"{len(shards[array.key])} digests for {count} shards of {array.key}"
                    raise Corrupt(f"{where} at byte 0: {why}")
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
                ValueError) as cause:  # fmt: skip
            raise Corrupt(f"{where} at byte 0: no manifest: {cause!r}"[:1000]) from cause
        return manifest


def _sealed(body: dict[str, Any]) -> bytes:
    text = json.dumps(body)
    return f'{{"checksum": "{xxhash.xxh3_64_hexdigest(text.encode())}", "body": {text}}}'.encode()


def _shard_count(shape: tuple[int, ...]) -> int:
    """Without a list of them: the shape may be a lie."""
    sizes = zip(shape, grid(shape).shard, strict=True)
    return prod(-(-whole // part) for whole, part in sizes)
