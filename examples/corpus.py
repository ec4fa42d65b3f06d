"""The text of the examples: the sources of Python's own standard library, as bytes.

Nothing is downloaded, and two machines with the same Python have the same text: files in sorted
order, laid end to end, until the cap is reached. A file belongs to training or to validation by
the hash of its name, so neither set depends on how much of the library is taken.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

VALIDATION_SHARE = 0.1
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Two texts, uint8, and the hash of both, which tells whether two machines read the same."""

    train: torch.Tensor
    validation: torch.Tensor
    sha256: str


def standard_library(megabytes: float) -> Corpus:
    """At most `megabytes` (10^6 bytes, both sets together) of the standard library's sources."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    room = int(megabytes * 1e6)
    train, validation = bytearray(), bytearray()
    for name in sorted(files):
        if room <= 0 or SKIPPED_FOLDERS & set(Path(name).parts):
            continue
        text = files[name].read_bytes()[:room]
        room -= len(text)
        drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32
        (validation if drawn < VALIDATION_SHARE else train).extend(text)
    digest = hashlib.sha256(train + b"\0" + validation).hexdigest()
    return Corpus(
        torch.frombuffer(train, dtype=torch.uint8),
        torch.frombuffer(validation, dtype=torch.uint8),
        digest,
    )


class Windows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows of a text, side by side: item i is (bytes, the byte after each), int64 [context]."""

    def __init__(self, text: torch.Tensor, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = index * self.context
        window = self.text[start : start + self.context + 1].long()
        return window[:-1], window[1:]
