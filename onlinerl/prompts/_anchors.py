"""Pairs of which it is known which response is better -> groups that the oracle can be asked about."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from onlinerl.config.paths import at_home
from onlinerl.config.sections import AnchorsConfig
from onlinerl.errors import PromptError
from onlinerl.prompts import _comparisons
from onlinerl.prompts._rendering import tokenized
from onlinerl.prompts._rows import question
from onlinerl.types import Group, Rollout, Sampling, derive_seed
from onlinerl.types.preferences import CHOSEN, REJECTED, Comparison

FIELD = "anchors.data"


def read(config: AnchorsConfig, tokenizer: Any, *, needs_answers: bool) -> tuple[list[Group], list[str]]:
    """The pairs, and how they were read.

    The better response is the first of a pair or the second by a coin that its text throws: an oracle that always names the first one is then
    right about half of them.

    Args:
        config: the `anchors` section.
        tokenizer: the policy's Hugging Face tokenizer.
        needs_answers: whether the oracle needs reference answers.

    Raises:
        PromptError: for what is wrong with the data, naming the row.
    """
    remarks: list[str] = []
    columns = {str(meaning): column for meaning, column in config.columns.items()}
    split = config.split or ("train" if at_home(config.data, FIELD).is_file() else "test")
    everything = _comparisons.read(config, columns, config.data, FIELD, split, remarks)
    known = {_identity(each): each for each in everything if each.prob > 0.5}
    if not known:
        fix = "give pairs of which one response is known to be better"
        raise PromptError(f"{config.data} names no better response", field=FIELD, fix=fix)
    if needs_answers and (lacking := sum(each.prompt.reference_answer is None for each in known.values())):
        raise PromptError(
            f"{lacking} of {len(known)} pairs have no reference answer, which the oracle needs",
            field=FIELD,
            fix="give it in a column `reference_answer`, or name that column: anchors.columns.reference_answer=COLUMN",
        )
    taken = sorted(known)[: config.limit]
    if len(taken) < len(everything):
        ties, more = len(everything) - len(known), len(known) - len(taken)
        left = [f"{ties:,} ties"] * (ties > 0) + [f"{more:,} beyond anchors.limit"] * (more > 0)
        remarks.append(f"anchors: {len(taken):,} pairs; left out: {', '.join(left)}")
    return [_group(known[identity], identity, tokenizer) for identity in taken], remarks


def _identity(one: Comparison) -> str:
    """By what it says: the same pair has the same name in every file, and the names are in no order."""
    said = "\0".join((question(one.prompt), one.chosen, one.rejected))
    return "anchor-" + hashlib.sha256(said.encode()).hexdigest()[:20]


def _group(one: Comparison, identity: str, tokenizer: Any) -> Group:
    prompt = tokenized(replace(one.prompt, id=identity, source=one.source), tokenizer, FIELD)
    sides = [(CHOSEN, one.chosen), (REJECTED, one.rejected)]
    if derive_seed("anchor", identity) % 2:
        sides.reverse()
    return Group(prompt=prompt, rollouts=tuple(_response(place, *side) for place, side in enumerate(sides)))


def _response(place: int, source: str, text: str) -> Rollout:
    """One that nobody sampled."""
    return Rollout(
        token_ids=(),
        logprobs=(),
        text=text,
        finish_reason="stop",
        policy_version=-1,
        sampler=Sampling(),
        seed=place,
        source=source,
    )
