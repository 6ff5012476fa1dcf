"""From raw prompts, wherever they come from, to what a run takes: checked, rendered, tokenised and in an order of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from onlinerl.errors import PromptError
from onlinerl.prompts._goals import with_directions, with_goals
from onlinerl.prompts._rendering import render
from onlinerl.prompts._rows import question
from onlinerl.protocols.prompts import PromptsConfig
from onlinerl.types import Prompt, RawPrompt, derive_seed
from onlinerl.types.directions import Directions
from onlinerl.types.goals import Goals


class Loaded(NamedTuple):
    """What a run takes."""

    train: ShuffledPrompts
    heldout: list[Prompt]
    """In the order of their file."""
    remarks: list[str]
    """How the files were read, and what was left out."""


def load_prompts(
    config: PromptsConfig,
    tokenizer: Any,
    seed: int,
    *,
    needs_answers: bool = False,
    longest_answer: int | None = None,
    goals: Goals | None = None,
    directions: Directions | None = None,
) -> Loaded:
    """All that a run needs.

    Args:
        config: the `prompts` section.
        tokenizer: the policy's Hugging Face tokenizer.
        seed: the run's seed; it decides the order of the training prompts.
        needs_answers: whether the oracle needs reference answers.
        longest_answer: in tokens, where the algorithm trains on the reference answers of the training prompts; None: it does not.
        goals: how prompts tell the model which score its response shall have; None: they do not.
        directions: how prompts tell it by which weights its response will be judged; None: they do not.

    Raises:
        PromptError: for everything that is wrong with either file, before anything expensive starts.
    """
    train, heldout = config.raw("train"), config.raw("heldout")
    check_overlap(train, heldout)
    if needs_answers:
        check_answers(train, "prompts.train")
        check_answers(heldout, "prompts.heldout")
    if longest_answer is not None:
        check_answers(train, needed_by="algorithm")
    shortened, remarks = {"leave_out_long": config.filter_overlong_prompts}, config.remarks()
    limit = config.max_tokens
    rendered = render(train, tokenizer, limit, "prompts.train", **shortened)
    asked = render(heldout, tokenizer, limit, "prompts.heldout", **shortened)
    if longest_answer is not None:
        rendered = with_answers(rendered, _those(train, rendered), tokenizer, longest_answer)
    told = _those(train, rendered), _those(heldout, asked)
    if directions is not None:
        rendered = with_directions(rendered, told[0], tokenizer, directions, limit, "prompts.train", **shortened)
        asked = with_directions(asked, told[1], tokenizer, directions, limit, "prompts.heldout", **shortened)
    if goals is not None:
        rendered = with_goals(rendered, told[0], tokenizer, goals, limit, "prompts.train", trained=True, **shortened)
        asked = with_goals(asked, told[1], tokenizer, goals, limit, "prompts.heldout", trained=False, **shortened)
    for field, before, after in (("prompts.train", train, rendered), ("prompts.heldout", heldout, asked)):
        if len(after) < len(before):
            remarks.append(f"{field}: {len(before) - len(after):,} of {len(before):,} left out, longer than {limit} tokens")
    return Loaded(ShuffledPrompts(rendered, seed=seed, reuse=config.reuse), asked, remarks)


def _those(raw: Sequence[RawPrompt], rendered: Sequence[Prompt]) -> list[RawPrompt]:
    """The raw prompts of those that were not left out."""
    ids = {prompt.id for prompt in rendered}
    return [each for each in raw if each.id in ids]


def check_overlap(train: Sequence[RawPrompt], heldout: Sequence[RawPrompt]) -> None:
    """Held-out prompts must not be trained on: compare what is asked, whatever the ids, case and spacing.

    Raises:
        PromptError: counting the prompts in both, and showing one.
    """
    trained = {question(prompt): prompt for prompt in train}
    shared = [(trained[question(prompt)], prompt) for prompt in heldout if question(prompt) in trained]
    if shared:
        first, second = shared[0]
        raise PromptError(
            f"{len(shared)} of {len(heldout)} held-out prompts are also training prompts, e.g. {second.id!r}, which is "
            f"{first.id!r} in prompts.train",
            field="prompts.heldout",
            fix="remove them from one of the two files",
        )


def check_answers(prompts: Sequence[RawPrompt], field: str = "prompts.train", needed_by: str = "oracle") -> None:
    """Every prompt must carry a reference answer; call it if oracle or algorithm need them.

    Raises:
        PromptError: counting the prompts without, and naming one.
    """
    missing = [prompt for prompt in prompts if prompt.reference_answer is None]
    if missing:
        raise PromptError(
            f"{len(missing)} of {len(prompts)} prompts have no reference answer, which the {needed_by} needs; the first is "
            f"{_named(missing[0])}",
            field=field,
            fix=f'add "reference_answer": "..." to each line, or choose another {needed_by}',
        )


def with_answers(prompts: Sequence[Prompt], raw: Sequence[RawPrompt], tokenizer: Any, most: int) -> list[Prompt]:
    """Prompts with their reference answers as the policy would have to say them: plain tokens, then the end-of-sequence token.

    An answer follows its prompt as it is written. Where a text is continued, it begins with the space that stands between the two.

    Args:
        prompts: rendered, in the order of `raw`.
        raw: what they were made of; all have a reference answer.
        tokenizer: the policy's.
        most: tokens of the longest answer accepted, its end included.

    Raises:
        PromptError: if there is no end-of-sequence token, or answers are too long (none is cut or left out silently).
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise PromptError(
            "the model's tokenizer has no end-of-sequence token, with which a stored answer must end",
            field="model",
            fix="set eos_token in its tokenizer_config.json, or choose another algorithm",
        )
    answers = [tuple(tokenizer(str(each.reference_answer), add_special_tokens=False)["input_ids"]) for each in raw]
    answers = [ids if ids[-1:] == (end,) else (*ids, end) for ids in answers]
    long = [(len(ids), each) for ids, each in zip(answers, raw, strict=True) if len(ids) > most]
    if long:
        length, longest = max(long, key=lambda found: found[0])
        raise PromptError(
            f"{len(long)} of {len(raw)} reference answers are longer than a response may be, {most} tokens; that of {_named(longest)} "
            f"has {length}, its end included",
            field="prompts.train",
            fix=f"set sampling.max_new_tokens to {length} or more, or shorten or remove them; none is cut",
        )
    return [replace(prompt, answer_ids=ids) for prompt, ids in zip(prompts, answers, strict=True)]


