"""Which prompts dynamic sampling goes on with, from verdicts alone."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from onlinerl.controller.dynamic import Rounds
from onlinerl.controller.feed import Feed
from onlinerl.controller.tally import Sampled
from onlinerl.protocols.needs import Needs
from onlinerl.types import Failure, Label, Prompt, Verdict

PROMPTS = [Prompt(id=f"p{n}", text="", token_ids=(1,)) for n in range(5)]
TOLD_APART, TIE = (1.0, 0.0), (0.5, 0.5)


def made(scores: dict[str, tuple[float, float] | None], wanted: int = 2, most_rounds: int = 10) -> SimpleNamespace:
    """An iteration of which these prompts are judged; None is a failure, and a prompt that is not here has too few responses."""
    results = {
        prompt_id: Failure(kind="error", message="")
        if said is None
        else Verdict(annotator="t", oracle_version="1", scores=said)
        for prompt_id, said in scores.items()
    }
    labels = {prompt_id: Label(prompt_id=prompt_id, result=result) for prompt_id, result in results.items()}
    return SimpleNamespace(
        number=1,
        needs=Needs(),
        most_rounds=most_rounds,
        parts=SimpleNamespace(config=SimpleNamespace(prompts=SimpleNamespace(per_iteration=wanted))),
        prompts=lambda rounds: (PROMPTS[: wanted * rounds], min(wanted * rounds, len(PROMPTS))),
        answers=Feed.of([p.id for p in PROMPTS], threading.Event()),
        labels=lambda: SimpleNamespace(select=lambda ids: map(labels.get, ids)),
    )


def run(it: SimpleNamespace, rejected: tuple[str, ...] = ()) -> Rounds:
    rounds = Rounds(it)
    while True:
        sampled = {
            p.id: Sampled(responses=2, tokens=2, cut=0, unique=1.0, rejected=("logprob",) if p.id in rejected else ())
            for p in rounds.prompts
        }
        if not rounds.more(sampled):
            return rounds


@pytest.mark.parametrize(
    ("scores", "rejected", "kept", "rounds"),
    [
        ({"p0": TOLD_APART, "p1": TOLD_APART}, (), ["p0", "p1"], 1),
        ({"p0": TIE, "p1": TOLD_APART, "p2": TOLD_APART, "p3": TOLD_APART}, (), ["p1", "p2"], 2),  # p3 is surplus
        ({"p0": (0.5, 0.5 + 1e-12), "p1": None, "p2": TOLD_APART, "p3": TOLD_APART}, (), ["p2", "p3"], 2),
        ({"p1": TOLD_APART, "p2": TOLD_APART, "p3": TOLD_APART}, (), ["p1", "p2"], 2),  # p0 was too small to be judged
        # Nobody judges what a resume would ask for again, so nobody waits for it, even where it has been judged.
        ({"p0": TOLD_APART, "p1": TOLD_APART, "p2": TOLD_APART, "p3": TIE}, ("p1",), ["p0", "p2"], 2),
        ({"p4": TOLD_APART}, (), ["p4"], 3),  # there are no more prompts
    ],
)
def test_the_first_useful_prompts_are_kept(scores, rejected, kept, rounds):
    got = run(made(scores), rejected)
    assert (got.kept, got.number) == (kept, rounds)
    assert (got.shortage() is None) == (len(kept) == 2)


def test_it_stops_after_the_last_round():
    got = run(made({"p4": TOLD_APART}, most_rounds=2))
    assert (got.kept, got.number, got.next_cursor, len(got.prompts)) == ([], 2, 4, 4)
    assert got.shortage() == (
        "iteration 1: of 4 prompts in 2 rounds, the oracle tells the responses to 0 apart, and 2 were wanted; it goes on with these"
    )
