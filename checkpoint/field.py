"""Arithmetic of GF(2^8) modulo 0x11d and the matrices of the erasure code, in plain integers.

Parity row i of a stripe is sum over j of (2^i)^j times data unit j: P, Q and R of RAID
(H. P. Anvin, "The mathematics of RAID-6"), and gf_gen_rs_matrix of ISA-L. Row 0 is the XOR and a
larger m only adds rows. With this matrix any k of the k + m units give back the others for m <= 3,
and for m = 4 up to k = 21 (header of ISA-L's erasure_code.h; the tests try every loss). Beyond,
the rows are those of a Cauchy matrix, 1 / (i + j), for which it always holds.

>>> parity_rows(3, 2)
((1, 1, 1), (1, 2, 4))
>>> decoding_rows(3, 2, frozenset({0, 2}), (0, 1))  # from data unit 1 and both parity units
((245, 166, 167), (244, 167, 167))
"""

from functools import cache, lru_cache

POLYNOMIAL = 0x11D
UNITS_MAX = 255  # k + m: the elements of the field without zero
Rows = tuple[tuple[int, ...], ...]


def multiply(a: int, b: int) -> int:
    """Product of two elements.

    >>> multiply(2, 0x80) == 0x1D
    True
    """
    product = 0
    while b:
        product ^= a * (b & 1)
        a = a << 1 ^ POLYNOMIAL * (a >> 7)
        b >>= 1
    return product


def power(a: int, exponent: int) -> int:
    """`a` to the `exponent` >= 0."""
    result = 1
    while exponent:
        if exponent & 1:
            result = multiply(result, a)
        a = multiply(a, a)
        exponent >>= 1
    return result


def inverse(a: int) -> int:
    """1 / a.

    >>> all(multiply(a, inverse(a)) == 1 for a in range(1, 256))
    True
    """
    if not a:
        raise ZeroDivisionError("0 has no inverse")
    return power(a, 254)


@cache
def parity_rows(k: int, m: int) -> Rows:
    """The coefficients of `m` parity units over `k` data units."""
    if m < 4 or (m == 4 and k <= 21):
        return tuple(tuple(power(power(2, i), j) for j in range(k)) for i in range(m))
    return tuple(tuple(inverse(i ^ j) for j in range(k)) for i in range(k, k + m))


def _solved(rows: Rows) -> Rows:
    """Inverse of a square matrix; ZeroDivisionError if it has none."""
    size = len(rows)
    work = [[*row, *(int(i == j) for j in range(size))] for i, row in enumerate(rows)]
    for column in range(size):
        pivot = next((r for r in range(column, size) if work[r][column]), column)
        work[column], work[pivot] = work[pivot], work[column]
        scale = inverse(work[column][column])
        work[column] = [multiply(scale, value) for value in work[column]]
        for other in range(size):
            factor = work[other][column]
            if other != column and factor:
                pairs = zip(work[other], work[column], strict=True)
                work[other] = [a ^ multiply(factor, b) for a, b in pairs]
    return tuple(tuple(row[size:]) for row in work)


@lru_cache(maxsize=4096)
def decoding_rows(k: int, m: int, lost: frozenset[int], rows: tuple[int, ...]) -> Rows:
    """Coefficients that give the lost data units.

    Args:
        lost: indices of the data units that are gone.
        rows: as many parity rows that are not.
    Returns:
        for each lost unit in ascending order: one coefficient for every data unit that is left,
        in ascending order, and one for every parity unit of `rows`.
    """
    matrix = [parity_rows(k, m)[row] for row in rows]
    gone = sorted(lost)
    left = [j for j in range(k) if j not in lost]
    result = []
    for solution in _solved(tuple(tuple(row[j] for j in gone) for row in matrix)):
        data = []
        for j in left:
            value = 0
            for factor, row in zip(solution, matrix, strict=True):
                value ^= multiply(factor, row[j])
            data.append(value)
        result.append((*data, *solution))
    return tuple(result)
