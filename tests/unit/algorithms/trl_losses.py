"""TRL's loss functions called on given log-probs: an independent implementation to agree with.

TRL computes losses in methods of its trainers. They are called here on a stand-in that has only what the method reads, so that no
model, tokenizer or dataset takes part and any difference is one of the loss.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from algorithm_batches import evaluate, pair, sequence
from torch import Tensor
from torch.nn.functional import pad

from onlinerl.protocols.algorithm import Algorithm


def dpo_loss(
    logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    **mix: float,
) -> Tensor:
    """Mean over pairs. Rows: all chosen responses, then all rejected ones. `mix`: TRL's loss types and their weights."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is not installed").DPOTrainer
    mix = mix or {"sigmoid": 1.0}
    pad = torch.zeros_like(mask_BT[:, :1])  # TRL shifts by one: the first position predicts nothing
    logprobs, reference = logprobs_BT.masked_fill(~mask_BT, 0.0), reference_logprobs_BT.masked_fill(~mask_BT, 0.0)
    chosen, rejected = reference.sum(dim=1).chunk(2)
    outputs = SimpleNamespace(log_probs=logprobs, entropy=logprobs, mean_logits=logprobs, is_top1=mask_BT)
    inputs = {
        "input_ids": torch.zeros(mask_BT.shape[0], mask_BT.shape[1] + 1, dtype=torch.int64),
        "attention_mask": torch.cat([~pad, mask_BT], dim=1).long(),
        "completion_mask": torch.cat([pad, mask_BT], dim=1).long(),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(mix),
        loss_weights=list(mix.values()),
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    return trainer._compute_loss(stand_in, lambda **_: outputs, inputs, return_outputs=False)


LENGTHS = [(4, 2), (1, 6), (3, 3)]


def assert_agrees(algorithm: Algorithm, theirs: Callable[[Tensor, Tensor, Tensor], Tensor], count: int = len(LENGTHS)) -> None:
    """Value and gradient of a loss on `count` random pairs are those of theirs(logprobs_BT, reference_logprobs_BT, mask_BT), whose rows
    are all chosen responses and then all rejected ones."""
    torch.manual_seed(0)
    items = [
        pair(sequence(w, reference_logprobs=-torch.rand(w)), sequence(n, 50, reference_logprobs=-torch.rand(n)))
        for w, n in LENGTHS[:count]
    ]
    rows = [-torch.rand(n, dtype=torch.float64) * 2 for lengths in LENGTHS[:count] for n in lengths]
    loss, gradient, _, batch = evaluate(algorithm, items, rows)
    order = torch.cat([batch.pairs_P2[:, 0], batch.pairs_P2[:, 1]])
    logprobs = torch.zeros(batch.mask_BT.shape, dtype=torch.float64)
    for row, tokens in enumerate(rows):
        logprobs[row, : len(tokens)] = tokens
    logprobs.requires_grad_()
    expected = theirs(logprobs[order], batch.reference_logprobs_BT[order].double(), batch.mask_BT[order])
    assert loss == pytest.approx(expected.item(), rel=1e-7)  # labels are fp32
    assert torch.allclose(gradient, torch.autograd.grad(expected, logprobs)[0], rtol=1e-6, atol=1e-8)


def assert_agrees_with_dpo(
    algorithm: Algorithm, mix: dict[str, float], count: int = len(LENGTHS), *, beta: float, label_smoothing: float = 0.0
) -> None:
    """It is a mix of TRL's loss types."""

    def theirs(*arrays: Tensor) -> Tensor:
        return dpo_loss(*arrays, beta=beta, label_smoothing=label_smoothing, **mix)

    assert_agrees(algorithm, theirs, count)


def cpo_loss(logprobs_BT: Tensor, mask_BT: Tensor, *, beta: float, gamma: float | None = None) -> Tensor:
    """Mean over pairs, rows as above, of CPO without its likelihood term; with `gamma` of SimPO."""
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="trl is not installed").CPOTrainer
    sums = logprobs_BT.masked_fill(~mask_BT, 0.0).sum(dim=1)
    kind = {"loss_type": "sigmoid"} if gamma is None else {"loss_type": "simpo", "simpo_gamma": gamma}
    stand_in = SimpleNamespace(
        alpha=0.0, accelerator=SimpleNamespace(device="cpu"), beta=beta, label_smoothing=0.0, simpo_gamma=0.0
    )
    vars(stand_in).update(kind)
    return trainer.cpo_loss(stand_in, *(sums if gamma is None else sums / mask_BT.sum(dim=1)).chunk(2))[0].mean()


