"""Both halves of the gloo transport, as engines of vLLM's weight-transfer API.

Learner rank 0 is rank 0 of a private process group, the vLLM workers follow. Tensors travel packed into buckets of at most
`bucket_bytes`, whose boundaries both sides derive from the same metadata; the extra memory on either side is one bucket.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, TCPStore
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from onlinerl.network import local_address
from onlinerl.processes import die_with_parent
from onlinerl.transports import _reload as reload
from onlinerl.transports._sizes import nbytes

BACKEND = "gloo"


@dataclass(kw_only=True)
class GlooInitInfo(WeightTransferInitInfo):
    """What a vLLM worker needs to join the group."""

    master_address: str
    master_port: int
    rank_offset: int
    """Rank of this replica's first worker; rank 0 is the learner."""
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass(kw_only=True)
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What is about to be sent, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass(kw_only=True)
class GlooTrainerInitInfo(TrainerInitInfo):
    """What the learner needs to open the group. `rank` 0 is the sender; the others only take part in gathering."""

    backend: ClassVar[str] = BACKEND

    master_address: str
    """A routable address of the sender's machine; the port is whichever is free there."""
    world_size: int
    bucket_bytes: int
    timeout_s: float


def join(store: TCPStore, address: str, rank: int, world_size: int, timeout_s: float) -> ProcessGroup:
    """A gloo group that is independent of the default process group, meeting at `store` on `address`.

    Raises:
        RuntimeError: (torch's) if not all members arrive within `timeout_s`.
    """
    timeout = timedelta(seconds=timeout_s)
    options = torch.distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the only place for a device
    # Bind to the interface that can reach the learner: the default is whatever the host name resolves to.
    options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname=local_address(address))]
    options._timeout = timeout
    if rank > 0:
        store.set(_arrival(rank), "")
    group: ProcessGroup = torch.distributed.ProcessGroupGloo(PrefixStore("onlinerl", store), rank, world_size, options)  # type: ignore[assignment]
    return group


def _arrival(rank: int) -> str:
    return f"arrived/{rank}"


def buckets(metas: list[ParamMeta], bucket_bytes: int) -> Iterator[list[ParamMeta]]:
    """Cut the list into runs of at most `bucket_bytes`; a larger tensor goes alone."""
    run: list[ParamMeta] = []
    size = 0
    for meta in metas:
        if run and size + nbytes(meta) > bucket_bytes:
            yield run
            run, size = [], 0
        run.append(meta)
        size += nbytes(meta)
    if run:
        yield run


