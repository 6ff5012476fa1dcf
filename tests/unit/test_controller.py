"""What the loop decides by itself: schedules, and what may not reach training."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onlinerl import config as configuration
from onlinerl.controller import evaluation, health, statistics
from onlinerl.controller.evaluation import Evaluated
from onlinerl.controller.parts import batched, learning_rates, reference_iteration
from onlinerl.controller.phases.commit import best_iterate
from onlinerl.controller.tally import Lost
from onlinerl.errors import EngineError, OracleError, StoreError
from onlinerl.types import Failure, Group, Judged, Label, Prompt, Replies, Request, Rollout, Sampling, Verdict

# --- schedules ---


def test_which_iterate_the_reference_is():
    iterations = range(1, 8)
    assert [reference_iteration("fixed", 1, t) for t in iterations] == [0] * 7
    assert [reference_iteration("none", 1, t) for t in iterations] == [None] * 7
    assert [reference_iteration("previous", 1, t) for t in iterations] == [0, 1, 2, 3, 4, 5, 6]
    assert [reference_iteration("every_n", 1, t) for t in iterations] == [0, 1, 2, 3, 4, 5, 6]
    for schedule in ("every_n", "ema"):
        assert [reference_iteration(schedule, 3, t) for t in iterations] == [0, 0, 0, 3, 3, 3, 6]


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["fixed", "previous", "every_n", "ema"]), st.integers(1, 9), st.integers(1, 50))
def test_the_reference_is_never_the_future(schedule, every, iteration):
    assert 0 <= reference_iteration(schedule, every, iteration) < iteration


def rates(iteration: int, steps: int, **training: object) -> list[float]:
    tree = {
        "name": "demo",
        "model": "org/name",
        "iterations": 9,
        "algorithm": {"name": "dpo"},
        "oracle": {"name": "sentiment"},
        "prompts": {"train": "a", "heldout": "b"},
        "training": {"learning_rate": 1.0, **training},
    }
    return learning_rates(configuration.parse(tree).training, iteration, steps)


def test_learning_rates():
    assert rates(1, 4) == [1, 1, 1, 1]
    assert rates(1, 4, lr_scheduler_type="linear") == [1, 0.75, 0.5, 0.25]
    assert rates(1, 4, lr_scheduler_type="cosine") == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
    assert rates(1, 4, warmup_ratio=0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates(1, 6, warmup_ratio=0.34, lr_scheduler_type="linear") == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])
    assert rates(3, 2, iteration_decay=0.5) == [0.25, 0.25]
    assert rates(1, 0) == []
    assert rates(1, 2, learning_rate=0) == [0, 0]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 0.9))
def test_learning_rates_stay_below_the_peak_and_above_zero(steps, lr_scheduler_type, warmup_ratio):
    found = rates(1, steps, lr_scheduler_type=lr_scheduler_type, warmup_ratio=warmup_ratio)
    assert len(found) == steps
    assert all(0 < rate <= 1 for rate in found)


def test_batched():
    assert [list(b) for b in batched(range(5), 2)] == [[0, 1], [2, 3], [4]]
    assert list(batched([], 2)) == []


# --- rollouts ---


def group(**changes: object) -> Group:
    facts = {
        "token_ids": (3, 4),
        "logprobs": (-0.5, -1.0),
        "text": "good film",
        "finish_reason": "stop",
        "policy_version": 2,
        "sampler": Sampling(),
        "seed": 0,
    }
    good = Rollout(**facts)  # type: ignore[arg-type]
    return Group(
        prompt=Prompt(id="p1", text="the", token_ids=(1,)),
        rollouts=(good, Rollout(**{**facts, **changes})),  # type: ignore[arg-type]
    )


def test_good_rollouts_pass():
    health.check_groups([group()], 2)
    health.check_groups([group(token_ids=(), logprobs=(), text="")], 2)


def test_a_few_rejected_responses_are_tolerated():
    """What lacks usable log-probs is rejected and counted, never filled in."""
    health.check_rejected({"logprob": 1}, asked=10, limit=0.1)
    health.check_rejected({}, asked=0, limit=0.0)
    with pytest.raises(EngineError, match=re.escape("3 of 10 responses had to be thrown away (1 abort, 2 logprob)")) as error:
        health.check_rejected({"logprob": 2, "abort": 1}, asked=10, limit=0.2)
    assert error.value.field == "engine.max_rejected"


@pytest.mark.parametrize("version", [1, 3])
def test_another_policy_than_the_current_one_is_refused(version):
    """With a lag of 0, one stale replica is an error and no noise."""
    with pytest.raises(EngineError, match=f"p1: sampled by version {version}, expected 2") as error:
        health.check_groups([group(), group(policy_version=version)], 2)
    assert "missed a weight update" in error.value.fix


GREEDY = {"sampler": Sampling(temperature=0.0), "seed": 1, "source": "greedy"}


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        (GREEDY, False),
        ({**GREEDY, "source": "policy"}, True),
        ({**GREEDY, "sampler": Sampling()}, True),
        ({**GREEDY, "seed": 0}, True),
        ({"seed": 1}, True),
    ],
)
def test_what_was_drawn_where_the_greedy_response_was_asked_for_is_refused(changes, refused):
    asked = {"p1": Request(prompt=group().prompt, seeds=(0, 1), greedy=True)}
    if not refused:
        health.check_sources([group(**changes)], asked, Sampling())
        return
    with pytest.raises(EngineError, match=r"p1: the response to seed .*, and another one was asked for"):
        health.check_sources([group(**changes)], asked, Sampling())


def test_a_greedy_response_that_nobody_asked_for_is_not_trained_on():
    health.require_asked_for(group(**GREEDY), {"policy", "greedy"})
    with pytest.raises(StoreError, match=r"prompt p1 has responses that are not the policy's samples \(greedy\)"):
        health.require_asked_for(group(**GREEDY), {"policy"})


# --- verdicts ---


def verdict(*scores: float) -> Verdict:
    return Verdict(annotator="test", oracle_version="1", scores=scores)


def judged(*scores: float) -> Judged:
    one = group()
    return Judged(group=Group(prompt=one.prompt, rollouts=(one.rollouts[0],) * len(scores)), verdict=verdict(*scores))


def test_failures_up_to_the_limit_are_tolerated():
    """A failure is counted and never becomes a score."""
    failure = Failure(kind="timeout", message="took 9 s")
    health.check_failures([failure], 10, 0.1)
    health.check_failures([], 0, 0.0)
    with pytest.raises(OracleError) as error:
        health.check_failures([failure] * 2, 10, 0.1)
    assert "failed on 2 of 10 groups (2 timeout); first timeout: took 9 s" in str(error.value)
    assert error.value.field == "oracle"


def test_the_commonest_failure_is_shown():
    kinds = [Failure(kind="timeout", message="slow"), *[Failure(kind="non_finite", message="is nan")] * 2]
    with pytest.raises(OracleError, match="first non_finite: is nan"):
        health.check_failures(kinds, 4, 0.5)


def lost(*replies: Replies, raw: str = "", **more: object) -> Lost:
    found = Lost()
    for n, each in enumerate(replies):
        found.add(Label(prompt_id=f"p{n}", result=replace(verdict(0.0, 1.0), replies=each, raw=raw), **more))
    return found


def test_replies_that_failed_up_to_the_limit_are_tolerated():
    """The share is of all replies that are to be expected: at the beginning of a phase few are there."""
    one = Replies(asked=12, failed={"timeout": 2, "parse_fail": 1})
    health.check_replies(Lost(), 0, 0.0)
    health.check_replies(lost(Replies(asked=12)), 1, 0.0)
    health.check_replies(lost(one), 4, 0.1)
    health.check_replies(lost(one), 1, 0.25)
    raw = "0 before 1: 0.5\n0 before 2: parse_fail: no verdict: 'hm'\n1 before 2: timeout: no answer within 9 s"
    with pytest.raises(OracleError) as error:
        health.check_replies(lost(one, one, raw=raw), 4, 0.1)
    said = "6 of 24 replies failed (4 timeout, 2 parse_fail); first timeout: prompt 'p0', 1 before 2: timeout: no answer within 9 s"
    assert said in str(error.value)
    assert "max_failed_labels" in str(error.value)
    assert error.value.field == "oracle"


def test_replies_of_labels_that_were_not_asked_for_and_of_failures():
    """What another run has lost this one cannot repair; what a group has lost that failed as a whole counts."""
    one = Replies(asked=12, failed={"timeout": 12})
    health.check_replies(lost(one, one, reused_from="runs/a/0001/verdicts"), 2, 0.0)
    found = lost(Replies(asked=12))
    found.add(Label(prompt_id="q", result=Failure(kind="timeout", message="12 of 12; first timeout: late", replies=one)))
    with pytest.raises(OracleError, match=r"12 of 24 replies failed .* prompt 'q', 12 of 12; first timeout: late"):
        health.check_replies(found, 2, 0.4)


def test_of_a_group_that_was_asked_about_again_the_latest_counts():
    found = Lost()
    for replies in (Replies(asked=4, failed={"timeout": 3}), Replies(asked=4, failed={"refused": 1}), Replies(asked=4)):
        found.add(Label(prompt_id="p", result=replace(verdict(0.0), replies=replies)))
        assert (found.groups, found.replies) == (1, replies)
    assert found.kinds == {"timeout", "refused"}, "whose shares are 0 now, and were not"


@pytest.mark.parametrize("wrong", [Replies(asked=1, failed={"error": 2}), Replies(asked=9, failed={"lost": 1}), 3])
def test_replies_that_cannot_be_are_no_verdict(wrong):
    assert replace(verdict(1.0), replies=Replies(asked=2, failed={"error": 2})).problem(1) is None
    assert replace(verdict(1.0), replies=wrong).problem(1) is not None


def learnable(*groups: Judged, items: bool = True, within_groups: bool = True, **dropped: int) -> str | None:
    earned = [score for group in groups for score in group.verdict.scores or ()] if items else []
    return health.nothing_to_learn(
        [health.spread(group.verdict) for group in groups], earned, dropped, within_groups=within_groups
    )


def test_an_oracle_that_separates_nothing_gives_nothing_to_learn():
    """A tie makes no pair."""
    assert learnable(judged(1.0, 1.0), judged(1.0, 2.0)) is None
    said = learnable(judged(1.0, 1.0), judged(0.0, 0.0))
    assert said is not None
    assert said.startswith("all 2 groups are ties")


def test_an_algorithm_that_compares_nothing_within_a_group_needs_no_spread_there():
    """PPO with one sample per prompt, or a verifier that only tells prompts apart."""
    assert learnable(judged(1.0), judged(0.0), within_groups=False) is None
    assert learnable(judged(1.0), judged(1.0), within_groups=False) == "all responses of 2 groups got the same judgement"


def test_what_says_nothing_has_no_spread():
    nan = math.nan
    silent = replace(judged(0.0, 0.0), verdict=Verdict(annotator="a", oracle_version="v", preferences=((nan, nan), (nan, nan))))
    assert learnable(silent, silent) is not None


def test_no_item_is_nothing_to_learn():
    good = judged(1.0, 2.0)
    assert learnable(good, items=False, tie=3, identical=1) == (
        "no training item is left of 1 judged groups (dropped: 3 tie, 1 identical)"
    )
    assert learnable(items=False) == "no training item is left of 0 judged groups (dropped: no reason recorded)"


def test_too_many_idle_iterations_in_a_row_stop_the_run():
    health.check_idle({"idle_in_a_row": 2, "idle": "ties"}, 3)
    for count in (3, 4):
        with pytest.raises(
            OracleError, match=f"{count} iterations in a row gave nothing to learn; the last one: ties"
        ) as error:
            health.check_idle({"idle_in_a_row": count, "idle": "ties"}, 3)
        assert error.value.field == "training.max_idle_iterations"
        assert "onlinerl resume" in error.value.fix


# --- evaluation ---


def evaluated(scores: dict[str, float]) -> Evaluated:
    one = group()
    groups = [Group(prompt=Prompt(id=i, text=i, token_ids=(1,)), rollouts=one.rollouts[:1]) for i in scores]
    return Evaluated(groups=groups, verdicts={i: verdict(s) for i, s in scores.items()})


def test_win_rate_of_scores_asks_nobody():
    now, then = evaluated({"a": 1.0, "b": 0.0, "c": 0.5}), evaluated({"a": 0.0, "b": 1.0, "c": 0.5})
    rate, calls = evaluation.win_rate(now, then, judge=None)  # type: ignore[arg-type]
    assert (rate.value, rate.n, calls) == (0.5, 3, 0)
    same, _ = evaluation.win_rate(now, now, judge=None)  # type: ignore[arg-type]
    assert same.value == 0.5


def test_what_is_gained_is_estimated_from_what_each_prompt_has_gained():
    """Scores far apart between prompts, and half a point gained on each: the two means differ surely, though their intervals overlap."""
    base = {f"p{n}": float(n) for n in range(40)}
    now, then = evaluated({name: score + 0.5 for name, score in base.items()}), evaluated(base)
    won, _ = evaluation.outcomes(now, then, judge=None)  # type: ignore[arg-type]
    found = evaluation.gains(now, then, won)
    assert (found.reward.low, found.reward.value, found.reward.high) == (0.5, 0.5, 0.5)
    assert (found.win_rate.value, found.win_rate.n) == (0.5, 40)
    assert evaluation.reward(now).low < evaluation.reward(then).high
    less = evaluation.gains(evaluated({"p0": 1.0}), then, [])
    assert (less.reward.value, less.reward.n, less.win_rate.n) == (1.0, 1, 0)


def test_half_ties_make_the_interval_narrower_than_wilson_s():
    """Half of 400 prompts are ties, a quarter each is won and lost: a variance of 1/8, and not of 1/4."""
    won = [0.5] * 200 + [1.0] * 100 + [0.0] * 100
    found, shown = evaluation.gains(evaluated({}), evaluated({}), won).win_rate, statistics.wilson(won)
    assert (shown.high - shown.low) / (found.high - found.low) == pytest.approx(2**0.5, rel=0.1)


def test_of_iterates_that_only_differ_by_noise_the_base_model_stays_the_best():
    """Three iterates with as many prompts won as lost, again and again: by the means it would be the base model once in four times."""
    rng, kept = np.random.default_rng(4), 0
    for _ in range(60):
        measured: dict[int, dict] = {0: {}}
        for t in (1, 2, 3):
            won = rng.choice([0.0, 0.5, 1.0], p=[0.25, 0.5, 0.25], size=200).tolist()
            found = evaluation.gains(evaluated({}), evaluated({}), won)
            measured[t] = {"gains": {"reward": asdict(found.reward), "win_rate": asdict(found.win_rate)}}
        kept += best_iterate(measured) == 0
    assert kept >= 50


def test_scores_of_two_versions_of_the_oracle_are_not_compared():
    """The oracle was repaired and the run resumed: its old scores may be on another scale."""

    def scored(value: float, version: str) -> Evaluated:
        one = evaluated({"a": value})
        return replace(one, verdicts={"a": replace(one.verdicts["a"], oracle_version=version)})

    def compare(pairs):
        return len(pairs), {p.prompt.id: verdict(0.0, 1.0) for p in pairs}

    rate, asked = evaluation.win_rate(scored(100.0, "new"), scored(0.5, "old"), compare)
    assert (rate.value, asked) == (0.0, 1)
    rate, asked = evaluation.win_rate(scored(100.0, "new"), scored(0.5, "new"), compare)
    assert (rate.value, asked) == (1.0, 0)


def test_scores_by_name_are_estimated_where_they_were_given():
    """Not of a prompt that failed, not compared between two versions of the oracle, and nothing of a name that nobody gave."""

    def named(watch: dict[str, float], version: str = "v") -> Evaluated:
        one = evaluated(dict.fromkeys(watch, 1.0))
        said = {
            i: replace(one.verdicts[i], oracle_version=version, components={"watch": (value,)}) for i, value in watch.items()
        }
        return replace(one, verdicts=said)

    now, base = named({"a": 0.1, "b": 0.7, "c": 0.3}), named({"a": 0.2, "b": 0.5, "c": 0.3})
    now.verdicts["c"] = Failure(kind="timeout", message="")
    (found,) = evaluation.components(now, base).values()
    assert (found.score.value, found.score.n) == (pytest.approx(0.4), 2)
    assert (found.win_rate.value, found.win_rate.n) == (0.5, 2)
    (alone,) = evaluation.components(base, None).values()
    assert (alone.win_rate, alone.score.n) == (None, 3)
    assert evaluation.components(now, named({"a": 0.2, "b": 0.5}, "older"))["watch"].win_rate.n == 0
    assert evaluation.components(evaluated({"a": 1.0}), base) == {}


def test_mismatch():
    """Engine against learner, token by token."""
    one = group()
    same = evaluation.mismatch([one], [np.array([-0.5, -1.0])] * 2)
    assert (same.mean, same.p99, same.max, same.k3, same.tokens) == (0, 0, 0, 0, 4)
    off = evaluation.mismatch([one], [np.array([-0.4, -1.0])] * 2)
    assert off.max == pytest.approx(0.1)
    assert off.mean == pytest.approx(0.05)
    assert off.k3 == pytest.approx((math.exp(0.1) - 1.1) / 2)


@pytest.mark.parametrize("k3", [0.021, math.inf, math.nan])
def test_engine_and_learner_must_agree(k3):
    """On the same tokens with the same weights."""
    health.check_mismatch(0.019, 0.02)
    with pytest.raises(EngineError, match="max_mismatch_k3"):
        health.check_mismatch(k3, 0.02)


def test_a_comparison_that_was_not_made_counts_for_nobody():
    """An oracle may answer some prompts and leave cells empty: those prompts are left out, not averaged as NaN."""
    nan = math.nan
    tables = iter([((nan, 0.9), (0.1, nan)), ((nan, nan), (nan, nan))])

    def compare(pairs):
        assert {len(pair.rollouts) for pair in pairs} == {2}
        said = {p.prompt.id: Verdict(annotator="a", oracle_version="v", preferences=next(tables)) for p in pairs}
        return len(said), said

    def answers():
        groups = []
        for name in ("p", "q"):
            rollout = Rollout(
                token_ids=(1,), logprobs=(-1.0,), text="x", finish_reason="stop", policy_version=0, sampler=Sampling(), seed=0
            )
            groups.append(Group(prompt=Prompt(id=name, text="", token_ids=(1,)), rollouts=(rollout,)))
        return Evaluated(groups=groups, verdicts={})

    rate, asked = evaluation.win_rate(answers(), answers(), compare)
    assert (rate.value, rate.n, asked) == (1.0, 1, 2)


def test_entropy_and_forward_kl_against_the_closed_form():
    """Tabular policies: sequences of 5 independent tokens, two of them a little shorter."""
    rng = np.random.default_rng(5)
    p, q = (np.log(np.exp(x) / np.exp(x).sum()) for x in 0.7 * rng.normal(size=(2, 8)))
    own = [p[rng.choice(8, p=np.exp(p), size=5 if i else 2)] for i in range(4000)]
    per_token = -float((np.exp(p) * p).sum())
    token, sequence = evaluation.entropy_token(own), evaluation.entropy_seq(own)
    assert abs(token.value - per_token) < 3 * token.se
    assert token.n == 5 * 4000 - 3
    assert abs(sequence.value - 5 * per_token) < 3 * sequence.se
    theirs = rng.choice(8, p=np.exp(q), size=(4000, 5))
    forward = evaluation.forward_kl(list(q[theirs]), list(p[theirs]))
    assert abs(forward.value - 5 * float((np.exp(q) * (q - p)).sum())) < 3 * forward.se
    assert evaluation.forward_kl(own, own).value == 0
