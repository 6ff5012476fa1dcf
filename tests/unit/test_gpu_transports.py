"""What vLLM's own ipc and nccl transports do with our client and our ranks, as far as their code runs without a GPU."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("ray")
pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import ray
import shared_gpu
from vllm.distributed.weight_transfer import ipc_engine, nccl_common, packed_tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from onlinerl.cluster.sync import FanOut
from onlinerl.engines.vllm import VLLM
from onlinerl.protocols.transport import Meeting
from onlinerl.transports.gloo import Gloo
from onlinerl.transports.ipc import Ipc
from onlinerl.transports.nccl import Nccl

INSECURE = "VLLM_ALLOW_INSECURE_SERIALIZATION"


@pytest.mark.parametrize(
    ("transport", "field"),
    [(Gloo, "bucket_bytes"), (Ipc, "packed_buffer_size_bytes"), (Nccl, "packed_buffer_size_bytes")],
)
def test_a_bucket_is_as_large_as_the_configuration_says(transport: type[Gloo | Ipc | Nccl], field: str) -> None:
    assert getattr(transport(bucket_mib=3).init_info(told(0), []), field) == 3 * 2**20


def told(rank: int, workers: int = 1) -> Meeting:
    return Meeting(rank=rank, address="127.0.0.1", workers=workers, dtypes=("float32", "float32"))


class Source(WeightSource):
    """Two tensors whose contents say whose they are."""

    def __init__(self, rank: int) -> None:
        self.tensors = {"a": torch.full((4,), float(rank)), "b": torch.full((6,), 10.0 + rank)}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FanOut]:
    """A client of replicas that answer with `methods(i)`."""

    def get(ref: shared_gpu.Ref) -> Any:
        if ref.error is not None:
            raise ref.error
        return ref.result

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (list(refs)[:1], list(refs)[1:]))

    def make(methods: Callable[[int], dict[str, Callable[..., Any]]], replicas: int, width: int = 1) -> FanOut:
        def actor(i: int) -> SimpleNamespace:
            return SimpleNamespace(call=shared_gpu.remote(lambda method, *args: methods(i)[method](*args)))

        return FanOut([actor(i) for i in range(replicas)], [f"replica {i}" for i in range(replicas)], width, 10)

    return make


# --- ipc ---


def test_handles_reach_an_engine_only_in_the_environment_of_colocated_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder between a replica and its engine's process."""
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    args = (
        torch.Tensor,
        torch.Size([4]),
        (1,),
        0,
        torch.UntypedStorage,
        torch.uint8,
        0,
        b"handle",
        4096,
        0,
        b"ref",
        0,
        b"",
        True,
    )
    payload = {"update_info": {"names": ["a"], "ipc_handles": {"GPU-1": args}}}
    for transport in (Gloo(), Nccl()):
        assert INSECURE not in {**VLLM().environment(), **transport.environment()}
    monkeypatch.delenv(INSECURE, raising=False)
    with pytest.raises(TypeError, match=INSECURE):
        MsgpackEncoder().encode(payload)

    for name, value in Ipc().environment().items():
        monkeypatch.setenv(name, value)
    decoded = MsgpackDecoder().decode(MsgpackEncoder().encode(payload))

    arrived = decoded["update_info"]["ipc_handles"]["GPU-1"]
    assert [arrived[i] for i in (0, 4, 5, 7)] == [torch.Tensor, torch.UntypedStorage, torch.uint8, b"handle"]
    assert list(arrived[1]) == [4]
    assert os.environ[INSECURE] == "1"


def test_the_buffer_holds_the_largest_tensor() -> None:
    """vLLM refuses a tensor that is larger than its buffer, as the embeddings of many 7B models are than its default of 1 GiB."""
    metas = [ParamMeta("small", torch.bfloat16, (4,)), ParamMeta("embedding", torch.bfloat16, (152_064, 3584))]
    transport = Ipc(bucket_mib=64)
    assert transport.init_info(told(1), metas[:1]).packed
    assert transport.init_info(told(1), metas[:1]).packed_buffer_size_bytes == 64 * 2**20
    assert transport.init_info(told(1), metas).packed_buffer_size_bytes == 2 * 152_064 * 3584 > 2**30


