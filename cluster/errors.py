"""Everything outlast raises on purpose.

Three families, told apart by who can act on them: `PeerLost` and `GenerationChanged` are expected
and handled inside the runtime; `Corrupt` and `StateLost` are about bytes that cannot be trusted or
no longer exist, `Diverged` about numbers that cannot; `Misuse` is for the person who wrote the
script or the command line, and its text says what to do next.
"""


class OutlastError(Exception):
    """Base of every error that outlast raises on purpose."""


class PeerLost(OutlastError):
    """A peer of the current generation can no longer be reached."""


class GenerationChanged(OutlastError):
    """The running generation was replaced while an operation of it was in flight."""


class JobComplete(OutlastError):
    """The other ranks have finished all their work and left."""


class Stopped(OutlastError):
    """The job was asked to end, and its state is on storage."""


class Corrupt(OutlastError):
    """Bytes do not match their checksum or their declared shape; names the place."""


class StateLost(OutlastError):
    """No rung of the recovery ladder can rebuild the state; names what is missing."""


class Diverged(OutlastError):
    """The model's own numbers are no longer finite, or nobody can tell which are right."""


class Misuse(OutlastError):
    """The script or the command line asks for what cannot work; says what to do instead."""
