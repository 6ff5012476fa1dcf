"""What the controller itself costs at 1,000, 10,000 and 100,000 groups of 4 x 512 tokens: its CPU time and its memory.

    python benchmarks/scale.py [--model DIRECTORY] [GROUPS ...]

Of the model only the tokenizer is read. TMPDIR says where the runs lie, which are removed: about 5 GB at 100,000.

One iteration of dpo on parts that do next to nothing, with answers of a usual size: an engine that hands out made-up responses, an
oracle that scores by length, a learner that only takes what it is given. Their own CPU time is subtracted. Each size is run three times:
straight through; and stopped twice and resumed, once half way through sampling and once at the first optimizer step. Every attempt is a
process of its own; what it needs is written to docs/results.md.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console

from onlinerl import app, config
from onlinerl.controller import loop
from onlinerl.engines.toy import ToyEngine
from onlinerl.errors import EngineError, LearnerError
from onlinerl.learners.toy import ToyLearner
from onlinerl.ops.batching import plan_step
from onlinerl.types import Group, Numbers, Request, Rollout, Sampling, SelfTest, TrainItem, TrainSequence, UpdateReport

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results.md"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
SIZES = (1_000, 10_000, 100_000)
SAMPLES, TOKENS = 4, 512
TOGETHER = 16
"""Groups that the engine has finished whenever it is looked at. It is faster than any real one, and so the disk is what it waits for."""
MOST_MS, MOST_TIMES, MOST_GIB = 2.0, 1.3, 1.0
STOPPED = 1
"""Exit code of an attempt that was stopped."""

theirs = [0.0]
"""CPU seconds of engine, oracle and learner."""


class Theirs:
    """CPU time that is not the controller's."""

    def __enter__(self) -> None:
        self._began = time.thread_time()

    def __exit__(self, *_: object) -> None:
        theirs[0] += time.thread_time() - self._began


def judge(groups: Sequence[dict]) -> list[list[float]]:
    """Longer is better."""
    with Theirs():
        return [[float(len(response)) for response in group["responses"]] for group in groups]


def install(stop_after: int | None, stop_training: bool) -> None:
    """Replace the work of the toys."""
    rng = np.random.default_rng(0)
    made = [
        (
            Numbers(rng.integers(0, 49_000, TOKENS).astype(np.uint32)),
            Numbers(rng.normal(-2, 1, TOKENS).astype(np.float32).astype(np.float64)),
            " ".join(map(str, rng.integers(0, 10_000, TOKENS - n))),
        )
        for n in range(64)
    ]
    known = [np.asarray(logprobs, np.float32) for _, logprobs, _ in made]

    def generate(self: ToyEngine, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Group]]:
        for start in range(0, len(requests), TOGETHER):
            asked = requests[start : start + TOGETHER]
            if stop_after is not None and len(asked[0].seeds) > 1 and start >= stop_after:
                raise EngineError("stopped", field="engine", fix="resume")
            with Theirs():
                groups = [
                    Group(prompt=one.prompt, rollouts=tuple(response(self, seed, sampling) for seed in one.seeds))
                    for one in asked
                ]
            yield groups

    def response(engine: ToyEngine, seed: int, sampling: Sampling) -> Rollout:
        token_ids, logprobs, text = made[seed % len(made)]
        return Rollout(
            token_ids=token_ids,
            logprobs=logprobs,
            text=text,
            finish_reason="stop",
            policy_version=engine.version,
            sampler=sampling,
            seed=seed,
        )

    def logprobs(self: ToyLearner, sequences: Sequence[TrainSequence], **_: object) -> list[np.ndarray]:
        with Theirs():
            return [known[i % len(known)] for i in range(len(sequences))]

    def update(
        self: ToyLearner, steps: Sequence[Sequence[TrainItem]], learning_rates: Sequence[float]
    ) -> Iterator[UpdateReport]:
        for items, _ in zip(steps, learning_rates, strict=True):
            if stop_training:
                raise LearnerError("stopped", field="learner", fix="resume")
            plan_step(items, 1, 16_384)
            yield UpdateReport(steps=1, tokens=sum(item.tokens for item in items), metrics=({"loss": 0.5},))

    def self_test(self: ToyLearner, items: Sequence[TrainItem], base_model: str) -> SelfTest:
        loss = float(np.log(2))
        return SelfTest(
            loss=loss,
            repeat_kl=0.0,
            stored_loss=loss,
            stored_loss_slope=0.0,
            stored_gaps={},
            noise=0.0,
            stored_tilts={},
            base_gap=0.0,
        )

    ToyEngine.generate, ToyLearner.logprobs = generate, logprobs  # type: ignore[method-assign,assignment]
    ToyLearner.update, ToyLearner.self_test = update, self_test  # type: ignore[method-assign]


