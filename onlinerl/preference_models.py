"""What a trained reward or preference model reads and what its outputs mean: said once for who trains one and who asks one.

All of them are Hugging Face sequence classifiers, read at the last token. Their `config.json` says under `preference_model` which objective
they were trained with; a classifier of other people that has no such entry is a Bradley-Terry reward model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from onlinerl.types import Message

KEY = "preference_model"
"""Of the model's `config.json`."""
BRADLEY_TERRY, GENERAL, PAIRWISE = "bradley_terry", "general_preference", "pairwise"
"""Objectives, as `KEY` names them."""


class RewardHead(NamedTuple):
    """What is read at the last token of a sequence; `Needs.reward_head` as a tuple with names."""

    outputs: int
    """D: how many numbers."""
    description: dict[str, Any]
    """What the exported model says of them, under `KEY`."""


class Asked(Protocol):
    """A prompt: a text that is continued, or messages that are answered."""

    @property
    def id(self) -> str:
        """For messages."""
        ...

    @property
    def text(self) -> str:
        """To continue."""
        ...

    @property
    def messages(self) -> tuple[Message, ...]:
        """To answer; empty where there is a text."""
        ...


class Unreadable(ValueError):
    """The model's tokenizer cannot lay out what it is to read: `cause` and `fix`."""

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause)
        self.cause, self.fix = cause, fix


def objective_of(config: Mapping[str, Any]) -> str:
    """What a model was trained with, from its configuration as plain data."""
    said = config.get(KEY)
    return str(said.get("objective")) if isinstance(said, Mapping) else BRADLEY_TERRY


def single(tokenizer: Any, prompt: Asked, response: str, model: str) -> list[int]:
    """Tokens of a prompt with one response, through the model's own chat template where the prompt is a conversation.

    Args:
        tokenizer: the model's.
        prompt, response: what is judged.
        model: its path, for messages.

    Raises:
        Unreadable: if there is no chat template for a conversation, or it doubles the beginning-of-sequence token.
    """
    if not prompt.messages:
        return _checked(tokenizer, tokenizer(prompt.text + response, add_special_tokens=True)["input_ids"], prompt, model)
    turns = [{"role": each.role, "content": each.content} for each in prompt.messages]
    return _templated(tokenizer, [*turns, {"role": "assistant", "content": response}], prompt, model, answer=False)


def compared(tokenizer: Any, prompt: Asked, first: str, second: str, model: str) -> list[int]:
    """Tokens of a prompt with two responses, laid out as by RLHFlow's pair-preference models ("RLHF Workflow: From Reward Modeling to Online
    RLHF"): one user message that ends where a judge would begin to answer.

    Raises:
        Unreadable: see `single`.
    """
    text = f"[CONTEXT] {context(prompt)} [RESPONSE A] {first} [RESPONSE B] {second} \n"
    if not prompt.messages:
        return _checked(tokenizer, tokenizer(text, add_special_tokens=True)["input_ids"], prompt, model)
    return _templated(tokenizer, [{"role": "user", "content": text}], prompt, model, answer=True)


def context(prompt: Asked) -> str:
    """A prompt as one text: a conversation of one turn is what was said, a longer one says who said it."""
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n\n".join(f"{each.role}: {each.content}" for each in prompt.messages) or prompt.text


def advantages(embeddings: np.ndarray) -> np.ndarray:
    """S[i, j] = (R v_i) . v_j of embeddings v [K, 2k], R block-diagonal of [[0, -1], [1, 0]]: antisymmetric, [K, K].

    "General Preference Modeling with Preference Representations for Aligning Language Models" (arXiv 2410.02197), section 4.
    """
    v = np.asarray(embeddings, dtype=np.float64)
    half: np.ndarray = v[:, 0::2] @ v[:, 1::2].T
    table: np.ndarray = half - half.T
    return table


def _templated(tokenizer: Any, turns: Sequence[Mapping[str, str]], prompt: Asked, model: str, *, answer: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise Unreadable(
            f"prompt {prompt.id!r} is a conversation, but {model} has no chat template",
            "use a reward model with a chat template, or prompts with plain text",
        )
    tokens = tokenizer.apply_chat_template(list(turns), tokenize=True, return_dict=False, add_generation_prompt=answer)
    return _checked(tokenizer, tokens, prompt, model)


def _checked(tokenizer: Any, tokens: Sequence[int], prompt: Asked, model: str) -> list[int]:
    if tokenizer.bos_token_id is not None and list(tokens[:2]) == [tokenizer.bos_token_id] * 2:  # it shifts scores silently
        raise Unreadable(
            f"the chat template of {model} starts prompt {prompt.id!r} with two {tokenizer.bos_token} tokens",
            "remove one from the chat template or from the tokenizer's post-processor",
        )
    return list(tokens)
