"""What a model has besides its trained parameters: frozen parameters and persistent buffers.

They are the script's, whole on every rank, and no step changes them. A checkpoint keeps them all
the same, because a script may have got them from elsewhere, or change them by itself.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from outlast.checkpoint.contents import BUFFER, FROZEN, Array
from outlast.checkpoint.dtypes import Values, dtype_of
from outlast.runtime.collectives import Communicator
from outlast.runtime.transfer import Mail

PIECE_BYTES = 16 << 20


class Untrained:
    """The frozen parameters and the buffers of `module` that its state_dict has."""

    def __init__(self, module: nn.Module) -> None:
        stored = module.state_dict().keys()
        frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
        buffers = {n: b for n, b in module.named_buffers() if n in stored}
        self._tensors: dict[str, Tensor] = {}
        self.arrays: list[Array] = []
        for role, found in ((FROZEN, frozen), (BUFFER, buffers)):
            for name, tensor in found.items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                array = Array(role, name, tuple(tensor.shape), dtype)
                self.arrays.append(array)
                self._tensors[array.key] = tensor.detach()

    def copy(self) -> list[tuple[Array, Values]]:
        """Every array with its present values, a vector."""
        return [
            (array, _bytes(self._tensors[array.key]).to("cpu", copy=True).numpy()
             .view(dtype_of(array.dtype)))
            for array in self.arrays
        ]  # fmt: skip

    def fill(self, key: str, start: int, values: Values) -> bool:
        """Set the elements from `start` on; whether that changed anything."""
        tensor = self._tensors[key]
        whole = _bytes(tensor)
        begin = start * tensor.element_size()
        part = whole[begin : begin + values.nbytes]
        new = torch.from_numpy(values.view(np.uint8)).to(part.device)
        if torch.equal(part, new):
            return False
        part.copy_(new)
        if not tensor.is_contiguous():
            tensor.copy_(whole.view(tensor.dtype).view(tensor.shape))
        return True

    def share(self, communicator: Communicator, giver: int, takers: Sequence[int]) -> None:
        """Rank `giver` sends all values to `takers`; a collective."""
        for array in self.arrays:
            whole = _bytes(self._tensors[array.key])
            width = dtype_of(array.dtype).itemsize
            for index, part in enumerate(torch.split(whole, PIECE_BYTES)):
                mail = Mail(communicator)
                data = part.cpu() if communicator.rank == giver else None
                for taker in takers:
                    mail.post(giver, taker, part.numel(), data)
                for values in mail.deliver():
                    self.fill(array.key, index * PIECE_BYTES // width, values.numpy())


def _bytes(tensor: Tensor) -> Tensor:
    """uint8 view of the elements, row-major; a copy of what is not laid out so."""
    return tensor.reshape(-1).view(torch.uint8)
