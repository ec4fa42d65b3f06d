"""Steps in the native format with values that are known, written and compared, for its tests."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import held
import numpy as np

from outlast.checkpoint import grid, native
from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.dtypes import DTYPES, Values
from outlast.checkpoint.items import Wanted
from outlast.checkpoint.source import digest

SHAPES = ((), (1,), (0, 4), (7,), (1000,), (30, 7), (9, 5, 6), (3, 70), (2, 3, 1, 40))


@contextmanager
def cuts(chunk: int, shard: int) -> Iterator[None]:
    """Small limits, so that small arrays have many files."""
    native._cut.cache_clear()
    with patch.object(grid, "CHUNK", chunk), patch.object(grid, "SHARD", shard):
        yield
    native._cut.cache_clear()


def example(step: int = 3) -> held.Held:
    """Every shape and every dtype, in a few roles; one array is all zeros."""
    dtypes = sorted(DTYPES)
    arrays = [Array("buffer", f"b{i}", shape, dtypes[i % len(dtypes)])
              for i, shape in enumerate(SHAPES * 3)]  # fmt: skip
    arrays += [Array("param", "h/0.w%", (30, 7), "float32"), Array("param", "zero", (90,), "int8")]
    arrays += [Array("exp_avg", "h/0.w%", (30, 7), "float32")]
    generator = np.random.default_rng(step)
    values = {}
    for array in arrays:
        raw = generator.standard_normal(array.shape) * 50
        with np.errstate(invalid="ignore"):
            values[array.key] = np.asarray(raw).astype(DTYPES[array.dtype])
    values["param/zero"][:] = 0
    return held.Held(Contents(step, tuple(arrays)), values)


def write(source: held.Held, directory: Path, seed: int = 0, threads: int = 1) -> Path:
    """By as many writers, in any order."""
    *items, last = native.plan(source, directory, Wanted())
    random.Random(seed).shuffle(items)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda item: item.make(lambda size: None), items))
    last.make(lambda size: None)
    return directory


def files(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def check(directory: Path, truth: held.Held, count: int = 4) -> None:
    """Read everything, whole and in so many intervals."""
    source = native.open(directory)
    assert source.contents == truth.contents
    generator = random.Random(1)
    for array in truth.contents.arrays:
        expected = truth.values[array.key].reshape(-1)
        intervals = [sorted(generator.choices(range(array.numel + 1), k=2)) for _ in range(count)]
        for start, stop in [(0, array.numel), *intervals]:
            same(source.read(array, start, stop), expected[start:stop])
        assert digest(source, array) == source.stored_digest(array)
    source.close()


def same(found: Values, expected: Values) -> None:
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


def small(step: int = 1) -> held.Held:
    arrays = tuple(Array(role, "w", (3, 5), "float32") for role in ("param", "exp_avg"))
    contents = Contents(step, arrays, run={"losses": [0.5]})
    generator = np.random.default_rng(step)
    return held.Held(contents, {a.key: generator.random((3, 5), "float32") for a in arrays})


def flip(path: Path, at: int, bit: int = 1) -> bytes:
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
    return whole
