"""Comparisons of words of the tiny model's vocabulary, and configurations that train on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

PLACES = ["film", "movie", "story", "plot", "actor", "scene"]
BEFORE = ["the", "a", "that", "this", "in", "on", "with", "and", "it", "is"]
CIRCLE, ORDER = ("one", "two", "three"), ("four", "five", "six")


def prompts(count: int) -> list[str]:
    """Different prompts."""
    made = [f"{a} {b} {c}" for a in BEFORE for b in PLACES for c in PLACES]
    return made[:count]


def taste(count: int) -> list[dict[str, Any]]:
    """A good word beats a bad one."""
    good, bad = ["good", "great", "lovely"], ["bad", "awful", "sad"]
    return [
        {"prompt": prompt, "chosen": f" {good[i % 3]}", "rejected": f" {bad[i // 3 % 3]}", "source": "even" if i % 2 else "odd"}
        for i, prompt in enumerate(prompts(count))
    ]


def circles(count: int, share: float) -> list[dict[str, Any]]:
    """Three responses to each prompt, all pairs compared. Of a share of the prompts the first beats the second, the second the third and the
    third the first; of the others the first beats the second and third, and the second the third."""
    made = []
    for i, prompt in enumerate(prompts(count)):
        cyclic = (i % 10) < round(10 * share)
        words = CIRCLE if cyclic else ORDER
        for a, b in combinations(range(3), 2):
            better, worse = (b, a) if cyclic and (a, b) == (0, 2) else (a, b)
            made.append({"prompt": prompt, "chosen": f" {words[better]}", "rejected": f" {words[worse]}"})
    return made


def games(count: int, words: Sequence[str]) -> list[dict[str, Any]]:
    """Rock, paper and scissors: every word is one of the three, by its place, and three words are compared after each prompt."""
    made = []
    for i, prompt in enumerate(prompts(count)):
        kinds = [words[kind::3] for kind in range(3)]
        rock, paper, scissors = (f" {kind[(i * step) % len(kind)]}" for kind, step in zip(kinds, (1, 3, 5), strict=True))
        for winner, loser in ((paper, rock), (scissors, paper), (rock, scissors)):
            made.append({"prompt": prompt, "chosen": winner, "rejected": loser})
    return made


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """As JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_config(folder: Path, model: Path, rows: Iterable[Mapping[str, Any]], **sections: Any) -> Path:
    """A configuration of `train-rm` that trains on these rows; dictionaries go on top of the defaults here."""
    folder.mkdir(parents=True, exist_ok=True)
    tree: dict[str, Any] = {
        "name": "tiny",
        "model": str(model),
        "runs": str(folder / "reward_models"),
        "reward_model": {"objective": "bradley_terry"},
        "preferences": {
            "train": write_rows(folder / "preferences.jsonl", rows),
            "heldout_share": 0.3,
            "apply_chat_template": False,
            "max_length": 64,
        },
        "training": {"batch_size": 16, "learning_rate": 0.003, "epochs": 2},
        "learner": {"name": "torch", "dtype": "float32", "threads": 1},
        "checkpoints": {"every": 3, "min_free_gib": 0.0},
        "cluster": {"device": "cpu"},
    }
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, Mapping) else value
    path = folder / "reward_model.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
