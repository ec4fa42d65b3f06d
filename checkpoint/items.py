"""A checkpoint to be written, as a list of items: what each format's writer plans."""

from collections.abc import Callable
from dataclasses import dataclass

from outlast.checkpoint.source import Tick


@dataclass(frozen=True, slots=True)
class Item:
    """A part of a checkpoint that is whole or not there, usually one file.

    Args:
        name: unique in its checkpoint, the same whenever it is planned again: what is done already
            is known by it.
        size: bytes that `make` will report to its tick, for the progress bar.
        make: writes it; may run beside the others, and again after it was cut short. Its memory is
            bounded whatever the size.
        final: it needs all the others done, in this run or an earlier one.
    """

    name: str
    size: int
    make: Callable[[Tick], None]
    final: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """How a checkpoint is to be written, where its format leaves a choice.

    Args:
        ranks: data-parallel ranks that are to load it.
        stage: ZeRO stage of DeepSpeed.
        dtype: of the weights, in a format that has only weights; None for that of the model.
        file_bytes: of one file at most, in a format that cuts by size.
    """

    ranks: int = 1
    stage: int = 1
    dtype: str | None = None
    file_bytes: int = 5_000_000_000
