"""The files of a checkpoint in a directory, read by offset: nothing is mapped or read ahead.

Names come from the checkpoint's own metadata and are not trusted: they stay inside the directory.
"""

import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outlast.cluster.errors import Corrupt

_OPEN = 128  # files at most


def corrupt(file: Path | str, offset: int, why: str) -> Corrupt:
    """The error of every reader: which file, where in it, and what is wrong."""
    return Corrupt(f"{file} at byte {offset}: {why}")


def named_by(latest: Path) -> Path | None:
    """The neighbour that a file like DeepSpeed's `latest` names; None where it leads elsewhere."""
    with latest.open("rb") as file:
        named = latest.parent / file.read(256).decode("utf-8", "replace").strip("\n\0")
    return named if named.parent == latest.parent else None


class Folder:
    """Read access to the files below `path`.

    Args:
        follow: let symbolic links lead out of the directory, as the cache of Hugging Face does.
    """

    def __init__(self, path: Path, follow: bool = False) -> None:
        self.path, self._follow = path, follow
        self._files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def names(self, pattern: str = "*") -> list[str]:
        """Files that match `pattern`, as in glob, sorted."""
        found = (path for path in self.path.glob(pattern) if path.is_file())
        return sorted(str(path.relative_to(self.path)) for path in found)

    def place(self, name: str) -> Path:
        """Path of a file, for messages and for libraries that open it by themselves.

        Raises:
            Corrupt: it lies outside.
        """
        path = self.path / name
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        try:
            if b"\0" in os.fsencode(name):
                raise ValueError("a zero byte")
            if not self._follow:
                inside = inside and path.resolve().is_relative_to(self.path.resolve())
        except ValueError as cause:
            raise corrupt(ascii(str(path)), 0, f"no name of a file: {cause}") from cause
        if not inside:
            raise corrupt(path, 0, "leads out of the checkpoint (links: --follow-links)")
        return path

    def size(self, name: str) -> int:
        """Bytes of a file; Corrupt where there is none."""
        try:
            descriptor = self._descriptor(name)
        except OSError as cause:
            raise corrupt(self.path / name, 0, str(cause)) from cause
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; Corrupt where they are not there."""
        if size < 0 or not 0 <= offset <= offset + size <= self.size(name):
            raise corrupt(self.path / name, offset, f"{size} bytes are not in the file")
        out = np.empty(size, dtype=np.uint8)
        self.read_into(name, offset, out)
        return out.tobytes()

    def read_into(self, name: str, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill `out`, uint8 and contiguous, from `offset` on; Corrupt where that is not there."""
        try:
            descriptor = self._descriptor(name)
        except OSError as cause:
            raise corrupt(self.path / name, offset, str(cause)) from cause
        view, done = memoryview(out), 0
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if not count:
                    raise corrupt(self.path / name, offset + done, "the file ends")
                done += count
        except (OSError, OverflowError) as cause:
            raise corrupt(self.path / name, offset + done, str(cause)) from cause
        finally:
            os.close(descriptor)

    def _descriptor(self, name: str) -> int:
        """A duplicate, so that no other thread closes it meanwhile."""
        with self._lock:
            if name not in self._files:
                # A pipe in place of a file would block for ever.
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
                self._files[name] = os.open(self.place(name), flags)
                while len(self._files) > _OPEN:
                    os.close(self._files.popitem(last=False)[1])
            self._files.move_to_end(name)
            return os.dup(self._files[name])

    def forget(self, name: str) -> None:
        """Open a file anew when it is read again."""
        with self._lock:
            if (descriptor := self._files.pop(name, None)) is not None:
                os.close(descriptor)

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()  # a source that nobody closed
