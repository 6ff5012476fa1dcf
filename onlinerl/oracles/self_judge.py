"""The policy itself as the judge: it is asked which of two responses is better, in both orders, and what counts is how probable each answer is.

L_raw[i][j] = log p(A) - log p(B) at the position where the answer begins, response i shown as A; P = sigmoid((L_raw - L_raw^T) / 2) has no position
bias that adds to the log-odds. Nothing is sampled, and nothing has to be parsed.

Source: "Online Self-Preferring Language Models" (OSP, arXiv 2405.14103), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import PrivateAttr, field_validator, model_validator

from onlinerl.errors import ConfigError, OracleError
from onlinerl.oracles import _verdicts
from onlinerl.oracles._judge import templates
from onlinerl.oracles._log_probs import LogProbs, Row, begun
from onlinerl.oracles._model_files import absolute
from onlinerl.types import Cost, Failure, Prompt, Query, Verdict

ANSWER = "\n\nAnswer:"
"""Ends the question to a model without chat template; a space and the answer follow."""
TRIAL = Prompt(id="trial", text="What is 2 + 2?", token_ids=())


class SelfJudge(LogProbs):
    """Compares each pair of responses in both orders, in K (K - 1) forward passes of a frozen snapshot of the policy; it gives no scores."""

    judge_version: Literal["initial", "iteration_start"] = "initial"
    """Which snapshot: the model that the run begins with, or the iterate that each iteration samples from, so that the judge is another one
    in each iteration."""
    path: str | None = None
    """With `initial`: directory or hub id of another snapshot; the run's `model` by default."""
    labels: tuple[str, str] = ("A", "B")
    """What the model answers if the first response is better, and if the second is; each has to be one token of its tokenizer."""
    rubric: str | None = None
    """What to judge by: a text, or a file. The default is `COMPARE` in onlinerl/oracles/_judge/templates.py."""
    template: str | None = None
    """The whole question, with its places: a text, or a file. The default is `PAIR` in the same file."""
    reference: bool = True
    """Whether the judge is shown the reference answer of a prompt that has one."""

    _read: dict[str, str] = PrivateAttr(default_factory=dict)
    _answers: dict[str, tuple[int, int]] = PrivateAttr(default_factory=dict)

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        return None if path is None else absolute(path, "path")

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, str]) -> tuple[str, str]:
        if len(set(labels)) < 2 or any(not label or label != label.strip() for label in labels):
            raise ValueError("holds two different words without spaces around them, such as A and B")
        return labels

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.path is not None and self._moves:
            raise ConfigError(
                "is read with oracle.judge_version=initial; with iteration_start the run's own iterates judge",
                field="oracle.path",
                fix="leave one of both out",
            )
        for name in ("rubric", "template"):  # by their whole paths: a resume may start in another working directory
            self.__dict__[name] = templates.absolute(getattr(self, name), f"oracle.{name}")
        templates.require_places(self._words["template"], ("response_a", "response_b"))
        return self

    @property
    def compares(self) -> bool:
        """It gives no scores."""
        return True

    @property
    def _moves(self) -> bool:
        return self.judge_version == "iteration_start"

    @property
    def _annotator(self) -> str:
        return f"self_judge:{Path(self._own(self.path, 'path')).name}"

    def _models(self) -> dict[str, str]:
        return {"path": self._reloaded or self._own(self.path, "path")}

    def _identity(self) -> Mapping[str, Any]:
        return {"words": sorted(self._words.items()), "labels": self.labels, "reference": self.reference}

    @property
    def _words(self) -> Mapping[str, str]:
        """Template and rubric: read once, whatever becomes of the files."""
        if not self._read:
            for name, default in (("template", templates.PAIR), ("rubric", templates.COMPARE)):
                said = getattr(self, name)
                self._read[name] = default if said is None else templates.text_or_file(said, f"oracle.{name}")
        return self._read

    # --- the question ---

    def _tokenizers(self) -> dict[str, Any]:
        """That of the model, which has to know both answers.

        Raises:
            OracleError: if it cannot be read, or an answer is not one token.
        """
        found = super()._tokenizers()
        self._answers["path"] = self._tokens_of_answers(found["path"])
        return found

    def _tokens_of_answers(self, tokenizer: Any) -> tuple[int, int]:
        text, templated = self._question(tokenizer, TRIAL, "4", "5"), bool(tokenizer.chat_template)
        before = begun(tokenizer, text, templated=templated)

        def behind(gap: str, label: str) -> int | None:
            """The token, if it is one."""
            *rest, last = begun(tokenizer, text + gap + label, templated=templated)
            return last if rest == before and last != tokenizer.unk_token_id else None

        # A template ends where the answer begins, but for one whose tokenizer wants words apart.
        for gap in ("", " ") if templated else (" ", ""):
            first, second = (behind(gap, label) for label in self.labels)
            if first is not None and second is not None and first != second:
                return first, second
        raise OracleError(
            f"{' or '.join(map(repr, self.labels))} is not one token of {self._models()['path']} behind the question, and the judge's answer is read "
            "from the probability of one token",
            field="oracle.labels",
            fix="give two words that are one token each, e.g. [A, B], ['1', '2'] or [first, second]",
        )

    def _question(self, tokenizer: Any, prompt: Prompt, first: str, second: str) -> str:
        """As the model reads it, up to where its answer begins."""
        yes, no = self.labels
        text = templates.filled(
            self._words["template"],
            {
                "rubric": self._words["rubric"],
                "prompt": templates.shown(prompt),
                "reference": templates.reference_block(prompt.reference_answer if self.reference else None),
                "response_a": templates.escaped(first),
                "response_b": templates.escaped(second),
                "form": f'Answer with "{yes}" if the first response is better, with "{no}" if the second is, and with nothing else.',
            },
        )
        if not tokenizer.chat_template:
            return text + ANSWER
        turns = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def _asked(self, query: Query) -> list[list[tuple[str, Row]]]:
        """One row for each pair in each order."""
        tokenizer, asked = self._loaded["path"][1], list[list[tuple[str, Row]]]()
        for first, second in permutations(query.responses, 2):
            text = self._question(tokenizer, query.prompt, first, second)
            context = begun(tokenizer, text, templated=bool(tokenizer.chat_template))
            asked.append([("path", Row(tuple(context), choices=self._answers["path"]))])
        return asked

    def _verdict(self, query: Query, said: Sequence[Sequence[np.ndarray]], cost: Cost) -> Verdict | Failure:
        """Cell [i][j] is the log-odds that i wins, shown first; both orders are kept."""
        count = len(query.responses)
        odds = np.full((count, count), np.nan)
        for (i, j), (logprobs,) in zip(permutations(range(count), 2), said, strict=True):
            odds[i, j] = logprobs[0] - logprobs[1]
        return _verdicts.from_log_odds(odds, count, annotator=self._annotator, oracle_version=self.version, cost=cost)
