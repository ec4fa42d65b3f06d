"""One history from one seed: `simulate(seed)` either returns what it was or raises `Violation`."""

from dataclasses import dataclass
from random import Random
from typing import Any

from outlast.cluster.errors import Diverged, JobComplete, PeerLost, StateLost
from sim.checks.agreement import Agreement
from sim.checks.code_bound import CodeBound
from sim.checks.contained import Contained
from sim.checks.exactly_once import ExactlyOnce
from sim.checks.fencing import Fencing
from sim.checks.monotonic import Monotonic
from sim.checks.ownership import Ownership
from sim.checks.untorn import Untorn
from sim.job import Job, Shape
from sim.patches import simulated
from sim.script import Redundancy, Task, twin
from sim.swarm import Swarm
from sim.world import Process, Violation, World

TASKS = (Task(), Task(adam=False), Task(clip=0.5), Task(steps=9))


@dataclass(frozen=True, slots=True)
class History:
    """What came of a seed: `ended` is how the job ended, `trace` is equal for equal histories."""

    seed: int
    shape: Shape
    ended: str
    faults: tuple[str, ...]
    trace: int
    lines: tuple[str, ...]


class Sound:
    """Nothing fails in a way that nobody meant: an exception is a bug, a refusal is not."""

    def __init__(self, wild: bool) -> None:
        self.wild = wild
        self.refused = ""

    def crashed(self, process: Process, error: Any) -> None:
        """A thread or a task ended in an exception."""
        if isinstance(error, Violation):
            raise error
        raise Violation(f"S17: {process.name} crashed: {error!r}") from (
            error if isinstance(error, BaseException) else None
        )

    def failed(self, process: Process, error: BaseException) -> None:
        """A script ended in an exception."""
        if isinstance(error, Violation):
            raise error
        if isinstance(error, Diverged) and "poison" in process.facts:
            self.refused, self.wild = str(error), True  # alone, it cannot know better
        elif isinstance(error, StateLost) or (self.wild and isinstance(error, PeerLost)):
            self.refused = str(error)
        elif not isinstance(error, JobComplete):
            raise Violation(f"L2: {process.name} failed: {error!r}") from error


def shape_of(random: Random) -> Shape:
    """The size and the protection of a job."""
    nodes = random.choice([2, 3, 3, 4, 4, 5, 6])
    workers = random.choice([1, 1, 2]) if nodes < 5 else 1
    zero, parity = random.choice([0, 1, 2, 2, 2]), random.choice([0, 1, 1, 2])
    how = Redundancy(zero=zero, parity=parity, group=random.choice([max(2, parity + 1), 4, 16]))
    return Shape(nodes, workers, random.choice(TASKS), how)


def simulate(
    seed: int, *, shape: Shape | None = None, wild: bool | None = None, kinds: tuple[str, ...] = ()
) -> History:
    """Live through the history of a seed; `shape`, `wild` and `kinds` override what it draws.

    Raises:
        Violation: an invariant did not hold; its notes are the end of the history.
    """
    world = World(seed)
    drawn = shape_of(world.random)
    shape = shape or drawn
    reckless = world.random.random() < 0.15
    twin(shape.task)
    job = Job(world, shape)
    bound, sound = CodeBound(shape), Sound(reckless if wild is None else wild)
    swarm = Swarm(job, bound, wild=sound.wild, kinds=kinds)
    world.listeners = [
        job, bound, Monotonic(bound), ExactlyOnce(), Contained(), Agreement(shape.task),
        Fencing(), Ownership(), Untorn(shape.task), sound, swarm,
    ]  # fmt: skip
    try:
        with simulated(world, job.network, job.shared, swarm.reach):
            for node in range(1, shape.nodes + 1):
                world.at(0.3 * world.random.random(), None, job.boot, node)
            world.run(lambda: job.over)
            ended = _ending(job, sound)
            if ended == "finished":
                world.tell("finished", job)
    except Violation as violation:
        violation.add_note("\n".join([f"seed {seed}: {shape}", *world.history[-400:]]))
        raise
    finally:
        world.close()
        job.close()
    faults = tuple(line for line in world.history if "FAULT" in line)
    return History(seed, shape, ended, faults, world.trace, tuple(world.history))


def _ending(job: Job, sound: Sound) -> str:
    """How the job ended; a safe history ends well."""
    codes = sorted(set(job.ends.values()))
    if 0 in codes and job.digests:
        return "finished"
    if not sound.wild:
        raise Violation(f"L2: the job ended with {job.ends}: {sound.refused or 'not refused'}")
    return f"refused with {codes}"


