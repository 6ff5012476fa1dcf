"""Values survive the way through a row, a journal and a Parquet file exactly."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import pickle
import tempfile
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onlinerl.errors import StoreError
from onlinerl.stores._arrow import to_batch
from onlinerl.stores._tables import TableFiles
from onlinerl.stores.rows import (
    LABELS,
    LOGPROBS,
    PAIRS,
    PROMPTS,
    group_from_row,
    group_row,
    groups_of,
    pair_from_row,
    pair_row,
    prompt_row,
    result_from_row,
    result_row,
)
from onlinerl.stores.tables import StoredTable
from onlinerl.types import (
    Cost,
    Failure,
    FinishReason,
    Group,
    Label,
    LogProbs,
    Message,
    Numbers,
    Pair,
    Prompt,
    RejectReason,
    Replies,
    Rollout,
    Sampling,
    Step,
    TrainedPair,
    Verdict,
)

texts = st.text(max_size=12)
ids = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)
logprobs = st.floats(max_value=0, allow_nan=False, width=64)
cells = st.floats(allow_nan=True, allow_infinity=False)
floats = st.lists(st.floats(width=32, allow_nan=True), max_size=4)


@st.composite
def rollouts(draw):
    token_ids = draw(ids)
    return Rollout(
        token_ids=token_ids,
        logprobs=tuple(draw(st.lists(logprobs, min_size=len(token_ids), max_size=len(token_ids)))),
        text=draw(texts),
        finish_reason=draw(st.sampled_from(get_args(FinishReason))),
        policy_version=draw(st.integers(0, 99)),
        sampler=Sampling(
            temperature=draw(st.floats(0.1, 2)),
            top_p=draw(st.floats(0.1, 1)),
            top_k=draw(st.integers(-1, 99)),
            max_new_tokens=draw(st.integers(1, 512)),
        ),
        seed=draw(st.integers(0, 2**31 - 1)),
        source=draw(st.sampled_from(("policy", "teacher"))),
    )


prompts = st.builds(Prompt, id=texts, text=texts, token_ids=ids)
groups = st.builds(
    Group,
    prompt=prompts,
    rollouts=st.lists(rollouts(), max_size=3).map(tuple),
    rejected=st.lists(st.sampled_from(get_args(RejectReason)), max_size=3).map(tuple),
)
conversations = st.lists(st.builds(Message, role=texts, content=texts), max_size=2).map(tuple)
whole_prompts = st.builds(
    Prompt,
    id=texts,
    text=texts,
    token_ids=ids,
    messages=conversations,
    reference_answer=st.none() | texts,
    source=texts,
    goal_ids=st.lists(ids, max_size=3).map(tuple),
    answer_ids=ids,
    difficulty=st.none() | st.floats(-9, 9),
)


@st.composite
def verdicts(draw):
    k = draw(st.integers(1, 3))
    scores = draw(st.none() | st.lists(cells, min_size=k, max_size=k).map(tuple))
    vector = st.lists(cells, min_size=k, max_size=k).map(tuple)
    matrix = st.lists(vector, min_size=k, max_size=k).map(tuple)
    return Verdict(
        annotator=draw(texts),
        oracle_version=draw(texts),
        scores=scores,
        unjudged=tuple(i for i, score in enumerate(scores or ()) if math.isnan(score)),
        components=draw(st.none() | st.dictionaries(texts, vector, max_size=2)),
        preferences=draw(st.none() | matrix),
        log_odds=draw(st.none() | matrix),
        on_disagree=draw(st.sampled_from(("average", "tie", "drop"))),
        strength=draw(st.none() | matrix),
        uncertainty=draw(st.none() | matrix),
        temperature=draw(st.floats(0.01, 10)),
        raw=draw(st.none() | texts),
        cost=draw(costs),
        replies=draw(replies),
    )


costs = st.builds(
    Cost,
    calls=st.integers(0, 99),
    seconds=st.floats(0, 9),
    usd=st.floats(0, 9),
    tokens=st.integers(0, 99),
    tokens_out=st.integers(0, 99),
)
kinds = st.sampled_from(("error", "timeout", "refused", "parse_fail", "budget"))
replies = st.builds(Replies, asked=st.integers(9, 99), failed=st.dictionaries(kinds, st.integers(1, 3), max_size=3))
failures = st.builds(Failure, kind=kinds, message=texts, cost=costs, replies=replies)


def through_disk(values, codec):
    """The values as read from a journal, as read from parts, and one by one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "0001"
        folder.mkdir()
        table = StoredTable(TableFiles(folder, "t", codec.schema), codec)
        table.append(values)
        journal = list(StoredTable(TableFiles(folder, "t"), codec))
        table.seal()
        assert not list(folder.glob("*.journal"))
        return journal, list(StoredTable(TableFiles(folder, "t"), codec))


quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@quick
@given(st.lists(groups, min_size=1, max_size=3))
def test_groups_survive(stored):
    for found in through_disk(stored, groups_of(None)):
        assert found == stored


def test_a_prompt_without_answer_tokens_has_the_row_that_it_always_had():
    """The hashes of the prompts that a run keeps are hashes of rows."""
    prompt = Prompt(id="p", text="x", token_ids=(1,), reference_answer="7")
    assert set(prompt_row(prompt)) == {"id", "text", "token_ids", "messages", "reference_answer", "source"}
    assert prompt_row(dataclasses.replace(prompt, answer_ids=(5, 2)))["answer_ids"] == [5, 2]


@quick
@given(st.lists(whole_prompts, min_size=1, max_size=4))
def test_prompts_survive(stored):
    for found in through_disk(stored, PROMPTS):
        assert found == stored


@quick
@given(st.lists(verdicts() | failures, min_size=1, max_size=4))
def test_results_survive_with_their_unknown_cells(stored):
    labels = [Label(prompt_id=f"p{i}", result=r) for i, r in enumerate(stored)]
    for found in through_disk(labels, LABELS):
        assert repr(found) == repr(labels)  # repr tells every float from every other, and NaN equals itself


@quick
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(("old_logprobs", "reference_logprobs", "anchor_logprobs", "values")),
            st.lists(floats, max_size=3),
            max_size=3,
        )
    )
)
def test_logprobs_survive(stored):
    values = [
        LogProbs(prompt_id=f"p{i}", arrays={k: tuple(np.array(x, np.float32) for x in v) for k, v in arrays.items()})
        for i, arrays in enumerate(stored)
    ]
    for found in through_disk(values, LOGPROBS):
        assert [one.prompt_id for one in found] == [one.prompt_id for one in values]
        for one, expected in zip(found, values, strict=True):
            assert one.arrays.keys() == expected.arrays.keys()
            for name, arrays in expected.arrays.items():
                assert [a.tobytes() for a in one.arrays[name]] == [a.tobytes() for a in arrays]


def group(**changes) -> Group:
    sampler = Sampling(temperature=1, top_p=1)
    made = [
        Rollout(
            token_ids=(1, 2),
            logprobs=(-0.5, -1.0),
            text=f"t{i}",
            finish_reason="stop",
            policy_version=2,
            sampler=sampler,
            seed=i,
        )
        for i in range(2)
    ]
    return Group(prompt=Prompt(**{"id": "p", "text": "hello", "token_ids": (5, 6), **changes}), rollouts=tuple(made))


def test_numpy_values_and_whole_numbers_become_plain_ones():
    verdict = Verdict(annotator="a", oracle_version="1", scores=(np.float32(1), 2), preferences=((np.nan, 1), (0, np.nan)))
    row = result_row("p", verdict)
    assert json.dumps(row["scores"], allow_nan=False) == "[1.0, 2.0]"
    assert json.dumps(row["preferences"], allow_nan=False) == "[[null, 1.0], [0.0, null]]"
    _, back = result_from_row(row)
    assert math.isnan(back.preferences[0][0])
    assert np.array_equal(back.matrix(), [[0.5, 1.0], [0.0, 0.5]])


def test_a_row_from_before_rejected_responses_were_kept_has_none():
    row = group_row(group())
    del row["rejected"]
    assert group_from_row(row, {"p": group().prompt}) == group()


