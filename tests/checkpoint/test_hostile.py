"""Mutated checkpoints of every format: the right answer or a typed refusal, in bounded memory.

A process that may not grow by more than `MEMORY` opens and reads hundreds of them. None may end it,
run code, or take long; a refusal names the checkpoint. Values that are returned are right, whatever
was changed, unless it was in a file that has no checksum (`UNPROTECTED`).
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

FORMATS = ("native", "deepspeed", "universal", "dcp", "megatron", "safetensors")
UNPROTECTED = (".metadata", "metadata.json", ".safetensors")  # of torch, Megatron and Hugging Face
MEMORY, LONG_S = 384 << 20, 5.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from held import held, into

    directory = tmp_path_factory.mktemp("hostile")
    for name in FORMATS:
        into(held("bfloat16" if name == "deepspeed" else "float32"), name, directory / name)
    return directory


def attack(checkpoints: Path, name: str, seed: int, count: int) -> dict[str, int]:
    command = [sys.executable, __file__, str(checkpoints / name / name), str(seed), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outcome: dict[str, int] = json.loads(done.stdout)
    return outcome


@pytest.mark.parametrize("name", FORMATS)
def test_mutations_are_refused_or_harmless(checkpoints: Path, name: str) -> None:
    outcome = attack(checkpoints, name, 0, 100)
    assert outcome["refused"] > outcome["right"]


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutations_are_refused_or_harmless(checkpoints: Path, name: str) -> None:
    attack(checkpoints, name, 1, 3000)


# ---- the process that is attacked


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, lost, repeated, or made extreme."""
    changed, at = bytearray(data), chance.randrange(len(data))
    other, kind = chance.randrange(len(data)), chance.randrange(6)
    if kind == 0:
        changed[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        changed[at : at + 4] = chance.randbytes(4)
    elif kind == 2:
        del changed[at : at + chance.choice([1, 4, 100, len(data)])]
    elif kind == 3:
        changed[at:at] = chance.randbytes(chance.choice([1, 4, 9]))
    elif kind == 4:
        changed[at : at + 8] = changed[other : other + 8]
    else:
        extreme = chance.choice([b"\xff" * 8, bytes(8), b"\xff\xff\xff\x7f", b"9" * 8])
        changed[at : at + len(extreme)] = extreme
    return bytes(changed)


def main(path: Path, seed: int, count: int) -> None:
    """Read `count` mutations of a checkpoint; print what came of them."""
    from outlast.checkpoint.formats.registry import open_checkpoint
    from outlast.checkpoint.source import digest
    from outlast.cluster.errors import Corrupt, Misuse

    def read(place: Path) -> dict[str, str]:
        source = open_checkpoint(place, path.name).source
        try:
            return {array.key: digest(source, array) for array in source.contents.arrays}
        finally:
            source.close()

    truth, chance, work = read(path), random.Random(seed), path.parent / f"{path.name}.mutated"
    files = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    shutil.copytree(path, work, dirs_exist_ok=True)
    outcome = {"right": 0, "refused": 0, "other": 0}
    for number in range(count):
        file = chance.choice(files)
        data = (path / file).read_bytes()
        (work / file).write_bytes(mutate(data, chance) if data else b"?")
        what, begun = f"mutation {number} of seed {seed} in {file}", time.process_time()
        try:
            came, said = "right" if read(work) == truth else "other", ""
        except (Corrupt, Misuse) as refusal:
            came, said = "refused", str(refusal)
        except BaseException:
            print(what, file=sys.stderr)
            raise
        outcome[came] += 1
        assert came != "other" or file.endswith(UNPROTECTED), f"{what}: a wrong answer"
        assert came != "refused" or str(work) in said, f"{what}: {said}"
        assert time.process_time() - begun < LONG_S, f"{what}: takes long"
        (work / file).write_bytes(data)
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
