"""The cards of algorithms, on the command line and as a page."""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from pydantic import TypeAdapter
from typer.testing import CliRunner

from onlinerl import registry
from onlinerl.cli import app
from onlinerl.errors import ConfigError
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.views import cards

ROOT = Path(__file__).parents[2]
NAMES = registry.names("algorithms")


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_says_what_it_is(name):
    one = cards.card(name)
    assert '"' in one.source or name == "nbpo", "the docstring of its module names the paper"
    assert len(one.about) > 20
    assert {knob.name for knob in one.knobs} == set(registry.load("algorithms", name, Algorithm).model_fields)
    assert all(knob.takes for knob in one.knobs)
    assert all("\n" not in line for line in cards.page(one))


def test_a_card_by_hand():
    one = cards.card("simpo")
    assert (one.unit, one.reference, one.loss_at_reference) == ("pair", "none", None)
    assert one.needs == ("2 responses per prompt or more", "Pairs built by the configured pair builder")
    knobs = {knob.name: knob for knob in one.knobs}
    assert (knobs["beta"].default, knobs["beta"].takes) == (2.0, "a number above 0")
    assert knobs["beta"].about == "2 to 2.5 in the paper, up to 10."  # its own docstring, not that of what it builds on
    assert "tokens of the longer response" in knobs["ld_alpha"].about
    page = list(cards.page(one))
    assert "algorithm.beta: 2.0  (a number above 0)" in page
    assert "algorithm.ld_alpha: null  (a number from 0 and up to 1, or null)" in page
    assert "algorithm.length_norm: true  (true or false)" in page
    assert "algorithm.strength_thresholds: []  (a list, each of it a number)" in page
    assert "algorithm.pair_weight_clip: null  (a list, each of it a number, or null)" in page
    band = "algorithm.importance_sampling_filter: null  (a list of 2, each of it a number, or null)"
    assert band in cards.page(cards.card("grpo"))


AGREED = {
    "bco": {"beta": 0.01},
    "constrained": {"u0_std": 0.01, "base": "ppo"},
    "cpo": {"nll_norm": "batch_tokens"},
    "dapo": {"max_length": 20480, "overlong_buffer_len": 4096},
    "dno_prct": {"floor": 5, "margin": 2},
    "dr_po": {"kl_in": "reward", "mask_value": False},
    "grpo": {"kl_coef": 0.04},
    "nash_md": {"tau": 0.008},
    "orpo": {"nll_norm": "batch_tokens"},
    "ppo": {"kl_in": "reward", "missing_eos_score": -1},
    "rebel": {"kl_coef": 0.05},
    "reward_augmented": {"goals": "score", "ties": "keep"},
    "robust_dpo": {"margin_cap": None},
    "selm": {"carry_over": True},
    "triple_po": {"nll_norm": "batch_tokens"},
}
"""Knobs whose defaults are not the paper's, and what it has."""


def faults(one: cards.Card) -> list[str]:
    """What is wrong with what a card says of the paper's values."""
    fields = registry.load("algorithms", one.name, Algorithm).model_fields if one.name in NAMES else {}
    found = ["too many"] if len(one.departures) > 2 else []
    for knob in one.departures:
        value = yaml.safe_load(knob.paper)
        if value == knob.default:
            found.append(f"{knob.name} is the paper's")
        if knob.name in fields:  # of a kind that the knob may have
            TypeAdapter(fields[knob.name].annotation).validate_python(value)
        if len(knob.why) < 10:
            found.append(f"{knob.name}: no reason")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_at_most_two_knobs_differ_from_the_papers_each_with_its_reason(name):
    one = cards.card(name)
    assert faults(one) == []
    assert {knob.name: yaml.safe_load(knob.paper) for knob in one.departures} == AGREED.get(name, {})
    page = "\n".join(cards.page(one))
    assert all(f"{knob.paper} in the paper)" in page for knob in one.departures)


def said(value: str, why: str = "of all that there are, none.", knob: str = "a", where: str = "there") -> str:
    return f"Not the paper's: `{knob}`, {value} {where}; {why}"


def test_more_than_two_or_the_papers_own_value_would_be_noticed():
    def card(*departures: str) -> cards.Card:
        about, plain = " ".join(departures), cards.card("dpo")
        found = cards.departures(about)
        knobs = tuple(cards.Knob(name=name, default=0.1, takes="", about="", **one) for name, one in found.items())
        return replace(plain, name="of my own", about=about, knobs=knobs)

    assert faults(card(said("0.2"), said("0.3", knob="b", where="there (of 6)"))) == []
    assert faults(card(said("0.2"), said("0.2", knob="b"), said("0.2", knob="c"))) == ["too many"]
    assert faults(card(said("0.1"))) == ["a is the paper's"]
    assert faults(card(said("0.2", "so."))) == ["a: no reason"]
    with pytest.raises(ValueError, match="write: Not the paper's"):
        card("Not the paper's: a, which is 3.")


def test_a_knob_that_there_is_not_would_be_noticed(monkeypatch):
    kind = registry.load("algorithms", "dpo", Algorithm)
    monkeypatch.setattr(kind, "__doc__", said("0.2", knob="betta"))
    with pytest.raises(ValueError, match="says of betta what the paper has, which is no knob"):
        cards.card("dpo")


def test_on_the_command_line():
    listed = CliRunner().invoke(app, ["algorithms"])
    assert [line.split()[0] for line in listed.stdout.splitlines()] == NAMES
    one = CliRunner().invoke(app, ["algorithms", "dpo", "--json"])
    (card,) = json.loads(one.stdout)
    assert card["loss_at_reference"] == pytest.approx(0.693147, abs=1e-6)
    assert len(json.loads(CliRunner().invoke(app, ["algorithms", "--json"]).stdout)) == len(NAMES)


def test_a_name_that_there_is_not_is_refused_with_the_one_that_was_meant():
    with pytest.raises(ConfigError, match="there is no 'simp0'") as error:
        cards.card("simp0")
    assert "simpo" in str(error.value.fix)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/algorithm_docs.py."""
    spec = importlib.util.spec_from_file_location("algorithm_docs", ROOT / "tools/algorithm_docs.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_the_page_is_what_the_tool_writes(tool):
    assert (ROOT / "docs/algorithms.md").read_text() == tool.document(), "run python tools/algorithm_docs.py"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def test_agrees_with_trl(): assert dpo_loss()", "TRL"),
        ("def test_hard_labels_agree_with_trl_which_sums(): assert dpo_loss()", "TRL (hard labels)"),
        ("def test_agrees_with_trl(): pass", None),  # a name alone
        ("def test_value_by_hand(): assert dpo_loss()", None),
    ],
)
def test_an_agreement_is_a_test_that_calls_the_other_implementation(tool, source, said):
    assert tool._agreement(ast.parse(source).body[0]) == said


def test_a_page_that_says_of_all_what_a_test_leaves_out_is_not_written(tool, tmp_path, monkeypatch):
    """The fault of a test of every algorithm that skips some, or has gone."""
    monkeypatch.setattr(tool, "TESTS", tmp_path)
    for number, source in enumerate(("def test_all():\n    pytest.skip()", "def test_others(): pass")):
        (tmp_path / f"{number}.py").write_text(source)
        with pytest.raises(ValueError, match="without exceptions"):
            tool._test(f"{number}.py", "test_all")
