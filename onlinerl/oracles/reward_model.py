"""Scores from any Hugging Face sequence classifier with one label.

The reward model reads text through its own tokenizer and chat template, never the policy's. Padding is on the right with a
token that occurs nowhere in the batch, so that the model's "last token that is not padding" is the true last one even where the
tokenizer pads with end-of-sequence.

Source: Skywork-Reward-V2 (sequence classifier, scalar at the last token).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator

from onlinerl import hub
from onlinerl.config import at_home
from onlinerl.errors import OracleError
from onlinerl.oracles import _verdicts
from onlinerl.protocols.keys import Resumable, Seconds
from onlinerl.protocols.oracle import ModelOracle
from onlinerl.types import Cost, Failure, Query, Verdict, derive_seed
from onlinerl.types.labels import induced

_HASH_BLOCKS, _HASH_BLOCK_BYTES = 64, 64 * 1024
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


class RewardModel(ModelOracle):
    """Scores prompt and response with a reward model."""

    groups_per_call: int = Field(16, ge=1)  # fills its batches, and asking again costs no money
    call_timeout_s: Seconds = 1800.0
    path: str
    """Directory of the model and its tokenizer, or a Hugging Face hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    batch_size: Resumable[int] = Field(32, ge=1)
    """Responses per forward pass."""
    max_length: int = Field(4096, ge=1)
    """Longest prompt and response together, in tokens of the reward model; its own limit, if that is lower. Nothing is ever cut."""
    on_truncate: Literal["drop", "error"] = "drop"
    """What a longer one does: `drop` fails its group (counted), `error` stops the run."""

    dropout_passes: int = Field(0, ge=0)
    """So many further passes with dropout (T; 10 in "Self-Evolutionary Large Language Models through Uncertainty-Enhanced Preference
    Optimization") say how uncertain each comparison is; 0 asks none. They cost as much as the scores each, and of one model they are a weak
    substitute for several."""
    dropout: float | None = Field(None, gt=0, lt=1)
    """Rate of those passes; None is what the model was trained with."""

    _model: Any = PrivateAttr(None)
    _tokenizer: Any = PrivateAttr(None)
    _limit: int = PrivateAttr(0)
    _version: str = PrivateAttr("")

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        folder = at_home(path, "oracle.path")
        return str(folder.absolute()) if folder.is_dir() else path  # a resume may start in another working directory

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

    def open(self) -> None:
        """Load model and tokenizer. Idempotent; `judge` calls it too.

        Raises:
            OracleError: if there is no model at `path`, it has not exactly one label or no trained head, or there is no GPU.
        """
        if self._model is not None:
            return
        import torch
        from transformers import AutoModelForSequenceClassification

        if self.device == "cuda" and not torch.cuda.is_available():
            raise OracleError("there is no GPU here", field="oracle.device", fix="set oracle.device to cpu or auto")
        device = "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"
        dtype = {"cpu": "float32", "cuda": "bfloat16"}[device] if self.dtype == "auto" else self.dtype
        folder, tokenizer = self._folder(), self._read_tokenizer()
        with self._readable():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **self._rates(folder)
            )
        if report["missing_keys"]:  # transformers would make them up at random
            raise OracleError(
                f"{self.path} lacks trained weights for {', '.join(sorted(report['missing_keys']))}",
                field="oracle.path",
                fix="give a trained reward model; a language model has no reward head",
            )
        self._tokenizer = tokenizer
        self._model = model.to(device).eval()
        self._limit = min(self.max_length, getattr(model.config.get_text_config(), "max_position_embeddings", self.max_length))

    def absent(self) -> str | None:
        """`path`, if it is a hub id that has not been downloaded."""
        return self.path if hub.is_id(self.path) and hub.local(self.path) is None else None

    def inspect(self) -> None:
        """Read configuration and tokenizer.

        Raises:
            OracleError: if there is no model at `path`, or it has not exactly one label.
        """
        self._read_tokenizer()

    def _rates(self, folder: Path) -> dict[str, float]:
        """What the model's configuration says of dropout, with the rate that is asked for; nothing where no pass has any.

        Raises:
            OracleError: if passes with dropout would all be the same.
        """
        if not self.dropout_passes:
            return {}
        from transformers import AutoConfig

        with self._readable():
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

    def _read_tokenizer(self) -> Any:
        """The tokenizer of a model that its configuration says is a reward model."""
        from transformers import AutoConfig, AutoTokenizer

        folder = self._folder()
        self._rates(folder)
        with self._readable():
            labels = AutoConfig.from_pretrained(folder).num_labels
            tokenizer = AutoTokenizer.from_pretrained(folder)
        if labels != 1:
            raise OracleError(
                f"{self.path} has {labels} labels; a reward model has one",
                field="oracle.path",
                fix="give a reward model, i.e. a sequence classifier with num_labels=1",
            )
        return tokenizer

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise OracleError(
                f"cannot load a sequence classifier and its tokenizer from {self.path}: {error}",
                field="oracle.path",
                fix="give a directory that save_pretrained wrote for model and tokenizer, with safetensors weights",
            ) from error

    def close(self) -> None:
        """Forget the model and give its memory back."""
        self._model = self._tokenizer = None

    @property
    def version(self) -> str:
        """Hash of the model's and tokenizer's files, and of dtype and length limit. Of a large file, evenly spread samples."""
        if not self._version:
            passes = f"\0{self.dropout_passes}\0{self.dropout}" if self.dropout_passes else ""
            digest = hashlib.sha256(f"{self.dtype}\0{self.max_length}{passes}".encode())
            folder = self._folder()
            for file in sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)}):
                size = file.stat().st_size
                digest.update(f"\0{file.name}\0{size}\0".encode())
                for block in _samples(file, size):
                    digest.update(block)
            self._version = f"{Path(self.path).name}-{digest.hexdigest()[:12]}"
        return self._version

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One Verdict with K scores (the model's logit) per query, in order.

        Raises:
            OracleError: if a chat prompt meets a reward model without chat template, or (on_truncate: error) one is too long.
        """
        self.open()
        started = time.perf_counter()
        encoded = [[self._encode(query, response) for response in query.responses] for query in queries]
        too_long = [self._too_long(query, rows) for query, rows in zip(queries, encoded, strict=True)]
        rows = [row for group, failure in zip(encoded, too_long, strict=True) if failure is None for row in group]
        scores = iter(self._score(rows))
        passes = [iter(self._dropped_out(rows, number)) for number in range(self.dropout_passes)]
        seconds = (time.perf_counter() - started) / max(len(rows), 1)
        results: list[Verdict | Failure] = []
        for group, failure in zip(encoded, too_long, strict=True):
            if failure is not None:
                results.append(failure)
                continue
            calls = len(group) * (1 + self.dropout_passes)
            tokens = sum(len(row) for row in group) * (1 + self.dropout_passes)
            verdict = _verdicts.from_scores(
                [next(scores) for _ in group],
                len(group),
                annotator=f"reward_model:{Path(self.path).name}",
                oracle_version=self.version,
                cost=Cost(calls=calls, seconds=seconds * len(group), tokens=tokens),
            )
            members = [induced(tuple(next(one) for _ in group), self.preference_temperature) for one in passes]
            if isinstance(verdict, Verdict) and members:
                verdict = replace(verdict, uncertainty=_verdicts.nats_of(members))
            results.append(verdict)
        return results

    def _dropped_out(self, rows: Sequence[list[int]], number: int) -> list[float]:
        """The scores of one pass with dropout; which units drop out follows from the number of the pass and what is judged."""
        import torch

        device = self._model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed("dropout", number, rows))
            self._model.train()
            try:
                return self._score(rows)
            finally:
                self._model.eval()

    def _folder(self) -> Path:
        if Path(self.path).is_dir():
            return Path(self.path)
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.path, allow_patterns=list(_MODEL_FILES)))
        except (OSError, ValueError) as error:  # bad ids, network errors and missing repositories are all one of these
            raise OracleError(
                f"{self.path!r} is neither a directory nor a model that can be downloaded: {error}",
                field="oracle.path",
                fix="check the path; relative paths start where onlinerl was started, and a hub id is fetched first with "
                f"`hf download {self.path}`",
            ) from error

    def _encode(self, query: Query, response: str) -> list[int]:
        """Tokens of prompt and response as the reward model wants to see them."""
        tokenizer = self._tokenizer
        if not query.prompt.messages:
            tokens = tokenizer(query.prompt.text + response, add_special_tokens=True)["input_ids"]
        elif not tokenizer.chat_template:
            raise OracleError(
                f"prompt {query.prompt.id!r} is a conversation, but {self.path} has no chat template",
                field="oracle.path",
                fix="use a reward model with a chat template, or prompts with plain text",
            )
        else:
            messages = [{"role": message.role, "content": message.content} for message in query.prompt.messages]
            messages.append({"role": "assistant", "content": response})
            tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        if tokenizer.bos_token_id is not None and list(tokens[:2]) == [tokenizer.bos_token_id] * 2:
            raise OracleError(  # it shifts scores silently
                f"the chat template of {self.path} starts prompt {query.prompt.id!r} with two {tokenizer.bos_token} tokens",
                field="oracle.path",
                fix="remove one from the chat template or from the tokenizer's post-processor",
            )
        return list(tokens)

    def _too_long(self, query: Query, rows: Sequence[Sequence[int]]) -> Failure | None:
        longest = max((len(row) for row in rows), default=0)
        if longest <= self._limit:
            return None
        message = f"prompt {query.prompt.id!r} with its longest response has {longest} tokens, more than {self._limit}"
        if self.on_truncate == "error":
            raise OracleError(message, field="oracle.max_length", fix="raise it, or set oracle.on_truncate to drop")
        return Failure(kind="refused", message=message)

    def _score(self, rows: Sequence[list[int]]) -> list[float]:
        """The model's logit for each row of tokens, in order. Rows of like length share a batch."""
        scores = [float("nan")] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            for index, score in zip(indices, self._forward([rows[index] for index in indices]), strict=True):
                scores[index] = score
        return scores

    def _forward(self, rows: Sequence[list[int]]) -> list[float]:
        """The model's logit for each row of one batch."""
        import torch

        used = {token for row in rows for token in row}
        vocabulary = self._model.get_input_embeddings().num_embeddings
        padding = next((token for token in range(vocabulary) if token not in used), None)
        if padding is None and len(rows) > 1:  # a tiny vocabulary, used up by the batch
            return [score for row in rows for score in self._forward([row])]
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
        scores: list[float] = logits.float().reshape(-1).tolist()
        return scores


def _samples(file: Path, size: int) -> Iterator[bytes]:
    """The whole of a small file, evenly spread blocks of a large one."""
    if size <= _HASH_BLOCKS * _HASH_BLOCK_BYTES:
        yield file.read_bytes()
        return
    with file.open("rb") as stream:
        for block in range(_HASH_BLOCKS):
            stream.seek(block * (size - _HASH_BLOCK_BYTES) // (_HASH_BLOCKS - 1))
            yield stream.read(_HASH_BLOCK_BYTES)
