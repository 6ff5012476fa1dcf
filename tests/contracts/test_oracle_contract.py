"""What every oracle promises; a new file under onlinerl/oracles is found and tested by its name."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext

import numpy as np
import pytest
from judges import judging
from people import answering

from onlinerl import registry
from onlinerl.config import component
from onlinerl.errors import ConfigError, OracleError
from onlinerl.oracles.router import Router
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Failure, Prompt, Query, Verdict

REFERENCE = "assert good() == 72\n#### 72"
"""An answer in GSM8K's form, and the tests of a program."""
SHORT = "{prompt} {response_a} {response_b} {form} {rubric}"
RESPONSES = ("a good 72", "a bad 71", "a dull film", "a good 72", "not good: 72")


def lengths(queries: list[dict]) -> list[list[float]]:
    """For the oracle that calls a Python function."""
    return [[float(len(response)) for response in query["responses"]] for query in queries]


def longer(queries: list[dict]) -> list[list[list[float]]]:
    """What the stand-in for people says, as an oracle."""
    return [
        [
            [0.5 if len(a) == len(b) else 0.95 if len(a) > len(b) else 1.0 - 0.95 for b in query["responses"]]
            for a in query["responses"]
        ]
        for query in queries
    ]


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


def tiny_language_model(folder, *, seed: int) -> str:
    """A random language model with the same tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny_classifier(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=12, initializer_range=0.5, **sizes)).save_pretrained(folder)
    return str(folder)


def pairs_of_lengths(folder) -> str:
    """Of which the longer one mostly wins."""
    rows = [{"prompt": "what", "chosen": "a" * (2 + i % 3), "rejected": "b" * (1 + 3 * (i % 4 == 0))} for i in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "pairs.jsonl")


@pytest.fixture(scope="module")
def judge_server():
    """For the oracles that ask one."""
    with judging() as server:
        yield server


@pytest.fixture(scope="module", params=[*registry.names("oracles"), "matrix_oracle.Referee"])
def oracle(request, tmp_path_factory, judge_server):
    """Every oracle, with the knobs that it cannot do without, and one from outside the package that compares."""
    name = request.param
    plain = {"lengths": {"name": "python", "function": f"{__name__}.lengths"}, "tone": {"name": "sentiment"}}

    def language_model(seed: int = 0) -> str:
        return tiny_language_model(tmp_path_factory.mktemp("language"), seed=seed)

    knobs = {
        "density_ratio": lambda: {
            "strong": language_model(),
            "weak": language_model(1),
            "criteria": "good film",
            "device": "cpu",
        },
        "implicit": lambda: {"policy": language_model(), "reference": language_model(1), "device": "cpu"},
        "ref_embedding": lambda: {"path": language_model(), "device": "cpu"},
        "self_judge": lambda: {"path": language_model(), "labels": ["good", "bad"], "template": SHORT, "device": "cpu"},
        "followup": lambda: {"path": language_model(), "positive": ["good"], "negative": ["bad", "dull"], "device": "cpu"},
        "composite": lambda: {"members": plain, "weights": {"tone": 3.0}},
        "ensemble": lambda: {"members": plain, "combine": "lcb", "lcb_coef": 1.0, "stds": {"lengths": 4.0}},
        "calibrated": lambda: {"base": plain["lengths"], "data": pairs_of_lengths(tmp_path_factory.mktemp("pairs"))},
        # Of the responses below `cheap` is surer about three than about two or five.
        "router": lambda: {"cheap": plain["lengths"], "expensive": plain["tone"], "expensive_below": 0.68, "audit": 0.0},
        "synthetic": lambda: {
            "population": {"most": {"share": 0.75, "per_word": 1.0}, "few": {"share": 0.25, "words": {"bad": 1.0}}}
        },
        "noisy": lambda: {"base": plain["lengths"], "flip_rate": 0.3, "scope": "call", "position_bias": 0.1, "sampled": True},
        "human": lambda: {
            "ai": {"name": "python", "function": f"{__name__}.longer"},
            **{"choose": "unsure", "unsure_below": 1.0, "pairs_per_group": 99, "max_wait_s": 600.0, "undo_s": 0.0},
        },
        "swapped": lambda: {"base": plain["tone"]},
        "refreshed": lambda: {
            "base": {"name": "reward_model", "path": tiny_classifier(tmp_path_factory.mktemp("trained")), "device": "cpu"},
            "labels": plain["tone"],
        },
        "format": lambda: {"pattern": r"a .*\d"},
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
    queue = tmp_path_factory.mktemp("queue")
    if built.asks_people:
        built.remember(queue)
    built.open()
    with answering(queue) if built.asks_people else nullcontext():
        yield built
    built.close()


def query(*responses: str, name: str = "p") -> Query:
    """Of an iteration, so that an oracle that asks people asks them."""
    prompt = Prompt(id=name, text="what ", token_ids=(1,), reference_answer=REFERENCE)
    return Query(prompt=prompt, responses=responses, iteration=1)


def test_one_result_per_query_in_order(oracle):
    queries = [query(*RESPONSES[:k], name=str(k)) for k in (2, 5, 1, 3)]
    together = list(oracle.judge(queries))
    assert [len(verdict.matrix()) for verdict in together] == [2, 5, 1, 3]
    if isinstance(oracle, Router):
        assert [verdict.annotator.split(":")[1] for verdict in together] == ["expensive", "expensive", "cheap", "cheap"]
    for one, verdict in zip(queries, together, strict=True):
        (alone,) = oracle.judge([one])
        np.testing.assert_allclose(verdict.matrix(), alone.matrix(), atol=1e-5)
    assert list(oracle.judge([])) == []


def test_an_oracle_that_only_compares_says_so_if_it_knows(oracle):
    (verdict,) = oracle.judge([query(*RESPONSES)])
    assert oracle.compares in (None, verdict.scores is None)


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


# --- those that ask others ---


class Broken(Oracle):
    """Fails, at a price, or stops the run."""

    stops: bool = False

    @property
    def version(self):
        return "broken"

    def judge(self, queries):
        if self.stops:
            raise OracleError("is broken", field="oracle.stops", fix="set oracle.stops=false")
        return [Failure(kind="refused", message="no", cost=Cost(calls=1, usd=0.25)) for _ in queries]


def judges(oracle: Oracle) -> list[str]:
    """The inner oracles that say something of a verdict; from the other one only a reward model learns."""
    learned_from = None if oracle.refreshing is None else oracle.refreshing.labels
    return [key for key, each in oracle.inner().items() if each is not learned_from]


def test_an_inner_oracle_that_fails_is_named_and_paid(oracle):
    for key in judges(oracle):
        results = list(oracle.with_inner({key: Broken()}).ask([query(*RESPONSES), query(*RESPONSES[:2], name="q")]))
        failures = [result for result in results if isinstance(result, Failure)]
        assert failures, key
        for failure in failures:
            assert (failure.kind, failure.message.startswith(key)) == ("refused", True)
            assert failure.cost.usd >= 0.25


def test_an_inner_oracle_that_stops_the_run_is_found_in_the_configuration(oracle):
    for key in judges(oracle):
        with pytest.raises(OracleError) as error:
            list(oracle.with_inner({key: Broken(stops=True)}).ask([query(*RESPONSES)]))
        assert error.value.field == f"oracle.{key}.stops"
        assert error.value.fix == f"set oracle.{key}.stops=false"


def test_the_version_is_also_that_of_every_inner_oracle(oracle):
    for key in judges(oracle):
        assert oracle.with_inner({key: Broken()}).version != oracle.version


def test_inner_oracles_are_written_with_their_names(oracle):
    """So that a stored run is read back."""
    for key in oracle.inner():
        node = oracle.model_dump(mode="json")
        for part in key.split("."):
            node = node[part]
        again, inner = component(node, "oracle", "oracles", Oracle), oracle.inner()[key]
        assert type(again) is type(inner)
        assert again.model_dump() == inner.model_dump()
