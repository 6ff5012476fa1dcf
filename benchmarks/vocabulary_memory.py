"""Peak memory of log-probs and sums over a large vocabulary: from all logits at once, and in pieces as the learner makes them.

python benchmarks/vocabulary_memory.py --tokens 8000 --vocabulary 150000 --out memory.json

Each figure is of a process of its own on the CPU: the highest resident memory of forward and backward, above what was there before. Side by
side the two forms are measured with as large a vocabulary as memory allows (`--beside`; by default what fits into half of what is free):
tables of all logits grow with it, and 8,000 tokens of 150,000 need 5 GB each. The form in pieces is measured with the whole vocabulary too.

It ends with exit code 1 if the form in pieces takes more memory than `TABLES` of one piece, or if values or gradients of the two forms are
further apart than `APART` of the largest one of the plain form.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30
CASES: dict[str, tuple[str, ...]] = {
    "log-probs": ("logprobs",),
    "log-probs, entropy": ("logprobs", "entropy"),
    "log-probs, KL of a reference": ("logprobs", "reference_kl"),
}
TABLES_AT_ONCE = 6
"""So many tables of all logits the plain computation is expected to need at most: two models, log-probs, probabilities, gradients."""


TABLES = 3.0
"""So many tables of the logits of one piece the form in pieces may need at most, the gradient of the output matrix included. Torch's allocator
counts 2.3 of them (tests/unit/test_token_terms.py); resident memory has what it has not given back besides."""
APART = 1e-5
"""Of the largest value, and of the largest number in a gradient: single precision rounds the sum over a vocabulary by no less."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--beside", type=int, help="vocabulary with which all logits exist at once, beside the form in pieces")
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--width", type=int, default=64, help="of the hidden states")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    fits = int(available() / 2 / (TABLES_AT_ONCE * 4 * options.tokens))
    beside = options.beside or min(options.vocabulary, fits)
    results = []
    for name in CASES:
        job = {"tokens": options.tokens, "vocabulary": beside, "width": options.width, "name": name}
        at_once, pieces = (isolated(measure, {**job, "form": form}) for form in ("at once", "pieces"))
        whole = isolated(measure, {**job, "vocabulary": options.vocabulary, "form": "pieces"})
        gap = isolated(
            compare,
            {
                **job,
                "vocabulary": options.vocabulary,
                "tokens": min(options.tokens, 1200, fits * options.tokens // options.vocabulary),
            },
        )
        results.append(
            {
                **job,
                "vocabulary": options.vocabulary,
                "beside": beside,
                "at_once_bytes": at_once["peak"],
                "pieces_beside_bytes": pieces["peak"],
                "pieces_bytes": whole["peak"],
                "ratio": at_once["peak"] / pieces["peak"],
                "seconds_ratio": pieces["seconds"] / at_once["seconds"],
                **gap,
            }
        )
        print(line(results[-1]), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    if wrong := [f"{result['name']}: {what}" for result in results for what in beyond(result)]:
        raise SystemExit("\n".join(wrong))


def piece(result: dict[str, Any]) -> int:
    """Bytes of the logits of as many tokens as exist at a time."""
    from onlinerl.learners._policy import CHUNK

    return CHUNK * int(result["vocabulary"]) * 4


def beyond(result: dict[str, Any]) -> list[str]:
    """What of a result is out of its bound, in words."""
    tables = result["pieces_bytes"] / piece(result)
    found = [f"{tables:.1f} tables of a piece, more than {TABLES:g}"] if tables > TABLES else []
    for what in ("value", "gradient"):
        gap = result[f"{what}_gap"]
        if not gap <= APART:  # nor NaN
            found.append(f"{what}s differ by {gap:.1e} of the largest, more than {APART:g}")
    return found


def line(result: dict[str, Any]) -> str:
    table = result["tokens"] * result["beside"] * 4
    return (
        f"{result['name']}, {result['tokens']:,} tokens: vocabulary {result['beside']:,} at once {result['at_once_bytes'] / GIB:.2f} GiB "
        f"({result['at_once_bytes'] / table:.1f} tables of all logits), in pieces {result['pieces_beside_bytes'] / GIB:.2f} GiB: "
        f"{result['ratio']:.1f} times less, CPU time x {result['seconds_ratio']:.2f}; vocabulary {result['vocabulary']:,} in pieces "
        f"{result['pieces_bytes'] / GIB:.2f} GiB ({result['pieces_bytes'] / piece(result):.1f} tables of 1,024 tokens); on {result['compared']:,} "
        f"tokens values differ by {result['value_gap']:.1e} of the largest, gradients by {result['gradient_gap']:.1e}"
    )


def available() -> int:
    """Bytes that the kernel says could be taken."""
    (found,) = (row for row in Path("/proc/meminfo").read_text().splitlines() if row.startswith("MemAvailable"))
    return int(found.split()[1]) * 1024


def isolated(function: Callable[[dict[str, Any]], dict[str, float]], job: dict[str, Any]) -> dict[str, float]:
    """What a function returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (job,))


def resident(field: str) -> int:
    (found,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{field}:"))
    return int(found.split()[1]) * 1024


def prepared(job: dict[str, Any]) -> tuple[Callable[[str], Any], list[Any]]:
    """What computes the terms in one form or the other, and the leaves that get gradients."""
    import torch
    from torch import nn

    from onlinerl.families import LogitRule
    from onlinerl.learners._policy import LogProbHead
    from onlinerl.learners._vocabulary import FrozenStates, TokenTerms

    torch.manual_seed(0)
    torch.set_num_threads(1)
    wanted = CASES[job["name"]]
    output, other = (nn.Linear(job["width"], job["vocabulary"], bias=False) for _ in range(2))
    hidden, theirs = (torch.randn(job["tokens"], job["width"]) for _ in range(2))
    hidden.requires_grad_()
    targets = torch.randint(0, job["vocabulary"], (job["tokens"],))
    weights = torch.linspace(-1, 2, job["tokens"])
    frozen = FrozenStates(theirs, other.weight.detach(), None, LogitRule())

    def pieces() -> TokenTerms:
        beside = frozen if "reference_kl" in wanted else None
        return LogProbHead(output, LogitRule())(hidden, targets, 1.0, entropy="entropy" in wanted, reference=beside)

    def at_once() -> TokenTerms:
        logprobs = torch.log_softmax(output(hidden), dim=-1)
        entropy = kl = None
        if "entropy" in wanted:
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        if "reference_kl" in wanted:
            with torch.no_grad():
                reference = torch.log_softmax(theirs @ other.weight.t(), dim=-1)
            kl = (reference.exp() * (reference - logprobs)).sum(-1)
        return TokenTerms(logprobs.gather(1, targets[:, None])[:, 0], entropy, None, kl)

    def run(form: str) -> Any:
        terms = at_once() if form == "at once" else pieces()
        total = sum(((weights * getattr(terms, name)).sum() for name in wanted), torch.zeros(()))
        total.backward()
        return {name: getattr(terms, name).detach() for name in wanted}

    return run, [hidden, output.weight]


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Peak bytes and CPU seconds of forward and backward."""
    import time

    run, _ = prepared(job)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    started = time.process_time()
    run(job["form"])
    return {"peak": resident("VmHWM") - before, "seconds": time.process_time() - started}


def compare(job: dict[str, Any]) -> dict[str, float]:
    """How far values and gradients of the two forms are apart, of few enough tokens for both."""
    run, leaves = prepared(job)
    found = []
    for form in ("at once", "pieces"):
        for leaf in leaves:
            leaf.grad = None
        values = run(form)
        found.append((values, [leaf.grad.clone() for leaf in leaves]))
    (ours, our_gradients), (theirs, their_gradients) = found
    return {
        "compared": job["tokens"],
        "value_gap": max(float((ours[n] - theirs[n]).abs().max() / ours[n].abs().max()) for n in ours),
        "gradient_gap": max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(our_gradients, their_gradients, strict=True)
        ),
    }


if __name__ == "__main__":
    main()
