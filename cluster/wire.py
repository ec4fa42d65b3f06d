"""An authenticated session over a byte stream, without the stream.

Both ends send a hello in clear: magic with version, hash of the job, a fresh nonce. Each direction
then has a key of its own, derived from the job key and both nonces, and every frame is

    length of body (u32, big endian) | body | HMAC-SHA256(key, number | body)

where `number` counts the frames of the direction. The bodies of agents are JSON objects (`send`,
`receive`), those of bulk data any bytes (`seal`, `unseal`). So a replayed, reflected, reordered or
foreign frame fails its tag, and the first good frame proves that the peer holds the job key. The
length is checked before anything is stored: a stranger costs at most `STRANGER_BYTES_MAX`. The
first error is final; what was received after it is never looked at.
"""

import hashlib
import hmac
import json
from typing import Any

from outlast.cluster.errors import OutlastError

MAGIC = b"outlast\x01"
NONCE_BYTES = 16
JOB_BYTES = 16
TAG_BYTES = 32
HELLO_BYTES = len(MAGIC) + JOB_BYTES + NONCE_BYTES
STRANGER_BYTES_MAX = 4 << 10
BODY_BYTES_MAX = 1 << 20


class Rejected(OutlastError):
    """The peer is not an agent of this job, or does not speak as one; the connection is closed."""


class Session:
    """One end of an authenticated stream.

    nonce: `NONCE_BYTES` fresh random bytes. initiator: whether this end opened the connection.
    """

    def __init__(self, job_id: str, key: bytes, nonce: bytes, *, initiator: bool) -> None:
        if len(nonce) != NONCE_BYTES:
            raise ValueError(f"nonce: {NONCE_BYTES} bytes expected, got {len(nonce)}")
        self._job = hashlib.sha256(job_id.encode()).digest()[:JOB_BYTES]
        self._key = key
        self._nonce = nonce
        self._initiator = initiator
        self._keys: tuple[bytes, bytes] | None = None  # of what is sent, of what is received
        self._sent = 0
        self._received = 0
        self._buffer = bytearray()
        self._rejected: Rejected | None = None

    @property
    def hello(self) -> bytes:
        """The first bytes to send."""
        return MAGIC + self._job + self._nonce

    @property
    def introduced(self) -> bool:
        """Whether the peer's hello was received, so that frames can be sent."""
        return self._keys is not None

    @property
    def authenticated(self) -> bool:
        """Whether the peer has proved that it holds the job key."""
        return self._received > 0

    def send(self, message: dict[str, Any]) -> bytes:
        """The frame that carries this message."""
        return self.seal(json.dumps(message, separators=(",", ":"), allow_nan=False).encode())

    def seal(self, body: bytes) -> bytes:
        """The frame that carries these bytes."""
        assert self._keys is not None, "the peer's hello comes first"
        if len(body) > BODY_BYTES_MAX:
            raise ValueError(f"a message of {len(body)} bytes, at most {BODY_BYTES_MAX}")
        frame = len(body).to_bytes(4, "big") + body + _tag(self._keys[0], self._sent, body)
        self._sent += 1
        return frame

    def receive(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that these bytes complete; raises Rejected now and ever after on others."""
        try:
            return [decode(body) for body in self.unseal(data)]
        except Rejected as error:
            self._rejected = error
            raise

    def unseal(self, data: bytes) -> list[bytes]:
        """The bodies that these bytes complete; raises Rejected now and ever after on others."""
        if self._rejected is not None:
            raise self._rejected
        self._buffer += data
        try:
            return self._frames()
        except Rejected as error:
            self._rejected = error
            self._buffer.clear()
            raise

    def _frames(self) -> list[bytes]:
        if self._keys is None and not self._hello():
            return []
        assert self._keys is not None
        bodies, start = [], 0
        while len(self._buffer) - start >= 4:
            length = int.from_bytes(self._buffer[start : start + 4], "big")
            limit = BODY_BYTES_MAX if self.authenticated else STRANGER_BYTES_MAX
            if length > limit:
                raise Rejected(f"a frame of {length} bytes, at most {limit}")
            stop = start + 4 + length
            if len(self._buffer) < stop + TAG_BYTES:
                break
            body = bytes(self._buffer[start + 4 : stop])
            tag = bytes(self._buffer[stop : stop + TAG_BYTES])
            if not hmac.compare_digest(tag, _tag(self._keys[1], self._received, body)):
                known = "out of sequence or altered" if self.authenticated else "with another key"
                raise Rejected(f"a frame {known}")
            self._received += 1
            bodies.append(body)
            start = stop + TAG_BYTES
        del self._buffer[:start]
        return bodies

    def _hello(self) -> bool:
        hello = bytes(self._buffer[:HELLO_BYTES])
        if not hello.startswith(MAGIC[: len(hello)]):
            version = hello.startswith(MAGIC[:-1])
            raise Rejected("another version of outlast" if version else "not an outlast agent")
        job = hello[len(MAGIC) : len(MAGIC) + JOB_BYTES]
        if not self._job.startswith(job):
            raise Rejected("an agent of another job")
        if len(hello) < HELLO_BYTES:
            return False
        del self._buffer[:HELLO_BYTES]
        peer = hello[-NONCE_BYTES:]
        nonces = self._nonce + peer if self._initiator else peer + self._nonce
        keys = [_mac(self._key, b"outlast", self._job, nonces, way) for way in (b"out", b"in")]
        self._keys = (keys[0], keys[1]) if self._initiator else (keys[1], keys[0])
        return True


def _mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(parts), "sha256")


def _tag(key: bytes, number: int, body: bytes) -> bytes:
    return _mac(key, number.to_bytes(8, "big"), body)


def decode(body: bytes) -> dict[str, Any]:
    """The message in this body, a JSON object; raises Rejected on anything else."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Rejected(f"a frame that is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise Rejected("a frame that is not a JSON object")
    return message
