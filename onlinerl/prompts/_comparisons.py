"""Rows that compare two responses -> comparisons.

A row has `chosen` and `rejected`, and perhaps `prompt`, in any of the forms that `_formats.py` knows: texts, messages, Anthropic's
transcripts. Optional columns: `prob` (how probable it is that the chosen one wins), `margin`, `strength`, `tie`, `source`, and for oracles that
read it, `reference_answer`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from onlinerl.config.sections import Comparisons
from onlinerl.errors import PromptError
from onlinerl.prompts import _formats
from onlinerl.prompts._files import rows
from onlinerl.prompts._rows import Place, prompt, question
from onlinerl.types.preferences import Comparison

NUMBERS = ("prob", "margin", "strength")
SAME, TWICE, INVALID = ("with two equal responses", "that come again", "that are no comparison")
"""Why comparisons are left out."""


def read(
    config: Comparisons, columns: Mapping[str, str], where: str, field: str, split: str, remarks: list[str]
) -> list[Comparison]:
    """All of one source, each once.

    Args:
        config: how rows are read.
        columns: which column is what, where it has another name.
        where: a file, a folder or a dataset of the hub.
        field: the key that names it, e.g. `preferences.train`.
        split: of the dataset.
        remarks: is told how they were read, and what was left out.

    Raises:
        PromptError: for what is wrong with the data, naming the row.
    """
    table, reader = rows(where, field, split, config.subset), _Reader(config, columns, field)
    reader.require_columns(table.column_names)
    source = Path(where).name.partition(".")[0]
    found: dict[tuple[Any, ...], Comparison] = {}
    left_out: Counter[str] = Counter()
    for number, row in enumerate(table, start=1):
        try:
            one = reader.comparison(row, Place(f"{where}, row {number}", field), source)
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


class _Reader:
    """Of the rows of one source."""

    def __init__(self, config: Comparisons, columns: Mapping[str, str], field: str) -> None:
        self._config, self._names, self._field = config, columns, field
        self._section = field.partition(".")[0]

    def require_columns(self, there: list[str]) -> None:
        """Refuse a source without what a comparison needs, or without a column that is named."""
        for meaning, column in {"chosen": "chosen", "rejected": "rejected", **self._names}.items():
            if column not in there:
                named = f"{self._section}.columns.{meaning}"
                raise PromptError(
                    f"there is no column {column!r}",
                    field=named if meaning in self._names else self._field,
                    fix=f"say which of {', '.join(there)} it is: {named}=COLUMN",
                )

    def comparison(self, row: Mapping[str, Any], where: Place, source: str) -> Comparison:
        """One row.

        Raises:
            PromptError: naming it.
        """

        def told(meaning: str) -> Any:  # a column that is not named is called what it means
            return row.get(self._names.get(meaning, meaning))

        sides = {}
        for side in ("chosen", "rejected"):
            try:
                sides[side] = _formats.preferences({"prompt": told("prompt"), "chosen": told(side)})
            except (_formats.NoPrompt, AttributeError, TypeError, KeyError) as error:
                self._fail(where, f"is no comparison: {error}")
        if sides["chosen"]["prompt"] != sides["rejected"]["prompt"]:
            self._fail(where, "compares answers to different prompts")
        answers = {side: said.get("reference_answer") for side, said in sides.items()}
        for side, answer in answers.items():
            if not isinstance(answer, str) or not answer.strip():
                self._fail(where, f"has no answer in {side!r}, but {answer!r}")
        numbers = {name: self._number(name, told(name), where) for name in NUMBERS if told(name) is not None}
        if told("tie") not in (None, False, 0, True, 1):
            self._fail(where, f"says {told('tie')!r} in `tie`, which is true or false")
        if told("tie"):
            numbers["prob"] = 0.5
        chosen, rejected = str(answers["chosen"]), str(answers["rejected"])
        if numbers.get("prob", 1.0) < 0.5:
            chosen, rejected, numbers["prob"] = rejected, chosen, 1.0 - numbers["prob"]
        asked = prompt(self._words(sides["chosen"]["prompt"], told("reference_answer")), where, source)
        return Comparison(
            prompt=asked,
            chosen=chosen,
            rejected=rejected,
            source=str(told("source")) if told("source") else source,
            **numbers,
        )

    def _words(self, asked: Any, answer: Any) -> dict[str, Any]:
        """`text` or `messages`, and the reference answer where there is one."""
        known = {} if answer is None else {"reference_answer": answer}
        if not isinstance(asked, str):
            return {"messages": list(asked), **known}
        said = {"messages": [{"role": "user", "content": asked}]} if self._config.apply_chat_template else {"text": asked}
        return said | known

    def _number(self, name: str, value: Any, where: Place) -> float:
        known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if known and (name == "margin" or (name == "prob" and 0 <= value <= 1) or (name == "strength" and value > 0)):
            return float(value)
        wanted = {"prob": "a probability", "margin": "a number", "strength": "a number above 0"}[name]
        self._fail(where, f"says {value!r} in `{name}`, which is {wanted}")

    def _fail(self, where: Place, cause: str) -> NoReturn:
        fix = f"correct the row, name its columns ({self._section}.columns), or set {self._section}.filter_invalid=true"
        where.fail(cause, fix)
