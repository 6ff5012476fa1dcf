"""The policy as its own judge, with tiny random models, against plain forward passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from onlinerl import config as configuration
from onlinerl.config import component
from onlinerl.config.sections import AnchorsConfig
from onlinerl.errors import ConfigError, OnlineRLError, OracleError
from onlinerl.oracles.self_judge import SelfJudge
from onlinerl.protocols.oracle import Oracle
from onlinerl.reward_training import run_checks
from onlinerl.types import Failure, Message, Prompt, Query

WORDS = ["<unk>", "</s>", "user", "what", "is", "good", "bad", "film", "A", "B", "Answer:", "reply", "72", "kind", "AB"]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}{% if add_generation_prompt %}reply {% endif %}"
SHORT = "{rubric} {prompt} {response_a} {response_b} {form}"
FORM = 'Answer with "{}" if the first response is better, with "{}" if the second is, and with nothing else.'
RESPONSES = ("good film", "bad", "film film is good")


def save(folder: Path, *, seed: int = 0, template: bool = False, words=WORDS) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE if template else None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), initializer_range=0.5, max_position_embeddings=128, **sizes)
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return save(tmp_path_factory.mktemp("chatty"), template=True)


def built(path: str | None, **knobs) -> SelfJudge:
    spec = {"name": "self_judge", "device": "cpu", "dtype": "float32", "template": SHORT, "rubric": "good", **knobs}
    return component(spec | ({} if path is None else {"path": path}), "oracle", "oracles", Oracle)


def query(*responses: str, messages: bool = False, answer: str | None = None) -> Query:
    turns = (Message(role="user", content="what is"),) if messages else ()
    prompt = Prompt(id="p", text="" if messages else "what is", token_ids=(1,), messages=turns, reference_answer=answer)
    return Query(prompt=prompt, responses=responses)


def ask(oracle: Oracle, asked: Query):
    (result,) = oracle.ask([asked])
    return result


def said(oracle: Oracle, asked: Query) -> list[float]:
    """Its log-odds, without the diagonal."""
    table = np.array(ask(oracle, asked).log_odds)
    return table[~np.eye(len(table), dtype=bool)].tolist()


def log_odds(path: str, text: str, labels=("A", "B")) -> float:
    from transformers import AutoTokenizer, LlamaForCausalLM

    ids = AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        found = LlamaForCausalLM.from_pretrained(path)(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    return float(found[WORDS.index(labels[0])] - found[WORDS.index(labels[1])])


@pytest.mark.parametrize("messages", [False, True])
def test_both_orders_are_log_odds_of_the_next_token(plain, chatty, messages):
    """With and without a chat template, of prompts that are a text and of conversations."""
    shown = "user: what is" if messages else "what is"
    for path, around in ((plain, "{} Answer:"), (chatty, "user {} </s> reply")):
        verdict = ask(built(path), query(*RESPONSES, messages=messages))
        for i, j in ((0, 1), (1, 0), (2, 1), (0, 2)):
            text = around.format(f"good {shown} {RESPONSES[i]} {RESPONSES[j]} {FORM.format(*'AB')}")
            assert verdict.log_odds[i][j] == pytest.approx(log_odds(path, text), abs=1e-4)
        odds = np.nan_to_num(verdict.log_odds)
        np.testing.assert_allclose(verdict.matrix(), 1 / (1 + np.exp(-(odds - odds.T) / 2)), atol=1e-9)
        assert verdict.scores is None
        assert verdict.cost.calls == 6
        assert verdict.annotator == f"self_judge:{Path(path).name}"


def test_a_judge_that_always_says_the_first_prefers_nothing(tmp_path):
    """Its embeddings are all the same, so that it says A whatever it reads."""
    from transformers import LlamaForCausalLM

    path = save(tmp_path)
    model = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[0].clone()
        model.lm_head.weight[WORDS.index("A")] = -3 * model.lm_head.weight[WORDS.index("B")]
    model.save_pretrained(path)
    verdict = ask(built(path), query(*RESPONSES))
    raw = np.array(verdict.preferences)[~np.eye(3, dtype=bool)]
    assert (raw > 0.5).all() or (raw < 0.5).all(), "one place always wins"
    np.testing.assert_allclose(verdict.matrix(), 0.5, atol=1e-6)


def test_answers_of_one_s_own(plain):
    verdict = ask(built(plain, labels=["good", "bad"]), query("film", "is"))
    text = f"good what is film is {FORM.format('good', 'bad')} Answer:"
    assert verdict.log_odds[0][1] == pytest.approx(log_odds(plain, text, ("good", "bad")), abs=1e-4)


@pytest.mark.parametrize("labels", [["yes", "B"], ["A B", "film"]])
def test_answers_that_are_not_one_token_are_refused_before_weights_are_read(plain, chatty, labels):
    for path in (plain, chatty):
        for begin in ("inspect", "open"):
            with pytest.raises(OracleError, match="is not one token of") as error:
                getattr(built(path, labels=labels), begin)()
            assert error.value.field == "oracle.labels"
            assert "one token each" in error.value.fix


@pytest.mark.parametrize("labels", [["A", "A"], ["A", ""], ["A", " B"]])
def test_answers_that_nobody_could_tell_apart_are_refused(plain, labels):
    with pytest.raises(ConfigError, match="two different words"):
        built(plain, labels=labels)


def test_log_probs_that_are_no_numbers_are_a_failure(tmp_path):
    from transformers import LlamaForCausalLM

    path = save(tmp_path)
    model = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight[WORDS.index("A")] = torch.nan
    model.save_pretrained(path)
    result = ask(built(path), query(*RESPONSES))
    assert isinstance(result, Failure)
    assert result.kind == "non_finite"


def test_a_question_that_is_too_long_is_refused(plain):
    result = ask(built(plain, max_length=30), query("good", "film " * 20))
    assert isinstance(result, Failure)
    assert result.kind == "refused"
    with pytest.raises(OracleError, match="more than 30"):
        ask(built(plain, max_length=30, on_truncate="error"), query("good", "film " * 20))


def test_rubric_template_and_reference_answer_are_shown(plain, tmp_path):
    shown = "{prompt} {reference} {response_a} {response_b} {form}"
    (tmp_path / "question.txt").write_text(shown)
    without = built(plain, template=str(tmp_path / "question.txt"), reference=False)
    given = built(plain, template=shown)
    asked = query(*RESPONSES, answer="72")
    assert said(without, asked) != said(given, asked)
    assert said(given, query(*RESPONSES)) == said(without, query(*RESPONSES))
    versions = {
        each.version for each in (without, given, built(plain), built(plain, rubric="kind"), built(plain, labels=["B", "A"]))
    }
    assert len(versions) == 5
    assert said(built(plain), asked) != said(built(plain, rubric="kind"), asked)
    with pytest.raises(ConfigError, match="response_b"):
        built(plain, template="{prompt} {response_a} {form}")


def test_batches_change_nothing(plain):
    one, many = (ask(built(plain, batch_size=size), query(*RESPONSES)) for size in (1, 6))
    np.testing.assert_allclose(one.log_odds, many.log_odds, atol=1e-5)


# --- which weights ---


def run_of(model: str, oracle: dict, **more) -> configuration.RunConfig:
    return configuration.parse(
        {
            "name": "run",
            "model": model,
            "iterations": 2,
            "algorithm": {"name": "osp"},
            "oracle": oracle,
            "prompts": {"train": "unused", "heldout": "unused"},
            **more,
        }
    )


def spec(**knobs) -> dict:
    return {"name": "self_judge", "device": "cpu", "dtype": "float32", "template": SHORT, "rubric": "good", **knobs}


def test_by_default_it_is_the_model_of_the_run(plain):
    config = run_of(plain, spec())
    assert configuration.oracle(config).version == built(plain).version
    assert configuration.resolved(config)["oracle"]["path"] is None, "another model means another judge"
    nested = run_of(plain, {"name": "noisy", "position_bias": 0.1, "base": spec()})
    assert configuration.oracle(nested).inner()["base"].version == built(plain).version
    with pytest.raises(OracleError, match="there is no run here"):
        built(None).open()


def test_taking_on_an_iterate_makes_it_what_that_iterate_says(plain, tmp_path):
    later = save(tmp_path, seed=1)
    oracle = configuration.oracle(run_of(plain, spec(judge_version="iteration_start")))
    assert said(oracle, query(*RESPONSES)) == said(built(plain), query(*RESPONSES))
    assert oracle.following is oracle
    oracle.reload(later)
    verdict, alone = ask(oracle, query(*RESPONSES)), ask(built(later), query(*RESPONSES))
    np.testing.assert_array_equal(verdict.log_odds, alone.log_odds)
    assert verdict.oracle_version == alone.oracle_version == oracle.version != built(plain).version
    assert built(plain).following is None


def test_a_snapshot_of_one_s_own_and_the_iterate_are_one_too_many(plain):
    with pytest.raises(ConfigError, match="judge_version=initial") as error:
        built(plain, judge_version="iteration_start")
    assert error.value.field == "oracle.path"


def checked(config: configuration.RunConfig) -> list[str]:
    return run_checks.check(config, configuration.algorithm(config), configuration.oracle(config), [])


def test_a_judge_that_moves_is_watched_by_something_that_stays(plain):
    moving = spec(judge_version="iteration_start")
    with pytest.raises(ConfigError) as error:
        checked(run_of(plain, moving))
    assert error.value.field == "anchors"
    watched = run_of(plain, moving, anchors={"data": "pairs.jsonl"})
    assert isinstance(watched.anchors, AnchorsConfig)
    assert any("one version in an iteration" in note for note in checked(watched))
    assert checked(run_of(plain, spec())) == []


def test_a_judge_that_moves_is_no_part_of_another_oracle(plain):
    inside = {"name": "noisy", "position_bias": 0.1, "base": spec(judge_version="iteration_start")}
    with pytest.raises(ConfigError, match="another oracle asks it") as error:
        checked(run_of(plain, inside, anchors={"data": "pairs.jsonl"}))
    assert error.value.field == "oracle.base.name"


def test_with_lag_and_dynamic_sampling_it_would_wait_for_itself(plain):
    config = run_of(
        plain,
        spec(judge_version="iteration_start"),
        anchors={"data": "pairs.jsonl"},
        sampling={"dynamic": True},
        schedule={"max_lag": 1},
    )
    with pytest.raises(ConfigError) as error:
        checked(config)
    assert error.value.field == "schedule.max_lag"


# --- the reward that training has put into the policy ---


def test_the_implied_reward_of_a_fixed_model_is_against_that_of_the_run(plain, tmp_path):
    later = save(tmp_path, seed=1)
    implied = configuration.oracle(run_of(plain, {"name": "implicit", "policy": later, "device": "cpu"}))
    both = component({"name": "implicit", "policy": later, "reference": plain, "device": "cpu"}, "oracle", "oracles", Oracle)
    assert implied.version == both.version
    assert implied.following is None


def test_the_implied_reward_of_the_iterate_that_samples(plain, tmp_path):
    """SPA: against what the model of the run was trained from."""
    before, later = save(tmp_path / "before", seed=2), save(tmp_path / "later", seed=1)
    moving = configuration.oracle(run_of(plain, {"name": "implicit", "reference": before, "device": "cpu"}))
    for iterate in (plain, later):
        if iterate is later:
            moving.reload(later)
        fixed = component(
            {"name": "implicit", "policy": iterate, "reference": before, "device": "cpu"}, "oracle", "oracles", Oracle
        )
        assert ask(moving, query(*RESPONSES)).scores == ask(fixed, query(*RESPONSES)).scores
        assert moving.version == fixed.version
    assert moving.following is moving


@pytest.mark.parametrize("named", [False, True])
def test_a_policy_is_not_compared_with_itself(plain, named):
    with pytest.raises(ConfigError, match="all scores would be 0") as error:
        configuration.oracle(run_of(plain, {"name": "implicit", "device": "cpu", **({"reference": plain} if named else {})}))
    assert error.value.field == "oracle.reference"


def test_labels_of_a_stored_run_are_of_one_version(plain):
    from onlinerl import relabelling

    with pytest.raises(OnlineRLError, match="moves with the policy") as error:
        relabelling._require_fixed(configuration.oracle(run_of(plain, spec(judge_version="iteration_start"))))
    assert "exports/NNNN" in error.value.fix
    relabelling._require_fixed(configuration.oracle(run_of(plain, spec())))
