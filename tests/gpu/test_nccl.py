"""The same promises on CUDA and NCCL. Where there is no GPU these tests do not run, and say so."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from outlast.checkpoint.memory import StateMemory, memory_bytes
from outlast.checkpoint.records import SlotRecord, StateShape
from outlast.layout.run import Run
from outlast.layout.space import Space, Tensor
from outlast.runtime.optimizer import discover
from outlast.runtime.shard_state import DeviceState, role_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no CUDA device"),
]

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt.py"
SMALL = ["--layers=2", "--width=64", "--heads=2", "--context=64", "--steps=6", "--corpus-mb=1"]


def digest(tmp_path: Path, nproc: int) -> str:
    """sha256 of a run of the example with `nproc` workers on this machine's GPUs."""
    file = tmp_path / f"digest-{nproc}.json"
    command = [
        *(sys.executable, "-m", "outlast.launch.cli", "launch", "--standalone", "--nnodes=1"),
        *(f"--nproc-per-node={nproc}", f"--log-dir={tmp_path / str(nproc)}"),
        *(str(EXAMPLE), "--device=cuda", f"--digest-file={file}", *SMALL),
    ]
    subprocess.run(command, check=True, timeout=600, env=os.environ)
    return str(json.loads(file.read_text())["sha256"])


def test_same_bits_whatever_the_number_of_gpus(tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    found = {digest(tmp_path, nproc) for nproc in {1, min(2, count), count}}
    assert len(found) == 1


def test_fused_adam_is_element_wise_on_the_device() -> None:
    discover(partial(torch.optim.AdamW, lr=1e-3, fused=True), torch.device("cuda"))


def test_a_device_state_reaches_its_pinned_half() -> None:
    space = Space.of([Tensor("a", (8192,), "float32")])
    shape = StateShape(space.fingerprint(), space.numel, (role_of("param", torch.float32),))
    file = os.memfd_create("gpu-test")
    os.ftruncate(file, memory_bytes(shape))
    state = DeviceState(StateMemory(file, shape), space, torch.device("cuda"))
    os.close(file)
    state.memory.begin(0)
    state.adopt(0, 0, (Run.of(0, 8192),))

    def change(live: dict[str, list[torch.Tensor]]) -> None:
        live["param"][0].fill_(3.0)

    state.update(change)
    state.commit(SlotRecord(1, 1, (), (), {}, {}, []))
    state.seal()
    record = state.memory.record(1)
    assert record is not None
    assert record.step == 1
    assert bool((state.host(1, "param", Run.of(0, 8192)) == 3.0).all())
