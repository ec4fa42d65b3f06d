"""S1: the samples of a committed step are those of its number, each once; the log tells each step
once and in order."""

import json
from collections import Counter
from typing import Any

from outlast.runtime.leaf_tree import covered
from outlast.runtime.samples import samples
from sim.script import LEAVES, SAMPLES, SEED
from sim.world import Violation


class ExactlyOnce:
    """Keeps a ledger of who has computed which leaf from which samples."""

    def __init__(self) -> None:
        self._ledger: dict[tuple[int, int, int], list[int]] = {}
        self._said: dict[int, list[tuple[Any, Any]]] = {}  # step -> agents that were told of it

    def logged(self, process: Any, run: Any) -> None:
        """A script has logged a step."""
        agent = process.facts["agent"]
        self._said.setdefault(run.training.committed, []).append((agent, agent.facts["as agent"]))

    def leaf(self, process: Any, stack: Any, leaf: int, *_: object) -> None:
        """A leaf is finished; a leaf of a step begun anew replaces the old one."""
        holder = process.facts["training"].link.identity.holder
        # What was read before is of leaves that were computed only to compare.
        self._ledger[holder, stack.step, leaf] = process.facts.pop("read", [])[-2:]

    def committed(self, process: Any, training: Any) -> None:
        """A step is done on this rank."""
        step = training.committed - 1
        read: Counter[int] = Counter()
        for holder, nodes in zip(training.membership.holders, training.nodes, strict=True):
            for leaf in covered(nodes):
                read.update(self._ledger[holder, step, leaf])
        wanted = Counter(
            sample for leaf in range(LEAVES)
            for sample in samples(SEED, step, leaf, LEAVES, 2, SAMPLES)
        )  # fmt: skip
        if read != wanted:
            raise Violation(f"S1: step {step} is made of {read}, not of {wanted}")

    def finished(self, job: Any) -> None:
        """The job has ended well."""
        lines = (job.log_dir / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        # A step is missing only if nobody who was told of it is left.
        kept = {
            step for step, told in self._said.items()
            if any(agent.code == 0 and agent.facts["as agent"] is one for agent, one in told)
        }  # fmt: skip
        if steps != sorted(set(steps)) or not kept <= set(steps):
            raise Violation(f"S1: the log tells of the steps {steps}, not of all in {kept}")
