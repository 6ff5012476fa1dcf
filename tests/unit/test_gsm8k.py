"""`math_verifier` on the answers of GSM8K, a dataset that is not part of this repository: DATA names the folder that holds it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from onlinerl.oracles.math_verifier import MathVerifier
from onlinerl.types import Prompt, Query, Verdict

ROWS = Path(os.environ.get("DATA", Path(__file__).parents[3] / "shared/data")) / "gsm8k/test.jsonl"
EVERY = 3
"""Of its rows, so as to take seconds."""

pytestmark = pytest.mark.skipif(not ROWS.exists(), reason="GSM8K is not there: set DATA to the folder that holds gsm8k/")


def final(answer: str) -> int:
    """The number behind the last ####."""
    return int(answer.rpartition("####")[2].replace(",", "").strip())


def forms(number: int) -> list[str]:
    """The same answer as models write it."""
    return [
        f"#### {number}",
        f"First I add, then I multiply.\n#### {number:,}",
        f"So the answer is {number}.",
        f"The total is \\boxed{{{number}}}.",
        f"In all that makes $\\boxed{{{number:,}}}$ of them.",
        f"Therefore the result is ${number}$.",
        f"It is \\boxed{{{number}.0}}",
        f"We get \\boxed{{\\frac{{{2 * number}}}{{2}}}}.",
    ]


def test_right_answers_in_every_form_score_1_and_wrong_numbers_0():
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()][::EVERY]
    queries = []
    for n, row in enumerate(rows):
        number = final(row["answer"])
        responses = (row["answer"], *forms(number), *forms(number + 1), *forms(-number - 3), "I do not know.", "")
        prompt = Prompt(id=str(n), text=row["question"], token_ids=(1,), reference_answer=row["answer"])
        queries.append(Query(prompt=prompt, responses=responses))
    oracle = MathVerifier(timeout_s=60)
    try:
        verdicts = oracle.judge(queries)
    finally:
        oracle.close()
    assert len(verdicts) > 100
    right = 1 + len(forms(0))
    for query, verdict in zip(queries, verdicts, strict=True):
        assert isinstance(verdict, Verdict), verdict
        wrong = [
            (response, score)
            for i, (response, score) in enumerate(zip(query.responses, verdict.scores or (), strict=True))
            if score != float(i < right)
        ]
        assert not wrong, f"{query.prompt.reference_answer}: {wrong}"
        assert verdict.replies.lost == 0
