"""Keeps wrong gradients out of the state: has leaves computed again, and acts on the verdict.

`poison` judges; this is what a rank does about it. A leaf that is to be computed again is one more
duty of the script's loop over batches. Nothing of a step is committed before its verdict is clear.
The guilty rank leaves: its agent ends the process and does not fill its place again, and the others
go on in the next generation with the leaves they have. Where that would lose state, and where the
operator wants no eviction, only its leaves of this step are given to others.

What is looked at is the gradient of a leaf, before it leaves the rank that computed it: a fault in
a sum or in the optimizer is not found here.
"""

from collections.abc import Collection, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from torch import Tensor, linalg

from outlast.checkpoint.memory import checksum
from outlast.cluster.errors import Diverged, GenerationChanged
from outlast.runtime.leaf_tree import covered
from outlast.runtime.poison import Testimony, Verdict, judge

if TYPE_CHECKING:
    from outlast.runtime.training import Training


class Jury:
    """One rank's part in judging the steps of `training`."""

    def __init__(self, training: "Training") -> None:
        self._training = training
        self.duties: list[int] = []  # leaves to be computed again here, beside our own
        self._without: frozenset[int] = frozenset()  # ranks found guilty in the step in flight

    def deal(self, without: Collection[int]) -> None:
        """The leaves of the step in flight were dealt to all ranks but some: every so many steps
        one is checked by a second rank, the one with the least to do."""
        training, self.duties, self._without = self._training, [], frozenset(without)
        leaf, weights = self._checked(), training.membership.weights
        mine = training.membership.generation.communicator.rank
        if leaf is None:
            return
        load = {
            rank: (len(covered(nodes)) + 1) / weights[rank]
            for rank, nodes in enumerate(training.nodes)
            if rank in self._witnesses() and leaf not in covered(nodes)
        }
        turn = training.committed // training.settings.spot_check
        first = min(load, key=lambda r: (load[r], (r - turn) % len(weights)), default=None)
        if mine == first and leaf not in training.stack.found:
            self.duties = [leaf]

    def _witnesses(self) -> list[int]:
        """Ranks that may be asked to compute a leaf."""
        weights = enumerate(self._training.membership.weights)
        return [rank for rank, weight in weights if weight > 0 and rank not in self._without]

    def _checked(self) -> int | None:
        """The leaf of the step in flight that two ranks compute, by turns."""
        settings, step = self._training.settings, self._training.committed
        if not settings.spot_check or step % settings.spot_check:
            return None
        return step // settings.spot_check % settings.leaves

    def testify(self, leaf: int, gradient: Tensor) -> None:
        """Note what this rank has found for a leaf: float32 [numel]."""
        digest = None
        if leaf in self.duties or leaf == self._checked():
            digest = checksum(gradient.detach().cpu().numpy())
        self._training.stack.found[leaf] = (float(linalg.vector_norm(gradient)), digest)

    def clear(self, heads: Sequence[dict[str, Any]], norm: float) -> bool:
        """Whether the step may be committed; if not, there are leaves to compute first.

        Args:
            heads: what each rank said with its gradient, in rank order.
            norm: of the whole gradient.
        Raises:
            Diverged: the leaves themselves are not finite, or it cannot be found out who is wrong.
            GenerationChanged: the guilty rank leaves, and the others go on without it.
        """
        training = self._training
        found = [
            Testimony(rank, *fields) for rank, head in enumerate(heads) for fields in head["found"]
        ]
        verdict = judge(found, self._witnesses())
        self.duties = []
        if verdict.guilty:
            self._act(verdict.guilty)
            return False
        rank = training.membership.generation.communicator.rank
        if verdict.diverged or verdict.undecided or not (verdict.again or isfinite(norm)):
            if rank == 0:
                training.link.send(kind="event", event="diverged", step=training.committed)
            raise Diverged(self._refusal(verdict, found))
        self.duties = [leaf for leaf, witness in verdict.again if witness == rank]
        return not verdict.again

    def _act(self, guilty: Sequence[Testimony]) -> None:
        """Every rank does the same, only one speaks: the first that is innocent."""
        training = self._training
        generation, nodes = training.membership.generation, training.membership.generation.nodes
        rank, ranks = generation.communicator.rank, {testimony.rank for testimony in guilty}
        out = min(ranks)  # one at a time: the redundancy is whole again before the next
        evict = training.link.identity.evict_poison and self._can_spare(out)
        if rank == next((r for r in range(len(nodes)) if r not in ranks), 0):
            for found in [f for f in guilty if not evict or f.rank == out]:
                training.link.send(
                    kind="event", event="poisoned", step=training.committed, rank=found.rank,
                    peer_node=nodes[found.rank][1], leaf=found.leaf, how=found.how,
                    action="evicted" if evict else "replaced",
                )  # fmt: skip
            if evict:
                number = generation.view.generation
                training.link.send(kind="condemn", holder=nodes[out][0], generation=number)
        if evict:
            raise GenerationChanged(f"rank {out} computes wrong gradients and has to leave")
        # Whatever has a wrong gradient in it is dropped; others compute those leaves.
        wrong = {r: {found.leaf for found in guilty if found.rank == r} for r in ranks}
        for leaf in wrong.get(rank, ()):
            training.stack.forget(leaf)
        kept = {
            r: tuple(node for node in held if not covered([node]) & wrong.get(r, set()))
            for r, held in enumerate(training.nodes)
        }
        training.deal_leaves(kept, self._without | ranks)

    def _can_spare(self, rank: int) -> bool:
        """Whether the state survives the loss of this rank; a sibling can read its memory."""
        training = self._training
        agents = [member.agent for member, _ in training.membership.generation.view.workers]
        safe = training.ladder.replicated or training.settings.parity
        return len(agents) > 1 and bool(safe or agents.count(agents[rank]) > 1)

    def _refusal(self, verdict: Verdict, found: Sequence[Testimony]) -> str:
        about = f"step {self._training.committed}: every leaf is finite, but their sum is not"
        advice = "lower the learning rate or the loss scale, clip, or look at the samples"
        for leaf in (*verdict.diverged, *verdict.undecided)[:1]:
            ranks = ", ".join(str(t.rank) for t in found if t.leaf == leaf)
            about = f"step {self._training.committed}, leaf {leaf}: "
            if leaf in verdict.diverged:
                about += f"the gradient is not finite on every rank that computed it ({ranks})"
            else:
                about += f"ranks {ranks} find different gradients, and no other rank can be asked"
                advice = "test these machines; with 3 ranks the wrong one is found"
        return f"{about}. Nothing of this step was committed. What to do: {advice}"
