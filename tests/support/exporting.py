"""The toy learner, with exports that language models can be read from: the base model, whose embeddings have moved with the logits."""

from __future__ import annotations

from pathlib import Path

from onlinerl.learners.toy import Toy, ToyLearner
from onlinerl.protocols.algorithm import Algorithm


class Exporting(Toy):
    """For runs whose oracle is an iterate."""

    name: str = "exporting.Exporting"

    def open(self, vocabulary: int, algorithm: Algorithm, base: str, temperature: float) -> ToyLearner:
        return ExportingLearner(vocabulary, algorithm, base, temperature)


class ExportingLearner(ToyLearner):
    def export(self, path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().export(path)
        model = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32)
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] += self.logits.detach()
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(self._base).save_pretrained(path)
