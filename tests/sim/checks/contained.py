"""S12: what one rank computes wrongly never reaches a committed parameter."""

from typing import Any

import torch

from sim.world import Violation


class Contained:
    """Looks at all parameters of every commit."""

    def committed(self, process: Any, training: Any) -> None:
        """A step is done on this rank."""
        if not torch.isfinite(training.model.param).all():
            raise Violation(f"S12: {process.name} has committed what is not finite")
