"""Values <-> table rows, and the columns of every table. One row per group; everything survives exactly.

A row is plain data with the responses as parallel lists, so that it reads well in any tool that opens Parquet. NaN, which JSON
does not have, is null inside a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from onlinerl.errors import StoreError
from onlinerl.stores._arrow import per_token
from onlinerl.types import (
    Cost,
    Failure,
    Group,
    Label,
    LogProbs,
    Message,
    Numbers,
    Pair,
    Prompt,
    Replies,
    Rollout,
    Sampling,
    Selected,
    Step,
    TrainedPair,
    Verdict,
)

T = TypeVar("T")
Row = dict[str, Any]


def group_row(group: Group) -> Row:
    """A group of responses as one row of the rollouts table."""
    rollouts = group.rollouts
    return {
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.text,
        "prompt_token_ids": group.prompt.token_ids,
        "texts": [r.text for r in rollouts],
        "token_ids": [r.token_ids for r in rollouts],
        "logprobs": [r.logprobs for r in rollouts],
        "finish_reasons": [r.finish_reason for r in rollouts],
        "policy_versions": [int(r.policy_version) for r in rollouts],
        "seeds": [int(r.seed) for r in rollouts],
        "sources": [r.source for r in rollouts],
        "prefix_ids": [r.prefix_ids for r in rollouts],
        "samplers": [_sampler(r.sampler) for r in rollouts],
        "rejected": list(group.rejected),
    }


def group_from_row(row: Mapping[str, Any], prompts_by_id: Mapping[str, Prompt] | None = None) -> Group:
    """The reverse of `group_row`. Without the prompts of the run, the prompt is what the row says of it.

    Raises:
        StoreError: if the prompt is no longer there, or no longer the same tokens.
    """
    if prompts_by_id is None:
        prompt = Prompt(id=row["prompt_id"], text=row["prompt"], token_ids=tuple(row["prompt_token_ids"]))
    else:
        prompt = _known(row, prompts_by_id)
    rollouts = tuple(
        Rollout(
            token_ids=_numbers(token_ids),
            logprobs=_numbers(logprobs),
            text=text,
            finish_reason=finish_reason,
            policy_version=version,
            sampler=_sampling(**sampler),
            seed=seed,
            source=source,
            prefix_ids=_numbers(prefix_ids),
        )
        for token_ids, logprobs, text, finish_reason, version, sampler, seed, source, prefix_ids in zip(
            row["token_ids"],
            row["logprobs"],
            row["texts"],
            row["finish_reasons"],
            row["policy_versions"],
            row["samplers"],
            row["seeds"],
            row["sources"],
            row.get("prefix_ids") or [()] * len(row["seeds"]),  # older runs have none
            strict=True,
        )
    )
    return Group(prompt=prompt, rollouts=rollouts, rejected=tuple(row.get("rejected") or ()))


def _known(row: Mapping[str, Any], prompts_by_id: Mapping[str, Prompt]) -> Prompt:
    prompt = prompts_by_id.get(row["prompt_id"])
    if prompt is None or prompt.token_ids != tuple(row["prompt_token_ids"]):
        problem = "is not among the run's prompts" if prompt is None else "is rendered to other tokens than when it was sampled"
        raise StoreError(
            f"prompt {row['prompt_id']!r} {problem}",
            field="prompts.train",
            fix="restore the run's `prompts` folder; a run started by an older version needs its prompt file and tokenizer",
        )
    return prompt


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """A prompt as one row of the prompts that a run keeps."""
    return {
        "id": prompt.id,
        "text": prompt.text,
        "token_ids": [int(t) for t in prompt.token_ids],
        "messages": [{"role": m.role, "content": m.content} for m in prompt.messages],
        "reference_answer": prompt.reference_answer,
        "source": prompt.source,
        **({"goal_ids": [list(map(int, ids)) for ids in prompt.goal_ids]} if prompt.goal_ids else {}),
        **({"answer_ids": [int(t) for t in prompt.answer_ids]} if prompt.answer_ids else {}),
        **({} if prompt.difficulty is None else {"difficulty": float(prompt.difficulty)}),
    }


def prompt_from_row(row: Mapping[str, Any]) -> Prompt:
    """The reverse of `prompt_row`."""
    messages = tuple(Message(**message) for message in row["messages"])
    goals, answer = tuple(map(tuple, row.get("goal_ids") or ())), tuple(row.get("answer_ids") or ())
    more = {"messages": messages, "goal_ids": goals, "answer_ids": answer}
    return Prompt(**{**row, "token_ids": tuple(row["token_ids"]), **more})


def result_row(prompt_id: str, result: Verdict | Failure) -> dict[str, Any]:
    """What the oracle said about a group as one row of the verdicts table; `status` is "ok" or the kind of failure."""
    if isinstance(result, Failure):
        known = {"prompt_id": prompt_id, "status": result.kind, "message": result.message, "cost": _cost(result.cost)}
        return {**dict.fromkeys(set(LABELS.schema.names) - {*_ORIGIN}), **known, **_replies(result.replies)}
    return {
        "prompt_id": prompt_id,
        "status": "ok",
        "message": None,
        "annotator": result.annotator,
        "oracle_version": result.oracle_version,
        "scores": None if result.scores is None else _cells(result.scores),
        "components": None if result.components is None else [_component(*each) for each in result.components.items()],
        "preferences": _lines(result.preferences),
        "log_odds": _lines(result.log_odds),
        "on_disagree": result.on_disagree,
        "strength": _lines(result.strength),
        "uncertainty": _lines(result.uncertainty),
        "temperature": float(result.temperature),
        "raw": result.raw,
        "cost": _cost(result.cost),
        **_replies(result.replies),
    }


def result_from_row(row: Mapping[str, Any]) -> tuple[str, Verdict | Failure]:
    """The reverse of `result_row`: the prompt's id, and what the oracle said."""
    if row["status"] != "ok":
        cost, replies = cost_from_row(row.get("cost")), _replies_from_row(row)
        return row["prompt_id"], Failure(kind=row["status"], message=row["message"], cost=cost, replies=replies)
    verdict = Verdict(
        annotator=row["annotator"],
        oracle_version=row["oracle_version"],
        scores=None if row["scores"] is None else _floats(row["scores"]),
        unjudged=tuple(k for k, score in enumerate(row["scores"] or ()) if score is None),
        components=_components(row.get("components")),  # older runs have none
        preferences=_matrix(row["preferences"]),
        log_odds=_matrix(row.get("log_odds")),
        on_disagree=row.get("on_disagree") or "average",
        strength=_matrix(row["strength"]),
        uncertainty=_matrix(row.get("uncertainty")),
        temperature=1.0 if row.get("temperature") is None else row["temperature"],  # older runs did not store it
        raw=row["raw"],
        cost=Cost(**row["cost"]),
        replies=_replies_from_row(row),
    )
    return row["prompt_id"], verdict


