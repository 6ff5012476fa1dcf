"""What the oracles of a run have said and cost, whether they agree, and whether they go by the place or the length. Read only."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from onlinerl.controller.comparing import Compared
from onlinerl.controller.statistics import Estimate, ratio
from onlinerl.protocols.store import ANCHOR_VERDICTS, REFRESH_LABELS, REFRESHED_VERDICTS, VERDICTS
from onlinerl.stores import labelled, labels, rows, summary
from onlinerl.types import Verdict

_RATES = {
    "flip_rate": ("flips", "both_orders"),
    "first_slot_rate": ("first_wins", "comparisons"),
    "longer_wins_rate": ("longer_wins", "unequal"),
    "tie_rate": ("ties", "pairs"),
}
"""Share -> of what, of what, in `Compared`."""
_SUMS = ("calls", "tokens", "tokens_out", "usd", "seconds", "saved_calls", "saved_usd")
_MANY, _FEWER_DRAWS = 20_000, 200


def summarise(run: Path, iteration: int | None = None, oracle: str = "") -> dict[str, Any]:
    """All figures as plain JSON: every number is finite, a missing one is None.

    Returns `{"run", "starts": {"calls", "tokens", "usd"}, "costs": [...], "audit": [...], "agreement": [...]}`. `costs` has an entry for each
    iteration, phase and version of an oracle, `audit` one for each version, `agreement` one for each two versions that have judged the same
    responses. A share is `{"value", "low", "high", "n"}`, with the 95 % interval of a bootstrap over prompts.

    Args:
        run: the run directory.
        iteration: only of this one.
        oracle: only of annotators and versions that contain it.

    Raises:
        StoreError: if there is no run or it is damaged.
    """
    costs: dict[tuple[int, str, str], dict[str, Any]] = {}
    # By version, prompt, and where it stands: of a label that was asked for again, the latest.
    judged: dict[str, dict[str, dict[tuple[int, str], Compared]]] = defaultdict(lambda: defaultdict(dict))
    named: dict[str, str] = {}
    winners: dict[str, dict[tuple[int, str], np.ndarray]] = defaultdict(dict)
    for row in labelled.rows(run, iteration, oracle):
        _add(costs, row)
        _, said = rows.result_from_row({**row, "cost": {}})
        if isinstance(said, Verdict) and len(row["responses"]) > 1:
            version = said.oracle_version
            named[version] = said.annotator
            judged[version][row["prompt_id"]][row["iteration"], row["table"]] = Compared.of_texts(row["responses"], said)
            if row["table"] in (VERDICTS, REFRESH_LABELS) or row["table"].startswith(labels.RELABELS):
                winners[version][row["iteration"], row["prompt_id"]] = _winners(said)
    stored = summary.manifest(run)
    starts = stored.get(labels.TRIALS, ())
    return {
        "run": stored["name"],
        "starts": {name: sum(one[name] for one in starts) for name in ("calls", "tokens", "usd")},
        "costs": [costs[key] for key in sorted(costs)],
        "audit": [
            {"annotator": named[version], "oracle_version": version, **_audit(found)} for version, found in judged.items()
        ],
        "agreement": [
            {"oracle_versions": [one, other], **_agreement(winners[one], winners[other])}
            for one, other in combinations(winners, 2)
            if winners[one].keys() & winners[other].keys()
        ],
    }


def _add(costs: dict[tuple[int, str, str], dict[str, Any]], row: Mapping[str, Any]) -> None:
    kinds = {VERDICTS: "label", ANCHOR_VERDICTS: "examine", REFRESH_LABELS: "refresh", REFRESHED_VERDICTS: "refresh"}
    phase = "relabel" if row["table"].startswith(labels.RELABELS) else kinds.get(row["table"], "measure")
    version = row["oracle_version"] or ""  # a failure says none
    entry = costs.setdefault(
        (row["iteration"], phase, version),
        {
            "iteration": row["iteration"],
            "phase": phase,
            "oracle_version": version or None,
            "labels": 0,
            "failed": 0,
            "reused": 0,
            "questions": 0,
            "failed_replies": 0,
        }
        | dict.fromkeys(_SUMS, 0),
    )
    entry["labels"] += row["status"] == "ok"
    entry["failed"] += row["status"] != "ok"
    entry["reused"] += row.get("reused_from") is not None
    if row.get("reused_from") is None:
        entry["questions"] += row.get("questions") or 0
        entry["failed_replies"] += sum(one["count"] for one in row.get("failed_replies") or ())
    for name in _SUMS:
        entry[name] += row[name]


def _audit(found: Mapping[str, Mapping[Any, Compared]]) -> dict[str, Any]:
    """Shares over all pairs that a version has judged; those of one prompt are drawn together."""
    prompts = [list(found[prompt_id].values()) for prompt_id in sorted(found)]  # whatever was judged first
    audit: dict[str, Any] = {"groups": sum(map(len, prompts)), "prompts": len(prompts)}
    for name, (part, whole) in _RATES.items():
        tops = [sum(getattr(one, part) for one in every) for every in prompts]
        audit[name] = _share(tops, [sum(getattr(one, whole) for one in every) for every in prompts])
    return audit


def _share(tops: list[float], counts: list[int]) -> dict[str, float] | None:
    """None if there is nothing of that kind."""
    found: Estimate = ratio(tops, counts, **({"draws": _FEWER_DRAWS} if len(tops) > _MANY else {}))
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n} if found.n else None


def _winners(said: Verdict) -> np.ndarray:
    """i8[K(K-1)/2]: of each pair, 1 where the first of both in the group is preferred, -1 the second, 0 a tie or nothing said."""
    matrix = said.matrix()
    signs: np.ndarray = np.nan_to_num(np.sign(matrix[np.triu_indices(len(matrix), 1)] - 0.5)).astype(np.int8)
    return signs


def _agreement(one: Mapping[tuple[int, str], np.ndarray], other: Mapping[tuple[int, str], np.ndarray]) -> dict[str, Any]:
    """How often two oracles name the same winner, of the pairs in which both name one, and Cohen's kappa of that."""
    same: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    firsts, both = np.zeros(2), 0
    for key in one.keys() & other.keys():
        a, b = one[key], other[key]
        if len(a) != len(b):  # another response came to the group in between
            continue
        decided = (a != 0) & (b != 0)
        same[key[1]][0] += int((a == b)[decided].sum())
        same[key[1]][1] += int(decided.sum())
        firsts += [(a[decided] > 0).sum(), (b[decided] > 0).sum()]
        both += int(decided.sum())
    counts = [same[prompt_id] for prompt_id in sorted(same)]
    agreement = _share([top for top, _ in counts], [count for _, count in counts]) if both else None
    chance = math.nan
    if both:
        p, q = firsts / both
        chance = float(p * q + (1 - p) * (1 - q))
    kappa = None if agreement is None or chance == 1 else (agreement["value"] - chance) / (1 - chance)
    return {"agreement": agreement, "kappa": kappa, "pairs": both}


