"""From one format into another: planned, written in parallel, proven, and only then visible.

    DST/.NAME.part/journal    what is written, from what: an interrupted conversion goes on
    DST/.NAME.part/NAME/      the checkpoint, until it is proven and gets its name, DST/NAME

Invariant: under its final name there is a whole checkpoint, on disk, or nothing.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import xxhash

import outlast
from outlast.checkpoint.dtypes import nbytes
from outlast.checkpoint.formats.registry import Format, Opened
from outlast.checkpoint.items import Item, Wanted
from outlast.checkpoint.pool import spread
from outlast.checkpoint.proof import differences, unlike
from outlast.checkpoint.source import Tick
from outlast.checkpoint.store import synchronise
from outlast.cluster.errors import Corrupt, Misuse

Progress = Callable[[str, int, int], None]  # what is being done, its bytes so far, and of how many
_PROBLEMS_SHOWN = 10


def counted(progress: Progress, what: str, total: int, at: int = 0) -> Tick:
    """A tick that tells `progress` how many of `total` bytes there are so far, from `at` on."""

    def tick(size: int) -> None:
        nonlocal at
        at += size
        progress(what, at, total)

    return tick


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What is to be written where.

    Args:
        destination: directory that the checkpoint, or a directory of its own for it, is put in.
        workers: threads; each holds a few tens of MB.
        proof: read the result again, and compare it with the source.
    """

    source: Opened
    to: Format
    destination: Path
    wanted: Wanted
    workers: int
    proof: bool = True

    @property
    def place(self) -> Path:
        """Where the checkpoint will be."""
        name = self.to.writer.name_of(self.source.source.contents)
        return Path(os.path.abspath(self.destination / name))

    @property
    def part(self) -> Path:
        """Where it is until then."""
        return self.place.parent / f".{self.place.name}.part"


def convert(job: Conversion, progress: Progress) -> Path:
    """Do it, from where an earlier try ended; the path of the result.

    Raises:
        Misuse: the destination exists or is too small; the source changed meanwhile, or has what
            the format cannot hold.
        Corrupt: of the source; or the result is not what it should be: nothing is left of it.
    """
    if _is_published(job):  # and nothing more: an earlier try ended right there
        with _journal(job.part):
            _conclude(job)
        return job.place
    check_place(job)
    job.part.mkdir(parents=True, exist_ok=True)
    with _journal(job.part) as journal:
        identity = _identity(job)
        directory = job.part / job.place.name
        done = _begin(journal, identity, directory)
        try:
            items = job.to.writer.plan(job.source.source, directory, job.wanted)
        except Misuse:
            shutil.rmtree(job.part)
            raise
        _write(job, journal, items, done, progress)
        # Out of memory, too: what is proven is what a later reader gets.
        synchronise([*directory.rglob("*"), directory], forget=True)
        if job.proof:
            _prove(job, directory, progress)
        if _identity(job) != identity:
            raise Misuse(f"{job.source.path} changed while it was read: start again")
        _publish(job, directory)
    return job.place


def check_place(job: Conversion, size: int = 0) -> None:
    """Misuse where the destination is taken, in the source, or on a disk without `size` bytes."""
    place, source = job.place, job.source.path
    if os.path.ismount(place):
        raise Misuse(f"{place} is a disk of its own: give a directory on it")
    if place.is_symlink() or (place.exists() and (not place.is_dir() or any(place.iterdir()))):
        raise Misuse(f"{place} exists: give another destination, or remove it")
    if isinstance(source, Path) and place.resolve().is_relative_to(source.resolve()):
        raise Misuse(f"{place} lies in the source: give another destination")
    _check_latest(job)
    there = next(path for path in (job.part, *job.part.parents) if path.exists())
    if (free := shutil.disk_usage(there).free) < size:
        raise Misuse(f"{there} has {free:,} bytes free, and {size:,} are needed")


def _check_latest(job: Conversion) -> None:
    """What a job in that directory would load must stay what it is."""
    latest = job.place.parent / (job.to.writer.LATEST or "")
    named = latest.read_text(errors="replace").strip() if latest.is_file() else job.place.name
    if named != job.place.name:
        raise Misuse(f"{latest} names {named[:99]!r}: give another destination, or remove it")


