"""Stored comparisons: the forms that are read, what is held out, what is left out or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from onlinerl.config import reward_model as configuration
from onlinerl.config.reward_model import PreferencesConfig
from onlinerl.errors import PromptError
from onlinerl.prompts._preferences import read
from onlinerl.types import Message

ASKED = (Message(role="user", content="2+2?"),)
HELD_OUT = {"prompt": "held out", "chosen": "a", "rejected": "b"}
TURNS = [{"role": "user", "content": "2+2?"}]


@pytest.fixture
def preferences(tmp_path):
    """These rows, with a held-out comparison of its own."""

    def preferences(*rows: dict, heldout: tuple[dict, ...] | None = (HELD_OUT,), **keys):
        where = {}
        for name, each in (("train", rows), ("heldout", heldout)):
            if each is not None:
                where[name] = str(tmp_path / f"{name}.jsonl")
                Path(where[name]).write_text("".join(json.dumps(row) + "\n" for row in each))
        return read(PreferencesConfig(**where, **keys))

    return preferences


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {
            "prompt": TURNS,
            "chosen": [{"role": "assistant", "content": "4"}],
            "rejected": [{"role": "assistant", "content": "5"}],
        },
        {
            "chosen": [*TURNS, {"role": "assistant", "content": "4"}],
            "rejected": [*TURNS, {"role": "assistant", "content": "5"}],
        },
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "chosen": "5", "rejected": "4", "prob": 0.0},
    ],
    ids=["texts", "messages", "messages with the prompt in them", "transcripts", "transcript and texts", "the other one wins"],
)
def test_each_form_is_read(preferences, row):
    (found,) = preferences(row).train
    assert (found.prompt.messages, found.chosen, found.rejected, found.prob) == (ASKED, "4", "5", 1.0)


def test_columns_have_other_names(preferences):
    row = {"q": "2+2?", "a": "4", "b": "5", "gap": 2, "set": "sums"}
    columns = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "gap", "source": "set"}
    (found,) = preferences(row, heldout=({**row, "q": "other"},), columns=columns).train
    assert (found.chosen, found.rejected, found.margin, found.source) == ("4", "5", 2.0, "sums")


def test_numbers_and_ties(preferences):
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    plain, soft, tie = preferences(
        row, {**row, "chosen": "four", "prob": 0.7, "strength": 3}, {**row, "chosen": "fo", "tie": True}
    ).train
    assert (plain.prob, plain.margin, plain.strength, plain.source) == (1.0, 0.0, 1.0, "train")
    assert (soft.prob, soft.strength) == (0.7, 3.0)
    assert tie.prob == 0.5


def test_prompts_can_be_continued(preferences):
    row = {"prompt": "Once upon", "chosen": " a time", "rejected": " it"}
    (found,) = preferences(row, apply_chat_template=False).train
    assert (found.prompt.text, found.prompt.messages) == ("Once upon", ())


def test_what_is_held_out_depends_on_the_prompt_alone(preferences):
    """Two comparisons of one prompt are on the same side, whatever its case and spacing, and more data move none."""
    rows = [{"prompt": f"question {i}", "chosen": "a", "rejected": "b"} for i in range(200)]
    again = [{"prompt": f" Question  {i}", "chosen": "c", "rejected": "d"} for i in range(200)]
    first = preferences(*rows, heldout=None, heldout_share=0.2)
    more = preferences(*rows, *again, heldout=None, heldout_share=0.2)
    sides = {
        name: {each.prompt.messages[0].content.lower().split()[-1] for each in getattr(more, name)}
        for name in ("train", "heldout")
    }
    assert not sides["train"] & sides["heldout"]
    assert 20 < len(first.heldout) < 60
    assert [each for each in more.heldout if each.chosen == "a"] == first.heldout
    assert len(more.heldout) == 2 * len(first.heldout)


def test_what_is_left_out_is_counted(preferences):
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    found = preferences(row, row, {**row, "chosen": "5"}, {**row, "prompt": "Held OUT"})
    assert len(found.train) == 1
    assert all(each in found.remarks[0] for each in ("1 with two equal responses", "1 that come again"))
    assert any("1 whose prompts are held out" in each for each in found.remarks)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "", "rejected": "5"}, "has no answer in 'chosen'"),
        ({"prompt": "a", "chosen": "4", "rejected": "5", "prob": 1.5}, "says 1.5 in `prob`"),
        ({"prompt": "a", "chosen": "4", "rejected": "5", "strength": 0}, "says 0 in `strength`"),
        ({"prompt": "a", "chosen": "4", "rejected": "5", "margin": "much"}, "says 'much' in `margin`"),
        ({"prompt": "a", "chosen": "4", "rejected": "5", "tie": "yes"}, "says 'yes' in `tie`"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: 4", "rejected": "\n\nHuman: b\n\nAssistant: 5"},
            "compares answers to different prompts",
        ),
        ({"chosen": "plain", "rejected": "5"}, "is no comparison"),
    ],
)
def test_what_is_no_comparison_is_refused_or_counted(preferences, row, said):
    good = {"prompt": "fine", "chosen": "x", "rejected": "y"}
    with pytest.raises(PromptError, match=r"row 1.*" + said) as error:
        preferences(row, good)
    assert error.value.field == "preferences.train"
    assert "filter_invalid" in error.value.fix
    found = preferences(row, good, filter_invalid=True)
    assert len(found.train) == 1
    assert "1 that are no comparison" in found.remarks[0]


def test_a_column_that_is_not_there(preferences):
    with pytest.raises(PromptError, match="there is no column 'chosen'") as error:
        preferences({"prompt": "a", "best": "4", "rejected": "5"})
    assert "preferences.columns.chosen=COLUMN" in error.value.fix
    with pytest.raises(PromptError, match="there is no column 'gap'") as error:
        preferences({"prompt": "a", "chosen": "4", "rejected": "5"}, columns={"margin": "gap"})
    assert error.value.field == "preferences.columns.margin"


def test_nothing_is_left_to_train_on(preferences):
    row = {"prompt": "a", "chosen": "4", "rejected": "5"}
    with pytest.raises(PromptError, match="no comparisons to train on"):
        preferences(row, heldout=(row,))


SHIPPED = sorted((Path(__file__).parents[2] / "configs/reward_models").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_configurations_that_ship_can_be_read(path):
    config = configuration.load(path)
    assert configuration.load(path, ["reward_model.objective=general_preference"]).reward_model.dim == 6
    assert config.directory.name == config.name


def test_prompts_of_other_comparisons_are_held_out_too(preferences, tmp_path):
    """As those of a run's labels, whichever way the held-out prompts are chosen."""
    rows = [{"prompt": f"question {i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    found = preferences(*rows, heldout=None, heldout_share=0.5)
    config = PreferencesConfig(train=str(tmp_path / "train.jsonl"), heldout_share=0.5)
    more = [replace(each, chosen="c") for each in (*found.train, *found.heldout)]
    again = read(config, more)
    assert again.heldout == found.heldout
    assert again.train == [*found.train, *more[: len(found.train)]]
    assert f"preferences.runs: {len(found.train)} comparisons; left out: {len(found.heldout)}" in again.remarks[-1]