def label_row(label: Label) -> Row:
    """A label as one row of a verdicts table."""
    origin = {"reused_from": label.reused_from, "saved": None if label.reused_from is None else _cost(label.saved)}
    return {**result_row(label.prompt_id, label.result), "key": label.key, **origin}


def label_from_row(row: Mapping[str, Any]) -> Label:
    """The reverse of `label_row`."""
    prompt_id, result = result_from_row(row)
    return Label(  # older runs have no more than these two
        prompt_id=prompt_id,
        result=result,
        key=row.get("key") or "",
        reused_from=row.get("reused_from"),
        saved=cost_from_row(row.get("saved")),
    )


def pair_row(trained: TrainedPair) -> Row:
    """A pair as one row of the pairs table; ids and seeds are in the rollouts table."""
    pair = trained.pair
    return {
        "prompt_id": trained.prompt_id,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "prob": float(pair.prob),
        "gap": float(pair.gap),
        "chosen_text": trained.chosen_text,
        "rejected_text": trained.rejected_text,
        "policy_version": trained.policy_version,
        "steps": None if pair.steps is None else [asdict(step) for step in pair.steps],
    }


def pair_from_row(row: Mapping[str, Any]) -> TrainedPair:
    """The reverse of `pair_row`."""
    pair = Pair(chosen=row["chosen"], rejected=row["rejected"], prob=row["prob"], gap=row["gap"])
    if row.get("steps"):
        better, worse = (Step(**{**step, "leaves": tuple(step["leaves"])}) for step in row["steps"])
        pair = replace(pair, steps=(better, worse))
    texts = {name: row[name] for name in ("prompt_id", "chosen_text", "rejected_text", "policy_version")}
    return TrainedPair(pair=pair, **texts)


