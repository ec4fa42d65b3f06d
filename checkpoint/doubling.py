"""Linear combinations over GF(2^8) with nothing but add, shift, and and xor on arrays of int8.

The same lines serve numpy arrays and torch tensors on any device. An output is built from the
highest bit of its coefficients down: double what is there, then add the inputs whose coefficient
has the bit. A row of ones is a plain XOR; no row needs more than 7 doublings, however many inputs.
"""

from typing import Any

from outlast.checkpoint.field import POLYNOMIAL, Rows

_LOW = POLYNOMIAL & 0xFF  # what x^8 is worth


def double(values: Any, scratch: Any) -> None:
    """Multiply every int8 of `values` by 2 in the field, in place; `scratch` is as long.

    >>> import numpy as np
    >>> values = np.array([3, -128], np.int8)
    >>> double(values, np.empty_like(values))
    >>> values.tolist()
    [6, 29]
    """
    scratch[:] = values
    scratch >>= 7  # the sign: all ones where x^8 comes out
    scratch &= _LOW
    values += values
    values ^= scratch


def combine(rows: Rows, inputs: list[Any], outputs: list[Any], scratch: Any) -> None:
    """outputs[i] = sum over j of rows[i][j] * inputs[j]; arrays of int8, all of one length, in
    blocks of the length of `scratch`, so that an output and its scratch stay in a cache."""
    for start in range(0, len(outputs[0]), max(1, len(scratch))):
        data, results = (
            [unit[start : start + len(scratch)] for unit in units] for units in (inputs, outputs)
        )
        _combine(rows, data, results, scratch[: len(results[0])])


def _combine(rows: Rows, inputs: list[Any], outputs: list[Any], scratch: Any) -> None:
    for row, total in zip(rows, outputs, strict=True):
        empty = True
        for bit in reversed(range(max(row, default=0).bit_length())):
            if not empty:
                double(total, scratch)
            for factor, unit in zip(row, inputs, strict=True):
                if not factor >> bit & 1:
                    continue
                if empty:
                    total[:] = unit
                else:
                    total ^= unit
                empty = False
        if empty:
            total[:] = 0
