"""Low-rank adapters in a policy, through peft: what is trained, and three models in the memory of one.

Beside the adapter that is trained each layer of the language model has a second one, which is filled from an export when the log-probs of
an older iterate are asked for. With both of them off the policy is the base model. A critic has adapters too; its head is trained whole.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onlinerl import hub, weight_files
from onlinerl.errors import ConfigError, LearnerError
from onlinerl.learners._interpolation import SavedSource
from onlinerl.learners._policy import Network
from onlinerl.learners._reward import RewardNetwork
from onlinerl.learners._weights import Merged, Weight
from onlinerl.protocols.adapters import ALL_LINEAR, LoraConfig
from onlinerl.types import derive_seed

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as Layer

TRAINED, SAVED = "default", "saved"
"""Of peft's adapters: the one that is trained, and the one that is filled from an export."""
FOLDER = "adapter"
"""Of an export: the adapter in peft's format. In a folder of its own, because transformers takes a model beside such files for its adapter."""
STEM = "adapter_model"

Gather = Callable[..., AbstractContextManager[Any]]
"""Makes parameters whole for the time of a block: `gather(parameters, write=False)`."""


class Adapters:
    """Puts adapters into a policy, in place, and freezes everything else.

    Args:
        policy: or a reward model; whole, or cut up by ZeRO-3; no optimizer has been made for it.
        config: of the adapters.
        base: the model that the policy was read from.
        seed: of the first values, which are the same on all ranks, however they divide the model.
        gather: how parameters become whole.

    Raises:
        ConfigError: if `target_modules` names what is no linear layer of the model.
    """

    def __init__(self, policy: Network, config: LoraConfig, *, base: str, seed: int, gather: Gather) -> None:
        self._policy, self._config, self._base, self._gather = policy, config, base, gather
        self._filled: str | None = None
        self._names = targeted(policy.model, config)
        layers = {f"model.{name}": layer for name, layer in self._inject(policy.model, self._names, TRAINED, SAVED).items()}
        if policy.critic is not None:
            names = targeted(policy.critic, config)
            layers |= {f"critic.{name}": layer for name, layer in self._inject(policy.critic, names, TRAINED).items()}
        self._layers: dict[str, Layer] = layers
        for name, layer in layers.items():
            _begin(layer, derive_seed(seed, "lora", name))
        policy.requires_grad_(False)
        trained = [p for layer in layers.values() for p in (layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight)]
        heads = (policy.value_head, policy.head if isinstance(policy, RewardNetwork) else None)
        head = [p for layer in heads if layer is not None for p in layer.parameters()]
        for parameter in (*trained, *head):
            parameter.requires_grad_(True)
        self._trained = {id(parameter) for parameter in (*trained, *head)}
        self._switch(TRAINED)  # peft leaves the one that was made last

    def _inject(self, network: nn.Module, names: list[str], *adapters: str) -> dict[str, Layer]:
        """Wrap these layers; returns them as peft has them, by name."""
        try:
            import peft
        except ImportError as error:
            raise ConfigError(
                f"peft cannot be imported here: {error}",
                field="learner.lora",
                fix="pip install peft, as requirements/cpu.txt pins it",
            ) from error

        for adapter in adapters:
            config = self._peft(network, names, dropout=self._config.dropout if adapter == TRAINED else 0.0)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # the second one is meant
                peft.inject_adapter_in_model(config, network, adapter)
        return {name: network.get_submodule(name) for name in names}

    def _peft(self, network: nn.Module, names: list[str], dropout: float) -> Any:
        import peft

        return peft.LoraConfig(
            r=self._config.rank,
            lora_alpha=self._config.alpha,
            lora_dropout=dropout,
            use_rslora=self._config.use_rslora,
            target_modules=names,
            fan_in_fan_out=any(_is_transposed(network.get_submodule(name)) for name in names),
            init_lora_weights=False,
            base_model_name_or_path=self._base,
            task_type="CAUSAL_LM",
        )

    def require_frozen(self) -> None:
        """See that nothing but adapters and the head of a critic is trained.

        Raises:
            LearnerError: naming a parameter.
        """
        for name, parameter in self._policy.named_parameters():
            if parameter.requires_grad != (id(parameter) in self._trained):
                raise LearnerError(
                    f"{name} is {'trained' if parameter.requires_grad else 'frozen'}, and with learner.lora it must not be: the base "
                    "model would no longer be what the adapters are off",
                    field="learner.lora",
                    fix="this is a bug of the learner",
                )

    # --- the models ---

    def holds(self, model: str) -> bool:
        """Whether this saved model is the policy with other adapters: the base model, or the export of an iterate."""
        return model == self._base or _file(Path(model)).is_file()

    @contextmanager
    def of(self, model: str) -> Iterator[None]:
        """Inside, the policy is this saved model, which `holds` knows. Nothing is dropped in it. Collective under ZeRO-3."""
        if model != self._base:
            self._fill(model)
        self._switch(SAVED, off=model == self._base)
        try:
            yield
        finally:
            self._switch(TRAINED)

    def _switch(self, adapter: str, *, off: bool = False) -> None:
        """Not through peft's own methods, which also say what is trained."""
        for layer in self._layers.values():
            layer._disable_adapters, layer._active_adapter = off, adapter

    @torch.no_grad()
    def _fill(self, model: str) -> None:
        if self._filled == model:
            return
        self._filled = None
        parameters = self._exported(SAVED)
        for name, tensor in SavedSource(_file(Path(model)).parent, list(parameters)):
            with self._gather([parameters[name]], write=True):
                parameters[name].copy_(tensor)
        self._filled = model

    def weights(self, model: str) -> dict[str, Weight]:
        """What to send or to export, by the names of a model without adapters: of "policy", merged, or of the base model."""
        own = {id(p) for layer in self._layers.values() for p in (*layer.lora_A.parameters(), *layer.lora_B.parameters())}
        found: dict[str, Weight] = {}
        for name, parameter in self._policy.model.named_parameters():
            if id(parameter) in own:
                continue
            module, _, leaf = name.rpartition(".")
            layer = self._layers.get(f"model.{module.removesuffix('.base_layer')}")
            merged = layer is not None and leaf == "weight" and model == "policy"
            plain = name.replace(".base_layer.", ".")
            found[plain] = _merged(layer, parameter) if merged and layer is not None else parameter
        return found

    # --- disk ---

    def exported(self) -> Mapping[str, nn.Parameter]:
        """The trained adapter of the language model, by the names of peft's files."""
        return self._exported(TRAINED)

    def _exported(self, adapter: str) -> dict[str, nn.Parameter]:
        layers = {name: self._layers[f"model.{name}"] for name in self._names}
        return {
            f"base_model.model.{name}.{part}.weight": getattr(layer, part)[adapter].weight
            for name, layer in layers.items()
            for part in ("lora_A", "lora_B")
        }

    def describe(self, folder: Path) -> None:
        """Write peft's configuration beside an exported adapter."""
        config = self._peft(self._policy.model, self._names, dropout=self._config.dropout)
        config.inference_mode = True
        config.save_pretrained(folder)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint goes with: the base model by checksums of its files, and the adapters."""
        folder = hub.local(self._base)
        base = {"model": self._base} if folder is None else weight_files.checksums(folder)
        config = self._config.model_dump(mode="json", exclude={"dropout", "target_modules"})
        return {"base": base, "lora": config | {"layers": sorted(self._layers)}}

    def require_same(self, stored: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another base model or of other adapters.

        Raises:
            LearnerError: saying which.
        """
        for key, what, fix in (
            ("base", "on another base model", "restore the model that the run started from"),
            ("lora", "of other adapters", "resume with the learner.lora that it was written with"),
        ):
            if stored.get(key) != self.identity[key]:
                raise LearnerError(f"the checkpoint was written {what}", field="learner.lora", fix=fix)


