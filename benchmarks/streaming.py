"""What it saves to judge while the engine samples: seconds of `sample` and `label`, one after the other and side by side.

    python benchmarks/streaming.py

One iteration on the toy engine and learner, with an engine that takes SAMPLE_S per prompt and an oracle that takes CALL_S per call
and allows WORKERS calls at once. Says the ratio of the time from the first prompt to the last label to the longer of the two phases
alone, and writes it to docs/results.md.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from onlinerl import app, config
from onlinerl.engines.toy import ToyEngine
from onlinerl.stores.summary import records
from onlinerl.types import Group, Request, Sampling

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results.md"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
PROMPTS, SAMPLE_S, CALL_S, WORKERS = 64, 0.0625, 0.5, 8
LIMIT = 1.15


def judge(groups: Sequence[dict]) -> list[list[float]]:
    """Takes its time."""
    time.sleep(CALL_S)
    return [[float(len(response)) for response in group["responses"]] for group in groups]


def slow(engine: ToyEngine, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Group]]:
    """As an engine that takes SAMPLE_S per prompt."""
    for groups in generate(engine, requests, sampling):
        if len(groups[0].rollouts) > 1:  # the answers to held-out prompts are not what is measured
            time.sleep(SAMPLE_S)
        yield groups


generate = ToyEngine.generate


def run(folder: Path, *, stream: bool) -> dict[str, dict[str, float]]:
    """What the phases of iteration 1 recorded."""
    for name, first, count in (("train", 0, PROMPTS), ("heldout", PROMPTS, 8)):
        rows = [json.dumps({"id": f"p{i}", "text": f"Film number {i} was"}) for i in range(first, first + count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    name = "stream" if stream else "turns"
    tree = {
        "name": name,
        "runs": str(folder),
        "model": str(MODEL),
        "iterations": 1,
        "algorithm": {"name": "dpo"},
        "oracle": {"name": "python", "function": "streaming.judge", "max_concurrent": WORKERS},
        "prompts": {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl"), "per_iteration": PROMPTS},
        "sampling": {"samples_per_prompt": 2, "max_new_tokens": 4},
        "schedule": {"stream": stream, "evaluate_beside": False},
        "engine": {"name": "toy"},
        "learner": {"name": "toy"},
        "metrics": {"prometheus": False},
    }
    app.run(config.parse(tree), Console(file=io.StringIO()))
    return records(folder / name)[1]


def main() -> int:
    """Measure, record. Returns 1 if the ratio is above the limit."""
    ToyEngine.generate = slow  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as place:
        apart, beside = run(Path(place), stream=False), run(Path(place), stream=True)
    alone = {name: apart[name]["ended"] - apart[name]["began"] for name in ("sample", "label")}
    together = beside["label"]["ended"] - beside["sample"]["began"]
    ratio = together / max(alone.values())
    block = (
        f"Measured {datetime.now(UTC):%Y-%m-%d} with `python benchmarks/streaming.py`: {PROMPTS} prompts, an engine of {SAMPLE_S} s a prompt, "
        f"an oracle of {CALL_S} s a call with {WORKERS} calls at once.\n\n"
        "| sample alone | label alone | one after the other | side by side | of the longer one | limit |\n|---|---|---|---|---|---|\n"
        f"| {alone['sample']:.1f} s | {alone['label']:.1f} s | {sum(alone.values()):.1f} s | {together:.1f} s | {ratio:.2f} | {LIMIT} |"
    )
    pattern = r"(<!-- figures: streaming -->\n).*?(<!-- /figures -->)"
    RESULTS.write_text(re.sub(pattern, lambda m: f"{m[1]}{block}\n{m[2]}", RESULTS.read_text(), flags=re.DOTALL))
    print(block)
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.modules["streaming"] = sys.modules[__name__]
    sys.exit(main())
