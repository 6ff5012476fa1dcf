"""What it saves to sample while the learner trains: seconds of an iteration with `schedule.max_lag` 0 and 1, beside those of the longer part.

    python benchmarks/lag.py
    python benchmarks/lag.py real

The first on the toy engine and learner, made as slow as parts that have a core each: the engine takes some time per prompt, the learner some per
response and per optimizer step; once the engine is the longer part, once the learner. Says the ratio of an iteration with lag to what the
engine, or the learner, is busy for in one where everything runs in turn, whichever is more, and writes it to docs/results.md. The second does
the same with a smaller quickstart on vLLM and DeepSpeed, a core each (engine.threads=1, learner.threads=1), on 2 cores that do nothing else.
"""

from __future__ import annotations

import io
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from onlinerl import app, config, graph
from onlinerl.engines.toy import ToyEngine
from onlinerl.learners.toy import ToyLearner
from onlinerl.stores.summary import records
from onlinerl.types import Group, Request, Sampling, TrainItem, TrainSequence, UpdateReport

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results.md"
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
PROMPTS, HELDOUT, ITERATIONS = 64, 8, 6
LOGPROB_S = 0.005
CASES = ((0.0625, 0.1875), (0.03125, 0.375))
"""Seconds that the engine takes per prompt, and the learner per step of 8 responses."""
case = CASES[0]
"""The one that is being measured."""
LIMIT = 1.2
REAL = {
    "iterations": 4,
    "prompts.per_iteration": 24,
    "evaluation.prompts": 16,
    "engine.threads": 1,
    "learner.threads": 1,
    "metrics.prometheus": "false",
}
STEADY = slice(2, None)
"""The first two iterations are sampled by the same version, one after the other."""


