"""Any OpenAI-compatible completions server that gives token log-probs, or `vllm serve`, which each replica then starts for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from onlinerl.engines._vllm import VllmConfig
from onlinerl.errors import ConfigError
from onlinerl.protocols.engine import Place, ReplicaSettings
from onlinerl.protocols.keys import Resumable, Seconds

if TYPE_CHECKING:
    from onlinerl.engines.openai.replica import OpenAIReplica

_OF_OWN_SERVER = ("tensor_parallel_size", "threads", "kv_cache_gib", "gpu_memory_utilization", "enforce_eager")
_OF_OTHER_SERVER = ("model", "api_key_env")


class OpenAI(VllmConfig):
    """Samples and gives log-probs over HTTP. Weights come from disk."""

    name: str = "openai"
    base_url: Resumable[str | None] = Field(None, pattern=r"^https?://[^/]+(/.*)?$")
    """Of a server that is there, e.g. http://node7:8000/v1. By default each replica starts `vllm serve` for itself. So that its weights
    can be pushed it must be vLLM, with VLLM_SERVER_DEV_MODE=1, `--worker-extension-cls onlinerl.transports._receiver.Receiver` and
    `--logprobs-mode processed_logprobs`, and see the run directory."""
    model: Resumable[str | None] = None
    """What that server calls the model; may be left out where it has one only."""
    api_key_env: Resumable[str | None] = None
    """Name of the environment variable that holds that server's key, where replicas run."""
    request_timeout_s: Resumable[Seconds] = 600
    """Longest wait for one answer of the server."""
    retries: Resumable[int] = Field(5, ge=0)
    """How often a request is sent again whose failure may pass: no connection, no answer in time, HTTP 408, 425, 429 and 5xx. A
    Retry-After is kept to; otherwise the pause is 1 s, then twice as long each time, up to 30 s."""

    joins_transfers: ClassVar[bool] = False

    @property
    def gpus(self) -> int:
        """A server that is there has GPUs of its own."""
        return super().gpus if self.base_url is None else 0

    def check(self, model: Mapping[str, Any], max_model_len: int, *, on_cpu: bool, alone: bool) -> None:
        """What the server would say only after it has started; and keys that nobody would read."""
        unread = _OF_OTHER_SERVER if self.base_url is None else _OF_OWN_SERVER
        for key in unread:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ConfigError(
                    f"is {getattr(self, key)}, and nothing would read it "
                    + ("without engine.base_url" if self.base_url is None else "with engine.base_url: the server has its own"),
                    field=f"engine.{key}",
                    fix="leave it out",
                )
        if self.base_url is None:
            super().check(model, max_model_len, on_cpu=on_cpu, alone=alone)
        elif self.replicas > 1:
            raise ConfigError(
                f"is {self.replicas}, and there is one server",
                field="engine.replicas",
                fix="set it to 1 and raise engine.max_num_seqs, or leave engine.base_url out: then each replica has a server",
            )

    def check_shared(self) -> None:
        """A server does not take turns on a GPU."""
        raise ConfigError(
            "a server cannot share its GPU with the learner",
            field="engine.name",
            fix="use engine.name=vllm, or set cluster.colocate=false",
        )

    def environment(self) -> dict[str, str]:
        """Environment variables that a replica's process must start with; a server of its own inherits them."""
        return super().environment() | {"VLLM_SERVER_DEV_MODE": "1"}

    async def replica(self, model: str, places: Sequence[Place], index: int, settings: ReplicaSettings) -> OpenAIReplica:
        """Start the server, if it is not there; returns once it has answered a first question."""
        from onlinerl.engines.openai.replica import OpenAIReplica
        from onlinerl.engines.openai.server import OwnServer

        server = None if self.base_url is not None else OwnServer(model, self, places, index, settings)
        replica = OpenAIReplica(self, server)
        try:
            await replica.meet(settings.max_model_len)
        except BaseException:
            await replica.shutdown()
            raise
        return replica
