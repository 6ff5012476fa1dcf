"""What the openai engine asks a server for, what it makes of the answers, and what it says when they are not what they should be."""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from completions import Server, serving, slowly

from onlinerl.config.roles import build
from onlinerl.config.secrets import refuse_values
from onlinerl.engines.openai import OpenAI, client
from onlinerl.engines.openai.replica import OpenAIReplica
from onlinerl.engines.openai.server import options
from onlinerl.errors import ConfigError, EngineError
from onlinerl.serving import arguments as serving_options
from onlinerl.types import Prompt, Request, Sampling

REQUEST = Request(prompt=Prompt(id="p", text="", token_ids=(5, 6, 7)), seeds=(11, 12))
SAMPLING = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=3)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.01)


def config(server: Server | None, **keys: Any) -> OpenAI:
    url = {} if server is None else {"base_url": f"{server.url}/v1"}
    found = build({"name": "openai", "request_timeout_s": 5.0, "retries": 2, **url, **keys}, "engine")
    assert isinstance(found, OpenAI)
    return found


def with_replica(server: Server, work: Callable[[OpenAIReplica], Awaitable[Any]], *, met: bool = False, **keys: Any) -> Any:
    async def run() -> Any:
        replica = OpenAIReplica(config(server, **keys), None)
        replica._model = "policy"
        try:
            if met:
                await replica.meet(128)
            return await work(replica)
        finally:
            await replica.shutdown()

    return asyncio.run(run())


async def nothing(replica: OpenAIReplica) -> None: ...


def meet(server: Server, **keys: Any) -> EngineError:
    """What it says when it meets a server that lacks something."""
    with pytest.raises(EngineError) as error:
        with_replica(server, nothing, met=True, **keys)
    assert error.value.field
    assert error.value.fix
    return error.value


def generate(server: Server, **keys: Any) -> Any:
    return with_replica(server, lambda replica: replica.generate(REQUEST, SAMPLING), **keys)


# --- what it asks for ---


