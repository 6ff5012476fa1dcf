"""What a reward model is trained on."""

from __future__ import annotations

from dataclasses import dataclass

from onlinerl.types.prompts import RawPrompt

CHOSEN, REJECTED = "chosen", "rejected"
"""What `Rollout.source` says of the responses of a comparison, which nobody sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two responses to one prompt, the better one first."""

    prompt: RawPrompt
    chosen: str
    rejected: str
    prob: float = 1.0
    """P(chosen beats rejected), from 1/2 (a tie) to 1."""
    margin: float = 0.0
    """By how much the chosen one is better, in the units of the model's log-odds."""
    strength: float = 1.0
    """How plainly it is better, e.g. 1 to 3."""
    weight: float = 1.0
    """What it counts beside others."""
    source: str = ""
    """Where it came from, for slices."""
