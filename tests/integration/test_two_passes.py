"""Two passes with auxiliary weights on the real torch learner, with adapters too: each is the ordinary regression, against what it starts
from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from onlinerl import config as configuration
from onlinerl.algorithms.ipo import Ipo
from onlinerl.algorithms.onpo import Onpo
from onlinerl.config import RunConfig
from onlinerl.controller.iteration import Iteration, Weights
from onlinerl.controller.parts import Parts, learning_rates
from onlinerl.controller.phases import train
from onlinerl.controller.report import Reporter
from onlinerl.learners._self_test import combine
from onlinerl.learners.torch import Torch
from onlinerl.learners.torch.rank import TorchRank
from onlinerl.ops.schedule import schedule
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.learner import RankSettings
from onlinerl.protocols.tracker import Tracker
from onlinerl.stores.directory import RunDirectory
from onlinerl.types import SelfTest, TrainItem, TrainSequence, UpdateReport, derive_seed

pytestmark = pytest.mark.engine

ETA = 2.0
QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


class Quiet(Tracker):
    """Tells nobody."""


class Alone:
    """One rank as a learner of its own; counts what it was asked."""

    def __init__(self, rank: TorchRank) -> None:
        self.rank = rank
        self.trained: list[list[TrainItem]] = []
        """The items of each pass."""

    def logprobs(self, sequences: Sequence[TrainSequence], *, model: str, temperature: float) -> list[np.ndarray]:
        (arrays,) = self.rank.logprobs([list(sequences)], model, temperature)
        return arrays

    def update(self, steps: Sequence[Sequence[TrainItem]], learning_rates: Sequence[float]) -> Iterator[UpdateReport]:
        self.trained.append([item for items in steps for item in items])
        for items, rate in zip(steps, learning_rates, strict=True):
            metrics = self.rank.step([list(items)], len(items), rate)
            yield UpdateReport(steps=1, tokens=1, metrics=(metrics,), skipped=int(metrics["skipped"]))

    def self_test(self, items: Sequence[TrainItem], base_model: str) -> SelfTest:
        return combine(self.rank.self_test([list(items)], base_model), items, self.rank.algorithm)

    def save(self, path: Path) -> dict[str, int]:
        return self.rank.save(str(path))

    def load(self, path: Path) -> None:
        self.rank.load(str(path))

    def weights(self) -> dict[str, np.ndarray]:
        return {name: tensor.detach().numpy().copy() for name, tensor in self.rank.weight_source(torch.float32)}


@pytest.fixture(params=[None, {"rank": 4, "alpha": 64.0, "dropout": 0.1}], ids=["weights", "adapters"])
def learner(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes learners for an algorithm, all in this process, which is the only rank."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    once = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **more: None if dist.is_initialized() else once(*a, **more))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)

    def make(config: RunConfig, algorithm: Algorithm) -> Alone:
        settings = RankSettings(
            model=str(tiny_llama),
            algorithm=algorithm,
            training=config.training,
            world_size=1,
            device="cpu",
            temperature=1.0,
            seed=0,
        )
        return Alone(Torch(dtype="float32", lora=request.param).rank(settings, rank=0, store=store, address="127.0.0.1"))

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> RunConfig:
    overrides = [
        f"model={tiny_llama}",
        f"runs={tmp_path}",
        "learner.name=torch",
        "learner.dtype=float32",
        "training.batch_size=4",
        "training.learning_rate=0.001",
        "training.lr_scheduler_type=linear",
        "checkpoints.min_free_gib=0.0",
    ]
    return configuration.load(QUICKSTART, overrides)


@pytest.fixture
def iteration(config: RunConfig, tiny_llama: Path, tmp_path: Path) -> Iterator[Any]:
    """Makes an iteration of a run that trains `onpo`, for a learner."""
    with RunDirectory.create(tmp_path / "run", config_yaml="", manifest={"name": "r", "fingerprint": {}}) as store:
        made: list[Iteration] = []

        def make(number: int, learner: Alone) -> Iteration:
            nothing: dict[str, Any] = {f.name: None for f in dataclasses.fields(Parts) if f.default is dataclasses.MISSING}
            here = {"config": config, "algorithm": learner.rank.algorithm, "learner": learner, "store": store}
            parts = Parts(**nothing | here | {"tracker": Quiet(), "base_model": str(tiny_llama)})
            made.append(Iteration(parts, number, Weights(), Reporter(parts.tracker)))
            return made[-1]

        yield make
        for one in made:
            one.files.close()


def pairs(seed: int) -> list[TrainItem]:
    """Seven of random tokens, without any log-probs."""
    rng = np.random.default_rng(seed)

    def response() -> TrainSequence:
        prompt, answer = (tuple(map(int, rng.integers(4, 120, rng.integers(3, 9)))) for _ in range(2))
        return TrainSequence(prompt_ids=prompt, response_ids=answer)

    return [TrainItem(prompt_id=str(n), sequences=(response(), response()), prob=0.75) for n in range(7)]


def against(learner: Alone, items: list[TrainItem]) -> list[TrainItem]:
    """The items with what the weights of the moment say."""
    said = iter(learner.logprobs([s for item in items for s in item.sequences], model="policy", temperature=1.0))
    return [
        dataclasses.replace(item, sequences=tuple(s.with_(reference_logprobs=next(said)) for s in item.sequences))
        for item in items
    ]


def regression(learner: Alone, config: RunConfig, number: int, items: list[TrainItem]) -> None:
    """One pass of an ordinary loss on pairs, as any iteration trains it."""
    known = against(learner, items)
    steps = schedule(len(items), config.training.batch_size, config.training.epochs, derive_seed(config.seed, "steps", number))
    list(learner.update([[known[i] for i in step] for step in steps], learning_rates(config.training, number, len(steps))))


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


def test_a_pass_is_the_ordinary_regression(learner, config, iteration):
    """`optimistic: false`, and ipo of the same target: the same weights to the last bit."""
    ours, theirs = learner(config, Onpo(eta=ETA, optimistic=False)), learner(config, Ipo(tau=1 / ETA))
    train._steps(iteration(1, ours), against(ours, pairs(1)))
    regression(theirs, config, 1, pairs(1))
    assert_equal(ours.weights(), theirs.weights())


def test_two_passes_are_two_regressions_of_which_the_second_is_against_what_the_first_has_made(
    learner, config, iteration, tmp_path
):
    """In the second iteration the first pass begins at the auxiliary weights, and not at the policy, in a new process too."""
    ours, theirs = learner(config, Onpo(eta=ETA)), learner(config, Ipo(tau=1 / ETA))
    expected = {}
    for t in (1, 2):
        (tmp_path / f"aux{t}").mkdir()
        regression(theirs, config, t, pairs(t))
        theirs.save(tmp_path / f"aux{t}")
        expected["auxiliary", t] = theirs.weights()
        regression(theirs, config, t, pairs(t))
        expected["policy", t] = theirs.weights()
        theirs.load(tmp_path / f"aux{t}")

    first = iteration(1, ours)
    report, _ = train._steps(first, pairs(1))
    assert report.steps == 4
    assert_equal(ours.weights(), expected["policy", 1])
    first.save("checkpoints")
    store = first.parts.store
    store.finish_phase(1, "train", {"steps": report.steps, "figures": {}})
    resumed = learner(config, Onpo(eta=ETA))
    resumed.load(store.require("checkpoints", 1))
    for one in (ours, resumed):
        train._steps(iteration(2, one), pairs(2))
        assert_equal(one.weights(), expected["policy", 2])
        for t in (1, 2):
            one.load(store.require("auxiliary", t))
            assert_equal(one.weights(), expected["auxiliary", t])

    # What the second pass was trained against, asked of the auxiliary weights by a learner that has only read them.
    reader = learner(config, Onpo(eta=ETA))
    for t, trained in ((1, ours.trained[1]), (2, ours.trained[3])):
        reader.load(store.require("auxiliary", t))
        known = {item.prompt_id: item for item in against(reader, pairs(t))}
        for item in trained:
            for sequence, right in zip(item.sequences, known[item.prompt_id].sequences, strict=True):
                assert np.array_equal(sequence.reference_logprobs, right.reference_logprobs)


def test_a_second_pass_against_the_first_s_start_would_be_noticed(learner, config, iteration, monkeypatch):
    """The fault of the wrong anchor."""
    right, wrong = learner(config, Onpo(eta=ETA)), learner(config, Onpo(eta=ETA))
    train._steps(iteration(1, right), pairs(1))
    known = against(wrong, pairs(1))
    monkeypatch.setattr(train, "_against_itself", lambda it, items, *names: known)
    train._steps(iteration(1, wrong), pairs(1))
    assert any(not np.array_equal(wrong.weights()[name], value) for name, value in right.weights().items())