def test_each_seed_is_a_request_of_its_own_and_says_all_that_a_server_might_choose(server: Server) -> None:
    group = generate(server)
    bodies = sorted((body for path, body, _ in server.asked), key=lambda body: body["seed"])
    assert [(body["seed"], body["n"], body["prompt"]) for body in bodies] == [(11, 1, [5, 6, 7]), (12, 1, [5, 6, 7])]
    for body in bodies:
        assert (body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) == (0.7, 0.9, 5, 3)
        neutral = (body["min_p"], body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"])
        assert neutral == (0.0, 1.0, 0.0, 0.0), "a file of the model may have others"
    assert [rollout.seed for rollout in group.rollouts] == [11, 12]
    first = group.rollouts[0]
    assert (first.token_ids, first.logprobs, first.text) == ((11, 12, 13), (-0.5,) * 3, "11 12 13")
    assert (first.finish_reason, first.policy_version, first.sampler) == ("length", 0, SAMPLING)


def test_log_probs_are_those_of_the_response_tokens(server: Server) -> None:
    found = with_replica(server, lambda replica: replica.logprobs((3, 4), (8, 9)))
    np.testing.assert_array_equal(found, np.array([-8.0, -9.0], dtype=np.float32))


def test_token_ids_are_taken_from_the_names_of_tokens_where_a_server_writes_them_there(server: Server) -> None:
    server.choice = {"token_ids": None}
    assert generate(server).rollouts[0].token_ids == (11, 12, 13)


def test_weights_are_loaded_by_the_workers_and_responses_carry_their_version(server: Server, tmp_path: Path) -> None:
    async def work(replica: OpenAIReplica) -> Any:
        await replica.watch(["a", "b"])
        await replica.load_weights(str(tmp_path), 4, ("float32", "bfloat16"))
        await replica.reset_caches()
        return await replica.received(), await replica.weight_version(), await replica.generate(REQUEST, SAMPLING)

    received, version, group = with_replica(server, work)
    calls = [(body["method"], body["args"]) for path, body, _ in server.asked if path == "/collective_rpc"]
    assert calls[:2] == [("onlinerl_watch", [["a", "b"]]), ("onlinerl_load", [str(tmp_path), ["float32", "bfloat16"]])]
    assert received == {"a": "differs between workers", "b": "differs between workers"}
    assert (version, {rollout.policy_version for rollout in group.rollouts}) == ("4", {4})


def test_the_key_is_read_from_the_environment_where_the_replica_runs(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVER_KEY", "xyzzy")
    generate(server, api_key_env="MY_SERVER_KEY")
    assert {headers["Authorization"] for *_, headers in server.asked} == {"Bearer xyzzy"}
    monkeypatch.delenv("MY_SERVER_KEY")
    with pytest.raises(EngineError, match="MY_SERVER_KEY is not set") as error:
        generate(server, api_key_env="MY_SERVER_KEY")
    assert error.value.field == "engine.api_key_env"
    with pytest.raises(ConfigError, match="is not the name of an environment variable"):
        refuse_values({"engine": {"api_key_env": "sk-123"}})


def test_the_only_model_of_a_server_needs_no_name(server: Server) -> None:
    async def name(replica: OpenAIReplica) -> str:
        return replica._model

    assert with_replica(server, name, met=True) == "policy"
    server.models = [{"id": "one"}, {"id": "two"}]
    error = meet(server)
    assert (error.field, error.cause.endswith("serves one, two, not policy")) == ("engine.model", True)


# --- what goes wrong ---


def test_a_server_that_is_not_there(server: Server) -> None:
    with serving() as gone:
        pass
    error = meet(gone)
    assert "cannot be reached" in error.cause
    assert error.field == "engine.base_url"


def test_a_wrong_model(server: Server) -> None:
    async def work(replica: OpenAIReplica) -> None:
        replica._model = "other"
        await replica.meet(128)

    with pytest.raises(EngineError, match="serves policy, not other") as error:
        with_replica(server, work)
    assert error.value.field == "engine.model"


def test_a_server_that_takes_shorter_sequences(server: Server) -> None:
    server.models = [{"id": "policy", "max_model_len": 100}]
    assert "takes 100 tokens, and a prompt with its response can have 128" in meet(server).cause


@pytest.mark.parametrize(
    ("choice", "cause"),
    [
        ({"logprobs": None}, "no log-probs of the tokens that it samples"),
        ({"token_ids": None, "logprobs": {"tokens": ["the"], "token_logprobs": [-1.0]}}, "no token ids"),
        ({"prompt_logprobs": None}, "no log-probs of a prompt's tokens"),
        ({"finish_reason": "tool_calls"}, "ended with 'tool_calls'"),
    ],
)
def test_a_server_that_lacks_what_is_needed_is_refused_at_the_start(server: Server, choice: dict[str, Any], cause: str) -> None:
    server.choice = choice
    assert cause in meet(server).cause


def test_a_server_whose_weights_cannot_be_pushed(server: Server) -> None:
    server.instead = lambda path, body: (404, {"detail": "Not Found"}, {}) if path == "/collective_rpc" else None
    error = meet(server)
    assert "its weights cannot be pushed" in error.cause
    assert "VLLM_SERVER_DEV_MODE=1" in str(error.fix)


@pytest.mark.parametrize("body", ["<html>welcome</html>", {"detail": "no"}])
def test_something_that_is_no_such_server(server: Server, body: Any) -> None:
    server.instead = lambda path, asked: (200, body, {})
    assert "OpenAI-compatible server" in str(meet(server).fix)


def test_a_wrong_key(server: Server) -> None:
    server.instead = lambda path, body: (401, {"error": "Unauthorized"}, {})
    error = meet(server)
    assert (error.field, error.cause.endswith("answered 401: Unauthorized")) == ("engine.api_key_env", True)
    assert server.count("/v1/models") == 1, "asking again would not help"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_asked_again(server: Server, status: int) -> None:
    failures = iter([status, status])

    def sometimes(path: str, body: Any) -> Any:
        return ((next(failures, 0) or 200) != 200 and (status, {"error": {"message": "busy"}}, {})) or None

    server.instead = sometimes
    group = generate(server)
    assert [rollout.token_ids for rollout in group.rollouts] == [(11, 12, 13), (12, 13, 14)]
    assert server.count("/v1/completions") == 4

    server.instead = lambda path, body: (status, {"error": {"message": "busy"}}, {})
    with pytest.raises(EngineError, match=f"answered {status}: busy"):
        generate(server)


def test_what_will_not_pass_is_not_asked_again(server: Server) -> None:
    server.instead = lambda path, body: (400, {"error": {"message": "too long"}}, {})
    with pytest.raises(EngineError, match="answered 400: too long"):
        with_replica(server, lambda replica: replica.logprobs((1,), (2,)))
    assert len(server.asked) == 1


def test_a_server_says_how_long_to_wait(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    usual = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await usual(0)

    monkeypatch.setattr(client.asyncio, "sleep", sleep)
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 1.0)
    server.instead = lambda path, body: (429, "", {"Retry-After": "7"})
    with pytest.raises(EngineError):
        with_replica(server, lambda replica: replica.logprobs((1,), (2,)), retries=1)
    server.instead = lambda path, body: (503, "", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
    with pytest.raises(EngineError):
        with_replica(server, lambda replica: replica.logprobs((1,), (2,)), retries=7)
    assert slept == [7.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_no_answer_in_time(server: Server) -> None:
    server.instead = slowly(3)
    with pytest.raises(EngineError, match=r"gave no answer within 0.2 s \(/v1/completions\)") as error:
        generate(server, request_timeout_s=0.2, retries=1)
    assert error.value.field == "engine.request_timeout_s"


@pytest.mark.parametrize(
    "logprobs", [[-0.5, None, -0.5], [-0.5, float("nan"), -0.5], [-0.5, -9999.0, -0.5], [-0.5, -0.5]], ids=str
)
def test_a_response_without_usable_logprobs_is_no_response(server: Server, logprobs: list[Any]) -> None:
    server.choice = {"logprobs": {"tokens": [], "token_logprobs": logprobs}}
    group = generate(server)
    assert (group.rollouts, group.rejected) == ((), ("logprob", "logprob"))


def test_half_a_response_is_no_response(server: Server) -> None:
    server.choice = {"finish_reason": "abort"}
    assert generate(server).rejected == ("abort", "abort")
    assert server.count("/v1/completions") == 2 * 3


def test_a_cache_that_is_not_reset(server: Server) -> None:
    server.refuses_reset = True
    with pytest.raises(EngineError, match="refused to reset"):
        with_replica(server, lambda replica: replica.reset_caches())


def test_a_worker_that_cannot_load(server: Server, tmp_path: Path) -> None:
    server.instead = lambda path, body: (500, {"error": {"message": "no such file"}}, {})
    with pytest.raises(EngineError, match=r"onlinerl_load failed in a worker of .*: no such file"):
        with_replica(server, lambda replica: replica.load_weights(str(tmp_path), 1, ("float32", "float32")))
    assert len(server.asked) == 1


def test_it_joins_no_transfer_and_does_not_sleep(server: Server) -> None:
    for work in (
        lambda replica: replica.init_weight_transfer_engine({}),
        lambda replica: replica.start_weight_update(),
        lambda replica: replica.update_weights({}),
        lambda replica: replica.finish_weight_update("1"),
        lambda replica: replica.sleep(),
        lambda replica: replica.wake_up(["weights"]),
    ):
        with pytest.raises(EngineError) as error:
            with_replica(server, work)
        assert error.value.field in ("sync.backend", "cluster.colocate")


def test_errors_cross_process_boundaries(server: Server) -> None:
    server.instead = lambda path, body: (400, "no", {})
    with pytest.raises(EngineError) as error:
        with_replica(server, lambda replica: replica.logprobs((1,), (2,)))
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.field) == (str(error.value), "engine.base_url")


# --- its keys ---


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"api_key_env": "A"}, "engine.api_key_env"),
        ({"model": "a"}, "engine.model"),
        ({"base_url": "http://a/v1", "kv_cache_gib": 2.0}, "engine.kv_cache_gib"),
        ({"base_url": "http://a/v1", "gpu_memory_utilization": 0.5}, "engine.gpu_memory_utilization"),
        ({"base_url": "http://a/v1", "enforce_eager": True}, "engine.enforce_eager"),
        ({"base_url": "http://a/v1", "tensor_parallel_size": 2}, "engine.tensor_parallel_size"),
        ({"base_url": "http://a/v1", "threads": 2}, "engine.threads"),
        ({"base_url": "http://a/v1", "replicas": 2}, "engine.replicas"),
    ],
)
def test_a_key_that_nothing_would_read_is_refused(keys: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(None, **keys).check({}, 128, on_cpu=True, alone=True)
    assert error.value.field == field


def test_where_it_runs() -> None:
    assert config(None, tensor_parallel_size=2).gpus == 2
    assert config(None, base_url="http://node7:8000/v1").gpus == 0
    with pytest.raises(ConfigError, match="base_url"):
        config(None, base_url="node7:8000")
    with pytest.raises(ConfigError, match="cannot share its GPU") as error:
        config(None).check_shared()
    assert error.value.field == "engine.name"


def test_vllms_command_line_knows_every_option_that_a_server_is_started_with(tiny_model: Path) -> None:
    """By vLLM's own parser; and they mean the same as in a replica's process."""
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from onlinerl.engines import _vllm
    from onlinerl.protocols.engine import ReplicaSettings
    from onlinerl.transports.disk import Disk

    for device in ("cpu", "cuda"):
        settings = ReplicaSettings(device=device, colocated=False, max_model_len=64, transport=Disk(), seed=3)
        chosen = config(None, tensor_parallel_size=2, dtype="float32")
        wanted = _vllm.arguments(str(tiny_model), chosen, settings)
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(
            serving_options({**options(str(tiny_model), chosen, settings), "uds": "/s"})
        )
        assert (parsed.uds, parsed.served_model_name, parsed.uvicorn_log_level) == ("/s", ["policy"], "warning")
        arguments = AsyncEngineArgs.from_cli_args(parsed)
        assert {name: getattr(arguments, name) for name in wanted} == wanted