def attempt(folder: Path, groups: int, stop: str, model: Path) -> int:
    """One process: start or resume; says what it took as the last line of its output."""
    install(groups // 2 if stop == "sampling" else None, stop == "training")
    took: dict[str, float] = {}

    def measured(parts: object, attempt: int = 0, original=loop.run) -> int:
        before = time.process_time()
        try:
            return original(parts, attempt)
        finally:
            took["cpu"] = time.process_time() - before - theirs[0]

    loop.run = measured
    console = Console(file=io.StringIO())
    try:
        if (folder / "scale").exists():
            app.resume(folder / "scale", [], console)
        else:
            app.run(config.parse(tree(folder, groups, model)), console)
    except (EngineError, LearnerError) as error:
        if error.cause != "stopped":
            raise
    took["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(json.dumps(took))
    return 0


def tree(folder: Path, groups: int, model: Path) -> dict:
    """The configuration, and its prompts."""
    for name, first, count in (("train", 0, groups), ("heldout", groups, 8)):
        rows = (json.dumps({"id": f"p{i}", "text": f"Film number {i} was"}) for i in range(first, first + count))
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return {
        "name": "scale",
        "runs": str(folder),
        "model": str(model),
        "iterations": 1,
        "algorithm": {"name": "dpo"},
        "oracle": {"name": "python", "function": "scale.judge", "groups_per_call": 16},
        "prompts": {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl"), "per_iteration": groups},
        "sampling": {"samples_per_prompt": SAMPLES, "max_new_tokens": TOKENS},
        "evaluation": {"prompts": 8, "max_mismatch_k3": 1e9},
        "training": {"batch_size": 64},
        "engine": {"name": "toy"},
        "learner": {"name": "toy"},
        "metrics": {"prometheus": False},
    }


def measure(groups: int, model: Path) -> dict[str, float]:
    """A straight run, and a run that is stopped twice."""
    found: dict[str, float] = {"groups": groups}
    for name, stops in (("straight", ["never"]), ("resumed", ["sampling", "training", "never"])):
        with tempfile.TemporaryDirectory() as folder:
            attempts = [json.loads(process(folder, groups, stop, model).splitlines()[-1]) for stop in stops]
            run = Path(folder) / "scale"
            found[f"{name} gib on disk"] = sum(f.stat().st_size for f in run.rglob("*") if f.is_file()) / (1 << 30)
        found[f"{name} ms"] = 1000 * sum(took["cpu"] for took in attempts) / groups
        found[f"{name} gib"] = max(took["peak"] for took in attempts)
    print(json.dumps(found), flush=True)
    return found


def process(folder: str, groups: int, stop: str, model: Path) -> str:
    """What one attempt printed."""
    command = [sys.executable, __file__, "--attempt", folder, str(groups), stop, str(model)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Measure, record. Returns 1 if a limit is not kept to."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", type=Path, default=MODEL)
    arguments.add_argument("groups", type=int, nargs="*", default=SIZES)
    asked = arguments.parse_args()
    rows = [measure(groups, asked.model.absolute()) for groups in asked.groups]
    ms, gib = [row["straight ms"] for row in rows], [max(row["straight gib"], row["resumed gib"]) for row in rows]
    lines = [
        f"| {int(row['groups']):,} | {row['straight ms']:.2f} | {row['straight gib']:.2f} | {row['resumed ms']:.2f} | "
        f"{row['resumed gib']:.2f} | {row['straight gib on disk']:.2f} |"
        for row in rows
    ]
    block = (
        f"Measured {datetime.now(UTC):%Y-%m-%d} with `python benchmarks/scale.py`: one iteration of dpo, {SAMPLES} responses of {TOKENS} "
        "tokens a group, on parts whose own CPU time is subtracted; on 2 shared cores, in CPU time.\n\n"
        "| groups | ms a group | peak GiB | ms a group, stopped twice and resumed | peak GiB of its attempts | GiB on disk |\n"
        "|---|---|---|---|---|---|\n"
        + "\n".join(lines)
        + f"\n\nLimits: {MOST_MS:g} ms a group; ms flat to within {MOST_TIMES:g}, here "
        f"{max(ms) / min(ms):.2f}; memory flat to within {MOST_GIB:g} GiB, here {max(gib) - min(gib):.2f}."
    )
    pattern = r"(<!-- figures: scale -->\n).*?(<!-- /figures -->)"
    RESULTS.write_text(re.sub(pattern, lambda m: f"{m[1]}{block}\n{m[2]}", RESULTS.read_text(), flags=re.DOTALL))
    print(block)
    return int(max(ms) > MOST_MS or max(ms) / min(ms) > MOST_TIMES or max(gib) - min(gib) > MOST_GIB)


if __name__ == "__main__":
    sys.modules["scale"] = sys.modules[__name__]
    if sys.argv[1:2] == ["--attempt"]:
        sys.exit(attempt(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5])))
    sys.exit(main())
