"""Values <-> table rows. One row per group; everything survives exactly.

A row is plain data with the responses as parallel lists, so that it reads well in any tool that opens Parquet. NaN, which JSON
does not have, is null inside a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from onlinerl.errors import StoreError
from onlinerl.types import Cost, Failure, Group, Message, Pair, Prompt, Rollout, Sampling, Verdict

ROLLOUTS = "rollouts"
VERDICTS = "verdicts"
LOGPROBS = "logprobs"
"""What is known about the responses that are trained on, f32[T] each, by name (old, reference, values)."""
PAIRS = "pairs"
EVALUATION = "evaluation"
EVALUATION_VERDICTS = "evaluation_verdicts"
BASE_LOGPROBS = "base_logprobs"
"""Of iteration 0: the learner's log-probs of the base model's own answers, f32[T] each, for the forward KL of later iterates."""

Matrix = tuple[tuple[float, ...], ...]


def group_row(group: Group) -> dict[str, Any]:
    """A group of responses as one row of the rollouts table."""
    rollouts = group.rollouts
    return {
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.text,
        "prompt_token_ids": [int(t) for t in group.prompt.token_ids],
        "texts": [r.text for r in rollouts],
        "token_ids": [[int(t) for t in r.token_ids] for r in rollouts],
        "logprobs": [[float(p) for p in r.logprobs] for r in rollouts],
        "finish_reasons": [r.finish_reason for r in rollouts],
        "policy_versions": [int(r.policy_version) for r in rollouts],
        "seeds": [int(r.seed) for r in rollouts],
        "sources": [r.source for r in rollouts],
        "samplers": [_sampler(r.sampler) for r in rollouts],
        "rejected": list(group.rejected),
    }


def group_from_row(row: Mapping[str, Any], prompts_by_id: Mapping[str, Prompt]) -> Group:
    """The reverse of `group_row`.

    Raises:
        StoreError: if the prompt is no longer there, or no longer the same tokens.
    """
    prompt = prompts_by_id.get(row["prompt_id"])
    if prompt is None or list(prompt.token_ids) != list(row["prompt_token_ids"]):
        problem = "is not among the run's prompts" if prompt is None else "is rendered to other tokens than when it was sampled"
        raise StoreError(
            f"prompt {row['prompt_id']!r} {problem}",
            field="prompts.train",
            fix="restore the run's `prompts` folder; a run started by an older version needs its prompt file and tokenizer",
        )
    rollouts = tuple(
        Rollout(
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            text=text,
            finish_reason=finish_reason,
            policy_version=version,
            sampler=Sampling(**sampler),
            seed=seed,
            source=source,
        )
        for token_ids, logprobs, text, finish_reason, version, sampler, seed, source in zip(
            row["token_ids"],
            row["logprobs"],
            row["texts"],
            row["finish_reasons"],
            row["policy_versions"],
            row["samplers"],
            row["seeds"],
            row["sources"],
            strict=True,
        )
    )
    return Group(prompt=prompt, rollouts=rollouts, rejected=tuple(row.get("rejected") or ()))


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """A prompt as one row of the prompts that a run keeps."""
    return {
        "id": prompt.id,
        "text": prompt.text,
        "token_ids": [int(t) for t in prompt.token_ids],
        "messages": [{"role": m.role, "content": m.content} for m in prompt.messages],
        "reference_answer": prompt.reference_answer,
        "source": prompt.source,
    }


def prompt_from_row(row: Mapping[str, Any]) -> Prompt:
    """The reverse of `prompt_row`."""
    messages = tuple(Message(**message) for message in row["messages"])
    return Prompt(**{**row, "token_ids": tuple(row["token_ids"]), "messages": messages})


def result_row(prompt_id: str, result: Verdict | Failure) -> dict[str, Any]:
    """What the oracle said about a group as one row of the verdicts table; `status` is "ok" or the kind of failure."""
    if isinstance(result, Failure):
        failed = dict.fromkeys(
            ("annotator", "oracle_version", "scores", "preferences", "strength", "temperature", "raw", "cost")
        )
        return {"prompt_id": prompt_id, "status": result.kind, "message": result.message, **failed}
    return {
        "prompt_id": prompt_id,
        "status": "ok",
        "message": None,
        "annotator": result.annotator,
        "oracle_version": result.oracle_version,
        "scores": None if result.scores is None else _cells(result.scores),
        "preferences": None if result.preferences is None else [_cells(line) for line in result.preferences],
        "strength": None if result.strength is None else [_cells(line) for line in result.strength],
        "temperature": float(result.temperature),
        "raw": result.raw,
        "cost": {
            "calls": int(result.cost.calls),
            "seconds": float(result.cost.seconds),
            "usd": float(result.cost.usd),
            "tokens": int(result.cost.tokens),
        },
    }


def result_from_row(row: Mapping[str, Any]) -> tuple[str, Verdict | Failure]:
    """The reverse of `result_row`: the prompt's id, and what the oracle said."""
    if row["status"] != "ok":
        return row["prompt_id"], Failure(kind=row["status"], message=row["message"])
    verdict = Verdict(
        annotator=row["annotator"],
        oracle_version=row["oracle_version"],
        scores=None if row["scores"] is None else _floats(row["scores"]),
        preferences=None if row["preferences"] is None else tuple(_floats(line) for line in row["preferences"]),
        strength=None if row["strength"] is None else tuple(_floats(line) for line in row["strength"]),
        temperature=1.0 if row.get("temperature") is None else row["temperature"],  # older runs did not store it
        raw=row["raw"],
        cost=Cost(**row["cost"]),
    )
    return row["prompt_id"], verdict


def pair_rows(group: Group, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The pairs of a group that are trained on, with their texts, for people; ids and seeds are in the rollouts table."""
    return [
        {
            "prompt_id": group.prompt.id,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "prob": float(pair.prob),
            "gap": float(pair.gap),
            "chosen_text": group.rollouts[pair.chosen].text,
            "rejected_text": group.rollouts[pair.rejected].text,
            "policy_version": group.rollouts[pair.chosen].policy_version,
        }
        for pair in pairs
    ]


def logprob_row(prompt_id: str, arrays: Mapping[str, Sequence[np.ndarray]]) -> dict[str, Any]:
    """Arrays f32[T] of a group's training sequences, in the order of its items; by name (old, reference, values)."""
    return {"prompt_id": prompt_id} | {name: [_cells(array.tolist()) for array in own] for name, own in arrays.items()}


def logprobs_from_row(row: Mapping[str, Any]) -> tuple[str, dict[str, list[np.ndarray]]]:
    """The reverse of `logprob_row`."""
    named = {name: cells for name, cells in row.items() if name != "prompt_id" and cells is not None}
    return row["prompt_id"], {name: [np.asarray(_floats(c), np.float32) for c in own] for name, own in named.items()}


def _sampler(sampling: Sampling) -> dict[str, Any]:
    # A configuration may say 1 where 1.0 is meant; one type per column keeps the column native in Parquet.
    return {**asdict(sampling), "temperature": float(sampling.temperature), "top_p": float(sampling.top_p)}


def _cells(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(v) else float(v) for v in values]


def _floats(cells: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if cell is None else cell for cell in cells)
