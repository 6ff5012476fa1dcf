"""Values as a run stores them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onlinerl.types import Failure, Group, Label, LogProbs, Pair, Prompt, Rollout, Sampling, TrainedPair, Verdict

WORDS = 'the film was a good story and it \\ " { } naïve'.split()  # noqa: SIM905


def group(number: int, *, samples: int = 2, tokens: int | None = None, rejected: Sequence[str] = ()) -> Group:
    """The responses to prompt `number`, the same at every call."""
    rng = np.random.default_rng(number)

    def response(seed: int) -> Rollout:
        length = int(rng.integers(1, 20)) if tokens is None else tokens
        return Rollout(
            token_ids=tuple(map(int, rng.integers(0, 50_000, length))),
            logprobs=tuple(map(float, rng.normal(-2, 1, length))),
            text=" ".join(rng.choice(WORDS, min(length, 20))),
            finish_reason="stop",
            policy_version=1,
            sampler=Sampling(max_new_tokens=20),
            seed=seed,
        )

    prompt = Prompt(id=f"p{number}", text=f"the film {number} was", token_ids=(1, 2, number))
    return Group(prompt=prompt, rollouts=tuple(map(response, range(samples))), rejected=tuple(rejected))


def groups(count: int, **options: int) -> list[Group]:
    """Those of the first prompts."""
    return [group(number, **options) for number in range(count)]


def label(number: int, *scores: float) -> Label:
    """A verdict about prompt `number`, a failure without scores."""
    verdict = Verdict(annotator="judge", oracle_version="1", scores=scores)
    result = verdict if scores else Failure(kind="timeout", message="60 s")
    return Label(prompt_id=f"p{number}", result=result)


def labels(numbers: Sequence[int]) -> list[Label]:
    """A verdict about each prompt."""
    return [label(number, float(number), 0.5) for number in numbers]


def logprobs(number: int, *lengths: int, names: Sequence[str] = ("reference_logprobs",)) -> LogProbs:
    """What a learner said about sequences of these lengths, other numbers under each name."""
    rng = np.random.default_rng(number)
    arrays = {name: tuple(rng.normal(-2, 1, length).astype(np.float32) for length in lengths) for name in names}
    return LogProbs(prompt_id=f"p{number}", arrays=arrays)


def pair(number: int, **changes: float) -> TrainedPair:
    """A pair of prompt `number`."""
    chosen = Pair(**{"chosen": 1, "rejected": 0, "prob": 1.0, "gap": 0.5, **changes})
    return TrainedPair(prompt_id=f"p{number}", pair=chosen, chosen_text="answer 1", rejected_text="answer 0", policy_version=0)
