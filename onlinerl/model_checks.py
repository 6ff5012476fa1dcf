"""What of a model can be seen from its files to be of no use in a run, before anything is loaded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onlinerl import weight_files
from onlinerl.errors import ConfigError
from onlinerl.families import check_attention, check_packing, logit_rule
from onlinerl.preference_models import objective_of


def check_description(model: Path, attention: str, *, padding_free: bool = False, classifier: bool = False) -> None:
    """Refuse a model that the engine or the learner could not load, or whose log-probs the learner would get wrong.

    Args:
        model: its directory.
        attention: `learner.attn_implementation`.
        padding_free: `learner.padding_free`.
        classifier: whether it is a reward model already, which gives no log-probs.

    Raises:
        ConfigError: naming cause and fix.
    """
    try:
        written = _object(model / "config.json")
    except (OSError, ValueError) as error:
        raise _unreadable(error) from error
    _check_quantization(written)
    _check_remote_code(written)  # before transformers reads the file: it would ask at the terminal
    try:
        described = _described(model).to_dict()  # not the file alone: that may leave out what is a default
    except Exception as error:  # models check their own configurations, each in its way
        raise _unreadable(error) from error
    if not classifier:
        _check_architecture(written)
        logit_rule(described)
    check_attention(described, attention)
    if padding_free:
        check_packing(described)
    _check_generation(model)


def check_weights(model: Path) -> None:
    """Refuse a configuration that does not go with the weights beside it, as far as their headers say.

    Raises:
        ConfigError: if it has more layers, or other embeddings.
    """
    shapes = weight_files.shapes(model)
    text = _described(model).get_text_config(decoder=True)
    layers, there = getattr(text, "num_hidden_layers", None), weight_files.layers(shapes)
    if isinstance(layers, int) and there is not None and layers > there:
        raise _other_weights(f"num_hidden_layers is {layers}, and the weight files hold {there} layers")
    table = weight_files.embedding(shapes)
    if table is None:
        return
    for key, size in zip(("vocab_size", "hidden_size"), table, strict=True):
        wanted = getattr(text, key, None)
        if isinstance(wanted, int) and wanted != size:
            raise _other_weights(f"{key} is {wanted}, and the embedding in the weight files is {table[0]} x {table[1]}")


def check_tensors(model: Path, other: Path, field: str) -> None:
    """Refuse another model that has a tensor of another shape than the model, or none of its tensors, as the headers of their files say.

    Args:
        model, other: their directories.
        field: that names the other one.

    Raises:
        ConfigError: naming a tensor.
    """
    ours, theirs = weight_files.shapes(model), weight_files.shapes(other)
    common = [name for name in ours if name in theirs]  # one of them may hold a copy of what is tied
    other_shape = next((name for name in common if ours[name] != theirs[name]), None)
    if not common or other_shape is not None:
        raise ConfigError(
            f"{other_shape} has the shape {ours[other_shape]} in {model} and {theirs[other_shape]} in {other}"
            if other_shape
            else f"{other} has no tensor of {model}",
            field=field,
            fix="give the model that `model` was fine-tuned from, with its weights in safetensors files",
        )


def check_vocabulary(model: Path, tokenizer: Any, prompts: Iterable[Sequence[int]]) -> None:
    """Refuse a tokenizer whose tokens the model does not have.

    Special tokens do not count until a prompt contains one: Gemma 3 has one for pictures that its text models have no row for.

    Args:
        model: its directory.
        tokenizer: the model's.
        prompts: their token ids.

    Raises:
        ConfigError: if a token's id is beyond the model's vocabulary.
    """
    size = getattr(_described(model).get_text_config(decoder=True), "vocab_size", None)
    if not isinstance(size, int):
        return
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    special = {number for number, token in added.items() if token.special} - {tokenizer.eos_token_id}
    used = set(tokenizer.get_vocab().values()) - special
    highest = max(used.union(*prompts), default=-1)
    if highest >= size:
        raise ConfigError(
            f"its tokenizer has tokens up to number {highest}, and the model's vocabulary ends at {size - 1} (vocab_size {size})",
            field="model",
            fix="put the tokenizer there that the model was trained with, or give the model as many embeddings "
            "(resize_token_embeddings of transformers) and train them",
        )


def check_critic(critic: Path, policy: Path, tokenizer: Any) -> None:
    """Refuse what a critic cannot begin as: it must be a reward model that reads what the policy writes, with weights that can be trained.

    Args:
        critic: its directory.
        policy: the policy's.
        tokenizer: the policy's.

    Raises:
        ConfigError: naming cause and fix.
    """
    from transformers import AutoTokenizer

    try:
        _check_quantization(_object(critic / "config.json"))
        weight_files.parameters(str(critic), critic)
        theirs, ours = _described(critic), _described(policy)
        vocabulary = AutoTokenizer.from_pretrained(critic).get_vocab()
    except ConfigError as error:
        raise ConfigError(f"{critic}: {error.cause}", field="algorithm.critic_model", fix=error.fix) from None
    except Exception as error:  # of a damaged file the library may raise anything
        raise _no_critic(f"{critic} cannot be read: {error}") from error
    if theirs.num_labels != 1 or not (theirs.architectures or [""])[0].endswith("ForSequenceClassification"):
        raise _no_critic(f"{critic} is no reward model, i.e. a sequence classifier with num_labels=1")
    if theirs.model_type != ours.model_type:
        raise _no_critic(f"{critic} is of the family {theirs.model_type}, and the policy of {ours.model_type}")
    if vocabulary != tokenizer.get_vocab():
        raise _no_critic(f"{critic} has another vocabulary than the policy, whose tokens it would read")


def check_reward_model(
    model: Path, outputs: int, description: Mapping[str, Any], attention: str, *, padding_free: bool = False
) -> bool:
    """Refuse what cannot become, or go on as, a reward or preference model of this kind.

    Args:
        model: its directory.
        outputs: of the head.
        description: what the model's configuration will say of them.
        attention: `learner.attn_implementation`.
        padding_free: `learner.padding_free`.

    Returns:
        Whether it is such a model already; else a language model, which gets a new head.

    Raises:
        ConfigError: naming cause and fix.
    """
    try:
        written = _object(model / "config.json")
    except (OSError, ValueError) as error:
        raise _unreadable(error) from error
    named = written.get("architectures")
    classifier = isinstance(named, list) and bool(named) and str(named[0]).endswith("ForSequenceClassification")
    check_description(model, attention, padding_free=padding_free, classifier=classifier)
    _require_score(str(written.get("model_type")))
    if not classifier:
        return False
    described = _described(model)
    fix = "give a language model, or one that was trained with the same reward_model"
    if described.num_labels != outputs:
        raise ConfigError(
            f"{model} is a classifier with {described.num_labels} labels, and the objective reads {outputs}",
            field="model",
            fix=fix,
        )
    if (found := objective_of(written)) != (wanted := description["objective"]):
        raise ConfigError(f"{model} was trained with the objective {found}, not {wanted}", field="model", fix=fix)
    weight_files.parameters(str(model), model)
    return True


def _require_score(family: str) -> None:
    """A head is read at the last token of a decoder: transformers calls it `score` there."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    name = NAMES.get(family)
    cls = None if name is None else getattr(transformers, name if isinstance(name, str) else name[0], None)
    inits = [base.__init__ for base in getattr(cls, "__mro__", ()) if "__init__" in vars(base)]
    if not any("self.score =" in inspect.getsource(init) for init in inits if inspect.isfunction(init)):
        raise ConfigError(
            f"transformers has no classifier of the family {family!r} with a head called `score` on its last state",
            field="model",
            fix="give a decoder, e.g. of the families of Llama, Qwen, Gemma or Mistral",
        )


