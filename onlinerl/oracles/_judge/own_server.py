"""A server that a judge starts for itself, on the CPUs of the machine of the run."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from onlinerl import hardware, serving, weight_files
from onlinerl.config import at_home
from onlinerl.errors import ConfigError, OracleError
from onlinerl.http_client import Connection, Unanswered
from onlinerl.protocols.keys import Resumable, Seconds
from onlinerl.protocols.oracle import Oracle

ROOT = "http://localhost/v1"
"""A name: it listens on a socket."""
LOOK_S = 0.5
"""How often a server that starts is asked whether it is there."""
GIB = 2**30
_ITS_OWN = ("kv_cache_gib", "threads", "max_model_len", "dtype", "start_timeout_s")


class Served(Oracle):
    """Where the server of a judge is: the keys of one that is there, and of one that the run starts for itself."""

    base_url: Resumable[str | None] = Field(
        None, pattern=r"^https?://[^/]+(/.*)?$", description="http://HOST:PORT/v1", examples=["http://127.0.0.1:8000/v1"]
    )
    """Address of the server, usually ending in /v1. By default the run starts `vllm serve` for itself, on this machine's cores."""
    model: str
    """What the server calls the model; without `base_url` the directory of a chat model."""
    max_requests: Resumable[int] = Field(16, ge=1)
    """Requests under way at the same time, of all groups together."""
    kv_cache_gib: Resumable[float] = Field(0.5, gt=0)
    """Of a server of its own: memory for the KV cache, in GiB; the weights come on top."""
    threads: Resumable[int | None] = Field(None, ge=1)
    """Cores that it computes with; half of the machine's by default, because engine and learner may work at the same time."""
    max_model_len: int = Field(4096, ge=64)
    """Longest question with its reply that it takes, in tokens; the model's own limit, if that is lower."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of its weights; `auto` is bfloat16 where the CPU has instructions for it."""
    start_timeout_s: Resumable[Seconds] = 900.0
    """Longest wait for it to start. One that ends is started again `retries` times."""
    api_key_env: Resumable[str | None] = None
    """Name of the environment variable that holds the server's key."""

    _weights: str = PrivateAttr("")

    @model_validator(mode="after")
    def _is_there(self) -> Self:
        self.__dict__["model"] = settled(self)  # past the freeze, as a validator may
        return self

    @property
    def _named(self) -> str:
        """The model, for people."""
        return self.model if self.base_url is not None else Path(self.model).name

    @property
    def starts(self) -> str | None:
        """A server, unless there is one."""
        return described(self) if self.base_url is None else None

    def inspect(self) -> None:
        """What a server of its own would say only after it has started.

        Raises:
            OracleError: naming field, cause and fix.
        """
        if self.base_url is None:
            inspect(self)

    @property
    def _of_weights(self) -> str:
        """A hash of the files of a server of its own, and of how they are computed with."""
        if not self._weights:
            said = [*weight_files.checksums(Path(self.model)).values(), _dtype(self), _longest(self)]
            self._weights = hashlib.sha256(repr(said).encode()).hexdigest()
        return self._weights


class OwnServer:
    """Starts at once; `up` waits for it, and starts it again where it has ended. Everything but that and `end` runs on one asyncio loop.

    Args:
        judge: whose it is.
    """

    def __init__(self, judge: Served) -> None:
        inspect(judge)
        self._timeout_s, self._left, self._again = judge.start_timeout_s, judge.retries, judge.retries
        self._server = serving.Server(options(judge), environment=environment(judge), logged=True)
        self._connection = Connection(ROOT, socket=self._server.socket, headers={}, timeout_s=10.0)
        self._answered, self._starting = False, asyncio.Lock()

    @property
    def socket(self) -> str:
        """Where it listens."""
        return self._server.socket

    async def up(self) -> None:
        """Return once it answers.

        Raises:
            OracleError: if it does not start, or has ended more often than it may be started again.
        """
        async with self._starting:
            deadline = time.monotonic() + self._timeout_s
            while True:
                if (gone := self._server.gone()) is not None:
                    self._restart(gone)
                    deadline = time.monotonic() + self._timeout_s
                try:
                    await self._connection.ask("GET", "/models", None)
                    self._answered = True
                    return
                except Unanswered:
                    pass
                finally:
                    await self._connection.close()
                if time.monotonic() > deadline:
                    raise OracleError(
                        f"`vllm serve` of the judge does not answer after {self._timeout_s:g} s. It wrote: {self._server.last_words()}",
                        field="oracle.start_timeout_s",
                        fix="raise it, or choose a smaller model",
                    )
                await asyncio.sleep(LOOK_S)

    def _restart(self, gone: str) -> None:
        said = f"`vllm serve` of the judge: {gone.removeprefix('the server of this replica ')}"
        if not self._answered or self._left == 0:
            often = "" if not self._answered else f"; it has been started again {self._again} times (oracle.retries)"
            raise OracleError(
                f"{said}{often}. It wrote: {self._server.last_words()}",
                field="oracle.model",
                fix="see what it wrote: most often memory is short (oracle.kv_cache_gib, oracle.max_model_len), or vLLM does not know the model",
            )
        self._left -= 1
        self._server.start()

    def end(self) -> None:
        """End it."""
        self._server.end()


