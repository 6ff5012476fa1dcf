"""The models that one rank of a learner holds: the policy, saved ones beside it, and how they leave it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from onlinerl.batch import Batch
from onlinerl.learners._dropout import Dropout
from onlinerl.learners._export import export_weights
from onlinerl.learners._interpolation import Interpolated, SavedSource
from onlinerl.learners._loading import ModelReader
from onlinerl.learners._lora import FOLDER, STEM, Adapters
from onlinerl.learners._policy import Policy
from onlinerl.learners._reward import RewardNetwork
from onlinerl.learners._vocabulary import FrozenStates
from onlinerl.learners._weights import PolicySource
from onlinerl.protocols.learner import LearnerConfig, WeightSource
from onlinerl.protocols.needs import Needs


class Models:
    """Which network says what; a part of `Rank`, which fills in what is only declared here."""

    config: LearnerConfig
    dtype: torch.dtype
    device: torch.device
    needs: Needs
    rank: int
    _seed: int
    _base: str
    """Where the policy was read from."""
    _reference: str
    """See `Rank.set_reference`."""
    _policy: Policy | RewardNetwork
    _reader: ModelReader
    _adapters: Adapters | None = None
    """What is trained of the policy, if not all."""
    _dropout: Dropout = Dropout(nn.Module(), seed=0, rank=0, device=torch.device("cpu"))
    """Drops nothing, unless there are adapters with dropout."""
    _source: ClassVar[type[PolicySource]] = PolicySource

    def _read_policy(self, model: str) -> None:
        """Of `_build`: the policy from disk, with adapters if there are to be any."""
        self._policy = self._reader.trained(model, self.needs)
        if self.config.lora is not None:
            self._adapters = Adapters(self._policy, self.config.lora, base=model, seed=self._seed, gather=self._gathered)
            self._adapters.require_frozen()
            self._dropout = Dropout(self._policy, self._seed, self.rank, self.device)
        self._policy.eval()

    def _gathered(self, parameters: list[nn.Parameter], *, write: bool = False) -> AbstractContextManager[Any]:
        """Inside, these are whole, and what rank 0 writes into them stays."""
        return nullcontext()

    @property
    def _network(self) -> nn.Module:
        """What a forward pass of the policy goes through."""
        raise NotImplementedError

    def weight_source(self, dtype: torch.dtype, model: str = "policy") -> PolicySource:
        """The weights of the policy, with its adapters in them, or of a saved model, for a transport, in the engine's dtype."""
        if self._adapters is not None and model in ("policy", self._base):
            return self._source(self._policy.model, dtype, self._adapters.weights(model))
        return self._source((self._policy if model == "policy" else self._reader.frozen(model)).model, dtype)

    @contextmanager
    def _as(self, model: str) -> Iterator[nn.Module]:
        """What a forward pass of "policy" or of a saved model goes through, inside: one network, if they differ in their adapters only."""
        if model == "policy" or self._adapters is None or not self._adapters.holds(model):
            yield self._network if model == "policy" else self._reader.frozen(model)
            return
        with self._adapters.of(model):
            yield self._network

    @torch.no_grad()
    def _reference_states(self, batch: Batch) -> FrozenStates:
        if self._adapters is None or not self._adapters.holds(self._reference):
            return self._reader.states(self._reference, batch)
        assert isinstance(self._policy, Policy), "a reward model has no reference"
        with self._as(self._reference) as network:
            return self._reader.frozen_states(self._policy, network(batch, states_only=True))

    def export(self, path: str, tokenizer: str) -> None:
        """The policy as a Hugging Face model with its tokenizer. Collective; rank 0 writes.

        Adapters are merged into it, and lie beside it in peft's format, too.
        """
        model = self._policy.model
        export_weights(self.weight_source(self.dtype), Path(path), self.dtype, writer=self.rank == 0)
        if self._adapters is not None and isinstance(self._policy, Policy):  # peft's file of a reward model would lack its head
            self._export_adapter(self._adapters, Path(path) / FOLDER)
        if self.rank == 0:
            from transformers import AutoTokenizer

            reads = AutoTokenizer.from_pretrained(tokenizer)
            if isinstance(self._policy, RewardNetwork) and model.config.pad_token_id is None:
                # Without one transformers' own classifiers take single rows only.
                model.config.pad_token_id = reads.eos_token_id if reads.pad_token_id is None else reads.pad_token_id
            model.config.save_pretrained(path)
            if model.can_generate():
                model.generation_config.save_pretrained(path)
            reads.save_pretrained(path)
        dist.barrier()

    def _export_adapter(self, adapters: Adapters, folder: Path) -> None:
        if self.rank == 0:
            folder.mkdir()
            adapters.describe(folder)
        source = self._source(self._policy.model, self.dtype, adapters.exported())
        export_weights(source, folder, self.dtype, writer=self.rank == 0, stem=STEM)

    def average(self, reference: str, weight: float, path: str) -> None:
        """Write (1 - weight) * reference + weight * policy in float32; see `Learner.average`. Collective; rank 0 writes.

        The base model is taken as this learner reads it, whatever its files call its tensors.
        """
        policy = self.weight_source(self.dtype)
        start: WeightSource = (
            self.weight_source(self.dtype, reference)
            if reference == self._base
            else SavedSource(Path(reference), [m.name for m in policy.metadata()])
        )
        export_weights(Interpolated(start, policy, weight), Path(path), torch.float32, writer=self.rank == 0)
        if self.rank == 0:
            self._policy.model.config.save_pretrained(path)
        dist.barrier()
