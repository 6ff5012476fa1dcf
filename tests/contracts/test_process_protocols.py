"""Every engine and learner that runs on the cluster has all that the cluster calls on a process of it, with the same signatures."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable

import pytest

from onlinerl import registry
from onlinerl.config.roles import ROLES, build
from onlinerl.protocols.engine import EngineReplica
from onlinerl.protocols.learner import LearnerRank

PROTOCOLS = {"engine": ("replica", EngineReplica), "learner": ("rank", LearnerRank)}
FOUND = [
    (section, name)
    for section in PROTOCOLS
    for name in registry.names(ROLES[section].folder)
    if not build({"name": name}, section).in_process
]


def methods(protocol: type) -> dict[str, Callable[..., object]]:
    """What it asks for."""
    return {name: method for name, method in vars(protocol).items() if inspect.isfunction(method) and name[0] != "_"}


def process_class(section: str, name: str) -> type:
    """What this engine or learner says a process of it becomes."""
    maker, _ = PROTOCOLS[section]
    said = inspect.signature(getattr(build({"name": name}, section), maker)).return_annotation
    package = importlib.import_module(f"onlinerl.{ROLES[section].folder}.{name}")
    inside = pkgutil.walk_packages(getattr(package, "__path__", ()), f"{package.__name__}.")
    modules = [package, *(importlib.import_module(module.name) for module in inside)]
    return next(vars(module)[said] for module in modules if said in vars(module))


def differences(cls: type, protocol: type) -> list[str]:
    """Methods that are missing, or are called in another way."""
    found = []
    for name, wanted in methods(protocol).items():
        method = getattr(cls, name, None)
        if method is None:
            found.append(f"{name} is missing")
        elif inspect.iscoroutinefunction(method) != inspect.iscoroutinefunction(wanted):
            found.append(f"{name} is not awaited like the protocol's")
        elif inspect.signature(method) != inspect.signature(wanted):
            found.append(f"{name}{inspect.signature(method)} is not {inspect.signature(wanted)}")
    return found


def test_there_are_some():
    assert {("engine", "vllm"), ("engine", "openai"), ("learner", "deepspeed"), ("learner", "torch")} <= set(FOUND)
    assert {"generate", "watch", "load_weights", "update_weights", "process_ids", "shutdown"} <= set(methods(EngineReplica))
    assert {"step", "save", "open_sync", "send_weights", "offload", "shutdown"} <= set(methods(LearnerRank))


@pytest.mark.parametrize(("section", "name"), FOUND)
def test_it_has_all_of_them(section, name):
    assert differences(process_class(section, name), PROTOCOLS[section][1]) == []


def test_a_difference_would_be_noticed():
    complete = process_class("engine", "openai")

    class Other(complete):
        watch = None

        def shutdown(self) -> None: ...

        async def load_weights(self, path: str, version: int) -> None: ...

    found = [each.split("(")[0].split()[0] for each in differences(Other, EngineReplica)]
    assert found == ["load_weights", "watch", "shutdown"]


def test_the_guide_names_all_that_is_called_on_a_replica():
    from documents import ROOT

    guide = (ROOT / "docs/add-an-engine.md").read_text()
    assert [name for name in methods(EngineReplica) if f"`{name}" not in guide] == []
