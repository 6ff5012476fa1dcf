"""Prompts that tell the model which score its response shall have, or how it will be judged.

Sources: "Reward-Augmented Data Enhances Direct Preference Alignment of LLMs" (arXiv 2410.08067); "Directional Preference Alignment" (arXiv
2402.18571).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from onlinerl.errors import PromptError
from onlinerl.prompts._rendering import render
from onlinerl.types import Message, Prompt, RawPrompt
from onlinerl.types.directions import Directions
from onlinerl.types.goals import Goals


def with_goals(
    prompts: Sequence[Prompt],
    raw: Sequence[RawPrompt],
    tokenizer: Any,
    goals: Goals,
    max_tokens: int,
    field: str,
    *,
    trained: bool,
    leave_out_long: bool = False,
) -> list[Prompt]:
    """Prompts whose tokens hold the highest goal, which is the one that is asked for. Texts and messages, which oracles read, stay as they are.

    Args:
        prompts: rendered, in the order of `raw`.
        raw: what they were made of.
        tokenizer: the policy's.
        goals: how a goal is said.
        max_tokens: longest prompt accepted, its goal included.
        field: the configuration key that named the file, for messages.
        trained: whether each goal is trained on, so that all of them are kept.
        leave_out_long: leave out those that are too long with one of the goals.

    Raises:
        PromptError: if a prompt is too long with its goal, or the chat template leaves the goal out.
    """
    asked = range(1, goals.scale + 1) if trained else (1, goals.scale)
    columns = [
        _ids([_conditioned(one, goals.said(goal), goals.place) for one in raw], tokenizer, max_tokens, field, leave_out_long)
        for goal in asked
    ]
    conditioned = []
    for prompt in prompts:
        ids = tuple(column[prompt.id] for column in columns if prompt.id in column)
        if len(ids) < len(columns):
            continue
        if len({*ids}) < len(ids):
            raise PromptError(
                f"prompt {prompt.id!r} has the same tokens with different goals",
                field=field,
                fix="the chat template leaves the system turn out: set algorithm.goal_place=user",
            )
        conditioned.append(replace(prompt, token_ids=ids[-1], goal_ids=ids if trained else ()))
    return conditioned


def with_directions(
    prompts: Sequence[Prompt],
    raw: Sequence[RawPrompt],
    tokenizer: Any,
    directions: Directions,
    max_tokens: int,
    field: str,
    *,
    leave_out_long: bool = False,
) -> list[Prompt]:
    """Prompts whose tokens hold the direction in which their responses will be judged. Texts and messages, which oracles read, stay as they are.

    Args:
        prompts: rendered, in the order of `raw`.
        raw: what they were made of.
        tokenizer: the policy's.
        directions: how a direction is drawn and said.
        max_tokens: longest prompt accepted, its direction included.
        field: the configuration key that named the file, for messages.
        leave_out_long: leave out those that are too long with their direction.

    Raises:
        PromptError: if a prompt is too long with its direction, or the chat template leaves the direction out.
    """
    said = [_conditioned(one, directions.said(one.id), directions.place) for one in raw]
    ids = _ids(said, tokenizer, max_tokens, field, leave_out_long)
    for prompt in prompts:
        if ids.get(prompt.id) == prompt.token_ids:
            raise PromptError(
                f"prompt {prompt.id!r} has the same tokens with its direction and without",
                field=field,
                fix="the chat template leaves the system turn out: set oracle.direction_place=user",
            )
    return [replace(prompt, token_ids=ids[prompt.id]) for prompt in prompts if prompt.id in ids]


def _ids(
    raw: Sequence[RawPrompt], tokenizer: Any, max_tokens: int, field: str, leave_out_long: bool
) -> dict[str, tuple[int, ...]]:
    """What the model sees, by the prompt's id."""
    return {one.id: one.token_ids for one in render(raw, tokenizer, max_tokens, field, leave_out_long=leave_out_long)}


def told(raw: RawPrompt, goals: Goals | None, directions: Directions | None) -> Iterator[RawPrompt]:
    """A prompt as it is, and as somebody would have written it who knows what else it tells the model."""
    yield raw
    if directions is not None:
        yield _conditioned(raw, directions.said(raw.id), directions.place)
    if goals is not None:
        yield from (_conditioned(raw, goals.said(goal), goals.place) for goal in range(1, goals.scale + 1))


def _conditioned(raw: RawPrompt, said: str, place: str) -> RawPrompt:
    """The prompt as somebody would have written it who knows the goal, or the direction."""
    if not raw.messages:
        return replace(raw, text=f"{said}\n\n{raw.text}")
    turns = list(raw.messages)
    roles = [turn.role for turn in turns]
    role = "user" if place == "user" and "user" in roles else "system"
    if role not in roles:
        return replace(raw, messages=(Message(role="system", content=said), *turns))
    last = len(roles) - 1 - roles[::-1].index(role)
    turns[last] = Message(role=role, content=f"{said}\n\n{turns[last].content}")
    return replace(raw, messages=tuple(turns))
