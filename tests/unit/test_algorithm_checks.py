"""Which combinations of algorithm, reference and oracle are refused, and what is said about the others."""

from __future__ import annotations

import dataclasses
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from onlinerl import config as configuration
from onlinerl.algorithm_checks import check_algorithm, check_sections, most_items
from onlinerl.algorithms.onpo import Onpo
from onlinerl.algorithms.tdpo1 import Tdpo1
from onlinerl.errors import ConfigError
from onlinerl.oracle_checks import check_components, check_uncertainty, check_verdict, implied_preferences
from onlinerl.preflight import derived
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.protocols.needs import Needs
from onlinerl.protocols.reported import Reported
from onlinerl.types import Verdict

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


def notes(*overrides: str) -> list[str]:
    config = configuration.load(QUICKSTART, ["algorithm.name=ppo", *overrides])
    return check_algorithm(config, configuration.algorithm(config))


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["reference.schedule=previous"], "reference.schedule"),
        (["reference.schedule=every_n"], "reference.schedule"),  # every 1
        (["reference.schedule=ema", "reference.mixup_alpha=1.0"], "reference.schedule"),  # a copy of the policy
        (["iterations=1"], "algorithm.kl_in"),
        (["iterations=2", "algorithm.critic_warmup=1"], "algorithm.kl_in"),
    ],
)
def test_a_kl_in_the_reward_that_would_never_act_is_refused(overrides, field):
    with pytest.raises(ConfigError, match="it would never act") as caught:
        notes("algorithm.kl_in=reward", *overrides)
    assert caught.value.field == field
    assert "algorithm.kl_in=loss" in caught.value.fix
    assert notes(*overrides) == []  # in the loss it acts
    free = ["algorithm.kl_in=reward", "algorithm.kl_coef=0.0"]
    assert notes(*free, "iterations=2", "algorithm.critic_warmup=1") == []


@pytest.mark.parametrize(
    ("overrides", "first"),
    [
        ([], 2),
        (["algorithm.critic_warmup=1"], 3),
        (["reference.schedule=every_n", "reference.every=3"], 2),
        (["reference.schedule=ema"], 2),
    ],
)
def test_a_kl_in_the_reward_that_acts_later_is_explained(overrides, first):
    (note,) = notes("algorithm.kl_in=reward", *overrides)
    assert f"it is 0 until iteration {first}" in note
    assert "algorithm.kl_in=loss acts at every step" in note


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce_pp", "p3o"])
def test_where_the_kl_can_only_be_in_the_reward_the_same_is_said(algorithm):
    name = f"algorithm.name={algorithm}"
    (note,) = notes(name)
    assert "it is 0 until iteration 2" in note
    assert "kl_in" not in note
    assert notes(name, "algorithm.kl_coef=0.0") == notes(name, "algorithm.kl_coef=0.0", "iterations=1") == []
    for override, field, fix in (
        ("iterations=1", "algorithm.kl_coef", "raise iterations"),
        ("reference.schedule=previous", "reference.schedule", "reference.schedule=fixed"),
    ):
        with pytest.raises(ConfigError, match="it would never act") as caught:
            notes(name, override)
        assert caught.value.field == field
        assert "algorithm.kl_coef=0" in caught.value.fix
        assert fix in caught.value.fix


def test_a_policy_that_would_never_learn_is_refused():
    assert notes("algorithm.critic_warmup=3") == []
    with pytest.raises(ConfigError, match="the policy would never learn") as caught:
        notes("algorithm.critic_warmup=4")
    assert caught.value.field == "algorithm.critic_warmup"


@pytest.mark.parametrize(
    "knobs", [["algorithm.target_kl=6.0"], ["algorithm.target_kl=6.0", "algorithm.kl_in=reward", "algorithm.kl_coef=0.0"]]
)
def test_a_target_without_a_price_to_adapt_is_refused(knobs):
    with pytest.raises(ConfigError) as caught:
        notes(*knobs)
    assert caught.value.field == "algorithm.target_kl"


