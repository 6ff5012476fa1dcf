"""Oracles that ask language models how probable a text is, with tiny random ones, against plain forward passes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from onlinerl.config import component
from onlinerl.errors import OracleError
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Failure, Message, Prompt, Query

WORDS = [
    "<unk>",
    "</s>",
    "user",
    "assistant",
    "system",
    "be",
    "kind",
    "what",
    "is",
    "good",
    "bad",
    "thanks",
    "no",
    "a",
    "film",
    ".",
]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


def save(folder, *, seed: int = 0, template: bool = True, words=WORDS, positions: int = 64) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE if template else None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), initializer_range=0.5, max_position_embeddings=positions, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return save(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save(tmp_path_factory.mktemp("other"), seed=1)


def built(name: str, **knobs) -> Oracle:
    return component({"name": name, "device": "cpu", "dtype": "float32", **knobs}, "oracle", "oracles", Oracle)


def text(*responses: str) -> Query:
    return Query(prompt=Prompt(id="p", text="what is", token_ids=(1,)), responses=responses)


def chat(*responses: str, system: bool = False) -> Query:
    turns = [*([Message(role="system", content="be kind")] if system else []), Message(role="user", content="what is good")]
    return Query(prompt=Prompt(id="p", text="", token_ids=(1,), messages=tuple(turns)), responses=responses)


def ask(oracle: Oracle, query: Query):
    (result,) = oracle.ask([query])
    return result


def log_prob(path: str, context: str, scored: str) -> np.ndarray:
    """Of each of the last words, by a plain forward pass of this one text."""
    from transformers import LlamaForCausalLM

    ids = [WORDS.index(word) for word in f"{context} {scored}".split()]
    n = len(scored.split())
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(path)(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return np.array([float(logits[len(ids) - n - 1 + k, ids[len(ids) - n + k]]) for k in range(n)])


RESPONSES = ("good film", "bad", "a good good film . a film is good", "")


def test_a_density_ratio_by_hand(one, other):
    """In one batch, whatever is beside it and however long."""
    verdict = ask(built("density_ratio", strong=one, weak=other, clip_token=None), text(*RESPONSES))
    wanted = [float((log_prob(one, "what is", f"{r} </s>") - log_prob(other, "what is", f"{r} </s>")).sum()) for r in RESPONSES]
    assert verdict.scores == pytest.approx(wanted, abs=1e-4)
    assert verdict.cost.calls == 8


def test_a_density_ratio_of_a_conversation_with_criteria(one, other):
    def contexts(first: str):
        return f"{first} user what is good </s> assistant", "user what is good </s> assistant"

    for system, strong in ((False, "system be kind </s>"), (True, "system be kind be kind </s>")):
        query = chat("good film", "bad", system=system)
        verdict = ask(built("density_ratio", strong=one, weak=other, criteria="be kind", clip_token=None), query)
        weak = ("system be kind </s> " if system else "") + contexts("")[1]
        wanted = [
            float((log_prob(one, contexts(strong)[0], f"{r} </s>") - log_prob(other, weak, f"{r} </s>")).sum())
            for r in query.responses
        ]
        assert verdict.scores == pytest.approx(wanted, abs=1e-4)


def test_the_same_model_twice_says_nothing_and_changing_places_negates(one, other):
    assert ask(built("density_ratio", strong=one, weak=one), text(*RESPONSES)).scores == (0.0,) * 4
    there, back = (
        ask(built("density_ratio", strong=a, weak=b), text(*RESPONSES)).scores for a, b in ((one, other), (other, one))
    )
    assert there == pytest.approx([-score for score in back])
    even = ask(built("implicit", policy=one, reference=one), text("good", "bad"))
    assert even.matrix()[0, 1] == 0.5


def test_tokens_are_clipped_and_lengths_averaged(one, other):
    ratios = log_prob(one, "what is", "good film </s>") - log_prob(other, "what is", "good film </s>")
    limit = float(np.abs(ratios).min() + 0.01)
    clipped = ask(built("density_ratio", strong=one, weak=other, clip_token=limit), text("good film")).scores[0]
    assert clipped == pytest.approx(np.clip(ratios, -limit, limit).sum(), abs=1e-4)
    assert clipped != pytest.approx(ratios.sum(), abs=1e-3)
    mean = ask(built("density_ratio", strong=one, weak=other, clip_token=None, length_norm="mean"), text("good film")).scores[0]
    assert mean == pytest.approx(ratios.mean(), abs=1e-4)
    implied = ask(built("implicit", policy=one, reference=other, beta=0.5), text("good film")).scores[0]
    assert implied == pytest.approx(0.5 * ratios.sum(), abs=1e-4)
    normed = ask(built("implicit", policy=one, reference=other, beta=0.5, length_norm=True), text("good film")).scores[0]
    assert normed == pytest.approx(0.5 * ratios.mean(), abs=1e-4)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_batches_change_nothing(one, other, size):
    few = ask(built("implicit", policy=one, reference=other, batch_size=size), text(*RESPONSES)).scores
    assert few == pytest.approx(ask(built("implicit", policy=one, reference=other), text(*RESPONSES)).scores, abs=1e-5)


def test_follow_ups_by_hand(one):
    knobs = {"path": one, "positive": ["thanks", "good ."], "negative": ["no"]}
    verdict = ask(built("followup", **knobs), chat("a film", "bad"))
    for response, score in zip(("a film", "bad"), verdict.scores, strict=True):
        before = f"user what is good </s> assistant {response} </s> user"
        thanks, good, no = (log_prob(one, before, said).mean() for said in ("thanks", "good .", "no"))
        assert score == pytest.approx((thanks + good) / 2 - no, abs=1e-4)
    swapped = ask(built("followup", path=one, positive=["no"], negative=["thanks", "good ."]), chat("a film", "bad"))
    assert swapped.scores == pytest.approx([-score for score in verdict.scores])
    plain = ask(built("followup", **knobs), text(" a film")).scores[0]
    means = [log_prob(one, "what is a film", said).mean() for said in ("thanks", "good .", "no")]
    assert plain == pytest.approx((means[0] + means[1]) / 2 - means[2], abs=1e-4)


def test_a_follow_up_that_also_stands_in_the_response_is_found_at_the_end(one):
    verdict = ask(built("followup", path=one, positive=["thanks"], negative=["no"]), chat("no thanks no"))
    before = "user what is good </s> assistant no thanks no </s> user"
    assert verdict.scores[0] == pytest.approx(
        float(log_prob(one, before, "thanks")[0] - log_prob(one, before, "no")[0]), abs=1e-4
    )


# --- embeddings ---


def embedding(path: str, said: str, pooling: str) -> np.ndarray:
    """By a plain forward pass."""
    from transformers import LlamaModel

    with torch.no_grad():
        states = (
            LlamaModel.from_pretrained(path)(torch.tensor([[WORDS.index(word) for word in said.split()]]))
            .last_hidden_state[0]
            .double()
        )
    vector = {"mean": states.mean(dim=0), "first": states[0], "last": states[-1]}[pooling].numpy()
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_the_cosine_to_the_nearest_reference_answer(one, pooling):
    responses, answers = ("good film", "bad", "a good good film . a film is good"), ("film", "good film")
    prompt = Prompt(id="p", text="what", token_ids=(1,), reference_answer='["film", "good film"]')
    verdict = ask(built("ref_embedding", path=one, pooling=pooling), Query(prompt=prompt, responses=responses))
    wanted = [max(float(embedding(one, r, pooling) @ embedding(one, a, pooling)) for a in answers) for r in responses]
    assert verdict.scores == pytest.approx(wanted, abs=1e-5)
    assert verdict.scores[0] == pytest.approx(1.0)


def test_embeddings_refuse_what_cannot_be_compared(one, tmp_path):
    prompt = Prompt(id="p", text="what", token_ids=(1,), reference_answer="good")
    oracle = built("ref_embedding", path=one, max_length=3)
    assert "more than 3 tokens" in ask(oracle, Query(prompt=prompt, responses=("a a a a", "good"))).message
    assert ask(oracle, Query(prompt=prompt, responses=("", "good"))).scores[1] == pytest.approx(1.0)
    with pytest.raises(OracleError, match="more than 3 tokens"):
        ask(built("ref_embedding", path=one, max_length=3, on_truncate="error"), Query(prompt=prompt, responses=("a a a a",)))
    with pytest.raises(OracleError, match="no reference answer"):
        ask(oracle, text("good"))
    with pytest.raises(OracleError, match="cannot load a model"):
        built("ref_embedding", path=str(tmp_path)).inspect()
    assert oracle.version != built("ref_embedding", path=one).version
    assert built("ref_embedding", path="nobody/nothing").absent() == "nobody/nothing"


# --- what is refused ---


def test_models_with_other_tokens_are_refused_without_loading_weights(one, tmp_path):
    strange = save(tmp_path, words=[*WORDS, "more"])
    with pytest.raises(OracleError, match="has other tokens than") as error:
        built("density_ratio", strong=one, weak=strange).inspect()
    assert error.value.field == "oracle.weak"


def test_what_is_no_language_model_is_refused(one, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path / "rm"
    save(folder)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    with pytest.raises(OracleError, match="lacks trained weights for lm_head") as error:
        built("implicit", policy=one, reference=str(folder)).open()
    assert error.value.field == "oracle.reference"
    (tmp_path / "empty").mkdir()
    with pytest.raises(OracleError, match="cannot load a language model") as error:
        built("followup", path=str(tmp_path / "empty")).inspect()
    assert error.value.field == "oracle.path"


def test_what_is_too_long_is_a_failure_and_never_cut(one, other):
    oracle = built("implicit", policy=one, reference=other, max_length=6)
    results = list(oracle.ask([text("good", "a a a a a a a"), text("good", "bad")]))
    assert isinstance(results[0], Failure)
    assert "more than 6" in results[0].message
    assert all(math.isfinite(score) for score in results[1].scores)
    with pytest.raises(OracleError, match="more than 6"):
        ask(built("implicit", policy=one, reference=other, max_length=6, on_truncate="error"), text("a a a a a a a"))
    assert isinstance(ask(built("implicit", policy=one, reference=other), text("good " * 80)), Failure), "the model's own limit"


def test_a_conversation_needs_a_chat_template(tmp_path, one):
    bare = save(tmp_path, template=False)
    with pytest.raises(OracleError, match="has no chat template"):
        ask(built("followup", path=bare), chat("good"))


def test_the_version_is_that_of_the_weights_and_of_what_is_asked(one, other):
    version = built("density_ratio", strong=one, weak=other).version
    assert version == built("density_ratio", strong=one, weak=other, batch_size=1).version
    others = [
        built("density_ratio", strong=other, weak=one),
        built("density_ratio", strong=one, weak=other, criteria="be kind"),
        built("density_ratio", strong=one, weak=other, clip_token=1.0),
    ]
    assert len({version, *(each.version for each in others)}) == 4


def test_what_is_on_the_hub_alone_is_absent():
    assert built("implicit", policy="nobody/nothing-here", reference="nobody/nothing").absent() == "nobody/nothing-here"
    assert built("followup", path="nobody/nothing-here").absent() == "nobody/nothing-here"