def table(found: Mapping[str, Any]) -> Table:
    """What was paid, for people."""
    table = Table(title=f"labels of {found['run']}", title_justify="left", box=None, pad_edge=False)
    for header in ("iteration", "phase", "oracle", "labels", "failed", "reused", "calls", "saved", "tokens", "USD", "seconds"):
        table.add_column(header, justify="left" if header in ("phase", "oracle") else "right", no_wrap=True)
    for row in found["costs"]:
        numbers = [row[name] for name in ("labels", "failed", "reused", "calls", "saved_calls", "tokens")]
        money = [f"{row['usd']:.4f}" if row["usd"] else "-", f"{row['seconds']:.1f}"]
        table.add_row(str(row["iteration"]), row["phase"], row["oracle_version"] or "-", *map(str, numbers), *money)
    return table


def queried(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """What a query has found, for people."""
    table = Table(box=None, pad_edge=False)
    for name in columns:
        numbers = all(isinstance(row[name], int | float | None) for row in rows)
        table.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("-" if row[name] is None else str(row[name])) for name in columns))
    return table


def remarks(found: Mapping[str, Any]) -> Iterator[str]:
    """Sums, what the oracles go by, and whether they agree, for people."""
    starts, calls = found["starts"], sum(row["calls"] for row in found["costs"])
    usd = starts["usd"] + sum(row["usd"] for row in found["costs"])
    yield f"{calls + starts['calls']} calls in all, {starts['calls']} of them at starts" + (f"; ${usd:.4f}" if usd else "")
    questions, lost = (sum(row[name] for row in found["costs"]) for name in ("questions", "failed_replies"))
    if lost:
        yield f"{lost} of {questions} replies failed ({lost / questions:.1%}); what they were about is judged by the others, or not at all"
    for one in found["audit"]:
        shares = (f"{name.replace('_', ' ')} {_shown(one[name])}" for name in _RATES if one[name] is not None)
        yield f"{one['oracle_version']}: " + ("; ".join(shares) or "nothing was compared")
    for one in found["agreement"]:
        first, second = one["oracle_versions"]
        if one["agreement"] is None:
            yield f"{first} and {second}: no pair in which both prefer one"
            continue
        kappa = "" if one["kappa"] is None else f", kappa {one['kappa']:.2f}"
        yield f"{first} and {second} agree on {_shown(one['agreement'])}{kappa}"


def _shown(share: Mapping[str, float]) -> str:
    return f"{share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%}, {share['n']:.0f} pairs)"
