"""One vLLM replica (AsyncLLM), on CPU or GPU. Several replicas behind one queue are the cluster's business."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import wraps
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar

import numpy as np

from onlinerl.decoding import continuation
from onlinerl.engines import _fit, _responses, _vllm
from onlinerl.engines._responses import FINISH, Answer
from onlinerl.engines._vllm import VllmConfig
from onlinerl.errors import ConfigError, EngineError
from onlinerl.protocols.engine import Place, ReplicaSettings
from onlinerl.types import Group, Request, Sampling

__all__ = ["VLLM", "VLLMReplica"]

COLOCATED_UTILIZATION = 0.95
"""More than this of a GPU cannot go to an engine that shares it: 0.05 of the largest GPUs is what an idle learner keeps."""
T = TypeVar("T")
Arguments = ParamSpec("Arguments")


def _alive(method: Callable[Arguments, Awaitable[T]]) -> Callable[Arguments, Coroutine[Any, Any, T]]:
    """That the engine's own process is gone is said in our words, which need no vLLM to be read."""

    @wraps(method)
    async def said(*args: Arguments.args, **kwargs: Arguments.kwargs) -> T:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await method(*args, **kwargs)
        except EngineDeadError as error:
            raise EngineError(
                "the process of its engine died", fix="often out of memory: see the end of the Ray logs; then `onlinerl resume`"
            ) from error

    return said


class VLLM(VllmConfig):
    """vLLM, on CPUs or GPUs."""

    name: str = "vllm"
    forces_prefixes: ClassVar[bool] = True

    def check_shared(self) -> None:
        """A replica that shares a GPU lives on one, and leaves room on it."""
        if self.tensor_parallel_size > 1:
            raise ConfigError(
                "colocated replicas cannot span GPUs",
                field="engine.tensor_parallel_size",
                fix="set it to 1, or cluster.colocate=false",
            )
        if self.gpu_memory_utilization > COLOCATED_UTILIZATION:
            raise ConfigError(
                f"is {self.gpu_memory_utilization}, and a learner that has given its memory away still holds its CUDA context "
                "and communication buffers, about 1.5 GiB",
                field="engine.gpu_memory_utilization",
                fix=f"set it to {COLOCATED_UTILIZATION} or less",
            )

    async def replica(self, model: str, places: Sequence[Place], index: int, settings: ReplicaSettings) -> VLLMReplica:
        """Load the model; takes tens of seconds."""
        if settings.device == "cpu":
            _vllm.prepare_cpu(self, _fit.share_cores(places, index, self))
        return VLLMReplica(model, self, settings)