def test_a_warm_up_of_a_critic_that_shares_the_policys_network_is_refused():
    """The policy would learn in it, against its name and what `check` says about the KL in the reward."""
    with pytest.raises(ConfigError, match="network, which would change with it") as caught:
        notes("algorithm.critic=shared", "algorithm.critic_warmup=1")
    assert caught.value.field == "algorithm.critic_warmup"
    assert notes("algorithm.critic=separate", "algorithm.critic_warmup=1") == []


LAG = "schedule.max_lag=1"


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "gspo", "reinforce_pp_baseline", "reinforce_scalar"])
def test_lag_without_a_correction_is_refused_where_the_loss_needs_one(algorithm):
    name = f"algorithm.name={algorithm}"
    assert notes(name, LAG) == []
    with pytest.raises(ConfigError, match="takes every response for one of the policy that training starts from") as caught:
        notes(name, LAG, "algorithm.importance_sampling_cap=null")
    assert caught.value.field == "schedule.max_lag"
    assert "algorithm.importance_sampling_cap" in caught.value.fix
    assert notes(name, "algorithm.importance_sampling_cap=null") == []


@pytest.mark.parametrize(
    ("algorithm", "said"), [("dpo", 0), ("raft", 0), ("weighted_sft", 0), ("dno", 1), ("dno_prct", 1), ("sppo", 1)]
)
def test_what_lag_means_for_losses_on_preferences_is_said(algorithm, said):
    found = notes(f"algorithm.name={algorithm}", LAG)
    assert len(found) == said
    assert all("those of the policy before it" in note for note in found)
    assert notes(f"algorithm.name={algorithm}") == []


def test_a_kl_in_the_reward_is_biased_with_lag():
    (note,) = notes("algorithm.kl_in=reward", LAG)
    assert "a biased estimate" in note


REUSE = "selection.name=regenerate"


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "onpo"])
def test_reused_responses_are_refused_where_a_loss_takes_them_for_new_ones(algorithm):
    uncorrected = () if algorithm == "onpo" else ("algorithm.importance_sampling_cap=null",)
    name = f"algorithm.name={algorithm}"
    with pytest.raises(ConfigError, match="responses of older policies trained on once more, and") as caught:
        notes(name, REUSE, *uncorrected)
    assert caught.value.field == "selection.name"
    assert ("algorithm.importance_sampling_cap" in caught.value.fix) == bool(uncorrected)
    assert notes(name, REUSE, "selection.rho=1.0", *uncorrected) == [], "then nothing is"


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [("dpo", 0), ("optune", 0), ("grpo", 0), ("raft", 0), ("xpo", 0), ("selm", 1), ("dno_prct", 1), ("sppo", 1)],
)
def test_what_reused_responses_mean_for_losses_on_preferences_is_said(algorithm, said):
    once = ["algorithm.replay=0.0"] if algorithm == "dno_prct" else []
    found = notes(f"algorithm.name={algorithm}", REUSE, *once)
    assert sum("with selection.name=regenerate they are those of older policies" in note for note in found) == said


def test_a_kl_in_the_reward_is_biased_with_reused_responses():
    (note,) = notes("algorithm.kl_in=reward", REUSE)
    assert "on responses of an older one (selection.name): a biased estimate" in note


def test_items_that_an_algorithm_trains_once_more_itself_are_refused_beside_reused_responses():
    with pytest.raises(ConfigError, match="some would come twice in an iteration") as caught:
        notes("algorithm.name=dno_prct", REUSE)
    assert (caught.value.field, "algorithm.replay=0" in caught.value.fix) == ("selection.name", True)


def test_what_was_trained_before_is_taken_over_only_where_prompts_come_again():
    carried = ["algorithm.name=selm", "algorithm.carry_over=true"]
    assert notes(*carried, "prompts.reuse=true") == []
    with pytest.raises(ConfigError, match="no prompt comes again") as caught:
        notes(*carried, "prompts.reuse=false")
    assert caught.value.field == "prompts.reuse"
    with pytest.raises(ConfigError, match="takes whole groups over") as caught:
        notes(*carried, REUSE)
    assert caught.value.field == "selection.name"


def sections(*overrides: str) -> None:
    config = configuration.load(QUICKSTART, list(overrides))
    check_sections(config, configuration.algorithm(config))