def test_each_replica_opens_the_memory_of_the_rank_on_its_own_gpu(
    client: Callable[..., FanOut], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks and two replicas on two GPUs: vLLM's own sender on every rank, its own reader in every replica."""
    here, meeting = threading.local(), threading.Barrier(2, timeout=20)
    board: dict[int, Any] = {}
    asked: list[int] = []
    received: list[dict[str, float]] = [{}, {}]

    def all_gather_object(gathered: list[Any], mine: Any) -> None:
        board[here.rank] = mine
        meeting.wait()
        gathered[:] = [board[rank] for rank in range(2)]
        meeting.wait()

    def producer(iterator: Any, gpu_uuid: str, **more: Any) -> Iterator[packed_tensor.PackedIpcChunk]:
        for name, tensor in iterator:  # the device memory that a handle stands for is the handle itself
            buffer = tensor.view(torch.uint8).clone()
            args = (buffer, *[0] * 6)
            yield packed_tensor.PackedIpcChunk([name], [list(tensor.shape)], ["float32"], [buffer.numel()], {gpu_uuid: args})

    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"GPU-{here.rank}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: meeting.wait())
    monkeypatch.setattr(ipc_engine, "packed_ipc_producer", producer)

    def methods(i: int) -> dict[str, Callable[..., Any]]:
        def update_weights(info: dict[str, Any]) -> None:
            asked.append(here.rank)
            caller, here.rank = here.rank, i  # now in the replica's process
            importer = SimpleNamespace(rebuild=lambda args: args[0])
            weights = packed_tensor.packed_ipc_consumer(
                info["ipc_handles"], info["names"], info["shapes"], info["dtype_names"], info["tensor_sizes"], 0, importer
            )
            received[i] |= {name: float(tensor[0]) for name, tensor in weights}
            here.rank = caller

        return {
            "init_weight_transfer_engine": lambda info: asked.append(here.rank) or received[i].update(packed=info["packed"]),
            "start_weight_update": lambda: None,
            "update_weights": update_weights,
            "finish_weight_update": lambda version: received[i].update(version=float(version)),
        }

    fan_out = client(methods, replicas=2)

    def send(rank: int) -> None:
        here.rank = rank
        Ipc(bucket_mib=1).sender(told(rank, workers=2), fan_out, Source(rank)).send(7, None)

    ranks = [threading.Thread(target=send, args=(rank,), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)

    assert received == [{"packed": 1, "version": 7, "a": 0.0, "b": 10.0}, {"packed": 1, "version": 7, "a": 1.0, "b": 11.0}]
    assert set(asked) == {0}, "only rank 0 talks to the replicas"


def test_a_replica_without_a_rank_on_its_gpu_says_which_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="GPU-9"))
    with pytest.raises(ValueError, match=r"GPU-9.*GPU-0"):
        packed_tensor.packed_ipc_consumer({"GPU-0": (0,) * 7}, ["a"], [[1]], ["float32"], [4], 0)


# --- nccl ---


@pytest.mark.parametrize(("replicas", "width"), [(1, 1), (3, 1), (2, 2)])
def test_every_worker_gets_a_rank_of_its_own(
    client: Callable[..., FanOut], monkeypatch: pytest.MonkeyPatch, replicas: int, width: int
) -> None:
    """Sender and workers of tensor-parallel replicas, as vLLM's own code on both sides counts them."""
    members: list[tuple[int, int, int]] = []
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(
        nccl_common,
        "stateless_init_process_group",
        lambda address, port, rank, world_size, device: members.append((rank, world_size, port)),
    )

    def methods(i: int) -> dict[str, Callable[..., Any]]:
        def join(info: dict[str, Any]) -> None:
            for worker in range(width):
                config = SimpleNamespace(data_parallel_index=0, world_size=width, rank=worker)
                nccl_common.worker_init_process_group(nccl_common.NCCLWeightTransferInitInfo(**info), config)

        return {"init_weight_transfer_engine": join}

    world_size = 1 + replicas * width
    for rank in range(2):  # of the learner: the second one must not join
        Nccl().sender(told(rank, replicas * width), client(methods, replicas, width), Source(rank))

    (port,) = {port for *_, port in members}
    assert sorted(members) == [(rank, world_size, port) for rank in range(world_size)]
    assert port > 0
