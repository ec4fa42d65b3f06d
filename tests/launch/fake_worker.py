"""An elastic worker without torch: speaks the link protocol and pretends to train.

Usage: fake_worker.py STEPS START [FLAW]. Step s is committed 50 ms x s after START (seconds since
1970), so that all workers of a job report the same steps; who is in no view waits. FLAW: `raise` in
rank 1 at step 5, `exit` in rank 1 before attach, `spare` raises in whoever has to wait, `mute`
never reads its link after ready, `garbage` sends nonsense first, `stuck` has trained and never
brings anything to storage.
"""

import base64
import json
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any

from outlast.cluster.latch import Latch

STEP_S = 0.05
SIZE = 1 << 16


class FakeWorker:
    """The worker's end of the link."""

    def __init__(self) -> None:
        self.latch = Latch(int(os.environ["OUTLAST_LATCH_FD"]))
        self.latch.hold()
        self.link = socket.socket(fileno=int(os.environ["OUTLAST_AGENT_FD"]))
        self.generation = 0
        self.early: list[dict[str, Any]] = []
        self.keys: dict[int, set[str]] = {}
        self.size = self.holder = self.released = 0
        self.placed = threading.Event()

    def say(self, kind: str, **fields: Any) -> None:
        self.link.send(json.dumps({"kind": kind, **fields}).encode())

    def hear(self) -> tuple[dict[str, Any], list[int]]:
        data, files, _, _ = socket.recv_fds(self.link, 128 << 10, 64)
        return json.loads(data), files

    def answer(self, kind: str) -> tuple[dict[str, Any], list[int]]:
        """The next message of this kind; a view or a key may come first and is taken in later."""
        while True:
            message, files = self.hear()
            if message["kind"] == kind:
                return message, files
            self.early.append(message)

    def attach(self, flaw: str) -> None:
        if flaw == "garbage":
            self.link.send(b"\xff{]")
            self.link.send(b'["kind"]')
            for nonsense in ({"kind": "launch missiles"}, {"kind": "store", "generation": "x"},
                             {"kind": "allocate", "size": -1}, {"kind": "log"}, {}):  # fmt: skip
                self.link.send(json.dumps(nonsense).encode())
        self.say("attach", pid=os.getpid())
        welcome, _ = self.answer("welcome")
        self.holder = welcome["holder"]
        self.say("allocate", size=1 << 62)
        answer, _ = self.answer("memory")
        assert "error" in answer, answer
        self.say("allocate", size=SIZE)
        answer, (file,) = self.answer("memory")
        assert answer["holder"] == self.holder
        os.pwrite(file, str(self.holder).encode(), 0)
        self.say("event", event="fake_started", pid=os.getpid(), restarts=welcome["restarts"])
        self.say("ready")

    def listen(self) -> None:
        while True:
            message, files = (self.early.pop(0), []) if self.early else self.hear()
            match message["kind"]:
                case "ping":
                    self.say("pong", n=message["n"], step=0)
                case "view":
                    self.install(message["view"])
                case "store":
                    self.keys.setdefault(message["generation"], set()).add(message["key"])
                    self.check_keys()
                case "complete" if not self.placed.is_set():
                    self.say("finished")
                    os._exit(0)
                case "memories":
                    texts = [os.pread(file, 32, 0).rstrip(b"\0").decode() for file in files]
                    assert texts == [str(holder) for holder in message["holders"]]
                    self.say("event", event="fake_memories", holders=message["holders"])
                    self.say("release", generation=self.generation)

    def install(self, view: dict[str, Any]) -> None:
        holders = [w["holder"] for m in view["members"] if not m["spare"] for w in m["workers"]]
        if self.holder not in holders:
            return
        self.placed.set()
        self.generation = view["generation"]
        self.size = len(holders)
        self.say("event", event="fake_view", generation=self.generation, holders=holders)
        value = base64.b64encode(b"address").decode()
        self.say("store", generation=self.generation, key=str(self.holder), value=value)
        self.say("memories")

    def check_keys(self) -> None:
        if self.size and len(self.keys.get(self.generation, ())) == self.size:
            self.say("event", event="fake_connected", generation=self.generation)
            self.size = 0

    def train(self, steps: int, start: float, flaw: str) -> None:
        while not self.placed.wait(2):
            if flaw == "spare":
                raise RuntimeError("boom in the spare")
        step = 0
        if flaw == "stuck":
            self.say("event", event="resumed", generation=self.generation, step=1)
        while step < steps:
            now = int((time.time() - start) / STEP_S)
            for committed in range(max(step, now - 20), min(now, steps)):
                self.say("log", step=committed, metrics={"loss": committed / 2})
            step = max(step, min(now, steps))
            if flaw in ("raise", "abort") and os.environ["RANK"] == "1" and step > 5:
                raise RuntimeError("boom in the script")
            time.sleep(STEP_S / 2)
        self.say("finished")


def main() -> None:
    steps, start, flaw = int(sys.argv[1]), float(sys.argv[2]), (*sys.argv[3:], "")[0]
    if flaw == "exit" and os.environ["RANK"] == "1":
        sys.exit(7)
    worker = FakeWorker()
    try:
        worker.attach(flaw)
        if flaw == "mute":
            time.sleep(1000)
        threading.Thread(target=worker.listen, daemon=True).start()
        worker.train(steps, start, flaw)
    except RuntimeError:
        worker.say("error", text=traceback.format_exc())
        if flaw == "abort":  # as a process group does that is still open at the interpreter's end
            os.abort()
        os._exit(1)
    os._exit(0)  # the listener would see the interpreter go


if __name__ == "__main__":
    main()
