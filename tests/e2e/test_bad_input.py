"""What a user can get wrong: each is refused with the field, the cause and the fix, before anything is started."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from onlinerl import app, mounts, placement, wiring
from onlinerl import cli as command_line
from onlinerl import config as configuration
from onlinerl.learners.toy import ToyLearner
from onlinerl.stores import _files, directory, summary
from onlinerl.stores.summary import summarise

FAILED, REFUSED = 1, 2
REAL = {"engine.name": "vllm", "learner.name": "deepspeed"}


@pytest.fixture
def refused(onlinerl, monkeypatch, tmp_path):
    """Runs a configuration that must be refused before anything is started; returns the message."""

    def started(*_: object) -> None:
        raise AssertionError("something heavy was started")

    def run(*arguments: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(wiring, "started", started)
            code, message = onlinerl("run", *arguments)
        assert code == REFUSED, message
        assert not (tmp_path / "runs/toy").exists()
        assert not [p for p in tmp_path.rglob(".onlinerl-*")], "a leftover of a check"
        return message

    return run


def says(message: str, *parts: str) -> None:
    """Field, cause and fix."""
    assert message.startswith("error: ")
    assert "\n  fix: " in message
    for part in parts:
        assert part in message, message


# --- the configuration ---


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.learning_rat=1e-5", ("training.learning_rat: is not a known key", "did you mean 'learning_rate'?")),
        ("trainin.learning_rate=1e-5", ("trainin: is not a known key", "did you mean 'training'?")),
        ("algorithm.nam=dpo", ("algorithm.nam: is not a known key", "did you mean 'name'?")),
        ("sync.timeout_s=.inf", ("sync.timeout_s: is inf", "give a finite number")),
        ("algorithm.betta=0.1", ("algorithm.betta: is not a known key", "did you mean 'beta'?")),
        (
            "oracle.lexicon=x",
            ("oracle.lexicon: is not a known key", "known keys: call_timeout_s, groups_per_call, include_prompt"),
        ),
        (
            "sampling.zzz=1",
            ("sampling.zzz: is not a known key", "known keys: dynamic, max_new_tokens, max_rounds, samples_per_prompt"),
        ),
        ("algorithm.name=dpoo", ("algorithm.name: there is no 'dpoo'", "did you mean 'dpo'? choose one of")),
        ("oracle.name=sentimental", ("oracle.name: there is no 'sentimental'", "did you mean 'sentiment'?")),
        ("iterations=four", ("iterations: input should be a valid integer, got 'four'", "give a whole number from 1")),
        ("iterations=2.5", ("iterations: input should be a valid integer", "got 2.5")),
        ("iterations='2'", ("iterations: input should be a valid integer, got '2'",)),
        ("iterations=0", ("iterations: input should be greater than or equal to 1, got 0",)),
        ("prompts.reuse='yes'", ("prompts.reuse: input should be a valid boolean, got 'yes'",)),
        ("training.learning_rate=fast", ("training.learning_rate: input should be a valid number, got 'fast'",)),
        ("algorithm.beta=much", ("algorithm.beta: input should be a valid number, got 'much'",)),
        ("learner={name: deepspeed, zero_stage: 4}", ("learner.zero_stage: input should be 0, 1, 2 or 3, got 4",)),
        ("name=a/b", ("name: string should match pattern", "got 'a/b'")),
        ("training", ("override: 'training' is not of the form key=value", "training.learning_rate=1e-5")),
        ("--iterations=2", ("override: '--iterations=2' is no option", "write keys without dashes, iterations=2")),
        # The toy has none.
        ("learner.zero_stage=1", ("learner.zero_stage: is not a known key", "known keys: attn_implementation, ")),
        ("learner.name=fsdp", ("learner.name: there is no 'fsdp'", "deepspeed")),
        ("engine.name=sglang", ("engine.name: there is no 'sglang'", "vllm")),
        ("name.first=x", ("name.first: 'name' holds a value, not a section",)),
    ],
)
def test_keys_and_types(toy_config, refused, tmp_path, override, parts):
    """An unknown key is an error with a suggestion, and so is a value of another type."""
    says(refused(toy_config(tmp_path), override), "config: ", *parts)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (".dpo", ("'.dpo' is no dotted path", "PACKAGE.MODULE.CLASS")),
        ("..x", ("'..x' is no dotted path",)),
        ("unfinished.Mine", ("cannot import 'unfinished': ", "SyntaxError: ", "correct the error")),
        ("raising.Mine", ("cannot import 'raising': ZeroDivisionError: division by zero",)),
        ("leaving.Mine", ("cannot import 'leaving': SystemExit: 0", "leaving.py, line 2")),
    ],
)
def test_a_class_of_the_users_own_that_cannot_be_imported(toy_config, refused, monkeypatch, tmp_path, name, parts):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "unfinished.py").write_text("class Mine(:\n")
    (tmp_path / "raising.py").write_text("1 / 0\n")
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    says(refused(toy_config(tmp_path), f"algorithm.name={name}"), "config: algorithm.name: ", *parts)


def test_a_typo_in_the_file(toy_config, cli, tmp_path):
    """In a process of its own: the message comes without a traceback and the exit code is that of a refusal."""
    done = cli("run", toy_config(tmp_path, {"training.learning_rat": 0.1}))
    assert done.returncode == REFUSED
    says(done.stderr, "config: training.learning_rat: is not a known key", "fix: did you mean 'learning_rate'?")
    assert "Traceback" not in done.message
    assert not (tmp_path / "runs").exists()


def test_a_file_that_cannot_be_read(refused, toy_config, tmp_path):
    toy_config(tmp_path)
    says(refused(tmp_path), f"CONFIG: {tmp_path} cannot be read", "give the path of a YAML file")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    says(refused(tmp_path / "binary.yaml"), "cannot be read")
    (tmp_path / "two.yaml").write_text("extends: [a, b]")
    says(refused(tmp_path / "two.yaml"), "extends", "give the path of one YAML file")
    refusal = refused(toy_config(tmp_path), "algorithm.name=onlinerl.errors.ConfigError")
    says(refusal, "algorithm.name: onlinerl.errors.ConfigError is no subclass of onlinerl.protocols.algorithm.Algorithm")


def test_a_file_that_is_not_there(toy_config, refused, monkeypatch, tmp_path):
    toy_config(tmp_path)
    says(refused(tmp_path / "toi.yaml"), f"CONFIG: there is no file {tmp_path}/toi.yaml", f"did you mean {tmp_path}/toy.yaml?")
    (tmp_path / "list.yaml").write_text("- a\n")
    says(refused(tmp_path / "list.yaml"), "does not hold a mapping", "start with `name: my-run`")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    says(refused(tmp_path / "broken.yaml"), "is not valid YAML", "line 2", "check brackets, quotes and indentation")
    monkeypatch.chdir(tmp_path)
    says(refused("conf/a.yaml"), f"there is no file {tmp_path}/conf/a.yaml", "a relative one starts where onlinerl was started")
    (tmp_path / "top.yaml").write_text("extends: conf/a.yaml\n")
    says(refused("top.yaml"), f"there is no file {tmp_path}/conf/a.yaml", "starts at the file that says `extends`")


def test_a_missing_key(toy_config, refused, tmp_path):
    says(refused(toy_config(tmp_path, {"prompts.heldout": None})), "prompts.heldout: is missing", "add `heldout: ...`")
    says(refused(toy_config(tmp_path, {"algorithm.name": None, "algorithm.beta": 0.1})), "algorithm.name: is missing")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            {"sampling.samples_per_prompt": 1},
            (
                "sampling.samples_per_prompt: dpo compares responses and needs at least 2 per prompt, got 1",
                "set it to 2 or more",
            ),
        ),
        ({"reference.schedule": "none"}, ("reference.schedule: dpo needs a reference", "set it to fixed")),
        ({"reference.every": 2}, ("reference.every: is 2, and nothing would read it", "leave it out")),
        (
            {"algorithm.name": "grpo", "pairing.name": "ranked"},
            ("pairing: grpo trains no pairs, so nothing would read it", "leave it out (pairing=null on the command line)"),
        ),
        ({"algorithm.name": "sppo", "reference.schedule": "fixed"}, ("reference.schedule: sppo", "allow_nonstandard=true")),
        ({"algorithm.name": "grpo", "sampling.top_p": 0.9}, ("sampling.top_p: grpo weighs samples", "set top_p to 1.0")),
        (
            {"engine.name": "vllm"},
            ("engine.name: engine 'vllm' and learner 'toy' do not go together", "vllm with deepspeed"),
        ),
        (
            {"engine.max_model_len": 16},
            ("engine.max_model_len: is 16, and the longest prompt with its response can have ", "set it to "),
        ),
        (
            {"sampling.max_new_tokens": 500},
            ("sampling.max_new_tokens: the longest prompt with its response can have ", "the model takes 128"),
        ),
        ({"cluster.device": "cpu", "sync.backend": "nccl"}, ("sync.backend: needs GPUs, and the run is on CPUs",)),
        ({"cluster.device": "cpu", "cluster.colocate": True}, ("cluster.colocate: needs GPUs, and cluster.device is cpu",)),
        ({"cluster.device": "cpu", "sync.backend": "ipc"}, ("sync.backend: needs GPUs, and the run is on CPUs",)),
        ({"cluster.colocate": True, "learner.ranks": 2}, ("cluster.colocate: ", "2 ranks and 1 replicas")),
        (
            {"sync.backend": "ipc"},
            ("sync.backend: hands over memory inside one GPU", "set cluster.colocate=true"),
        ),
        (
            {"cluster.colocate": True, "sync.backend": "nccl"},
            ("sync.backend: nccl does not go between two processes on one GPU", "ipc is chosen"),
        ),
        (
            {"cluster.colocate": True, "sync.backend": "gloo"},
            ("sync.backend: takes the weights through host memory", "ipc is chosen"),
        ),
        (
            {**REAL, "cluster.colocate": True, "engine.tensor_parallel_size": 2},
            ("engine.tensor_parallel_size: colocated replicas cannot span GPUs", "cluster.colocate=false"),
        ),
        (
            {**REAL, "engine.name": "openai", "cluster.colocate": True},
            ("engine.name: a server cannot share its GPU with the learner", "engine.name=vllm"),
        ),
        (
            {**REAL, "engine.name": "openai", "sync.backend": "gloo"},
            ("sync.backend: sends weights from process to process, and this engine takes them from disk only", "disk"),
        ),
        (
            {"cluster.colocate": True, "sync.backend": "disk"},
            ("sync.backend: takes the weights through files, though learner and replica share a GPU", "ipc is chosen"),
        ),
        (
            {**REAL, "cluster.colocate": True, "engine.gpu_memory_utilization": 0.97},
            ("engine.gpu_memory_utilization: is 0.97, and a learner that has given its memory away", "0.95 or less"),
        ),
        (
            {"cluster.colocate": True, "schedule.max_lag": 1},
            ("schedule.max_lag: is 1, but engine and learner share GPUs, and only one of them works at a time", "set it to 0"),
        ),
        (
            {"engine.name": "vllm", "learner.name": "deepspeed", "cluster.device": "cpu", "schedule.max_lag": 1},
            ("schedule.max_lag: is 1, but engine and learner compute on the same cores", "engine.threads and learner.threads"),
        ),
        (
            {"algorithm.name": "grpo", "algorithm.sampler_cap": 2.0},
            ("algorithm.sampler_cap: was renamed", "write algorithm.importance_sampling_cap"),
        ),
        ({"schedule.max_lag": 2}, ("schedule.max_lag: ", "0")),
        (
            {"prompts.per_iteration": 20},
            (
                "prompts.per_iteration: 3 iterations of 20 fresh prompts need 60, and there are 40",
                "lower it to 13",
                "reuse=true",
            ),
        ),
        (
            {"prompts.per_iteration": 50, "iterations": 41},
            ("prompts.per_iteration: 41 iterations of 50", "lower both, e.g. prompts.per_iteration=1 iterations=40"),
        ),
        (
            {"prompts.per_iteration": 12, "iterations": 41},
            ("prompts.per_iteration: 41 iterations of 12", "lower iterations to 3"),
        ),
        (
            {"prompts.per_iteration": 41, "prompts.reuse": True},
            ("prompts.per_iteration: asks for 41 different prompts at once, and there are 40", "lower it to 40"),
        ),
        ({"evaluation.prompts": 11}, ("evaluation.prompts: asks for 11 held-out prompts, and there are 10", "lower it to 10")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_together(toy_config, refused, tmp_path, overrides, parts):
    says(refused(toy_config(tmp_path, overrides)), "config: ", *parts)


@pytest.fixture
def deepspeed(monkeypatch):
    """Has another release of DeepSpeed installed, or none."""
    found = importlib.metadata.version

    def install(release: str | None) -> None:
        def version(package: str) -> str:
            if package == "deepspeed" and release is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return release if package == "deepspeed" else found(package)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return install


@pytest.mark.parametrize("release", ["0.17.6", "0.18.2", "0.19.3", "0.19.3+cu128"])
def test_a_release_of_deepspeed_that_computes_wrong_gradients(toy_config, refused, onlinerl, deepspeed, tmp_path, release):
    """By `run`, by `check`, and by a sweep before its first run."""
    deepspeed(release)
    path = toy_config(tmp_path, {**REAL, "learner.zero_stage": 2})
    wrong = (
        "config: learner.zero_stage: is 2, and ZeRO-2 of DeepSpeed 0.17.6 to 0.19.3 can compute wrong gradients",
        f"issues 7718 and 8224); {release} is installed on ",
        "make install",
        "or set it to 1 or 3",
    )
    says(refused(path), *wrong)
    code, message = onlinerl("check", path)
    assert code == REFUSED
    says(message, *wrong)
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump({"base": path.name, "name": "both", "axes": {"algorithm": ["dpo", "ipo"]}})
    )
    code, message = onlinerl("sweep", tmp_path / "sweep.yaml")
    assert code == REFUSED
    assert "wrong gradients" in message


@pytest.mark.parametrize(
    ("release", "stage"),
    [("0.19.3", 0), ("0.19.3", 1), ("0.19.3", 3), ("0.17.5", 2), ("0.19.4", 2), ("0.19.8", 2), ("0.20", 2), (None, 2)],
)
def test_other_stages_and_releases_of_deepspeed_are_accepted(toy_config, onlinerl, deepspeed, tmp_path, release, stage):
    deepspeed(release)
    code, message = onlinerl("check", toy_config(tmp_path, {**REAL, "learner.zero_stage": stage}))
    assert code == 0, message


# --- prompts ---


def test_prompts_without_the_answers_that_an_algorithm_trains_on(toy_config, refused, tmp_path):
    message = refused(toy_config(tmp_path, {"algorithm.name": "spin"}))
    says(message, "prompts.train: 40 of 40 prompts have no reference answer, which the algorithm needs", "train.jsonl, line 1)")


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


GOOD = [{"text": f"the film {i} was"} for i in range(3)]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ("there is no file", "check the path")),
        ("", ("holds no prompts", 'write one per line, e.g. {"text"')),
        ("\n\n", ("holds no prompts",)),
        (lines(*GOOD, '{"text": "the film'), ("line 4: is not JSON", "write one JSON object per line")),
        (lines(GOOD[0], {"prompt": "x"}), ("line 2: has the unknown key 'prompt'", "did you mean text or messages?")),
        (lines({"question": "x", "answer": "y"}), ("did you mean text, or messages for a chat model (and reference_answer",)),
        (lines(GOOD[0], {"text": 7}), ("line 2: text must be a string",)),
        (lines(GOOD[0], GOOD[1], GOOD[0]), ("line 3: has the same id as line 1", "remove one")),
        (
            lines(GOOD[0], {"text": "<|im_start|>user\nthe film<|im_end|>"}),
            ("line 2: holds '<|im_start|>', so a template was applied to it already", "give the raw words"),
        ),
        (
            lines(*GOOD, {"id": "long", "text": "the " * 20}, {"text": "a " * 18}),
            ("2 of 5 prompts are longer than 16 tokens; the longest, 'long', has 20", "set prompts.max_tokens to 20 or more"),
        ),
    ],
    ids=["missing", "empty", "blank", "json", "key", "question", "type", "twice", "templated", "long"],
)
def test_prompt_files(toy_config, refused, tmp_path, content, parts):
    """Checked when they are loaded: form, template, length."""
    config = toy_config(tmp_path, {"prompts.train": str(tmp_path / "mine.jsonl")})
    if content is not None:
        (tmp_path / "mine.jsonl").write_text(content)
    says(refused(config), "error: prompts: prompts.train: ", *parts)


def test_held_out_prompts_that_are_trained_on(toy_config, refused, tmp_path):
    config = toy_config(tmp_path)
    (tmp_path / "heldout.jsonl").write_text(lines({"text": "The FILM one  was"}, {"text": "two"}))
    message = refused(config)
    says(message, "prompts.heldout: 1 of 2 held-out prompts are also training prompts", "remove them from one of the two files")


def test_a_conversation_without_a_chat_template(toy_config, refused, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").unlink()
    (tmp_path / "chat.jsonl").write_text(lines({"id": "hello", "messages": [{"role": "user", "content": "the film"}]}))
    config = toy_config(tmp_path, {"prompts.train": str(tmp_path / "chat.jsonl"), "model": str(model)})
    message = refused(config)
    says(message, "prompts.train: prompt 'hello' is a conversation, but the model's tokenizer has no chat template")
    says(message, "use an instruction-tuned model, or give prompts as text")


# --- the model ---


def test_models(toy_config, refused, tiny_model, tmp_path):
    def attempt(model: object) -> str:
        return refused(toy_config(tmp_path, model=str(model)))

    says(attempt(tmp_path / "nowhere"), f"config: model: there is no directory {tmp_path}/nowhere", "correct the path")
    relative = "models/SmolLM2-135M-Instruct-x"
    says(attempt(relative), f"there is no directory {Path.cwd()}/{relative}", "start where onlinerl was started", "fetch-model")
    says(attempt("org/name-7B"), "model: org/name-7B is not on this machine", "download it first", f"{Path.cwd()}/org/name-7B")
    (tmp_path / "empty").mkdir()
    says(attempt(tmp_path / "empty"), "model: ", "holds no config.json", "give the directory of a Hugging Face model")
    shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "chat*"))
    says(attempt(tmp_path / "bare"), "model: its tokenizer cannot be loaded", "put the tokenizer's files beside the weights")


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\n",
            ("does not begin with a header", "git lfs pull"),
        ),
        ("model.safetensors", b"", ("is no whole safetensors file", "download it again")),
        ("model.safetensors", None, ("holds no weights",)),
        ("model.safetensors", -1, ("it should have ", " bytes and has ")),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "x-2.safetensors"}}',
            ("lacks 1 of the files", "x-2.safetensors"),
        ),
        ("model.safetensors.index.json", b"{}", ("model.safetensors.index.json cannot be read",)),
        ("tokenizer.json", b"{}", ("its tokenizer cannot be loaded",)),
        ("tokenizer_config.json", b"[1]", ("its tokenizer cannot be loaded",)),
        ("config.json", b'{"model_type": "llama", "num_attention_heads": 0}', ("its config.json cannot be read",)),
    ],
)
def test_models_that_are_not_whole(toy_config, refused, tiny_model, tmp_path, file, content, parts):
    """As an interrupted download or a clone without Git LFS leaves them; content: None for no file, a number for where it is cut."""
    damaged = shutil.copytree(tiny_model, tmp_path / "model") / file
    if content is None:
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[:content] if isinstance(content, int) else content)
    says(refused(toy_config(tmp_path, model=str(tmp_path / "model"))), "config: model: ", *parts)


# --- the surroundings ---


def test_a_tracker_that_is_not_installed(toy_config, refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = refused(toy_config(tmp_path, {"metrics.tensorboard": True}))
    says(message, "config: metrics.tensorboard: TensorBoard is not installed", "onlinerl[tensorboard]")


UNOPENED = """
from onlinerl.protocols.tracker import TrackerConfig

