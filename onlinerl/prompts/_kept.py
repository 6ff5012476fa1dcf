"""The prompts that a run keeps, and what has become of the files it took them from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onlinerl.config import RunConfig
from onlinerl.errors import PromptError
from onlinerl.prompts._goals import told
from onlinerl.prompts._rendering import tokenized
from onlinerl.protocols.prompts import Which
from onlinerl.types import Group, Prompt, RawPrompt
from onlinerl.types.directions import Directions
from onlinerl.types.goals import Goals

SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a run has used from its start and uses to its end, whatever becomes of the files."""

    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    """As many as are evaluated on."""
    anchors: Sequence[Group] = ()
    """Pairs whose better response is known."""

    def changes(
        self, config: RunConfig, tokenizer: Any = None, goals: Goals | None = None, directions: Directions | None = None
    ) -> list[str]:
        """One sentence for each file that is not what it was.

        Args:
            config: of the run.
            tokenizer: of its model, where prompts that are too long are left out: they are no addition.
            goals, directions: what its prompts tell the model, which counts for their length.
        """
        sentences = []
        kept: tuple[tuple[Which, Sequence[Prompt], int | None], ...] = (
            ("train", self.train, None),
            ("heldout", self.heldout, config.evaluation.prompts),
        )
        for which, prompts, limit in kept:
            try:
                found = list(config.prompts.raw(which))
                if tokenizer is not None:
                    ids, most = {prompt.id for prompt in prompts}, config.prompts.max_tokens
                    found = [p for p in found if p.id in ids or _longest(p, tokenizer, goals, directions) <= most]
                said = changes(prompts, found[:limit])
            except PromptError as error:
                said = f"it cannot be read any more: {error.cause}"
            if said is not None:
                sentences.append(
                    f"prompts.{which} has changed since the run started: {said}; the run goes on with the prompts that it keeps"
                )
        return sentences


def _longest(prompt: RawPrompt, tokenizer: Any, goals: Goals | None, directions: Directions | None) -> int:
    """Tokens of a prompt with the longest of what it may tell the model."""
    return max(len(tokenized(one, tokenizer, "").token_ids) for one in told(prompt, goals, directions))


def changes(kept: Sequence[Prompt], found: Sequence[RawPrompt]) -> str | None:
    """How the prompts of a file differ from those that a run keeps, with the first ids; None if they do not.

    Their order in the file does not matter: a run orders them by itself.
    """
    before = {p.id: (p.messages or p.text, p.reference_answer, p.source, p.difficulty) for p in kept}
    now = {p.id: (p.messages or p.text, p.reference_answer, p.source, p.difficulty) for p in found}
    differences = {
        "added": [i for i in now if i not in before],
        "removed": [i for i in before if i not in now],
        "altered": [i for i in now if i in before and now[i] != before[i]],
    }
    said = [f"{len(ids)} {kind} ({_first(ids)})" for kind, ids in differences.items() if ids]
    return ", ".join(said) or None


def _first(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:SHOWN])) + (", ..." if len(ids) > SHOWN else "")
