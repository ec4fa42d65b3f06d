"""Strangers change nothing and cost nothing: every way to be one ends in a typed refusal."""

import random

import pytest

from outlast.cluster import wire
from outlast.cluster.wire import (
    BODY_BYTES_MAX,
    HELLO_BYTES,
    MAGIC,
    STRANGER_BYTES_MAX,
    Rejected,
    Session,
)

KEY = b"a key of the job"


def pair(
    job: str = "job", other_job: str = "job", key: bytes = KEY, other_key: bytes = KEY
) -> tuple[Session, Session]:
    """Two ends that have exchanged their hellos."""
    a = Session(job, key, b"a" * 16, initiator=True)
    b = Session(other_job, other_key, b"b" * 16, initiator=False)
    assert a.receive(b.hello) == []
    assert b.receive(a.hello) == []
    return a, b


def test_messages_arrive_in_any_pieces() -> None:
    a, b = pair()
    said = [{"n": n, "text": "x" * (n * 37)} for n in range(20)]
    stream = b"".join(a.send(message) for message in said)
    heard, rest, cut = [], stream, random.Random(1)
    while rest:
        size = cut.randint(1, 50)
        heard += b.receive(rest[:size])
        rest = rest[size:]
    assert heard == said
    assert b.authenticated
    assert not a.authenticated


def test_both_directions_work() -> None:
    a, b = pair()
    assert a.receive(b.send({"from": "b"})) == [{"from": "b"}]
    assert b.receive(a.send({"from": "a"})) == [{"from": "a"}]


def test_the_first_frame_may_come_with_the_hello() -> None:
    a, _ = pair()
    fresh = Session("job", KEY, b"b" * 16, initiator=False)
    assert fresh.receive(a.hello + a.send({"n": 1})) == [{"n": 1}]


def test_another_key() -> None:
    a, b = pair(other_key=b"another key, same job")
    with pytest.raises(Rejected, match="another key"):
        b.receive(a.send({}))
    assert not b.authenticated


def test_another_job() -> None:
    with pytest.raises(Rejected, match="another job"):
        pair(other_job="other")


def test_another_version() -> None:
    with pytest.raises(Rejected, match="another version"):
        Session("job", KEY, b"c" * 16, initiator=True).receive(MAGIC[:-1] + b"\x02" + bytes(32))


def test_garbage_is_noticed_at_its_first_byte() -> None:
    with pytest.raises(Rejected, match="not an outlast agent"):
        Session("job", KEY, b"c" * 16, initiator=False).receive(b"G")


def test_a_replayed_frame() -> None:
    a, b = pair()
    frame = a.send({"n": 1})
    b.receive(frame)
    with pytest.raises(Rejected, match="sequence"):
        b.receive(frame)


def test_a_replayed_session() -> None:
    a, _ = pair()
    recorded = a.hello + a.send({"n": 1})
    later = Session("job", KEY, b"fresh nonce of b", initiator=False)
    with pytest.raises(Rejected):
        later.receive(recorded)


def test_a_reflected_frame() -> None:
    a, _ = pair()
    with pytest.raises(Rejected):
        a.receive(a.send({"n": 1}))


def test_a_reflected_session() -> None:
    a = Session("job", KEY, b"a" * 16, initiator=True)
    a.receive(a.hello)
    with pytest.raises(Rejected):
        a.receive(a.send({"n": 1}))


def test_reordered_frames() -> None:
    a, b = pair()
    first, second = a.send({"n": 1}), a.send({"n": 2})
    with pytest.raises(Rejected):
        b.receive(second + first)


def test_every_flipped_bit_is_noticed() -> None:
    frame = pair()[0].send({"n": 1})
    for position in range(4 * 8, len(frame) * 8):
        a, b = pair()
        altered = bytearray(a.send({"n": 1}))
        altered[position // 8] ^= 1 << position % 8
        with pytest.raises(Rejected):
            b.receive(bytes(altered))


def test_a_stranger_may_not_announce_much() -> None:
    _, b = pair()
    with pytest.raises(Rejected, match="at most"):
        b.receive((STRANGER_BYTES_MAX + 1).to_bytes(4, "big"))


def test_an_agent_may_not_announce_everything() -> None:
    a, b = pair()
    b.receive(a.send({}))
    with pytest.raises(Rejected, match="at most"):
        b.receive((BODY_BYTES_MAX + 1).to_bytes(4, "big"))
    with pytest.raises(ValueError, match="at most"):
        a.send({"text": "x" * BODY_BYTES_MAX})


def test_a_large_message_passes_once_authenticated() -> None:
    a, b = pair()
    b.receive(a.send({}))
    large = {"text": "x" * (BODY_BYTES_MAX - 100)}
    assert b.receive(a.send(large)) == [large]


def test_the_first_error_is_final() -> None:
    a, b = pair()
    good = a.send({})
    with pytest.raises(Rejected):
        b.receive(b"\xff" * 100)
    with pytest.raises(Rejected):
        b.receive(good)


def test_random_bytes_are_refused_with_bounded_memory() -> None:
    for seed in range(300):
        noise = random.Random(seed).randbytes(200)
        _, b = pair()
        with pytest.raises(Rejected):
            b.receive(noise)
        with pytest.raises(Rejected):
            b.receive(noise)
        assert len(b._buffer) == 0


def test_random_prefixes_of_a_hello() -> None:
    for size in range(HELLO_BYTES):
        b = Session("job", KEY, b"b" * 16, initiator=False)
        assert b.receive(Session("job", KEY, b"a" * 16, initiator=True).hello[:size]) == []
        assert not b.introduced


@pytest.mark.parametrize("body", [b"[1]", b"{", b"\xff", b"[" * 3000])
def test_a_frame_that_is_no_object(body: bytes) -> None:
    a, b = pair()
    assert a._keys is not None
    tag = wire._tag(a._keys[0], 0, body)
    with pytest.raises(Rejected, match="not"):
        b.receive(len(body).to_bytes(4, "big") + body + tag)


def test_any_bytes_pass_below_the_messages() -> None:
    a, b = pair()
    said = [b"", b"\x00\xff", bytes(range(256)) * 10]
    assert b.unseal(b"".join(a.seal(body) for body in said)) == said
    with pytest.raises(Rejected, match="JSON"):
        b.receive(a.seal(b"no JSON"))
    with pytest.raises(Rejected, match="JSON"):
        b.receive(a.send({}))