def _check_quantization(written: Mapping[str, Any]) -> None:
    """Quantized weights cannot be trained, nor replaced by the learner's."""
    nested = written.get("text_config")
    for part in (written, nested if isinstance(nested, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if (how := part.get(key)) is None:
                continue
            method = how.get("quant_method") if isinstance(how, Mapping) else None
            raise ConfigError(
                f"its weights are quantized ({f'{method}, ' if method else ''}{key} in its config.json): they can neither be trained "
                "nor be replaced by trained ones, and adapters beside them (QLoRA) are not there yet",
                field="model",
                fix="give the model that it was made from, with weights in bfloat16, float16 or float32",
            )


def _check_remote_code(written: Mapping[str, Any]) -> None:
    """Code that comes with a model is not run."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    code, family = written.get("auto_map"), written.get("model_type")
    known = {"AutoConfig": family in CONFIG_MAPPING, "AutoModelForCausalLM": family in _causal()}
    if isinstance(code, Mapping) and (missing := [name for name in known if name in code and not known[name]]):
        raise ConfigError(
            f"the family {family!r} needs code that comes with the model (auto_map in its config.json has {missing[0]}), which is not run: "
            "the installed transformers does not know it as a language model",
            field="model",
            fix="give a model of a family that transformers knows, or install a transformers that knows this one",
        )


def _check_architecture(written: Mapping[str, Any]) -> None:
    """A policy gives a distribution of the next token. A file that names no architecture is left to transformers."""
    named, causal = written.get("architectures"), _causal()
    if not isinstance(named, list) or not named:
        return
    known = set().union(*causal.values())
    # Of a model that reads pictures too, transformers may know the language part alone.
    if "text_config" in written and written.get("model_type") in causal:
        return
    if not any(str(name).endswith("ForCausalLM") or name in known for name in named):
        raise ConfigError(
            f"it is no causal language model: its config.json names {', '.join(map(str, named))} as its architecture",
            field="model",
            fix="give a model whose architecture ends in ForCausalLM; a reward model or encoder cannot write responses",
        )


def _check_generation(model: Path) -> None:
    """Engine and learner do without a generation_config.json that is no JSON, and stop at one that is another JSON value."""
    file = model / "generation_config.json"
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return
    if not isinstance(value, dict):
        raise ConfigError(
            f"{file} holds a {type(value).__name__}, and must hold a JSON object",
            field="model",
            fix="download it again, or delete it",
        )


def _causal() -> dict[str, set[str]]:
    """By `model_type`: the classes that transformers' AutoModelForCausalLM may take."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return {family: {classes} if isinstance(classes, str) else set(classes) for family, classes in NAMES.items()}


def _described(model: Path) -> Any:
    """The configuration of a model, as transformers has it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)


def _object(file: Path) -> dict[str, Any]:
    value = json.loads(file.read_bytes())
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def _no_critic(cause: str) -> ConfigError:
    return ConfigError(
        cause,
        field="algorithm.critic_model",
        fix="give a reward model that was made from the policy's family, or leave it out: the critic is then a copy of the policy",
    )


def _unreadable(error: Exception) -> ConfigError:
    return ConfigError(
        f"its config.json cannot be read: {error}", field="model", fix="use a model that the installed transformers knows"
    )


def _other_weights(cause: str) -> ConfigError:
    return ConfigError(
        f"its config.json does not go with its weights: {cause}",
        field="model",
        fix="restore the config.json that belongs to these weights, or download the model again",
    )


def tokenizer(model: str) -> Any:
    """The model's tokenizer.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # of a damaged file the library may raise anything, a bare Exception among it
        raise ConfigError(
            f"its tokenizer cannot be loaded: {error}", field="model", fix="put the tokenizer's files beside the weights"
        ) from error
