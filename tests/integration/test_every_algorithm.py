"""Every algorithm on vLLM and DeepSpeed, two iterations each, in one sweep that is stopped in the middle and goes on: `make test-algorithms`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from digits import count_in_digits

from onlinerl import registry
from onlinerl.stores.summary import summarise

NAMES = registry.names("algorithms")
REQUEUE = 75
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ITERATIONS = 2

pytestmark = [pytest.mark.engine, pytest.mark.algorithms, pytest.mark.timeout(4 * 3600)]


def write_sweep(folder: Path, model: Path) -> Path:
    """A small run of the real parts with an oracle that tells any two texts apart: a model of random weights says little else."""
    (folder / "separates.py").write_text(
        "import zlib\n\n\ndef judge(groups):\n    return [[zlib.crc32(r.encode()) / 2**32 for r in g['responses']] for g in groups]\n"
    )
    words = ["old", "new", "long", "short", "slow", "fast", "dark", "light", "good", "bad", "fine", "sad"]
    answer = "the actor was nice and the plot was superb"
    openings = [{"text": f"the film was {word} and the story", "reference_answer": answer} for word in words]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, openings)))
    (folder / "heldout.jsonl").write_text("\n".join(json.dumps({"text": f"the music {w} the camera"}) for w in ("of", "and")))
    counting = folder / "model"  # prompts with goals say them in digits
    shutil.copytree(model, counting)
    count_in_digits(counting, NUMBERS)
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
    sweep.write_text(yaml.safe_dump({"base": "base.yaml", "name": "every", "axes": {"algorithm": "all"}}))
    return sweep


def start(folder: Path, sweep: Path, log: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "onlinerl.cli", "sweep", str(sweep)]
    with log.open("ab") as file:
        return subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=file, stderr=file, start_new_session=True
        )


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the sweep, which was stopped in the second iteration of its second run."""
    folder = tmp_path_factory.mktemp("every")
    sweep, log = write_sweep(folder, tiny_llama), folder / "log"
    made = folder / "runs" / "every"
    process = start(folder, sweep, log)
    try:
        second = made / NAMES[1] / "iterations" / "0002"
        while process.poll() is None and not second.exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == REQUEUE, log.read_text()[-3000:]
        process = start(folder, sweep, log)
        assert process.wait() in (0, 1), log.read_text()[-3000:]  # 1: a run has failed, which its own test says
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    yield made
    print(log.read_text()[-3000:])


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_real_parts(runs: Path, name: str) -> None:
    run = runs / name
    record: dict[str, Any] = json.loads((runs / "sweep.json").read_text())
    assert name not in record.get("failed", {}), record["failed"][name]
    rows = summarise(run)["iterations"]
    assert [row["iteration"] for row in rows] == list(range(ITERATIONS + 1))
    assert all(row["sync"]["proved"] for row in rows)
    trained = [json.loads((run / f"iterations/{t:04d}/manifest.json").read_text())["phases"]["train"] for t in (1, 2)]
    assert all(each["steps"] > 0 and each["skipped"] == 0 for each in trained), trained
    assert rows[-1]["kl_ref"] != 0, "no step moved the weights"