@pytest.mark.parametrize(
    ("overrides", "field", "said"),
    [
        (["algorithm.name=grpo", "pairing.name=best_worst"], "pairing", "grpo trains no pairs"),
        (["algorithm.name=sppo", "pairing.name=ranked"], "pairing", "sppo trains no pairs"),
        (["algorithm.name=grpo", "reference.schedule=previous"], "reference.schedule", "grpo as configured needs no reference"),
        (
            ["algorithm.name=ppo", "algorithm.kl_coef=0.0", "reference.schedule=fixed"],
            "reference.schedule",
            "needs no reference",
        ),
        (["algorithm.name=grpo", "reference.every=2"], "reference.every", "needs no reference"),
        (["reference.every=2"], "reference.every", "dpo with this schedule does not"),
        (["algorithm.name=grpo", "reference.schedule=ema"], "reference.schedule", "grpo as configured needs no reference"),
        (["algorithm.name=grpo", "reference.mixup_alpha=0.5"], "reference.mixup_alpha", "needs no reference"),
        (["reference.mixup_alpha=0.5"], "reference.mixup_alpha", "dpo with this schedule does not"),
        (
            ["reference.schedule=every_n", "reference.mixup_alpha=0.5"],
            "reference.mixup_alpha",
            "dpo with this schedule does not",
        ),
        (["reference.allow_nonstandard=true"], "reference.allow_nonstandard", "dpo with this schedule does not"),
        (
            ["algorithm.name=dno", "reference.schedule=previous", "reference.allow_nonstandard=true"],
            "reference.allow_nonstandard",
            "dno with this schedule does not",
        ),
    ],
)
def test_what_nothing_would_read_is_refused(overrides, field, said):
    with pytest.raises(ConfigError, match=said) as caught:
        sections(*overrides)
    assert caught.value.field == field
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("leave it out")


@pytest.mark.parametrize(
    "overrides",
    [
        ["pairing.name=ranked"],
        ["algorithm.name=grpo"],
        ["algorithm.name=grpo", "pairing=null"],
        ["algorithm.name=grpo", "reference.schedule=none"],  # says what is so
        ["algorithm.name=grpo", "algorithm.kl_coef=0.1", "reference.schedule=previous"],
        ["reference.schedule=every_n", "reference.every=2"],
        ["reference.schedule=ema", "reference.every=2", "reference.mixup_alpha=0.5"],
        ["algorithm.name=dno", "reference.schedule=fixed", "reference.allow_nonstandard=true"],
    ],
)
def test_what_is_read_is_accepted(overrides):
    sections(*overrides)


SCORED = Verdict(annotator="a", oracle_version="v", scores=(0.0, 1.0))
COMPARED = Verdict(annotator="a", oracle_version="v", preferences=((float("nan"), 0.9), (0.1, float("nan"))))


@pytest.mark.parametrize(
    ("algorithm", "reads"),
    [
        (["algorithm.name=sppo"], True),
        (["algorithm.name=dno"], True),
        (["algorithm.name=dpo", "algorithm.soft_labels=true"], True),
        (["algorithm.name=dpo"], False),
        (["algorithm.name=grpo"], False),
    ],
)
def test_what_reads_preferences_of_an_oracle_that_scores_is_told_what_they_are(algorithm, reads):
    config = configuration.load(QUICKSTART, [*algorithm, "oracle.preference_temperature=0.5"])
    built, oracle = configuration.algorithm(config), configuration.oracle(config)
    said = implied_preferences(config, built, oracle, SCORED)
    assert ["Bradley-Terry at temperature 0.5" in note for note in said] == [True] * reads
    assert implied_preferences(config, built, oracle, COMPARED) == []


@pytest.mark.parametrize(
    ("name", "given", "refused"), [("upo", False, True), ("upo", True, False), ("upo", None, False), ("dpo", False, False)]
)
def test_an_oracle_that_judges_once_cannot_say_how_uncertain_it_is(name, given, refused):
    config = configuration.load(QUICKSTART, [f"algorithm.name={name}"])
    with pytest.raises(ConfigError, match="sentiment as configured judges each pair once") if refused else nullcontext():
        check_uncertainty(config, configuration.algorithm(config), given)


