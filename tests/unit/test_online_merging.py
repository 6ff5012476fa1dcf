"""Online merging: its arithmetic by hand, on the torch learner with a real model, and when the loop asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from onlinerl import config as configuration
from onlinerl import preflight
from onlinerl.algorithms.dpo import Dpo
from onlinerl.config import OnlineMergingConfig, TrainingConfig
from onlinerl.errors import ConfigError, LearnerError
from onlinerl.learners.torch import Torch
from onlinerl.learners.torch.rank import TorchRank
from onlinerl.ops.merging import merged
from onlinerl.protocols.learner import RankSettings
from onlinerl.types import TrainItem, TrainSequence, derive_seed

SEEDS = (3, 4)


# --- the arithmetic ---


def kept(count: int, density: float, seed: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < density


def test_ondare_by_hand():
    change, other = torch.arange(1.0, 41.0), -torch.arange(1.0, 41.0)
    found = merged(change, other, method="ondare", density=0.5, alpha=0.25, seeds=SEEDS)
    for i in range(40):
        mine = change[i] / 0.5 if kept(40, 0.5, SEEDS[0])[i] else 0.0
        theirs = other[i] / 0.5 if kept(40, 0.5, SEEDS[1])[i] else 0.0
        assert found[i] == pytest.approx(0.25 * theirs + 0.75 * mine)


def test_onties_by_hand():
    """Half of each is kept: 4, -3, 5 and 2; -6, 3, -5 and 4. The sums are 4, -3 - 6, 5 + 3, -5, 2 + 4: a sign each."""
    change = torch.tensor([4.0, -3.0, 5.0, 1.0, 2.0, 0.5, 0.0, 0.1])
    other = torch.tensor([1.0, -6.0, 3.0, -5.0, 4.0, 0.5, 0.0, 0.1])
    found = merged(change, other, method="onties", density=0.5, alpha=0.1, seeds=SEEDS)
    torch.testing.assert_close(found, torch.tensor([3.6, -2.7 - 0.6, 4.5 + 0.3, -0.5, 1.8 + 0.4, 0.0, 0.0, 0.0]))
    change, other = torch.tensor([4.0, -1.0]), torch.tensor([-5.0, 1.0])
    found = merged(change, other, method="onties", density=1.0, alpha=0.5, seeds=SEEDS)
    torch.testing.assert_close(found, torch.tensor([-2.5, 0.5]))  # the sum of 0 is positive


@pytest.mark.parametrize("method", ["ondare", "onties"])
def test_a_tensor_of_too_few_entries_is_not_made_sparse(method):
    change, other = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([-4.0, 4.0, 8.0])
    found = merged(change, other, method=method, density=0.3, alpha=0.5, seeds=SEEDS)
    torch.testing.assert_close(found, (change + other) / 2)


def test_nothing_of_the_other_and_nothing_dropped_is_the_change_itself():
    change = torch.randn(50, 7)
    assert torch.equal(merged(change, torch.randn(50, 7), method="ondare", density=1.0, alpha=0.0, seeds=SEEDS), change)


def test_dropping_keeps_the_expectation():
    change = torch.randn(20)
    mean = (
        sum(merged(change, change, method="ondare", density=0.25, alpha=0.5, seeds=(2 * i, 2 * i + 1)) for i in range(4000))
        / 4000
    )
    torch.testing.assert_close(mean, change, atol=0.15, rtol=0.1)


# --- on the torch learner ---


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A pretrained model that the tiny one could have been fine-tuned from."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def learner(tiny_model: Path) -> Iterator[Callable[..., TorchRank]]:
    """Makes learners that follow each other."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    made: list[TorchRank] = []

    def make(merging: OnlineMergingConfig | None = None, dtype: str = "float32", model: Path = tiny_model) -> TorchRank:
        for rank in made:
            rank.shutdown()
        settings = RankSettings(
            model=str(model),
            algorithm=Dpo(),
            training=TrainingConfig(online_merging=merging),
            world_size=1,
            device="cpu",
            temperature=1.0,
            seed=7,
        )
        prefix = dist.PrefixStore(str(len(made)), store)
        made.append(Torch(dtype=dtype).rank(settings, rank=0, store=prefix, address="127.0.0.1"))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for rank in made:
        rank.shutdown()


def items() -> list[TrainItem]:
    rng = np.random.default_rng(0)

    def response() -> TrainSequence:
        tokens = tuple(map(int, rng.integers(1, 40, 6)))
        return TrainSequence(prompt_ids=(1, 2, 3), response_ids=tokens, reference_logprobs=np.full(6, -3.8, np.float32))

    return [TrainItem(prompt_id=str(i), sequences=(response(), response())) for i in range(4)]


def masters(rank: TorchRank) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in rank._masters()}