def logprob_row(logprobs: LogProbs) -> Row:
    """Log-probs and values of a prompt's training sequences as one row."""
    return {"prompt_id": logprobs.prompt_id, **logprobs.arrays}


def logprobs_from_row(row: Mapping[str, Any]) -> LogProbs:
    """The reverse of `logprob_row`."""
    named = {name: cells for name, cells in row.items() if name != "prompt_id" and cells is not None}
    flat = named.get("logprobs")
    if flat is not None and not (flat and isinstance(flat[0], list | np.ndarray)):
        named["logprobs"] = [flat]  # formats 1 to 3, of the base model's own answers
    return LogProbs(prompt_id=row["prompt_id"], arrays={name: tuple(map(_float32, own)) for name, own in named.items()})


@lru_cache(maxsize=16)
def _sampler(sampling: Sampling) -> dict[str, Any]:
    return asdict(sampling)


@lru_cache(maxsize=16)
def _sampling(**sampler: Any) -> Sampling:
    return Sampling(**sampler)


def _component(name: str, scores: Sequence[float]) -> Row:
    return {"name": name, "scores": _cells(scores)}


def _components(cells: Sequence[Mapping[str, Any]] | None) -> dict[str, tuple[float, ...]] | None:
    return None if cells is None else {cell["name"]: _floats(cell["scores"]) for cell in cells}


def _numbers(cells: Any) -> Sequence[Any]:
    return Numbers(cells) if isinstance(cells, np.ndarray) else tuple(cells)


def _float32(cells: Any) -> np.ndarray:
    return np.asarray(cells if isinstance(cells, np.ndarray) else _floats(cells), np.float32)


def _cells(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(v) else float(v) for v in values]


def _lines(matrix: Sequence[Sequence[float]] | None) -> list[list[float | None]] | None:
    return None if matrix is None else [_cells(line) for line in matrix]


def _matrix(lines: Sequence[Sequence[float | None]] | None) -> tuple[tuple[float, ...], ...] | None:
    return None if lines is None else tuple(map(_floats, lines))


def _cost(cost: Cost) -> Row:
    kinds: dict[str, type] = {"calls": int, "seconds": float, "usd": float, "tokens": int, "tokens_out": int}
    return {name: kind(getattr(cost, name)) for name, kind in kinds.items()}


def cost_from_row(cells: Mapping[str, Any] | None) -> Cost:
    """What a row says of a cost; older runs did not store that of failures."""
    return Cost(**(cells or {}))


def _replies(replies: Replies) -> Row:
    failed = [{"kind": kind, "count": count} for kind, count in replies.failed.items()]
    return {"questions": replies.asked, "failed_replies": failed}


def _replies_from_row(row: Mapping[str, Any]) -> Replies:
    """Older runs did not store them."""
    failed = {one["kind"]: one["count"] for one in row.get("failed_replies") or ()}
    return Replies(asked=row.get("questions") or 0, failed=failed)


def _floats(cells: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if cell is None else cell for cell in cells)


@dataclass(frozen=True)
class Codec(Generic[T]):
    """How values of one kind are kept."""

    schema: pa.Schema
    to_row: Callable[[T], Row]
    from_row: Callable[[Mapping[str, Any]], T]


