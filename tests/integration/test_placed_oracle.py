"""An oracle with weights on a real Ray cluster: room of its own, replicas that judge at the same time, and what happens when one fails."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from pydantic import PrivateAttr

from onlinerl import config as configuration
from onlinerl import hardware, placement
from onlinerl.controller.asking import answers
from onlinerl.errors import OracleError
from onlinerl.protocols.oracle import ModelOracle
from onlinerl.types import Failure, Prompt, Query, Verdict

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


class Moody(ModelOracle):
    """Says in which process it was asked; raises, or dies, when a response asks for it."""

    def inspect(self) -> None:
        """Nothing to read."""

    @property
    def version(self) -> str:
        return "1"

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        for query in queries:
            if query.responses[0] == "raise":
                raise KeyError("score")
            if query.responses[0] == "die":
                os._exit(1)
        return [Verdict(annotator=str(os.getpid()), oracle_version="1", scores=(1.0,)) for _ in queries]


class Worn(Moody):
    """Its version is that of the weights that it was given last."""

    _weights: str = PrivateAttr("1")

    def reload(self, path: str) -> None:
        self._weights = path

    @property
    def version(self) -> str:
        return self._weights

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        return [Verdict(annotator=str(os.getpid()), oracle_version=self._weights, scores=(1.0,)) for _ in queries]


def queries(*responses: str) -> list[Query]:
    return [Query(prompt=Prompt(id=f"p{i}", text="x", token_ids=(1,)), responses=(r,)) for i, r in enumerate(responses)]


def ask(oracle, asked: list[Query]) -> list[Verdict | Failure]:
    """The results in the order of what was asked: the replicas may answer in another one."""
    results = {query.prompt.id: result for arrived in answers(oracle, asked) for query, result in arrived}
    assert len(results) == len(asked)
    return [results[query.prompt.id] for query in asked]


@pytest.fixture(scope="module")
def config(tiny_llama: Path) -> configuration.RunConfig:
    """Two replicas of an oracle; room for engine and learner is reserved, but they are not started."""
    return configuration.parse(
        {
            "name": "run",
            "model": str(tiny_llama),
            "iterations": 1,
            "algorithm": {"name": "dpo"},
            "oracle": {
                "name": f"{__name__}.Moody",
                "replicas": 2,
                "cpus": 1,
                "groups_per_call": 3,
                "retries": 0,
                "preference_temperature": 0.5,
            },
            "prompts": {"train": "unused", "heldout": "unused"},
            "engine": {"cpus": 0},
            "learner": {"cpus": 0},
            "cluster": {"device": "cpu"},
        }
    )


@pytest.fixture(scope="module")
def cluster(config) -> Iterator[object]:
    from onlinerl.cluster.runtime import Cluster

    # Engine and learner have all cores, as they do by default on a machine with two; the oracle asks for none, and there is room for it.
    cores = len(os.sched_getaffinity(0))
    update = {
        "oracle": {**config.oracle, "cpus": 0},
        "engine": config.engine.model_copy(update={"cpus": cores - 1}),
        "learner": config.learner.model_copy(update={"cpus": 1}),
    }
    with Cluster(config.model_copy(update=update)) as started:
        yield started


@pytest.fixture
def placed(cluster, config) -> Iterator[object]:
    from onlinerl.cluster.oracle import PlacedOracle

    oracle = PlacedOracle.start(cluster, 2, configuration.oracle(config))
    oracle.open()
    yield oracle
    oracle.close()


def test_room_is_reserved_for_each_replica(config):
    roles = {p.role: (p.cpus, p.gpus) for p in placement.plan(config, "cpu") if p.role.startswith("oracle")}
    assert roles == {"oracle 0": (1, 0), "oracle 1": (1, 0)}
    assert [p.gpus for p in placement.plan(config, "cuda") if p.role.startswith("oracle")] == [1, 1]
    short = placement.explain_missing(placement.plan(config, "cpu"), {"CPU": 1})
    assert "the run needs 2" in str(short)
    assert "oracle.replicas" in str(short)


def test_both_replicas_judge(placed):
    results = ask(placed, queries(*"abcdefgh"))
    processes = [result.annotator for result in results]
    assert len(set(processes)) == 2
    assert os.getpid() not in map(int, processes), "not in the controller"
    kept = hardware.keeping_memory().items()
    assert all(psutil.Process(int(process)).environ().items() >= kept for process in processes)
    assert processes[0:3] == [processes[0]] * 3, "a call stays together"
    assert processes[3:6] == [processes[3]] * 3
    assert placed.version == "1"
    assert {result.temperature for result in results} == {0.5}


def test_every_replica_takes_on_other_weights_and_the_version_is_theirs(cluster, config):
    from onlinerl.cluster.oracle import PlacedOracle

    oracle = PlacedOracle.start(cluster, 2, Worn(replicas=2, groups_per_call=1, device="cpu"))
    oracle.open()
    try:
        assert oracle.version == "1"
        oracle.reload("2")
        assert oracle.version == "2"
        results = ask(oracle, queries(*"abcdefgh"))
        assert {result.oracle_version for result in results} == {"2"}
        assert len({result.annotator for result in results}) == 2
    finally:
        oracle.close()


def test_an_oracle_inside_another_one_runs_where_it_was_placed(cluster, config):
    """The others stay with the controller, and the call limits of the one with weights are kept."""
    from onlinerl.cluster.oracle import placed

    members = {"moody": config.oracle, "tone": {"name": "sentiment"}}
    composite = configuration.parse({**config.model_dump(mode="json"), "oracle": {"name": "composite", "members": members}})
    oracle = placed(cluster, 2, configuration.oracle(composite))
    oracle.open()
    try:
        results = ask(oracle, queries(" good", " bad", " good"))
        assert [type(each) for each in results] == [Verdict] * 3
        assert [result.components["moody"] for result in results] == [(1.0,)] * 3
        assert results[0].scores[0] > results[1].scores[0]
        with pytest.raises(OracleError) as error:
            ask(oracle, queries("die"))
        assert error.value.field is None or error.value.field.startswith("oracle")
    finally:
        oracle.close()


def test_an_exception_costs_the_groups_that_came_with_it(placed):
    results = ask(placed, queries("a", "b", "c", "d", "raise", "f", "g"))
    assert [isinstance(result, Verdict) for result in results] == [True] * 3 + [False] * 3 + [True]
    assert "KeyError" in results[4].message


def test_a_replica_that_dies_is_named(placed):
    with pytest.raises(OracleError, match=r"oracle \d: its process died during judging"):
        ask(placed, queries("die", "b"))