def test_a_filter_by_uncertainty_needs_an_oracle_that_gives_it():
    config = configuration.load(QUICKSTART, ["algorithm.name=sppo_hard", "pairing.uncertainty_filter.mu=1.0"])
    for given in (True, None):
        check_uncertainty(config, configuration.algorithm(config), given)
    with pytest.raises(ConfigError, match=r"judges each pair once, and pairing\.uncertainty_filter\.mu filters") as refused:
        check_uncertainty(config, configuration.algorithm(config), given=False)
    assert "leave pairing.uncertainty_filter.mu out" in refused.value.fix
    by_probability = configuration.load(QUICKSTART, ["algorithm.name=sppo_hard", "pairing.uncertainty_filter.within=0.1"])
    check_uncertainty(by_probability, configuration.algorithm(by_probability), given=False)


def test_an_algorithm_that_declares_a_metric_of_others_is_refused():
    config = configuration.load(QUICKSTART)
    algorithm = configuration.algorithm(config)
    own = type("Own", (type(algorithm),), {"metrics": (Reported("surprise", "How unexpected it was", "nats"),)})
    check_algorithm(config, own())
    clash = type("Clash", (type(algorithm),), {"metrics": (Reported("reward", "Mean score of the batch", "reward"),)})
    with pytest.raises(ConfigError, match="dpo declares metrics that cannot be recorded: defined twice: reward") as caught:
        check_algorithm(config, clash())
    assert caught.value.field == "algorithm.name"


def test_responses_beside_the_samples_count_for_what_an_algorithm_needs(monkeypatch):
    """dpo needs two samples, selm one and the greedy response; nothing may weigh the greedy one by its probability."""
    one = ["sampling.samples_per_prompt=1"]
    assert notes("algorithm.name=selm", *one) == []
    with pytest.raises(ConfigError, match="needs at least 2 per prompt, got 1"):
        notes("algorithm.name=dpo", *one)
    kind = type(configuration.algorithm(configuration.load(QUICKSTART, ["algorithm.name=ppo"])))
    needs = replace(kind().needs, greedy=True)
    monkeypatch.setattr(kind, "needs", property(lambda self: needs))
    with pytest.raises(ConfigError, match="asks for responses that were not drawn from the policy"):
        notes()


@pytest.mark.parametrize("wrong", [{"paris": True}, {"off_policy": "never"}, {"min_samples": "few"}, {"goals": "high"}])
def test_needs_that_there_are_not_are_refused_where_they_are_declared(wrong):
    field = next(iter(wrong))
    with pytest.raises(ValidationError, match=field):
        Needs(**wrong)
    with pytest.raises((ValidationError, TypeError), match=field):
        replace(Onpo().needs, **wrong)


def test_a_kl_to_no_reference_is_refused():
    class Lost(Tdpo1):
        @by_knobs
        def needs(self):
            return replace(super().needs, reference=False)

    config = configuration.load(QUICKSTART, ["algorithm.name=tdpo1"])
    assert check_algorithm(config, Tdpo1()) == []
    with pytest.raises(ConfigError, match="declares `reference_kl` and no `reference`") as caught:
        check_algorithm(config, Lost())
    assert caught.value.field == "algorithm.name"


@pytest.mark.parametrize(
    ("name", "changes", "said"), [("dpo", {"reference": False}, "no `reference`"), ("tdpo1", {}, "is a saved model")]
)
def test_a_reference_of_each_stage_that_nothing_could_be_compared_with_is_refused(monkeypatch, name, changes, said):
    config = configuration.load(QUICKSTART, [f"algorithm.name={name}"])
    algorithm = configuration.algorithm(config)
    monkeypatch.setattr(type(algorithm), "needs", replace(algorithm.needs, stage_reference="keep", **changes))
    with pytest.raises(ConfigError, match=f"declares `stage_reference`.*{said}") as caught:
        check_algorithm(config, algorithm)
    assert caught.value.field == "algorithm.name"


