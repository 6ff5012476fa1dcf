"""Models made of two others, against plain arithmetic on whole models."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from onlinerl.errors import LearnerError
from onlinerl.learners._export import export_weights
from onlinerl.learners._interpolation import Interpolated, SavedSource
from onlinerl.protocols.learner import TensorMeta

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """With values that arithmetic would not give back: zeros of both signs, infinities, NaN."""
    made = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(5, 7, generator=made) for name in ("embed.weight", "layers.0.weight", "layers.1.weight")}
    found["layers.1.weight"][0, :4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def saved(folder: Path, tensors: dict[str, Tensor]) -> SavedSource:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return SavedSource(folder)


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name], theirs[name]) for name in ours]
    return all(a.dtype == b.dtype and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype])) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weight", "which"), [(0, 0), (1, 1), (0.0, 0), (1.0, 1)])
def test_either_end_is_that_model_bit_for_bit(tmp_path, weight, which, dtype):
    models = [weights(seed, dtype) for seed in (0, 1)]
    mixed = Interpolated(saved(tmp_path / "a", models[0]), saved(tmp_path / "b", models[1]), weight)
    export_weights(mixed, tmp_path, dtype, writer=True)
    assert same_bits(dict(SavedSource(tmp_path)), models[which])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [0.01, 0.5, 0.6, 1.3, 1.5])
def test_the_arithmetic_is_in_float32(tmp_path, weight, dtype):
    """Against float64: between two models, and beyond the second one."""
    models = [weights(seed, dtype) for seed in (0, 1)]
    mixed = Interpolated(saved(tmp_path / "a", models[0]), saved(tmp_path / "b", models[1]), weight)
    assert {(m.name, m.dtype, m.shape) for m in mixed.metadata()} == {(n, torch.float32, (5, 7)) for n in models[0]}
    for name, tensor in mixed.whole():
        start, end = (model[name].double() for model in models)
        expected = start + weight * (end - start)
        finite = expected.isfinite()
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor[finite].double(), expected[finite], rtol=2e-6, atol=2e-6)
        assert not tensor[~finite].isfinite().any()


def test_small_steps_add_up(tmp_path):
    """1,000 updates with a weight of 0.001 towards the same bfloat16 policy: in bfloat16 the average would not move at all."""
    policy = {"w": torch.full((4,), 1.01, dtype=torch.bfloat16)}
    end = saved(tmp_path / "policy", policy)
    average: dict[str, Tensor] = {"w": torch.ones(4)}
    for _ in range(1000):
        average = dict(Interpolated(saved(tmp_path / "reference", average), end, 0.001).whole())
    moved = (average["w"] - 1) / (policy["w"].float() - 1)
    torch.testing.assert_close(moved, torch.full((4,), 1 - 0.999**1000), rtol=2e-2, atol=0)


def test_names_may_lack_their_first_part_and_more_tensors_are_left_alone(tmp_path):
    mine = {"transformer.wte.weight": torch.randn(3, 2)}
    save_file({"wte.weight": torch.ones(3, 2), "h.0.attn.bias": torch.ones(9)}, tmp_path / "model.safetensors")
    source = SavedSource(tmp_path, list(mine))
    assert [(m.name, m.shape) for m in source.metadata()] == [("transformer.wte.weight", (3, 2))]
    ((name, tensor),) = source
    assert name == "transformer.wte.weight"
    assert torch.equal(tensor, torch.ones(3, 2))


def test_another_model_is_refused(tmp_path):
    whole, other = weights(0), weights(1)
    source = saved(tmp_path / "a", whole)
    with pytest.raises(LearnerError, match=r"has no tensor lm_head.weight"):
        SavedSource(tmp_path / "a", [*whole, "lm_head.weight"])
    other["layers.0.weight"] = torch.zeros(5, 8)
    with pytest.raises(LearnerError, match=r"layers.0.weight of shape \[5, 7\] where the other one has .* shape \[5, 8\]"):
        Interpolated(source, saved(tmp_path / "b", other), 0.5)


class Counted:
    """A source that makes its tensors when they are asked for, and knows how many of them exist."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[Tensor]] = []

    def metadata(self) -> list[TensorMeta]:
        return [TensorMeta(f"layers.{i}.weight", torch.float32, (4, 4)) for i in range(6)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, _, shape in self.metadata():
            tensor = torch.randn(shape)
            self.alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor


def test_no_more_than_one_tensor_of_each_is_in_memory():
    start, end = Counted(), Counted()
    for _, mixed in Interpolated(start, end, 0.5).whole():
        del mixed
        gc.collect()
        for source in (start, end):
            assert sum(ref() is not None for ref in source.alive) <= 1
    assert len(start.alive) == len(end.alive) == 6


def test_agrees_with_trl(tmp_path):
    """Two updates of the reference as TRL's `sync_ref_model` makes them."""
    callbacks = pytest.importorskip("trl.trainer.callbacks", reason="trl is not installed")
    torch.manual_seed(0)
    theirs = torch.nn.Linear(5, 7)
    average = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    for _ in range(2):
        policy = torch.nn.Linear(5, 7)
        callbacks.SyncRefModelCallback._sync_target_model(policy, theirs, 0.6)
        start = saved(tmp_path / "reference", average)
        end = saved(tmp_path / "policy", {name: p.detach() for name, p in policy.named_parameters()})
        average = {name: tensor.clone() for name, tensor in Interpolated(start, end, 0.6).whole()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(average[name], parameter.detach(), rtol=1e-6, atol=1e-7)
