"""A learner's memory on its way to the host and back, without DeepSpeed; with it: tests/integration/test_deepspeed.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onlinerl.learners._offload import HostMemory, tensors_of

CPU = torch.device("cpu")


def sizes(*tensors: Tensor) -> list[int]:
    return [t.untyped_storage().nbytes() for t in tensors]


@pytest.fixture
def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 8)).pow(2).sum().backward()
    optimizer.step()
    return model, optimizer


def test_everything_is_found_and_comes_back(trained):
    model, optimizer = trained
    found = list(tensors_of(model, optimizer))
    moments = [v for state in optimizer.state.values() for v in state.values()]
    wanted = [*model.parameters(), *(p.grad for p in model.parameters()), *model.buffers(), *moments]
    assert {id(t) for t in wanted} <= {id(t) for t in found}
    before = [t.detach().clone() for t in found]
    memory = HostMemory(CPU)

    moved = memory.take(found)

    assert moved == sum(t.nbytes for t in before)
    assert sizes(*found) == [0] * len(found)
    memory.give_back()
    assert all(torch.equal(now, then) for now, then in zip(found, before, strict=True))
    assert memory.contents() == []


def test_views_of_one_buffer_stay_views_of_it():
    """As ZeRO's flat buffers are: moved once, whole, and a write through one view is still seen by the others."""
    flat = torch.arange(10.0)
    first, second = flat[:4].view(2, 2), flat[4:]
    memory = HostMemory(CPU)

    assert memory.take([first, second, flat]) == 40
    memory.give_back()

    assert torch.equal(flat, torch.arange(10.0))
    second[0] = 99
    assert flat[4] == 99
    assert first.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def test_what_is_left_shares_no_memory_with_what_is_moved(trained):
    model, optimizer = trained
    memory = HostMemory(CPU)

    memory.take(tensors_of(model, optimizer), leave=[*model.parameters(), *model.buffers()])

    assert all(sizes(*model.parameters(), *model.buffers()))
    assert not any(sizes(*(p.grad for p in model.parameters())))
    model.eval()(torch.randn(2, 8))  # it still computes
    assert memory.take(tensors_of(model, optimizer)) > 0  # then the rest goes, too
    assert not any(sizes(*model.parameters()))
    memory.give_back()
    optimizer.step()


def test_nothing_is_moved_twice(trained):
    model, optimizer = trained
    memory = HostMemory(CPU)
    assert memory.take(tensors_of(model, optimizer)) > 0
    assert memory.take(tensors_of(model, optimizer)) == 0


def test_what_lies_elsewhere_is_left_alone():
    other = torch.empty(4, device="meta")
    shared = torch.from_numpy(np.ones(4, np.float32))
    assert HostMemory(CPU).take([other, shared, torch.empty(0)]) == 0
    assert shared.sum() == 4


def test_tensors_are_found_where_zero_hangs_them():
    from deepspeed.utils.tensor_fragment import fragment_address

    parameter, part, master = nn.Parameter(torch.ones(2)), torch.ones(3), torch.ones(4)
    parameter.ds_tensor = part
    address = fragment_address(numel=1, start=0)
    address.master = [{"fp32": (master,)}]
    parameter._hp_mapping = address
    model = nn.Module()
    model.weight = parameter
    assert {id(t) for t in tensors_of(model)} == {id(parameter), id(part), id(master)}
