"""An elastic worker without torch that follows the other islands and tells them its number.

Usage: island_worker.py END [FLAW]. It ends once the file END exists. FLAW: `raise`
in island 1 then.
"""

import json
import os
import sys
import time
from pathlib import Path
from threading import Thread

from fake_worker import FakeWorker


class IslandWorker(FakeWorker):
    """Reports as events what it is told of others."""

    def listen(self) -> None:
        while True:
            message = self.early.pop(0) if self.early else self.hear()[0]
            match message.pop("kind"):
                case "ping":
                    self.say("pong", n=message["n"], step=0)
                case "view":
                    self.placed.set()
                case "reach":
                    self.say("event", event="fake_reach", **message)
                    self.say("islands", message={"holder": self.holder, "island": ISLAND})
                case "islands":
                    self.say("event", event="fake_heard", **message)
                    self.say("event", event="outer", step=30, fragment=1, islands=[0, 1])


LONGEST = 128 << 10
ISLAND = int(os.environ["OUTLAST_ISLAND"])


def main() -> None:
    end, flaw = Path(sys.argv[1]), (*sys.argv[2:], "")[0]
    worker = IslandWorker()
    worker.say("attach", pid=os.getpid())
    welcome, _ = worker.answer("welcome")
    worker.holder = welcome["holder"]
    told = {name: welcome[name] for name in ("island", "islands", "island_host", "island_key")}
    names = ("OUTLAST_ISLANDS", "RANK", "WORLD_SIZE")
    worker.say("event", event="fake_started", **told, **{name: os.environ[name] for name in names})
    worker.say("islands", message=["no object"])  # refused, and nothing else happens
    for size in (LONGEST, 2 * LONGEST):  # in both cases too long for those who would hear it
        frame = len(json.dumps({"kind": "islands", "message": {"text": ""}}))
        worker.say("islands", message={"text": "x" * (size - frame)})
    worker.say("ready")
    worker.say("follow")
    Thread(target=worker.listen, daemon=True).start()
    while not end.exists():
        time.sleep(0.02)
    if flaw == "raise" and ISLAND == 1:
        worker.say("error", text="boom in the script")
        os._exit(1)
    worker.say("finished")
    os._exit(0)


main()
