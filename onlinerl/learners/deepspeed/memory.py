"""How much memory a learner rank needs at its peak: plain arithmetic, shared by `check` and the benchmark that measures it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onlinerl.learners.deepspeed import DeepSpeed

GIB = 2**30
MIB = 2**20

_BUFFERS = 11
"""Bytes per element of a bucket under ZeRO-3: gathered, reduced, and copied to fp32 for the step."""

PROCESS_BYTES = int(0.4 * GIB)
"""Python, torch, DeepSpeed, transformers and vLLM's transfer classes, before a model is loaded."""

BUCKET = 20_000_000
"""Elements that DeepSpeed reduces, gathers or steps at a time."""


def learner_rank(config: DeepSpeed, parameters: float, *, critic: float = 0, adapters: float | None = None) -> dict[str, float]:
    """Bytes that one rank holds when it holds most, by what they are for. That is while it takes an optimizer step.

    Activations are not in it: they depend on the lengths of prompts and responses, and are bounded by
    `learner.tokens_per_microbatch`. With them gone, an export, a checkpoint and a push of weights add no more than a bucket or the
    largest tensor to what is held anyway. The reference is always in it: it scores what is trained, and measures how far the policy has
    gone. Where it runs beside the policy (`Needs.reference_kl`), ZeRO-3 has its output matrix whole until the micro-batch's backward pass
    is over, which like the activations is before the step.

    Args:
        config: the learner's section.
        parameters: of the model.
        critic: parameters of a second network that is trained beside it.
        adapters: parameters of the adapters of both, which alone are trained; then there is no reference beside the policy, and a second
            adapter for older iterates. None trains all.
    """
    ranks, stage = config.ranks, config.zero_stage
    low = config.dtype == "bfloat16"
    weight = 2 if low else 4
    networks = parameters + critic
    trained = networks if adapters is None else adapters
    share = trained / ranks if stage >= 1 else trained
    cut_up = ranks if stage == 3 else 1
    # The wrapper of stages 1 and 2 keeps master weights in fp32 whatever the dtype of the weights.
    master = 4 if low or stage in (1, 2) else 0
    return {
        "process": PROCESS_BYTES,
        "weights": weight * (networks + (0 if adapters is None else 2 * adapters)) / cut_up,
        "gradients": _gradients(weight, stage, trained, share),
        "optimizer": (8 + master) * share,
        "reference": weight * parameters / cut_up if adapters is None else 0,
        "buffers": _BUFFERS * BUCKET if stage == 3 else 0,
    }


def _gradients(weight: int, stage: int, trained: float, share: float) -> float:
    if stage == 3:
        return weight * share  # kept in one piece, and copied a bucket at a time
    if stage == 0 and weight == 4:
        return weight * share  # nothing is copied
    # When a step has made most of its fp32 copies and not yet freed all that they are copies of. Stage 1 first has them whole.
    return max(5 * share, weight * trained if stage == 1 else 0)
