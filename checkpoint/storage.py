"""Steps on storage: what the ranks' memories hold of one step, one file per rank and a manifest.

    DIRECTORY/step-000000000120/manifest.json   who trained it, and one `SlotRecord` per file
                                00000.state     for each role, each run of its record: the bytes

All ranks write into `step-….part` at once; rank 0 adds the manifest when they are done and gives
the directory its name, so that a step is listed only if it is whole. Any number of ranks reads:
each takes the runs that it owns, from whichever files hold them. Nothing that is read runs code,
and every run is checked whole before a byte of it is used.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outlast.checkpoint.memory import StateMemory, checksum
from outlast.checkpoint.records import SlotRecord
from outlast.cluster.errors import Corrupt, Misuse
from outlast.layout.run import Run, covers, intersect

FORMAT = 1
KEPT = 2  # complete steps: the newest, and one to fall back on
MANIFEST_BYTES_MAX = 1 << 30
OURS = re.compile(r"step-\d{12}(\.\d+(\.old)?\.part)?")  # and nothing else is ever removed


@dataclass(frozen=True, slots=True)
class StoredStep:
    """A complete step; record i describes file i. All agree but for their runs and checksums."""

    path: Path
    records: tuple[SlotRecord, ...]

    @property
    def step(self) -> int:
        """Committed steps."""
        return self.records[0].step


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    record: SlotRecord

    def read(
        self, runs: Sequence[Run], memory: StateMemory, half: int, wanted: Callable[[], bool]
    ) -> None:
        """Copy what is in `runs`, every run checked whole before."""
        path, record, offset = self.path, self.record, 0
        try:
            body = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as cause:  # gone, or empty
            raise Corrupt(f"{path}: {cause}") from cause
        for role in memory.shape.roles:
            sums, width = record.sums.get(role.name, []), role.itemsize
            for run, expected in zip(record.held, sums, strict=False):
                data, size = body[offset : offset + run.numel * width], run.numel * width
                parts = intersect([run], runs)
                if parts and (len(data) != size or checksum(data) != expected):
                    raise Corrupt(f"{path} at byte {offset}: {role.name} {run} is not what it was")
                for part in parts:
                    if not wanted():
                        return
                    begin = (part.start - run.start) * width
                    memory.run_bytes(half, role, part)[:] = data[begin : begin + part.numel * width]
                offset += size
            if len(sums) != len(record.held):
                raise Corrupt(f"{path}: {role.name} has no checksums")


class Storage:
    """The steps of one run in `directory`.

    Args:
        origin: what must be the same for a run to go on with the same bits, JSON values: the model,
            its state, the seed, the leaves.
    """

    def __init__(self, directory: Path, origin: dict[str, Any]) -> None:
        self.directory, self.origin = directory, origin

    def names(self) -> list[str]:
        """Of the complete steps, newest first."""
        found = [path.parent.name for path in self.directory.glob("step-*/manifest.json")]
        return sorted((n for n in found if OURS.fullmatch(n) and n[5:].isdecimal()), reverse=True)

    def write(
        self, index: int, memory: StateMemory, half: int, record: SlotRecord,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        """File `index` of the step `record.step`: the runs `record.held` of a half, as long as it
        is still `wanted`.

        Raises:
            Misuse: it cannot be written.
        """
        part = self._part(record)
        try:
            part.mkdir(parents=True, exist_ok=True)
            with (part / _file_name(index)).open("wb") as file:
                for role in memory.shape.roles:
                    for run in record.held:
                        if not wanted():
                            return
                        file.write(memory.run_bytes(half, role, run).data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise Misuse(f"step {record.step} cannot be stored: {error}") from error

    def publish(self, records: Sequence[SlotRecord]) -> Path:
        """All files of a step are there: complete it, and remove what is too old.

        Raises:
            Misuse: it cannot be written.
        """
        step = records[0].step
        part, path = self._part(records[0]), self.directory / _step_name(step)
        body = {"format": FORMAT, "origin": self.origin, "files": [r.as_json() for r in records]}
        text = json.dumps(body)
        try:
            with (part / "manifest.json").open("w", encoding="utf-8") as file:
                json.dump({"checksum": checksum(text.encode()), "body": body}, file)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():  # the same step, which may have been damaged since
                path.rename(part.with_suffix(".old.part"))
            part.rename(path)
            _sync(self.directory)
        except OSError as error:
            raise Misuse(f"step {step} cannot be stored: {error}") from error
        self._clear({path.name, *self.names()[:KEPT]})
        return path

    def discard(self) -> None:
        """Remove what was not completed: a full disk is less full then."""
        self._clear({*self.names()})

    def _clear(self, kept: set[str]) -> None:
        for found in self.directory.glob("step-*"):
            if OURS.fullmatch(found.name) and found.name not in kept:
                shutil.rmtree(found, ignore_errors=True)

    def open(self, name: str) -> StoredStep:
        """A complete step.

        Raises:
            Corrupt: the manifest is none.
            Misuse: another run wrote it.
        """
        path = self.directory / name / "manifest.json"
        try:
            if path.stat().st_size > MANIFEST_BYTES_MAX:
                raise Corrupt(f"{path}: {path.stat().st_size} bytes are no manifest")
            manifest = json.loads(path.read_bytes())
            body = manifest["body"]
            if checksum(json.dumps(body).encode()) != manifest["checksum"]:
                raise Corrupt(f"{path}: is not what it was")
            version, origin = body["format"], body["origin"]
            records = tuple(SlotRecord.from_json(fields) for fields in body["files"])
            numel, first = int(self.origin["numel"]), records[0]
            if name != _step_name(first.step):
                raise Corrupt(f"{path}: of step {first.step}")
            for record in records:
                if any(not 0 <= run.start <= run.stop <= numel for run in record.held):
                    raise Corrupt(f"{path}: runs outside of {numel} elements")
                if (record.step, record.scalars) != (first.step, first.scalars):
                    raise Corrupt(f"{path}: files of different steps")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError,
                RecursionError) as cause:  # fmt: skip
            raise Corrupt(f"{path}: no manifest: {cause}") from cause
        differ = [key for key in self.origin if origin.get(key) != self.origin[key]]
        if version != FORMAT or differ:
            what = ", ".join(f"{key} {origin.get(key)!r}" for key in differ) or f"format {version}"
            raise Misuse(
                f"{path.parent} is of another run ({what[:200]}): take its model and its arguments "
                "of outlast.init, or another --checkpoint-dir"
            )
        return StoredStep(path.parent, records)

    def read(
        self, stored: StoredStep, runs: Sequence[Run], memory: StateMemory, half: int,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        """Fill `runs` of a half that is open, as long as it is still `wanted`.

        Raises:
            Corrupt: with file and offset: bytes do not match, or are not there.
        """
        found: list[Run] = []
        for index, record in enumerate(stored.records):
            if intersect(record.held, runs):
                found += record.held
                file = _File(stored.path / _file_name(index), record)
                file.read(runs, memory, half, wanted)
        if not covers(found, runs):
            raise Corrupt(f"{stored.path}: some elements are in none of its files")

    def _part(self, record: SlotRecord) -> Path:
        # A rank that is interrupted may still be writing: the next try has another generation.
        return self.directory / f"{_step_name(record.step)}.{record.generation}.part"


def _step_name(step: int) -> str:
    return f"step-{step:012}"


def _file_name(index: int) -> str:
    return f"{index:05}.state"


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
