"""What a prompt may say about how its responses will be judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onlinerl.types.seeds import derive_seed

AT_A_TIME, TIMES = 1000, 100
"""How many directions are drawn together, and how often, before there is none within the bounds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Directions:
    """A direction for each prompt: weights of several scores, whose squares have the sum 1. It follows from the prompt's id, so whoever says it in
    a prompt and whoever judges the responses mean the same one, and so does a resume.

    Source: "Arithmetic Control of LLMs for Diverse User Preferences: Directional Preference Alignment with Multi-Objective Rewards" (arXiv
    2402.18571), section 3.
    """

    bounds: Mapping[str, tuple[float, float]]
    """By score, the least and the greatest weight; the directions between them are equally probable."""
    text: str
    """What a prompt says, with {direction} where the weights go."""
    place: Literal["system", "user"] = "system"
    """In a system turn of a conversation, or before its last user turn. A text that is continued always begins with it."""
    seed: int = 0

    def of(self, prompt_id: str) -> dict[str, float]:
        """The weight of each score.

        Raises:
            ValueError: if hardly any direction is within the bounds.
        """
        rng = np.random.default_rng(derive_seed("direction", self.seed, prompt_id))
        names = sorted(self.bounds)  # whatever their order in the configuration
        low, high = np.asarray([self.bounds[name] for name in names], np.float64).T
        for _ in range(TIMES):
            drawn = rng.standard_normal((AT_A_TIME, len(names)))
            # What bounds say of the sign alone would be in vain for nearly all of many scores.
            drawn = np.where(low >= 0, np.abs(drawn), np.where(high <= 0, -np.abs(drawn), drawn))
            drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
            within = np.flatnonzero(np.all((drawn >= low) & (drawn <= high), axis=1))
            if len(within):
                return dict(zip(names, drawn[within[0]].tolist(), strict=True))
        raise ValueError(f"of {AT_A_TIME * TIMES:,} directions none is within the bounds")

    def words(self, prompt_id: str) -> str:
        """The direction as a prompt says it, in hundredths: `helpful*80 - brief*60`."""
        terms = [(name, round(100 * weight)) for name, weight in self.of(prompt_id).items()]
        first, *others = (f"{'-' if weight < 0 else '+'} {name}*{abs(weight)}" for name, weight in terms)
        return " ".join([first.removeprefix("+ ").replace("- ", "-"), *others])

    def said(self, prompt_id: str) -> str:
        """The words for one prompt."""
        return self.text.replace("{direction}", self.words(prompt_id))
