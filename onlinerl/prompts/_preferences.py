"""The comparisons that a reward model is trained and evaluated on, with prompts that are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from onlinerl.config.paths import at_home
from onlinerl.config.reward_model import PreferencesConfig
from onlinerl.errors import PromptError
from onlinerl.prompts import _comparisons
from onlinerl.prompts._rows import question
from onlinerl.types import RawPrompt
from onlinerl.types.preferences import Comparison

HELD_OUT = "whose prompts are held out"


class Preferences(NamedTuple):
    """What a reward model is trained and evaluated on."""

    train: list[Comparison]
    heldout: list[Comparison]
    remarks: list[str]
    """How they were read, and what was left out."""


def read(config: PreferencesConfig, more: Sequence[Comparison] = ()) -> Preferences:
    """Both, without a prompt that is in both.

    Args:
        config: the `preferences` section.
        more: comparisons to train on beside those of the data, unless their prompts are held out.

    Raises:
        PromptError: for what is wrong with the data, naming the row.
    """
    remarks: list[str] = []
    everything = _read(config, "train", remarks)
    if config.heldout is None:
        train = [each for each in everything if not held_out(each.prompt, config.heldout_share)]
        heldout = [each for each in everything if held_out(each.prompt, config.heldout_share)]
        remarks.append(f"preferences: {len(heldout):,} comparisons are held out, by their prompts")
    else:
        heldout = _read(config, "heldout", remarks)
        asked = {question(each.prompt) for each in heldout}
        train = [each for each in everything if question(each.prompt) not in asked]
        if len(train) < len(everything):
            remarks.append(f"preferences.train: left out: {len(everything) - len(train):,} {HELD_OUT}")
    if more:
        asked = {question(each.prompt) for each in heldout}
        new = [each for each in more if question(each.prompt) not in asked and not held_out(each.prompt, _share(config))]
        remarks.append(
            f"preferences.runs: {len(new):,} comparisons"
            + (f"; left out: {len(more) - len(new):,} {HELD_OUT}" if len(new) < len(more) else "")
        )
        train += new
    for name, found in (("train", train), ("heldout", heldout)):
        if not found:
            raise PromptError(
                f"there are no comparisons to {'train' if name == 'train' else 'evaluate'} on",
                field=f"preferences.{name}",
                fix="choose another heldout_share, or give more data",
            )
    return Preferences(train, heldout, remarks)


def _share(config: PreferencesConfig) -> float:
    """Of the prompts that a hash holds out."""
    return 0.0 if config.heldout is not None else config.heldout_share


def held_out(asked: RawPrompt, share: float) -> bool:
    """By a hash of what is asked: all comparisons of a prompt are on the same side, in whatever data it comes."""
    number = int.from_bytes(hashlib.sha256(question(asked).encode()).digest()[:8], "big")
    return number < share * 2**64


def _read(config: PreferencesConfig, which: str, remarks: list[str]) -> list[Comparison]:
    field, where = f"preferences.{which}", str(getattr(config, which))
    default = "train" if which == "train" or at_home(where, field).is_file() else "test"
    split = (config.train_split if which == "train" else config.heldout_split) or default
    columns = {str(meaning): column for meaning, column in config.columns.items()}
    return _comparisons.read(config, columns, where, field, split, remarks)