_TEXT, _TEXTS, _FLOATS, _INT = pa.string(), pa.list_(pa.string()), pa.list_(pa.float64()), pa.int64()
_SAMPLER = pa.struct({"temperature": pa.float64(), "top_p": pa.float64(), "top_k": _INT, "max_new_tokens": _INT})
COST = pa.struct({"calls": _INT, "seconds": pa.float64(), "usd": pa.float64(), "tokens": _INT, "tokens_out": _INT})
_GROUPS = pa.schema(
    {
        "prompt_id": _TEXT,
        "prompt": _TEXT,
        "prompt_token_ids": pa.list_(pa.uint32()),
        "texts": _TEXTS,
        "token_ids": per_token(pa.uint32()),
        "logprobs": per_token(pa.float64()),
        "finish_reasons": _TEXTS,
        "policy_versions": pa.list_(_INT),
        "seeds": pa.list_(_INT),
        "sources": _TEXTS,
        "prefix_ids": per_token(pa.uint32()),
        "samplers": pa.list_(_SAMPLER),
        "rejected": _TEXTS,
    }
)
_ORIGIN = ("key", "reused_from", "saved")
LABELS = Codec(
    pa.schema(
        {
            "prompt_id": _TEXT,
            "status": _TEXT,
            "message": _TEXT,
            "annotator": _TEXT,
            "oracle_version": _TEXT,
            "scores": _FLOATS,
            "components": pa.list_(pa.struct({"name": _TEXT, "scores": _FLOATS})),
            "preferences": pa.list_(_FLOATS),
            "log_odds": pa.list_(_FLOATS),
            "on_disagree": _TEXT,
            "strength": pa.list_(_FLOATS),
            "uncertainty": pa.list_(_FLOATS),
            "temperature": pa.float64(),
            "raw": _TEXT,
            "cost": COST,
            "questions": _INT,
            "failed_replies": pa.list_(pa.struct({"kind": _TEXT, "count": _INT})),
            "key": _TEXT,
            "reused_from": _TEXT,
            "saved": COST,
        }
    ),
    label_row,
    label_from_row,
)
PAIRS = Codec(
    pa.schema(
        {
            "prompt_id": _TEXT,
            "chosen": _INT,
            "rejected": _INT,
            "prob": pa.float64(),
            "gap": pa.float64(),
            "chosen_text": _TEXT,
            "rejected_text": _TEXT,
            "policy_version": _INT,
            "steps": pa.list_(pa.struct({"start": _INT, "end": _INT, "leaves": pa.list_(_INT)})),
        }
    ),
    pair_row,
    pair_from_row,
)
LOGPROBS = Codec(
    pa.schema(
        {"prompt_id": _TEXT}
        | dict.fromkeys(
            ("logprobs", "old_logprobs", "reference_logprobs", "anchor_logprobs", "values", "ches"), per_token(pa.float32())
        )
    ),
    logprob_row,
    logprobs_from_row,
)
SELECTION = Codec(
    pa.schema({"prompt_id": _TEXT, "probability": pa.float64(), "reason": _TEXT, "reused_from": _INT}),
    asdict,
    lambda row: Selected(**row),
)
PROMPTS = Codec(
    pa.schema(
        {
            "id": _TEXT,
            "text": _TEXT,
            "token_ids": pa.list_(pa.uint32()),
            "messages": pa.list_(pa.struct({"role": _TEXT, "content": _TEXT})),
            "reference_answer": _TEXT,
            "source": _TEXT,
            "goal_ids": pa.list_(pa.list_(pa.uint32())),
            "answer_ids": pa.list_(pa.uint32()),
            "difficulty": pa.float64(),
        }
    ),
    prompt_row,
    prompt_from_row,
)


def groups_of(prompts_by_id: Mapping[str, Prompt] | None) -> Codec[Group]:
    """How groups of responses to these prompts are kept."""
    return Codec(_GROUPS, group_row, lambda row: group_from_row(row, prompts_by_id))
