"""Parcels: a JSON header and bytes, cut into the bodies of frames.

first body    length of head (u32) | head {"size": of payload, "parcel": header} | payload ...
next bodies   payload ...
"""

import json
from collections.abc import Iterator
from typing import Any

from outlast.cluster.wire import Rejected, decode

Parcel = tuple[bytes, bytes | memoryview]  # head with its length, payload

# A slow line must get one through within the silence after which a peer counts as stalled.
FRAME_BYTES = 64 << 10
HEAD_BYTES_MAX = 512 << 10
PARCEL_BYTES_MAX = 64 << 20


def pack(header: dict[str, Any], payload: bytes | memoryview) -> Parcel:
    """A parcel to be sent; raises ValueError if it is too large."""
    size = memoryview(payload).nbytes
    text = json.dumps({"size": size, "parcel": header}, separators=(",", ":"), allow_nan=False)
    head = text.encode()
    if len(head) > HEAD_BYTES_MAX or size > PARCEL_BYTES_MAX:
        raise ValueError(
            f"a parcel of {len(head)} and {size} bytes, at most {HEAD_BYTES_MAX} of header and "
            f"{PARCEL_BYTES_MAX} of payload"
        )
    return len(head).to_bytes(4, "big") + head, payload


def bodies(parcel: Parcel) -> Iterator[bytes]:
    """What goes into its frames."""
    head, payload = parcel
    whole = memoryview(payload).cast("B")
    first = max(0, FRAME_BYTES - len(head))
    yield head + whole[:first]
    for start in range(first, len(whole), FRAME_BYTES):
        yield bytes(whole[start : start + FRAME_BYTES])


class Unfinished:
    """A parcel that arrives, in as much memory as has arrived, whatever it says of its size.

    Raises:
        Rejected: no parcel begins or goes on like this.
    """

    def __init__(self, body: bytes) -> None:
        start = 4 + int.from_bytes(body[:4], "big")
        if not 4 < start <= min(len(body), 4 + HEAD_BYTES_MAX):
            raise Rejected("a parcel without a head")
        head = decode(body[4:start])
        self.header, self._size = head.get("parcel"), head.get("size")
        if type(self.header) is not dict or type(self._size) is not int:
            raise Rejected("a parcel with half a head")
        if not 0 <= self._size <= PARCEL_BYTES_MAX:
            raise Rejected(f"a parcel of {self._size} bytes, at most {PARCEL_BYTES_MAX}")
        self.payload = bytearray()
        self.add(body[start:])

    def add(self, piece: bytes) -> None:
        """More of the payload."""
        self.payload += piece
        if len(self.payload) > self._size:
            raise Rejected("a parcel larger than it said")

    @property
    def whole(self) -> bool:
        """Whether nothing is missing."""
        return len(self.payload) == self._size
