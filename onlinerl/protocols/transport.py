"""The role of transports: how weights get from the learner into the replicas of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import Field

from onlinerl.errors import ConfigError
from onlinerl.protocols.component import Component
from onlinerl.protocols.keys import Seconds

if TYPE_CHECKING:
    from onlinerl.protocols.learner import WeightSource


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where learner and engine are, as far as a transport asks."""

    device: Literal["cpu", "cuda"] | None
    """None while it is not known."""
    colocated: bool
    """Whether learner ranks and replicas share GPUs."""
    joins: bool
    """Whether replicas of this engine can join a transfer (`EngineConfig.joins_transfers`); otherwise they load files."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What a rank of the learner is told when its sending half is opened."""

    rank: int
    """Of this one; 0 talks to the replicas."""
    address: str
    """A routable address of the machine of rank 0."""
    workers: int
    """Of all replicas together."""
    dtypes: tuple[str, str]
    """What weights are rounded to, in this order: the learner's dtype, the engine's."""


class Replicas(Protocol):
    """All replicas at once, as rank 0 talks to them: vLLM's control plane of a weight update (`VLLMWeightSyncClient`), and files.

    Every call reaches every replica, waits for all of them, and raises the first error, a SyncError with the replica's name.
    """

    version: int
    """What an update is called when it is finished without another name."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the transfer that this describes, in the words of the receiving half."""
        ...

    def start_weight_update(self) -> None:
        """Open an update."""
        ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive what this describes."""
        ...

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update, and take on its version."""
        ...

    def load_weights(self, path: str, version: int, dtypes: Sequence[str]) -> None:
        """Take on a version from a model on disk, rounded to these dtypes in turn."""
        ...


class Sender(Protocol):
    """The sending half, on one rank of the learner."""

    def send(self, version: int, path: str | None) -> None:
        """Bring all weights into all replicas. Every rank calls it at the same time.

        Args:
            version: what they are called from now on.
            path: where the same weights lie on disk, in Hugging Face format; None for a transport that reads no files.

        Raises:
            SyncError: of a replica.
        """
        ...


class TransportConfig(Component):
    """A transport as it is configured: the keys of every push, whether it goes with a layout, and its sending half.

    Its receiving half is one of vLLM's weight-transfer engines (`receiver`), or the replicas load files.
    """

    chosen_by: ClassVar[str] = "backend"

    backend: str = ""
    timeout_s: Seconds = 300
    """One deadline over the whole push: rendezvous, send, cache reset and proof."""
    tensors_checked: int = Field(24, ge=1)
    """Tensors whose checksum is compared after each push, in rotation; all of them at the first."""
    canary_tolerance_nats: float = Field(0.1, gt=0)
    """Largest accepted mean |log-prob difference| between learner and replica on the canary. It is about 0.05 in bfloat16; stale or
    small changes are what versions and checksums are for."""

    receiver: ClassVar[str | None] = None
    """The name by which vLLM's weight-transfer API knows the receiving half; None if replicas load files instead."""
    precedence: ClassVar[int | None] = None
    """`auto` takes the transport with the lowest of those that go with the layout; None: only where it is asked for by name."""

    def check(self, layout: Layout) -> None:
        """Refuse a layout in which it does not work.

        Raises:
            ConfigError: naming the field.
        """
        if self.receiver is not None and not layout.joins:
            raise ConfigError(
                "sends weights from process to process, and this engine takes them from disk only",
                field="sync.backend",
                fix="leave it out, or set it to disk",
            )

    def resolve(self, layout: Layout) -> TransportConfig:
        """The transport that is used in this layout: this one, unless it is there to choose another.

        Raises:
            ConfigError: if there is none.
        """
        self.check(layout)
        return self

    def environment(self) -> Mapping[str, str]:
        """Environment variables that a replica's process needs for it."""
        return {}

    def sender(self, meeting: Meeting, replicas: Replicas, source: WeightSource) -> Sender:
        """Open the sending half. Every rank calls it at the same time.

        Args:
            meeting: who meets where.
            replicas: used by rank 0.
            source: the learner's weights, in the engine's dtype.

        Raises:
            SyncError: of a replica.
        """
        raise NotImplementedError
