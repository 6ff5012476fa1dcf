"""The oracle whose reward model is trained between iterations: what it asks, what it refuses, and what it is after other weights were put in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from onlinerl import config as configuration
from onlinerl import oracle_requests
from onlinerl.config import component
from onlinerl.controller.asking import Asker
from onlinerl.controller.phases.commit import best_iterate
from onlinerl.controller.statistics import ratio
from onlinerl.errors import ConfigError
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.protocols.oracle import Oracle
from onlinerl.protocols.refreshing import Labelled
from onlinerl.reward_training import in_a_run, run_checks
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.labels import Ledger
from onlinerl.types import Cost, Group, Prompt, Query, Rollout, Sampling, Verdict


class Judge(Oracle):
    """Asks two questions about each response, for a cent each."""

    def requests(self, responses: int) -> int:
        return 2 * responses

    def most_usd(self, prompt_tokens: float, response_tokens: float, responses: int) -> float:
        return 0.02 * responses

    def people(self, groups: int, responses: int, *, heldout: bool = False) -> int:
        return groups * responses

    @property
    def version(self) -> str:
        return "judge"

    def judge(self, queries: list[Query]) -> list[Verdict]:
        return [
            Verdict(
                annotator="judge",
                oracle_version="judge",
                scores=tuple(float(len(r)) for r in q.responses),
                cost=Cost(calls=2 * len(q.responses)),
            )
            for q in queries
        ]


JUDGE = {"name": f"{__name__}.Judge"}


def classifier(folder: Path, tiny_model: Path, seed: int = 0) -> str:
    """A random reward model."""
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=60, num_labels=1, initializer_range=0.5, max_position_embeddings=128, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    return [classifier(tmp_path_factory.mktemp(f"rm{seed}"), tiny_model, seed) for seed in range(2)]


def refreshed(model: str, **more: Any) -> Oracle:
    base = {"name": "reward_model", "path": model, "device": "cpu"}
    return component({"name": "refreshed", "base": base, "labels": JUDGE, **more}, "oracle", "oracles", Oracle)


def query(*responses: str, name: str = "p") -> Query:
    return Query(prompt=Prompt(id=name, text="the film", token_ids=(1,)), responses=responses)


QUERY = query(" was good", " was bad")


def test_it_says_what_its_model_says_and_other_weights_are_another_version(models):
    oracle, alone = (
        refreshed(models[0]),
        [component({"name": "reward_model", "path": m}, "oracle", "oracles", Oracle) for m in models],
    )
    (before,) = oracle.ask([QUERY])
    assert (before.scores, before.oracle_version) == ((said := alone[0].judge([QUERY])[0]).scores, said.oracle_version)
    assert oracle.refreshing.objective == "bradley_terry"
    oracle.refreshing.model.reload(models[1])
    (after,) = oracle.ask([QUERY])
    assert after.scores == alone[1].judge([QUERY])[0].scores != before.scores
    assert after.oracle_version == oracle.version != before.oracle_version
    assert oracle.refreshing.path == models[0], "what the run began with"


def test_what_one_version_has_said_is_no_answer_of_the_next(models, tmp_path):
    """The ledger finds labels by the version; whoever asks must look at it again."""
    import threading

    from onlinerl.controller.feed import Feed

    oracle, stop = refreshed(models[0]), threading.Event()
    with RunDirectory.create(tmp_path / "run", config_yaml="", manifest={"name": "r", "fingerprint": {}}) as store:
        asker = Asker(oracle, Ledger(store))

        def asked() -> list:
            (labels,) = asker.labels(Feed.of([QUERY], stop), stop)
            store.labels(1, "verdicts").append([label for _, label in labels])
            asker.recorded(1, "verdicts", labels)
            return [label for _, label in labels]

        (first,), (again,) = asked(), asked()
        assert (first.reused_from, again.reused_from is not None) == (None, True)
        oracle.refreshing.model.reload(models[1])
        asker.renewed()
        (new,) = asked()
        assert new.reused_from is None
        assert new.key != first.key
        assert new.result.oracle_version != first.result.oracle_version


@pytest.mark.parametrize(
    ("keys", "field", "said"),
    [
        ({"base": JUDGE}, "oracle.base", "has no weights"),
        ({"replay": 0.5, "mode": "retrain"}, "oracle.replay", "belongs to mode=continue"),
        ({"recency": 0.5}, "oracle.recency", "belongs to mode=retrain"),
        ({"heldout_share": 1.0}, "oracle.heldout_share", "less than 1"),
        ({"labels": "itself"}, "oracle.labels.path", "only make it surer"),
        ({"labels": "averaged"}, "oracle.labels.average_with[0]", "only make it surer"),
        ({"labels": "within"}, "oracle.labels.members.a.path", "only make it surer"),
    ],
)
def test_what_it_cannot_be_is_refused(models, keys, field, said):
    itself = {"name": "reward_model", "path": models[0]}
    averaged = {"name": "reward_model", "path": models[1], "average_with": [models[0]]}
    labels = {"itself": itself, "averaged": averaged, "within": {"name": "composite", "members": {"a": itself, "b": JUDGE}}}
    if isinstance(keys.get("labels"), str):
        keys = {"labels": labels[keys["labels"]]}
    with pytest.raises(ConfigError, match=said) as error:
        refreshed(models[0], **keys)
    assert error.value.field == field


def test_the_defaults_are_those_of_each_mode(models):
    further, anew = refreshed(models[0]).refreshing, refreshed(models[0], mode="retrain").refreshing
    assert (further.mode, further.replay, anew.mode, anew.recency) == ("continue", 0.5, "retrain", 0.5)
    assert refreshed(models[0], replay=0.0).refreshing.replay == 0.0


def test_only_the_model_is_asked_about_every_group(models):
    oracle = refreshed(models[0], prompts=3)
    assert oracle.requests(4) == refreshed(models[0]).base.requests(4)
    assert (oracle.people(8, 4), oracle.people(2, 4), oracle.people(8, 4, heldout=True)) == (12, 8, 0)


# --- what check says of a run ---


@pytest.fixture
def run_of(toy_config, tmp_path, models):
    def make(**overrides: Any) -> configuration.RunConfig:
        base = {"name": "reward_model", "path": models[0], "device": "cpu"}
        keys = {
            "oracle.name": "refreshed",
            "oracle.base": base,
            "oracle.labels": JUDGE,
            "oracle.every": 2,
            "oracle.prompts": 5,
            "oracle.min_new_labels": 20,
            "iterations": 4,
            "cluster.device": "cpu",
            **overrides,
        }
        return configuration.settled(configuration.load(toy_config(tmp_path, keys)))

    return make


def checked(config: configuration.RunConfig) -> list[str]:
    return run_checks.check(config, configuration.algorithm(config), configuration.oracle(config), ())


def test_calls_turns_and_memory_are_foretold(run_of):
    turns, calls, memory = checked(run_of())
    assert turns.startswith(
        "after every 2 iterations the reward model is trained further where there are 20 new pairs or more: at most 30 an"
    )
    assert (
        "8 requests for 4 responses to a prompt, at most 40 an iteration and 160 for the whole run; about $1.60 at most"
        in calls
    )
    assert "GiB of memory beside the rest" in memory
    assert any("ledger.max_calls is 100" in note for note in checked(run_of(**{"ledger.max_calls": 100})))
    config = run_of()
    told = oracle_requests.of_refresh(config, configuration.algorithm(config), configuration.oracle(config), ())
    assert (told.calls, told.usd) == (160, pytest.approx(1.6))


@pytest.mark.parametrize(
    ("keys", "field", "said"),
    [
        ({"cluster.device": "cuda"}, "cluster.device", "none is reserved"),
        ({"cluster.address": "auto"}, "cluster.address", "reserves nothing"),
        ({"oracle.every": 5}, "oracle.every", "would never be trained"),
        ({"oracle.min_new_labels": 121}, "oracle.min_new_labels", "at most 120 pairs"),
        ({"schedule.max_lag": 1, "sampling.dynamic": True, "schedule.stream": True}, "schedule.max_lag", "waits for verdicts"),
        ({"algorithm.name": "dno_prct", "algorithm.replay": 0.3}, "oracle.name", "once more"),
    ],
)
def test_a_run_that_cannot_have_it_is_refused(run_of, keys, field, said):
    with pytest.raises(ConfigError, match=said) as error:
        checked(run_of(**keys))
    assert error.value.field == field


def test_inside_another_oracle_it_is_refused(run_of, models):
    inner = {"name": "refreshed", "base": {"name": "reward_model", "path": models[0]}, "labels": JUDGE}
    keys = {f"oracle.{key}": None for key in ("every", "prompts", "min_new_labels", "labels")}
    config = run_of(**keys | {"oracle.name": "swapped", "oracle.base": inner})
    with pytest.raises(ConfigError, match="another oracle asks it") as error:
        checked(config)
    assert error.value.field == "oracle.base.name"


def test_a_model_that_the_machine_has_no_memory_for_is_refused(run_of, monkeypatch):
    monkeypatch.setattr(run_checks.hardware, "memory", lambda: (1000.0, 900.0))
    with pytest.raises(ConfigError, match="this machine has 0") as error:
        checked(run_of())
    assert error.value.field == "oracle.base.path"
    monkeypatch.setattr(run_checks.hardware, "memory", lambda: (1e12, 900.0))
    assert "Ray would end a process" in checked(run_of())[-1]


# --- what becomes of figures of two versions ---


def test_the_best_iterate_is_not_one_of_another_scale():
    rate = [None, 0.9, 0.7]
    measured = {
        t: {"reward": float(t), "win_rate": None if rate[t] is None else {"value": rate[t]}, "oracle_versions": {"1": 4}}
        for t in range(3)
    }
    assert best_iterate(measured) == 2
    measured[2]["oracle_versions"] = {"2": 4}
    assert best_iterate(measured) == 1


def test_its_metrics_are_in_the_catalogue():
    assert {"refresh_accuracy", "refresh_accuracy_change", "refresh_reward_shift", "refresh_taken", "refresh_comparisons"} <= {
        definition.name for definition in CATALOGUE
    }


def test_older_weights_are_removed_and_those_of_a_later_training_are_left_alone(run_of, tmp_path):
    config = run_of()
    trainer = in_a_run.Trainer(plan=configuration.oracle(config).refreshing, config=config, folder=tmp_path / "refresh")
    for t in (2, 4, 6, 8):
        (tmp_path / f"refresh/{t:04d}/exports/0007").mkdir(parents=True)
    trainer.keep(["0004/7"], before=8)
    assert sorted(path.parts[-3] for path in tmp_path.glob("refresh/*/exports/0007")) == ["0004", "0008"]


# --- what a training is made of ---


def said(iteration: int, n: int) -> Labelled:
    """Of two responses the first is better."""

    def response(text: str) -> Rollout:
        return Rollout(
            token_ids=(1,), logprobs=(-1.0,), text=text, finish_reason="stop", policy_version=0, sampler=Sampling(), seed=n
        )

    prompt = Prompt(id=f"p{n}", text=f"the film {n}", token_ids=(1,))
    group = Group(prompt=prompt, rollouts=(response(" good"), response(" bad")))
    return Labelled(iteration=iteration, group=group, verdict=Verdict(annotator="j", oracle_version="j", scores=(2.0, 1.0)))


@pytest.fixture
def trainer_of(run_of, tmp_path):
    def make(**keys: Any) -> in_a_run.Trainer:
        config = run_of(**{f"oracle.{key}": value for key, value in keys.items()})
        plan = configuration.oracle(config).refreshing
        return in_a_run.Trainer(plan=plan, config=config, folder=tmp_path / "refresh")

    return make


def chosen(trainer: in_a_run.Trainer, rows: list[Labelled], iteration: int = 3, since: int = 2) -> tuple[Any, int]:
    return trainer._chosen(iteration, since, trainer._comparisons(iteration, since, rows))


ROWS = [said(t, n) for t in (1, 2, 3) for n in range(100 * t, 100 * t + 100)]


def test_all_labels_are_trained_on_anew_and_older_ones_count_less(trainer_of):
    data, new = chosen(trainer_of(mode="retrain", recency=0.25, heldout_share=0.3), ROWS)
    assert new == 100
    assert {round(each.weight, 6) for each in data.train} == {1.0, 0.25, 0.0625}
    assert {each.source for each in data.train} == {"old", "new"}
    assert len(data.train) + len(data.heldout) == 300
    assert all((each.chosen, each.rejected) == (" good", " bad") for each in data.train)


@pytest.mark.parametrize(("replay", "low", "high"), [(0.0, 0, 0), (0.5, 50, 150), (1.0, 200, 200)])
def test_a_share_of_the_older_groups_is_trained_on_once_more(trainer_of, replay, low, high):
    data, _ = chosen(trainer_of(replay=replay, heldout_share=0.0001), ROWS)
    assert low <= sum(each.source == "old" for each in data.train) <= high
    assert sum(each.source == "new" for each in data.train) == 100
    assert {each.weight for each in data.train} == {1.0}


def test_prompts_that_are_held_out_stay_held_out(trainer_of):
    trainer = trainer_of(heldout_share=0.3)
    kept = [{each.prompt.id for each in chosen(trainer, ROWS, since=since)[0].heldout} for since in (0, 2)]
    assert kept[0] == kept[1]
    assert 40 < len(kept[0]) < 140
    assert kept[0].isdisjoint(each.prompt.id for each in chosen(trainer, ROWS, since=0)[0].train)


def test_its_keys_are_those_of_the_training(trainer_of, models):
    keys = {"batch_size": 7, "epochs": 3, "learning_rate": 0.25}
    made = trainer_of(**keys, base={"name": "reward_model", "path": models[0], "max_length": 50}).configured(4, models[1])
    assert made.training.model_dump(include=set(keys)) == keys
    assert (made.name, made.model, made.preferences.max_length) == ("0004", models[1], 50)
    assert trainer_of().configured(4, models[0]).preferences.max_length == 128, "no more than the model takes"


@pytest.mark.parametrize(
    ("rows", "said_so"), [(ROWS[:5], "5 new labels"), ([said(1, 7) for _ in range(40)], "too few of the labelled prompts")]
)
def test_where_there_is_too_little_nothing_is_trained(trainer_of, rows, said_so):
    made = trainer_of().train(1, None, 0, rows, lambda step, steps: pytest.fail("a step was taken"))
    assert (made.weights, made.trained) == (None, 0)
    assert said_so in made.reason


@pytest.mark.parametrize(
    ("after", "taken"), [((1.0,) * 6, True), ((0.5,) * 6, True), ((0.0,) * 6, False), ((0.0, 1.0) * 3, True)]
)
def test_only_what_is_surely_worse_is_not_taken(after, taken):
    """Against weights that are right half of the time, of each prompt."""
    change = ratio([one - 0.5 for one in after], [1] * 6)
    assert (in_a_run._worse(change) is None) == taken
