"""A judge whose server the run starts for itself: what is checked before, and what becomes of the process. The real vLLM is in
tests/integration/test_real_judge.py; here another program stands in its place, as a process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onlinerl import app, hardware, serving
from onlinerl import config as configuration
from onlinerl.config import component
from onlinerl.errors import ConfigError, OracleError
from onlinerl.oracles._judge import endpoint, own_server
from onlinerl.oracles._judge.base import Judge
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Prompt, Query, Verdict

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def judge(tiny_model, monkeypatch, tmp_path):
    """Makes judges with a server of their own, which are closed afterwards."""
    monkeypatch.setattr(serving, "MODULE", "fake_serve")
    monkeypatch.setattr(own_server, "LOOK_S", 0.02)
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("FAKE_DEATHS", str(tmp_path / "deaths"))
    (tmp_path / "deaths").write_text("0")
    made: list[Judge] = []

    def make(name: str = "judge_pair", **knobs: Any) -> Judge:
        spec = {"name": name, "model": str(tiny_model), "max_model_len": 128, "read_from": "text", "rationale": False, **knobs}
        made.append(component({key: value for key, value in spec.items() if value is not None}, "oracle", "oracles", Oracle))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(oracle: Judge, *responses: str) -> Any:
    (result,) = oracle.ask([Query(prompt=Prompt(id="p", text="the film", token_ids=(1,)), responses=responses)])
    return result


def process(oracle: Judge) -> subprocess.Popen:
    return oracle._own._server._process


def test_it_starts_its_server_asks_it_and_ends_it(judge, tiny_model):
    oracle = judge(retries=0)
    verdict = ask(oracle, "good", "bad")
    assert isinstance(verdict, Verdict), verdict
    assert verdict.preferences[0][1] == verdict.preferences[1][0] == 1.0, "it always says A"
    assert verdict.matrix()[0, 1] == 0.5
    assert verdict.annotator == "judge_pair:tiny"
    assert verdict.oracle_version.startswith("tiny-")
    started, socket = process(oracle), Path(oracle._own.socket)
    assert socket.parent.stat().st_mode & 0o077 == 0, "nobody else may look into the folder"
    oracle.close()
    assert started.poll() is not None
    assert not socket.parent.exists()


def test_a_server_that_ends_is_started_again(judge, tmp_path):
    oracle = judge(retries=2)
    ask(oracle, "good", "bad")
    first = process(oracle).pid
    (tmp_path / "deaths").write_text("1")
    assert isinstance(ask(oracle, "good", "die"), Verdict)
    assert process(oracle).pid != first


def test_one_that_ends_again_and_again_stops_the_run_with_what_it_wrote(judge, tmp_path):
    oracle = judge(retries=1, max_requests=1)
    ask(oracle, "good", "bad")
    (tmp_path / "deaths").write_text("9")
    assert ask(oracle, "good", "die").kind == "error", "after as many tries as other failures get"
    with pytest.raises(OracleError, match="exit code 3; it has been started again 1 times") as error:
        ask(oracle, "good", "die")
    assert "there is no more memory" in error.value.cause
    oracle.close()


def test_one_that_does_not_start_says_why_and_leaves_nothing(judge, tmp_path):
    (tmp_path / "deaths").write_text("never")
    oracle = judge(retries=5)
    with pytest.raises(OracleError, match="exit code 1") as error:
        oracle.open()
    assert "unknown model" in error.value.cause
    assert error.value.field == "oracle.model"
    assert oracle._own is None


def test_one_that_never_answers_is_given_up(judge, monkeypatch):
    monkeypatch.setattr(serving, "MODULE", "fake_silent")
    with pytest.raises(OracleError, match=r"does not answer after 0\.5 s") as error:
        judge(start_timeout_s=0.5).open()
    assert error.value.field == "oracle.start_timeout_s"


def test_it_ends_with_a_run_that_is_killed(judge, tmp_path, tiny_model):
    script = (
        "import sys, time; from onlinerl import serving; serving.MODULE = 'fake_serve'\n"
        "from onlinerl.oracles.judge_pair import JudgePair\n"
        f"oracle = JudgePair(model={str(tiny_model)!r}, max_model_len=128, read_from='text'); oracle.open()\n"
        "print(oracle._own._server._process.pid, oracle._own.socket, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        pid, socket = parent.stdout.readline().split()
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.05)
    shutil.rmtree(Path(socket).parent)


def test_what_it_is_started_with(judge, tiny_model):
    oracle = judge(kv_cache_gib=0.25, threads=1, max_requests=3, dtype="float32")
    options, variables = own_server.options(oracle), own_server.environment(oracle)
    assert options["model"] == options["served_model_name"] == str(tiny_model)
    assert (options["kv_cache_memory_bytes"], options["max_num_seqs"], options["dtype"]) == (2**28, 3, "float32")
    assert options["max_model_len"] == 128
    assert len(variables["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == 1
    assert variables["TORCHDYNAMO_DISABLE"] == "1", "nothing waits for a compiler"
    assert variables.items() >= hardware.keeping_memory().items()
    usual = judge(max_model_len=None)
    assert own_server.options(usual)["max_model_len"] == 128, "the model's own limit"
    assert len(own_server.environment(usual)["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == max(
        1, len(os.sched_getaffinity(0)) // 2
    )


def test_vllm_reads_its_options_as_they_are_meant(judge):
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    wanted = {**own_server.options(judge())}
    written = serving.arguments({**wanted, "uds": "/s"})
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(written)
    assert (parsed.uds, parsed.served_model_name) == ("/s", [wanted.pop("served_model_name")])
    found = AsyncEngineArgs.from_cli_args(parsed)
    assert {name: getattr(found, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("knobs", "field", "cause"),
    [
        ({"model": "judge"}, "model", "no oracle.base_url"),
        ({"api_key_env": "KEY"}, "api_key_env", "base_url only"),
        ({"base_url": "http://a/v1", "max_model_len": None, "kv_cache_gib": 2.0}, "kv_cache_gib", "there is one"),
        ({"base_url": "http://a/v1", "max_model_len": None, "threads": 2}, "threads", "there is one"),
        ({"base_url": "http://a/v1", "max_model_len": 512}, "max_model_len", "there is one"),
        ({"base_url": "http://a/v1", "max_model_len": None, "dtype": "float32"}, "dtype", "there is one"),
        ({"base_url": "http://a/v1", "max_model_len": None, "start_timeout_s": 5.0}, "start_timeout_s", "there is one"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(judge, knobs, field, cause):
    with pytest.raises(ConfigError, match=cause) as error:
        judge(**knobs)
    assert error.value.field == f"oracle.{field}"
    assert error.value.fix


def test_what_could_not_work_is_found_without_starting_it(judge, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "Server", None)
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    said = json.loads((bare / "tokenizer_config.json").read_text())
    said.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(said))
    for knobs, field in (
        ({"model": str(bare)}, "model"),
        ({"kv_cache_gib": 1e-6}, "kv_cache_gib"),
        ({"threads": 10_000}, "threads"),
    ):
        with pytest.raises(OracleError) as error:
            judge(**knobs).inspect()
        assert error.value.field == f"oracle.{field}"
    judge().inspect()
    for changed, value in (("has_gpu", True),):
        monkeypatch.setattr(own_server.hardware, changed, lambda value=value: value)
        with pytest.raises(OracleError, match="GPU") as error:
            judge().inspect()
        assert error.value.field == "oracle.base_url"
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["judge_pair", "judge_score"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_check_says_what_a_run_would_start_and_starts_nothing(toy_config, tiny_model, tmp_path, monkeypatch, name, inside):
    monkeypatch.setattr(serving, "Server", None)
    judge = {"name": name, "model": str(tiny_model), "max_model_len": 128}
    oracle = {"name": "swapped", "base": judge} if inside else judge
    console = Console(record=True, width=1000, file=open(os.devnull, "w"))  # noqa: SIM115
    config = configuration.settled(configuration.load(toy_config(tmp_path, {"oracle.name": None, "oracle": oracle})))
    app.check(config, console)
    said = console.export_text()
    assert f"a run starts `vllm serve {tiny_model}` for its judge" in said
    assert "was not started" in said
    if not inside:
        assert "requests for 4 responses to a prompt" in said


def test_the_version_is_also_that_of_the_weights(judge, tiny_model, tmp_path):
    other = tmp_path / "tiny"
    shutil.copytree(tiny_model, other)
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    versions = {judge().version, judge(model=str(other)).version, judge(max_model_len=64).version}
    assert len(versions) == 3
    assert judge(threads=1, kv_cache_gib=0.25, retries=7).version in versions
