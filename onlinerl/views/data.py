"""What the model will really see: prompts as they are rendered and tokenised, how long they are, and what is the matter with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from onlinerl.config import RunConfig, algorithm, oracle
from onlinerl.prompts._goals import told
from onlinerl.prompts._rendering import tokenized
from onlinerl.prompts._rows import question
from onlinerl.protocols.prompts import Which
from onlinerl.types import RawPrompt
from onlinerl.types.directions import Directions
from onlinerl.types.goals import Goals

BOUNDARY = "│"
"""Between two tokens."""
BARS, BAR = 10, 40
"""Classes of the histogram of lengths, and the width of its longest bar."""
SOURCES = 10


def inspect(config: RunConfig, reads: Any, limit: int) -> dict[str, Any]:
    """The prompts of a configuration, as plain data. Nothing is left out for its length here: it is counted.

    Args:
        config: as `onlinerl.config.settled` gives it.
        reads: the model's tokenizer; None if the model is not on this machine.
        limit: how many prompts of each kind to show whole.

    Raises:
        PromptError: if the data cannot be read, or a prompt cannot be rendered.
    """
    raw = {which: list(config.prompts.raw(which)) for which in ("train", "heldout")}
    asked = {question(each) for each in raw["train"]}
    goals, directions = algorithm(config).needs.goals, oracle(config).directions
    seen = {which: [list(told(each, goals, directions))[-1] for each in prompts] for which, prompts in raw.items()}
    return {
        "model": config.model,
        "tokenized": reads is not None,
        "remarks": [*config.prompts.remarks(), *_said(config, goals, directions)],
        "overlap": sum(question(each) in asked for each in raw["heldout"]),
        "train": _one(config, "train", seen["train"], reads, limit),
        "heldout": _one(config, "heldout", seen["heldout"], reads, limit),
    }


def _said(config: RunConfig, goals: Goals | None, directions: Directions | None) -> Iterator[str]:
    """What algorithm and oracle put into prompts."""
    if goals is not None:
        yield (
            f"{config.algorithm['name']} puts {goals.said(goals.scale)!r} before these prompts ({goals.place} turn), with other scores while it trains"
        )
    if directions is not None:
        yield f"{config.oracle['name']} puts a direction of its own before each of these prompts ({directions.place} turn)"


def _one(config: RunConfig, which: Which, raw: Sequence[RawPrompt], reads: Any, limit: int) -> dict[str, Any]:
    """Of one file, whose prompts say already what algorithm and oracle put into them."""
    rendered = [tokenized(each, reads, f"prompts.{which}") for each in raw] if reads is not None else []
    lengths = sorted(len(prompt.token_ids) for prompt in rendered)
    shown: list[dict[str, Any]] = [
        {"id": each.id, "place": each.place, "reference_answer": each.reference_answer} for each in raw[:limit]
    ]
    for entry, each, prompt in zip(shown, raw, rendered, strict=False):
        entry |= {"messages": bool(each.messages), "tokens": [reads.decode([token]) for token in prompt.token_ids]}
    if reads is None:
        for entry, each in zip(shown, raw, strict=False):
            entry["text"] = each.text or "\n".join(f"{message.role}: {message.content}" for message in each.messages)
    return {
        "path": getattr(config.prompts, which),
        "prompts": len(raw),
        "conversations": sum(bool(each.messages) for each in raw),
        "reference_answers": sum(each.reference_answer is not None for each in raw),
        "sources": dict(Counter(each.source for each in raw).most_common()),
        "tokens": {"shortest": lengths[0], "median": lengths[len(lengths) // 2], "longest": lengths[-1]} if lengths else None,
        "histogram": _histogram(lengths),
        "too_long": sum(length > config.prompts.max_tokens for length in lengths),
        "shown": shown,
    }


def _histogram(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of an upper limit in tokens and how many prompts have at most so many, and more than the one before."""
    if not lengths:
        return []
    width = max(-(-lengths[-1] // BARS), 1)
    counts = Counter((length - 1) // width for length in lengths)
    return [((i + 1) * width, counts[i]) for i in range(max(counts) + 1)]


def page(config: RunConfig, found: dict[str, Any]) -> Iterator[str]:
    """The same as text, line by line."""
    yield from found["remarks"]
    for which in ("train", "heldout"):
        yield from _section(config, which, found[which])
    overlap = found["overlap"]
    yield f"overlap: {f'{overlap} held-out prompts are training prompts, which a run refuses' if overlap else 'none'}"
    if not found["tokenized"]:
        yield f"{found['model']} is not on this machine: nothing was rendered or counted in tokens"


def _section(config: RunConfig, which: str, one: dict[str, Any]) -> Iterator[str]:
    share = f"{one['conversations']:,} conversations, {one['prompts'] - one['conversations']:,} texts to continue"
    yield f"prompts.{which}: {one['prompts']:,} prompts ({share}), {one['reference_answers']:,} with a reference answer"
    sources = list(one["sources"].items())
    if len(sources) > 1:
        more = f", and {len(sources) - SOURCES} more" if len(sources) > SOURCES else ""
        yield f"  sources: {', '.join(f'{name} {count:,}' for name, count in sources[:SOURCES])}{more}"
    if one["tokens"]:
        yield "  tokens: " + ", ".join(f"{name} {length:,}" for name, length in one["tokens"].items())
        most = max(count for _, count in one["histogram"])
        for limit, count in one["histogram"]:
            yield f"  up to {limit:>6,}  {count:>8,}  {'█' * round(BAR * count / most)}".rstrip()
    if one["too_long"]:
        what = "are left out" if config.prompts.filter_overlong_prompts else "a run refuses them"
        yield f"  {one['too_long']:,} are longer than prompts.max_tokens, {config.prompts.max_tokens}: {what}"
    for entry in one["shown"]:
        yield f"  {entry['id']} ({entry['place']})"
        words = BOUNDARY.join(entry["tokens"]) if "tokens" in entry else entry["text"]
        for line in words.replace("\n", "\\n\n").splitlines():
            yield f"    {line}"
        if entry["reference_answer"] is not None:
            yield f"    reference answer: {entry['reference_answer']!r}"
