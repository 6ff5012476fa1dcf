"""Whether low-rank adapters go with a run and with its model, from the configuration and the headers of the weight files alone."""

from __future__ import annotations

from pathlib import Path

from onlinerl import weight_files
from onlinerl.config import RunConfig
from onlinerl.errors import ConfigError
from onlinerl.protocols.adapters import ALL_LINEAR, LoraConfig
from onlinerl.protocols.algorithm import Algorithm


def check_lora(config: RunConfig, algorithm: Algorithm) -> list[str]:
    """Refuse adapters where they would do nothing or something else; say what dropout means where that is not obvious.

    Raises:
        ConfigError: naming the field, the cause and the fix.
    """
    lora, field = config.learner.lora, "learner.lora"
    if lora is None:
        return []
    if not config.learner.adapts:
        raise ConfigError(
            f"is on, and the learner {config.learner.name!r} trains all weights",
            field=field,
            fix="set learner.name to deepspeed or torch, or leave it out",
        )
    if config.training.online_merging is not None:
        raise ConfigError(
            "is on, and what is merged with the change of supervised fine-tuning would have to be an adapter of the same rank, which it is not",
            field="training.online_merging",
            fix="leave it out, or train all weights (learner.lora=null)",
        )
    if config.reference.schedule == "ema":
        raise ConfigError(
            "is ema, and an average of iterates is no adapter of the same rank: it would need a second model in memory, which adapters save",
            field="reference.schedule",
            fix="set it to fixed, previous or every_n, or train all weights (learner.lora=null)",
        )
    if lora.dropout and (algorithm.needs.old_logprobs or config.training.target_kl is not None):
        return [
            f"learner.lora.dropout={lora.dropout:g}: ratios and KL to the weights that training starts from are those of a policy in which "
            "inputs are dropped, so they are not 1 and 0 at the first step either"
        ]
    return []


def adapter_parameters(lora: LoraConfig, model: Path) -> float | None:
    """How many parameters the adapters of a model have; None if its layers have names that are not known here, which the learner knows.

    Args:
        lora: how they are configured.
        model: its directory.

    Raises:
        ConfigError: if `target_modules` names what is no linear layer of the model, or experts, or the rank is above that of a layer.
    """
    linear, field = weight_files.matrices(weight_files.shapes(model)), "learner.lora.target_modules"
    if not linear:
        return None
    found: dict[str, tuple[int, int]] = {}
    for target in [""] if lora.target_modules == ALL_LINEAR else lora.target_modules:
        chosen = {name: shape for name, shape in linear.items() if not target or f".{name}".endswith(f".{target}")}
        leaves = sorted({name.rpartition(".")[2] for name in linear if ".experts." not in name})
        if not chosen:
            raise ConfigError(
                f"{target} is no linear layer that an adapter can stand beside",
                field=field,
                fix=f"the model has {', '.join(leaves)}",
            )
        if any(".experts." in name for name in chosen):
            attention = [name for name in leaves if name.endswith("_proj") and name[0] in "qkvo"] or leaves
            raise ConfigError(
                f"{target or ALL_LINEAR} takes in the experts, whose weights are one tensor for all of them: peft has no layer to put an "
                "adapter beside",
                field=field,
                fix=f"name other layers, e.g. [{', '.join(attention)}]",
            )
        found |= chosen
    small = min(found, key=lambda name: min(found[name]))
    if lora.rank > min(found[small]):
        raise ConfigError(
            f"is {lora.rank}, and {small} has the rank {min(found[small])} at most: a larger adapter says nothing more",
            field="learner.lora.rank",
            fix=f"lower it to {min(found[small])} or less, or leave the layer out of learner.lora.target_modules",
        )
    return float(lora.rank * sum(rows + columns for rows, columns in found.values()))
