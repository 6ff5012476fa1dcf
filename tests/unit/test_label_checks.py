"""Which knobs of losses on pairs exclude one another, and which nothing would read."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from onlinerl import config as configuration
from onlinerl.algorithm_checks import check_algorithm
from onlinerl.errors import ConfigError

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


def check(*overrides: str) -> list[str]:
    config = configuration.load(
        QUICKSTART, ["algorithm.name=dpo", *(f"algorithm.{o}" if "." not in o.split("=")[0] else o for o in overrides)]
    )
    return check_algorithm(config, configuration.algorithm(config))


# By what is made of a label: at most one of these.
POLICIES = {
    "soft": ["soft_labels=true"],
    "flip": ["flip_rate=0.1", "margin_cap=10.0"],
    "margin": ["score_margin=0.5"],
    "strength": ["pair_weights=strength", "strength_thresholds=[1.0]"],
}
TAUGHT = ["name=dno_prct", "teacher=true"]
TOGETHER = {frozenset(("flip", "strength"))}


@pytest.mark.parametrize("two", list(combinations(POLICIES, 2)))
def test_a_label_is_weighed_in_one_way(two):
    """Each by itself works; every illegal pair is refused with field, cause and fix."""
    for one in two:
        check(*POLICIES[one])
    both = [knob for one in two for knob in POLICIES[one]]
    if frozenset(two) in TOGETHER:
        check(*both)
        return
    with pytest.raises(ConfigError, match=r"twice|as a margin and as a probability") as refused:
        check(*both)
    assert refused.value.field.removeprefix("algorithm.") in {knob.split("=")[0] for knob in both}
    assert refused.value.fix


@pytest.mark.parametrize(
    "knobs",
    [
        ["label_smoothing=0.1", "score_margin=0.5"],
        ["soft_labels=true", "pair_weights=dcg"],
        ["score_margin=0.5", "pair_weights=dcg"],
        ["name=upo", "score_margin=0.5"],
        ["name=osp", "score_margin=0.5"],
    ],
)
def test_other_ways_to_count_twice(knobs):
    with pytest.raises(ConfigError):
        check(*knobs)


@pytest.mark.parametrize("weights", ["score_gap", "certainty", "wpo"])
@pytest.mark.parametrize("policy", [["soft_labels=true"], ["label_smoothing=0.1"], ["score_margin=0.5"], []])
def test_weights_for_other_reasons_go_with_any(weights, policy):
    check(f"pair_weights={weights}", *policy)


@pytest.mark.parametrize(
    ("knobs", "field", "said"),
    [
        (["strength_thresholds=[1.0]"], "strength_thresholds", "pair_weights is not strength"),
        (["pair_weights=strength"], "strength_thresholds", "is empty"),
        (["pair_weights=strength", "strength_thresholds=[2.0, 1.0]"], "strength_thresholds", "not ascending"),
        (["pair_age_decay=0.9"], "pair_age_decay", "pair_weights is not age"),
        (["pair_weights=age"], "pair_weights", "no pairs of earlier iterations come back"),
        (["pair_weights=per_prompt"], "pair_weights", "at most one pair of each prompt"),
        (["pair_weight_clip=[0.1, 5.0]"], "pair_weight_clip", "pair_weights is equal"),
        (["source_weights={teacher: 0.5}"], "source_weights", "pair_weights is not source"),
        (["pair_weights=source"], "pair_weights", "all pairs would count alike"),
        ([*TAUGHT, "pair_weights=source"], "source_weights", "is empty"),
        ([*TAUGHT, "pair_weights=source", "source_weights={mixture: 0.5}"], "source_weights", "is from policy, teacher"),
        (
            [*TAUGHT, "replay=0.0", "pair_weights=source", "source_weights={replay: 0.5}"],
            "source_weights",
            "is from policy, teacher",
        ),
        ([*TAUGHT, "pair_weights=source", "source_weights={teacher: -0.5}"], "source_weights", "a number from 0 on"),
        (["pair_weights=wpo", "pair_weight_clip=[0.1, 5.0]"], "pair_weight_clip", "pair_weights is wpo"),
        (["pair_weights=score_gap", "pair_weight_clip=[2.0, 5.0]"], "pair_weight_clip", "is between the two"),
        (["pair_weights=score_gap", "pair_weight_clip=[0.1]"], "pair_weight_clip", "is between the two"),
        (["pair_weights=score_gap", "pair_weight_clip=[-1.0, 5.0]"], "pair_weight_clip", "is between the two"),
        (["nll_target=reference_answer"], "nll_target", "nll_coef is 0"),
        (["nll_norm=sum"], "nll_norm", "nll_coef is 0"),
        (["name=orpo", "nll_coef=0.0", "nll_on=sequence"], "nll_on", "nll_coef is 0"),
        (["common_token_weight=0.5"], "common_token_weight", "token_weights is not differing"),
        (["token_weights=differing", "common_token_weight=1.0"], "common_token_weight", "count like all others"),
        (["score_margin_max=3.0"], "score_margin_max", "score_margin is 0"),
        (
            ["name=grpo", "importance_sampling_cap=null", "importance_sampling_mode=token_mask"],
            "importance_sampling_mode",
            "importance_sampling_cap is null",
        ),
        (
            ["name=grpo", "importance_sampling_cap=null", "importance_sampling_floor=0.5"],
            "importance_sampling_floor",
            "importance_sampling_cap is null",
        ),
        (
            ["name=rloo", "importance_sampling_floor=0.9", "importance_sampling_cap=0.9"],
            "importance_sampling_floor",
            "no ratio",
        ),
        (["name=grpo", "importance_sampling_filter=[2.0, 0.5]"], "importance_sampling_filter", "between the two"),
        (["name=grpo", "importance_sampling_filter=[0.0, 2.0]"], "importance_sampling_filter", "between the two"),
        (["name=grpo", "importance_sampling_filter=[1.1, 2.0]"], "importance_sampling_filter", "between the two"),
        (["name=grpo", "importance_sampling_filter=[0.5, 0.9]"], "importance_sampling_filter", "between the two"),
        (["name=ppo", "kl_clip=10.0"], "kl_clip", "no part of a reward"),
        (["name=ppo", "kl_clip=10.0", "kl_in=reward", "kl_coef=0.0"], "kl_clip", "kl_coef is 0"),
        (["name=rloo", "kl_clip=10.0", "kl_coef=0.0"], "kl_clip", "kl_coef is 0"),
        (["name=constrained", "kl_clip=10.0", "objective=score"], "kl_clip", "no part of a reward"),
    ],
)
def test_what_nothing_would_read_or_means_nothing_is_refused(knobs, field, said):
    with pytest.raises(ConfigError) as refused:
        check(*knobs)
    assert refused.value.field == f"algorithm.{field}"
    assert said in refused.value.cause
    assert refused.value.fix


@pytest.mark.parametrize(
    "knobs",
    [
        ["pair_weights=age", "pair_age_decay=0.9", "name=dno_prct", "replay=0.3"],
        ["pair_weights=age", "pair_age_decay=0.9", "selection.name=regenerate"],
        [*TAUGHT, "pair_weights=source", "source_weights={teacher: 0.5}"],
        [*TAUGHT, "pair_weights=source", "source_weights={teacher: 0.5, replay: 0.3}", "replay=0.3"],
        ["pair_weights=source", "source_weights={replay: 0.3}", "selection.name=regenerate"],
        ["name=xpo", "pair_weights=source", "source_weights={reference: 0.3}", "pair_weight_clip=[0.1, 5.0]"],
        ["pair_weights=per_prompt", "pairing.name=all_pairs"],
        ["pair_weights=score_gap", "pair_weight_clip=[0.1, 5.0]"],
        ["nll_coef=1.0", "nll_target=reference_answer"],
        ["token_weights=differing", "common_token_weight=0.5"],
        ["score_margin=0.5", "score_margin_max=3.0"],
        ["name=dno_prct", "teacher=true"],
        [
            "name=grpo",
            "importance_sampling_floor=0.5",
            "importance_sampling_mode=token_mask",
            "importance_sampling_filter=[0.5, 2.0]",
        ],
        ["name=grpo", "importance_sampling_cap=null", "importance_sampling_filter=[0.5, 2.0]"],
        ["name=ppo", "kl_clip=10.0", "kl_in=reward"],
        ["name=rloo", "kl_clip=10.0", "score_clip=10.0"],
        ["name=constrained", "kl_clip=10.0"],
    ],
)
def test_what_is_read_is_accepted(knobs):
    check(*knobs)


def test_a_single_sample_beside_a_teacher_makes_no_pair_that_may_be_trained():
    taught = ["name=dno_prct", "teacher=true", "sampling.samples_per_prompt=1"]
    with pytest.raises(ConfigError, match="every pair has the teacher's answer") as refused:
        check(*taught)
    assert refused.value.field == "algorithm.teacher_max_share"
    check(*taught, "teacher_max_share=1.0", "teacher_decay=1.0")


@pytest.mark.parametrize("name", ["grpo", "kto", "lipo_lambda", "sppo", "spin"])
@pytest.mark.parametrize("key", ["token_weights=differing", "pair_weights=dcg", "nll_target=reference_answer"])
def test_losses_of_another_kind_refuse_them_with_the_reason(name, key):
    with pytest.raises(ConfigError, match=r"losses on pairs|losses that are a function of the margin") as refused:
        check(f"name={name}", key)
    assert refused.value.field == f"algorithm.{key.split('=')[0]}"


# --- what items count that are no pairs ---


@pytest.mark.parametrize(
    ("keys", "field", "said"),
    [
        (["name=dpo", "certainty"], "sample_weights", "has weights of its pairs"),
        (["name=re_po", "certainty"], "sample_weights", "has weights of its pairs"),
        (["name=aot", "certainty"], "sample_weights", "has no use for weights"),
        (["name=aot_unpaired", "certainty"], "sample_weights", "has no use for weights"),
        (["name=weighted_sft", "certainty"], "sample_weights", "has no use for weights, or has its own"),
        (["name=kto", "score_gap"], "sample_weights", "single responses, which have no gap"),
        (["name=grpo", "score_gap"], "sample_weights", "single responses, which have no gap"),
        (["name=lipo_lambda", "per_prompt"], "sample_weights", "at most one item of each prompt"),
        (["name=raft", "per_prompt"], "sample_weights", "at most one item of each prompt"),
        (
            ["name=reinforce_pp", "certainty", "sampling.samples_per_prompt=1"],
            "sample_weights",
            "nothing that it could win against",
        ),
        (["name=kto", "equal", "training.sample_weight_clip=[0.1, 5.0]"], "sample_weight_clip", "sample_weights is equal"),
        (["name=kto", "certainty", "training.sample_weight_clip=[2.0, 5.0]"], "sample_weight_clip", "is between the two"),
        (["name=kto", "age"], "sample_weights", "none of earlier iterations come back"),
        (["name=kto", "certainty", "training.sample_age_decay=0.9"], "sample_age_decay", "sample_weights is certainty"),
        (["name=kto", "equal", "training.sample_age_decay=0.9"], "sample_age_decay", "sample_weights is equal"),
    ],
)
def test_weights_that_nothing_would_read_are_refused(keys, field, said):
    name, kind, *more = keys
    with pytest.raises(ConfigError) as refused:
        check(name, f"training.sample_weights={kind}", *more)
    assert refused.value.field == f"training.{field}"
    assert said in refused.value.cause
    assert refused.value.fix


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "certainty") for name in ("kto", "bco", "lipo_lambda", "list_mle", "pro", "hypo_online_kl", "triple_po")),
        *((name, "certainty") for name in ("ppo", "grpo", "dapo", "p3o", "nash_md", "constrained", "sppo", "raft")),
        *((name, "score_gap") for name in ("lipo_lambda", "list_mle", "pro", "p3o")),
        *((name, "per_prompt") for name in ("kto", "bco", "grpo", "sppo")),
    ],
)
def test_weights_that_are_read_are_accepted(name, kind):
    more = {"constrained": ["form=linear"], "sppo": ["pairs=all"]}.get(name, [])
    check(f"name={name}", f"training.sample_weights={kind}", "training.sample_weight_clip=[0.1, 5.0]", *more)


@pytest.mark.parametrize("name", ["kto", "grpo", "lipo_lambda"])
def test_older_items_may_count_less_where_some_come_again(name):
    older = ["training.sample_weights=age", "training.sample_age_decay=0.9", "selection.name=regenerate"]
    check(f"name={name}", *older, *(["importance_sampling_cap=2.0"] if name == "grpo" else []))


def test_uncertain_pairs_are_left_out_in_one_place():
    check("pairing.uncertainty_filter.mu=1.0")
    check("name=upo", "pairing.uncertainty_filter.within=0.1")
    with pytest.raises(ConfigError, match="goes by the uncertainty of each label itself") as refused:
        check("name=upo", "pairing.uncertainty_filter.mu=1.0")
    assert refused.value.field == "pairing.uncertainty_filter.mu"


def test_counts_of_leaves_are_for_losses_that_read_them():
    check("soft_labels=true", "pairing.name=shared_prefix", "pairing.prob=leaf_counts")
    check("pairing.name=shared_prefix")
    with pytest.raises(ConfigError, match="is leaf_counts, and dpo as configured takes every label for certain") as refused:
        check("pairing.name=shared_prefix", "pairing.prob=leaf_counts")
    assert refused.value.field == "pairing.prob"


@pytest.mark.parametrize(
    "knobs", [["soft_labels=true"], ["name=irepo"], ["name=dno"], ["name=sppo_single"], ["name=tdpo1", "soft_labels=true"]]
)
def test_a_tie_may_be_a_pair_where_its_probability_is_read(knobs):
    check(*knobs, "pairing.ties=soft")


@pytest.mark.parametrize(
    ("knobs", "fix"),
    [
        ([], "set algorithm.soft_labels=true"),
        (["pair_weights=dcg"], "set algorithm.soft_labels=true"),
        (["name=sppo_hard"], "choose a loss that reads probabilities"),
        (["name=upo"], "choose a loss that reads probabilities"),
    ],
)
def test_a_tie_is_no_pair_of_a_loss_that_takes_labels_for_certain(knobs, fix):
    with pytest.raises(ConfigError, match="takes every label for certain") as refused:
        check(*knobs, "pairing.ties=soft")
    assert refused.value.field == "pairing.ties"
    assert fix in refused.value.fix