class Unopened(TrackerConfig):
    name: str = "unopened"

    def open(self, run):
        raise {error}
"""


@pytest.mark.parametrize(
    ("error", "code", "status"), [("ValueError('no server')", None, "failed"), ("KeyboardInterrupt", 75, "interrupted")]
)
def test_a_tracker_that_cannot_be_opened(toy_config, onlinerl, monkeypatch, tmp_path, error, code, status):
    """The run says how it stands, and the same process can resume it."""
    name = f"unopened_{status}"
    (tmp_path / f"{name}.py").write_text(UNOPENED.format(error=error))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = toy_config(tmp_path, {"iterations": 1, "metrics.trackers": [{"name": f"{name}.Unopened"}]})
    run = tmp_path / "runs/toy"
    if code is None:
        with pytest.raises(ValueError, match="no server"):
            app.run(configuration.load(config), Console(quiet=True))
    else:
        ended, message = onlinerl("run", config)
        assert ended == code
        assert f"continue with `onlinerl resume {run}`" in message
    assert summary.status(run) == status
    assert onlinerl("resume", run, "metrics.trackers=[]")[0] == 0


@pytest.mark.parametrize("port", [9470, 0])
@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_of_another_machine(toy_config, refused, tmp_path, host, port):
    message = refused(toy_config(tmp_path, {"metrics.prometheus_host": host, "metrics.prometheus_port": port}))
    says(message, f"config: metrics.prometheus_host: {host}:{port} cannot be listened on", "metrics.prometheus=false")


def test_a_directory_that_holds_another_run(toy_config, onlinerl, tmp_path):
    config = toy_config(tmp_path, iterations=1)
    assert onlinerl("run", config)[0] == 0
    before = sorted(str(p) for p in (tmp_path / "runs").rglob("*"))
    code, message = onlinerl("run", config, "training.learning_rate=0.1")
    assert code == REFUSED
    says(message, "store: name: ", "already holds a run", "onlinerl resume", "--fresh")
    assert sorted(str(p) for p in (tmp_path / "runs").rglob("*")) == before
    assert onlinerl("run", config, "--fresh")[0] == 0
    assert (tmp_path / "runs/toy.1/manifest.json").exists()


def test_paths_in_the_home_directory(toy_config, onlinerl, monkeypatch, tmp_path):
    """`check` and `run` take them for the same place, and a run that lies there is not taken for none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"runs": "~/runs", "prompts.train": "~/train.jsonl", "prompts.heldout": "~/heldout.jsonl"}
    config = toy_config(tmp_path, {**paths, "iterations": 1, "evaluation.prompts": 4})
    assert onlinerl("check", config) == (0, "")
    assert onlinerl("run", config)[0] == 0
    code, message = onlinerl("run", config)
    assert code == REFUSED
    says(message, f"store: name: {tmp_path}/runs/toy already holds a run", "onlinerl resume")


