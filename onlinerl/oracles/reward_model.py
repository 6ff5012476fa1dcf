"""Scores from any Hugging Face sequence classifier with one label.

Source: Skywork-Reward-V2 (sequence classifier, scalar at the last token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from onlinerl.errors import OracleError
from onlinerl.oracles import _verdicts
from onlinerl.oracles._classifier import SequenceClassifier
from onlinerl.oracles._model_files import absolute, readable
from onlinerl.preference_models import BRADLEY_TERRY, single
from onlinerl.protocols.oracle import Trainable
from onlinerl.types import Cost, Failure, Query, Verdict, derive_seed
from onlinerl.types.labels import induced


class RewardModel(SequenceClassifier):
    """Scores prompt and response with a reward model."""

    objective: ClassVar[str] = BRADLEY_TERRY
    kind: ClassVar[str] = "reward model, i.e. a sequence classifier with num_labels=1"

    dropout_passes: int = Field(0, ge=0)
    """So many further passes with dropout (T; 10 in "Self-Evolutionary Large Language Models through Uncertainty-Enhanced Preference
    Optimization") say how uncertain each comparison is; 0 asks none. They cost as much as the scores each, and of one model they are a weak
    substitute for several."""
    dropout: float | None = Field(None, gt=0, lt=1)
    """Rate of those passes; None is what the model was trained with."""
    average_with: list[str] = Field(default_factory=list)
    """Further reward models: the mean of all their weights is asked, at the cost of one model. They go together if each was trained from the
    same model and the same head ("WARM: On the Benefits of Weight Averaged Reward Models", arXiv 2401.12187, section 3)."""

    @field_validator("average_with")
    @classmethod
    def _absolutes(cls, paths: list[str]) -> list[str]:
        return [absolute(path, f"average_with[{i}]") for i, path in enumerate(paths)]

    @field_validator("dropout_passes")
    @classmethod
    def _several(cls, passes: int) -> int:
        if passes == 1:
            raise ValueError("one pass cannot disagree with itself; set 2 or more, or 0")
        return passes

    @field_validator("dropout")
    @classmethod
    def _is_read(cls, rate: float | None, info: ValidationInfo) -> float | None:
        if rate is not None and not info.data.get("dropout_passes"):
            raise ValueError("only dropout_passes reads it")
        return rate

    @property
    def gives_uncertainty(self) -> bool:
        """Of passes with dropout."""
        return self.dropout_passes > 0

    @property
    def trainable(self) -> Trainable | None:
        """As `onlinerl train-rm` trains them further; an average is no model that was trained."""
        return None if self.average_with else Trainable(objective=self.objective, path=self.path, max_length=self.max_length)

    def _labels_problem(self, labels: int) -> str | None:
        return None if labels == 1 else "a reward model has one"

    def _identity(self) -> str:
        passes = f"\0{self.dropout_passes}\0{self.dropout}" if self.dropout_passes else ""
        return super()._identity() + passes

    def paths(self) -> dict[str, str]:
        """Of all whose weights are averaged."""
        return super().paths() | {f"average_with[{i}]": path for i, path in enumerate(self.average_with)}

    def _read_tokenizer(self) -> Any:
        """Those that are averaged read the same tokens, or their weights mean different things."""
        tokenizer = super()._read_tokenizer()
        for i, path in enumerate(self.average_with):
            key = f"average_with[{i}]"
            other, _ = self._read_one(key)
            if other.get_vocab() != tokenizer.get_vocab() or other.chat_template != tokenizer.chat_template:
                raise OracleError(
                    f"{path} has another tokenizer or chat template than {self.path}",
                    field=f"oracle.{key}",
                    fix="average reward models that were trained from the same model; others go together in oracle.name=ensemble",
                )
        return tokenizer

    def _load(self, dtype: Any) -> Any:
        """The mean in float32, taken one model at a time."""
        if not self.average_with:
            return super()._load(dtype)
        import torch

        keys = list(self.paths())
        model = self._load_one(keys[0], torch.float32)
        means = dict(model.named_parameters())
        for number, key in enumerate(keys[1:], 2):
            parameters = dict(self._load_one(key, torch.float32).named_parameters())
            if {name: one.shape for name, one in parameters.items()} != {name: one.shape for name, one in means.items()}:
                raise OracleError(
                    f"{self.paths()[key]} has not the same weights as {self.path}: names or shapes differ",
                    field=f"oracle.{key}",
                    fix="average reward models that were trained from the same model; others go together in oracle.name=ensemble",
                )
            with torch.no_grad():
                for name, mean in means.items():
                    mean += (parameters[name] - mean) / number
        return model

    def _rows(self, query: Query) -> list[list[int]]:
        """One of each response."""
        return [single(self._tokenizer, query.prompt, response, self.path) for response in query.responses]

    def _verdict(self, query: Query, outputs: np.ndarray, cost: Cost) -> Verdict | Failure:
        """K scores, the model's logits."""
        return _verdicts.from_scores(
            outputs[:, 0] if len(outputs) else outputs,
            len(query.responses),
            annotator=self._annotator,
            oracle_version=self.version,
            cost=cost,
        )

    def _passes(self, rows: Sequence[list[int]]) -> list[np.ndarray]:
        return [self._outputs(rows), *(self._dropped_out(rows, number) for number in range(self.dropout_passes))]

    def _with_passes(self, verdict: Verdict, others: Sequence[np.ndarray]) -> Verdict:
        """How far passes with dropout disagree about each comparison."""
        if not others:
            return verdict
        members = [induced(tuple(one[:, 0].tolist()), self.preference_temperature) for one in others]
        return replace(verdict, uncertainty=_verdicts.nats_of(members))

    def _options(self, folder: Path) -> dict[str, Any]:
        """What the model's configuration says of dropout, with the rate that is asked for; nothing where no pass has any.

        Raises:
            OracleError: if passes with dropout would all be the same.
        """
        if not self.dropout_passes:
            return {}
        from transformers import AutoConfig

        with readable("path", self.path, "sequence classifier"):
            said = AutoConfig.from_pretrained(folder).to_dict()
        drops = {key: v for key, v in said.items() if "drop" in key and isinstance(v, int | float)}
        rates = {key: self.dropout for key in drops if self.dropout is not None}
        if not any((rates or drops).values()):
            raise OracleError(
                f"asks for passes with dropout, and {self.path} has none: "
                + (", ".join(f"{key} is {value}" for key, value in drops.items()) or "its configuration names no rate"),
                field="oracle.dropout_passes",
                fix="set oracle.dropout, e.g. to 0.1" if drops else "set it to 0, or choose another model",
            )
        return rates

    def _dropped_out(self, rows: Sequence[list[int]], number: int) -> np.ndarray:
        """The outputs of one pass with dropout; which units drop out follows from the number of the pass and what is judged."""
        import torch

        device = self._model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed("dropout", number, rows))
            self._model.train()
            try:
                return self._outputs(rows)
            finally:
                self._model.eval()
