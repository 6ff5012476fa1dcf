"""The sending half of a transport of vLLM's weight-transfer API, on a learner rank."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from onlinerl.protocols import learner
from onlinerl.protocols.transport import Replicas
from onlinerl.transports.gloo import halves


class _Source(WeightSource):
    """A learner's weights as vLLM takes them."""

    def __init__(self, source: learner.WeightSource) -> None:
        self._source = source

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(each.name, each.dtype, each.shape) for each in self._source.metadata()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._source)


class VllmSender:
    """Meets the replicas when it is made; rank 0 talks to them.

    Args:
        init_info: of one kind on every rank; it says which transport.
        replicas: all of them.
        source: what is sent.
    """

    def __init__(self, init_info: TrainerInitInfo, replicas: Replicas, source: learner.WeightSource) -> None:
        halves.register()
        self._replicas = replicas
        self._engine = WeightTransferTrainerFactory.trainer_init(init_info, client=replicas, source=_Source(source))

    def send(self, version: int, path: str | None) -> None:
        """Send everything that the source yields."""
        self._replicas.version = version
        self._engine.send_weights()