RECIPES = sorted((Path(__file__).parents[2] / "configs/recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_check_where_the_models_are_not_on_the_machine(recipe, cli, tmp_path):
    """Everything else is checked and printed; the verdict is that of a run."""
    done = cli("check", recipe)
    assert done.returncode == REFUSED, done.message
    for said in ("memory (estimate, 8.00 B parameters)", "placement (cuda):", "the oracle was not tried"):
        assert said in done.stdout, done.message
    assert done.stdout.count("not ok yet: ") == 2
    assert "not ok yet: model: " in done.stdout
    assert "fix: download it first: hf download sfairXC/FsfairX-LLaMA3-RM-v0.1" in done.stdout
    assert not done.stderr


def test_how_a_run_stands(toy_config, onlinerl, oracle, capsys, tmp_path):
    """`show` says so; of a folder, it lists the runs."""

    assert onlinerl("run", toy_config(tmp_path, iterations=1))[0] == 0
    bad = {
        **oracle(
            "1 / 0 if len(queries[0]['responses']) > 2 else None; return [[1.0, 2.0][:len(q['responses'])] for q in queries]"
        )
    }
    assert onlinerl("run", toy_config(tmp_path, {**bad, "name": "bad"}, iterations=1))[0] == FAILED
    manifest = tmp_path / "runs/gone/manifest.json"
    manifest.parent.mkdir()
    manifest.write_text(json.dumps({"name": "gone", "status": "running"}))  # and nobody holds its lock
    assert "finished" in shown(capsys, tmp_path / "runs/toy").splitlines()
    assert f"interrupted: its process is gone; continue with `onlinerl resume {tmp_path}/runs/gone`" in shown(
        capsys, manifest.parent
    )
    lines = shown(capsys, tmp_path / "runs").splitlines()
    assert [line.split()[:2] for line in lines] == [["bad", "failed:"], ["gone", "interrupted:"], ["toy", "finished"]]
    assert "oracle" in lines[0]


def shown(capsys, *arguments: object) -> str:
    """What `show` prints."""
    capsys.readouterr()
    sys.argv = ["onlinerl", "show", *map(str, arguments)]
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    return said.out


def test_a_damaged_run_is_listed_among_the_others(onlinerl, capsys, tmp_path):
    for name, manifest in {
        "a": "",
        "b": "{}",
        "c": json.dumps({"name": "c", "status": "finished"}),
    }.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "manifest.json").write_text(manifest)
    empty, lacking, whole = shown(capsys, tmp_path / "runs").splitlines()
    assert empty.startswith(f"a  damaged: {tmp_path}/runs/a/manifest.json is damaged or cannot be read: ")
    assert "restore the file from a backup" in empty
    assert lacking.startswith("b  damaged: ")
    assert "does not say the name and the status of the run" in lacking
    assert whole == "c  finished"
    states = json.loads(shown(capsys, tmp_path / "runs", "--json"))["runs"]
    assert list(states) == ["a", "b", "c"]
    code, message = onlinerl("show", tmp_path / "runs/b")
    assert code == REFUSED
    says(message, "store: runs: ", "does not say the name and the status of the run")


@pytest.mark.parametrize("key", ["runs", "model", "prompts.train"])
def test_a_path_in_the_home_of_nobody(toy_config, refused, tmp_path, key):
    says(
        refused(toy_config(tmp_path), f"{key}=~nobody-here/x"),
        f"config: {key}: ~nobody-here/x is in the home",
        "./~nobody-here/x",
    )


def test_a_directory_that_holds_other_files(toy_config, onlinerl, tmp_path):
    (tmp_path / "runs/toy").mkdir(parents=True)
    (tmp_path / "runs/toy/thesis.tex").write_text("x")
    code, message = onlinerl("run", toy_config(tmp_path))
    assert code == REFUSED
    says(message, "holds files but no run (thesis.tex)", "give the run another `name`")
    code, message = onlinerl("run", toy_config(tmp_path), "--fresh")
    assert code == REFUSED, message
    says(message, "holds files but no run (thesis.tex)", "give the run another `name`")
    assert (tmp_path / "runs/toy/thesis.tex").read_text() == "x"
    assert [path.name for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")] == ["toy"]


@pytest.mark.parametrize("place", ["file", "below a file", "system", "read-only"])
def test_an_unwritable_directory(toy_config, refused, tmp_path, place):
    (tmp_path / "file").write_text("x")
    (tmp_path / "closed").mkdir(mode=0o500)
    runs = {
        "file": tmp_path / "file",
        "below a file": tmp_path / "file/runs",
        "system": Path("/proc"),
        "read-only": tmp_path / "closed",
    }
    if place == "system" and not runs[place].is_dir():
        pytest.skip("this system has no /proc")
    if place == "read-only" and os.access(runs[place], os.W_OK):
        pytest.skip("this user may write everywhere")
    message = refused(toy_config(tmp_path, runs=str(runs[place])))
    says(message, "config: runs: ", "cannot be written", "choose another directory")


# --- resuming something else ---


def test_a_resume_with_a_change_that_matters(toy_config, onlinerl, tmp_path):
    assert onlinerl("run", toy_config(tmp_path, iterations=1))[0] == 0
    run = tmp_path / "runs/toy"
    code, message = onlinerl("resume", run, "iterations=2", "training.learning_rate=0.1", "seed=3")
    assert code == REFUSED
    says(
        message,
        "config: seed: was 0 when the run started and is now 3",
        "also changed: training.learning_rate",
        "start a new run",
    )
    stored = yaml.safe_load((run / "config.yaml").read_text())
    stored["algorithm"]["beta"] = 0.3
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    code, message = onlinerl("resume", run, "iterations=2")
    assert code == REFUSED
    says(message, "algorithm.beta: was 0.1 when the run started and is now 0.3")
    assert len(summarise(run)["iterations"]) == 2


def test_a_resume_of_a_configuration_that_was_edited(toy_config, onlinerl, tmp_path):
    """The error names the key and the file; what was valid before is valid again."""
    assert onlinerl("run", toy_config(tmp_path, iterations=1))[0] == 0
    file = tmp_path / "runs/toy/config.yaml"
    good = file.read_text()
    for text, parts in (
        (good + "momentum: 0.5\n", ("momentum: is not a known key", f"in {file}")),
        (
            good.replace("epochs: 1", "epochs: one"),
            ("training.epochs: input should be a valid integer, got 'one'", f"in {file}"),
        ),
        (good + "seed: 1\n", (f"seed: is given twice in {file}, in lines",)),
        (good + "  x: [\n", (f"{file} is not valid YAML",)),
        ("", (f"{file} does not hold a mapping",)),
    ):
        file.write_text(text)
        code, message = onlinerl("resume", tmp_path / "runs/toy", "iterations=2")
        assert code == REFUSED
        says(message, "config: ", *parts)
    file.unlink()
    code, message = onlinerl("resume", tmp_path / "runs/toy", "iterations=2")
    assert code == REFUSED
    says(message, f"{file} is gone", "copy the configuration there")
    file.write_text(good)
    assert onlinerl("resume", tmp_path / "runs/toy", "iterations=2")[0] == 0


def test_a_resume_by_a_version_with_other_keys(toy_config, onlinerl, tmp_path):
    """A run that was started before a key existed goes on; a key that is gone is named."""
    assert onlinerl("run", toy_config(tmp_path, iterations=1))[0] == 0
    run = tmp_path / "runs/toy"
    with directory.RunDirectory.open(run) as store:
        fingerprint = store.manifest["fingerprint"]
        older = {k: v for k, v in fingerprint.items() if k not in ("training.warmup_ratio", "algorithm.label_smoothing")}
        store.update_manifest(fingerprint=older)
    assert onlinerl("resume", run, "iterations=2")[0] == 0
    with directory.RunDirectory.open(run) as store:
        store.update_manifest(fingerprint={**fingerprint, "training.momentum": 0.5})
    code, message = onlinerl("resume", run, "iterations=3")
    assert code == REFUSED
    says(message, "training.momentum: was 0.5 when the run started, and this version has no such key")


def test_a_resume_of_a_run_whose_pairing_nothing_reads(toy_config, onlinerl, tmp_path):
    """An older version stored one with every run; whoever sets one now is told."""
    assert onlinerl("run", toy_config(tmp_path, {"algorithm.name": "grpo"}, iterations=1))[0] == 0
    run = tmp_path / "runs/toy"
    stored = run / "config.yaml"
    stored.write_text(stored.read_text() + "pairing: {name: best_worst, min_gap: 0.0}\n")
    with directory.RunDirectory.open(run) as store:
        store.update_manifest(
            fingerprint={**store.manifest["fingerprint"], "pairing.name": "best_worst", "pairing.min_gap": 0.0}
        )
    code, message = onlinerl("resume", run, "iterations=2", "pairing.name=ranked")
    assert code == REFUSED
    says(message, "pairing.", "is now 'ranked'")
    assert onlinerl("resume", run, "iterations=2")[0] == 0
    assert "pairing" not in stored.read_text()


@pytest.mark.parametrize(
    ("removed", "unfinished", "later"), [("0001", 1, 2), ("0000", 0, 1), ("0001/manifest.json", 1, 2), ("", 0, 1)]
)
def test_a_resume_of_a_run_of_which_something_was_removed(toy_config, onlinerl, tmp_path, removed, unfinished, later):
    """Iterations after a missing one came from weights that are no longer known."""
    assert onlinerl("run", toy_config(tmp_path, iterations=2))[0] == 0
    run = tmp_path / "runs/toy"
    gone = run / "iterations" / removed
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    code, message = onlinerl("resume", run, "iterations=3")
    assert code == REFUSED
    says(message, f"iteration {unfinished} is not finished, and there are results of iteration {later}", "rm -r ")


def test_a_resume_may_change_where_it_runs(toy_config, onlinerl, tmp_path):
    assert onlinerl("run", toy_config(tmp_path, iterations=1))[0] == 0
    code, message = onlinerl("resume", tmp_path / "runs/toy", "iterations=2", "checkpoints.keep=1", "engine.replicas=2")
    assert code == 0, message


def test_a_resume_stays_where_the_run_lies(toy_config, onlinerl, tmp_path):
    assert onlinerl("run", toy_config(tmp_path, iterations=1))[0] == 0
    run = tmp_path / "runs/toy"
    code, message = onlinerl("resume", run, f"runs={tmp_path}/elsewhere", "iterations=2")
    assert code == REFUSED
    says(
        message,
        f"config: runs: the run lies in {tmp_path}/runs and is resumed there, not in {tmp_path}/elsewhere",
        f"mv {run} {tmp_path}/elsewhere/ && onlinerl resume {tmp_path}/elsewhere/toy",
    )
    assert len(summarise(run)["iterations"]) == 2, "nothing was computed"
    assert onlinerl("resume", run, f"runs={tmp_path}/runs", "iterations=2")[0] == 0, "launchers may say where it lies"


def test_a_resume_says_which_figures_are_lost(toy_config, onlinerl, monkeypatch, capsys, tmp_path):
    assert onlinerl("run", toy_config(tmp_path, iterations=1))[0] == 0
    run, table = tmp_path / "runs/toy", summarise(tmp_path / "runs/toy")["iterations"]
    (run / "metrics.jsonl").unlink()
    monkeypatch.setattr(sys, "argv", ["onlinerl", "resume", str(run), "iterations=2"])
    with pytest.raises(SystemExit):
        command_line.main()
    assert f"{run}/metrics.jsonl is gone, and with it the figures of iterations 0, 1. " in capsys.readouterr().out
    assert summarise(run)["iterations"][:2] == table


def test_a_run_on_a_network_disk_says_so(toy_config, monkeypatch, capsys, tmp_path):
    (tmp_path / "mounts").write_text("22 1 0:35 / / rw,relatime - nfs4 server:/export rw,local_lock=flock\n")
    monkeypatch.setattr(mounts, "_MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(sys, "argv", ["onlinerl", "run", str(toy_config(tmp_path, iterations=1))])
    with pytest.raises(SystemExit):
        command_line.main()
    assert "is on nfs4, mounted with local_lock=flock: the lock of a run holds on this machine only" in capsys.readouterr().out


def test_a_resume_of_nothing(onlinerl, tmp_path):
    (tmp_path / "runs/other").mkdir(parents=True)
    (tmp_path / "runs/other/manifest.json").write_text("{}")
    code, message = onlinerl("resume", tmp_path / "runs/toy")
    assert code == REFUSED
    says(message, "store: name: ", "holds no run", "runs in", "other")
    code, message = onlinerl("scale", tmp_path / "runs/toy", "--replicas", "2")
    assert code == REFUSED
    says(message, "store: name: ", "holds no run", "check the path")


# --- oracles ---


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("raise RuntimeError('no credit left')", ("raised RuntimeError", "no credit left", "in judge", "repair the oracle")),
        ("return [[float('nan')] * len(q['responses']) for q in queries]", ("non_finite", "is nan", "repair the oracle")),
        ("return []", ("wrong_length", "returned 0 entries for 1 prompts")),
        ("return [[1.0] for q in queries]", ("wrong_length", "1 numbers for 2 responses")),
        ("return 'fine'", ("parse_fail", "returned str, not a list")),
        ("return [None for q in queries]", ("refused", "returned None")),
    ],
    ids=["raises", "nan", "no-entries", "short", "text", "none"],
)
def test_an_oracle_that_cannot_judge(toy_config, refused, oracle, tmp_path, body, parts):
    """Found out with one question, before anything is started."""
    says(refused(toy_config(tmp_path, oracle(body))), "error: oracle: oracle", *parts)


OPENED = """
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Failure, Verdict

OPEN = set()


class Opened(Oracle):
    fails: bool = False

    def open(self):
        OPEN.add(id(self))

    def close(self):
        OPEN.discard(id(self))

    @property
    def version(self):
        return "1"

    def judge(self, queries):
        said = Failure(kind="error", message="no") if self.fails else None
        return [said or Verdict(annotator="o", oracle_version="1", scores=(0.0,) * len(q.responses)) for q in queries]
"""


def test_an_oracle_is_closed_whatever_is_refused(toy_config, onlinerl, monkeypatch, tmp_path):
    """A notebook, or a sweep, goes on; so would processes that it has started."""
    (tmp_path / "opened.py").write_text(OPENED)
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = {"oracle.name": "opened.Opened", "iterations": 1}
    assert onlinerl("run", toy_config(tmp_path, {**keys, "oracle.fails": True}))[0] == REFUSED
    (tmp_path / "runs/toy").mkdir(parents=True)
    (tmp_path / "runs/toy/notes").write_text("")
    assert onlinerl("run", toy_config(tmp_path, keys))[0] == REFUSED
    sweep = {"base": "toy.yaml", "name": "both", "axes": {"seed": [0, 1], "oracle.groups_per_call": [1, 2]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert onlinerl("sweep", tmp_path / "sweep.yaml", "--check")[0] == 0
    assert set() == sys.modules["opened"].OPEN


def test_an_oracle_that_is_not_there(toy_config, refused, tmp_path):
    overrides = {"oracle.name": "python", "oracle.function": "no_such_module_at_all.judge"}
    says(refused(toy_config(tmp_path, overrides)), "oracle.function: cannot import 'no_such_module_at_all'", "PYTHONPATH=.")


def test_an_oracle_that_reads_the_command_line_when_it_is_imported(toy_config, refused, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    body = "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--data', required=True)\nparser.parse_args()\n"
    (tmp_path / "script.py").write_text(body)
    message = refused(toy_config(tmp_path, {"oracle.name": "python", "oracle.function": "script.judge"}))
    says(
        message[message.index("error: oracle: ") :],
        "oracle.function: cannot import 'script': SystemExit: 2",
        "script.py, line 4",
    )


SCORES = "[[len(r) for r in q['responses']] for q in queries]"


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (
            f"if calls > 2: raise RuntimeError('no credit left')\nreturn {SCORES}",
            ("8 of 8 groups (8 error)", "raised RuntimeError", "no credit left"),
        ),
        (
            f"return {SCORES} if calls < 3 else [[float('nan')] * 4 for q in queries]",
            ("the oracle failed on 8 of 8 groups (8 non_finite)", "max_failed_labels sets the limit"),
        ),
        (
            f"return {SCORES} if calls < 3 else [[1.0]] * 8",
            ("8 of 8 groups (8 wrong_length)", "verdicts already given are kept"),
        ),
        (
            f"return {SCORES} if calls < 3 else {SCORES}[1:]",
            ("8 of 8 groups (8 wrong_length)", "returned 7 entries for 8 prompts"),
        ),
    ],
    ids=["raises", "nan", "short", "missing-entry"],
)
def test_an_oracle_that_goes_wrong_later(toy_config, onlinerl, oracle, tmp_path, body, parts):
    """A clear stop of its own boundary; nothing was trained and all that was generated is kept."""
    code, message = onlinerl("run", toy_config(tmp_path, oracle(body)))
    assert code == FAILED
    says(message, "error: oracle: oracle", *parts)
    run = tmp_path / "runs/toy"
    failure = json.loads((run / "failure.json").read_text())
    assert failure["boundary"] == "oracle"
    assert list(summarise(run)["iterations"][-1]["phases"]) == ["sample"]
    assert summarise(run)["iterations"][-1]["status"] == "unfinished"


def test_a_few_failures_are_left_out(toy_config, onlinerl, oracle, tmp_path):
    """A failure below the limit is counted and trains nothing."""
    body = f"scores = {SCORES}\nif calls > 2 and len(scores) == 8: scores[0] = None\nreturn scores"
    code, message = onlinerl("run", toy_config(tmp_path, oracle(body), iterations=1, max_failed_labels=0.2))
    assert code == 0, message
    last = summarise(tmp_path / "runs/toy", extras=True)["iterations"][-1]
    assert last["oracle_failures"] >= 1


# --- the disk ---


def test_too_little_space(toy_config, onlinerl, monkeypatch, tmp_path):
    """Refused before anything of the checkpoint is written, and the run goes on when there is room."""
    config = toy_config(tmp_path, {"iterations": 1, "checkpoints.min_free_gib": 2.0})
    with monkeypatch.context() as patch:
        usage, at_the_start = shutil.disk_usage(tmp_path), iter([2**32])
        patch.setattr(directory.shutil, "disk_usage", lambda path: usage._replace(free=next(at_the_start, 2**30)))
        code, message = onlinerl("run", config)
    assert code == FAILED
    says(message, "store: checkpoints.min_free_gib: ", "has 1.00 GiB free", "2.00 GiB must stay free", "then resume")
    assert not list((tmp_path / "runs/toy").glob("*ports/0*"))
    assert onlinerl("resume", tmp_path / "runs/toy", "checkpoints.min_free_gib=0.0")[0] == 0


def test_too_little_space_for_the_first_checkpoint(toy_config, refused, monkeypatch, tmp_path):
    """Before anything is sampled for it."""
    usage = shutil.disk_usage(tmp_path)._replace(free=2**30)
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: usage)
    message = refused(toy_config(tmp_path, {"checkpoints.min_free_gib": 2.0}))
    says(message, "config: checkpoints.min_free_gib: ", "has 1.00 GiB free", "2.00 GiB must stay free", "free some space")
    assert "resume" not in message


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["journal", "checkpoint"])
def test_a_full_disk(toy_config, onlinerl, monkeypatch, tmp_path, where):
    """The message says what to do, what was finished stays readable, and a resume finishes the run."""
    config = toy_config(tmp_path, iterations=2)
    with monkeypatch.context() as patch:
        if where == "checkpoint":
            patch.setattr(ToyLearner, "save", full)
        else:
            writes, append = iter(range(1000)), _files.append
            patch.setattr(_files, "append", lambda p, d, at: append(p, d, at=at) if next(writes) < 30 else _no_room(p))
        code, message = onlinerl("run", config)
    assert code == FAILED
    says(message, "store: runs: the disk is full while writing", "free some space", "then resume")
    run = tmp_path / "runs/toy"
    assert summarise(run)["iterations"][0]["status"] == "promoted"
    assert onlinerl("resume", run)[0] == 0
    assert [row["status"] for row in summarise(run)["iterations"]] == ["promoted"] * 3


