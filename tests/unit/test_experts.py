"""The auxiliary loss of the routers of a mixture of experts: that of transformers, however a step is cut up."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from onlinerl import config as configuration
from onlinerl import preflight
from onlinerl.algorithms.weighted_sft import WeightedSft
from onlinerl.config import TrainingConfig
from onlinerl.errors import ConfigError
from onlinerl.families import ROUTED
from onlinerl.learners._experts import Balance, Routed
from onlinerl.learners._policy import Policy
from onlinerl.learners.torch import Torch
from onlinerl.ops.batching import collate
from onlinerl.protocols.learner import RankSettings
from onlinerl.types import TrainItem, TrainSequence

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LENGTHS = ((3, 4), (5, 2), (2, 7), (4, 4))
"""Of prompts and responses."""


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SMALL))
    return model.float().eval()


def items(lengths=LENGTHS) -> list[TrainItem]:
    rng = np.random.default_rng(0)
    drawn = [[tuple(rng.integers(3, 50, n).tolist()) for n in both] for both in lengths]
    return [
        TrainItem(prompt_id=str(n), sequences=(TrainSequence(prompt_ids=prompt, response_ids=response),))
        for n, (prompt, response) in enumerate(drawn)
    ]


def theirs(model: PreTrainedModel, some: list[TrainItem]) -> Tensor:
    """As transformers says it of a padded batch."""
    batch = collate(some)
    mask_BS = batch.sequence_mask_BS.long()
    loss: Tensor = model(input_ids=batch.tokens_BS, attention_mask=mask_BS, output_router_logits=True).aux_loss
    return loss


def ours(model: PreTrainedModel, cuts: list[list[TrainItem]], *, packed: bool = False) -> Tensor:
    """Of a step that is cut up so."""
    policy = Policy(model, padding_free=packed).eval()
    policy.experts = SMALL["num_experts_per_tok"]
    parts: list[Routed] = []
    for cut in cuts:
        policy(collate(cut))
        parts.append(policy.take_routed())
    balance = Balance.of([Routed(*(part.detach() for part in each)) for each in parts])
    return torch.stack([balance.loss(each) for each in parts]).sum()


def slopes(loss: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: slope for name, slope in zip(parameters, found, strict=True) if slope is not None}


@pytest.mark.parametrize("family", sorted(ROUTED))
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_value_and_gradient_are_those_of_transformers(family, packed):
    """Of the whole step as one batch; also where it is cut up, with a rank that has nothing."""
    model, some = build(family), items()
    expected = theirs(model, some)
    wanted = slopes(expected, model)
    assert any("gate" in name or "router" in name for name in wanted)
    for cuts in ([some], [some[:1], some[1:3], some[3:]], [some[:2], [], some[2:]]):
        found = ours(build(family), cuts, packed=packed) if packed else ours(model, cuts)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    model = build(family)
    loss = ours(model, [some[:1], some[1:], []], packed=packed)
    for name, slope in slopes(loss, model).items():
        torch.testing.assert_close(slope, wanted[name], rtol=1e-3, atol=1e-6)


def test_by_hand():
    """Two experts, three tokens that choose one each: two of them the first, with probabilities .9, .6 and .2 of it."""
    probs = torch.tensor([1.7, 1.3])
    whole = Routed(torch.tensor([2.0, 1.0]), probs, torch.tensor(3.0))
    balance = Balance.of([whole])
    assert balance.loss(whole).item() == pytest.approx(2 * (2 / 3 * 1.7 / 3 + 1 / 3 * 1.3 / 3))
    assert Balance.of([Routed(torch.zeros(2), torch.zeros(2), torch.tensor(0.0))]).share_E.tolist() == [0.0, 0.0]


def rank(model: Path, **training: Any) -> Any:
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    settings = RankSettings(
        model=str(model),
        algorithm=WeightedSft(),
        training=TrainingConfig(learning_rate=1e-2, **training),
        world_size=1,
        device="cpu",
        temperature=1.0,
        seed=0,
    )
    return Torch(dtype="float32").rank(settings, rank=0, store=store, address="127.0.0.1")


@pytest.fixture
def mixture(tmp_path) -> Path:
    build("mixtral").save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


@pytest.mark.parametrize("cuts", [(4,), (1, 2, 1)], ids=str)
def test_the_learner_adds_it_to_its_loss_and_reports_it(mixture, cuts):
    some, micro = items(), []
    for size in cuts:
        micro.append(some[sum(map(len, micro)) :][:size])
    count = sum(item.count("token") for item in some)
    found: dict[float, tuple[dict[str, np.ndarray], dict[str, float]]] = {}
    for weight in (0.0, 0.5):
        learner = rank(mixture, aux_loss_coef=weight)
        try:
            gradients = learner.gradients(micro, count)
            learner._optimizer.zero_grad()
            found[weight] = gradients, learner.step(micro, count, 1e-2)
        finally:
            learner.shutdown()
    model = build("mixtral")
    expected = theirs(model, some)
    assert found[0.5][1]["aux_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert "aux_loss" not in found[0.0][1]
    assert found[0.5][1]["loss"] == pytest.approx(found[0.0][1]["loss"], rel=1e-5), "the algorithm's alone"
    plain, beside = found[0.0][0], found[0.5][0]
    more = {name.removeprefix("model."): beside[name] - plain[name] for name in beside}
    for name, slope in slopes(expected, model).items():
        np.testing.assert_allclose(more[name], 0.5 * slope.numpy(), rtol=1e-3, atol=1e-5)


def test_of_a_dense_model_it_is_refused(tiny_model, toy_config, tmp_path):
    path = toy_config(tmp_path, {"engine.name": "vllm", "learner.name": "deepspeed", "training.aux_loss_coef": 0.01})
    with pytest.raises(ConfigError, match="have no routers") as error:
        preflight.check(configuration.settled(configuration.load(path)))
    assert (error.value.field, "mixtral" in str(error.value.fix)) == ("training.aux_loss_coef", True)
    with pytest.raises(ConfigError, match="have no routers"):  # of a rank, for a model that was not there to be checked
        rank(tiny_model, aux_loss_coef=0.01)
    torch.distributed.destroy_process_group()
    toy = toy_config(tmp_path, {"training.aux_loss_coef": 0.01}, file="toys.yaml")
    with pytest.raises(ConfigError, match="has no experts to balance") as error:
        preflight.check(configuration.settled(configuration.load(toy)))
    assert error.value.field == "training.aux_loss_coef"
