"""What a slot, a parity half and a survivor say about themselves, as plain values.

These records travel through shared memory and between ranks as JSON, so everything here is a
number, a string, or a list of them; runs are written as pairs [start, stop)."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from outlast.layout.run import Run


def pack_runs(runs: Iterable[Run]) -> list[tuple[int, int]]:
    """Plain intervals of `runs` as pairs for a record."""
    return [pair for run in runs for pair in run.intervals()]


def unpack_runs(pairs: Iterable[tuple[int, int]]) -> tuple[Run, ...]:
    """Inverse of `pack_runs`."""
    return tuple(Run.of(start, stop) for start, stop in pairs)


def _fields(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as they are: `asdict` would copy whole layouts, run by run."""
    return {each.name: getattr(record, each.name) for each in fields(record)}


@dataclass(frozen=True, slots=True)
class Role:
    """One array over the whole address space, such as exp_avg."""

    name: str
    dtype: str
    itemsize: int


@dataclass(frozen=True, slots=True)
class StateShape:
    """What a slot holds: `roles` of `numel` elements each; `fingerprint` names the model."""

    fingerprint: str
    numel: int
    roles: tuple[Role, ...]

    def role(self, name: str) -> Role:
        """The role of that name."""
        return next(role for role in self.roles if role.name == name)

    @property
    def widths(self) -> dict[str, int]:
        """Bytes per element of each role."""
        return {role.name: role.itemsize for role in self.roles}

    @property
    def element_bytes(self) -> int:
        """Bytes of state per element of the model."""
        return sum(role.itemsize for role in self.roles)


@dataclass(frozen=True, slots=True)
class Averaging:
    """One lossy recovery, as every later record remembers it; see `checkpoint.average`.

    Args:
        step, generation: committed steps when it happened; the first generation that has it.
        weights: of the block before and of the block after each of `units`, together 1.
        runs: the elements that were averaged; none where a later exact recovery went back before
            an averaging, and only the generation matters.
        scalars: what the optimizer keeps per tensor, now, of these elements.
    """

    step: int
    generation: int
    kind: str
    units: tuple[str, ...]
    weights: tuple[tuple[float, float], ...]
    runs: tuple[Run, ...]
    scalars: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return _fields(self) | {"runs": pack_runs(self.runs)}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Averaging":
        typed = {
            "units": tuple(fields["units"]),
            "weights": tuple((before, after) for before, after in fields["weights"]),
            "runs": unpack_runs(fields["runs"]),
        }
        return Averaging(**(fields | typed))


Lineage = tuple[Averaging, ...]


def _history(slot: "SlotRecord | SlotSource") -> dict[str, Any]:
    return {"lineage": [averaging.as_json() for averaging in slot.lineage]}