def _no_room(path: Path) -> None:
    with _files.explained(path):
        full()


# --- the cluster ---


def big(**sections):
    """A configuration that no machine of a test has room for."""
    base = {
        "name": "big",
        "model": "org/name-7B",
        "iterations": 1,
        "algorithm": {"name": "dpo"},
        "oracle": {"name": "sentiment"},
    }
    return configuration.parse({**base, "prompts": {"train": "a", "heldout": "b"}, **sections})


def test_more_than_the_cluster_has():
    """What is missing is said in numbers, per role."""
    config = big(
        engine={"replicas": 3, "tensor_parallel_size": 2, "cpus": 2, "resources": {"rollout_node": 1.0}},
        learner={"ranks": 4, "cpus": 1},
    )
    wanted = placement.plan(config, "cuda")
    error = placement.explain_missing(wanted, {"CPU": 64, "GPU": 8, "rollout_node": 3})
    assert error is not None
    assert error.field == "cluster"
    assert "10 GPU (there are 8)" in error.cause
    assert "CPU (there" not in error.cause
    assert "replica 2: 2 CPU, 2 GPU, 1 rollout_node" in error.cause
    assert "engine.replicas" in error.fix
    missing = placement.explain_missing(wanted, {"CPU": 4, "GPU": 16})
    assert missing is not None
    assert "10 CPU (there are 4)" in missing.cause
    assert "3 rollout_node (there are 0)" in missing.cause
    assert placement.explain_missing(wanted, {"CPU": 10, "GPU": 10, "rollout_node": 3}) is None
    assert {p.gpus for p in placement.plan(config, "cpu")} == {0}


