"""What every oracle promises; a new file under onlinerl/oracles is found and tested by its name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from judges import judging

from onlinerl import registry
from onlinerl.config import component
from onlinerl.errors import ConfigError
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Prompt, Query, Verdict

RESPONSES = ("a good 72", "a bad 71", "a dull film", "a good 72", "not good: 72")


def lengths(queries: list[dict]) -> list[list[float]]:
    """For the oracle that calls a Python function."""
    return [[float(len(response)) for response in query["responses"]] for query in queries]


def tiny_classifier(folder, labels: int = 1, **described: object) -> str:
    """A random reward or preference model with so many labels, without network; `described`: what it was trained with."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "a", "good", "bad", "dull", "film", "not", ":", "72", "71", "what"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"preference_model": described} if described else {}
    config = LlamaConfig(vocab_size=len(words), num_labels=labels, initializer_range=0.5, **sizes, **more)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def judge_server():
    """For the oracles that ask one."""
    with judging() as server:
        yield server


@pytest.fixture(scope="module", params=[*registry.names("oracles"), "matrix_oracle.Referee"])
def oracle(request, tmp_path_factory, judge_server):
    """Every oracle, with the knobs that it cannot do without, and one from outside the package that compares."""
    name = request.param
    knobs = {
        "judge_pair": lambda: {"base_url": f"{judge_server.url}/v1", "model": "judge"},
        "judge_score": lambda: {"base_url": f"{judge_server.url}/v1", "model": "judge"},
        "python": lambda: {"function": f"{__name__}.lengths"},
        "reward_model": lambda: {"path": tiny_classifier(tmp_path_factory.mktemp("reward")), "device": "cpu"},
        "gpm": lambda: {
            "path": tiny_classifier(tmp_path_factory.mktemp("gpm"), 4, objective="general_preference", tau=0.5),
            "device": "cpu",
        },
        "pair_model": lambda: {"path": tiny_classifier(tmp_path_factory.mktemp("pair"), objective="pairwise"), "device": "cpu"},
    }
    built = component({"name": name, **knobs.get(name, dict)()}, "oracle", "oracles", Oracle)
    built.open()
    yield built
    built.close()


def query(*responses: str, name: str = "p") -> Query:
    return Query(prompt=Prompt(id=name, text="what ", token_ids=(1,), reference_answer="72"), responses=responses)


def test_one_result_per_query_in_order(oracle):
    queries = [query(*RESPONSES[:k], name=str(k)) for k in (2, 5, 1, 3)]
    together = list(oracle.judge(queries))
    assert [len(verdict.matrix()) for verdict in together] == [2, 5, 1, 3]
    for one, verdict in zip(queries, together, strict=True):
        (alone,) = oracle.judge([one])
        np.testing.assert_allclose(verdict.matrix(), alone.matrix(), atol=1e-5)
    assert list(oracle.judge([])) == []


def test_permuting_responses_permutes_the_verdict(oracle):
    order = [3, 0, 4, 2, 1]
    (verdict,) = oracle.judge([query(*RESPONSES)])
    (permuted,) = oracle.judge([query(*(RESPONSES[i] for i in order))])
    np.testing.assert_allclose(permuted.matrix(), verdict.matrix()[np.ix_(order, order)], atol=1e-5)
    if verdict.scores is not None:
        np.testing.assert_allclose(permuted.scores, np.asarray(verdict.scores)[order], atol=1e-5)


def test_identical_texts_are_equal(oracle):
    (verdict,) = oracle.judge([query(*RESPONSES)])  # the first and the fourth
    assert verdict.matrix()[0, 3] == pytest.approx(0.5, abs=0.02)
    if verdict.scores is not None:
        assert verdict.scores[0] == pytest.approx(verdict.scores[3], abs=1e-5)


def test_probabilities_of_both_orders_sum_to_one(oracle):
    (verdict,) = oracle.judge([query(*RESPONSES)])
    matrix = verdict.matrix()
    known = np.isfinite(matrix)
    np.testing.assert_allclose((matrix + matrix.T)[known], 1.0, atol=1e-6)
    assert known.sum() > len(RESPONSES)  # more than the diagonal
    assert ((matrix >= 0) & (matrix <= 1))[known].all()


def test_what_was_not_judged_has_no_win_rate(oracle):
    """Not 0.5, which would beat every judged loser."""
    (verdict,) = oracle.ask([query(*RESPONSES)])
    compared = np.isfinite(verdict.matrix()).sum(axis=1) > 1
    assert verdict.judged().tolist() == compared.tolist()
    assert np.isfinite(verdict.win_rates()).tolist() == compared.tolist()


def test_scores_become_preferences_at_the_temperature_of_the_oracle(oracle):
    cold = type(oracle).model_validate({**oracle.model_dump(), "preference_temperature": 0.25})
    (verdict,) = cold.ask([query(*RESPONSES)])
    (usual,) = oracle.ask([query(*RESPONSES)])
    assert (verdict.temperature, usual.temperature) == (0.25, oracle.preference_temperature)
    cold.close()
    if verdict.preferences is not None and verdict.log_odds is None:  # what was compared needs no temperature
        np.testing.assert_array_equal(verdict.matrix(), usual.matrix())
        return
    if verdict.log_odds is not None:
        odds = np.nan_to_num(verdict.log_odds)
        gaps = (odds - odds.T) / 2
    else:
        gaps = np.subtract.outer(verdict.scores, verdict.scores)
    np.testing.assert_allclose(verdict.matrix(), 1 / (1 + np.exp(-gaps / 0.25)), atol=1e-12)


def test_a_verdict_is_frozen_and_signed(oracle):
    (verdict,) = oracle.judge([query(*RESPONSES)])
    assert isinstance(verdict, Verdict)
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.scores = (0.0,)
    assert verdict.annotator
    assert verdict.oracle_version == oracle.version
    assert verdict.cost.calls >= 1
    assert verdict.cost.seconds >= 0


def test_version_is_stable(oracle):
    again = type(oracle).model_validate(oracle.model_dump())
    assert again.version == oracle.version
    again.close()


def test_opening_twice_and_closing_twice_is_harmless(oracle):
    oracle.open()
    again = type(oracle).model_validate(oracle.model_dump())
    again.close()
    again.close()


def test_an_unknown_knob_is_an_error(oracle):
    module = type(oracle).__module__
    name = module.rpartition(".")[2] if module.startswith("onlinerl.") else f"{module}.{type(oracle).__name__}"
    with pytest.raises(ConfigError, match="no_such_knob"):
        component({"name": name, **oracle.model_dump(), "no_such_knob": 1}, "oracle", "oracles", Oracle)