def unpack(flat: Tensor, run: list[ParamMeta]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one bucket. Copies, because vLLM keeps them until their whole layer has arrived."""
    offset = 0
    for meta in run:
        end = offset + nbytes(meta)
        yield meta.name, flat[offset:end].clone().view(meta.dtype).reshape(meta.shape)
        offset = end


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The receiving half, inside each vLLM worker."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _group: ProcessGroup | None = None
    _bucket_bytes = 0

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the learner's group."""
        rank = init_info.rank_offset + self.parallel_config.rank
        self._bucket_bytes = init_info.bucket_bytes
        address, timeout_s = init_info.master_address, init_info.timeout_s
        store = TCPStore(address, init_info.master_port, timeout=timedelta(seconds=timeout_s))
        self._group = join(store, address, rank, init_info.world_size, timeout_s)

    def start_weight_update(self) -> None:
        """Prepare vLLM's layer-by-layer reload."""
        reload.begin(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load. Unlike the base class, without `torch.accelerator.synchronize()`, which a CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive bucket by bucket, hand each tensor to the model's own loader."""
        if self._group is None:
            raise RuntimeError("init_transfer_engine() must come before update_weights()")
        metas = [
            ParamMeta(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        ]
        for run in buckets(metas, self._bucket_bytes):
            flat = torch.empty(sum(map(nbytes, run)), dtype=torch.uint8)
            self._group.broadcast(flat, 0).wait()
            self.model.load_weights((name, tensor.to(self.device)) for name, tensor in unpack(flat, run))

    def finish_weight_update(self) -> None:
        """Finish the reload."""
        reload.finish(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The sending half, on every learner rank."""

    init_info_cls = GlooTrainerInitInfo

    def __init__(
        self, *, client: VLLMWeightSyncClient, source: WeightSource, init_info: GlooTrainerInitInfo, group: ProcessGroup | None
    ) -> None:
        super().__init__(client=client, source=source, is_sender=init_info.is_sender)
        self._bucket_bytes, self._timeout_s, self._group = init_info.bucket_bytes, init_info.timeout_s, group

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> GlooTrainerWeightTransferEngine:
        """Open the group; the replicas join while rank 0 waits for them."""
        if source is None:
            raise ValueError("gloo weight transfer needs a WeightSource")
        if not init_info.is_sender:
            return cls(client=client, source=source, init_info=init_info, group=None)
        # Port 0 lets the system choose one and keeps it: no gap in which another job could take it.
        store = TCPStore(
            init_info.master_address, 0, is_master=True, timeout=timedelta(seconds=init_info.timeout_s), wait_for_workers=False
        )
        worker_info = GlooInitInfo(
            master_address=init_info.master_address,
            master_port=store.port,
            rank_offset=1,
            world_size=init_info.world_size,
            bucket_bytes=init_info.bucket_bytes,
            timeout_s=init_info.timeout_s,
        )
        with _Background() as side:
            joined = side.submit(client.init_weight_transfer_engine, asdict(worker_info))
            _await_arrivals(store, init_info, joined)
            group = join(store, init_info.master_address, 0, init_info.world_size, init_info.timeout_s)
            joined.result()
        return cls(client=client, source=source, init_info=init_info, group=group)

    def send_weights(self) -> None:
        """Send everything the source yields. Every rank walks the source in the same order; only rank 0 sends."""
        assert self.source is not None
        metas = self.source.metadata()
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        info = GlooUpdateInfo(
            names=[m.name for m in metas],
            dtype_names=[str(m.dtype).removeprefix("torch.") for m in metas],
            shapes=[list(m.shape) for m in metas],
        )
        try:
            self.client.start_weight_update()
            with _Background() as side:
                received = side.submit(self.client.update_weights, asdict(info))
                self._broadcast(metas, received)
                received.result()
            self.client.finish_weight_update()
        except BaseException:
            self.shutdown()  # breaks the connections: replicas that wait for more fail now, not at their deadline
            raise

    def _broadcast(self, metas: list[ParamMeta], received: Any) -> None:
        assert self.source is not None
        assert self._group is not None
        tensors = iter(self.source)
        for run in buckets(metas, self._bucket_bytes):
            if received.done():  # a replica that has already failed will never take part: say why instead of waiting for it
                received.result()
            flat = torch.empty(sum(map(nbytes, run)), dtype=torch.uint8)
            offset = 0
            for meta in run:
                name, tensor = next(tensors)
                if (name, tensor.dtype, tuple(tensor.shape)) != (meta.name, meta.dtype, meta.shape):
                    raise ValueError(
                        f"the weight source declared {meta} but yielded {name} {tensor.dtype} {tuple(tensor.shape)}"
                    )
                end = offset + nbytes(meta)
                flat[offset:end] = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
                offset = end
            work = self._group.broadcast(flat, 0)
            _wait(work, received, self._timeout_s)
        if next(tensors, None) is not None:
            raise ValueError("the weight source yielded more tensors than it declared")

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


def _await_arrivals(store: TCPStore, init_info: GlooTrainerInitInfo, joined: Any) -> None:
    """Wait until every worker is at the door: opening a group blocks, and a replica that has failed never comes."""
    deadline = time.monotonic() + init_info.timeout_s
    everyone = [_arrival(rank) for rank in range(1, init_info.world_size)]
    while not store.check(everyone):
        if joined.done() and joined.exception() is not None:
            raise joined.exception()
        if time.monotonic() > deadline:
            missing = [rank for rank in range(1, init_info.world_size) if not store.check([_arrival(rank)])]
            raise TimeoutError(f"workers {missing} did not join the transfer within {init_info.timeout_s:.0f} s")
        time.sleep(0.02)


def _wait(work: Any, received: Any, timeout_s: float) -> None:
    """Wait for a broadcast, but not for peers that have already reported a failure."""
    deadline = time.monotonic() + timeout_s
    while not work.is_completed():
        if received.done() and received.exception() is not None:
            raise received.exception()
        if time.monotonic() > deadline:
            raise TimeoutError(f"a replica did not take its weights within {timeout_s:.0f} s")
        time.sleep(0.0005)
    work.wait()


class _Background(ThreadPoolExecutor):
    """Side threads that are never waited for when the main thread has failed: their peers may never answer."""

    def __init__(self) -> None:
        super().__init__(max_workers=2)

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self.shutdown(wait=kind is None)


def register() -> None:
    """Make vLLM know the gloo backend. Runs in every vLLM process through the `vllm.general_plugins` entry point."""
    import os

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, GlooWeightTransferEngine)
        WeightTransferTrainerFactory.register_engine(BACKEND, GlooTrainerWeightTransferEngine)
    if os.environ.get("ONLINERL_DIE_WITH_PARENT"):
        die_with_parent()
