"""New labels for a reward model, from the runs that have asked for them, and whether a model that was trained on them is still any good.

"Efficient Online RL Fine-Tuning Need Not Retain Offline Data" (arXiv 2412.07762) is why old comparisons may be few; labels lose weight with
their age, because they are about what an older policy says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from onlinerl import yaml_files
from onlinerl.config.paths import at_home
from onlinerl.controller.statistics import bootstrap
from onlinerl.errors import ConfigError
from onlinerl.stores import judged
from onlinerl.types import Group, RawPrompt, Verdict
from onlinerl.types.preferences import Comparison

FIELD = "preferences.runs"
OUTCOMES = "outcomes"
"""In the figures of a model: 1, 1/2 or 0 for each held-out comparison. In no report."""


def comparisons(runs: Sequence[str], recency: float, model: str) -> list[Comparison]:
    """All pairs of responses that the oracles of these runs have compared, or scored, as probable as they said.

    Args:
        runs: their directories.
        recency: a label counts this to the power of its age, in iterations before the newest one of its run.
        model: that is going to be trained; it must not have given the labels itself.

    Raises:
        ConfigError: if it has.
        StoreError: if a run cannot be read.
    """
    found: list[Comparison] = []
    for run in runs:
        folder = at_home(run, FIELD)
        _require_other_judge(folder, model)
        rows = list(judged.judged(folder))
        newest = max((t for t, _, _ in rows), default=0)
        for iteration, group, verdict in rows:
            found += pairs(group, verdict, recency ** (newest - iteration), folder.name)
    return found


def pairs(group: Group, verdict: Verdict, weight: float, source: str) -> Iterator[Comparison]:
    """Of responses to a prompt that an oracle has compared or scored; those of equal responses are left out."""
    matrix, prompt = verdict.matrix(), group.prompt
    asked = RawPrompt(id=prompt.id, text="" if prompt.messages else prompt.text, messages=prompt.messages)
    texts = [rollout.text for rollout in group.rollouts]
    for i, j in combinations(range(len(texts)), 2):
        p = float(matrix[i, j])
        # What a response was made to begin with is not in its text.
        if math.isnan(p) or texts[i] == texts[j] or group.rollouts[i].prefix_ids or group.rollouts[j].prefix_ids:
            continue
        better, worse = (i, j) if p >= 0.5 else (j, i)
        yield Comparison(
            prompt=asked, chosen=texts[better], rejected=texts[worse], prob=max(p, 1.0 - p), weight=weight, source=source
        )


def _require_other_judge(run: Path, model: str) -> None:
    """Labels that a model gave itself teach it nothing but to be surer."""
    file = run / "config.yaml"
    asked = yaml_files.read(file, {}).get("oracle", {}) if file.is_file() else {}
    if any(Path(path).resolve() == Path(model).resolve() for path in _models(asked)):
        raise ConfigError(
            f"the labels of {run} are those of {model} itself: training on them would only make it surer",
            field=FIELD,
            fix="name a run whose oracle is another one, e.g. a judge or a larger reward model",
        )


def _models(oracle: Any) -> Iterator[str]:
    """Paths of the models that an oracle goes by, also inside another one; not of those that only watch (`weights` of 0)."""
    if not isinstance(oracle, Mapping):
        return
    if isinstance(path := oracle.get("path"), str):
        yield path
    yield from (path for path in oracle.get("average_with") or () if isinstance(path, str))
    weights = oracle.get("weights")
    for name, each in oracle.items():
        if not (isinstance(weights, Mapping) and weights.get(name) == 0):
            # Members stand beside the weights that name them.
            yield from _models({**each, "weights": weights} if name == "members" and isinstance(each, Mapping) else each)


def worse(before: Mapping[str, Any], after: Mapping[str, Any], most: float) -> str | None:
    """Why a model that was trained further is rejected; None if it is not: its accuracy on the same held-out comparisons has fallen by more than
    `most`, and not by chance, by a paired bootstrap over the comparisons.

    Args:
        before, after: figures as `scoring.evaluate` gives them; older versions have kept none of single comparisons, and then any fall counts.
        most: the largest fall that is no reason.
    """
    was, now = before["accuracy"]["value"], after["accuracy"]["value"]
    if was is None or not was - now > most:
        return None
    said = f"its accuracy on held-out comparisons fell from {was:.3f} to {now:.3f}, by more than {most:g}"
    if OUTCOMES not in before:
        return said
    fell = bootstrap([one - other for one, other in zip(before[OUTCOMES], after[OUTCOMES], strict=True)])
    return f"{said}, and by {fell.low:.3f} at least" if fell.low > 0 else None