def settled(judge: Served) -> str:
    """The model; that of a server of its own by its whole path.

    Raises:
        ConfigError: if it is not there, or a key would be read by nobody.
    """
    kind = type(judge)
    if judge.base_url is not None:
        for key in _ITS_OWN:
            if getattr(judge, key) != kind.model_fields[key].default:
                raise ConfigError(
                    "is of a server that the run starts for itself, and with oracle.base_url there is one",
                    field=f"oracle.{key}",
                    fix="leave one of both out",
                )
        return judge.model
    if judge.api_key_env is not None:
        raise ConfigError("is read with oracle.base_url only", field="oracle.api_key_env", fix="leave it out, or set that")
    folder = at_home(judge.model, "oracle.model")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"is {judge.model}, which is no directory of a model here, and there is no oracle.base_url of a server that has such a model",
            field="oracle.model",
            fix="give oracle.base_url, e.g. http://127.0.0.1:8000/v1; or the directory of a chat model, for which the run starts `vllm serve`",
        )
    return str(folder.absolute())


def inspect(judge: Served) -> None:
    """What the server would say only after it has started, or in no words that name a key of ours.

    Raises:
        OracleError: naming field, cause and fix.
    """
    if importlib.util.find_spec("vllm") is None:
        raise OracleError("vLLM is not installed", field="oracle.base_url", fix="give one, or install vLLM")
    if hardware.has_gpu():
        raise OracleError(
            "is left out, and on a machine with GPUs none would be reserved for the judge",
            field="oracle.base_url",
            fix="start `vllm serve` on a GPU that the run does not use, and give its address",
        )
    folder = Path(judge.model)
    said = _json(folder / "tokenizer_config.json")
    if not said.get("chat_template") and not (folder / "chat_template.jinja").is_file():
        raise OracleError(
            f"{judge.model} has no chat template, and the judge is asked as in a chat",
            field="oracle.model",
            fix="give a chat model; oracle.name=self_judge with oracle.path asks any language model",
        )
    cores, wanted = len(_cores()), judge.threads
    if wanted is not None and wanted > cores:
        raise OracleError(f"is {wanted}, and there are {cores} cores", field="oracle.threads", fix=f"lower it to {cores}")
    if (needed := _cache_bytes(judge)) is not None and needed > judge.kv_cache_gib * GIB:
        raise OracleError(
            f"is {judge.kv_cache_gib:g}, and one question of {_longest(judge)} tokens (oracle.max_model_len) needs {needed / GIB:.2f}",
            field="oracle.kv_cache_gib",
            fix="raise it, or lower oracle.max_model_len",
        )


def described(judge: Served) -> str:
    """What `open` would start, for people."""
    size = sum(file.stat().st_size for file in Path(judge.model).glob("*.safetensors"))
    return (
        f"a run starts `vllm serve {judge.model}` for its judge: {size / GIB:.1f} GiB of weights, a KV cache of {judge.kv_cache_gib:g} GiB, "
        f"{len(_mine(judge))} of {len(_cores())} cores, {_longest(judge)} tokens a question. It was not started, so the judge was not tried"
    )


def options(judge: Served) -> dict[str, Any]:
    """Of `vllm serve`."""
    return {
        "model": judge.model,
        "served_model_name": judge.model,
        "dtype": _dtype(judge),
        "max_model_len": _longest(judge),
        "max_num_seqs": judge.max_requests,
        "kv_cache_memory_bytes": int(judge.kv_cache_gib * GIB),
        "enforce_eager": True,
        "seed": 0,
        "disable_log_stats": True,
    }


def environment(judge: Served) -> dict[str, str]:
    """Variables that it gets beside those of the run."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, _mine(judge))),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "TORCHDYNAMO_DISABLE": "1",  # or the first reply with log-probs waits for a compiler
        "ONLINERL_DIE_WITH_PARENT": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **hardware.keeping_memory(),
    }


def _dtype(judge: Served) -> str:
    return judge.dtype if judge.dtype != "auto" else "bfloat16" if hardware.computes_bfloat16() else "float32"


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _mine(judge: Served) -> list[int]:
    """The last ones: whoever takes cores from the front leaves them longest."""
    cores = _cores()
    return cores[-(judge.threads or max(1, len(cores) // 2)) :]


def _longest(judge: Served) -> int:
    limit = _description(judge).get("max_position_embeddings")
    return min(judge.max_model_len, limit) if isinstance(limit, int) else judge.max_model_len


def _cache_bytes(judge: Served) -> int | None:
    """Of the keys and values of one question; None for a model that does not keep those of all tokens, or says too little."""
    said = _description(judge)
    layers, heads = said.get("num_hidden_layers"), said.get("num_attention_heads")
    kept = said.get("num_key_value_heads") or heads
    if not (layers and heads and kept and said.get("hidden_size")) or said.get("sliding_window") or said.get("layer_types"):
        return None
    head = said.get("head_dim") or said["hidden_size"] // heads
    return int(2 * layers * kept * head * (4 if _dtype(judge) == "float32" else 2) * _longest(judge))


def _description(judge: Served) -> Mapping[str, Any]:
    found = _json(Path(judge.model) / "config.json")
    nested = found.get("text_config")
    return nested if isinstance(nested, Mapping) else found


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}