def trained(rank: TorchRank, *, merge: int | None = None) -> dict[str, Tensor]:
    if merge is not None:
        rank.keep_weights()
    for _ in range(3):
        rank.step([items()], 4, 1e-2)
    if merge is not None:
        rank.merge(merge)
    return masters(rank)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["ondare", "onties"])
def test_the_change_of_an_iteration_is_merged(learner, base, tiny_model, method, dtype):
    before, plain = masters(learner(dtype=dtype)), trained(learner(dtype=dtype))
    config = OnlineMergingConfig(base_model=str(base), method=method, density=0.2, alpha=0.3)
    rank = learner(config, dtype)
    found = trained(rank, merge=11)
    tuned, pretrained = (
        dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters()) for path in (tiny_model, base)
    )
    for name, weight in found.items():
        seeds = derive_seed(11, name), derive_seed(7, "online_merging", name)
        change, tuning = plain[name] - before[name], (tuned[name] - pretrained[name]).detach()
        assert change.any()
        expected = before[name] + merged(change, tuning, method=method, density=0.2, alpha=0.3, seeds=seeds)
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-6)
    for name, parameter in rank._policy.model.named_parameters():
        assert torch.equal(parameter.detach(), found[name].to(parameter.dtype)), "what computes follows"


def test_after_a_merge_training_goes_on_and_the_next_one_merges_what_has_changed_since(learner, base, tiny_model):
    """As with `every`: nothing dropped, and 0.3 of the other change added each time."""
    rank = learner(OnlineMergingConfig(base_model=str(base), density=1.0, alpha=0.3))
    tuned, pretrained = (
        dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters()) for path in (tiny_model, base)
    )
    for seed in (11, 12):
        before = masters(rank)
        rank.keep_weights()
        rank.step([items()], 4, 1e-2)
        stepped = masters(rank)
        rank.merge(seed)
        for name, weight in masters(rank).items():
            expected = before[name] + 0.7 * (stepped[name] - before[name]) + 0.3 * (tuned[name] - pretrained[name]).detach()
            torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-6)


def test_nothing_dropped_and_nothing_added_is_plain_training(learner, base):
    plain = trained(learner())
    config = OnlineMergingConfig(base_model=str(base), method="ondare", density=1.0, alpha=0.0)
    found = trained(learner(config), merge=11)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_the_same_seed_drops_the_same(learner, base):
    config = OnlineMergingConfig(base_model=str(base), density=0.2)
    first, again, other = (trained(learner(config), merge=seed) for seed in (11, 11, 12))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_model_that_does_not_go_with_it_is_refused_at_the_start(learner, base, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, base / "model.safetensors")
    with pytest.raises(LearnerError, match=r"has no tensor model\.norm\.weight") as caught:
        learner(OnlineMergingConfig(base_model=str(base)))
    assert caught.value.field == "training.online_merging"


# --- what is refused ---


def checked(toy_config: Any, folder: Path, base: object, **more: object) -> preflight.Checked:
    keys = {"learner.name": "torch", "engine.name": "vllm", "training.online_merging.base_model": str(base)}
    more = {key.replace("__", "."): value for key, value in more.items()}
    return preflight.check(configuration.settled(configuration.load(toy_config(folder, keys | more))))


def test_a_model_with_the_same_tensors_is_accepted(toy_config, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    merging = checked(toy_config, tmp_path, "base").config.training.online_merging
    assert merging is not None
    assert merging.base_model == str(base), "a resume may start elsewhere"


@pytest.mark.parametrize(
    ("more", "field", "cause"),
    [
        ({"learner__name": "deepspeed"}, "training.online_merging", "the learner 'deepspeed' does not let"),
        ({"training__weight_decay": 0.1}, "training.weight_decay", "in the paper it decays after merging"),
        (
            {"algorithm__name": "ppo", "algorithm__critic_warmup": 1},
            "training.online_merging",
            "there is nothing to merge",
        ),
        ({"algorithm__name": "onpo"}, "training.online_merging", "an iteration trains twice"),
    ],
)
def test_what_cannot_be_merged_is_refused(toy_config, base, tmp_path, more, field, cause):
    with pytest.raises(ConfigError, match=cause) as caught:
        checked(toy_config, tmp_path, base, **more)
    assert caught.value.field == field
    assert caught.value.fix


def test_another_model_is_refused_before_the_start(toy_config, base, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(3)
    save_file(weights, base / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model.norm.weight has the shape \[32\]") as caught:
        checked(toy_config, tmp_path, base)
    assert caught.value.field == "training.online_merging.base_model"
    with pytest.raises(ConfigError, match="org/name is not on this machine"):
        checked(toy_config, tmp_path, "org/name")
    with pytest.raises(ConfigError, match="there is no directory"):
        checked(toy_config, tmp_path, tmp_path / "nothing")
