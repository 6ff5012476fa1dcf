"""Reading a model from disk, whole."""

from __future__ import annotations

import ctypes
import gc
from typing import TYPE_CHECKING, Literal

import torch

from onlinerl.learners._policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelReader:
    """Reads models for one rank.

    Args:
        dtype, attention: of the model, as transformers takes them.
        device: of this rank.
    """

    def __init__(self, dtype: torch.dtype, attention: str, device: torch.device) -> None:
        self._dtype, self._attention, self._device = dtype, attention, device
        self._frozen: tuple[str, Policy] | None = None

    def trained(self, model: str, critic: Literal["separate", "shared"] | None) -> Policy:
        """The policy that is going to be trained."""
        return Policy(self._read(model), critic)

    def frozen(self, model: str) -> Policy:
        """A saved model that only gives log-probs. One at a time is kept: base and previous take turns."""
        if self._frozen is None or self._frozen[0] != model:
            self.forget()  # free the old one before reading the new one
            self._frozen = (model, self._prepared(Policy(self._read(model)).eval().requires_grad_(False)))
            give_back()
        return self._frozen[1]

    @property
    def kept(self) -> Policy | None:
        """The frozen model that is kept now, if any."""
        return None if self._frozen is None else self._frozen[1]

    def forget(self) -> None:
        """Give the memory of the frozen model back."""
        if self._frozen is not None:
            self._frozen = None
            gc.collect()  # parameters that were cut up are part of reference cycles

    def _read(self, model: str) -> PreTrainedModel:
        return self._from_disk(model).to(self._device)

    def _from_disk(self, model: str) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(model, dtype=self._dtype, attn_implementation=self._attention)

    def _prepared(self, policy: Policy) -> Policy:
        """A frozen model as it is kept."""
        return policy


def give_back() -> None:
    """Return freed memory to the system: the C library keeps it, in holes that are seldom filled again, and a share is no share."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
    if trim is not None:
        trim(0)
