"""SPIN: "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models"."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from onlinerl.loss import LossOutput
from onlinerl.ops.items import judged_sequences
from onlinerl.ops.likelihood import with_nll
from onlinerl.ops.margins import logistic, margin
from onlinerl.ops.preference import pair_metrics
from onlinerl.protocols.algorithm import Algorithm, by_knobs
from onlinerl.protocols.needs import Needs
from onlinerl.types.training import TrainItem, TrainSequence

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair


class Spin(Algorithm):
    """-log sigmoid(beta (D_w - D_l)), w the stored answer to the prompt (`reference_answer`), l each response of the policy itself: `dpo`
    without labels, against the policy of the iteration's start.

    The oracle is asked all the same, and its figures are shown, but the loss reads nothing of them. A response that it did not judge is
    left out here, as it is by every algorithm: what is trained on is then what the figures of the iteration are about.
    """

    unit = "pair"
    needs = Needs(reference=True, answers=True, labels=False, off_policy="approximate")
    reference = "previous"

    beta: float = Field(0.1, gt=0)
    """Small lets the policy go far from the iterate before it."""
    nll_coef: float = Field(0.0, ge=0)
    """Weight of the negative log-prob per token of the stored answer."""

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """log 2, unless the likelihood is added."""
        return None if self.nll_coef else math.log(2)

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """A pair of the answer and each judged response, unless the two are the same tokens.

        Raises:
            ValueError: if the prompt carries no answer.
        """
        prompt = judged.group.prompt
        if not prompt.answer_ids:
            raise ValueError(f"prompt {prompt.id!r} carries no answer_ids; declare `answers` in the algorithm's `needs`")
        answer = TrainSequence(prompt_ids=prompt.token_ids, response_ids=prompt.answer_ids, policy_version=None)
        sequences, dropped = judged_sequences(judged)
        others = [s for s in sequences if tuple(s.response_ids) != prompt.answer_ids]
        dropped += Counter(identical=len(sequences) - len(others))
        return [TrainItem(prompt_id=prompt.id, sequences=(answer, s)) for s in others], +dropped

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over pairs.

        Raises:
            ValueError: if reference log-probs are missing.
        """
        z_P = self.beta * margin(outputs, batch)
        metrics = pair_metrics(outputs, batch, z_P)
        loss = LossOutput(total=(logistic(z_P, 1.0) * batch.weight_P).sum(), metrics=metrics)
        return with_nll(loss, outputs, batch, self.nll_coef, batch.pairs_P2[:, 0], batch.weight_P)