def test_an_oracle_that_asks_for_no_cores_has_room_where_the_others_take_all_of_them():
    oracle = {"name": "reward_model", "path": "org/judge", "device": "cpu"}
    wanted = placement.plan(big(oracle=oracle, engine={"cpus": 1}, learner={"cpus": 1}), "cpu")
    assert placement.describe(wanted)[-1] == "oracle 0: nothing of its own"
    node = {"CPU": 2.0, "memory": 1e9}
    assert placement.explain_missing(wanted, node) is None
    assert placement.explain_unplaceable(wanted, [node]) is None
    assert all(amount > 0 for bundle in placement.bundles(wanted) for amount in bundle.values())


def test_a_split_replica_needs_one_node_with_all_its_gpus():
    """Eight GPUs in all are no room for four on one node."""
    wanted = placement.plan(big(engine={"tensor_parallel_size": 4, "cpus": 2}), "cuda")
    small, large = {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 4.0}
    error = placement.explain_unplaceable(wanted, [small] * 4)
    assert error is not None
    assert "replica 0: 2 CPU, 4 GPU" in error.cause
    assert "engine.tensor_parallel_size" in error.fix
    assert placement.explain_unplaceable(wanted, [small, large]) is None


def test_ranks_and_replicas_that_share_gpus_are_reserved_as_pairs():
    config = big(
        engine={"replicas": 2, "cpus": 2},
        learner={"ranks": 2, "cpus": 1, "resources": {"node_a": 0.5}},
        cluster={"colocate": True},
    )
    wanted = placement.plan(config, "cuda")
    assert placement.bundles(wanted) == [{"CPU": 3.0, "GPU": 1.0, "node_a": 0.5}] * 2
    assert [p.bundle for p in wanted] == [0, 1, 0, 1]
    assert {p.gpus for p in wanted} == {0.5}
    assert placement.describe(wanted)[1] == "learner rank 1 and replica 1: 3 CPU, 1 GPU, 0.5 node_a"


