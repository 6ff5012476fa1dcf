"""Steps behind a prefix that responses share: where they part, the branch that leads to the best responses against the one that leads to the worst.

Source: "Monte Carlo Tree Search Boosts Reasoning via Iterative Preference Learning" (arXiv 2405.00451), section 3.2, whose tree is searched; here it
is made of the responses to a prompt that begin alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import fsum, nan
from typing import Literal

import numpy as np
from pydantic import Field

from onlinerl.pairing import _candidates
from onlinerl.pairing._candidates import Candidates
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.types import Judged, Pair, Step


class SharedPrefix(PairBuilder):
    """One pair for each place where judged responses part that share at least `min_prefix` tokens. A branch is worth Q, the mean win rate (or score,
    if the oracle only scores) of the responses in it, and the branch with the highest Q is paired with the one with the lowest.

    Trained is the step alone, from the first token in which the two differ to where the responses of the branch part again, or to the end of a
    single one. Tokens before are context, and what comes behind a step is no part of its label. A response that ends where others go on has no step
    there. Uncertainty is that of one response of each branch, the best of the better one and the worst of the other.
    """

    min_prefix: int = Field(1, ge=0)
    """In tokens, those included that responses were made to begin with. 0 also pairs by the first token."""
    choose: Literal["worst", "second"] = "worst"
    """The branch that the best one is paired with. `second` makes harder pairs."""
    prob: Literal["verdict", "leaf_counts"] = "verdict"
    """P(chosen beats rejected), for losses that read it: the mean over all pairs of responses of the two branches, or N_w / (N_w + N_l), N the number
    of responses in a branch, as the paper has it of visits. `tie_within` is about the former."""
    min_gap: float = Field(0.0, ge=0)
    """The gap between the two Q must exceed this; in win rate (0 to 1), or in the oracle's score."""

    def most(self, samples: int) -> int:
        """A tree with so many leaves parts so often."""
        return samples - 1

    @property
    def soft(self) -> str | None:
        """Counts may be equal."""
        return "prob" if self.prob == "leaf_counts" else super().soft

    def is_near_tie(self, judged: Judged, pair: Pair) -> bool:
        """Counts say nothing of what the oracle finds."""
        return self.prob == "verdict" and super().is_near_tie(judged, pair)

    def build(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """Pairs, those of the shortest prefix first, and how many were dropped for which reason (see BestWorst); `no_prefix` if no two responses
        share one and go on differently."""
        candidates = _candidates.by_preference(judged)
        if reason := candidates.none():
            return [], reason
        rollouts = judged.group.rollouts
        tokens = {i: np.asarray([*rollouts[i].prefix_ids, *rollouts[i].token_ids], dtype=np.int64) for i in candidates.order}
        pairs: list[Pair] = []
        dropped: Counter[str] = Counter()
        for steps in _partings(tokens):
            if len(steps) < 2 or steps[0].start < self.min_prefix:
                continue
            made, reasons = self._pair(candidates, steps)
            pairs += made
            dropped += reasons
        if not pairs and not dropped:
            dropped["no_prefix"] = 1
        pairs.sort(key=lambda pair: pair.steps[0].start if pair.steps else 0)  # stable
        return pairs, dropped

    def _pair(self, candidates: Candidates, steps: Sequence[Step]) -> tuple[list[Pair], Counter[str]]:
        """Of one place."""
        branches = _as_candidates(candidates, steps)
        worse = branches.order[1 if self.choose == "second" else -1]
        pairs, dropped = _candidates.select(branches, [(branches.order[0], worse)], self.min_gap, ties=self.ties)
        return [self._of_leaves(pair, steps[pair.chosen], steps[pair.rejected]) for pair in pairs], dropped

    def _of_leaves(self, pair: Pair, better: Step, worse: Step) -> Pair:
        """A pair of branches as one of responses: leaves are in the order of the ranking."""
        counts = len(better.leaves), len(worse.leaves)
        prob = pair.prob if self.prob == "verdict" else counts[0] / sum(counts)
        return replace(pair, chosen=better.leaves[0], rejected=worse.leaves[-1], prob=prob, steps=(better, worse))


def _as_candidates(candidates: Candidates, steps: Sequence[Step]) -> Candidates:
    """The branches of one place, compared as responses are. Of equals the one with the lower token comes first."""
    leaves = [list(step.leaves) for step in steps]
    # Rounded, as win rates are: a tie must stay a tie, whatever numbers the means are of.
    quality = np.array([round(_mean(candidates.quality[some]), 9) for some in leaves])
    matrix = np.array([[_mean(candidates.matrix[np.ix_(ours, theirs)]) for theirs in leaves] for ours in leaves])
    order = sorted(range(len(steps)), key=lambda i: -quality[i])
    return Candidates(order=tuple(order), distinct=len(steps), quality=quality, matrix=matrix)


def _mean(values: np.ndarray) -> float:
    """Of what is known, the same in whatever order; NaN if nothing is."""
    known = values[~np.isnan(values)].tolist()
    return fsum(known) / len(known) if known else nan


def _partings(tokens: Mapping[int, np.ndarray]) -> Iterator[list[Step]]:
    """What follows each prefix behind which responses differ or end: the steps by their first tokens, lower ones first."""
    waiting = [list(tokens)]
    while waiting:
        together = waiting.pop()
        shared = _shared([tokens[i] for i in together])
        branches: dict[int, list[int]] = defaultdict(list)
        for i in together:
            if len(tokens[i]) > shared:
                branches[int(tokens[i][shared])].append(i)
        some = [branches[first] for first in sorted(branches)]
        yield [Step(start=shared, end=_shared([tokens[i] for i in each]), leaves=tuple(each)) for each in some]
        waiting += [each for each in reversed(some) if len(each) > 1]


def _shared(responses: Sequence[np.ndarray]) -> int:
    """With how many equal tokens all of them begin; the length of a single one."""
    first, *others = responses
    length = min(map(len, responses))
    for other in others:
        differs = first[:length] != other[:length]
        length = int(differs.argmax()) if differs.any() else length
    return length
