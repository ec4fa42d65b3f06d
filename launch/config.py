"""What a launch is asked to do, validated once.

`LaunchConfig` is built by the command line and travels as JSON to the agents of a standalone job.
Invariant: a config that exists is coherent, so that nothing behind it checks a flag again; the
job key is a secret and never part of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from outlast.checkpoint.every import Every
from outlast.cluster.errors import Misuse

DEFAULT_PORT, ISLAND_PORT = 29400, 29401


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """The flags of `outlast launch`; raises `Misuse` with one line that says what to do."""

    script: str
    script_args: tuple[str, ...] = ()
    min_nodes: int = 1
    max_nodes: int = 1
    nproc_per_node: int = 1
    endpoints: tuple[str, ...] = ()
    job: str = "none"
    standalone: bool = False
    max_restarts: int = 0
    role: str = "default"
    module: bool = False
    no_python: bool = False
    log_dir: str = ""
    redirects: str = "0"
    tee: str = "0"
    local_ranks_filter: tuple[int, ...] = ()
    local_addr: str = ""
    interface: str = ""  # as the user names it; of an agent: the kernel's name, empty for loopback
    node: str = ""
    heartbeat_s: float = 0.5
    spares: int = 0
    racks: Mapping[str, str] = field(default_factory=dict)  # of every node, if any is known
    rebalance: bool = False
    poison: str = "evict"
    shutdown_timeout_s: float | None = None
    checkpoint_dir: str = ""
    checkpoint_every: str = ""
    checkpoint_keep: int = 2
    requeues: int = 0  # how often a scheduler has started the job before
    islands: int = 1
    island: int | None = None  # which of them this job is
    together: bool = False  # all islands are of one launch, and share its console
    island_endpoints: tuple[str, ...] = ()  # of each: "HOST:PORT", or several with "/" between

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        demands = (
            (1 <= self.min_nodes <= self.max_nodes, "--nnodes must be N or MIN:MAX, at least 1"),
            (self.nproc_per_node >= 1, "--nproc-per-node must be at least 1"),
            (self.max_restarts >= 0, "--max-restarts must not be negative"),
            (self.spares >= 0, "--spares must not be negative"),
            (0.05 <= self.heartbeat_s <= 60, "--heartbeat must be between 0.05 and 60 seconds"),
            (self.shutdown_timeout_s is None or 0 <= self.shutdown_timeout_s < 1e6,
             "--shutdown-timeout must not be negative"),
            (self.checkpoint_keep >= 1, "--checkpoint-keep must be at least 1"),
            (self.job and "/" not in self.job and "\0" not in self.job,
             "--rdzv-id must be a name without '/'"),
            ("/" not in self.node, "--node-name must be a name without '/'"),
            (not (self.module and self.no_python), "use either --module or --no-python, not both"),
            (self.standalone or self.endpoints,
             "several nodes need --rdzv-endpoint HOST:PORT (the same on every node)"),
            (self.islands >= 1, "--islands must be at least 1"),
            (self.island is None or 0 <= self.island < self.islands,
             f"--island must be a number below --islands, here 0 to {self.islands - 1}"),
            (len(self.island_endpoints) == (0 if self.island is None else self.islands),
             "--island I and --island-endpoints HOST:PORT,HOST:PORT,… (one for each of --islands) "
             "go together"),
        )  # fmt: skip
        for holds, complaint in demands:
            if not holds:
                raise Misuse(complaint)
        Every.parse(self.checkpoint_every)
        for text in self.endpoints:
            host_and_port(text)
        places = [place for island in self.island_addresses() for place in island]
        if twice := sorted({f"{host}:{port}" for host, port in places
                            if places.count((host, port)) > 1}):  # fmt: skip
            raise Misuse(f"--island-endpoints: {', '.join(twice)} is there more than once")
        for name, text in (("--redirects", self.redirects), ("--tee", self.tee)):
            captured(text, 0, name)

    @property
    def training(self) -> str:
        """The name that all islands share: the job's without that of its island."""
        return self.job.removesuffix(f".island{self.island}")

    @property
    def checkpoint_root(self) -> str:
        """What --checkpoint-dir is, for all islands."""
        return self.checkpoint_dir.removesuffix(f"/island{self.island}")

    def island_addresses(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """Where the agents of every island may be found."""
        return tuple(
            tuple(
                host_and_port(text.strip(), "--island-endpoints", ISLAND_PORT)
                for text in island.split("/")
            )
            for island in self.island_endpoints
        )

    def of_island(self, island: int, endpoints: Sequence[str]) -> "LaunchConfig":
        """This config for the job of one island, which has a name and places of its own."""

        def own(text: str, mark: str) -> str:
            name = f"{mark}island{island}"  # those who join a job are given what it has
            return text if text.endswith(name) else text.rstrip("/") + name

        return replace(
            self, island=island, island_endpoints=tuple(endpoints), job=own(self.job, "."),
            log_dir=own(self.log_dir, "/"), checkpoint_dir=own(self.checkpoint_dir, "/"),
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` turns back into an equal config."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "LaunchConfig":
        """The inverse of `as_json`."""
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return LaunchConfig(**{**fields, **lists})


def host_and_port(
    text: str, flag: str = "--rdzv-endpoint", default: int = DEFAULT_PORT
) -> tuple[str, int]:
    """Split "host:port" or "host" (the default port); IPv6 addresses stand in brackets."""
    host, _, port = text.rpartition(":") if ":" in text.rpartition("]")[2] else (text, "", "")
    number = int(port) if port.isdecimal() else default if not port else 0
    if not host or not 0 < number < 65536:
        raise Misuse(f"{flag}: {text!r} is not HOST:PORT")
    return host.strip("[]"), number


def node_range(text: str) -> tuple[int, int]:
    """Read --nnodes: "4" or "2:4"."""
    low, _, high = text.partition(":")
    if not low.isdecimal() or (":" in text and not high.isdecimal()):
        raise Misuse(f"--nnodes: {text!r} is not a number or MIN:MAX")
    return int(low), int(high or low)


def captured(text: str, local_rank: int, flag: str = "--redirects") -> int:
    """Read --redirects/--tee for one rank: 0 nothing, 1 stdout, 2 stderr, 3 both."""
    value = 0
    for part in text.split(","):
        rank, colon, bits = part.rpartition(":")
        if bits not in {"0", "1", "2", "3"} or (colon and not rank.isdecimal()):
            raise Misuse(f"{flag}: {text!r} is not 0..3 or RANK:0..3,…")
        if not colon or int(rank) == local_rank:
            value = int(bits)
    return value


def key_values(text: str) -> dict[str, str]:
    """Read --rdzv-conf: "join_timeout=600,last_call_timeout=2"."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(sign and name.strip() for name, sign, _ in pairs):
        raise Misuse(f"--rdzv-conf: {text!r} is not KEY=VALUE,KEY=VALUE")
    return {name.strip(): value.strip() for name, _, value in pairs}
