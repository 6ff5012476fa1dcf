"""Prompts from datasets as they are published: files of JSON lines, JSON, Parquet or CSV, folders of `save_to_disk`, and the Hugging Face hub.

The form is recognised by its columns (`_formats.py`): TRL's, OpenRLHF's and verl's, ShareGPT, Alpaca, Anthropic's transcripts, questions
with answers. `columns` says it where none is. The files are read by the `datasets` library.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from onlinerl.config.paths import at_home
from onlinerl.errors import PromptError
from onlinerl.prompts import _formats
from onlinerl.prompts._files import rows
from onlinerl.prompts._rows import Place, prompt, question
from onlinerl.protocols.prompts import PromptsConfig, Which
from onlinerl.types import RawPrompt

Column = Literal["prompt", "reference_answer", "id", "source", "difficulty"]


class Dataset(PromptsConfig):
    """A file, a folder or a dataset of the hub for `train`, and one for `heldout`; they may be the same, with other splits."""

    name: str = "dataset"
    subset: str | None = None
    """Of a hub dataset that has several, e.g. `main` of `openai/gsm8k`."""
    train_split: str = "train"
    """Name of a split, or a part of one, e.g. `train[:90%]`. A file has one split, `train`."""
    heldout_split: str | None = None
    """As `train_split`. By default `test`, and `train` for a file."""
    columns: dict[Column, str] = Field(default_factory=dict)
    """Which column is what, where that is not recognised, e.g. `{prompt: query, reference_answer: reward.answer}`."""
    apply_chat_template: bool = True
    """Whether a prompt that is a text, not messages, is what a user says. Otherwise the model continues it."""
    system_prompt: str | None = None
    """Put before every conversation that has no system message."""
    input_template: str | None = Field(None, pattern=r"\{\}", description="a text with {}", examples=["'Question: {}'"])
    """Around a prompt that is a text: `{}` stands for it."""
    filter_duplicates: bool = True
    """Leave out, and count, prompts that come again, and training prompts that are held out. Otherwise they are an error."""
    filter_invalid: bool = False
    """Leave out, and count, rows that are no prompt: empty, without a user's turn, or with a template in them already. Otherwise they
    are an error."""

    _said: dict[str, str] = PrivateAttr(default_factory=dict)
    _heldout: list[RawPrompt] | None = PrivateAttr(None)
    """Read once: to be evaluated on, and to be left out of what is trained on."""

    def raw(self, which: Which) -> list[RawPrompt]:
        """Read, recognise and check one of the two."""
        if which == "train" and not self.filter_duplicates:
            return self._read(which)
        if self._heldout is None:
            self._heldout = self._read("heldout")
        return self._heldout if which == "heldout" else self._read(which, {question(each) for each in self._heldout})

    def located(self) -> Dataset:
        """With absolute paths of what is on this machine; the rest are names on the hub."""
        paths = {which: at_home(getattr(self, which), f"prompts.{which}") for which in ("train", "heldout")}
        return self.model_copy(update={which: str(path.absolute()) for which, path in paths.items() if path.exists()})

    def remarks(self) -> list[str]:
        """How each was read, once it was."""
        return [self._said[which] for which in ("train", "heldout") if which in self._said]

    def _read(self, which: Which, heldout: set[str] | frozenset[str] = frozenset()) -> list[RawPrompt]:
        field, path = f"prompts.{which}", getattr(self, which)
        rows = self._rows(which, field)
        read = self._format(rows.column_names, field)
        found: dict[str, RawPrompt] = {}
        asked: dict[str, str] = {}
        left_out = {"that come again": 0, "that are held out": 0, "that are no prompt": 0}
        for number, row in enumerate(rows, start=1):
            where = Place(f"{path}, row {number}", field)
            try:
                each = self._prompt(row, read, where, Path(path).name.partition(".")[0])
            except PromptError as error:
                if not self.filter_invalid:
                    raise PromptError(
                        error.cause, field=field, fix=f"{error.fix}; or set prompts.filter_invalid=true"
                    ) from None
                left_out["that are no prompt"] += 1
                continue
            key = question(each)
            if key in heldout:
                left_out["that are held out"] += 1
            elif key in asked:
                if not self.filter_duplicates:
                    where.fail(
                        f"holds the same prompt as {asked[key]}", "remove one, or leave out prompts.filter_duplicates=false"
                    )
                left_out["that come again"] += 1
            elif each.id in found:  # not the same prompt, so leaving it out would lose one
                where.fail(
                    f"has the id of another prompt, {each.id!r}, that of {found[each.id].place}",
                    "give each prompt an id of its own, or name a column that has them: prompts.columns.id=COLUMN",
                )
            else:
                found[each.id], asked[key] = each, where.place
        lacking = ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count)
        if not found:
            raise PromptError(
                f"{path} holds no prompts{f' but {lacking}' if lacking else ''}", field=field, fix="choose another dataset"
            )
        self._said[which] = f"{field}: {len(found):,} prompts of {path}, read as {read.name}" + (
            f"; left out: {lacking}" if lacking else ""
        )
        return list(found.values())

    def _format(self, columns: list[str], field: str) -> _formats.Format:
        """What the columns mean."""
        if absent := [each for each in self.columns.values() if each.partition(".")[0] not in columns]:
            raise PromptError(
                f"there is no column {absent[0]!r}",
                field="prompts.columns",
                fix=f"choose from those of {field}: {', '.join(columns)}",
            )
        if "prompt" in self.columns:
            return _formats.Format("prompts.columns says", (), lambda row: _formats.asked(_value(row, self.columns["prompt"])))
        form = _formats.recognised(columns)
        if form is None:
            raise PromptError(
                f"no known form has the columns {', '.join(columns)}",
                field=field,
                fix="say which one holds the prompt: prompts.columns.prompt=COLUMN (and prompts.columns.reference_answer, id, source)",
            )
        return form

    def _prompt(self, row: Mapping[str, Any], form: _formats.Format, where: Place, source: str) -> RawPrompt:
        try:
            found = form.read(row)
        except (_formats.NoPrompt, AttributeError, TypeError, KeyError) as error:
            where.fail(
                f"is no row of {form.name}: {error}",
                "correct it, or say which column holds the prompt: prompts.columns.prompt=COLUMN",
            )
        named: dict[str, Any] = {key: _value(row, column) for key, column in self.columns.items() if key != "prompt"}
        found = {"id": row.get("id") if isinstance(row.get("id"), int | str) else None, **found, **named}
        kept = {
            key: found[key] for key in ("id", "reference_answer", "source", "difficulty") if found.get(key) not in (None, "")
        }
        if "source" in kept:
            kept["source"] = str(kept["source"])
        return prompt({**kept, **self._words(found, where)}, where, source)

    def _words(self, found: Mapping[str, Any], where: Place) -> dict[str, Any]:
        """`text` or `messages`."""
        asked = found["prompt"]
        if isinstance(asked, str):
            asked = self.input_template.replace("{}", asked) if self.input_template else asked
            if found.get("plain") or not self.apply_chat_template:
                return {"text": asked}
            asked = [{"role": "user", "content": asked}]
        elif not self.apply_chat_template:
            where.fail(
                "is a conversation, which needs the model's chat template", "leave out prompts.apply_chat_template=false"
            )
        if self.system_prompt and not (asked and asked[0]["role"] == "system"):
            asked = [{"role": "system", "content": self.system_prompt}, *asked]
        return {"messages": asked}

    def _rows(self, which: Which, field: str) -> Any:
        """The dataset, as the library gives it."""
        path = getattr(self, which)
        default = "train" if at_home(path, field).is_file() else "test"
        return rows(path, field, self.train_split if which == "train" else self.heldout_split or default, self.subset)


def _value(row: Mapping[str, Any], column: str) -> Any:
    """Of a column, or of a key inside one: `reward_model.ground_truth`."""
    value: Any = row
    for key in column.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