class VLLMReplica:
    """Samples, gives log-probs and receives weights. All methods run on one asyncio loop.

    Args:
        model: directory of the base model.
        config: the engine section.
        settings: what else it is told.

    Raises:
        ConfigError: if the KV cache could not hold one sequence.
    """

    def __init__(self, model: str, config: VLLM, settings: ReplicaSettings) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from onlinerl.transports.gloo import halves

        halves.register()
        self._version = 0
        self._ids = count()
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**_vllm.arguments(model, config, settings)))

    @_alive
    async def generate(self, request: Request, sampling: Sampling) -> Group:
        """A response to the prompt for each seed, and why there is none where it cannot be used.

        Raises:
            EngineError: if vLLM gives no answer at all.
        """
        return await _responses.generate(request, sampling, self._ask)

    async def _ask(self, request: Request, sampling: Sampling, seed: int) -> Answer:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            seed=seed,
            logprobs=0,  # of the sampled token only
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        version = self._version
        final = None
        async for output in self._engine.generate(
            {"prompt_token_ids": [*request.prompt.token_ids, *request.prefix_ids]}, params, f"generate-{next(self._ids)}"
        ):
            final = output
        if final is None or not final.outputs:
            raise EngineError(f"vLLM gave no output for prompt {request.prompt.id}", fix="look at the replica's log")
        out = final.outputs[0]
        tokens = tuple(out.token_ids)
        logprobs = tuple(
            entry[token].logprob for token, entry in zip(tokens, out.logprobs or (), strict=False) if token in entry
        )
        if out.finish_reason not in FINISH:
            raise EngineError(f"prompt {request.prompt.id} ended with {out.finish_reason!r}", fix="look at the replica's log")
        return Answer(
            token_ids=tokens,
            logprobs=logprobs,
            # Of the whole response: the text of a part need not be a part of the text, since the cut may be within a character.
            text=self._whole_text(request, tokens) if request.prefix_ids else out.text,
            finish_reason=FINISH[out.finish_reason],
            policy_version=version,
        )

    def _whole_text(self, request: Request, tokens: Sequence[int]) -> str:
        return continuation(self._engine.get_tokenizer(), request.prompt.token_ids, (*request.prefix_ids, *tokens))

    @_alive
    async def logprobs(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> np.ndarray:
        """Log-probs f32[T] of given response tokens, by teacher forcing (vLLM's prompt log-probs)."""
        from vllm import SamplingParams

        tokens = [*prompt_ids, *response_ids]
        params = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0)
        final = None
        async for output in self._engine.generate({"prompt_token_ids": tokens}, params, f"logprobs-{next(self._ids)}"):
            final = output
        if final is None or not final.prompt_logprobs:
            raise EngineError("vLLM returned no prompt log-probs", fix="look at the replica's log")
        entries = final.prompt_logprobs[len(prompt_ids) :]
        return np.array([e[t].logprob for e, t in zip(entries, response_ids, strict=True)], dtype=np.float32)

    # --- the control plane of a weight update: the four calls of vLLM's VLLMWeightSyncClient, and files ---

    @_alive
    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the learner's transfer group; an update that was left half-open is given up."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._engine.collective_rpc("onlinerl_abandon_update")
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    @_alive
    async def start_weight_update(self) -> None:
        """Open an update."""
        await self._engine.start_weight_update()

    @_alive
    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive weights."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    @_alive
    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close an update and take on its version."""
        await self._engine.finish_weight_update(weight_version)
        if weight_version is not None:
            self._version = int(weight_version)

    @_alive
    async def load_weights(self, path: str, version: int, dtypes: Sequence[str]) -> None:
        """Take on a version from disk instead of from the learner: every weight, rounded to these dtypes in turn.

        Raises:
            EngineError: if the files are not on this machine.
        """
        if not Path(path).is_dir():
            raise EngineError(
                f"{path} is not on the machine of this replica",
                field="runs",
                fix="put runs and model on a disk that all nodes share; `onlinerl resume` sends the weights from the learner",
            )
        await self._engine.collective_rpc("onlinerl_load", args=(path, list(dtypes)))
        await self._engine.update_weight_version(str(version))
        self._version = version

    @_alive
    async def reset_caches(self) -> None:
        """Forget everything computed with older weights; vLLM leaves this to its caller.

        Raises:
            EngineError: if vLLM refuses, as it does while requests are running.
        """
        if not await self._engine.reset_prefix_cache():
            raise EngineError("vLLM refused to reset its prefix cache", fix="no request may run during a weight update")

    @_alive
    async def weight_version(self) -> str:
        """The version the engine itself reports."""
        version: str = await self._engine.get_weight_version()
        return version

    @_alive
    async def watch(self, names: list[str]) -> None:
        """Record checksums of these tensors when they arrive."""
        await self._engine.collective_rpc("onlinerl_watch", args=(names,))

    @_alive
    async def received(self) -> dict[str, str]:
        """Checksums recorded since `watch`; of a tensor that differs between workers or did not reach all of them, that it does."""
        workers = await self._engine.collective_rpc("onlinerl_received")
        found = {name: {worker.get(name) for worker in workers} for received in workers for name in received}
        return {name: digests.pop() if len(digests) == 1 else "differs between workers" for name, digests in found.items()}

    async def held(self) -> list[dict[str, str]]:
        """Per worker, checksums of all parameters as the engine holds them."""
        workers: list[dict[str, str]] = await self._engine.collective_rpc("onlinerl_held")
        return workers

    async def sleep(self) -> None:
        """Give GPU memory back; weights stay in host memory."""
        await self._engine.sleep(level=1)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Take GPU memory again: "weights" before a sync, "kv_cache" after it, or everything."""
        await self._engine.wake_up(tags)

    @_alive
    async def process_ids(self) -> list[int]:
        """Process ids of the workers."""
        workers: list[int] = await self._engine.collective_rpc("onlinerl_pid")
        return workers

    async def shutdown(self) -> None:
        """End the engine's processes."""
        self._engine.shutdown()
