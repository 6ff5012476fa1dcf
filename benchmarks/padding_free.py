"""Time and memory of the learner's training step, packed (`learner.padding_free`) beside padded.

python benchmarks/padding_free.py --lengths hh,gsm8k,rollouts --out packing.json

A random Llama takes forward and backward passes of DPO over the same pairs, cut up by the same budget of positions. The two forms take
turns. Reported are ratios, packed to padded: of CPU seconds (median over rounds), of positions that were computed, of the highest resident
memory above what was there before. Lengths, in words, 4 for 3 tokens: `hh` and `gsm8k` are those of the files under `--data`, skipped where
they are not there; `rollouts` stands for responses of one prompt, log-normal and cut off at 256 tokens.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Lengths = list[tuple[int, tuple[int, int]]]
"""Of each pair: tokens of the prompt, and of both responses."""
PAIRS, LONGEST = 48, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="hh,gsm8k,rollouts")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tokens-per-microbatch", type=int, default=2048)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager", "flash_attention_2"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    results = []
    for name in options.lengths.split(","):
        lengths = list(LENGTHS[name](options.data))
        if not lengths:
            print(f"{name}: no data in {options.data}, skipped")
            continue
        results.append({"lengths": name, **measure(lengths, options)})
        print(line(results[-1]), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")


def line(result: dict[str, Any]) -> str:
    return (
        f"{result['lengths']}: {result['pairs']} pairs, {result['tokens']:,} tokens (longest {result['longest']}), packed to padded: "
        f"time x {result['time']:.2f}, positions x {result['positions']:.2f}, micro-batches {result['micro_batches'][1]} to "
        f"{result['micro_batches'][0]}, peak memory x {result['memory']:.2f}; gradients differ by {result['gradient_gap']:.0e} of their norm"
    )


def measure(lengths: Lengths, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from onlinerl.learners._policy import Policy
    from onlinerl.ops.batching import packed_tokens, padded_tokens, plan_step

    torch.set_num_threads(1)
    items, budget = pairs(lengths), options.tokens_per_microbatch
    plans = {packed: plan_step(items, 1, budget, padding_free=packed)[0] for packed in (False, True)}
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    policies = {}
    for packed in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4000,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
        model = LlamaForCausalLM._from_config(config, attn_implementation=options.attention, dtype=dtype)
        policies[packed] = Policy(model.to(options.device).eval(), padding_free=packed)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    memory: dict[bool, list[int]] = {False: [], True: []}
    for number in range(options.rounds + 1):  # the first one warms up
        for packed in (False, True) if number % 2 else (True, False):
            policies[packed].zero_grad()
            before, started = begin(options.device), clock(options.device)
            step(policies[packed], plans[packed], options.device)
            if number:
                seconds[packed].append(clock(options.device) - started)
                memory[packed].append(peak(options.device) - before)
    gradients = {k: torch.cat([p.grad.flatten().double() for p in policy.parameters()]) for k, policy in policies.items()}
    positions = [sum(map(padded_tokens, plans[False])), sum(map(packed_tokens, plans[True]))]
    return {
        "attention": options.attention,
        "budget": budget,
        "pairs": len(items),
        "tokens": positions[1],
        "longest": max(p + max(r) for p, r in lengths),
        "time": statistics.median(seconds[True]) / statistics.median(seconds[False]),
        "seconds": [seconds[False], seconds[True]],
        "positions": positions[1] / positions[0],
        "micro_batches": [len(plans[False]), len(plans[True])],
        "memory": statistics.median(memory[True]) / statistics.median(memory[False]),
        "bytes": [memory[False], memory[True]],
        "gradient_gap": float((gradients[True] - gradients[False]).norm() / gradients[False].norm()),
    }


def step(policy: Any, micro: list[list[Any]], device: str) -> None:
    """Forward and backward, as a rank of the torch learner does it."""
    from onlinerl.algorithms.dpo import Dpo
    from onlinerl.ops.batching import collate

    algorithm, count = Dpo(), sum(map(len, micro))
    for items in micro:
        batch = collate(items).to(device)
        (algorithm.loss(policy(batch), batch).total / count).backward()


def clock(device: str) -> float:
    """CPU seconds of this process, which other processes do not lengthen; on a GPU, those of the clock."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def begin(device: str) -> int:
    """Let the peak of memory begin anew. Returns what is there."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    from onlinerl.learners._loading import give_back

    give_back()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def resident(field: str) -> int:
    (found,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{field}:"))
    return int(found.split()[1]) * 1024


# --- lengths ---


def pairs(lengths: Lengths) -> list[Any]:
    from onlinerl.types import TrainItem, TrainSequence

    rng = np.random.default_rng(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(map(int, rng.integers(3, 4000, count)))

    def item(number: int, prompt: tuple[int, ...], responses: tuple[int, int]) -> TrainItem:
        both = (ids(n) for n in responses)
        reference = lambda n: np.full(n, -8.0, np.float32)  # noqa: E731
        made = (TrainSequence(prompt_ids=prompt, response_ids=r, reference_logprobs=reference(len(r))) for r in both)
        return TrainItem(prompt_id=str(number), sequences=tuple(made))

    return [item(i, ids(prompt), responses) for i, (prompt, responses) in enumerate(lengths)]


def tokens(text: str) -> int:
    return min(LONGEST, max(1, round(len(text.split()) * 4 / 3)))


def hh(data: Path) -> Iterator[tuple[int, tuple[int, int]]]:
    """Dialogues: the prompt is all but the last turn."""
    file = data / "hh_rlhf" / "harmless_base.jsonl.gz"
    if not file.exists():
        return
    with gzip.open(file, "rt") as rows:
        for _, row in zip(range(PAIRS), rows, strict=False):
            both = [str(json.loads(row)[side]).rpartition("\n\nAssistant:") for side in ("chosen", "rejected")]
            yield tokens(both[0][0]), (tokens(both[0][2]), tokens(both[1][2]))


def gsm8k(data: Path) -> Iterator[tuple[int, tuple[int, int]]]:
    """Problems, with their solution and that of the next one."""
    file = data / "gsm8k" / "train.jsonl"
    if not file.exists():
        return
    rows = [json.loads(row) for row in file.read_text().splitlines()[: PAIRS + 1]]
    for row, other in itertools.pairwise(rows):
        yield tokens(row["question"]), (tokens(row["answer"]), tokens(other["answer"]))


def rollouts(_: Path) -> Iterator[tuple[int, tuple[int, int]]]:
    rng = np.random.default_rng(0)
    for _number in range(PAIRS):
        first, second = (int(np.clip(rng.lognormal(4.2, 0.8), 2, 256)) for _ in range(2))
        yield int(rng.integers(10, 60)), (first, second)


LENGTHS = {"hh": hh, "gsm8k": gsm8k, "rollouts": rollouts}


if __name__ == "__main__":
    main()
