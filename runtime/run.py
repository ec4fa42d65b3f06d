"""What a training script sees: `init`, `prepare`, `steps`, `log`.

    run = outlast.init(seed=0, leaves=8)
    model = run.prepare(GPT(config), optimizer=partial(torch.optim.AdamW, lr=3e-4), zero=2)
    for step in run.steps(1000):
        with step:
            for batch in step.batches(data, batch_size=4):
                step.backward(loss_fn(model, batch))
        run.log(loss=step.loss)

The body of the loop over batches runs once for each leaf this rank owes. When a peer is lost,
the loop simply goes on longer: with the leaves of the lost rank, or with those of a step that
has to be done again. When it ends, the step is committed on every rank."""

import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from outlast.checkpoint.ladder import Ladder
from outlast.checkpoint.memory import StateMemory, memory_bytes
from outlast.checkpoint.records import StateShape
from outlast.cluster import failpoint
from outlast.cluster.environment import environment
from outlast.cluster.errors import GenerationChanged, JobComplete, Misuse, PeerLost, Stopped
from outlast.runtime import recovery
from outlast.runtime.allocator import keep_pages
from outlast.runtime.determinism import pin, seed_all
from outlast.runtime.flat_model import FlatModel
from outlast.runtime.islands.council import Astray
from outlast.runtime.islands.outer import Outer
from outlast.runtime.islands.outer_optimizer import OUTER_PARAM, outer_roles
from outlast.runtime.islands.settings import Islands
from outlast.runtime.link import AgentLink, Link, SoloLink
from outlast.runtime.optimizer import (
    CohortOptimizer,
    OptimizerFactory,
    OptimizerState,
    Schedule,
    ScheduleFactory,
    discover,
)
from outlast.runtime.samples import leaf_seed, samples
from outlast.runtime.shard_state import role_of, shard_state
from outlast.runtime.training import Safety, Settings, Training

T = TypeVar("T")

_INTERRUPTED = (GenerationChanged, PeerLost)


def init(
    *,
    seed: int = 0,
    leaves: int = 8,
    grain: int = 4096,
    weight: float = 1.0,
    threads: int = 1,
    islands: Islands | None = None,
) -> "Run":
    """Join the job that `outlast launch` started this process for; alone, be a job of one.

    Args:
        seed: of the model's initial values, the data order and all random numbers of training.
        leaves: micro-batches of one step, a power of two, dealt to the ranks whatever their number.
        grain: elements; shards are cut at multiples of it, whatever the number of ranks.
        weight: relative speed of this rank; a rank of weight 2 gets twice the leaves of one of 1.
        threads: of torch on this rank; a part of the result, so the same on every rank.
        islands: how this job exchanges what it learns with those beside it, see docs/islands.md;
            the default of a job that `outlast launch --islands` started is `Islands()`.
    """
    settings = Settings(seed=seed, leaves=leaves, grain=grain, weight=weight, islands=islands)
    if threads < 1:
        raise Misuse(f"threads={threads}: use 1 or more")
    found = environment()
    keep_pages()
    pin(threads, found.local_rank)
    seed_all(seed)
    if found.agent_fd is not None and threading.current_thread() is threading.main_thread():
        _leave_signals_to_agent()
    link: Link = SoloLink() if found.agent_fd is None else AgentLink(found.agent_fd, found.latch_fd)
    sys.excepthook = partial(_tell_cause, link, sys.excepthook)
    failpoint.arm(found.drill, node=link.identity.node, holder=link.identity.holder)
    if link.identity.island is not None and islands is None:
        settings = replace(settings, islands=Islands())
    return Run(link, settings)


def _leave_signals_to_agent() -> None:
    """A scheduler sends its signals to every process of a node; the agent brings the job to an end,
    and for that it needs its workers. A handler of the script's stays."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, signal.SIG_IGN)
            if number == signal.SIGTERM:  # by which the script ends its own children
                default = partial(signal.signal, number, signal.SIG_DFL)
                os.register_at_fork(after_in_child=default)


def _tell_cause(
    link: Link, hook: Callable[..., object], kind: type[BaseException], error: BaseException,
    trace: TracebackType | None,
) -> None:  # fmt: skip
    """Tell the agent why the script ends: it decides what is worth another try, and the exit code
    may be lost, since a process group that nobody closes aborts the interpreter's end."""
    link.send(kind="error", text=f"{kind.__name__}: {error}"[:2000])
    hook(kind, error, trace)


