"""What oracles share that ask causal language models how probable a text is: loading, batches, limits, identity.

Each model reads text through its own tokenizer and chat template, never the policy's. A prompt and what follows it are tokenised apart, as
where a policy goes on after a prompt. Rows are padded on the left, so that logits are computed of the scored tokens alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, PrivateAttr

from onlinerl.errors import OracleError
from onlinerl.oracles import _verdicts
from onlinerl.oracles._model_files import absent, device_and_dtype, digest, folder_of, readable
from onlinerl.protocols.keys import Resumable, Seconds
from onlinerl.protocols.oracle import ModelOracle
from onlinerl.types import Cost, Failure, Message, Query, Verdict

if TYPE_CHECKING:
    from onlinerl.protocols.refreshing import Reloads


class Row(NamedTuple):
    """One text for one model."""

    context: tuple[int, ...]
    scored: tuple[int, ...] = ()
    choices: tuple[int, ...] = ()
    """Tokens that may follow the context, in a row without scored ones: the log-prob of each is asked for."""


class LogProbs(ModelOracle):
    """Scores from the log-probs of language models. A subclass says which models, what they read, and what their log-probs mean."""

    groups_per_call: int = Field(16, ge=1)  # fills its batches, and asking again costs no money
    call_timeout_s: Seconds = 1800.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    batch_size: Resumable[int] = Field(8, ge=1)
    """Texts per forward pass."""
    max_length: int = Field(4096, ge=1)
    """Longest text, in tokens; a model's own limit, if that is lower. Nothing is ever cut."""
    on_truncate: Literal["drop", "error"] = "drop"
    """What a longer one does: `drop` fails its group (counted), `error` stops the run."""

    _loaded: dict[str, tuple[Any, Any]] = PrivateAttr(default_factory=dict)
    _version: str = PrivateAttr("")
    _policy: str | None = PrivateAttr(None)
    """The model that the run begins with."""
    _reloaded: str | None = PrivateAttr(None)
    """Directory of the iterate that has taken its place."""

    # --- what a subclass says for itself ---

    def _models(self) -> dict[str, str]:
        """Directories or hub ids, by the key that names each."""
        raise NotImplementedError

    def _asked(self, query: Query) -> list[list[tuple[str, Row]]]:
        """What is asked about a group: lists of which model, by its key, and about which text; here one list for each response."""
        return [self._rows(query, response) for response in query.responses]

    def _verdict(self, query: Query, said: Sequence[Sequence[np.ndarray]], cost: Cost) -> Verdict | Failure:
        """What the log-probs f64[tokens] of the rows of `_asked` mean; here a score for each response."""
        scores = [self._score(each) for each in said]
        return _verdicts.from_scores(scores, len(scores), annotator=self._annotator, oracle_version=self.version, cost=cost)

    def _rows(self, query: Query, response: str) -> list[tuple[str, Row]]:
        """What is asked about a response: which model, by its key, and about which text."""
        raise NotImplementedError

    def _score(self, logprobs: Sequence[np.ndarray]) -> float:
        """The score of a response from the log-probs f64[tokens] of its rows, in the order of `_rows`."""
        raise NotImplementedError

    @property
    def _annotator(self) -> str:
        return f"{type(self).__module__.rpartition('.')[2]}:{Path(next(iter(self._models().values()))).name}"

    @property
    def _moves(self) -> bool:
        """Whether one of its models is the iterate that an iteration samples from."""
        return False

    def _identity(self) -> Mapping[str, Any]:
        """What else could change a verdict."""
        raise NotImplementedError

    # --- which weights ---

    def of_policy(self, model: str) -> Self:
        """The same for a run that begins with this model."""
        found = self.model_copy()
        found._policy = model
        return found

    @property
    def following(self) -> Reloads | None:
        """Itself, if one of its models is the iterate that an iteration samples from."""
        return self if self._moves else None

    def reload(self, path: str) -> None:
        """Take this iterate for that; it is read when it is needed. The version is another one."""
        self.close()
        self._reloaded, self._version = path, ""

    def _own(self, path: str | None, key: str) -> str:
        """A path; where none is given, the model of the run.

        Raises:
            OracleError: if there is no run.
        """
        found = path or self._policy
        if found is None:
            raise OracleError(
                "is the model of the run by default, and there is no run here",
                field=f"oracle.{key}",
                fix="give a directory or hub id",
            )
        return found

    # --- loading ---

    def open(self) -> None:
        """Load models and tokenizers. Idempotent; `judge` calls it too.

        Raises:
            OracleError: if one is not there or no language model, tokenizers do not go together, or there is no GPU.
        """
        if self._loaded:
            return
        from transformers import AutoModelForCausalLM

        device, dtype = device_and_dtype(self.device, self.dtype)
        tokenizers = self._tokenizers()
        loaded: dict[str, tuple[Any, Any]] = {}
        for key, path in self._models().items():
            with readable(key, path):
                model, report = AutoModelForCausalLM.from_pretrained(
                    folder_of(key, path), dtype=dtype, use_safetensors=True, output_loading_info=True
                )
            if report["missing_keys"]:  # transformers would make them up at random
                raise OracleError(
                    f"{path} lacks trained weights for {', '.join(sorted(report['missing_keys']))}",
                    field=f"oracle.{key}",
                    fix="give a trained language model; a reward model has no such head",
                )
            loaded[key] = (model.to(device).eval(), tokenizers[key])
        self._loaded.update(loaded)

    def close(self) -> None:
        """Forget the models and give their memory back."""
        self._loaded.clear()

    def absent(self) -> str | None:
        """The first hub id that has not been downloaded."""
        return absent(self._models())

    def inspect(self) -> None:
        """Read configurations and tokenizers.

        Raises:
            OracleError: if one cannot be read, or tokenizers do not go together.
        """
        self._tokenizers()

    def _tokenizers(self) -> dict[str, Any]:
        from transformers import AutoConfig, AutoTokenizer

        found: dict[str, Any] = {}
        for key, path in self._models().items():
            with readable(key, path):
                AutoConfig.from_pretrained(folder_of(key, path))
                found[key] = AutoTokenizer.from_pretrained(folder_of(key, path))
        (first, one), *others = found.items()
        for key, other in others:
            if other.get_vocab() != one.get_vocab():
                raise OracleError(
                    f"{self._models()[key]} has other tokens than {self._models()[first]}, and their log-probs are compared token by token",
                    field=f"oracle.{key}",
                    fix="give models with the same tokenizer",
                )
        return found

    @property
    def version(self) -> str:
        """Hash of the models' and tokenizers' files, and of how they are asked. Of a large file, evenly spread samples."""
        if not self._version:
            said = {"dtype": self.dtype, "max_length": self.max_length, **self._identity()}
            self._version = f"{type(self).__module__.rpartition('.')[2]}-{digest(self._models(), said)}"
        return self._version

    # --- tokens ---

    def _context(self, key: str, query: Query, *, before: str | None = None, after: Sequence[Message] = ()) -> str:
        """The prompt as a model reads it, up to where a response begins or, of a conversation with turns `after` it, where they end.

        Args:
            key: of the model.
            query: with the prompt.
            before: a system message, or a text, that comes first.
            after: further turns.
        """
        tokenizer, prompt = self._loaded[key][1], query.prompt
        if not prompt.messages:
            return prompt.text if before is None else f"{before}\n\n{prompt.text}"
        if not tokenizer.chat_template:
            raise OracleError(
                f"prompt {prompt.id!r} is a conversation, but {self._models()[key]} has no chat template",
                field=f"oracle.{key}",
                fix="use a model with a chat template, or prompts with plain text",
            )
        turns = [*prompt.messages, *after]
        if before is not None and turns[0].role == "system":
            turns[0] = Message(role="system", content=f"{before}\n\n{turns[0].content}")
        elif before is not None:
            turns.insert(0, Message(role="system", content=before))
        said = [{"role": turn.role, "content": turn.content} for turn in turns]
        return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=not after))

    def _row(self, key: str, query: Query, context: str, text: str, *, ends: bool) -> Row:
        """Tokens of both; the text, where it `ends`, with the end-of-sequence token."""
        tokenizer = self._loaded[key][1]
        before = begun(tokenizer, context, templated=bool(query.prompt.messages))
        scored = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ends and tokenizer.eos_token_id is not None:
            scored = [*scored, tokenizer.eos_token_id]
        return Row(tuple(before), tuple(scored))

    # --- judging ---

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One Verdict per query, in order; a Failure where a text is too long.

        Raises:
            OracleError: if a chat prompt meets a model without chat template, or (on_truncate: error) one is too long.
        """
        self.open()
        started = time.perf_counter()
        asked = [self._asked(query) for query in queries]
        too_long = [self._too_long(query, rows) for query, rows in zip(queries, asked, strict=True)]
        judged = [rows for rows, failure in zip(asked, too_long, strict=True) if failure is None]
        logprobs = self._all(pair for rows in judged for each in rows for pair in each)
        seconds = (time.perf_counter() - started) / max(1, len(judged))
        results: list[Verdict | Failure] = []
        for query, rows, failure in zip(queries, asked, too_long, strict=True):
            if failure is not None:
                results.append(failure)
                continue
            said = [[next(logprobs) for _ in each] for each in rows]
            pairs = [pair for each in rows for pair in each]
            tokens = sum(len(row.context) + len(row.scored) for _, row in pairs)
            results.append(self._verdict(query, said, Cost(calls=len(pairs), seconds=seconds, tokens=tokens)))
        return results

    def _too_long(self, query: Query, rows: Sequence[Sequence[tuple[str, Row]]]) -> Failure | None:
        for key, row in (pair for each in rows for pair in each):
            config = self._loaded[key][0].config.get_text_config()
            limit = min(self.max_length, getattr(config, "max_position_embeddings", self.max_length))
            if (length := len(row.context) + len(row.scored)) > limit:
                message = f"prompt {query.prompt.id!r} with its longest response has {length} tokens or more, more than {limit}"
                if self.on_truncate == "error":
                    raise OracleError(message, field="oracle.max_length", fix="raise it, or set oracle.on_truncate to drop")
                return Failure(kind="refused", message=message)
        return None

    def _all(self, pairs: Iterable[tuple[str, Row]]) -> Iterator[np.ndarray]:
        """Log-probs f64[tokens] of the scored tokens of each row, in order. The same row is computed once; rows of like length share a
        batch."""
        asked = list(pairs)
        known: dict[tuple[str, Row], np.ndarray] = {}
        for key in self._models():
            todo = sorted({row for one, row in asked if one == key}, key=lambda row: (len(row.context) + len(row.scored), row))
            for start in range(0, len(todo), self.batch_size):
                batch = todo[start : start + self.batch_size]
                known |= {(key, row): found for row, found in zip(batch, self._forward(key, batch), strict=True)}
        return (known[pair] for pair in asked)

    def _forward(self, key: str, rows: Sequence[Row]) -> list[np.ndarray]:
        import torch

        model = self._loaded[key][0]
        width, scored = max(len(r.context) + len(r.scored) for r in rows), max(len(r.scored) for r in rows)
        tokens = torch.zeros((len(rows), width), dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):
            both = torch.tensor(row.context + row.scored)
            tokens[i, width - len(both) :], mask[i, width - len(both) :] = both, 1
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        device = model.device
        with torch.inference_mode():
            logits = model(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                logits_to_keep=scored + 1,
                use_cache=False,
            ).logits
            found = []
            for i, row in enumerate(rows):  # one at a time: a table of all in float32 is large
                if row.choices:
                    found.append(logits[i, -1].double().log_softmax(dim=0)[list(row.choices)].cpu().numpy())
                    continue
                n = len(row.scored)
                own = logits[i, -n - 1 : -1].float() if n else logits[i, :0].float()
                chosen = own.gather(1, torch.tensor(row.scored, device=device, dtype=torch.int64)[:, None])[:, 0]
                found.append((chosen - own.logsumexp(dim=1)).double().cpu().numpy())
        return found


def begun(tokenizer: Any, context: str, *, templated: bool) -> list[int]:
    """Tokens of what stands before something whose log-prob is asked for, one at least: the first token of a sequence has none.

    Args:
        tokenizer: of the model.
        context: the text.
        templated: whether a chat template has written it, and so what a sequence begins with.
    """
    before: list[int] = tokenizer(context, add_special_tokens=not templated)["input_ids"]
    end = tokenizer.eos_token_id
    while not templated and before and before[-1] == end and end != tokenizer.bos_token_id:
        before = before[:-1]  # some tokenizers end everything
    if not before:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
        before = [0 if first is None else first]
    return before
