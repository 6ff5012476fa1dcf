"""Judged samples as a page for people: each prompt, its answers from the best to the worst, and which of them were trained as a pair.

What a model wrote may hold anything. Control characters are shown as escapes, and nothing is taken for markup.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from onlinerl.stores import summary

PROMPT_LINES = 10
ANSWER_LINES = 8
OPPONENTS = 4
"""So many opponents of an answer are named."""
INDENT = 4
_JOINERS = "\u200c\u200d"
"""Parts of words and of emoji, which do no harm."""


def page(run: Path, iteration: int, limit: int, *, heldout: bool, width: int, full: bool = False) -> Iterator[Text]:
    """The lines of the page.

    Args:
        run: the run directory.
        iteration: of the samples.
        limit: how many prompts.
        heldout: the iterate's answers to the held-out prompts, instead of what it was trained on.
        width: of the terminal, in columns.
        full: texts are not shortened.

    Raises:
        StoreError: if there is no run, or nothing was sampled in that iteration.
    """
    groups = summary.samples(run, iteration, limit, heldout=heldout)
    known = summary.sampled(run, heldout=heldout)
    what = "answers to held-out prompts" if heldout else "what was sampled to train on"
    yield Text(f"iteration {iteration}: {what}; choose another one with --iteration: {_ranges(known)}")
    for group in groups:
        yield Text()
        yield from _group(group, width, full)


def _group(group: Mapping[str, Any], width: int, full: bool) -> Iterator[Text]:
    yield Text(f"prompt {visible(group['prompt_id'])}", style="bold")
    yield from _body(group["prompt"], width, None if full else PROMPT_LINES, tail=True)
    if (selected := group["selected"]) is not None:
        yield Text(f"selected: {visible(selected['reason'])} (probability {selected['probability']:.2g})", style="dim")
    if group["failure"]:
        yield Text(f"not judged: {visible(group['failure'])}", style="yellow")
    elif group["oracle"]:
        yield Text(f"judged by {visible(group['oracle'])}", style="dim")
    else:
        yield Text("not judged yet", style="yellow")
    answers = group["responses"]
    for k in sorted(range(len(answers)), key=lambda k: _rank(answers[k])):
        yield _head(k, answers[k], group["pairs"])
        yield from _body(answers[k]["text"], width, None if full else ANSWER_LINES, tail=False)
    if group["raw"]:
        yield Text("the judge's words", style="dim")
        yield from _body(group["raw"], width, None if full else ANSWER_LINES, tail=False)


def _rank(answer: Mapping[str, Any]) -> tuple[bool, float]:
    """Best first; what nobody judged last."""
    value = answer["score"] if answer["score"] is not None else answer["win_rate"]
    return value is None, -(value or 0.0)


def _head(k: int, answer: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> Text:
    """What is known about an answer, in one line."""
    facts = [f"  #{k}"]
    facts += [] if answer["source"] == "policy" else [visible(answer["source"])]
    facts += [f"score {answer['score']:.3f}"] if answer["score"] is not None else []
    facts += [f"win rate {answer['win_rate']:.2f}"] if answer["win_rate"] is not None else []
    facts.append(f"{answer['tokens']} tokens")
    if answer["finish_reason"] == "length":
        facts.append("truncated")
    elif answer["finish_reason"] != "stop":
        facts.append(visible(answer["finish_reason"]))
    beaten = [_opponent(pair, "rejected") for pair in pairs if pair["chosen"] == k]
    lost_to = [_opponent(pair, "chosen") for pair in pairs if pair["rejected"] == k]
    head = Text("  ".join(facts))
    for role, others, style in (("chosen over", beaten, "green"), ("rejected for", lost_to, "red")):
        if others:
            head.append(f"  {role} {_numbered(others)}", style=style)
    return head


def _opponent(pair: Mapping[str, Any], role: str) -> str:
    """The other response, and which of its tokens the pair is about where those are not all."""
    steps = pair.get("steps")
    return f"#{pair[role]}" + (f" from token {steps[0]['start'] + 1}" if steps else "")


def _numbered(others: Sequence[str]) -> str:
    more = f" and {len(others) - OPPONENTS} more" if len(others) > OPPONENTS else ""
    return ", ".join(others[:OPPONENTS]) + more


def _body(text: str, width: int, lines: int | None, *, tail: bool) -> Iterator[Text]:
    """A text, indented and wrapped, of at most so many lines; with `tail` most of them from its end, which a prompt leads up to."""
    if not text.strip():
        yield Text(" " * INDENT + "(empty)", style="dim")
        return
    room = max(20, width - INDENT)
    whole = [line for paragraph in visible(text).split("\n") for line in _wrapped(paragraph, room)]
    if lines is not None and len(whole) > lines:
        kept = lines - 1
        end = kept * 2 // 3 if tail else 0
        left_out = len(whole) - kept
        middle = f"[... {left_out} more lines; see --full]"
        whole = [*whole[: kept - end], middle, *whole[len(whole) - end :]]
    for line in whole:
        yield Text((" " * INDENT + line).rstrip())


def _wrapped(paragraph: str, room: int) -> list[str]:
    if not paragraph.strip():
        return [""]
    return [line.plain.rstrip() for line in Text(paragraph).wrap(_WRAPPER, room)]


_WRAPPER = Console(width=80, no_color=True, markup=False, quiet=True)


def visible(text: str) -> str:
    """The same text with everything that could move a terminal's cursor, change its colours or hide letters shown as an escape.

    >>> visible("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return "".join(_harmless(letter) for letter in text.replace("\r\n", "\n").expandtabs(4))


def _harmless(letter: str) -> str:
    if letter == "\n" or letter in _JOINERS or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return letter
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short.

    >>> _ranges([0, 1, 2, 3, 5, 7, 8])
    '0 to 3, 5, 7, 8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
