"""One replica behind a server: what is asked of it, as questions to OpenAI's completions endpoint and to vLLM's own."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

import numpy as np

from onlinerl.engines import _responses
from onlinerl.engines._responses import FINISH, Answer
from onlinerl.engines.openai.client import Client, Refused
from onlinerl.engines.openai.server import MODEL, OwnServer
from onlinerl.errors import EngineError
from onlinerl.types import Group, Request, Sampling

if TYPE_CHECKING:
    from onlinerl.engines.openai import OpenAI

LOWEST = -9999.0
"""What vLLM's server says instead of minus infinity."""
LOOK_S = 0.5
"""How often a server that starts is asked whether it is there."""
TOKEN = "token_id:"
"""What the id of a token follows, where a server writes it in place of its text."""
DEV_MODE = (
    "start vLLM with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls onlinerl.transports._receiver.Receiver, "
    "or leave engine.base_url out"
)


class OpenAIReplica:
    """Samples and gives log-probs over HTTP, and loads weights from disk.

    Args:
        config: the engine section.
        server: of its own, or None for the one at `config.base_url`.
    """

    def __init__(self, config: OpenAI, server: OwnServer | None) -> None:
        self._config, self._server, self._version = config, server, 0
        if server is not None:
            self._path, self._model = "/v1", MODEL
            self._client = Client(
                "http://localhost",
                socket=server.socket,
                gone=server.gone,
                timeout_s=config.request_timeout_s,
                retries=config.retries,
            )
        else:
            parts = urlsplit(config.base_url or "")
            self._path, self._model = parts.path.rstrip("/"), config.model or ""
            self._client = Client(
                f"{parts.scheme}://{parts.netloc}",
                api_key_env=config.api_key_env,
                timeout_s=config.request_timeout_s,
                retries=config.retries,
            )

    async def meet(self, max_model_len: int) -> None:
        """Return once the server has given what is needed of it, to a first question.

        Args:
            max_model_len: longest prompt plus response.

        Raises:
            EngineError: naming what it lacks.
        """
        models = await (self._models() if self._server is None else self._started())
        if not self._model and len(models) == 1:
            (self._model,) = models
        if self._model not in models:
            raise EngineError(
                f"{self._client.root} serves {', '.join(models) or 'no model'}"
                + (f", not {self._model}" if self._model else ""),
                field="engine.model",
                fix="name one of them" if models else "start the server with a model",
            )
        limit = models[self._model]
        if limit is not None and limit < max_model_len:
            raise EngineError(
                f"the server takes {limit} tokens, and a prompt with its response can have {max_model_len}",
                field="engine.base_url",
                fix=f"start it with --max-model-len {max_model_len}, or lower sampling.max_new_tokens",
            )
        _answer(await self._complete([1], Sampling(max_new_tokens=1), seed=0), self._version)
        await self.logprobs([1], [1])
        await self.process_ids()

    async def _started(self) -> dict[str, int | None]:
        deadline = time.monotonic() + self._config.start_timeout_s
        while True:
            try:
                return await self._models(retries=0)
            except EngineError:
                assert self._server is not None
                if self._server.gone() is not None or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(LOOK_S)

    async def _models(self, retries: int | None = None) -> dict[str, int | None]:
        """Names of what it serves, with the longest sequence that each takes where it says so."""
        try:
            answer = await self._client.get(f"{self._path}/models", retries=retries)
        except Refused as error:
            if error.status in (401, 403):
                raise EngineError(
                    error.cause,
                    field="engine.api_key_env",
                    fix="name the environment variable that holds the server's key, and see that it is the right one",
                ) from None
            raise
        listed = answer.get("data") if isinstance(answer, Mapping) else None
        if not isinstance(listed, list):
            raise EngineError(
                f"{self._client.root}{self._path}/models lists no models",
                field="engine.base_url",
                fix="give the address of an OpenAI-compatible server, usually ending in /v1",
            )
        return {each["id"]: each.get("max_model_len") for each in listed}

    # --- samples and log-probs ---

    async def generate(self, request: Request, sampling: Sampling) -> Group:
        """A response to the prompt for each seed, and why there is none where it cannot be used."""
        return await _responses.generate(request, sampling, self._ask)

    async def _ask(self, request: Request, sampling: Sampling, seed: int) -> Answer:
        version = self._version
        return _answer(await self._complete(request.prompt.token_ids, sampling, seed), version)

    async def logprobs(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> np.ndarray:
        """Log-probs f32[T] of given response tokens, by teacher forcing (the server's prompt log-probs)."""
        tokens = [*prompt_ids, *response_ids]
        choice = await self._complete(tokens, Sampling(max_new_tokens=1), seed=0, prompt_logprobs=0)
        entries = choice.get("prompt_logprobs")
        if not isinstance(entries, list) or len(entries) != len(tokens):
            raise EngineError(
                "the server gives no log-probs of a prompt's tokens (`prompt_logprobs`)",
                field="engine.base_url",
                fix="use a server that does, as vLLM; without them nothing proves that it holds the learner's weights",
            )
        found = [entry[str(token)]["logprob"] for entry, token in zip(entries[len(prompt_ids) :], response_ids, strict=True)]
        return np.array(found, dtype=np.float32)

    async def _complete(self, tokens: Sequence[int], sampling: Sampling, seed: int, **more: Any) -> Mapping[str, Any]:
        """The server's one choice. Everything that it might take from a file of the model instead is said."""
        body = {
            "model": self._model,
            "prompt": list(tokens),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "seed": seed,
            "logprobs": 0,  # of the sampled token only
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **more,
        }
        answer = await self._client.post(f"{self._path}/completions", body)
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not isinstance(choices, list) or len(choices) != 1:
            raise EngineError(
                f"{self._client.root}{self._path}/completions gave no choice", field="engine.base_url", fix="look at its log"
            )
        choice: Mapping[str, Any] = choices[0]
        return choice

    # --- weights ---

    async def load_weights(self, path: str, version: int, dtypes: Sequence[str]) -> None:
        """Take on a version from disk: every weight, rounded to these dtypes in turn.

        Raises:
            EngineError: if the server cannot see or load the files.
        """
        if self._server is not None and not Path(path).is_dir():
            raise EngineError(
                f"{path} is not on the machine of this replica",
                field="runs",
                fix="put runs and model on a disk that all nodes share",
            )
        await self._on_workers("onlinerl_load", path, list(dtypes))
        await self._client.post("/update_weight_version", {"new_version": str(version)}, retries=0)
        self._version = version

    async def reset_caches(self) -> None:
        """Forget everything computed with older weights."""
        answer = await self._client.post("/reset_prefix_cache", {}, retries=0)
        if not answer.get("success"):
            raise EngineError("vLLM refused to reset its prefix cache", fix="no request may run during a weight update")

    async def weight_version(self) -> str:
        """The version that the server itself reports."""
        return str((await self._client.get("/weight_info"))["weight_version"])

    async def watch(self, names: list[str]) -> None:
        """Record checksums of these tensors when they arrive."""
        await self._on_workers("onlinerl_watch", names)

    async def received(self) -> dict[str, str]:
        """Checksums recorded since `watch`; of a tensor that differs between workers or did not reach all of them, that it does."""
        workers = await self._on_workers("onlinerl_received")
        found = {name: {worker.get(name) for worker in workers} for received in workers for name in received}
        return {name: digests.pop() if len(digests) == 1 else "differs between workers" for name, digests in found.items()}

    async def process_ids(self) -> list[int]:
        """Process ids of the server's workers."""
        return [int(each) for each in await self._on_workers("onlinerl_pid")]

    async def _on_workers(self, method: str, *args: Any) -> list[Any]:
        """What each worker of the server returns for a method of `transports._receiver.Receiver`."""
        try:
            answer = await self._client.post("/collective_rpc", {"method": method, "args": args}, retries=0)
        except Refused as error:
            if error.status in (404, 405):
                raise EngineError(
                    f"{self._client.root} has no endpoint /collective_rpc, so its weights cannot be pushed",
                    field="engine.base_url",
                    fix=DEV_MODE,
                ) from None
            raise EngineError(
                f"{method} failed in a worker of {self._client.root}: {error.said}", field="engine.base_url", fix=DEV_MODE
            ) from None
        results = answer.get("results") if isinstance(answer, Mapping) else None
        return results if isinstance(results, list) else []

    # --- what a server does not do ---

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Weights come from disk."""
        _from_disk_only()

    async def start_weight_update(self) -> None:
        """Weights come from disk."""
        _from_disk_only()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Weights come from disk."""
        _from_disk_only()

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Weights come from disk."""
        _from_disk_only()

    async def sleep(self) -> None:
        """It shares no GPU."""
        raise EngineError("a server does not take turns on a GPU", field="cluster.colocate", fix="set it to false")

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """It never sleeps."""
        await self.sleep()

    async def shutdown(self) -> None:
        """End the server, if it is its own."""
        await self._client.close()
        if self._server is not None:
            self._server.end()


def _from_disk_only() -> NoReturn:
    raise EngineError("this engine takes its weights from disk", field="sync.backend", fix="set it to disk, or leave it out")


def _answer(choice: Mapping[str, Any], version: int) -> Answer:
    """What a completion says, from weights of this version.

    Raises:
        EngineError: if the server does not say what is needed.
    """
    given = choice.get("logprobs")
    if not isinstance(given, Mapping) or not isinstance(given.get("token_logprobs"), list):
        raise EngineError(
            "the server gives no log-probs of the tokens that it samples",
            field="engine.base_url",
            fix="use a server that does (`logprobs` of OpenAI's completions), as vLLM",
        )
    tokens, names = choice.get("token_ids"), given.get("tokens") or []
    if not isinstance(tokens, list) and all(str(name).startswith(TOKEN) for name in names):
        tokens = [int(str(name).removeprefix(TOKEN)) for name in names]
    if not isinstance(tokens, list):
        raise EngineError(
            "the server gives no token ids, and text is never tokenised again",
            field="engine.base_url",
            fix="use a server that does (`return_token_ids`, or `return_tokens_as_token_ids`), as vLLM",
        )
    finish = choice.get("finish_reason")
    if finish not in FINISH:
        raise EngineError(f"a response ended with {finish!r}", field="engine.base_url", fix="look at the server's log")
    return Answer(
        token_ids=tokens,
        logprobs=[-math.inf if isinstance(each, float | int) and each <= LOWEST else each for each in given["token_logprobs"]],
        text=choice.get("text") or "",
        finish_reason=FINISH[finish],
        policy_version=version,
    )
