"""RAFT: "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from onlinerl.algorithms._imitation import Imitation
from onlinerl.ops.items import judged_sequences, sample_items
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.protocols.needs import Needs
from onlinerl.protocols.reported import Reported
from onlinerl.types.seeds import derive_seed
from onlinerl.types.training import TrainItem, TrainSequence

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Pair


class Raft(Imitation):
    """Supervised learning on the best responses to each prompt, all with the same weight, and perhaps on stored answers beside them: on its own
    responses alone a policy ends at the one that the reward likes best."""

    metrics = (
        *Imitation.metrics,
        Reported("real_data", "Share of what is trained that are stored answers", "ratio", "iteration"),
    )

    keep: int | None = Field(1, ge=1)
    """How many of the best are kept, equal ones counted once; None keeps all that reach the `threshold`."""
    threshold: float | None = None
    """Lowest score of a response that is kept, in units of the oracle's score (win rates, if it gives none); None accepts any."""

    real_data_frac: float = Field(0.0, ge=0, le=0.5)
    """Share of what is trained that are stored answers (`reference_answer`) to prompts of which a response is kept, at most one to each prompt; by
    chance which."""

    @field_validator("real_data_frac")
    @classmethod
    def _is_reached(cls, share: float, info: ValidationInfo) -> float:
        most = 1.0 / (1.0 + (info.data.get("keep") or 1))
        if share > most:
            raise ValueError(
                f"a prompt has one stored answer beside {info.data['keep']} kept responses: the share is at most {most:.3g}"
            )
        return share

    @by_knobs
    def needs(self) -> Needs:
        """Several responses, because the best of one says nothing; stored answers, if they have a share."""
        return Needs(min_samples=2, off_policy="valid", answers=self.real_data_frac > 0)

    def most_items(self, samples: int, pairs: int) -> int:
        """Those that are kept, and the stored answer."""
        return (samples if self.keep is None else min(self.keep, samples)) + (self.real_data_frac > 0)

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The kept responses, the best first; of equal scores the first; then the stored answer. Also left out: `identical`, and `not_kept`."""
        sequences, dropped = judged_sequences(judged, at_least=self.needs.min_samples)
        good = [s for s in sequences if self.threshold is None or s.score >= self.threshold]
        distinct: dict[tuple[int, ...], TrainSequence] = {}
        for sequence in sorted(good, key=lambda s: -s.score):  # stable
            distinct.setdefault(tuple(sequence.response_ids), sequence)
        kept = list(distinct.values())[: self.keep]
        identical = len(good) - len(distinct)
        left_out = Counter(identical=identical, not_kept=len(sequences) - identical - len(kept))
        answer = tuple(judged.group.prompt.answer_ids)
        if self.real_data_frac and kept and all(tuple(s.response_ids) != answer for s in kept):
            asked = judged.group.prompt.token_ids
            stored = TrainSequence(prompt_ids=asked, response_ids=answer, win_rate=1.0, policy_version=None, source="teacher")
            kept = [*kept, stored]
        return sample_items(judged, kept), dropped + left_out

    def select(self, items: Sequence[TrainItem]) -> tuple[Sequence[int], Mapping[str, int]]:
        """All responses, and as many stored answers as make their share; left out: `real_data`."""
        stored = [place for place, item in enumerate(items) if _is_stored(item)]
        most = int(self.real_data_frac / (1.0 - self.real_data_frac) * (len(items) - len(stored)) + 1e-9)
        drawn = sorted(stored, key=lambda place: derive_seed("real data", items[place].iteration, items[place].prompt_id))
        others = set(drawn[most:])
        return [place for place in range(len(items)) if place not in others], +Counter(real_data=len(others))

    def figures(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """The share of stored answers, if they have one."""
        return {"real_data": float(np.mean([_is_stored(item) for item in items]))} if items and self.real_data_frac else {}


def _is_stored(item: TrainItem) -> bool:
    return item.sequences[0].source == "teacher"