class ShuffledPrompts:
    """A prompt source with an explicit cursor: the same cursor always gives the same prompts.

    Prompts are ordered by a hash of (seed, pass, id), so adding or removing some never changes the order of the others.

    Args:
        prompts: rendered prompts with unique ids.
        seed: the run's seed.
        reuse: start over, in a new order, when they run out.
        field: the configuration key that named the file, for messages.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, reuse: bool = False, field: str = "prompts.train") -> None:
        self._prompts, self._seed, self._reuse, self._field = tuple(prompts), seed, reuse, field
        self._ordered: dict[int, list[Prompt]] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    def take(self, count: int, cursor: int) -> tuple[list[Prompt], int]:
        """`count` different prompts from `cursor` on, and the next cursor.

        The cursor counts prompts over all passes, starting at 0. Where a call reaches into the next pass, prompts that it already
        holds are skipped there: twice the same prompt in one iteration would draw the same seeds.

        Raises:
            PromptError: if there are not enough prompts (left).
        """
        size = len(self._prompts)
        if count > size:
            raise PromptError(
                f"{count} prompts are wanted at once, but there are {size}",
                field=self._field,
                fix=f"add prompts, or lower prompts.per_iteration to {size}",
            )
        if not self._reuse and cursor + count > size:
            raise PromptError(
                f"{count} more prompts are wanted, but {max(size - cursor, 0)} of {size} are left",
                field=self._field,
                fix="add prompts, lower iterations or prompts.per_iteration, or set prompts.reuse to true to start over",
            )
        taken: dict[str, Prompt] = {}
        while len(taken) < count:
            prompt = self._order(cursor // size)[cursor % size]
            taken.setdefault(prompt.id, prompt)
            cursor += 1
        return list(taken.values()), cursor

    def _order(self, epoch: int) -> list[Prompt]:
        if epoch not in self._ordered:
            key = {prompt.id: (derive_seed(self._seed, epoch, prompt.id), prompt.id) for prompt in self._prompts}
            self._ordered[epoch] = sorted(self._prompts, key=lambda prompt: key[prompt.id])
        return self._ordered[epoch]


def _named(prompt: RawPrompt) -> str:
    return f"{prompt.id!r} ({prompt.place})" if prompt.place else repr(prompt.id)
