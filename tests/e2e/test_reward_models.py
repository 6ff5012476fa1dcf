"""Training of reward and preference models, on a tiny Llama and the torch learner in this process."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from preference_rows import circles, games, taste, write_config, write_rows
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from onlinerl import releases
from onlinerl.config import reward_model as configuration
from onlinerl.config.roles import build
from onlinerl.controller.accuracy import cycle_rate
from onlinerl.errors import ConfigError, OnlineRLError, OracleError, StoreError
from onlinerl.learners._group import RankGroup
from onlinerl.oracles.gpm import GeneralPreferenceModel
from onlinerl.oracles.pair_model import PairModel
from onlinerl.oracles.reward_model import RewardModel
from onlinerl.reward_training import checks, refresh, running
from onlinerl.reward_training.starting import started
from onlinerl.stores.directory import RunDirectory
from onlinerl.trackers.jsonl import read_metrics
from onlinerl.types import Message, Prompt, Query, TrainSequence

SHARE = 0.4
"""Of the prompts whose responses go in a circle."""


def trained(path: Path, *overrides: str, fresh: bool = False) -> Path:
    """The model that a configuration makes."""
    return running.run(configuration.load(path, overrides), Console(file=io.StringIO()), fresh=fresh)


def report(path: Path) -> dict:
    return json.loads((configuration.load(path).directory / "report.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def query(prompt: str, *responses: str, name: str = "p", messages: tuple[Message, ...] = ()) -> Query:
    return Query(prompt=Prompt(id=name, text=prompt, token_ids=(1,), messages=messages), responses=responses)


# --- Bradley-Terry ---


@pytest.fixture(scope="module")
def tasteful(tiny_model, tmp_path_factory):
    """A configuration, and the model that it made."""
    path = write_config(tmp_path_factory.mktemp("taste"), tiny_model, taste(100))
    return path, trained(path)


def test_a_reward_model_learns_what_is_better(tasteful):
    found = report(tasteful[0])["heldout"]
    assert found["accuracy"]["value"] > 0.9
    assert found["accuracy"]["low"] > 0.5
    assert found["calibration"]["bins"] == 1
    assert set(found["accuracy_by_source"]) == {"even", "odd"}
    assert found["cycles"] is None


def test_it_is_a_plain_hugging_face_model(tasteful):
    """With the scores that the oracle gives, which finds it by its path."""
    _, path = tasteful
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    assert (model.config.num_labels, model.config.architectures) == (1, ["LlamaForSequenceClassification"])
    assert model.config.preference_model == {"objective": "bradley_terry"}
    texts = ["the film film good", "the film film bad", "it is"]
    alone = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    np.testing.assert_allclose(model(**batch).logits[:, 0].tolist(), alone, atol=1e-5)
    oracle = RewardModel(path=str(path), device="cpu")
    (verdict,) = oracle.judge([query("the film film", " good", " bad")])
    np.testing.assert_allclose(verdict.scores, alone[:2], atol=1e-5)
    assert verdict.scores[0] > verdict.scores[1]


def test_again_it_does_nothing(tasteful, monkeypatch):
    path, model = tasteful
    monkeypatch.setattr(running, "started", lambda _: pytest.fail("the model was loaded"))
    assert trained(path) == model


def test_the_head_begins_with_the_seed(tasteful, tiny_model, tmp_path):
    rows = taste(100)
    same = trained(write_config(tmp_path / "same", tiny_model, rows))
    other = trained(write_config(tmp_path / "other", tiny_model, rows, seed=1))
    first = weights(tasteful[1])
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(same).items())
    assert not torch.equal(weights(other)["score.weight"], first["score.weight"])


def test_it_can_be_trained_further(tasteful, tmp_path):
    """The head that is there stays: without a step there is nothing new."""
    path = write_config(tmp_path, tasteful[1], taste(60), training={"learning_rate": 1e-12, "epochs": 1})
    assert "goes on from a trained reward model" in checks.check(configuration.load(path)).notes[-2]
    before, after = weights(tasteful[1]), weights(trained(path))
    assert all(torch.allclose(tensor, before[name], atol=1e-7) for name, tensor in after.items())


# --- killed and gone on with ---


def die(moment: str) -> None:
    """Replace what is called at a moment by the end of this process."""

    def end(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "in a checkpoint":
        RankGroup.save = end
    elif moment == "after the second checkpoint":
        real, calls = RunDirectory.retain, []

        def retain(self, kind, keep):
            calls.append(1)
            end() if len(calls) == 2 else real(self, kind, keep)

        RunDirectory.retain = retain
    elif moment == "between checkpoints":
        real_update, taken = RankGroup.update, []

        def update(self, *args, **more):
            taken.append(1)
            if len(taken) == 5:
                end()
            yield from real_update(self, *args, **more)

        RankGroup.update = update
    elif moment == "in the export":
        RankGroup.export = end
    elif moment == "before the report":
        running.reports.write = end


def killed(path: Path, moment: str) -> int | None:
    """How a training ended that was killed then."""

    def run() -> None:
        die(moment)
        trained(path)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(300)
    return process.exitcode


@pytest.mark.parametrize(
    "moment", ["in a checkpoint", "after the second checkpoint", "between checkpoints", "in the export", "before the report"]
)
def test_killed_at_any_moment_it_goes_on_exactly(tasteful, tiny_model, tmp_path, moment):
    path = write_config(tmp_path, tiny_model, taste(100))
    assert killed(path, moment) == -signal.SIGKILL
    again, first = trained(path), weights(tasteful[1])
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(again).items())
    lines = [(config.parent / "reward_models/tiny/steps.jsonl").read_text() for config in (path, tasteful[0])]
    assert lines[0] == lines[1]
    assert [json.loads(line)["step"] for line in lines[0].splitlines()] == list(range(1, lines[0].count("\n") + 1))
    found, wanted = report(path)["heldout"], report(tasteful[0])["heldout"]
    assert found == wanted
    assert len(list((tmp_path / "reward_models/tiny/checkpoints").glob("[0-9]*"))) == 2


def test_a_signal_stops_it_and_the_next_call_goes_on(tasteful, tiny_model, tmp_path, monkeypatch):
    path, real, taken = write_config(tmp_path, tiny_model, taste(100)), RankGroup.update, []

    def update(self, *args, **more):
        taken.append(1)
        if len(taken) == 5:
            raise KeyboardInterrupt
        yield from real(self, *args, **more)

    monkeypatch.setattr(RankGroup, "update", update)
    with pytest.raises(KeyboardInterrupt):
        trained(path)
    monkeypatch.undo()
    with RunDirectory.open(tmp_path / "reward_models/tiny") as store:
        assert store.manifest["status"] == "interrupted"
    first = weights(tasteful[1])
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(trained(path)).items())


def test_other_data_or_keys_under_the_same_name_are_refused(tasteful, tiny_model, tmp_path):
    shutil.copytree(tasteful[0].parent, tmp_path / "copy")
    path = write_config(tmp_path / "copy", tiny_model, taste(100))
    rows = tmp_path / "copy/preferences.jsonl"
    with pytest.raises(StoreError, match=r"a different run; it differs in .*training.learning_rate"):
        trained(path, "training.learning_rate=1e-4")
    # The copied manifest names the folder of the original: what is compared here is the data.
    config = configuration.load(path)
    manifest = json.loads((tmp_path / "copy/reward_models/tiny/manifest.json").read_text())
    with RunDirectory.open(tmp_path / "copy/reward_models/tiny") as store:
        store.update_manifest(config_digest=configuration.digest(config), fingerprint=configuration.fingerprint(config))
    assert manifest["kind"] == "reward_model"
    write_rows(rows, [{**row, "chosen": " best"} for row in taste(100)])
    with pytest.raises(StoreError, match="begun with other comparisons") as error:
        trained(path)
    assert error.value.field == "preferences"
    write_rows(rows, taste(100))
    assert trained(path, "checkpoints.every=50"), "how often it is saved may change"
    assert trained(path, fresh=True)
    assert (tmp_path / "copy/reward_models/tiny.1").is_dir()


def test_too_many_steps_without_a_gradient_stop_it(tiny_model, tmp_path, monkeypatch):
    path, real = write_config(tmp_path, tiny_model, taste(100), training={"max_skipped_steps": 1}), RankGroup.update

    def update(self, *args, **more):
        for one in real(self, *args, **more):
            yield type(one)(steps=1, tokens=1, metrics=({**one.metrics[0], "skipped": 1.0, "loss": math.nan},), skipped=1)

    monkeypatch.setattr(RankGroup, "update", update)
    with pytest.raises(OnlineRLError, match="2 optimizer steps had a non-finite loss") as error:
        trained(path)
    assert error.value.started


# --- preferences in circles ---


@pytest.fixture(scope="module")
def circular(tiny_model, tmp_path_factory):
    """Makes a model of an objective, of comparisons some of which go in a circle; returns its report and path."""
    made: dict[str, tuple[dict, Path]] = {}

    def circular(objective: str) -> tuple[dict, Path]:
        if objective not in made:
            folder = tmp_path_factory.mktemp(objective)
            model = {"objective": objective} | ({"dim": 4} if objective == "general_preference" else {})
            training = {"batch_size": 32, "epochs": 8, "learning_rate": 0.005}
            more = {"reward_model": model, "training": training, "checkpoints": {"every": 1000}}
            path = write_config(folder, tiny_model, circles(150, SHARE), **more)
            model_path = trained(path)
            made[objective] = report(path), model_path
        return made[objective]

    return circular


@pytest.mark.parametrize("objective", ["general_preference", "pairwise"])
def test_a_model_of_preferences_reproduces_the_planted_circles(circular, objective):
    """On prompts that it has not seen; they are the planted share of the prompts there."""
    found = circular(objective)[0]["heldout"]
    assert found["accuracy"]["value"] > 0.95
    planted = found["cycles"]["data"]["value"]
    assert 0.2 < planted < 0.6
    assert found["cycles"]["model"]["value"] == pytest.approx(planted, abs=0.05)
    assert ("swap_disagreement" in found) == (objective == "pairwise")


def test_bradley_terry_cannot(circular):
    """No circle, and right about two of three comparisons of a circle at most."""
    found = circular("bradley_terry")[0]["heldout"]
    assert found["cycles"]["model"]["value"] == 0.0
    planted = found["cycles"]["data"]["value"]
    assert found["accuracy"]["value"] <= 1 - planted / 3 + 0.01


def test_the_oracle_gpm_finds_the_model_by_its_path(circular):
    """In K forward passes, with the circle of the data."""
    _, path = circular("general_preference")
    oracle = GeneralPreferenceModel(path=str(path), device="cpu")
    (verdict, single) = oracle.ask([query("the film film", " one", " two", " three"), query("the film film", " one", name="q")])
    assert verdict.cost.calls == 3
    assert verdict.scores is None
    np.testing.assert_allclose(np.nan_to_num(verdict.log_odds), -np.nan_to_num(verdict.log_odds).T, atol=1e-9)
    matrix = verdict.matrix()
    assert min(matrix[0, 1], matrix[1, 2], matrix[2, 0]) > 0.8
    assert single.matrix().tolist() == [[0.5]]
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    rows = [AutoTokenizer.from_pretrained(path)(f"the film film {word}", return_tensors="pt") for word in ("one", "two")]
    (a, b) = [model(**row).logits[0].tolist() for row in rows]
    s = a[0] * b[1] - a[1] * b[0] + a[2] * b[3] - a[3] * b[2]
    assert verdict.log_odds[0][1] == pytest.approx(s / 0.1, rel=1e-4)
    other = GeneralPreferenceModel(path=str(path), device="cpu", tau=1.0)
    assert other.ask([query("the film film", " one", " two")])[0].log_odds[0][1] == pytest.approx(s, rel=1e-4)
    assert other.version != oracle.version


def test_the_oracle_pair_model_asks_both_orders(circular):
    """In K (K - 1) forward passes, both kept; the reversed list is the reversed matrix."""
    _, path = circular("pairwise")
    oracle = PairModel(path=str(path), device="cpu")
    words = (" one", " two", " three")
    (verdict, reversed_) = oracle.ask([query("the film film", *words), query("the film film", *words[::-1], name="q")])
    assert verdict.cost.calls == 6
    odds = np.asarray(verdict.log_odds)
    assert np.isnan(np.diag(odds)).all()
    assert np.abs(odds + odds.T)[~np.isnan(odds)].max() > 1e-6, "the orders are not made to agree"
    np.testing.assert_allclose(np.asarray(reversed_.log_odds)[::-1, ::-1], odds, atol=1e-5)
    matrix = verdict.matrix()
    assert min(matrix[0, 1], matrix[1, 2], matrix[2, 0]) > 0.8


@pytest.mark.parametrize(
    ("oracle", "objective", "fault"),
    [
        (RewardModel, "pairwise", "trained with the objective pairwise, and this oracle asks models of bradley_terry"),
        (RewardModel, "general_preference", "trained with the objective general_preference"),
        (GeneralPreferenceModel, "bradley_terry", "trained with the objective bradley_terry"),
        (PairModel, "bradley_terry", "asks models of pairwise"),
    ],
)
def test_the_wrong_model_for_an_oracle_is_refused_before_it_is_loaded(circular, oracle, objective, fault):
    with pytest.raises(OracleError, match=fault) as error:
        oracle(path=str(circular(objective)[1]), device="cpu").inspect()
    assert error.value.field == "oracle.path"
    assert "oracle.name" in error.value.fix


def test_an_embedding_of_odd_length_is_refused(circular, tmp_path):
    shutil.copytree(circular("general_preference")[1], tmp_path / "odd")
    config = json.loads((tmp_path / "odd/config.json").read_text())
    labels = {str(i): str(i) for i in range(3)}
    (tmp_path / "odd/config.json").write_text(
        json.dumps({**config, "id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}})
    )
    with pytest.raises(OracleError, match="has 3 labels; an embedding has an even number"):
        GeneralPreferenceModel(path=str(tmp_path / "odd"), device="cpu").inspect()


def cycle_rates(run: Path, iteration: int) -> list[float]:
    """Of the different responses to each prompt, by the preferences that the oracle gave and the run has stored."""
    found = []
    with RunDirectory.open(run) as store:
        verdicts = {label.prompt_id: label.result for label in store.labels(iteration, "verdicts")}
        for group in store.groups(iteration, "rollouts"):
            texts = [rollout.text for rollout in group.rollouts]
            different = [texts.index(text) for text in dict.fromkeys(texts)]
            matrix = verdicts[group.prompt.id].matrix()[np.ix_(different, different)]
            found += [cycle_rate(matrix, group.prompt.id)] if len(different) > 2 else []
    return found


def test_sppo_runs_on_preferences_in_circles(tiny_model, toy_config, onlinerl, tmp_path):
    """The whole loop, with each of two models of one game of rock, paper and scissors as its oracle: what the run stores and reports goes in
    circles with one, and cannot with the other."""
    words = [word for word in json.loads((tiny_model / "tokenizer.json").read_text())["model"]["vocab"] if word.isalpha()]
    found = {}
    for name, objective in (("gpm", "general_preference"), ("reward_model", "bradley_terry")):
        more = {"training": {"batch_size": 32, "epochs": 6, "learning_rate": 0.005}, "checkpoints": {"every": 1000}}
        model = trained(
            write_config(tmp_path / objective, tiny_model, games(300, words), reward_model={"objective": objective}, **more)
        )
        oracle = {"oracle.name": name, "oracle.path": str(model), "oracle.device": "cpu"}
        sampling = {"sampling.samples_per_prompt": 6, "sampling.max_new_tokens": 1}
        config = toy_config(tmp_path / name, {**oracle, **sampling, "algorithm.name": "sppo", "iterations": 2})
        code, said = onlinerl("run", config)
        assert code == 0, said
        run = tmp_path / name / "runs/toy"
        found[name] = [rate for t in (1, 2) for rate in cycle_rates(run, t)]
        with RunDirectory.open(run) as store:
            assert store.phases(2)["train"]["steps"] > 0
        reported = [each["value"] for each in read_metrics(run / "metrics.jsonl") if each["name"] == "preference_cycles"]
        assert len(reported) == (2 if name == "gpm" else 0), "an oracle that scores compares nothing"
        assert all(value > 0 for value in reported)
    # Of three random words two in nine are of three kinds, and all of those go in a circle.
    assert np.mean(found["gpm"]) > 0.1
    assert set(found["reward_model"]) == {0.0}


def test_an_oracle_that_only_compares_needs_two_responses(circular, toy_config, onlinerl, tmp_path):
    """Known before anything is loaded."""
    oracle = {"oracle.name": "gpm", "oracle.path": str(circular("general_preference")[1]), "oracle.device": "cpu"}
    config = toy_config(tmp_path, {**oracle, "algorithm.name": "reinforce_pp", "sampling.samples_per_prompt": 1})
    code, said = onlinerl("check", config)
    assert (code, "sampling.samples_per_prompt" in said) == (2, True), said
    config = toy_config(tmp_path, {**oracle, "algorithm.name": "sppo", "sampling.samples_per_prompt": 4})
    assert onlinerl("check", config)[0] == 0


# --- the network ---


ROWS = [TrainSequence(prompt_ids=tuple(ids), response_ids=()) for ids in ((3, 4, 5), (9, 2, 2, 7, 1), (6,))]


@pytest.mark.parametrize(
    "learner",
    [{}, {"padding_free": True}, {"gradient_checkpointing": True}, {"lora": {"rank": 4, "alpha": 8}}],
    ids=lambda each: next(iter(each), "plain"),
)
def test_every_way_to_hold_the_model_says_the_same_and_learns(tiny_model, tmp_path, learner):
    """Before the first step adapters and layouts change nothing; after some steps all have learned."""
    training = {"learning_rate": 0.02 if "lora" in learner else 0.003, "epochs": 3}
    path = write_config(tmp_path, tiny_model, taste(100), learner=learner, training=training)
    with started(checks.check(configuration.load(path)).config) as ranks:
        said = np.stack(ranks.rewards(ROWS))
    plain = write_config(tmp_path / "plain", tiny_model, taste(100))
    with started(checks.check(configuration.load(plain)).config) as ranks:
        np.testing.assert_allclose(said, np.stack(ranks.rewards(ROWS)), atol=1e-5)
    model = trained(path)
    assert report(path)["heldout"]["accuracy"]["value"] > 0.9
    assert not (model / "adapter").exists(), "an adapter without its head would be half of a model"
    begun, after = weights(trained(plain, "training.learning_rate=1e-12", "name=begun")), weights(model)
    changed = {name for name in after if not torch.allclose(after[name], begun[name], atol=1e-6)}
    assert "score.weight" in changed
    assert ("model.embed_tokens.weight" in changed) == ("lora" not in learner)


# --- new labels of a run ---


@pytest.fixture(scope="module")
def judged_run(toy_config, warm_cli_in, tmp_path_factory):
    """A run of three iterations whose oracle scores by sentiment."""
    folder = tmp_path_factory.mktemp("judged")
    done = warm_cli_in(folder)("run", toy_config(folder))
    assert done.returncode == 0, done.message
    return folder / "runs/toy"


def test_a_model_is_trained_further_on_what_a_run_has_labelled(tasteful, judged_run, tmp_path):
    """Labels count less with their age, and are as sure as the oracle was; a report says how it was before."""
    path = write_config(tmp_path, tasteful[1], taste(60), preferences={"runs": [str(judged_run)], "recency": 0.25})
    checked = checks.check(configuration.load(path))
    new = [each for each in checked.train.comparisons if each.source == "toy"]
    assert {each.weight for each in new} == {1.0, 0.25, 0.0625}
    assert all(0.5 <= each.prob <= 1.0 for each in new)
    assert len({each.prob for each in new}) > 3
    found = report(path) if trained(path) else None
    assert found["before"]["accuracy"]["value"] > 0.9
    assert found["rejected"] is None


def test_a_refresh_that_makes_it_worse_is_rejected(tasteful, tmp_path):
    """Trained on labels that are turned round, it forgets what it knew; again it is said, and nothing is computed."""
    rows = taste(100)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    heldout = write_rows(tmp_path / "heldout.jsonl", [{**row, "prompt": f"it {row['prompt']}"} for row in rows[:40]])
    path = write_config(tmp_path, tasteful[1], turned, preferences={"heldout": heldout})
    for _ in range(2):
        with pytest.raises(OnlineRLError, match=r"fell from 1\.000 to 0") as error:
            trained(path)
        assert error.value.field == "preferences.max_accuracy_drop"
        assert error.value.started


def test_labels_of_the_model_itself_are_refused(tasteful, toy_config, onlinerl, tmp_path):
    oracle = {"oracle.name": "reward_model", "oracle.path": str(tasteful[1]), "oracle.device": "cpu", "iterations": 1}
    assert onlinerl("run", toy_config(tmp_path, oracle))[0] == 0
    path = write_config(tmp_path / "rm", tasteful[1], taste(20), preferences={"runs": [str(tmp_path / "runs/toy")]})
    with pytest.raises(ConfigError, match="would only make it surer") as error:
        checks.check(configuration.load(path))
    assert error.value.field == "preferences.runs"


@pytest.mark.parametrize(
    ("oracle", "refused"),
    [
        ({"name": "swapped", "base": {"name": "reward_model", "path": "MODEL"}}, True),
        (
            {
                "name": "composite",
                "members": {"own": {"name": "reward_model", "path": "MODEL"}, "other": {"name": "sentiment"}},
            },
            True,
        ),
        ({"name": "reward_model", "path": "another"}, False),
        (
            {
                "name": "composite",
                "members": {"own": {"name": "reward_model", "path": "MODEL"}, "other": {"name": "sentiment"}},
                "weights": {"own": 0.0},
            },
            False,
        ),
    ],
    ids=["inside another oracle", "a member", "of another model", "a member that only watches"],
)
def test_labels_of_the_model_inside_another_oracle_are_refused_too(tmp_path, oracle, refused):
    model, run = tmp_path / "model", tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps({"oracle": oracle}).replace("MODEL", str(model)))
    with pytest.raises(ConfigError if refused else StoreError):
        refresh.comparisons([str(run)], 1.0, str(model))


def test_a_run_that_has_judged_nothing(tasteful, tmp_path):
    path = write_config(tmp_path, tasteful[1], taste(20), preferences={"runs": [str(tmp_path / "none")]})
    with pytest.raises(StoreError):
        checks.check(configuration.load(path))


# --- what is refused ---


@pytest.fixture
def refused(tiny_model, tmp_path):
    """What is wrong with a configuration, and that nothing was written."""

    def refused(*overrides: str, rows=None, **sections) -> ConfigError:
        path = write_config(tmp_path, sections.pop("model", tiny_model), taste(20) if rows is None else rows, **sections)
        with pytest.raises(OnlineRLError) as error:
            trained(path, *overrides)
        assert error.value.fix
        assert not (tmp_path / "reward_models").exists()
        return error.value

    return refused


@pytest.mark.parametrize(
    ("override", "field", "cause"),
    [
        ("learner.name=toy", "learner.name", "trains no reward models"),
        ("cluster.colocate=true", "cluster.colocate", "no engine"),
        ("model=/nowhere/at/all", "model", "there is no directory"),
        ("model=org/absent", "model", "is not on this machine"),
        ("preferences.max_length=4096", "preferences.max_length", "the model takes 128 tokens"),
        ("preferences.max_length=2", "preferences.max_length", "are longer than 2 tokens"),
        ("reward_model.loss_type=margin", "reward_model.loss_type", "no comparison has one"),
        ("training.target_kl=0.1", "training.target_kl", "belongs to the iterations of a run"),
        ("algorithm.name=dpo", "CONFIG", "is the configuration of a run"),
        ("preferences.train=/nowhere.jsonl", "preferences.train", "cannot be read"),
        ("learner.lora={rank: 4000, alpha: 8}", "learner.lora.rank", "is 4000"),
    ],
)
def test_a_wrong_key_is_refused_before_the_model_is_loaded(refused, override, field, cause):
    error = refused(override)
    assert (error.field, cause in error.cause) == (field, True), error


def test_a_conversation_without_a_chat_template(refused, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink(missing_ok=True)
    file = tmp_path / "model/tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}))
    error = refused(model=tmp_path / "model", preferences={"apply_chat_template": True})
    assert "has no chat template" in error.cause


def test_an_encoder_has_no_such_head(refused, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "bert")
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, architectures=["BertLMHeadModel"]
    )
    (tmp_path / "bert/config.json").write_text(json.dumps({**config.to_dict(), "is_decoder": True}))
    assert "no classifier of the family 'bert' with a head called `score`" in refused(model=tmp_path / "bert").cause


def test_a_model_of_another_objective_is_not_trained_further(refused, tasteful, circular):
    error = refused("reward_model.objective=pairwise", model=tasteful[1])
    assert "was trained with the objective bradley_terry, not pairwise" in error.cause
    error = refused("reward_model.objective=general_preference", model=circular("general_preference")[1])
    assert "is a classifier with 4 labels, and the objective reads 6" in error.cause


def test_a_run_does_not_take_it_for_its_own(tasteful):
    """`onlinerl run` on its configuration says what it is."""
    from onlinerl import config as run_configuration

    with pytest.raises(ConfigError) as error:
        run_configuration.load(tasteful[0])
    assert "train-rm" in error.value.fix


def test_the_table_and_the_paths_are_shown(tasteful):
    said = io.StringIO()
    running.run(configuration.load(tasteful[0]), Console(file=said, width=160))
    text = said.getvalue()
    for wanted in ("accuracy", "calibration error", "shorter is better", "oracle.name=reward_model oracle.path="):
        assert wanted in text


def test_the_command_line(tasteful, onlinerl):
    """Check, the same training again, what is kept of it, and what a run's commands say of it."""
    path = tasteful[0]
    folder = path.parent / "reward_models/tiny"
    assert onlinerl("train-rm", path, "--check")[0] == 0
    assert onlinerl("train-rm", path)[0] == 0
    assert onlinerl("show", folder)[0] == 0
    assert onlinerl("show", folder, "--json")[0] == 0
    code, said = onlinerl("train-rm", path, "learner.name=toy")
    assert (code, "learner.name" in said) == (2, True)
    code, said = onlinerl("resume", folder)
    assert (code, "train-rm" in said) == (2, True), said


def test_a_release_of_deepspeed_that_computes_wrong_gradients(refused, monkeypatch):
    monkeypatch.setattr(releases, "installed", lambda package: "0.19.3")
    error = refused("learner.name=deepspeed", "learner.zero_stage=2")
    assert error.field == "learner.zero_stage"
    assert "wrong gradients" in error.cause


def test_the_learner_of_a_loop_has_no_head(tiny_model):
    """Nothing changes for policies: no head is asked for, and none is there."""
    from onlinerl.algorithms.dpo import Dpo

    assert Dpo().needs.reward_head is None
    assert build({"objective": "bradley_terry"}, "reward_model").needs.reward_head[0] == 1


def test_the_stored_configuration_is_the_same_again(tasteful, tmp_path):
    config = configuration.load(tasteful[0])
    (tmp_path / "again.yaml").write_text((config.directory / "config.yaml").read_text())
    assert configuration.digest(configuration.load(tmp_path / "again.yaml")) == configuration.digest(config)
    assert yaml.safe_load(configuration.dump(config))["reward_model"]["objective"] == "bradley_terry"
