"""Comparisons from published preference data, with prompts that are held out.

A row has `chosen` and `rejected`, and perhaps `prompt`, in any of the forms that `_formats.py` knows: texts, messages, Anthropic's
transcripts. Optional columns: `prob` (how probable it is that the chosen one wins), `margin`, `strength`, `tie`, `source`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from onlinerl.config.paths import at_home
from onlinerl.config.reward_model import PreferencesConfig
from onlinerl.errors import PromptError
from onlinerl.prompts import _formats
from onlinerl.prompts._files import rows
from onlinerl.prompts._rows import Place, prompt, question
from onlinerl.types import RawPrompt
from onlinerl.types.preferences import Comparison

NUMBERS = ("prob", "margin", "strength")
FIX = "correct the row, name its columns (preferences.columns), or set preferences.filter_invalid=true"
SAME, TWICE, HELD_OUT, INVALID = (
    "with two equal responses",
    "that come again",
    "whose prompts are held out",
    "that are no comparison",
)
"""Why comparisons are left out."""


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
        train = [each for each in everything if not _held_out(each.prompt, config.heldout_share)]
        heldout = [each for each in everything if _held_out(each.prompt, config.heldout_share)]
        remarks.append(f"preferences: {len(heldout):,} comparisons are held out, by their prompts")
    else:
        heldout = _read(config, "heldout", remarks)
        asked = {question(each.prompt) for each in heldout}
        train = [each for each in everything if question(each.prompt) not in asked]
        if len(train) < len(everything):
            remarks.append(f"preferences.train: left out: {len(everything) - len(train):,} {HELD_OUT}")
    if more:
        asked = {question(each.prompt) for each in heldout}
        new = [each for each in more if question(each.prompt) not in asked and not _held_out(each.prompt, _share(config))]
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


def _held_out(asked: RawPrompt, share: float) -> bool:
    """By a hash of what is asked: all comparisons of a prompt are on the same side, in whatever data it comes."""
    number = int.from_bytes(hashlib.sha256(question(asked).encode()).digest()[:8], "big")
    return number < share * 2**64


def _read(config: PreferencesConfig, which: str, remarks: list[str]) -> list[Comparison]:
    field, where = f"preferences.{which}", str(getattr(config, which))
    default = "train" if which == "train" or at_home(where, field).is_file() else "test"
    split = (config.train_split if which == "train" else config.heldout_split) or default
    table = rows(where, field, split, config.subset)
    _require_columns(config, table.column_names, field)
    source = Path(where).name.partition(".")[0]
    found: dict[tuple[Any, ...], Comparison] = {}
    left_out: Counter[str] = Counter()
    for number, row in enumerate(table, start=1):
        try:
            one = _comparison(config, row, Place(f"{where}, row {number}", field), source)
        except PromptError:
            if not config.filter_invalid:
                raise
            left_out[INVALID] += 1
            continue
        key = (question(one.prompt), one.chosen, one.rejected)
        if one.chosen == one.rejected:
            left_out[SAME] += 1
        elif key in found:
            left_out[TWICE] += 1
        else:
            found[key] = one
    lacking = ", ".join(f"{count:,} {what}" for what, count in left_out.items())
    remarks.append(f"{field}: {len(found):,} comparisons of {where}" + (f"; left out: {lacking}" if lacking else ""))
    return list(found.values())


def _require_columns(config: PreferencesConfig, there: list[str], field: str) -> None:
    named = {"chosen": "chosen", "rejected": "rejected", **config.columns}
    for meaning, column in named.items():
        if column not in there:
            raise PromptError(
                f"there is no column {column!r}",
                field=f"preferences.columns.{meaning}" if meaning in config.columns else field,
                fix=f"say which of {', '.join(there)} it is: preferences.columns.{meaning}=COLUMN",
            )


def _comparison(config: PreferencesConfig, row: Mapping[str, Any], where: Place, source: str) -> Comparison:
    """One row.

    Raises:
        PromptError: naming it.
    """
    names: dict[str, str] = {
        str(meaning): column for meaning, column in config.columns.items()
    }  # a column that is not named is called what it means
    told = {meaning: row.get(names.get(meaning, meaning)) for meaning in ("prompt", "chosen", "rejected")}
    try:
        sides = [_formats.preferences({"prompt": told["prompt"], "chosen": told[side]}) for side in ("chosen", "rejected")]
    except (_formats.NoPrompt, AttributeError, TypeError, KeyError) as error:
        where.fail(f"is no comparison: {error}", FIX)
    if sides[0]["prompt"] != sides[1]["prompt"]:
        where.fail("compares answers to different prompts", FIX)
    answers = [side.get("reference_answer") for side in sides]
    for side, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not isinstance(answer, str) or not answer.strip():
            where.fail(f"has no answer in {side!r}, but {answer!r}", FIX)
    asked = prompt(_words(config, sides[0]["prompt"]), where, source)
    given = {meaning: row.get(names.get(meaning, meaning)) for meaning in (*NUMBERS, "tie", "source")}
    numbers = {name: _number(name, given[name], where) for name in NUMBERS if given[name] is not None}
    if given["tie"] not in (None, False, 0, True, 1):
        where.fail(f"says {given['tie']!r} in `tie`, which is true or false", FIX)
    if given["tie"]:
        numbers["prob"] = 0.5
    chosen, rejected = (str(answer) for answer in answers)
    if numbers.get("prob", 1.0) < 0.5:
        chosen, rejected, numbers["prob"] = rejected, chosen, 1.0 - numbers["prob"]
    return Comparison(
        prompt=asked, chosen=chosen, rejected=rejected, source=str(given["source"]) if given["source"] else source, **numbers
    )


def _words(config: PreferencesConfig, asked: Any) -> dict[str, Any]:
    """`text` or `messages`."""
    if not isinstance(asked, str):
        return {"messages": list(asked)}
    return {"messages": [{"role": "user", "content": asked}]} if config.apply_chat_template else {"text": asked}


def _number(name: str, value: Any, where: Place) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if known and (name == "margin" or (name == "prob" and 0 <= value <= 1) or (name == "strength" and value > 0)):
        return float(value)
    wanted = {"prob": "a probability", "margin": "a number", "strength": "a number above 0"}[name]
    where.fail(f"says {value!r} in `{name}`, which is {wanted}", FIX)
