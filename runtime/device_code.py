"""The erasure code of `checkpoint.code` on torch tensors, where they are.

For a device whose snapshots leave it only as parity: encoding there moves m / k of the bytes. The
units are those of the processor's code, byte for byte.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from outlast.checkpoint import doubling
from outlast.checkpoint.code import Code
from outlast.checkpoint.field import Rows

_BLOCK = 8 << 20  # bytes: the block of an output and its scratch fit the cache of a GPU


@dataclass(frozen=True, slots=True)
class DeviceCode(Code):
    """`Code` for one-dimensional uint8 tensors that all lie on one device."""

    def _combine(self, rows: Rows, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        data, results = ([unit.view(torch.int8) for unit in units] for units in (inputs, outputs))
        scratch = torch.empty_like(results[0][:_BLOCK])
        doubling.combine(rows, data, results, scratch)
