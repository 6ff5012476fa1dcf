"""A sweep over all algorithms that real parts run in minutes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml
from digits import count_in_digits

from onlinerl import registry

ITERATIONS = 2
WORDS = [f"w{i}" for i in range(10)]
"""Of the tiny model, that stand for nothing else."""
JUDGE = """
import math, zlib

def judge(groups):
    return [said([zlib.crc32(r.encode()) / 2**32 for r in g["responses"]]) for g in groups]

def said(scores):
    members = [[[1 / (1 + math.exp((b - a) / t)) for b in scores] for a in scores] for t in (0.3, 1.0)]
    return {"scores": scores, "members": members}
"""
"""Two members, because some weigh pairs by how far they disagree."""


KNOBS = {"dr_po": {"missing_eos_score": None}}
"""Other than the defaults: a model of random weights hardly ever ends a response, and scores that are all the same train nothing."""


def write_sweep(folder: Path, model: Path) -> Path:
    """A small run of the real parts with an oracle that tells any two texts apart: a model of random weights says little else."""
    (folder / "separates.py").write_text(JUDGE)
    words = ["old", "new", "long", "short", "slow", "fast", "dark", "light", "good", "bad", "fine", "sad"]
    answer = "the actor was nice and the plot was superb"
    openings = [{"text": f"the film was {word} and the story", "reference_answer": answer} for word in words]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, openings)))
    (folder / "heldout.jsonl").write_text("\n".join(json.dumps({"text": f"the music {w} the camera"}) for w in ("of", "and")))
    counting = folder / "model"  # prompts with goals say them in digits
    shutil.copytree(model, counting)
    count_in_digits(counting, WORDS)
    base = {
        "name": "base",
        "runs": str(folder / "runs"),
        "model": str(counting),
        "iterations": ITERATIONS,
        "algorithm": {"name": "dpo"},
        "oracle": {"name": "python", "function": "separates.judge"},
        "prompts": {
            "train": str(folder / "train.jsonl"),
            "heldout": str(folder / "heldout.jsonl"),
            "per_iteration": 4,
            "reuse": True,  # dynamic sampling could need more than there are
        },
        "sampling": {"samples_per_prompt": 4, "max_new_tokens": 10},
        "training": {"batch_size": 2, "learning_rate": 1e-3},
        "engine": {"kv_cache_gib": 0.1, "dtype": "float32", "max_num_seqs": 8},
        "learner": {"dtype": "float32"},
        "cluster": {"device": "cpu"},
        "metrics": {"prometheus": False},
        "checkpoints": {"min_free_gib": 0, "keep": 1, "exports": "last"},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    sweep = folder / "sweep.yaml"
    algorithms = [{"name": name, **KNOBS[name]} if name in KNOBS else name for name in registry.names("algorithms")]
    sweep.write_text(yaml.safe_dump({"base": "base.yaml", "name": "every", "axes": {"algorithm": algorithms}}))
    return sweep
