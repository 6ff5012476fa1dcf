"""What must be known about a model family before its log-probs can be computed from its hidden states. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onlinerl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LogitRule:
    """What a family does to its logits after the output matrix and its bias: x -> cap * tanh(scale * x / cap)."""

    scale: float = 1.0
    cap: float | None = None
    """None caps nothing."""


# By `model_type`: the key that says by how much, and whether it multiplies. The same key does not mean the same everywhere.
_MULTIPLIED = {"cohere": "logit_scale", "cohere2": "logit_scale", "hyperclovax": "logits_scaling"}
_DIVIDED = {
    "granite": "logits_scaling",
    "granitemoe": "logits_scaling",
    "granitemoeshared": "logits_scaling",
    "granitemoehybrid": "logits_scaling",
}
_CAPPED = {
    "gemma2": "final_logit_softcapping",
    "gemma3_text": "final_logit_softcapping",
    "vaultgemma": "final_logit_softcapping",
    "nanochat": "final_logit_softcapping",
}

# In a family that is not listed above, any of these means that its logits are not what its output matrix gives.
_KEYS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "lm_head_multiplier",
    "unpadded_vocab_size",
)


def logit_rule(config: Mapping[str, Any]) -> LogitRule:
    """What the family of a model does to its logits.

    Args:
        config: of the model, as `config.json` has it, defaults filled in.

    Raises:
        ConfigError: if it rescales them in a way that is not known here.
    """
    family = str(config.get("model_type"))
    nested = config.get("text_config")
    texts = [config, nested] if isinstance(nested, Mapping) else [config]
    known = _MULTIPLIED.get(family) or _DIVIDED.get(family) or _CAPPED.get(family)
    for text in texts:
        strange = [key for key in _KEYS if key != known and text.get(key) not in (None, 1, 1.0)]
        if strange:
            raise ConfigError(
                f"models of the family {family!r} rescale their logits ({strange[0]}) in a way that the learner does not know",
                field="model",
                fix="use a model of another family",
            )
    value = None if known is None else config.get(known)
    if value is None:
        return LogitRule()
    if family in _CAPPED:
        return LogitRule(cap=float(value))
    return LogitRule(scale=float(value) if family in _MULTIPLIED else 1.0 / float(value))


ROUTED = frozenset(["granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"])
"""By `model_type`: mixtures of experts of which a test has shown that the auxiliary loss of their routers is that of transformers."""


def check_experts(config: Mapping[str, Any]) -> None:
    """Refuse an auxiliary loss of routers where there are none, or where another one is not known to be theirs.

    Args:
        config: of the model.

    Raises:
        ConfigError: if the family is none of `ROUTED`.
    """
    family = str(config.get("model_type"))
    if family not in ROUTED:
        raise ConfigError(
            f"models of the family {family!r} have no routers, or none whose auxiliary loss is known here",
            field="training.aux_loss_coef",
            fix=f"leave it out, or use a mixture of experts of the families {', '.join(sorted(ROUTED))}",
        )


def check_attention(config: Mapping[str, Any], attention: str) -> None:
    """Refuse an implementation of attention that would leave out a part of the model.

    Args:
        config: of the model.
        attention: `learner.attn_implementation`.

    Raises:
        ConfigError: if the model caps its attention scores, and this implementation does not.
    """
    if config.get("attn_logit_softcapping") is not None and attention == "sdpa":
        raise ConfigError(
            "sdpa leaves out the cap on attention scores that this model was trained with (attn_logit_softcapping)",
            field="learner.attn_implementation",
            fix="set learner.attn_implementation=eager, or flash_attention_2 on GPUs",
        )


PACKED = frozenset(
    [
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "granite",
        "granitemoe",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "hyperclovax",
        "llama",
        "mistral",
        "mixtral",
        "nanochat",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "starcoder2",
        "vaultgemma",
    ]
)
"""By `model_type`: families of which a test has shown that sequences in one row are computed as if each were alone, with every implementation
of attention. In others something gets across, and most of them say nothing: a state (Mamba, linear attention, convolutions), biases by
the distance in the row (ALiBi), or attention that is not told where a sequence begins."""
_ATTENTION = {"full_attention", "sliding_attention"}


def check_packing(config: Mapping[str, Any]) -> None:
    """Refuse to lay the sequences of a model's batch one after the other in a row, where that is not known to be exact.

    Args:
        config: of the model, as `config.json` has it, defaults filled in.

    Raises:
        ConfigError: if the family is none of `PACKED`, or the model has layers of another kind.
    """
    family = str(config.get("model_type"))
    fix = "leave learner.padding_free off: micro-batches are sorted by length, so that little of them is padding"
    if strange := sorted(set(config.get("layer_types") or ()) - _ATTENTION):
        raise ConfigError(
            f"layers of the kind {strange[0]!r} carry something from one sequence of a row into the next",
            field="learner.padding_free",
            fix=fix,
        )
    if family not in PACKED:
        raise ConfigError(
            f"it is not known of the family {family!r} that sequences in one row do not see each other",
            field="learner.padding_free",
            fix=fix,
        )
