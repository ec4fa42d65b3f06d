"""wan.py LINK.json: a long line between two bridges, in user space because kernels lack netem.

Forwards Ethernet frames between two TAP devices (made by wan_up.sh) at a rate, after a delay,
with jitter, loss and a queue that drops what does not fit, in each direction for itself. Frames
carry virtio headers with segmentation left to the receiver, so that one read moves up to 64 KiB
and Python keeps up with about 1 Gbit/s. The file is read again when it changes:

    {"taps": ["w1a", "w1b"], "rate_mbit": 100, "delay_ms": 20, "jitter_ms": 0, "loss": 0.0,
     "queue_ms": 200}
"""

import fcntl
import heapq
import json
import os
import random
import select
import struct
import sys
import time
from pathlib import Path
from typing import Any

TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
TAP, NO_PACKET_INFO, VIRTIO_HEADER = 0x0002, 0x1000, 0x4000
CHECKSUM, SEGMENT4, SEGMENT6 = 1, 2, 4
HEADER_BYTES, FRAME_BYTES, FRAMES_AT_ONCE = 10, 70_000, 64
SEGMENT_HEADER_BYTES = 66  # Ethernet, IP and TCP of each segment that the line would carry
RELOAD_S = 0.1


def opened(name: str) -> int:
    """A descriptor of the TAP device."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", name.encode(), TAP | NO_PACKET_INFO | VIRTIO_HEADER)
    fcntl.ioctl(file, TUNSETIFF, request)
    fcntl.ioctl(file, TUNSETVNETHDRSZ, struct.pack("i", HEADER_BYTES))
    fcntl.ioctl(file, TUNSETOFFLOAD, CHECKSUM | SEGMENT4 | SEGMENT6)
    return file


class Direction:
    """One way along the line: what has been sent and has not arrived."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self._target = source, target
        self._free = 0.0  # when the line has sent all that was given to it
        self._waiting: list[tuple[float, bytes]] = []

    @property
    def due(self) -> float:
        """When the next frame arrives."""
        return self._waiting[0][0] if self._waiting else float("inf")

    def deliver(self, now: float) -> None:
        """Hand over what has arrived; a full receiver drops it."""
        while self.due <= now:
            try:
                os.write(self._target, heapq.heappop(self._waiting)[1])
            except OSError:
                continue

    def take(self, link: dict[str, Any]) -> None:
        """Put what lies at the source on the line, or drop it."""
        for _ in range(FRAMES_AT_ONCE):
            try:
                frame = os.read(self.source, FRAME_BYTES)
            except BlockingIOError:
                return
            start = max(time.monotonic(), self._free)
            waits_s = start - time.monotonic()
            if waits_s * 1000 > link["queue_ms"] or random.random() < link["loss"]:
                continue
            self._free = start + 8e-6 * _on_the_wire(frame) / link["rate_mbit"]
            delay_s = (link["delay_ms"] + random.uniform(0, link["jitter_ms"])) / 1000
            heapq.heappush(self._waiting, (self._free + delay_s, frame))


def _on_the_wire(frame: bytes) -> int:
    size = len(frame) - HEADER_BYTES
    segment = struct.unpack_from("<H", frame, 4)[0] if frame[1] else 0
    return size + (SEGMENT_HEADER_BYTES * (size // segment) if segment else 0)


def main(path: Path) -> None:
    """Forward until somebody ends the process."""
    link = json.loads(path.read_text())
    first, second = map(opened, link["taps"])
    ways = {first: Direction(first, second), second: Direction(second, first)}
    print("ready", flush=True)
    reload_at = 0.0
    while True:
        now = time.monotonic()
        if now >= reload_at:
            link, reload_at = json.loads(path.read_text()), now + RELOAD_S
        for way in ways.values():
            way.deliver(now)
        wait_s = min(reload_at, *(way.due for way in ways.values())) - time.monotonic()
        for file in select.select(ways, (), (), max(0.0, wait_s))[0]:
            ways[file].take(link)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
