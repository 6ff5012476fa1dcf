"""A sweep over algorithms that real parts run in minutes, and that goes on where it has stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from digits import count_in_digits

FAMILIES = {
    "bco": "single responses, a loss of the whole step in two passes, a state that the checkpoint keeps",
    "dno_prct": "pairs, a teacher's answers, replay",
    "dr_po": "policy gradient, critic, a forced prefix",
    "lipo_lambda": "lists",
    "nash_md": "samples of a mixture",
}
"""One of each kind: which code of the engine, the learner and the loop it runs that the others do not."""
ITERATIONS = 2
"""The second one in a resumed run."""
REQUEUE = 75
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


KNOBS: dict[str, dict[str, Any]] = {
    "dr_po": {"missing_eos_score": None},
    **{name: {"kl_coef": 0.0} for name in ("p3o", "reinforce_pp", "rloo")},
}
"""Other than the defaults: a model of random weights hardly ever ends a response, and scores that are all the same train nothing; a price of the KL
inside the reward is refused in a run of one iteration, in which it is always 0."""


def write_sweep(folder: Path, model: Path, names: Sequence[str]) -> Path:
    """Small runs of the real parts with an oracle that tells any two texts apart: a model of random weights says little else."""
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
    return asking_for(ITERATIONS, folder, names)


def asking_for(iterations: int, folder: Path, names: Sequence[str]) -> Path:
    """The sweep with so many iterations a run; runs that have fewer are resumed."""
    sweep = folder / "sweep.yaml"
    algorithms = [{"name": name, **KNOBS[name]} if name in KNOBS else name for name in names]
    tree = {"base": "base.yaml", "name": "every", "axes": {"algorithm": algorithms}, "set": {"iterations": iterations}}
    sweep.write_text(yaml.safe_dump(tree))
    return sweep


def start(folder: Path, sweep: Path, *options: str) -> subprocess.Popen[bytes]:
    """A process that runs the sweep; what it says is added to `log` in the folder."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "onlinerl.cli", "sweep", str(sweep), *options]
    with (folder / "log").open("ab") as file:
        return subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=file, stderr=file, start_new_session=True
        )


def ran(folder: Path, sweep: Path, stopped_at: Path | None = None) -> None:
    """Run the sweep; with `stopped_at`, stop it as soon as that file or folder is there, and start it again."""
    log = folder / "log"
    process = start(folder, sweep)
    try:
        if stopped_at is not None:
            while process.poll() is None and not stopped_at.exists():
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == REQUEUE, log.read_text()[-3000:]
            process = start(folder, sweep)
        assert process.wait() in (0, 1), log.read_text()[-3000:]  # 1: a run has failed, which its own test says
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def resumed_once(folder: Path, model: Path, names: Sequence[str], stopped: str | None = None) -> dict[str, dict[str, Any]]:
    """One iteration of each on engines that stay up, and then, resumed by another process, the second one of each.

    Args:
        folder: for everything.
        model: the model.
        names: algorithms.
        stopped: where the second process is stopped in the middle, and started again.

    Returns:
        By algorithm: how the iteration stood that the first process has left, phase by phase.
    """
    write_sweep(folder, model, names)
    made = folder / "runs" / "every"
    ran(folder, asking_for(1, folder, names))
    left = {name: phases(run_of(made, name), 1) for name in names}
    stopped_at = None if stopped is None else run_of(made, stopped) / "iterations" / "0002"
    ran(folder, asking_for(ITERATIONS, folder, names), stopped_at)
    print((folder / "log").read_text()[-3000:])
    return left


def run_of(made: Path, name: str) -> Path:
    """The run of an algorithm in the folder of the sweep."""
    [run] = [each for each in json.loads((made / "sweep.json").read_text())["runs"] if each.partition("-")[0] == name]
    return made / str(run)  # knobs follow the name


def phases(run: Path, iteration: int) -> dict[str, Any]:
    """What each finished phase of an iteration has recorded; nothing of a run that never got there."""
    file = run / f"iterations/{iteration:04d}/manifest.json"
    found: dict[str, Any] = json.loads(file.read_text())["phases"] if file.exists() else {}
    return found
