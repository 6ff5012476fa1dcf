"""All prompts in a random order, one iteration behind the other."""

from __future__ import annotations

from typing import ClassVar

from onlinerl.protocols.selection import Selector


class Shuffled(Selector):
    """Takes the prompts in an order that follows from the seed, each once before any comes twice: uniform without replacement.

    What an iteration samples follows from the seed and from where the one before has stopped, which its record says.
    """

    name: str = "shuffled"
    chooses: ClassVar[bool] = False