def odds_ratio_loss(logprobs_BT: Tensor, mask_BT: Tensor, *, lam: float) -> Tensor:
    """Mean over pairs, rows as above, of ORPO without its likelihood term."""
    trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="trl is not installed").ORPOTrainer
    means = logprobs_BT.masked_fill(~mask_BT, 0.0).sum(dim=1) / mask_BT.sum(dim=1)
    stand_in = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=lam)
    return -trainer.odds_ratio_loss(stand_in, *means.chunk(2))[0].mean()  # what TRL calls losses is subtracted there


def spelled_out(logprobs_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of two tokens that give these log-probs to the first one, and a batch of prompts of one token whose responses are made of it."""
    logprobs = logprobs_BT.masked_fill(~mask_BT, -1.0)
    logits = torch.stack([logprobs, torch.log(-torch.expm1(logprobs))], dim=-1)
    attended = torch.cat([torch.ones_like(mask_BT[:, :1]), mask_BT], dim=1)
    batch = {
        "concatenated_input_ids": torch.zeros(attended.shape, dtype=torch.int64),
        "concatenated_attention_mask": attended.long(),
        "concatenated_labels": torch.where(torch.cat([torch.zeros_like(mask_BT[:, :1]), mask_BT], dim=1), 0, -100),
        "chosen_labels": torch.zeros(len(mask_BT) // 2, 1),
    }
    return pad(logits, (0, 0, 0, 1)), batch  # what is said behind the last token predicts nothing


def with_likelihood(trainer: type, logprobs_BT: Tensor, mask_BT: Tensor, **options: object) -> Tensor:
    """The whole loss of TRL's CPO or ORPO trainer over pairs, rows as above, from logits on; its likelihood is the mean over all chosen tokens."""
    logits, batch = spelled_out(logprobs_BT, mask_BT)
    stand_in = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        is_encoder_decoder=False,
        pad_token_id=1,
        padding_value=1,
        aux_loss_enabled=False,
        get_batch_logps=trainer.get_batch_logps,
        concatenated_inputs=lambda batch, **_: batch,
        **options,
    )
    stand_in.concatenated_forward = partial(trainer.concatenated_forward, stand_in)
    for name in ("cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer, name):
            setattr(stand_in, name, partial(getattr(trainer, name), stand_in))
    return trainer.get_batch_loss_metrics(stand_in, lambda *_, **__: SimpleNamespace(logits=logits), batch)[0]


def whole_cpo_loss(logprobs_BT: Tensor, mask_BT: Tensor, *, beta: float, nll_coef: float) -> Tensor:
    """With its likelihood."""
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="trl is not installed").CPOTrainer
    kind = {"loss_type": "sigmoid", "label_smoothing": 0.0, "alpha": 0.0, "simpo_gamma": 0.0}
    return with_likelihood(trainer, logprobs_BT, mask_BT, beta=beta, cpo_alpha=nll_coef, **kind)


