"""The owned part of the state: parameters or their fp32 master, and the optimizer's moments.

On the CPU the live state is the snapshot: an update copies the old half of the state memory to
the new one and runs the optimizer there, so the old step stays whole and a roll-back costs
nothing. On CUDA the live state is on the device and `seal` copies it to the pinned half on a
side stream, while the next forward and backward run."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from outlast.checkpoint.average import cohorts
from outlast.checkpoint.memory import StateMemory
from outlast.checkpoint.records import Lineage, Role, SlotRecord
from outlast.layout.run import Run
from outlast.layout.space import Space
from outlast.runtime.fold import unit_runs

_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


def role_of(name: str, dtype: torch.dtype) -> Role:
    """The role of a state tensor."""
    return Role(name, str(dtype).removeprefix("torch."), dtype.itemsize)


class ShardState:
    """State of the owned runs in host memory.

    Args:
        memory: two halves that the agent holds.
        space: the address space of the model.
    """

    def __init__(self, memory: StateMemory, space: Space) -> None:
        self.memory, self.space = memory, space
        self.roles = memory.shape.roles
        self.owned: tuple[Run, ...] = ()
        self.runs: list[Run] = []
        self.members: list[int] = []  # the cohort of each of `runs`, see `checkpoint.average`
        self.half = 0
        self.step = -1
        self._equal = frozenset[str]()  # roles of which both halves have the same owned values
        self._sums: dict[str, list[int]] = {}  # of the newest step
        self._arrays = [{r.name: self._tensor(half, r) for r in self.roles} for half in (0, 1)]

    def _tensor(self, half: int, role: Role) -> Tensor:
        return torch.from_numpy(self.memory.array(half, role)).view(_DTYPES[role.dtype])

    def host(self, half: int, role: str, run: Run) -> Tensor:
        """View of one run of one role in a half."""
        return self._arrays[half][role][run.start : run.stop]

    def dtype(self, role: str) -> torch.dtype:
        """dtype of a role."""
        return self._arrays[0][role].dtype

    def adopt(self, half: int, step: int, owned: tuple[Run, ...], lineage: Lineage = ()) -> None:
        """Go on from the committed `half` with the runs `owned`, cut at units and cohorts."""
        self.half, self.step, self.owned = half, step, owned
        self.runs, self.members = cohorts(unit_runs(self.space, owned), lineage)
        self._equal, self._sums = frozenset(), {}
        self.memory.reserve(owned)

    def live(self, role: str) -> list[Tensor]:
        """The newest state of one role, a view per run of `runs`."""
        return [self.host(self.half, role, run) for run in self.runs]

    def update(self, change: Callable[[dict[str, list[Tensor]]], None]) -> None:
        """Open the other half, fill it with the newest state and let `change` overwrite it."""
        old, self.half = self.half, 1 - self.half
        self.memory.begin(self.half)
        for role in (role for role in self.roles if role.name not in self._equal):
            for run in self.runs:
                self.host(self.half, role.name, run).copy_(self.host(old, role.name, run))
        change({role.name: self.live(role.name) for role in self.roles})

    def commit(self, record: SlotRecord, still: frozenset[str] = frozenset()) -> None:
        """The opened half is `record.step` from now on; its runs and checksums are filled in.

        Args:
            still: roles that this step has not changed, of which nothing is copied again.
        """
        self.step, self._equal = record.step, still
        self._publish(self.half, self.owned, record, still)

    def seal(self) -> None:
        """Make sure that the newest step is committed in host memory."""

    def beside(self) -> AbstractContextManager[object]:
        """What a thread enters to read the newest step, and to seal it, beside the main one."""
        return nullcontext()

    def publish(
        self,
        half: int,
        record: SlotRecord,
        received: Sequence[Run],
        owned: tuple[Run, ...],
        generation: int,
    ) -> None:
        """Commit a half again: runs were added to what it held, and ownership was dealt anew."""
        sums = self.memory.sums(half, received)
        all_sums = {role.name: record.sums[role.name] + sums[role.name] for role in self.roles}
        held = record.held + tuple(received)
        self.memory.begin(half)
        self.memory.commit(
            half, replace(record, generation=generation, owned=owned, held=held, sums=all_sums)
        )

    def _publish(
        self, half: int, owned: tuple[Run, ...], record: SlotRecord, still: frozenset[str]
    ) -> None:
        changed = [role for role in self.roles if role.name not in still & self._sums.keys()]
        sums = self._sums = self._sums | self.memory.sums(half, owned, changed)
        self.memory.commit(half, replace(record, owned=owned, held=owned, sums=sums))

    def trim(self) -> None:
        """Give back the memory of runs that are no longer owned."""
        self.memory.trim(self.owned)


class DeviceState(ShardState):
    """State of the owned runs on a CUDA device, copied to the pinned halves behind the update.

    The commit of a step lags its update: until `seal`, the other half still holds the step before,
    which is the step that a loss in between falls back to.
    """

    def __init__(self, memory: StateMemory, space: Space, device: torch.device) -> None:
        super().__init__(memory, space)
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._live: dict[str, dict[Run, Tensor]] = {}
        self._copied: tuple[torch.cuda.Event, Callable[[], None]] | None = None

    def adopt(self, half: int, step: int, owned: tuple[Run, ...], lineage: Lineage = ()) -> None:
        super().adopt(half, step, owned, lineage)
        for role in self.roles:
            for run in owned:
                _pin(self.host(0, role.name, run))
                _pin(self.host(1, role.name, run))
            self._live[role.name] = {
                run: self.host(half, role.name, run).to(self._device, copy=True)
                for run in self.runs
            }

    def live(self, role: str) -> list[Tensor]:
        return [self._live[role][run] for run in self.runs]

    def update(self, change: Callable[[dict[str, list[Tensor]]], None]) -> None:
        self.seal()
        self.half = 1 - self.half
        self.memory.begin(self.half)
        change({role.name: self.live(role.name) for role in self.roles})

    def commit(self, record: SlotRecord, still: frozenset[str] = frozenset()) -> None:
        there, self._equal = self._equal & still, still
        self.step = record.step
        half, owned = self.half, self.owned
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for role in (role for role in self.roles if role.name not in there):
                for run, values in self._live[role.name].items():
                    self.host(half, role.name, run).copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        self._copied = (copied, lambda: self._publish(half, owned, record, still))

    def beside(self) -> AbstractContextManager[object]:
        # All that the main thread has enqueued so far, the update included, comes before.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)  # type: ignore[no-any-return]

    def seal(self) -> None:
        if self._copied is not None:
            copied, publish = self._copied
            self._copied = None
            copied.synchronize()
            publish()


def _pin(host: Tensor) -> None:
    """Page-lock a view of the state memory, so that copies to it run on their own."""
    if host.numel() and not host.is_pinned():
        size = host.numel() * host.element_size()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), size, 0))


def shard_state(memory: StateMemory, space: Space, device: torch.device) -> ShardState:
    """The state that suits `device`."""
    return (
        DeviceState(memory, space, device) if device.type == "cuda" else ShardState(memory, space)
    )