def test_stages_have_references_of_their_own_only_where_the_first_one_has_the_policy():
    curry = "algorithm.name=curry_dpo"
    assert notes(curry) == []
    fixed = ["reference.schedule=fixed", "reference.allow_nonstandard=true"]
    with pytest.raises(ConfigError, match="is previous_stage") as caught:
        notes(curry, *fixed)
    assert caught.value.field == "algorithm.stage_reference"
    assert notes(curry, *fixed, "algorithm.stage_reference=iteration") == []


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_a_kl_needs_a_reference_and_any_one_will_do(name):
    with pytest.raises(ConfigError, match=f"{name} needs a reference"):
        notes(f"algorithm.name={name}", "reference.schedule=none")
    for schedule in ("fixed", "previous", "every_n"):
        assert [note for note in notes(f"algorithm.name={name}", f"reference.schedule={schedule}") if "reference" in note] == []


@pytest.mark.parametrize(
    ("override", "field", "cause"),
    [
        ("schedule.max_lag=1", "schedule.max_lag", "the policy back, while it trains"),
        ("cluster.colocate=true", "cluster.colocate", "on the shared GPU in one push"),
        ("sampling.dynamic=true", "sampling.dynamic", "nothing on the prompts that come in later"),
    ],
)
def test_a_learner_that_cannot_lend_the_base_model_is_refused(override, field, cause):
    one = ["algorithm.name=xpo", "sampling.samples_per_prompt=1"]
    assert notes(*one) == []
    one = ["algorithm.name=xpo", "sampling.samples_per_prompt=2"]
    with pytest.raises(ConfigError, match=cause) as caught:
        notes(*one, override)
    assert caught.value.field == field


@pytest.mark.parametrize(("more", "said"), [({"reference": True}, "a `reference`"), ({"critic": "shared"}, "a `critic`")])
def test_auxiliary_weights_beside_what_they_are_in_the_place_of_are_refused(monkeypatch, more, said):
    needs = replace(Onpo().needs, **more)
    monkeypatch.setattr(Onpo, "needs", property(lambda self: needs))
    with pytest.raises(ConfigError, match=said) as caught:
        notes("algorithm.name=onpo")
    assert caught.value.field == "algorithm.name"


def test_with_two_passes_twice_as_many_steps_are_announced():
    said = []
    for optimistic in ("true", "false"):
        config = configuration.load(QUICKSTART, ["algorithm.name=onpo", f"algorithm.optimistic={optimistic}"])
        said.append(derived(config, configuration.algorithm(config)))
    two, one = (int(re.search(r"at most (\d+) optimizer steps", text)[1]) for text in said)
    assert two == 2 * one
    assert [", 2 passes)" in text for text in said] == [True, False]


def test_a_teacher_without_answers_is_refused(monkeypatch):
    config = configuration.load(QUICKSTART, ["algorithm.name=dpo"])
    dpo = configuration.algorithm(config)
    monkeypatch.setattr(type(dpo), "needs", replace(dpo.needs, teacher=True))
    with pytest.raises(ConfigError, match="declares `teacher` and no `answers`") as caught:
        check_algorithm(config, dpo)
    assert caught.value.field == "algorithm.name"


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["algorithm.name=simpo", "algorithm.online_kl=0.1"], "algorithm.online_kl"),
        (["algorithm.name=dpo", "algorithm.online_kl_samples=3"], "algorithm.online_kl_samples"),
        (["algorithm.name=dpo", "algorithm.pair_filter.ches_normalized=false"], "algorithm.pair_filter.ches_normalized"),
    ],
)
def test_a_modifier_that_has_nothing_to_go_by_is_refused(overrides, field):
    config = configuration.load(QUICKSTART, overrides)
    with pytest.raises(ConfigError) as caught:
        check_algorithm(config, configuration.algorithm(config))
    assert caught.value.field == field


def test_pairs_that_come_back_count_for_the_number_of_steps():
    config = configuration.load(QUICKSTART, ["algorithm.name=dno_prct", "algorithm.replay=0.0", "iterations=2"])
    dno = configuration.algorithm(config)
    again = configuration.algorithm(configuration.load(QUICKSTART, ["algorithm.name=dno_prct"]))
    new = most_items(config, dno)
    assert most_items(config, again) == new + int(0.3 * new), "in a run of two iterations they are one iteration old"


SEVERAL = ["algorithm.name=constrained", "algorithm.thresholds={harm: 0.5, charm: 1.0}"]