def kto_loss(
    logprobs_BT: Tensor, reference_logprobs_BT: Tensor, desirable_B: Tensor, mask_BT: Tensor, **weights: float
) -> Tensor:
    """Mean over responses, whose KL is estimated from these same responses. `weights`: beta, desirable_weight, undesirable_weight."""
    trainer = pytest.importorskip("trl.trainer.kto_trainer", reason="trl is not installed").KTOTrainer
    logprobs, reference = logprobs_BT.masked_fill(~mask_BT, 0.0), reference_logprobs_BT.masked_fill(~mask_BT, 0.0)
    first = torch.ones_like(mask_BT[:, :1])
    ids = torch.zeros(mask_BT.shape[0], mask_BT.shape[1] + 1, dtype=torch.int64)
    completion, attended = torch.cat([~first, mask_BT], dim=1).long(), torch.cat([first, mask_BT], dim=1).long()
    inputs = {
        "label": desirable_B,
        "ref_logps": reference.sum(dim=1),
        "ref_KL_logps": reference.sum(dim=1),
        **{f"{part}input_ids": ids for part in ("", "KL_")},
        **{f"{part}attention_mask": attended for part in ("", "KL_")},
        **{f"{part}completion_mask": completion for part in ("", "KL_")},
    }
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        **weights,
    )
    stand_in._compute_kl_logps = partial(trainer._compute_kl_logps, stand_in)
    outputs = SimpleNamespace(log_probs=logprobs, entropy=logprobs, mean_logits=logprobs)
    return trainer._compute_loss(stand_in, lambda **_: outputs, inputs, return_outputs=False)


def grpo_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    agg: str,
    clip_range_low: float = 0.2,
    clip_range_high: float = 0.2,
    reference_logprobs_BT: Tensor | None = None,
    kl: float = 0.0,
    sampler_weight_BT: Tensor | None = None,
    level: str = "token",
    max_length: int | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """`agg`: seq_mean_token_mean, token_mean, its form in DAPO, or seq_mean_token_sum_norm (over `max_length`). `advantages`: [B], or [B, T]. `level`: whose
    ratio it is, that of a token or of the sequence."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed").GRPOTrainer
    logprobs = logprobs_BT.masked_fill(~mask_BT, 0.0)
    inputs = {
        "prompt_ids": torch.zeros(len(mask_BT), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(mask_BT), 1, dtype=torch.int64),
        "completion_ids": torch.zeros(mask_BT.shape, dtype=torch.int64),
        "completion_mask": mask_BT.long(),
        "advantages": advantages,
        "old_per_token_logps": old_logprobs_BT,
        "ref_per_token_logps": reference_logprobs_BT,
        "importance_sampling_ratio": torch.ones_like(logprobs) if sampler_weight_BT is None else sampler_weight_BT,
        "num_items_in_batch": mask_BT.sum(),
    }
    forms = {"seq_mean_token_mean": "grpo", "token_mean": "bnpo", "dapo": "dapo", "seq_mean_token_sum_norm": "dr_grpo"}
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        args=SimpleNamespace(delta=dual_clip, use_bias_correction_kl=False),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=kl,
        loss_type=forms[agg],
        max_completion_length=max_length,
        epsilon_low=clip_range_low,
        epsilon_high=clip_range_high,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    return trainer._compute_loss(stand_in, None, inputs)


def rloo_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages: Tensor, mask_BT: Tensor, *, clip_range: float = 0.2
) -> Tensor:
    """Mean over responses. `advantages`: [B]; TRL computes them where it samples, which cannot be called alone."""
    trainer = pytest.importorskip("trl.trainer.rloo_trainer", reason="trl is not installed").RLOOTrainer
    logprobs = logprobs_BT.masked_fill(~mask_BT, 0.0)
    inputs = {
        "prompt_ids": torch.zeros(len(mask_BT), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(mask_BT), 1, dtype=torch.int64),
        "completion_ids": torch.zeros(mask_BT.shape, dtype=torch.int64),
        "completion_mask": mask_BT.long(),
        "advantages": advantages,
        "old_logps": old_logprobs_BT.masked_fill(~mask_BT, 0.0).sum(dim=1),
    }
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        aux_loss_enabled=False,
        epsilon_low=clip_range,
        epsilon_high=clip_range,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    return trainer._compute_loss(stand_in, None, inputs)
