"""Pairs whose better response is known: how they are read, and what is said of an oracle by them."""

from __future__ import annotations

import json

import pytest
from preference_rows import taste, write_rows

from onlinerl.config.sections import AnchorsConfig
from onlinerl.controller.anchors import examined, require_accuracy
from onlinerl.errors import OracleError, PromptError
from onlinerl.prompts import _anchors
from onlinerl.types import Failure, Group, Verdict


class Words:
    """A tokenizer that knows words only, and no template."""

    bos_token_id = eos_token_id = chat_template = None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def read(path, *, needs_answers: bool = False, **keys) -> list[Group]:
    return _anchors.read(
        AnchorsConfig(data=str(path), apply_chat_template=False, **keys), Words(), needs_answers=needs_answers
    )[0]


@pytest.fixture
def groups(tmp_path):
    return read(write_rows(tmp_path / "a.jsonl", taste(200)))


def texts(group: Group) -> list[str]:
    return [rollout.text for rollout in group.rollouts]


def better(group: Group) -> int:
    return [rollout.source for rollout in group.rollouts].index("chosen")


def scores(group: Group, *, right: bool) -> Verdict:
    best = better(group) if right else 1 - better(group)
    return Verdict(annotator="a", oracle_version="v", scores=(1.0, 0.0) if best == 0 else (0.0, 1.0))


def said(groups, right: int) -> dict[str, Verdict]:
    """Right about the first so many."""
    return {group.prompt.id: scores(group, right=i < right) for i, group in enumerate(groups)}


def test_the_better_response_stands_first_in_half_of_them(groups):
    first = sum(better(group) == 0 for group in groups)
    assert 70 < first < 130
    assert {group.rollouts[better(group)].text.strip() for group in groups} == {"good", "great", "lovely"}
    assert {group.prompt.source for group in groups} == {"even", "odd"}


def test_which_are_taken_does_not_depend_on_the_order_of_the_file(tmp_path, groups):
    few = read(write_rows(tmp_path / "b.jsonl", taste(200)[::-1]), limit=50)
    assert len(few) == 50
    assert [(g.prompt.id, texts(g)) for g in few] == [(g.prompt.id, texts(g)) for g in groups[:50]]


def test_ties_are_left_out_and_turned_pairs_are_turned_back(tmp_path):
    rows = [
        {"prompt": "a", "chosen": "x", "rejected": "y", "tie": True},
        {"prompt": "b", "chosen": "worse", "rejected": "better", "prob": 0.2},
    ]
    config = AnchorsConfig(data=write_rows(tmp_path / "a.jsonl", rows), apply_chat_template=False)
    (group,), remarks = _anchors.read(config, Words(), needs_answers=False)
    assert group.rollouts[better(group)].text == "better"
    assert "left out: 1 ties" in remarks[-1]
    with pytest.raises(PromptError, match="names no better response"):
        read(write_rows(tmp_path / "b.jsonl", rows[:1]))


def test_an_oracle_that_reads_reference_answers_gets_them(tmp_path):
    rows = [{"prompt": "1+1?", "chosen": "2", "rejected": "3", "gold": "2"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(PromptError, match="1 of 1 pairs have no reference answer"):
        read(path, needs_answers=True)
    (group,) = read(path, needs_answers=True, columns={"reference_answer": "gold"})
    assert group.prompt.reference_answer == "2"


@pytest.mark.parametrize("key", ["chosen", "rejected"])
def test_columns_are_named_by_their_key(tmp_path, key):
    names = {"chosen": "yes", "rejected": "no"}
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "yes": "x", "no": "y"}])
    with pytest.raises(PromptError) as refused:
        read(path, columns={name: column for name, column in names.items() if name != key})
    assert f"anchors.columns.{key}=COLUMN" in str(refused.value)
    assert len(read(path, columns=names)) == 1


def test_accuracy_with_its_interval_by_length_and_source(groups):
    found = examined(groups, said(groups, 150))
    accuracy = found.figures["accuracy"]
    assert accuracy["value"] == 0.75
    assert 0.68 < accuracy["low"] < 0.75 < accuracy["high"] < 0.81
    assert sum(part["n"] for part in found.figures["accuracy_by_source"].values()) == 200
    sides = found.figures["length_bias"]
    unequal = sum(len(set(map(len, texts(g)))) == 2 for g in groups)
    assert sides["shorter_is_better"]["n"] + sides["longer_is_better"]["n"] == unequal
    assert found.agreement is None


