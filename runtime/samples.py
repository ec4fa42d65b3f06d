"""Which samples a leaf of a step reads: a pure function of (seed, step, leaf), whatever the
world size.

The data set is read in epochs. Every epoch is a permutation of its indices, computed one index
at a time by a keyed Feistel network with cycle walking (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002), so that no rank stores a permutation and the order does not
depend on the version of any library.

>>> sorted(permuted(i, 10, key=7) for i in range(10))
[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
>>> samples(0, step=3, leaf=1, leaves=4, batch_size=2, length=100) == samples(
...     0, step=3, leaf=1, leaves=4, batch_size=2, length=100)
True
"""

import hashlib

_ROUNDS = 4


def _key(*parts: int) -> int:
    """64-bit key of a tuple of integers, stable across machines and versions."""
    text = ",".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _round(value: int, key: int) -> int:
    """A 64-bit mixing function (splitmix64's finaliser)."""
    value = (value + key) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def permuted(index: int, length: int, key: int) -> int:
    """Image of `index` under the keyed permutation of range(length)."""
    assert 0 <= index < length
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    value = index
    while True:
        left, right = value >> half_bits, value & mask
        for round_index in range(_ROUNDS):
            left, right = right, left ^ (_round(right, key + round_index) & mask)
        value = (left << half_bits) | right
        if value < length:
            return value


def samples(
    seed: int, step: int, leaf: int, leaves: int, batch_size: int, length: int
) -> list[int]:
    """Indices of the samples that `leaf` of `step` reads, out of a data set of `length` samples."""
    first = (step * leaves + leaf) * batch_size
    positions = range(first, first + batch_size)
    return [permuted(at % length, length, _key(seed, at // length)) for at in positions]


def leaf_seed(seed: int, step: int, leaf: int) -> int:
    """Seed of every random number drawn while `leaf` of `step` is computed."""
    return _key(seed, step, leaf) >> 1
