"""Sampling from the geometric mixture of two models, token by token, by a learner that holds both. Axes: B rows, L positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from onlinerl.types import Draw, Drawn, Sampling

if TYPE_CHECKING:  # policies are told of steps
    from onlinerl.learners._policy import Policy
    from onlinerl.learners._reward import RewardNetwork


class Step(NamedTuple):
    """What a model is given to say its next logits."""

    tokens_BL: Tensor
    """int64: the prompts, padded on the left, or the token that each row has got."""
    mask_BL: Tensor
    """int64, 1 on tokens: of everything so far."""
    positions_BL: Tensor
    """int64, of `tokens_BL`."""
    cache: Any
    """Keys and values of everything before; the model adds to it."""


NextLogits = Callable[[Step], Tensor]
"""fp32 [B, V] after the last token of each row, divided by the temperature."""


@torch.no_grad()
def sample(
    policy: NextLogits,
    reference: NextLogits | None,
    draws: Sequence[Draw],
    sampling: Sampling,
    *,
    weight: float,
    ends: Collection[int],
    device: torch.device,
    any_rank: Callable[[bool], bool] = lambda own: own,
) -> list[Drawn]:
    """A response to each prompt, drawn from softmax((1 - weight) policy + weight reference) at each position.

    "Nash Learning from Human Feedback" (arXiv 2312.00886), section 7: the mixture is of logits per token, which approximates that of whole
    responses. Each row has a generator of its own, so a response depends on its seed, and on other rows only through rounding.

    Args:
        policy, reference: what the models say; None: the reference is the policy.
        draws: prompts and seeds.
        sampling: temperature, which the logits are divided by already, and longest response. Nothing is truncated.
        weight: of the reference.
        ends: tokens after which a response ends.
        device: of the models.
        any_rank: whether something is so on any rank: all take the same number of steps, as collective operations demand.
    """
    from transformers import DynamicCache

    prompts = [draw.prompt_ids for draw in draws] or [(0,)]
    width, rows = max(map(len, prompts)), len(prompts)
    tokens_BL = torch.tensor([[*[0] * (width - len(p)), *p] for p in prompts], device=device)
    mask_BL = torch.tensor([[*[0] * (width - len(p)), *[1] * len(p)] for p in prompts], device=device)
    positions_BL = (mask_BL.cumsum(dim=1) - 1).clamp(min=0)
    caches = [DynamicCache(), DynamicCache()]
    generators = [np.random.default_rng(draw.seed) for draw in draws]
    made: list[list[int]] = [[] for _ in range(rows)]
    logprobs: list[list[float]] = [[] for _ in range(rows)]
    going = [bool(draws)] * rows
    last = torch.tensor([len(p) - 1 for p in prompts], device=device)
    for _ in range(sampling.max_new_tokens):
        if not any_rank(any(going)):
            break
        logits_BV = policy(Step(tokens_BL, mask_BL, positions_BL, caches[0]))
        if reference is not None:
            logits_BV = (1.0 - weight) * logits_BV + weight * reference(Step(tokens_BL, mask_BL, positions_BL, caches[1]))
        log_BV = torch.log_softmax(logits_BV.double(), dim=-1)
        uniform = torch.tensor([g.random() for g in generators] or [0.0], dtype=torch.float64, device=device)
        cumulated_BV = log_BV.exp().cumsum(dim=-1)
        chosen = torch.searchsorted(cumulated_BV, (uniform * cumulated_BV[:, -1])[:, None], right=True)
        chosen = chosen.clamp(max=log_BV.shape[-1] - 1)
        said = log_BV.gather(1, chosen)
        for row, (token, logprob) in enumerate(zip(chosen[:, 0].tolist(), said[:, 0].tolist(), strict=True)):
            if going[row]:
                made[row].append(token)
                logprobs[row].append(logprob)
                going[row] = token not in ends
        last = last + 1
        tokens_BL, positions_BL = chosen, last[:, None]
        mask_BL = torch.cat([mask_BL, torch.ones_like(chosen)], dim=1)
    return [
        Drawn(token_ids=tuple(ids), logprobs=tuple(said), ended=ids[-1] in ends)
        for ids, said in zip(made[: len(draws)], logprobs, strict=False)
    ]


class MixtureSampling:
    """What a rank of a learner needs in order to draw from its policy and a saved model at once."""

    _policy: Policy | RewardNetwork
    device: torch.device
    world_size: int

    def _as(self, model: str) -> AbstractContextManager[nn.Module]:
        """What a forward pass of "policy" or of a saved model goes through, inside."""
        raise NotImplementedError

    def sample_mixture(
        self, micro: Sequence[Sequence[Draw]], sampling: Sampling, reference: str, weight: float, ends: Sequence[int]
    ) -> list[list[Drawn]]:
        """See `Learner.sample_mixture`. Collective; every rank takes as many steps as the one that takes most."""

        def of(model: str) -> NextLogits:
            def said(step: Step) -> Tensor:
                with self._as(model) as network:  # one network, where the two differ in their adapters only
                    logits_BV: Tensor = network(None, temperature=sampling.temperature, step=step)
                return logits_BV

            return said

        other = None if reference == "policy" else of(reference)
        named: Any = self._policy.model.generation_config.eos_token_id
        stops = {*ends, *(named if isinstance(named, list) else [] if named is None else [named])}
        drawn = partial(sample, of("policy"), other, weight=weight, ends=stops, device=self.device)
        return [drawn(draws, sampling, any_rank=self._anywhere) for draws in micro]

    def _anywhere(self, own: bool) -> bool:
        if self.world_size == 1:
            return own
        said = [own] * self.world_size
        dist.all_gather_object(said, own)
        return any(said)