@pytest.mark.parametrize(
    ("given", "missing"),
    [(None, "gives one score only"), ({"harm": (0.0, 1.0)}, "gives harm beside the score")],
)
def test_an_oracle_that_does_not_give_all_scores_is_refused(given, missing):
    config = configuration.load(QUICKSTART, SEVERAL)
    built, oracle = configuration.algorithm(config), configuration.oracle(config)
    with pytest.raises(ConfigError, match=f"sentiment {missing}, and constrained as configured reads") as caught:
        check_components(config, built, oracle, dataclasses.replace(SCORED, components=given))
    assert caught.value.field == "oracle.name"
    check_components(
        config, built, oracle, dataclasses.replace(SCORED, components=dict.fromkeys(("harm", "charm"), (0.0, 1.0)))
    )
    check_components(config, built, oracle, None)  # there was nothing to ask about


def test_a_bound_of_ties_is_of_oracles_that_compare():
    for value, refused in ((0.1, True), (0.02, False), (0.0, False)):
        config = configuration.load(QUICKSTART, [f"pairing.tie_within={value}"])
        check_verdict(config, configuration.algorithm(config), COMPARED)
        with (
            pytest.raises(ConfigError, match="nothing would read it: sentiment gives scores")
            if refused
            else nullcontext() as caught
        ):
            check_verdict(config, configuration.algorithm(config), SCORED)
        assert not refused or caught.value.field == "pairing.tie_within"
    unread = configuration.load(QUICKSTART, ["algorithm.name=grpo"])
    check_verdict(unread, configuration.algorithm(unread), SCORED)


def test_a_selector_that_reads_other_scores_needs_an_oracle_that_gives_them():
    config = configuration.load(QUICKSTART, ["selection.name=borda", "prompts.reuse=true"])
    built, oracle = configuration.algorithm(config), configuration.oracle(config)
    for given in (None, {"length": (0.0, 1.0)}):
        with pytest.raises(ConfigError, match="and borda reads std") as refused:
            check_components(config, built, oracle, dataclasses.replace(SCORED, components=given))
        assert refused.value.field == "selection.name"
        assert "oracle.name=ensemble" in refused.value.fix
    check_components(config, built, oracle, dataclasses.replace(SCORED, components={"std": (0.0, 1.0)}))
    many = configuration.load(
        QUICKSTART,
        [
            "selection.name=borda",
            "prompts.reuse=true",
            "oracle={name: ensemble, members: {one: {name: reward_model, path: a}, two: {name: reward_model, path: b}}}",
        ],
    )
    check_components(many, configuration.algorithm(many), configuration.oracle(many), None)


def test_a_reward_model_which_is_not_asked_says_what_it_gives():
    config = configuration.load(QUICKSTART, [*SEVERAL, "oracle={name: reward_model, path: x}"])
    built, oracle = configuration.algorithm(config), configuration.oracle(config)
    with pytest.raises(ConfigError, match="gives one score only"):
        check_components(config, built, oracle, None)
    own = type("Own", (type(oracle),), {"components": property(lambda self: ("harm", "charm"))})
    check_components(config, built, own.model_validate(oracle.model_dump()), None)


def test_algorithms_that_declare_half_of_what_they_need_are_refused(monkeypatch):
    kind = type(configuration.algorithm(configuration.load(QUICKSTART, ["algorithm.name=grpo"])))
    for more, said in (({"prefix": 0.5}, "declares `prefix` and no `answers`"), ({"mixture_samples": 1}, "and no `reference`")):
        needs = replace(kind().needs, **more)
        monkeypatch.setattr(kind, "needs", property(lambda self, needs=needs: needs))
        with pytest.raises(ConfigError, match=said):
            notes("algorithm.name=grpo", "sampling.samples_per_prompt=4")
        monkeypatch.undo()


def test_what_a_mixture_costs_is_said_and_a_learner_that_cannot_draw_it_is_refused(monkeypatch):
    assert any("the learner draws 64 responses of the mixture" in note for note in notes("algorithm.name=nash_md"))
    config = configuration.load(QUICKSTART, ["algorithm.name=nash_md"])
    monkeypatch.setattr(type(config.learner), "samples_mixtures", False)
    with pytest.raises(ConfigError, match="which this learner does not draw") as caught:
        notes("algorithm.name=nash_md")
    assert caught.value.field == "learner.name"
