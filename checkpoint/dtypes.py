"""Element types by their bare names, for numpy: bfloat16 and the float8s come from ml_dtypes."""

from collections.abc import Iterable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from outlast.checkpoint.contents import Array
from outlast.cluster.errors import Misuse

Values = NDArray[np.generic]

_STANDARD = [
    "float64", "float32", "float16", "int64", "int32", "int16", "int8",
    "uint64", "uint32", "uint16", "uint8", "bool", "complex64", "complex128",
]  # fmt: skip
_OTHER = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]

DTYPES: dict[str, np.dtype[np.generic]] = {
    **{name: np.dtype(name) for name in _STANDARD},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in _OTHER},
}


def dtype_of(name: str) -> np.dtype[np.generic]:
    """The numpy dtype of a bare name; Misuse for one that no format here has."""
    if name not in DTYPES:
        raise Misuse(f"dtype {name!r} is not supported: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def nbytes(arrays: Iterable[Array]) -> int:
    """Bytes of their elements."""
    return sum(array.numel * dtype_of(array.dtype).itemsize for array in arrays)


def cast(values: Values, dtype: str) -> Values:
    """`values` rounded to nearest even, as torch does; the same object where nothing changes."""
    return values.astype(dtype_of(dtype), copy=False)
