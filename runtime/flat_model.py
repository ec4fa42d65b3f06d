"""A model whose parameters are views of one flat buffer, laid out by the address space.

The buffer holds the working parameters: those that forward and backward use, whole on every rank
in ZeRO 0 to 2. Gradients of one leaf are views of a second buffer, which is emptied before each
leaf, so that a parameter that a leaf did not use has a zero gradient and needs no special case."""

import hashlib
import re

import torch
from torch import Tensor, nn

from outlast.cluster.errors import Misuse
from outlast.layout.space import Space
from outlast.layout.space import Tensor as SpaceTensor


def unit_of(name: str) -> str:
    """Unit of a parameter: its block where modules are numbered, else its top-level module.

    >>> unit_of("blocks.3.attention.weight"), unit_of("head.weight")
    ('blocks.3', 'head')
    """
    block = re.match(r"(.*?\.\d+)\.", name)
    return block.group(1) if block else name.split(".")[0]


class FlatModel:
    """Working parameters and leaf gradients of `module`, addressed by `space`.

    Args:
        module: its trainable parameters must lie on one device; tied parameters count once.
        dtype: dtype of the working parameters; None keeps theirs.
    Raises:
        Misuse: nothing to train, several devices or dtypes, or statistics that depend on the rank.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        _check(module, trained)
        self.module = module.to(dtype=dtype) if dtype else module
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        first_of = {p: n for n, p in module.named_parameters()}
        self.aliases = {  # of tied parameters: other name -> name
            n: first_of[p]
            for n, p in module.named_parameters(remove_duplicate=False)
            if n != first_of[p]
        }
        first = next(iter(self.parameters.values()))
        self.device, self.dtype = first.device, first.dtype
        self.space = Space.of(
            [
                SpaceTensor(n, tuple(p.shape), str(p.dtype).removeprefix("torch."))
                for n, p in self.parameters.items()
            ],
            unit_of,
        )
        self.param = torch.empty(self.space.numel, dtype=self.dtype, device=self.device)
        for name, parameter in self.parameters.items():
            view = self._view(self.param, name)
            view.copy_(parameter.data)
            parameter.data = view

    def _view(self, flat: Tensor, name: str) -> Tensor:
        run = self.space.run(name)
        return flat[run.start : run.stop].view(self.parameters[name].shape)

    def bind_gradients(self, flat: Tensor) -> None:
        """Let backward accumulate into `flat` [numel], which is emptied."""
        flat.zero_()
        for name, parameter in self.parameters.items():
            parameter.grad = self._view(flat, name)

    def collect_gradients(self, flat: Tensor) -> None:
        """Unbind `flat`, after copying in what a script put into `.grad` by itself."""
        for name, parameter in self.parameters.items():
            view = self._view(flat, name)
            if parameter.grad is not None and parameter.grad.data_ptr() != view.data_ptr():
                view.copy_(parameter.grad)
            parameter.grad = None

    def fingerprint(self) -> str:
        """sha256 over the space and the present values, buffers and frozen parameters included."""
        digest = hashlib.sha256(self.space.fingerprint().encode())
        digest.update(_bytes(self.param))
        rest = dict(self.module.named_buffers()) | {
            n: p for n, p in self.module.named_parameters() if not p.requires_grad
        }
        for name in sorted(rest):
            digest.update(name.encode())
            digest.update(_bytes(rest[name].detach()))
        return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()


def _check(module: nn.Module, trained: dict[str, nn.Parameter]) -> None:
    if not trained:
        raise Misuse("the model has no parameter with requires_grad")
    devices = {parameter.device for parameter in trained.values()}
    if len(devices) > 1:
        raise Misuse(f"the parameters lie on {len(devices)} devices: move the model to one first")
    dtypes = {parameter.dtype for parameter in trained.values()}
    if len(dtypes) > 1:
        raise Misuse(f"parameters of {sorted(map(str, dtypes))}: pass dtype= to prepare()")
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
            raise Misuse(
                f"{name or type(part).__name__} keeps running statistics of the samples its rank "
                "saw, so results would depend on the world size: use GroupNorm or LayerNorm, or "
                "track_running_stats=False"
            )
