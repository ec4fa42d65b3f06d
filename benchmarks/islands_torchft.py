"""One island of torchft's Streaming DiLoCo, on the model, samples and rates of `islands.py`.

Run by `islands_wan.py`, with an interpreter that has torchft 0.2 (and the needs of this project):
it is a replica group of one process. torchft sends float32 on processors (its 8-bit codes need a
GPU), has one fragment on its way at a time, and asks a "lighthouse" who takes part.

Every step is a line of JSON in --out: when it ended, how long it took, its loss, how many
exchanges were committed. The last line has the loss of the outer copy.
"""

import argparse
import json
import math
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from islands import Text, flags, model_of, schedule_of
from torchft import Manager, ProcessGroupGloo
from torchft.local_sgd import DiLoCo


class Group:
    """A replica group: the model, its optimizers, and torchft's manager."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.step = options, 0
        self.model = model_of(options)
        self.units = [module for module in self._modules()]
        self.fragments = [nn.ModuleList(self.units[p :: options.fragments])
                          for p in range(options.fragments)]  # fmt: skip
        self.inner = torch.optim.AdamW(
            self.model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.outer = [
            torch.optim.SGD(fragment.parameters(), lr=options.outer_lr, momentum=0.9, nesterov=True)
            for fragment in self.fragments
        ]
        socket.gethostname = lambda: options.host  # where its peers fetch a state from
        self.store = torch.distributed.TCPStore(
            options.host, 0, is_master=True, wait_for_workers=False
        )
        self.manager = Manager(
            pg=ProcessGroupGloo(timeout=timedelta(seconds=options.timeout)),
            load_state_dict=self._load, state_dict=self._state, min_replica_size=1,
            use_async_quorum=False, rank=0, world_size=1, store_addr=options.host,
            store_port=self.store.port, lighthouse_addr=options.lighthouse,
            replica_id=f"island{options.island}", hostname=options.host,
            timeout=timedelta(seconds=options.timeout),
            quorum_timeout=timedelta(seconds=options.timeout),
            heartbeat_interval=timedelta(milliseconds=options.beat_ms),
        )  # fmt: skip

    def _modules(self) -> list[nn.Module]:
        return [part for name, child in self.model.named_children()
                for part in (child if name == "blocks" else [child])
                if any(True for _ in part.parameters())]  # fmt: skip

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "inner": self.inner.state_dict(),
                "step": self.step}  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.inner.load_state_dict(state["inner"])
        self.step = state["step"]


def train(options: argparse.Namespace) -> None:
    """Train this island to the end of the steps."""
    torch.set_num_threads(1)
    text, group = Text.of(options), Group(options)
    rates, model = schedule_of(options), group.model
    with options.out.open("a", buffering=1) as out, DiLoCo(
        group.manager, group.fragments, group.inner, group.outer, sync_every=options.every,
        fragment_sync_delay=options.delay, use_bucketization=True,
    ) as diloco:  # fmt: skip
        out.write(json.dumps({"ready": time.time()}) + "\n")
        while options.go is not None and not options.go.exists():
            time.sleep(0.01)
        began = time.time()
        while group.step < options.steps:
            leaves = text.leaves(group.step, options.island, options.islands)
            loss = sum(_backward(leaf(model), len(leaves)) for leaf in leaves)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for each in group.inner.param_groups:
                each["lr"] = rates.rate(group.step)
            group.step += 1
            group.inner.step()  # its hooks exchange
            group.inner.zero_grad()
            ended = time.time()
            out.write(json.dumps({
                "step": group.step, "time": ended, "seconds": ended - began, "loss": loss,
                "committed": group.manager.current_step(),
                "islands": group.manager.num_participants(),
            }) + "\n")  # fmt: skip
            began = ended
        local = text.bits(model)
        for fragment in diloco._fragments:
            fragment.restore_parameters()
        out.write(json.dumps({"outer": text.bits(model), "local": local}) + "\n")
    group.manager.shutdown(wait=False)


def _backward(loss: torch.Tensor, leaves: int) -> float:
    (loss / leaves).backward()
    return loss.item() / leaves / math.log(2)


def main() -> None:
    """Read the flags of `islands.py` and those of a replica group."""
    parser = flags("One island of torchft's Streaming DiLoCo.")
    add = parser.add_argument
    add("--island", type=int, required=True)
    add("--islands", type=int, default=2)
    add("--host", default="127.0.0.1", help="address at which the others find this island")
    add("--lighthouse", required=True, help="http://HOST:PORT")
    add("--fragments", type=int, default=3)
    add("--every", type=int, default=30)
    add("--delay", type=int, default=1)
    add("--timeout", type=float, default=60.0, help="seconds, of everything; torchft's default")
    add("--beat-ms", type=int, default=100)
    add("--out", type=Path, required=True)
    add("--go", type=Path, help="begin when this file exists")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