def targeted(network: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the linear layers that get an adapter.

    Raises:
        ConfigError: if a name is that of none, or of what its model does not run through a layer.
    """
    from transformers.pytorch_utils import Conv1D

    heads = [getattr(network, "get_output_embeddings", lambda: None)(), getattr(network, "score", None)]
    linear = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and all(layer is not head for head in heads)
    ]
    if config.target_modules == ALL_LINEAR:
        return linear
    found = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in config.target_modules}
    if missing := [target for target, names in found.items() if not names]:
        leaves = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"{missing[0]} is no linear layer that an adapter can stand beside",
            field="learner.lora.target_modules",
            fix=f"the model has {', '.join(leaves)}",
        )
    return [name for name in linear if any(name in names for names in found.values())]


def _is_transposed(layer: nn.Module) -> bool:
    """Whether it keeps its weight as [in, out], as GPT-2 does."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(getattr(layer, "base_layer", layer), Conv1D)


@torch.no_grad()
def _begin(layer: Layer, seed: int) -> None:
    """The values that peft begins with, A uniform within 1 / sqrt(in) and B zero, of a seed: ranks draw the same."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in layer.lora_A:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        drawn = torch.empty(a.shape).uniform_(-1.0, 1.0, generator=generator) / math.sqrt(a.shape[1])
        a.copy_(drawn if adapter == TRAINED else torch.zeros_like(drawn))
        b.zero_()


def _merged(layer: Layer, weight: nn.Parameter) -> Merged:
    a, b = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
    return Merged(weight, a, b, float(layer.scaling[TRAINED]), _is_transposed(layer))


def _file(export: Path) -> Path:
    return export / FOLDER / f"{STEM}.safetensors"
