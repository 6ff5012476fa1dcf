"""Which combinations of algorithm, reference and oracle are refused, and what is said about the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from onlinerl import config as configuration
from onlinerl.algorithm_checks import check_algorithm, implied_preferences
from onlinerl.errors import ConfigError
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
    assert notes("algorithm.kl_in=reward", "algorithm.kl=0.0", "iterations=2", "algorithm.critic_warmup=1") == []  # no price


@pytest.mark.parametrize(
    ("overrides", "first"),
    [([], 2), (["algorithm.critic_warmup=1"], 3), (["reference.schedule=every_n", "reference.every=3"], 2)],
)
def test_a_kl_in_the_reward_that_acts_later_is_explained(overrides, first):
    (note,) = notes("algorithm.kl_in=reward", *overrides)
    assert f"it is 0 until iteration {first}" in note
    assert "algorithm.kl_in=loss acts at every step" in note


def test_a_policy_that_would_never_learn_is_refused():
    assert notes("algorithm.critic_warmup=3") == []
    with pytest.raises(ConfigError, match="the policy would never learn") as caught:
        notes("algorithm.critic_warmup=4")
    assert caught.value.field == "algorithm.critic_warmup"


@pytest.mark.parametrize(
    "knobs", [["algorithm.target_kl=6.0"], ["algorithm.target_kl=6.0", "algorithm.kl_in=reward", "algorithm.kl=0.0"]]
)
def test_a_target_without_a_price_to_adapt_is_refused(knobs):
    with pytest.raises(ConfigError) as caught:
        notes(*knobs)
    assert caught.value.field == "algorithm.target_kl"


def test_a_warm_up_of_a_critic_that_shares_the_policys_network_is_refused():
    """The policy would learn in it, against its name and what `check` says about the KL in the reward."""
    with pytest.raises(ConfigError, match="the policy would change with it") as caught:
        notes("algorithm.critic=shared", "algorithm.critic_warmup=1")
    assert caught.value.field == "algorithm.critic_warmup"
    assert notes("algorithm.critic=separate", "algorithm.critic_warmup=1") == []


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