def _typed_history(fields: dict[str, Any]) -> dict[str, Any]:
    lineage = tuple(Averaging.from_json(averaging) for averaging in fields["lineage"])
    return {"lineage": lineage, "norms": tuple(fields["norms"])}


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """What a committed half holds. `held` may exceed `owned` until the next parity is complete."""

    step: int
    generation: int
    owned: tuple[Run, ...]
    held: tuple[Run, ...]
    sums: dict[str, list[int]]  # role -> xxh3-64 of each run of `held`
    scalars: dict[str, float]  # optimizer state that is one number for all elements
    losses: list[float]  # loss of each leaf of the step
    norms: tuple[float, ...] = ()  # gradient norm of each unit before clipping, where averaging
    lineage: Lineage = ()
    outer: dict[str, Any] = field(default_factory=dict)  # of an island, see `runtime.islands.facts`

    def as_json(self) -> dict[str, Any]:
        runs = {"owned": pack_runs(self.owned), "held": pack_runs(self.held)}
        return _fields(self) | runs | _history(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "SlotRecord":
        runs = {key: unpack_runs(fields[key]) for key in ("owned", "held")}
        return SlotRecord(**(fields | runs | _typed_history(fields)))


@dataclass(frozen=True, slots=True)
class Protection:
    """What a step is protected with: stripes of `m` parity units in groups of at most `group`.

    Args:
        m: losses of a failure domain that each stripe survives; 0 for no stripes.
        edges: runs of which another domain keeps a copy besides.
    """

    m: int = 1
    group: int = 16
    edges: tuple[Run, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return _fields(self) | {"edges": pack_runs(self.edges)}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Protection":
        return Protection(**(fields | {"edges": unpack_runs(fields["edges"])}))


@dataclass(frozen=True, slots=True)
class ParityUnit:
    """Unit `row` of the parity of one stripe: `length` bytes at `offset` of the parity half."""

    stripe: int
    row: int
    offset: int
    length: int
    checksum: int


@dataclass(frozen=True, slots=True)
class ParityRecord:
    """Parity of `step` under the layout, the failure domains and the protection it was encoded
    with."""

    step: int
    generation: int
    layout: dict[str, Any]
    domains: dict[str, str]
    protection: Protection
    units: tuple[ParityUnit, ...]

    def as_json(self) -> dict[str, Any]:
        units = [_fields(unit) for unit in self.units]
        return _fields(self) | {"units": units, "protection": self.protection.as_json()}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "ParityRecord":
        units = tuple(ParityUnit(**unit) for unit in fields["units"])
        protection = Protection.from_json(fields["protection"])
        return ParityRecord(**(fields | {"units": units, "protection": protection}))


@dataclass(frozen=True, slots=True)
class SlotSource:
    """A verified half that a rank can read: its own (`own`) or one of a dead worker of its node."""

    own: bool
    holder: int
    step: int
    generation: int
    owned: tuple[Run, ...]
    held: tuple[Run, ...]
    scalars: dict[str, float]
    losses: tuple[float, ...]
    norms: tuple[float, ...] = ()
    lineage: Lineage = ()
    outer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParitySource:
    """Verified parity units that a rank can read."""

    own: bool
    record: ParityRecord


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank of a new generation brings along.

    Args:
        done: newest committed step of which it has gathered all parameters, -1 for a joiner.
        initial: it has not trained yet; its parameters are those of the script.
        nodes: finished nodes of the leaf tree of step index `nodes_step`.
        weight: relative speed for dealing leaves.
        model: fingerprint of the model and of its initial values.
        numerics: what else decides the bits, see `runtime.determinism`.
        ended: newest step behind which all ranks have waited for each other, as it knows.
        changed: what it has besides trained parameters came from storage, not from the script.
        astray: an island's ranks were about to take another island's state.
    """

    rank: int
    holder: int
    node: str
    done: int
    initial: bool
    nodes_step: int
    nodes: tuple[tuple[int, int], ...]
    weight: float
    model: str
    numerics: str
    slots: tuple[SlotSource, ...]
    parity: tuple[ParitySource, ...]
    ended: int = -1
    changed: bool = False
    astray: bool = False

    def as_json(self) -> dict[str, Any]:
        slots = [
            _fields(slot)
            | {"owned": pack_runs(slot.owned), "held": pack_runs(slot.held)}
            | _history(slot)
            for slot in self.slots
        ]
        parity = [{"own": each.own, "record": each.record.as_json()} for each in self.parity]
        return _fields(self) | {"slots": slots, "parity": parity}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Report":
        slots = tuple(
            SlotSource(
                **(
                    slot
                    | {key: unpack_runs(slot[key]) for key in ("owned", "held")}
                    | {"losses": tuple(slot["losses"])}
                    | _typed_history(slot)
                )
            )
            for slot in fields["slots"]
        )
        parity = tuple(
            ParitySource(source["own"], ParityRecord.from_json(source["record"]))
            for source in fields["parity"]
        )
        changed = {
            "slots": slots,
            "parity": parity,
            "nodes": tuple((level, index) for level, index in fields["nodes"]),
        }
        return Report(**(fields | changed))