class Run:
    """One rank's handle on its job."""

    def __init__(self, link: Link, settings: Settings) -> None:
        self._link, self._settings = link, settings
        self._training: Training | None = None
        self._fingerprint = ""
        self._logged = 0  # steps that run.log has seen
        self._due = 0  # the step that the script is in, as it will be counted
        self._stopped = False  # the state is on storage, and the job ends

    @property
    def training(self) -> Training:
        """The engine behind the API."""
        if self._training is None:
            raise Misuse("call run.prepare(model, optimizer=...) first")
        return self._training

    @property
    def rank(self) -> int:
        """Rank in the present generation; it changes when the membership does."""
        return self.training.membership.generation.communicator.rank

    @property
    def world_size(self) -> int:
        """Ranks of the present generation."""
        return self.training.membership.generation.communicator.size

    @property
    def generation(self) -> int:
        """Number of the present view of the membership."""
        return self.training.membership.generation.view.generation

    def prepare(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerFactory,
        zero: int = 2,
        clip: float | None = None,
        schedule: ScheduleFactory | None = None,
        dtype: torch.dtype | None = None,
        **safety: Unpack[Safety],
    ) -> nn.Module:
        """Take over the model's parameters and wait until this rank is part of the job.

        Args:
            optimizer: parameters -> any element-wise torch.optim optimizer.
            zero: 0 replicates the optimizer state on every rank, 1 and 2 shard it.
            clip: limit of the global gradient norm.
            schedule: step -> factor of the learning rate, or optimizer -> torch LRScheduler.
            dtype: of the working parameters; bfloat16 keeps a float32 master.
            safety: what a loss may take, all with defaults:
                parity: m, the domains (nodes) that may be lost at once without losing the step; 0
                    protects nothing. It costs m / (group - m) of the state in memory.
                group: most members of a parity group.
                average: "squared" or "plain": a block that nothing else gives back is made from
                    its neighbours, weighted by their gradient norms; see docs/recovery.md.
                spot_check: every how many steps one leaf is computed by two ranks and compared, to
                    find wrong gradients of ordinary size; see docs/sick_ranks.md.
        Raises:
            Misuse: the model, the optimizer or a setting cannot work; says what to do.
            StateLost: this rank joined a job whose state no rung can rebuild.
        """
        if self._training is not None:
            raise Misuse("run.prepare() was called twice: one run trains one model")
        if unknown := safety.keys() - Safety.__annotations__.keys():
            raise Misuse(f"run.prepare() takes no {', '.join(sorted(unknown))}")
        settings = replace(self._settings, zero=zero, clip=clip, **safety)
        flat = FlatModel(model, dtype)
        kept = discover(optimizer, flat.device)
        shape, safe = _shape(flat, kept, settings), settings.protection(flat.space)
        descriptor = self._link.allocate(memory_bytes(shape))
        memory = StateMemory(descriptor, shape)
        os.close(descriptor)
        shards = CohortOptimizer(optimizer, kept)
        self._training = Training(
            settings, self._link, flat, shards, Schedule(schedule, shards.base_rate),
            Ladder(flat.space, shape, settings.grain, zero == 0, safe, settings.average),
            shard_state(memory, flat.space, flat.device),
        )  # fmt: skip
        self._fingerprint = flat.fingerprint()
        if (islands := settings.islands) is not None:
            self._training.outer = Outer(self._training, islands, self._fingerprint)
        self._link.ready(flat.device, zero > 0 and bool(safe.m or safe.edges), zero > 0)
        try:
            recovery.join(self._training, self._fingerprint)
        except (JobComplete, Stopped) as over:
            self.close()
            raise SystemExit(0) from over  # a spare or a latecomer: nothing is left to do
        return flat.module

    def steps(self, count: int) -> Iterator["Step"]:
        """The steps up to number `count` that are not committed yet, each until it is.

        A rank that joins a running job starts at the job's step. After the last step all ranks
        wait for each other, so that none leaves while another may still need its memory.
        """
        training = self.training
        while True:
            while training.committed < count and not self._stopped:
                step = Step(self, training.committed)
                self._due = training.committed + 1
                yield step
                if not step.committed:
                    raise Misuse(
                        f"step {step.index} was left before it was committed: loop over all of "
                        "step.batches(...) inside `with step:`"
                    )
            if self._stopped:
                self._leave()
            if training.committed > count or training.ended >= training.committed:
                break  # this rank joined when the others had passed the barrier
            try:
                self._link.pulse.inside()
                training.membership.redundancy.finish()
                if failpoint.drilled():
                    _tell_digest(self, self._link)
                training.durable.end(training.membership.generation.communicator)
                if training.outer is not None:
                    training.outer.finish()
            except _INTERRUPTED:
                try:
                    self.recover()
                except JobComplete:
                    break  # somebody passed this barrier, so everybody had done all steps
            else:
                training.ended = training.committed
        self._link.pulse.outside()

    def recover(self, anew: bool = False) -> None:
        """Enter the next generation, or this one anew; the runtime calls this by itself."""
        try:
            recovery.join(self.training, self._fingerprint, anew)
        except Stopped:
            self._stopped = True
            if self.training.committed < self._due:
                self._leave()  # else the script has still to log the step

    def _leave(self) -> None:
        """The state is on storage: nothing is left to do."""
        self.close()
        raise SystemExit(0)

    def log(self, **metrics: float) -> None:
        """Record metrics of the step that was just committed, each step exactly once."""
        step = self.training.committed
        if step <= self._logged:
            return  # a step that was made again: its record exists
        self._logged = step
        values = {name: float(value) for name, value in metrics.items()}
        self._link.send(kind="log", step=step, metrics=values)

    def digest(self, *roles: str) -> str:
        """sha256 over the parameters and the optimizer state, or over some roles of the state;
        equal on all ranks; a collective."""
        return self._collective(lambda: self.whole_digest(*roles))

    def _collective(self, work: Callable[[], T]) -> T:
        while True:
            if self._stopped:
                self._leave()
            try:
                return work()
            except _INTERRUPTED:
                try:
                    self.recover()
                except JobComplete as complete:
                    self.close()
                    raise SystemExit(0) from complete  # the others have said it and left

    @contextmanager
    def outer(self) -> Iterator[None]:
        """Inside, the model has the outer parameters, which all islands share, and not those that
        this island is training: to evaluate, or to export; a collective.

        Raises:
            Misuse: this job is no island.
        """
        training = self.training
        if training.outer is None:
            raise Misuse("run.outer() is for islands: give outlast.init(islands=Islands(...))")
        whole = torch.empty_like(training.model.param)

        def take(values: Tensor) -> None:
            whole.copy_(values)

        self._collective(lambda: training.whole_role(OUTER_PARAM, take))
        mine = training.model.param.clone()  # a loss meanwhile may have changed it
        training.model.param.copy_(whole)
        try:
            yield
        finally:
            training.model.param.copy_(mine)

    def whole_digest(self, *roles: str) -> str:
        """What `digest` does in one generation, whose end it raises."""
        digest = hashlib.sha256()

        def use(values: Tensor) -> None:
            digest.update(values.contiguous().view(torch.uint8).cpu().numpy().data)

        for role in self.training.state.roles:
            if not roles or role.name in roles:
                self.training.whole_role(role.name, use)
        if not roles:
            use(self.training.model.param)
        return digest.hexdigest()

    def close(self) -> None:
        """Say that this rank is done; the process may end afterwards."""
        if self._training is not None and self._training.outer is not None:
            self._training.outer.exchange.close()
        self._link.close()