LINES = {
    "items": "items(self, judged, pairs)",
    "score": "score(self, sequence)",
    "prepare": "prepare(self, items, past=())",
    "figures": "figures(self, items, past=())",
    "loss": "loss(self, outputs, batch)",
}
WRONG_ITEMS = " instead of (list of TrainItem, {reason: number of items left out})"
WRONG_LOSS = " instead of a LossOutput whose `total` is a tensor without axes"


@pytest.mark.parametrize(
    ("method", "body", "cause"),
    [
        ("items", "return []", "Mine.items returned a value of type list" + WRONG_ITEMS),
        ("items", "return [1], {}", "Mine.items returned something else than TrainItems with sequences" + WRONG_ITEMS),
        ("items", "return [], ['short']", "Mine.items returned list ['short'] as second part" + WRONG_ITEMS),
        ("items", "raise KeyError('score')", "Mine.items failed for prompt 'p"),
        ("score", "return 1 / 0", "Mine.score failed: ZeroDivisionError: division by zero"),
        ("score", "return None", "Mine.score returned a value of type NoneType instead of a number"),
        ("prepare", "raise KeyError('score')", "Mine.prepare failed: KeyError: 'score'"),
        ("prepare", "return None", "Mine.prepare returned a value of type NoneType instead of items"),
        ("prepare", "return [1]", "Mine.prepare returned a int among its items instead of a TrainItem"),
        ("prepare", "return []", "Mine.prepare returned no item instead of what becomes of the "),
        ("prepare", "yield 1 / 0", "Mine.prepare failed: ZeroDivisionError: division by zero"),
        ("figures", "return {'a': 1 / 0}", "Mine.figures failed: ZeroDivisionError: division by zero"),
        ("figures", "return {'a': 'b'}", "Mine.figures returned dict {'a': 'b'} instead of {name: number}"),
        ("loss", "raise KeyError('score')", "Mine.loss failed: KeyError: 'score'"),
        ("loss", "return 1.0", "Mine.loss returned a value of type float" + WRONG_LOSS),
        ("loss", "return outputs.logprobs_BT.sum(1)", "Mine.loss returned a tensor of shape ["),
        ("loss", "return LossOutput(total=outputs.logprobs_BT.sum(1))", "a LossOutput whose `total` is a tensor of shape ["),
        (
            "loss",
            "return LossOutput(total=outputs.logprobs_BT.sum().detach())",
            "Mine.loss returned a `total` without gradient",
        ),
        ("loss", "return LossOutput(total=outputs.logprobs_BT.sum() * float('nan'))", "before the first step the loss is nan"),
    ],
)
def test_an_algorithm_of_the_users_own_that_fails(toy_config, warm_cli, tmp_path, method, body, cause):
    """Its error is theirs, with the file and line, and the run can go on when it is corrected."""
    head = "from onlinerl.algorithms.dpo import Dpo\nfrom onlinerl.loss import LossOutput\n\n\nclass Mine(Dpo):\n"
    head += "    loss_at_reference = None\n"
    (tmp_path / "mine.py").write_text(f"{head}    def {LINES[method]}:\n        {body}\n")
    config = toy_config(tmp_path, {"algorithm.name": "mine.Mine", "iterations": 1})
    failed = warm_cli("run", config)
    assert failed.returncode == FAILED, failed.message
    says(failed.stderr, "algorithm.name: ", cause)
    if "Mine." in cause:
        line = 8 if "failed" in cause else 7  # where it was raised, or where what returned begins
        says(failed.stderr, f"mine.py, line {line}")
    assert "Traceback" not in failed.message
    (tmp_path / "mine.py").write_text(head)
    assert warm_cli("resume", tmp_path / "runs/toy").returncode == 0


@pytest.mark.parametrize(
    ("algorithm", "score", "cause"),
    [
        ("grpo", "1e308", "training cannot begin"),  # the spread is infinite, and so all advantages would be 0
        ("ppo", "1e308", "training cannot begin"),
    ],
)
def test_scores_that_overflow(toy_config, warm_cli, tmp_path, algorithm, score, cause):
    (tmp_path / "huge.py").write_text(
        f"def judge(queries):\n    return [[(-1) ** i * {score} for i, _ in enumerate(q['responses'])] for q in queries]\n"
    )
    own = {"oracle.name": "python", "oracle.function": "huge.judge", "algorithm.name": algorithm, "iterations": 1}
    failed = warm_cli("run", toy_config(tmp_path, own))
    assert failed.returncode == FAILED, failed.message
    says(failed.stderr[failed.stderr.index("error: ") :], f"oracle: {cause}", f"scores as large as {float(score):.3g} overflow")