def test_a_prompt_that_is_gone_or_has_changed_is_an_error():
    row = group_row(group())
    with pytest.raises(StoreError, match="'p' is not among the run's prompts"):
        group_from_row(row, {})
    with pytest.raises(StoreError, match="rendered to other tokens"):
        group_from_row(row, {"p": group(token_ids=(5, 7)).prompt})


def test_numbers_that_are_read_back_are_the_tuple_that_was_stored():
    numbers = Numbers(np.array([5, 6, 7], np.uint32))
    assert numbers == (5, 6, 7)
    assert operator.eq((5, 6, 7), numbers)
    assert numbers == Numbers(np.array([5, 6, 7]))
    assert numbers not in ((5, 6), (5, 6, 8), Numbers(np.array([5, 6])), [5, 6, 7])
    assert {numbers, (5, 6, 7)} == {(5, 6, 7)}
    assert (len(numbers), [*numbers], repr(numbers), numbers[-2:]) == (3, [5, 6, 7], "(5, 6, 7)", (6, 7))
    assert type(numbers[0]) is type(next(iter(numbers))) is int
    assert np.asarray(numbers, np.float32).tolist() == [5.0, 6.0, 7.0]
    assert np.asarray(numbers) is numbers.array
    assert pickle.loads(pickle.dumps(numbers)) == numbers


@pytest.mark.parametrize("bad", [(1, -1), (1, 2**32), (1, "x"), (1, None), [0.5]])
def test_tokens_that_are_none_are_refused(bad):
    with pytest.raises(TypeError, match="column 'token_ids'"):
        to_batch([group_row(group()) | {"token_ids": [bad]}], groups_of(None).schema)


def test_half_a_surrogate_pair_is_written_out():
    """An oracle may say it, and UTF-8 does not know it; it must not end a run."""
    label = Label(prompt_id="p", result=Failure(kind="error", message="\ud83d!"))
    for (found,) in through_disk([label], LABELS):
        assert found.result.message == "\\ud83d!"


def test_pairs_survive_with_their_steps():
    whole = Pair(chosen=1, rejected=0, prob=0.75, gap=0.5)
    of_steps = dataclasses.replace(whole, steps=(Step(start=2, end=5, leaves=(1, 3)), Step(start=2, end=4, leaves=(0,))))
    pairs = [
        TrainedPair(prompt_id=f"p{n}", pair=each, chosen_text="a", rejected_text="b", policy_version=0)
        for n, each in enumerate((whole, of_steps))
    ]
    for found in through_disk(pairs, PAIRS):
        assert found == pairs
    older = {name: cell for name, cell in pair_row(pairs[0]).items() if name != "steps"}
    assert pair_from_row(older) == pairs[0]


def test_what_does_not_fit_its_column_is_an_error_that_names_it():
    with pytest.raises(TypeError, match="column 'seeds'"):
        to_batch([group_row(group()) | {"seeds": ["x"]}], groups_of(None).schema)


def test_a_verdict_of_an_older_run_has_a_temperature_of_1():
    row = result_row("p", Verdict(annotator="a", oracle_version="1", scores=(0.0, 1.0), temperature=0.2))
    assert row["temperature"] == 0.2
    for older in ({k: v for k, v in row.items() if k != "temperature"}, row | {"temperature": None}):
        _, found = result_from_row(older)
        assert isinstance(found, Verdict)
        assert found.temperature == 1.0


def test_labels_of_an_older_run_have_no_log_odds_and_failures_that_say_no_cost():
    verdict = Verdict(
        annotator="a", oracle_version="1", preferences=((np.nan, 1.0), (0.0, np.nan)), cost=Cost(calls=2, tokens=7)
    )
    row = result_row("p", verdict)
    older = {k: v for k, v in row.items() if k not in ("log_odds", "on_disagree")}
    older["cost"] = {k: v for k, v in row["cost"].items() if k != "tokens_out"}
    _, found = result_from_row(older)
    assert (found.log_odds, found.on_disagree, found.cost) == (None, "average", Cost(calls=2, tokens=7))
    failed = result_row("p", Failure(kind="error", message="x", cost=Cost(calls=3)))
    assert result_from_row(failed)[1].cost == Cost(calls=3)
    assert result_from_row(failed | {"cost": None})[1].cost == Cost()
