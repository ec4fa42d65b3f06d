"""Where a checkpoint lies: a directory, or a prefix of an object store that fsspec reaches.

Both are the same to whoever writes or reads: whole files by relative names. In a directory whoever
writes also synchronises, because another node may be the one that publishes.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from outlast.checkpoint.formats.folder import Folder, corrupt
from outlast.checkpoint.pool import at_once
from outlast.cluster.errors import Misuse, OutlastError

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

Data = bytes | NDArray[np.uint8]
_ONE_SLASH = re.compile(r"(?:^|/)([a-z][a-z0-9+.-]+):/")  # also behind a directory: made absolute


class Store(Protocol):
    """Files by names whose parts are separated by "/"; safe to use from several threads."""

    PIECE: int  # bytes that are best read by one call: more memory, or more requests

    def place(self, name: str) -> Path | str:
        """What a person finds the file by."""
        ...

    def children(self, name: str = "") -> list[str]:
        """Names of what lies directly below, files and directories, sorted; none if nothing."""
        ...

    def holds(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file; Corrupt where there is none."""
        ...

    def read_into(self, name: str, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill `out`, uint8 and contiguous, from `offset` on; Corrupt where that is not there."""
        ...

    def write(self, name: str, data: Data) -> None:
        """A whole file, durable; Misuse where that cannot be done."""
        ...

    def reading(self, name: str) -> AbstractContextManager["ZarrStore"]:
        """zarr's store of the same files, to read this one; Corrupt, or an OSError, where that
        cannot be done."""
        ...

    def writing(self, name: str) -> AbstractContextManager["ZarrStore"]:
        """zarr's store of the same files, to write this one; Misuse where that cannot be done."""
        ...

    def settle(self) -> None:
        """What `writing` has written is durable then; Misuse where that cannot be done."""
        ...

    def remove(self, name: str, first: str = "") -> None:
        """A file, or all that is below a name, the file `first` of it before the others, and again
        if somebody has written it meanwhile; nothing where there is nothing; Misuse where that
        cannot be done."""
        ...

    def within(self, name: str) -> "Store":
        """The store of what is below a name."""
        ...

    def close(self) -> None:
        """Close its files."""
        ...


class Directory(Folder):
    """See `Store`."""

    PIECE = 1 << 22

    def __init__(self, path: Path, follow: bool = False) -> None:
        super().__init__(path, follow)
        self._unsettled: list[Path] = []

    def children(self, name: str = "") -> list[str]:
        """See `Store`."""
        try:
            return sorted(os.listdir(self.path / name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise Misuse(f"{self.path / name} cannot be listed: {error}") from error

    def holds(self, name: str) -> bool:
        """See `Store`."""
        return (self.path / name).is_file()

    def write(self, name: str, data: Data) -> None:
        """See `Store`."""
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.place(name).open("wb", buffering=0) as file:
                view, done = memoryview(data), 0
                while done < len(view):
                    done += file.write(view[done:])
                os.fsync(file.fileno())
        except OSError as error:
            raise Misuse(f"{path} cannot be written: {error}") from error

    def reading(self, name: str) -> AbstractContextManager["ZarrStore"]:
        """See `Store`."""
        from zarr.storage import LocalStore

        self.place(name)
        return nullcontext(LocalStore(self.path, read_only=True))

    @contextmanager
    def writing(self, name: str) -> Iterator["ZarrStore"]:
        """See `Store`."""
        from zarr.storage import LocalStore

        path = self.place(name)
        try:
            yield LocalStore(self.path)
            self._unsettled.append(path)
            self.forget(name)  # zarr has put another file in its place
        except OSError as error:
            raise Misuse(f"{path} cannot be written: {error}") from error

    def settle(self) -> None:
        """See `Store`."""
        found, self._unsettled = self._unsettled, []
        try:
            synchronise(found)
        except OSError as error:
            raise Misuse(f"{self.path} cannot be written: {error}") from error

    def remove(self, name: str, first: str = "") -> None:
        """See `Store`; of a symbolic link only the link."""
        path = self.path / name
        try:
            if path.is_dir() and not path.is_symlink():
                if first:
                    (path / first).unlink(missing_ok=True)
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise Misuse(f"{path} cannot be removed: {error}") from error

    def within(self, name: str) -> "Directory":
        """See `Store`."""
        return Directory(self.path / name, self._follow)


def synchronise(paths: Iterable[Path], forget: bool = False) -> None:
    """To disk with files and directories, and with `forget` out of memory; OSError if that fails.

    Many at once, for the journal of a file system takes them together: 378 files took 0.14 s so,
    and 1.1 s one after the other.
    """

    def one(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
            if forget:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    at_once(partial(one, path) for path in paths)


class Bucket:
    """See `Store`; `url` is one of fsspec's: s3://bucket/prefix, gs://..."""

    PIECE = 1 << 26

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        with _Told(self.url, "opened"):
            self._system, self._root = url_to_fs(self.url)

    def place(self, name: str) -> str:
        """See `Store`."""
        return f"{self.url}/{name}"

    def children(self, name: str = "") -> list[str]:
        """See `Store`."""
        with _Told(self.place(name), "listed"):
            try:
                found = self._fresh().ls(f"{self._root}/{name}".rstrip("/"), detail=False)
            except FileNotFoundError:
                return []
        return sorted(PurePosixPath(path).name for path in found)

    def holds(self, name: str) -> bool:
        """See `Store`."""
        with _Told(self.place(name), "looked up"):
            return bool(self._fresh().isfile(f"{self._root}/{name}"))

    def size(self, name: str) -> int:
        """See `Store`."""
        with _Told(self.place(name), "read", wrong=True):
            return int(self._fresh().size(f"{self._root}/{name}"))

    def read_into(self, name: str, offset: int, out: NDArray[np.uint8]) -> None:
        """See `Store`."""
        if not len(out):
            return
        with _Told(self.place(name), "read", offset, wrong=True):
            path, stop = f"{self._root}/{name}", offset + len(out)
            data = self._system.cat_file(path, start=offset, end=stop)
        if len(data) != len(out):
            raise corrupt(self.place(name), offset + len(data), "the file ends")
        out[:] = np.frombuffer(data, dtype=np.uint8)

    def write(self, name: str, data: Data) -> None:
        """See `Store`."""
        with _Told(self.place(name), "written"):
            self._system.pipe_file(f"{self._root}/{name}", bytes(data))

    @cached_property
    def _zarr(self) -> "ZarrStore":
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
        from zarr.storage import FsspecStore

        # The connections of `_system`, whose own thread zarr does not wait for when it ends.
        return FsspecStore(AsyncFileSystemWrapper(self._system, asynchronous=True), path=self._root)

    @contextmanager
    def reading(self, name: str) -> Iterator["ZarrStore"]:
        """See `Store`."""
        with _Told(self.place(name), "read", wrong=True):
            yield self._zarr

    @contextmanager
    def writing(self, name: str) -> Iterator["ZarrStore"]:
        """See `Store`."""
        with _Told(self.place(name), "written"):
            yield self._zarr

    def settle(self) -> None:
        """See `Store`: an object that was put is durable."""

    def remove(self, name: str, first: str = "") -> None:
        """See `Store`."""
        with _Told(self.place(name), "removed"):
            whole = f"{self._root}/{name}"
            for path in [f"{whole}/{first}", whole, f"{whole}/{first}"] if first else [whole]:
                if self._fresh().exists(path):
                    self._fresh().rm(path, recursive=True)

    def within(self, name: str) -> "Bucket":
        """See `Store`."""
        return Bucket(self.place(name))

    def close(self) -> None:
        """Its connections are fsspec's own."""

    def _fresh(self) -> Any:
        """The file system, which remembers no listing: others write there as well."""
        self._system.invalidate_cache()
        return self._system


def store_at(url: str) -> Directory | Bucket:
    """A path is what has no scheme; Misuse where it looks like a URL with one slash."""
    path = url.removeprefix("file://")
    if "://" in path:
        return Bucket(url)
    if scheme := _ONE_SLASH.search(path):
        raise Misuse(f"{url} is neither a path nor a URL: write {scheme[1]}://...")
    return Directory(Path(path))


def read_whole(store: Store, name: str, size_max: int = 1 << 28) -> bytes:
    """A small file; Corrupt where it is larger, before there is memory for it."""
    if (size := store.size(name)) > size_max:
        raise corrupt(store.place(name), size_max, f"{size} bytes are too many")
    out = np.empty(size, dtype=np.uint8)
    store.read_into(name, 0, out)
    return out.tobytes()


class _Told:
    """What a storage library raises, which has types of its own, becomes an error of this project:
    Misuse, or Corrupt where the bytes are `wrong`."""

    def __init__(self, place: str, verb: str, offset: int = 0, wrong: bool = False) -> None:
        self._place, self._verb, self._offset, self._wrong = place, verb, offset, wrong

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, OutlastError):
            why = f"cannot be {self._verb}: {type(error).__name__}: {error}"
            if self._wrong:
                raise corrupt(self._place, self._offset, why) from error
            raise Misuse(f"{self._place} {why}") from error
