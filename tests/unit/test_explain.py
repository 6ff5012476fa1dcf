"""What a user who knows other trainers gets told, and what a value that is refused should have been."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from onlinerl import config as configuration
from onlinerl import registry, synonyms, yaml_files
from onlinerl.config import RunConfig
from onlinerl.config.loading import CHOICES
from onlinerl.errors import ConfigError, OracleError
from onlinerl.oracles.composite import Composite
from onlinerl.prompts.dataset import Column, Dataset
from onlinerl.protocols.adapters import LoraConfig
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.oracle import Oracle

BASE: dict[str, Any] = {
    "name": "demo",
    "model": "org/name-7B",
    "iterations": 3,
    "algorithm": {"name": "dpo"},
    "oracle": {"name": "sentiment"},
    "prompts": {"train": "a.jsonl", "heldout": "b.jsonl"},
}


def refused(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        parse(overrides)
    return error.value


def parse(overrides: Sequence[str]) -> RunConfig:
    tree = copy.deepcopy(BASE)
    for override in overrides:
        yaml_files.override(tree, override, CHOICES)
    return configuration.parse(tree)


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("training.lr=1e-5", "'learning_rate'"),
        ("training.learning-rate=1e-5", "'learning_rate'"),
        ("training.train_batch_size=8", "'batch_size'"),
        ("batch_size=8", "training.batch_size"),
        ("training.num_train_epochs=2", "'epochs'"),
        ("learner.micro_batch_size=2", "'tokens_per_microbatch'"),
        ("sampling.n=8", "'samples_per_prompt'"),
        ("num_generations=8", "sampling.samples_per_prompt"),
        ("sampling.max_tokens=99", "'max_new_tokens'"),
        ("prompts.max_length=99", "'max_tokens'"),
        ("engine.tp=2", "'tensor_parallel_size'"),
        ("engine.num_engines=2", "'replicas'"),
        ("learner.zero=3", "'zero_stage'"),
        ("learner.world_size=2", "'ranks'"),
        ("attn_implementation=eager", "learner.attn_implementation"),
        ("warmup_ratio=0.1", "training.warmup_ratio"),
        ("dtype=float32", "engine.dtype or learner.dtype"),
        ("output_dir=x", "'runs'"),
        ("model_name_or_path=x", "'model'"),
        ("dataset=x", "prompts.train"),
        ("reward_model=x", "oracle.path, with oracle.name=reward_model"),
        ("training.sync_ref_model=true", "reference.schedule"),
        ("ref_model_mixup_alpha=0.5", "reference.mixup_alpha, with reference.schedule=ema"),
        ("reference.ref_model_mixup_alpha=0.5", "'mixup_alpha'"),
        ("algorithm.ref_model_sync_steps=2", "reference.every, in iterations"),
        ("rollout.n=8", "'engine'"),
        ("algorithm.kl_coef=0.1", "'beta'"),
        ("algorithm={name: ppo, beta: 0.1}", "'kl_coef'"),
        ("algorithm={name: ppo, cliprange_value: 0.1}", "'clip_range_value'"),
        ("algorithm={name: ppo, cliprange: 0.1}", "'clip_range'"),
        ("algorithm={name: grpo, clip_range: 0.1}", "'clip_range_low'"),
        ("algorithm={name: grpo, clip: 0.1}", "'clip_range_low'"),
        ("prompts.input_key=question", "did you mean prompts.columns.prompt, with prompts.name=dataset?"),
        ("prompts.prompt_key=prompt", "did you mean prompts.columns.prompt, with prompts.name=dataset?"),
    ],
)
def test_a_key_of_another_trainer(override, fix):
    error = refused(override)
    assert error.cause == "is not a known key"
    assert fix in error.fix


def test_every_suggested_key_exists():
    flat = configuration.flatten(configuration.parse(BASE).model_dump()) | dict.fromkeys(RunConfig.model_fields)
    knobs = {k for name in ("ppo", "grpo", "dpo") for k in registry.load("algorithms", name, Algorithm).model_fields}
    published = {*(f"prompts.{k}" for k in Dataset.model_fields), *(f"prompts.columns.{k}" for k in get_args(Column))}
    adapters = {f"learner.lora.{k}" for k in LoraConfig.model_fields}
    known = {
        *flat,
        *(f"algorithm.{k}" for k in knobs),
        "oracle.path",
        *published,
        *adapters,
        *(f"oracle.{k}" for k in Composite.model_fields),
    }
    for key in synonyms.KEYS.values():
        assert set(key.partition(",")[0].split(" or ")) <= known, key
    names = {name for role in ("algorithms", "oracles", "pairing") for name in registry.names(role)}
    assert set(synonyms.NAMES.values()) <= names


@pytest.mark.parametrize(
    ("override", "field", "fix"),
    [
        ("algorithm=grpo", "algorithm", "write algorithm.name=grpo"),
        ("oracle=math", "oracle", "write oracle.name=math_verifier"),
        ("pairing=ranked", "pairing", "write pairing.name=ranked"),
        ("engine=vllm", "engine", "write engine.name=vllm"),
        ("learner=deepspeed", "learner", "write learner.name=deepspeed"),
        ("sync=disk", "sync", "write sync.backend=disk"),
        ("sync.backend=glo", "sync.backend", "did you mean 'gloo'?"),
        ("sampling=greedy", "sampling", "write sampling.KEY=VALUE, KEY one of samples_per_prompt, temperature"),
        ("algorithm.name=GRPO", "algorithm.name", "did you mean 'grpo'?"),
        ("algorithm.name=online_dpo", "algorithm.name", "did you mean 'dpo'?"),
        ("algorithm.name=Online-IPO", "algorithm.name", "did you mean 'ipo'?"),
        ("oracle.name=math", "oracle.name", "did you mean 'math_verifier'?"),
        ("learner.zero_stage=4", "learner.zero_stage", "give one of 0, 1, 2, 3"),
        ("reference.schedule=always", "reference.schedule", "give one of default, fixed, previous, every_n, ema, none"),
        ("reference.mixup_alpha=0", "reference.mixup_alpha", "give a number above 0 and up to 1"),
        ("iterations=four", "iterations", "give a whole number from 1"),
        ("sampling.top_p=2", "sampling.top_p", "give a number above 0 and up to 1"),
        ("prompts.reuse=maybe", "prompts.reuse", "give true or false"),
        ("engine.threads=0", "engine.threads", "give a whole number from 1, or null"),
        ("sync.timeout_s=0", "sync.timeout_s", "give a number above 0 and up to 1000000.0"),
        ("algorithm.beta=0", "algorithm.beta", "give a number above 0"),
        ("name=a/b", "name", "e.g. my-run"),
        (
            "oracle.name=python",
            "oracle.function",
            "write oracle.function=FILE.py:FUNCTION or MODULE.FUNCTION, e.g. brevity.py:judge",
        ),
        (
            "oracle={name: python, function: judge}",
            "oracle.function",
            "write FILE.py:FUNCTION or MODULE.FUNCTION, e.g. brevity.py:judge",
        ),
        (
            "oracle={name: python, function: ../my/brevity.py}",
            "oracle.function",
            "write FILE.py:FUNCTION or MODULE.FUNCTION, e.g. brevity.py:judge",
        ),
        ("pairing.name=floor_margin", "pairing.floor", "add `floor: ...` with a number"),
        ("--iterations=2", "override", "write keys without dashes, iterations=2"),
        ("--learning-rate", "override", "write keys without dashes, learning_rate=VALUE"),
    ],
)
def test_what_a_value_should_be(override, field, fix):
    error = refused(override)
    assert error.field == field
    assert fix in error.fix


MODULES = {
    "untyped": "from onlinerl.protocols.oracle import Oracle\nclass Mine(Oracle):\n    word = 'good'\n",
    "undefined": "limit = LIMIT\n",
    "unfinished": "class Mine(:\n",
    "constructor": "from onlinerl.protocols.oracle import Oracle\n"
    "class Mine(Oracle):\n    def __init__(self):\n        self.word = 'good'\n",
    "state": "from onlinerl.protocols.oracle import Oracle\nclass Mine(Oracle):\n    def open(self):\n        self.client = 1\n",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    for name, code in MODULES.items():
        (tmp_path / f"mine_{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "cause", "fix"),
    [
        (
            "untyped",
            "`word = 'good'` has no type\n  in {folder}/mine_untyped.py, line 2",
            "write `word: str = 'good'` for a knob",
        ),
        (
            "undefined",
            "NameError: name 'LIMIT' is not defined\n  in {folder}/mine_undefined.py, line 1: limit = LIMIT",
            "correct",
        ),
        (
            "unfinished",
            "SyntaxError: invalid syntax\n  in {folder}/mine_unfinished.py, line 1: class Mine(",
            "correct the error",
        ),
        ("constructor", "has an `__init__`", "set other state in `open`"),
    ],
)
def test_a_class_of_the_users_own(modules, name, cause, fix):
    error = refused(f"oracle.name=mine_{name}.Mine")
    assert error.field == "oracle.name"
    assert cause.format(folder=modules) in error.cause
    assert fix in error.fix


def test_state_that_is_no_knob(modules):
    oracle = registry.load("oracles", "mine_state.Mine", Oracle)()
    with pytest.raises(OracleError, match=r"Mine sets `self\.client`, which is no knob") as error:
        oracle.open()
    assert "`_client: Any = PrivateAttr(None)`" in error.value.fix


def imports(folder: Path, **files: str) -> OracleError:
    """What is said of `brevity.py:judge` among these files."""
    for name, code in files.items():
        (folder / f"{name}.py").write_text(code)
    oracle = registry.load("oracles", "python", Oracle)(function=f"{folder}/brevity.py:judge")
    with pytest.raises(OracleError) as error:
        oracle.open()
    assert error.value.field == "oracle.function"
    return error.value


def test_a_file_that_cannot_be_imported_is_shown_with_the_lines_to_blame(tmp_path):
    found = imports(tmp_path, brevity="import math\n\nLIMIT = math.sqroot(4)\n\ndef judge(groups):\n    return []\n")
    file = tmp_path / "brevity.py"
    said = "AttributeError: module 'math' has no attribute 'sqroot'"
    assert found.cause == f"cannot import '{file}': {said}\n  in {file}, line 3: LIMIT = math.sqroot(4)"
    found = imports(tmp_path, brevity="def judge(groups:\n    return []\n")
    assert found.cause.startswith(f"cannot import '{file}': SyntaxError: ")
    assert found.cause.splitlines()[1:] == [f"  in {file}, line 1: def judge(groups:"]


def test_a_traceback_has_three_lines_at_most(tmp_path):
    """It begins in the file that was named, and ends at the statement that raised."""
    helper = "def half(n):\n    return 1 / n if n == 0 else half(n - 1)\n"
    found = imports(tmp_path, brevity="import brevity_helper\nHALF = brevity_helper.half(5)\n", brevity_helper=helper)
    first, *trace = found.cause.splitlines()
    assert first == f"cannot import '{tmp_path}/brevity.py': ZeroDivisionError: division by zero"
    statement = "return 1 / n if n == 0 else half(n - 1)"
    assert trace == [
        f"  in {tmp_path}/brevity.py, line 2: HALF = brevity_helper.half(5)",
        f"  in {tmp_path}/brevity_helper.py, line 2: {statement}",
        f"  in {tmp_path}/brevity_helper.py, line 2: {statement}",
    ]
    found = imports(tmp_path, brevity="import brevity_broken\n", brevity_broken="x = = 1\n")
    assert found.cause.splitlines()[1:] == [
        f"  in {tmp_path}/brevity.py, line 1: import brevity_broken",
        f"  in {tmp_path}/brevity_broken.py, line 1: x = = 1",
    ]


def test_a_module_that_is_not_there_takes_one_line():
    oracle = registry.load("oracles", "python", Oracle)(function="no_such_module.judge")
    with pytest.raises(OracleError, match="cannot import 'no_such_module'") as error:
        oracle.open()
    assert "\n" not in error.value.cause
    assert "PYTHONPATH=." in error.value.fix
