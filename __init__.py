"""outlast: training that outlasts its machines."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outlast.runtime.islands.settings import Islands
    from outlast.runtime.run import Run, init

__version__ = "0.1.0"
__all__ = ["Islands", "Run", "__version__", "init"]


def __getattr__(name: str) -> object:
    """Load the runtime (and with it torch) only when a script asks for it."""
    if name in ("Run", "init"):
        from outlast.runtime import run

        return getattr(run, name)
    if name == "Islands":
        from outlast.runtime.islands.settings import Islands

        return Islands
    raise AttributeError(f"module 'outlast' has no attribute {name!r}")
