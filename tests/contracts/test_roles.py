"""What every engine, learner and tracker says of itself, found by name."""

from __future__ import annotations

import inspect

import pytest

from onlinerl import hardware, registry
from onlinerl.algorithms.dpo import Dpo
from onlinerl.config.roles import ROLES, build
from onlinerl.engines.toy import ToyEngine
from onlinerl.errors import ConfigError
from onlinerl.learners.toy import Toy
from onlinerl.protocols.engine import EngineConfig, InProcessEngine
from onlinerl.protocols.learner import InProcessLearner, LearnerConfig

FOUND = [
    (section, name) for section in ("engine", "learner", "prompts", "tracker") for name in registry.names(ROLES[section].folder)
]
NEEDED = {"prompts": {"train": "a", "heldout": "b"}}
LEARNERS = [name for section, name in FOUND if section == "learner"]
ENGINES = [name for section, name in FOUND if section == "engine"]


def test_what_is_there_is_found():
    assert {("engine", "vllm"), ("learner", "deepspeed"), ("learner", "torch"), ("tracker", "prometheus")} <= set(FOUND)


@pytest.mark.parametrize(("section", "name"), FOUND)
def test_the_name_chooses_it_and_it_knows_its_name(section, name):
    part = build({"name": name, **NEEDED.get(section, {})}, section)
    assert part.name == type(part)(**NEEDED.get(section, {})).name == name
    assert (inspect.getdoc(type(part)) or "").endswith(".")
    with pytest.raises(ConfigError, match=r"no_such_key: is not a known key") as error:
        build({"name": name, "no_such_key": 1, **NEEDED.get(section, {})}, section)
    assert error.value.fix


@pytest.mark.parametrize(("section", "name"), FOUND)
def test_it_has_every_method_that_its_kind_is_asked_for(section, name):
    """What only raises NotImplementedError in the base class is what an implementation must say."""
    part = type(build({"name": name, **NEEDED.get(section, {})}, section))
    base = next(c for c in part.__mro__ if c in (InProcessEngine, InProcessLearner) or c is ROLES[section].base)
    in_process = base in (InProcessEngine, InProcessLearner)
    wanted = {
        method
        for method, function in vars(base).items()
        if inspect.isfunction(function) and "NotImplementedError" in inspect.getsource(function)
    }
    assert wanted
    assert {method for method in wanted if getattr(part, method) is getattr(base, method)} == set()
    assert getattr(part, "in_process", in_process) == in_process


def test_a_learner_refuses_an_engine_that_cannot_take_its_weights():
    learner = Toy()
    opened = learner.open(4, Dpo(), "base", 1.0)
    assert learner.connect(opened, ToyEngine(4, str)).push(1).proved
    with pytest.raises(ConfigError, match="`logits` and `load`, and object has not") as error:
        learner.connect(opened, object())
    assert error.value.field == "engine.name"


@pytest.mark.parametrize("name", LEARNERS)
def test_memory_of_a_learner_grows_with_the_model_and_its_critic(name):
    learner = build({"name": name}, "learner")
    assert isinstance(learner, LearnerConfig)
    if learner.in_process:
        return
    small, large = (sum(learner.memory(n).values()) for n in (1e8, 1e9))
    assert large > 5 * small > 0
    assert sum(learner.memory(1e9, critic=1e9).values()) > large
    assert learner.dtype in learner.layout


@pytest.mark.parametrize("name", [*ENGINES, *LEARNERS])
def test_what_processes_are_started_with(name):
    section = "engine" if name in ENGINES else "learner"
    part = build({"name": name}, section)
    if part.in_process:
        return
    env = part.environment() if isinstance(part, EngineConfig) else part.environment("cpu", 3)
    assert env["ONLINERL_DIE_WITH_PARENT"] == "1"
    if not isinstance(part, EngineConfig):
        on_cpu = {"OMP_NUM_THREADS": "3", **hardware.keeping_memory()}
        assert env.items() >= on_cpu.items()
        assert not part.environment("cuda", 3).keys() & on_cpu.keys()
