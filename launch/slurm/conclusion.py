"""What becomes of a job after a start has ended: it is done, starts again, or stops with a reason.

A start that was stopped by a signal is no failure. Any start is worth another as long as the job
gets further: `tries` starts in a row without a new step are a loop, of crashes or of time limits
too short to begin, and so is a script that failed twice on the way from the same stored step to
the same place. Starts that SLURM preempted are not counted.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from signal import SIGUSR1

from outlast.launch.outcome_log import Record

EXIT_FAILED = 1
EXIT_AGAIN = 75  # EX_TEMPFAIL
CUT_OFF = 75  # of an agent that lost the majority: those it lost may well go on
STATE_LOST = "StateLost:"  # what a script fails with is not its own fault then


class Kind(Enum):
    """How a start ended."""

    DONE = "done"
    STOPPED = "stopped"  # by a signal
    FAILED = "failed"  # its script, for all
    LOST = "lost"  # more nodes than it could lose


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the job, out of the records of its agents; steps are -1 for none."""

    kind: Kind
    step: int
    source: int
    signal: int
    text: str
    records: tuple[Record, ...]

    @staticmethod
    def of(records: Collection[Record], nodes: Collection[str] = ()) -> "Start":
        """The start that these records are of, which ran on these nodes, as far as is known.

        A signal that single nodes got took them out of a start that went on: it is its end only
        if it is the last word of all, but for the nodes that were lost before.
        """
        ordered = sorted(records, key=lambda r: r.time)
        last = {r.node: r for r in ordered}
        silent = {*nodes} - {*last} - {node for r in last.values() for node in r.lost}
        ended = not silent and all(r.signal for r in last.values())
        step = max((r.step for r in records), default=-1)
        source = max((r.source for r in records), default=-1)
        for kind, chosen in (
            (Kind.DONE, [r for r in records if r.code == 0]),
            (Kind.STOPPED, [r for r in records if r.stopped]),
            (Kind.STOPPED, [r for r in records if r.signal == SIGUSR1]),
            (Kind.LOST, [r for r in records if r.code == EXIT_FAILED and STATE_LOST in r.text]),
            (Kind.FAILED, [r for r in records if r.code == EXIT_FAILED]),
            (Kind.LOST, [r for r in records if r.code == CUT_OFF]),
            (Kind.STOPPED, [*last.values()] if ended else []),
            (Kind.LOST, ordered),
        ):
            if chosen:
                end = chosen[-1]
                return Start(kind, step, source, end.signal, end.text, tuple(records))
        return Start(Kind.LOST, -1, -1, 0, "no agent is left that could say why", ())

    @property
    def over(self) -> bool:
        """Whether what is known is the end of all of its agents."""
        return any(r.stopped or r.code in (0, EXIT_FAILED) for r in self.records)

    def bad(self, nodes: Collection[str]) -> tuple[str, ...]:
        """The nodes to do without, of those of the start: poisoned, lost, or gone without a
        word. An agent that is cut off itself blames nobody: all the others seem lost to it. Where
        only nodes that a signal took out have left a word, nobody is there to tell the silent."""
        blamed = {node for r in self.records if r.code != CUT_OFF for node in r.lost}
        if self.kind is not Kind.STOPPED and any(not r.signal for r in self.records):
            blamed |= {*nodes} - {r.node for r in self.records}
        blamed -= {r.node for r in self.records if r.code != CUT_OFF}
        blamed |= {node for r in self.records for node in r.evicted}
        return tuple(node for node in nodes if node in blamed)


@dataclass(frozen=True, slots=True)
class Decision:
    """again: start it again; `code`: the exit code if not, or if that cannot be done."""

    again: bool
    code: int
    text: str
    bad: tuple[str, ...] = ()


def decide(
    records: Sequence[Record], restart: int, nodes: Collection[str], tries: int,
    preempted: Collection[int] = (),
) -> Decision:  # fmt: skip
    """What to do after the start number `restart` on these nodes, given the records of all.

    preempted: the starts whose nodes SLURM took away. It starts a job again that it has ended
    itself, and not one that has ended before.
    """
    starts = [Start.of([r for r in records if r.restart == n]) for n in range(restart)]
    starts.append(Start.of([r for r in records if r.restart == restart], nodes))
    last, bad = starts[-1], starts[-1].bad(nodes)
    if last.kind is Kind.DONE:
        return Decision(False, 0, "job finished", bad)
    stale = _stale(starts, preempted)
    if last.kind is Kind.STOPPED:
        # Else whoever has sent the signal wants the job to end.
        again = restart in preempted or last.signal == SIGUSR1
        if not again or restart in preempted or stale < max(tries, 1):
            return Decision(again, 128 + last.signal, last.text, bad)
    failed = [start for start in starts if start.kind is Kind.FAILED]
    text = f"{last.kind.value} at step {last.step}" if last.step >= 0 else last.kind.value
    text += f" ({last.text})" if last.text else ""
    same = [start.source for start in failed[-2:]] == [last.source, last.source]
    if last.kind is Kind.FAILED and same and stale:
        whence = f"step {last.source}" if last.source >= 0 else "the start"
        why = f"the script failed {len(failed)} times, now twice from {whence} without a new step"
    elif stale >= tries:
        why = f"{stale} starts in a row came to no new step"
    else:
        return Decision(True, EXIT_AGAIN, text, bad)
    return Decision(False, EXIT_FAILED, f"{text}; not started again: {why}", bad)


def _stale(starts: Sequence[Start], preempted: Collection[int]) -> int:
    """How many of the last starts in a row came to nothing: neither further than all before, nor
    to a later step on storage, for what others had come to since may be lost. Of a plain script
    that is warned nothing is known."""
    best = stored = -1
    stale = 0
    for n, start in enumerate(starts):
        kept = max((r.step for r in start.records if r.stopped), default=-1)
        warned = start.signal == SIGUSR1 and not all(r.plain for r in start.records)
        asked = start.kind is Kind.STOPPED and (not warned or n in preempted)
        stale = 0 if start.step > best or kept > max(stored, start.source) else stale + (not asked)
        best, stored = max(best, start.step), max(stored, start.source, kept)
    return stale