def test_one_that_always_names_the_first_is_right_about_half(groups):
    nan = float("nan")
    always = Verdict(annotator="a", oracle_version="v", preferences=((nan, 0.9), (0.9, nan)))
    once = Verdict(annotator="a", oracle_version="v", preferences=((nan, 0.9), (nan, nan)))
    both = examined(groups, {g.prompt.id: always for g in groups})
    assert both.figures["accuracy"]["value"] == 0.5, "ties"
    assert both.figures["swap_disagreement"]["value"] == 1
    assert both.first_place_wins.value == 1
    one = examined(groups, {g.prompt.id: once for g in groups})
    assert one.figures["accuracy"]["value"] == sum(better(g) == 0 for g in groups) / 200
    assert "swap_disagreement" not in one.figures


def test_what_was_not_judged_is_in_no_figure(groups):
    verdicts = said(groups, 200)
    for group in groups[:40]:
        verdicts[group.prompt.id] = Failure(kind="timeout", message="")
    assert examined(groups, verdicts).figures["accuracy"]["n"] == 160


def test_agreement_with_the_first_time(groups):
    found = examined(groups, said(groups, 150), said(groups, 200))
    assert found.agreement is not None
    assert (found.agreement.value, found.agreement.n) == (0.75, 200)
    assert any("same as at first" in remark for remark in found.remarks())


@pytest.mark.parametrize(
    ("right", "least", "stops"), [(120, 0.65, False), (110, 0.65, True), (130, 0.65, False), (0, 0.0, False)]
)
def test_only_an_accuracy_that_is_surely_too_low_stops(groups, right, least, stops):
    """Of 200 pairs 60 % may be 65 %, and 55 % may be 62 % at most."""
    found = examined(groups, said(groups, right))
    if stops:
        with pytest.raises(OracleError, match=r"right about 0\.550 .* of 200 pairs") as stopped:
            require_accuracy(found, least, 0.0)
        assert stopped.value.field == "anchors.min_accuracy"
    else:
        require_accuracy(found, least, 0.0)


def test_ties_are_no_half_coin_flips_where_it_is_decided(groups):
    """100 ties, 60 right and 40 wrong: 0.550 [0.480, 0.617] as it is shown, and at most 0.60 as it is decided."""
    verdicts = said(groups, 60)
    for group in groups[100:]:
        verdicts[group.prompt.id] = Verdict(annotator="a", oracle_version="v", scores=(0.5, 0.5))
    found = examined(groups, verdicts)
    assert found.figures["accuracy"]["high"] == pytest.approx(0.617, abs=0.001)
    assert found.accuracy.high == pytest.approx(0.5985, abs=0.005)
    require_accuracy(found, 0.59, 0.0)
    with pytest.raises(OracleError, match=r"right about 0\.550 \[0\.50"):
        require_accuracy(found, 0.61, 0.0)


def test_an_oracle_that_is_wrong_about_one_source_is_named(groups):
    verdicts = {g.prompt.id: scores(g, right=g.prompt.source == "even") for g in groups}
    found = examined(groups, verdicts)
    assert any("of the pairs of odd it is wrong more often than right" in remark for remark in found.remarks())
    json.dumps(found.figures, allow_nan=False)


def test_a_good_average_does_not_hide_a_source_that_it_is_wrong_about(groups):
    """Of 200 pairs 180 are right; 20 of the 100 of `odd` are wrong. Its interval there is 0.711 to 0.867."""
    wrong = {g.prompt.id for g in [g for g in groups if g.prompt.source == "odd"][:20]}
    found = examined(groups, {g.prompt.id: scores(g, right=g.prompt.id not in wrong) for g in groups})
    require_accuracy(found, 0.9, 0.85)
    with pytest.raises(OracleError, match=r"right about 0\.800 .* of 100 pairs of the source odd") as stopped:
        require_accuracy(found, 0.9, 0.88)
    assert stopped.value.field == "anchors.min_accuracy_by_source"
    few = [g for g in groups if g.prompt.source == "even"] + [g for g in groups if g.prompt.id in wrong]
    require_accuracy(examined(few, {g.prompt.id: scores(g, right=g.prompt.id not in wrong) for g in few}), 0.65, 0.9)