def judge(groups: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Takes no time."""
    return [[float(len(response)) for response in group["responses"]] for group in groups]


def generate(self: ToyEngine, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Group]]:
    """As an engine that takes the seconds of the case per prompt."""
    for groups in _generate(self, requests, sampling):
        time.sleep(case[0])
        yield groups


def logprobs(self: ToyLearner, sequences: Sequence[TrainSequence], **options: Any) -> list[np.ndarray]:
    """As a learner that takes LOGPROB_S per response."""
    time.sleep(LOGPROB_S * len(sequences))
    return _logprobs(self, sequences, **options)


def update(
    self: ToyLearner, steps: Sequence[Sequence[TrainItem]], rates: Sequence[float], **options: Any
) -> Iterator[UpdateReport]:
    """As a learner that takes the seconds of the case per step."""
    for report in _update(self, steps, rates, **options):
        time.sleep(case[1])
        yield report


_generate, _logprobs, _update = ToyEngine.generate, ToyLearner.logprobs, ToyLearner.update


def run(folder: Path, name: str, schedule: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What the phases of every iteration recorded."""
    train = PROMPTS * ITERATIONS
    for file, first, count in (("train", 0, train), ("heldout", train, HELDOUT)):
        rows = [json.dumps({"id": f"p{i}", "text": f"Film number {i} was"}) for i in range(first, first + count)]
        (folder / f"{file}.jsonl").write_text("\n".join(rows))
    tree = {
        "name": name,
        "runs": str(folder),
        "model": str(MODEL),
        "iterations": ITERATIONS,
        "algorithm": {"name": "grpo"},
        "oracle": {"name": "python", "function": "lag.judge"},
        "prompts": {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl"), "per_iteration": PROMPTS},
        "sampling": {"samples_per_prompt": 2, "max_new_tokens": 4},
        "training": {"batch_size": 8},
        "schedule": schedule,
        "engine": {"name": "toy"},
        "learner": {"name": "toy"},
        "metrics": {"prometheus": False},
    }
    app.run(config.parse(tree), Console(file=io.StringIO()))
    return records(folder / name)


def run_really(folder: Path, name: str, schedule: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The same of a run on real parts."""
    keys = (
        REAL
        | {"name": name, "runs": folder, "model": MODEL}
        | {f"schedule.{key}": json.dumps(value) for key, value in schedule.items()}
    )
    app.run(config.load(QUICKSTART, [f"{key}={value}" for key, value in keys.items()]), Console(file=io.StringIO()))
    return records(folder / name)


def seconds(found: dict[int, dict[str, Any]]) -> float:
    """Of an iteration: from one commit to the next, median."""
    ends = [found[t]["commit"]["ended"] for t in sorted(found)]
    return statistics.median([end - start for start, end in pairwise(ends)][STEADY])


def busy(found: dict[int, dict[str, Any]], part: str) -> float:
    """Seconds that a part has something to do in an iteration, median."""
    mine = [phase.name for phase in graph.PHASES if part in phase.alone | phase.shares]
    return statistics.median(sum(found[t][name]["seconds"] for name in mine) for t in sorted(found)[1:])


HEAD = ("engine alone", "learner alone", "in turn", "side by side, lag 0", "lag 1", "of the longer one", "limit")


def compare(start: Callable[[Path, str, dict[str, Any]], dict[int, dict[str, Any]]]) -> tuple[str, float]:
    """A row under HEAD, and the ratio in it."""
    with tempfile.TemporaryDirectory() as place:
        turns = start(Path(place), "turns", {"stream": False, "evaluate_beside": False})
        beside, lagged = (start(Path(place), f"lag{lag}", {"max_lag": lag}) for lag in (0, 1))
    parts = [busy(turns, part) for part in ("engine", "learner")]
    ratio = seconds(lagged) / max(parts)
    times = [*parts, seconds(turns), seconds(beside), seconds(lagged)]
    return f"{' | '.join(f'{each:.1f}' for each in times)} | {ratio:.2f} | {LIMIT} |", ratio


def record(marker: str, said: str, head: Sequence[str], rows: Sequence[str]) -> None:
    """Replace a table in docs/results.md, and print it."""
    block = "\n".join(
        [f"Measured {datetime.now(UTC):%Y-%m-%d} with {said}\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]
    )
    pattern = rf"(<!-- figures: {marker} -->\n).*?(<!-- /figures -->)"
    RESULTS.write_text(re.sub(pattern, lambda m: f"{m[1]}{block}\n{m[2]}", RESULTS.read_text(), flags=re.DOTALL))
    print(block)


def slowed() -> float:
    """Measure the toys."""
    global case
    ToyEngine.generate = generate  # type: ignore[method-assign]
    ToyLearner.logprobs = logprobs  # type: ignore[assignment, method-assign]
    ToyLearner.update = update  # type: ignore[method-assign]
    rows, ratios = [], []
    for case in CASES:
        row, ratio = compare(run)
        rows.append(f"| {case[0]:g} | {case[1]:g} | {row}")
        ratios.append(ratio)
    said = (
        f"`python benchmarks/lag.py`: {PROMPTS} prompts of 2 responses, steps of 8 responses, "
        f"{LOGPROB_S} s a response whose log-probs the learner gives; seconds of an iteration."
    )
    record("lag", said, ("engine, s a prompt", "learner, s a step", *HEAD), rows)
    return max(ratios)


def really() -> float:
    """Measure the real parts."""
    row, ratio = compare(run_really)
    said = (
        f"`python benchmarks/lag.py real`: the quickstart's model and sampling, {REAL['prompts.per_iteration']} prompts an iteration, "
        f"{REAL['evaluation.prompts']} held-out ones, a core for the engine and one for the learner; seconds of an iteration."
    )
    record("lag, real parts", said, HEAD, [f"| {row}"])
    return ratio


def main() -> int:
    """Measure, record. Returns 1 if a ratio is above the limit."""
    return int((really() if sys.argv[1:] == ["real"] else slowed()) > LIMIT)


if __name__ == "__main__":
    sys.modules["lag"] = sys.modules[__name__]
    sys.exit(main())
