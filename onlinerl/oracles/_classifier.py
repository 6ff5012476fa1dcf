"""What oracles share that load a Hugging Face sequence classifier: placement, batches, the tokens that it reads, limits.

The model reads text through its own tokenizer and chat template, never the policy's. Padding is on the right with a
token that occurs nowhere in the batch, so that the model's "last token that is not padding" is the true last one even where the
tokenizer pads with end-of-sequence.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PrivateAttr, field_validator

from onlinerl.errors import OracleError
from onlinerl.oracles._model_files import absent, absolute, device_and_dtype, digest, folder_of, readable
from onlinerl.preference_models import KEY, Unreadable, objective_of
from onlinerl.protocols.keys import Resumable, Seconds
from onlinerl.protocols.oracle import ModelOracle
from onlinerl.types import Cost, Failure, Query, Verdict


class SequenceClassifier(ModelOracle):
    """Asks a sequence classifier about groups of responses. A subclass says what the model reads, and what its outputs mean."""

    objective: ClassVar[str]
    """What the model must have been trained with, see `preference_models`."""
    kind: ClassVar[str]
    """Such a model, in words."""

    groups_per_call: int = Field(16, ge=1)  # fills its batches, and asking again costs no money
    call_timeout_s: Seconds = 1800.0
    path: str
    """Directory of the model and its tokenizer, or a Hugging Face hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    batch_size: Resumable[int] = Field(32, ge=1)
    """Sequences per forward pass."""
    max_length: int = Field(4096, ge=1)
    """Longest prompt and response together, in tokens of the reward model; its own limit, if that is lower. Nothing is ever cut."""
    on_truncate: Literal["drop", "error"] = "drop"
    """What a longer one does: `drop` fails its group (counted), `error` stops the run."""

    _model: Any = PrivateAttr(None)
    _tokenizer: Any = PrivateAttr(None)
    _described: dict[str, Any] = PrivateAttr(default_factory=dict)
    _limit: int = PrivateAttr(0)
    _version: str = PrivateAttr("")
    _weights: str | None = PrivateAttr(None)
    """Directory of what has replaced `path`."""

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        return absolute(path, "path")

    # --- what a subclass says for itself ---

    def _labels_problem(self, labels: int) -> str | None:
        """What is wrong with a model of so many outputs; None if nothing is."""
        raise NotImplementedError

    def _rows(self, query: Query) -> list[list[int]]:
        """Tokens of every sequence that the model reads about a group.

        Raises:
            Unreadable: if its tokenizer cannot lay them out.
        """
        raise NotImplementedError

    def _verdict(self, query: Query, outputs: np.ndarray, cost: Cost) -> Verdict | Failure:
        """What the outputs f64[rows, D] for those sequences mean."""
        raise NotImplementedError

    def _options(self, folder: Path) -> dict[str, Any]:
        """How else the model's configuration is read.

        Raises:
            OracleError: if the model cannot be asked as it is to be.
        """
        return {}

    def _identity(self) -> str:
        """What else could change a verdict, besides the model's files: a part of the version."""
        return f"{self.dtype}\0{self.max_length}"

    @property
    def _annotator(self) -> str:
        return f"{type(self).__module__.rpartition('.')[2]}:{Path(self.path).name}"

    # --- the model ---

    def open(self) -> None:
        """Load model and tokenizer. Idempotent; `judge` calls it too.

        Raises:
            OracleError: if there is no model of this kind at `path`, it has no trained head, or there is no GPU.
        """
        if self._model is not None:
            return
        device, dtype = device_and_dtype(self.device, self.dtype)
        tokenizer = self._read_tokenizer()
        model = self._load(dtype).to(device=device, dtype=dtype)
        self._tokenizer = tokenizer
        self._model = model.eval()
        self._limit = min(self.max_length, getattr(model.config.get_text_config(), "max_position_embeddings", self.max_length))

    def _load(self, dtype: Any) -> Any:
        """The model with its weights, on the CPU."""
        return self._load_one("path", dtype)

    def _load_one(self, key: str, dtype: Any) -> Any:
        from transformers import AutoModelForSequenceClassification

        path = self.paths()[key]
        folder = folder_of(key, path)
        with readable(key, path, "sequence classifier"):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **self._options(folder)
            )
        if report["missing_keys"]:  # transformers would make them up at random
            raise OracleError(
                f"{path} lacks trained weights for {', '.join(sorted(report['missing_keys']))}",
                field=f"oracle.{key}",
                fix=f"give a trained {self.kind}; a language model has no such head",
            )
        return model

    def paths(self) -> dict[str, str]:
        """One model."""
        return {"path": self._weights or self.path}

    def absent(self) -> str | None:
        """The first hub id that has not been downloaded."""
        return absent(self.paths())

    def inspect(self) -> None:
        """Read configuration and tokenizer.

        Raises:
            OracleError: if there is no model of this kind at `path`.
        """
        self._read_tokenizer()

    def _read_tokenizer(self) -> Any:
        """The tokenizer of a model that its configuration says is of this kind."""
        tokenizer, self._described = self._read_one("path")
        return tokenizer

    def _read_one(self, key: str) -> tuple[Any, dict[str, Any]]:
        """The tokenizer of a model of this kind, and what training has written down of it."""
        from transformers import AutoConfig, AutoTokenizer

        path = self.paths()[key]
        folder = folder_of(key, path)
        self._options(folder)
        with readable(key, path, "sequence classifier"):
            config = AutoConfig.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        said = config.to_dict()
        if (found := objective_of(said)) != self.objective:
            raise OracleError(
                f"{path} was trained with the objective {found}, and this oracle asks models of {self.objective}",
                field=f"oracle.{key}",
                fix="give another model, or the oracle of that objective in oracle.name (reward_model, gpm, pair_model)",
            )
        if (problem := self._labels_problem(config.num_labels)) is not None:
            raise OracleError(
                f"{path} has {config.num_labels} label{'s' if config.num_labels != 1 else ''}; {problem}",
                field=f"oracle.{key}",
                fix=f"give a {self.kind}, as `onlinerl train-rm` makes one",
            )
        return tokenizer, dict(said.get(KEY) or {})

    def close(self) -> None:
        """Forget the model and give its memory back."""
        self._model = self._tokenizer = None

    def reload(self, path: str) -> None:
        """Answer with these weights of the same kind from now on; they are read when they are needed. The version is another one."""
        self.close()
        self._weights, self._version = path, ""

    @property
    def version(self) -> str:
        """Hash of the model's and tokenizer's files, and of all keys that could change a verdict. Of a large file, evenly spread samples."""
        if not self._version:
            said = {"asked": self._identity()}
            self._version = f"{Path(self.path).name}-{digest(self.paths(), said)}"
        return self._version

    # --- what it is asked ---

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One Verdict per query, in order.

        Raises:
            OracleError: if a chat prompt meets a model without chat template, or (on_truncate: error) one is too long.
        """
        self.open()
        started = time.perf_counter()
        encoded = [self._encoded(query) for query in queries]
        too_long = [self._too_long(query, rows) for query, rows in zip(queries, encoded, strict=True)]
        rows = [row for group, failure in zip(encoded, too_long, strict=True) if failure is None for row in group]
        passes = self._passes(rows)
        seconds = (time.perf_counter() - started) / max(len(rows), 1)
        results: list[Verdict | Failure] = []
        start = 0
        for query, group, failure in zip(queries, encoded, too_long, strict=True):
            if failure is not None:
                results.append(failure)
                continue
            tokens = sum(len(row) for row in group) * len(passes)
            cost = Cost(calls=len(group) * len(passes), seconds=seconds * len(group), tokens=tokens)
            own = [each[start : start + len(group)] for each in passes]
            verdict = self._verdict(query, own[0], cost)
            results.append(self._with_passes(verdict, own[1:]) if isinstance(verdict, Verdict) else verdict)
            start += len(group)
        return results

    def _passes(self, rows: Sequence[list[int]]) -> list[np.ndarray]:
        """The outputs f64[rows, D] of every pass; the first one is the model's verdict."""
        return [self._outputs(rows)]

    def _with_passes(self, verdict: Verdict, others: Sequence[np.ndarray]) -> Verdict:
        """The verdict with what further passes add."""
        return verdict

    def _encoded(self, query: Query) -> list[list[int]]:
        try:
            return self._rows(query)
        except Unreadable as error:
            raise OracleError(error.cause, field="oracle.path", fix=error.fix) from error

    def _too_long(self, query: Query, rows: Sequence[Sequence[int]]) -> Failure | None:
        longest = max((len(row) for row in rows), default=0)
        if longest <= self._limit:
            return None
        message = f"prompt {query.prompt.id!r} with its longest response has {longest} tokens, more than {self._limit}"
        if self.on_truncate == "error":
            raise OracleError(message, field="oracle.max_length", fix="raise it, or set oracle.on_truncate to drop")
        return Failure(kind="refused", message=message)

    def _outputs(self, rows: Sequence[list[int]]) -> np.ndarray:
        """The model's logits f64[rows, D], in order. Rows of like length share a batch."""
        outputs: list[list[float]] = [[] for _ in rows]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            for index, said in zip(indices, self._forward([rows[index] for index in indices]), strict=True):
                outputs[index] = said
        return np.asarray(outputs, dtype=np.float64)

    def _forward(self, rows: Sequence[list[int]]) -> list[list[float]]:
        """The model's logits for each row of one batch."""
        import torch

        used = {token for row in rows for token in row}
        vocabulary = self._model.get_input_embeddings().num_embeddings
        padding = next((token for token in range(vocabulary) if token not in used), None)
        if padding is None and len(rows) > 1:  # a tiny vocabulary, used up by the batch
            return [said for row in rows for said in self._forward([row])]
        width = max(len(row) for row in rows)
        tokens = torch.full((len(rows), width), padding or 0, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[index, : len(row)] = 1
        for config in (self._model.config, self._model.config.get_text_config()):
            config.pad_token_id = padding  # where transformers looks for the last token
        device = self._model.device
        with torch.inference_mode():
            logits = self._model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
        said: list[list[float]] = logits.float().reshape(len(rows), -1).tolist()
        return said
