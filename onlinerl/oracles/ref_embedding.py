"""How like the reference answer is a response in meaning? The cosine of their embeddings by a frozen encoder.

Source: "Learning from Reference Answers: Versatile Language Model Alignment without Binary Human Preference Data" (RefAlign, arXiv 2504.09895).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, PrivateAttr, field_validator

from onlinerl.errors import OracleError
from onlinerl.oracles import _verdicts
from onlinerl.oracles._model_files import absent, absolute, device_and_dtype, digest, folder_of, readable
from onlinerl.oracles.ref_similarity import references
from onlinerl.protocols.keys import Resumable, Seconds
from onlinerl.protocols.oracle import ModelOracle
from onlinerl.types import Cost, Failure, Query, Verdict


class RefEmbedding(ModelOracle):
    """Scores from -1 to 1, the same direction; of several reference answers the nearest one counts."""

    groups_per_call: int = Field(16, ge=1)  # fills its batches, and asking again costs no money
    call_timeout_s: Seconds = 1800.0
    path: str
    """Directory or hub id of an encoder, e.g. one made for sentence similarity."""
    pooling: Literal["mean", "first", "last"] = "mean"
    """What of the last hidden states is the embedding: their mean over all tokens, the first one (BERT's [CLS]) or the last one. The
    card of the model says which."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    batch_size: Resumable[int] = Field(32, ge=1)
    """Texts per forward pass."""
    max_length: int = Field(512, ge=1)
    """Longest text, in tokens; the model's own limit, if that is lower. Nothing is ever cut."""
    on_truncate: Literal["drop", "error"] = "drop"
    """What a longer one does: `drop` fails its group (counted), `error` stops the run."""

    preference_temperature: float = Field(0.05, gt=0)
    """As for every oracle. Cosines of answers to one question are close: a difference of 0.05 means odds of 2.7 to 1."""

    _model: Any = PrivateAttr(None)
    _tokenizer: Any = PrivateAttr(None)
    _limit: int = PrivateAttr(0)
    _version: str = PrivateAttr("")

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        return absolute(path, "path")

    def open(self) -> None:
        """Load model and tokenizer. Idempotent; `judge` calls it too.

        Raises:
            OracleError: if there is no encoder at `path`, or no GPU.
        """
        if self._model is not None:
            return
        from transformers import AutoModel

        device, dtype = device_and_dtype(self.device, self.dtype)
        self._tokenizer = self._read_tokenizer()
        with readable("path", self.path, "model"):
            model = AutoModel.from_pretrained(folder_of("path", self.path), dtype=dtype, use_safetensors=True)
        self._limit = min(self.max_length, getattr(model.config.get_text_config(), "max_position_embeddings", self.max_length))
        self._model = model.to(device).eval()

    def close(self) -> None:
        """Forget the model and give its memory back."""
        self._model = self._tokenizer = None

    def absent(self) -> str | None:
        """`path`, if it is a hub id that has not been downloaded."""
        return absent({"path": self.path})

    def inspect(self) -> None:
        """Read configuration and tokenizer.

        Raises:
            OracleError: if they cannot be read.
        """
        self._read_tokenizer()

    def _read_tokenizer(self) -> Any:
        from transformers import AutoConfig, AutoTokenizer

        with readable("path", self.path, "model"):
            AutoConfig.from_pretrained(folder_of("path", self.path))
            return AutoTokenizer.from_pretrained(folder_of("path", self.path))

    @property
    def version(self) -> str:
        """Hash of the model's and tokenizer's files, and of how texts are embedded."""
        if not self._version:
            said = self.model_dump(include={"pooling", "dtype", "max_length"})
            self._version = f"ref_embedding-{digest({'path': self.path}, said)}"
        return self._version

    @property
    def needs_reference_answer(self) -> bool:
        """Nothing to compare with otherwise."""
        return True

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One Verdict with K scores per query, in order; a Failure where a text is too long.

        Raises:
            OracleError: if a prompt has no reference answer, or (on_truncate: error) a text is too long.
        """
        if not queries:
            return []
        self.open()
        started = time.perf_counter()
        texts = [(self._answers(query), query.responses) for query in queries]
        rows = {text: self._tokenizer(text)["input_ids"] or [0] for both in texts for some in both for text in some}
        too_long = {text for text, tokens in rows.items() if len(tokens) > self._limit}
        known = self._embedded({text: tokens for text, tokens in rows.items() if text not in too_long})
        seconds = (time.perf_counter() - started) / len(queries)
        results: list[Verdict | Failure] = []
        for query, (answers, responses) in zip(queries, texts, strict=True):
            if too_long & {*answers, *responses}:
                results.append(self._refused(query))
                continue
            wanted, given = (np.stack([known[text] for text in some]) for some in (answers, responses))
            scores = (given @ wanted.T).max(axis=1)
            tokens = sum(len(rows[text]) for text in (*answers, *responses))
            cost = Cost(calls=len(responses), seconds=seconds, tokens=tokens)
            results.append(
                _verdicts.from_scores(scores, len(responses), annotator="ref_embedding", oracle_version=self.version, cost=cost)
            )
        return results

    def _answers(self, query: Query) -> tuple[str, ...]:
        return tuple(references(_verdicts.answer_of(query.prompt)))

    def _refused(self, query: Query) -> Failure:
        message = f"prompt {query.prompt.id!r}: a response or its reference answer has more than {self._limit} tokens"
        if self.on_truncate == "error":
            raise OracleError(message, field="oracle.max_length", fix="raise it, or set oracle.on_truncate to drop")
        return Failure(kind="refused", message=message)

    def _embedded(self, rows: dict[str, list[int]]) -> dict[str, np.ndarray]:
        """Unit vectors f64[D] of texts. Those of like length share a batch."""
        import torch

        found: dict[str, np.ndarray] = {}
        order = sorted(rows, key=lambda text: (len(rows[text]), text))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            width = max(len(rows[text]) for text in batch)
            tokens = torch.zeros((len(batch), width), dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            for i, text in enumerate(batch):
                tokens[i, : len(rows[text])], mask[i, : len(rows[text])] = torch.tensor(rows[text]), 1
            device = self._model.device
            with torch.inference_mode():
                states = (
                    self._model(input_ids=tokens.to(device), attention_mask=mask.to(device)).last_hidden_state.float().cpu()
                )
            for i, text in enumerate(batch):
                own = states[i, : len(rows[text])].double()
                vector = {"mean": own.mean(dim=0), "first": own[0], "last": own[-1]}[self.pooling].numpy()
                found[text] = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return found