def _tell_digest(run: Run, link: Link) -> None:
    """The bits of a drilled run, for the comparison with its twin."""
    digest = run.whole_digest()
    if run.rank == 0:
        link.send(kind="event", event="digest", step=run.training.committed, sha256=digest)


def _shape(flat: FlatModel, kept: OptimizerState, settings: Settings) -> StateShape:
    """The parameters, or their fp32 master, come first."""
    primary = "param" if flat.dtype == torch.float32 else "master"
    roles = [role_of(primary, torch.float32), *(role_of(k, d) for k, d in kept.roles.items())]
    outer = outer_roles(settings.islands) if settings.islands is not None else ()
    roles += [role_of(name, torch.float32) for name in outer]
    ordered = sorted(roles, key=lambda role: -role.itemsize)  # streams stay aligned
    ordered.sort(key=lambda role: role.name != primary)
    return StateShape(flat.space.fingerprint(), flat.space.numel, tuple(ordered))


class Step:
    """One optimizer step, as seen by one rank."""

    def __init__(self, run: Run, index: int) -> None:
        self._run, self._target = run, index + 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        return None

    @property
    def index(self) -> int:
        """Number of the step that is being computed, from 0; lower while a lost one is made
        again."""
        return min(self._run.training.committed, self._target - 1)

    @property
    def committed(self) -> bool:
        """Whether every rank has this step."""
        return self._run.training.committed >= self._target

    @property
    def loss(self) -> float:
        """Mean loss over all leaves of the committed step."""
        training = self._run.training
        if not self.committed:
            raise Misuse("step.loss exists once the step is committed: read it after the batches")
        return sum(training.losses) / len(training.losses)

    @property
    def norm(self) -> float:
        """Global gradient norm of the committed step, before clipping."""
        return self._run.training.norm

    def batches(
        self, data: Any, batch_size: int = 1, collate: Callable[[list[Any]], Any] = default_collate
    ) -> Iterator[Any]:
        """The micro-batches this rank owes to the step; when they end, the step is committed.

        Args:
            data: map-style data set, or a function (step, leaf) -> batch.
            batch_size: samples of one micro-batch, the same on every rank.
        """
        run, training = self._run, self._run.training
        while not self.committed:
            try:
                for leaf in training.leaves():
                    yield from training.leaf.compute(
                        leaf, self._batch(data, leaf, batch_size, collate), leaf in training.todo
                    )
                training.commit()
            except _INTERRUPTED:
                run.recover()
            except Astray:
                run.recover(anew=True)  # with the state of another island

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this leaf's mean loss; may be called for several terms."""
        self._run.training.leaf.backward(loss)

    def _batch(
        self, data: Any, leaf: int, batch_size: int, collate: Callable[[list[Any]], Any]
    ) -> Callable[[], Any]:
        training = self._run.training
        seed, step, outer = training.settings.seed, training.committed, training.outer
        leaves = training.settings.leaves
        if outer is not None:  # islands read different samples: all leaves of all are counted on
            leaf, leaves = outer.island * leaves + leaf, outer.islands * leaves

        def make() -> Any:
            seed_all(leaf_seed(seed, step, leaf))
            if not hasattr(data, "__getitem__"):
                return data(step, leaf)
            chosen = samples(seed, step, leaf, leaves, batch_size, len(data))
            return collate([data[index] for index in chosen])

        return make