@contextmanager
def _journal(part: Path) -> Iterator[TextIO]:
    """The journal of a part, for us alone."""
    strange = [path.name for path in part.iterdir()] if part.is_dir() else [part.name]
    if strange and "journal" not in strange:
        raise Misuse(f"{part} is not of a conversion: remove it")
    with (part / "journal").open("a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise Misuse(f"another conversion is writing {part}: wait for it") from cause
        yield journal


def _identity(job: Conversion) -> str:
    """Equal if the same program would write the same files from the same files."""
    path, source = job.source.path, job.source.source
    if isinstance(path, Path):
        files = path.rglob("*") if path.is_dir() else path.parent.iterdir()
        states = {str(file): file.stat() for file in files if file.is_file()}
        told = [(name, states[name].st_size, states[name].st_mtime_ns) for name in sorted(states)]
        path = str(path.absolute())
    else:
        told = [(array.key, source.stored_digest(array)) for array in source.contents.arrays]
    # What a crash of the machine left half written, only a proof would find.
    boot = "" if job.proof else Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    wanted = [outlast.__version__, boot, job.to.name, asdict(job.wanted), path, told]
    return xxhash.xxh3_128_hexdigest(json.dumps(wanted).encode())


def _begin(journal: TextIO, identity: str, directory: Path) -> set[str]:
    """What is done already; of another conversion nothing is kept."""
    journal.seek(0)
    first, *done = journal.read().split("\n")[:-1] or [""]  # the last one may be half
    if first != identity or not directory.exists():
        shutil.rmtree(directory, ignore_errors=True)
        journal.truncate(0)
        directory.mkdir()  # before the journal: where it is missing later, it was renamed
        _note(journal, identity)
        done = []
    return set(done)


def _note(journal: TextIO, line: str) -> None:
    journal.write(line + "\n")
    journal.flush()


def _write(
    job: Conversion, journal: TextIO, items: Sequence[Item], done: set[str], progress: Progress
) -> None:
    left = [item for item in items if repr(item.name) not in done]
    total = sum(item.size for item in items)
    at = total - sum(item.size for item in left)
    check_place(job, total - at)
    tick = counted(progress, "writing", total, at)
    try:
        for last in (False, True):
            tasks = [(item.name, item.make) for item in left if item.final == last]
            for name, _ in spread(tasks, job.workers, tick):
                _note(journal, repr(name))
    except OSError as cause:
        raise Misuse(f"{job.part}: {cause}: the same command goes on from there") from cause


def _prove(job: Conversion, directory: Path, progress: Progress) -> None:
    contents = job.source.source.contents
    found: list[str] = []
    try:
        place = job.to.reader.find(directory)
        if place is None:
            raise Corrupt(f"{directory}: not recognised as {job.to.name}")
        result = job.to.reader.open(place)
        try:
            found += differences(contents, result.contents, job.to, job.wanted)
            if not found:
                tick = counted(progress, "proving", nbytes(result.contents.arrays))
                found += unlike(job.source.source, result, job.workers, tick)
        finally:
            result.close()
    except Corrupt as error:
        found.append(str(error))
    if found:
        shutil.rmtree(job.part)
        more = f" … and {len(found) - _PROBLEMS_SHOWN} more" * (len(found) > _PROBLEMS_SHOWN)
        raise Corrupt(
            f"what was written is not what was read, and was removed: "
            f"{'; '.join(found[:_PROBLEMS_SHOWN])}{more}"
        )


def _publish(job: Conversion, directory: Path) -> None:
    _check_latest(job)
    try:
        directory.rename(job.place)
    except OSError as cause:
        raise Misuse(f"{job.place} appeared meanwhile: {cause}") from cause
    _conclude(job)


def _is_published(job: Conversion) -> bool:
    """Whether this very conversion was ended after the rename."""
    journal = job.part / "journal"
    if not journal.exists() or not job.place.is_dir() or (job.part / job.place.name).exists():
        return False
    return journal.read_text(encoding="utf-8").partition("\n")[0] == _identity(job)


def _conclude(job: Conversion) -> None:
    """Name it in LATEST, which comes last."""
    place = job.place
    synchronise([place.parent])
    if job.to.writer.LATEST:
        draft = job.part / "latest"
        draft.write_text(place.name, encoding="utf-8")
        synchronise([draft])
        draft.rename(place.parent / job.to.writer.LATEST)
    shutil.rmtree(job.part)
    synchronise([place.parent])
