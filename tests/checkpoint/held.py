"""A checkpoint that lies in memory: a source for every writer, and the truth for every reader."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from outlast.checkpoint.contents import Array, Contents, Group
from outlast.checkpoint.convert import Conversion, convert
from outlast.checkpoint.dtypes import Values, dtype_of
from outlast.checkpoint.formats.registry import FORMATS, Opened, open_checkpoint
from outlast.checkpoint.items import Wanted
from outlast.checkpoint.source import Source, digest

SHAPES: dict[str, tuple[int, ...]] = {
    "wte.weight": (31, 8), "blocks.0.weight": (8, 24), "blocks.0.bias": (24,),
    "blocks.1.weight": (8, 24), "blocks.1.bias": (24,), "scale": (1,),
}  # fmt: skip
HYPER = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


class Held:
    """See `checkpoint.source.Source`."""

    def __init__(self, contents: Contents, values: dict[str, Values]) -> None:
        self.contents, self.values = contents, values

    def read(self, array: Array, start: int, stop: int) -> Values:
        return self.values[array.key].reshape(-1)[start:stop].copy()

    def stored_digest(self, array: Array) -> str | None:
        return None

    def close(self) -> None: ...


def held(dtype: str = "float32", **changes: Any) -> Held:
    """A small model in Adam's hands: two groups, a tied name, frozen, buffers, all of it random."""
    arrays = [Array(role, name, shape, "float32") for role in ("param", "exp_avg", "exp_avg_sq")
              for name, shape in SHAPES.items()]  # fmt: skip
    arrays += [Array("frozen", "adapter.weight", (5, 8), dtype),
               Array("buffer", "mask", (3, 3), "bool"), Array("buffer", "count", (), "int64"),
               Array("buffer", "cos", (7,), "float32")]  # fmt: skip
    matrices = tuple(name for name, shape in SHAPES.items() if len(shape) == 2)
    vectors = tuple(name for name in SHAPES if name not in matrices)
    groups = (Group(matrices, HYPER, {"step": 7.0}),
              Group(vectors, HYPER | {"weight_decay": 0.0}, {"step": 7.0}))  # fmt: skip
    told = {
        "step": 7, "arrays": tuple(arrays), "groups": groups, "dtype": dtype,
        "aliases": {"head.weight": "wte.weight"},
        "facts": {"lr_scheduler": {"last_epoch": 7}, "client_state": {"tokens": 7168}},
        "run": {},
    }  # fmt: skip
    contents = Contents(**(told | changes))
    return Held(contents, {array.key: random(array) for array in contents.arrays})


def random(array: Array) -> Values:
    """Values that depend on the key alone, of all sizes; second moments are positive."""
    generator = np.random.default_rng(list(array.key.encode()))
    if array.dtype == "bool":
        return generator.integers(0, 2, array.shape).astype(bool)
    if array.dtype.startswith("int"):
        return np.asarray(generator.integers(-9, 9, array.shape), dtype=dtype_of(array.dtype))
    values = np.asarray(generator.standard_normal(array.shape), dtype=np.float32)
    values = np.square(values) if array.role == "exp_avg_sq" else values
    return values.astype(dtype_of(array.dtype))


WANTED = {"deepspeed": Wanted(ranks=2, stage=2), "dcp": Wanted(ranks=2)}


def silent(what: str, at: int, total: int) -> None: ...


def into(source: Opened | Source, to: str, directory: Path, **wanted: object) -> Opened:
    """Convert, and open the result as a user would."""
    if not isinstance(source, Opened):
        directory.mkdir(parents=True, exist_ok=True)
        origin = directory / "origin"  # stands for the files of what lies in memory
        origin.mkdir(exist_ok=True)
        source = Opened(FORMATS["native"], origin, source)
    job = conversion(source, to, directory / to, **wanted)
    place = convert(job, silent)
    assert place == job.place
    assert not list(directory.rglob(".*.part"))
    assert {path.name for path in (directory / to).iterdir()} >= {place.name} or place.name == to
    return open_checkpoint(directory / to)


def conversion(source: Opened, to: str, destination: Path, **wanted: object) -> Conversion:
    return Conversion(
        source=source, to=FORMATS[to], destination=destination, workers=2,
        wanted=replace(WANTED.get(to, Wanted()), **wanted),
    )  # fmt: skip


def digests(source: Source) -> dict[str, str]:
    return {array.key: digest(source, array) for array in source.contents.arrays}
