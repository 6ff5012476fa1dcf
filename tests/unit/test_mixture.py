"""Responses that a learner draws from two models at once: they are those of the geometric mixture, whatever shares a batch with them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from small_llama import VOCABULARY, llama

from onlinerl.decoding import continuation
from onlinerl.errors import LearnerError
from onlinerl.learners._lora import Adapters
from onlinerl.learners._mixture import sample
from onlinerl.learners._policy import Policy
from onlinerl.protocols.adapters import LoraConfig
from onlinerl.types import Draw, Drawn, Sampling

PROMPTS = [(5, 6, 7, 8, 9), (3,), (11, 12), (40, 41, 42)]
ENDS = frozenset({1, 2, 3, 4})
HOW = Sampling(temperature=0.7, max_new_tokens=14)


@pytest.fixture(scope="module")
def models() -> tuple[Policy, Policy]:
    """A policy, and a reference that it is some way from; fp64, so that a batch does not round otherwise."""
    first = llama().double()
    other = copy.deepcopy(first)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Policy(first).eval(), Policy(other).eval()


def draw(
    models: tuple[Policy, Policy | None], draws: Sequence[Draw], weight: float, how: Sampling = HOW, **more
) -> list[Drawn]:
    policy, reference = (
        None if model is None else partial(lambda model, step: model(None, temperature=how.temperature, step=step), model)
        for model in models
    )
    return sample(policy, reference, draws, how, weight=weight, ends=ENDS, device=torch.device("cpu"), **more)


def forced(models: tuple[Policy, Policy], prompt: Sequence[int], response: Sequence[int], weight: float) -> np.ndarray:
    """Log-probs of the mixture of all logits at once, [T]."""
    with torch.no_grad():
        logits = [
            model.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] for model in models
        ]
    mixed = torch.log_softmax(((1 - weight) * logits[0] + weight * logits[1]) / HOW.temperature, dim=-1)
    return mixed[torch.arange(len(response)), torch.tensor(response)].numpy()


DRAWS = [Draw(prompt, seed) for seed in range(3) for prompt in PROMPTS]


@pytest.mark.parametrize("weight", [0.0, 0.375, 1.0])
def test_log_probs_are_those_of_the_mixture(models, weight):
    """Of prompts of different lengths in one batch, at the temperature; 0 is the policy, 1 the reference."""
    for asked, one in zip(DRAWS, draw(models, DRAWS, weight), strict=True):
        assert one.logprobs == pytest.approx(forced(models, asked.prompt_ids, one.token_ids, weight).tolist(), abs=1e-6)


def test_a_response_depends_on_its_seed_and_on_no_other(models):
    together = draw(models, DRAWS, 0.375)
    assert [draw(models, [one], 0.375)[0].token_ids for one in DRAWS] == [one.token_ids for one in together]
    assert len({one.token_ids for one in together[:: len(PROMPTS)]}) == 3


def test_a_policy_without_padding_decodes_all_the_same(models):
    packed = [Policy(copy.deepcopy(model.model), padding_free=True).eval() for model in models]
    assert draw(tuple(packed), DRAWS, 0.375) == draw(models, DRAWS, 0.375)


def test_what_is_drawn_is_that_of_the_policy_with_its_adapters(models, tmp_path):
    adapted = Policy(copy.deepcopy(models[1].model)).eval()
    lora = LoraConfig(rank=2, target_modules=["q_proj"])
    Adapters(adapted, lora, base="", seed=0, gather=lambda parameters, **_: nullcontext())
    assert draw((adapted, models[1]), DRAWS, 0.375) == draw((models[1], models[1]), DRAWS, 0.375), "they begin as nothing"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    merged = copy.deepcopy(adapted)
    for one in DRAWS[:4]:
        (drawn,) = draw((adapted, models[1]), [one], 0.0)
        assert drawn.logprobs == pytest.approx(
            forced((merged, models[1]), one.prompt_ids, drawn.token_ids, 0.0).tolist(), abs=1e-5
        )
    assert draw((adapted, models[1]), DRAWS, 0.0) != draw((models[1], models[1]), DRAWS, 0.0)


def test_a_policy_that_recomputes_decodes_all_the_same(models):
    """transformers takes the cache away from layers that recompute: each token would follow nothing but the last one."""
    recomputing = copy.deepcopy(models[0])
    recomputing.recompute_activations()
    assert draw((recomputing, models[1]), DRAWS, 0.375) == draw(models, DRAWS, 0.375)
    layers = [layer.training for layer in recomputing.modules() if type(layer).__name__ == "LlamaDecoderLayer"]
    assert layers == [True] * 2, "and recomputes again afterwards"


def test_a_model_that_keeps_nothing_is_noticed(models, monkeypatch):
    from contextlib import nullcontext

    recomputing = copy.deepcopy(models[0])
    recomputing.recompute_activations()
    monkeypatch.setattr(Policy, "_keeping", lambda self: nullcontext())
    with pytest.raises(LearnerError, match="this model kept 0 of 5 tokens"):
        draw((recomputing, None), DRAWS, 0.375)


def test_a_response_ends_with_its_end_or_the_longest_response(models):
    made = draw(models, [Draw((5, 6), seed) for seed in range(40)], 0.375)
    assert {one.ended for one in made} == {True, False}
    for one in made:
        assert not ENDS & {*one.token_ids[:-1]}
        assert one.ended == (one.token_ids[-1] in ENDS)
        assert one.ended or len(one.token_ids) == HOW.max_new_tokens


def test_tokens_come_up_as_often_as_they_should(models):
    """The first token of 4,000 responses, against the mixture's probabilities: chi-square over what is expected at least five times."""
    made = draw(models, [Draw((5, 6), seed) for seed in range(4000)], 0.375, Sampling(temperature=0.7, max_new_tokens=1))
    counts = np.bincount([one.token_ids[0] for one in made], minlength=VOCABULARY)
    expected = 4000 * np.exp([forced(models, (5, 6), (token,), 0.375)[0] for token in range(VOCABULARY)])
    often = expected >= 5
    surprise = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert surprise < often.sum() + 4 * np.sqrt(2 * often.sum())
    arithmetic = 4000 * (
        0.625 * np.exp([forced(models, (5, 6), (t,), 0.0)[0] for t in range(VOCABULARY)])
        + 0.375 * np.exp([forced(models, (5, 6), (t,), 1.0)[0] for t in range(VOCABULARY)])
    )
    wrong = ((counts - arithmetic)[often] ** 2 / arithmetic[often]).sum()
    assert wrong > 2 * surprise, "a coin flip between the two models would be noticed"


def test_a_reference_that_is_the_policy_is_not_asked(models):
    alone, twice = draw((models[0], None), DRAWS, 0.375), draw((models[0], models[0]), DRAWS, 0.375)
    assert [one.token_ids for one in alone] == [one.token_ids for one in twice]
    assert [one.logprobs for one in alone] == [pytest.approx(one.logprobs, rel=1e-9) for one in twice]


def test_all_ranks_take_as_many_steps(models):
    """A rank that is done, or has nothing to do, goes on as long as another one."""
    steps = []

    def anyone(own: bool) -> bool:
        steps.append(own)
        return len(steps) <= 6

    assert draw(models, [], 0.375, any_rank=anyone) == []
    assert steps == [False] * 7


class Words:
    """A tokenizer that, as those of some families, leaves out the space before a text."""

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return " ".join(f"w{i}" for i in ids if i > 2)


def test_the_space_between_a_prompt_and_its_response_is_kept():
    assert continuation(Words(), (5, 6), (7, 8, 2)) == " w7 w8"
    assert continuation(Words(), (5, 6), (2,)) == ""
