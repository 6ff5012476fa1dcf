"""What the loop does with the answers of its parts, and that each key it reads does what it says. On toy parts, in this process."""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import documents
import numpy as np
import pytest
from older import as_format_3, as_format_5

from onlinerl import graph, wiring
from onlinerl.controller import evaluation, loop
from onlinerl.controller.phases import annotate as annotating
from onlinerl.engines.toy import ToyEngine
from onlinerl.errors import StoreError
from onlinerl.learners.toy import ToyLearner
from onlinerl.ops.batching import collate
from onlinerl.ops.terms import closeness
from onlinerl.stores import _files, _tables
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import status, summarise
from onlinerl.trackers.jsonl import read_metrics
from onlinerl.types import Prompt, TrainItem

FAILED, REFUSED, NOTHING_LEFT, REQUEUE = 1, 2, 4, 75


def numbers(folder: Path) -> set[int]:
    """Of the checkpoints or exports in it."""
    return {int(path.name) for path in folder.iterdir()}


def records(run: Path, phase: str) -> list[dict]:
    """What a phase recorded, from iteration 1 on."""
    with RunDirectory.open(run) as opened:
        return [opened.phases(t).get(phase, {}) for t in opened.iterations() if t > 0]


def table(run: Path, iteration: int, name: str) -> list[dict]:
    with RunDirectory.open(run) as opened:
        return opened.read(iteration, name)


def values(run: Path, name: str, **labels: str) -> list[float]:
    """One metric over the iterations."""
    found = [r for r in read_metrics(run / "metrics.jsonl") if r["name"] == name and labels.items() <= r["labels"].items()]
    return [r["value"] for r in sorted(found, key=lambda r: r["iteration"])]


# --- time ---


def test_a_clock_that_is_set_back_changes_no_duration(toy_config, onlinerl, monkeypatch, tmp_path):
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(loop, "time", SimpleNamespace(time=lambda: float(next(clock)), monotonic=time.monotonic))
    assert onlinerl("run", toy_config(tmp_path, iterations=1))[0] == 0
    with RunDirectory.open(tmp_path / "runs/toy") as run:
        phases = [record for t in run.iterations() for record in run.phases(t).values()]
    assert len(phases) == 13
    assert all(0 <= record["seconds"] < 60 and 0 <= record["ended"] - record["began"] < 60 for record in phases)


# --- the end ---


def test_a_run_that_was_stopped_behind_its_last_phase_is_finished(toy_config, onlinerl, monkeypatch, tmp_path):
    """As while engines and ranks are shut down."""
    real, run = RunDirectory.update_manifest, tmp_path / "runs/toy"

    def stopped(self: RunDirectory, **changes: object) -> None:
        if changes.get("status") == "finished":
            raise KeyboardInterrupt
        real(self, **changes)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "update_manifest", stopped)
        served = ("metrics.prometheus=true", "metrics.prometheus_port=0")
        assert onlinerl("run", toy_config(tmp_path, iterations=1), *served)[0] == REQUEUE
    found, figures = (tmp_path / "runs/.prometheus" / name for name in ("toy.json", "toy.prom"))
    assert status(run) == "interrupted"
    assert '"interrupted"' in found.read_text()
    assert onlinerl("resume", run)[0] == NOTHING_LEFT
    assert status(run) == "finished"
    assert not found.exists(), "an alert about it would never go away"
    assert 'state="finished"} 1' in figures.read_text()


def test_a_run_may_end_earlier_than_it_was_to(toy_config, onlinerl, oracle, tmp_path):
    run = tmp_path / "runs/toy"
    body = "if calls > 4:\n    raise ValueError\nreturn [[len(r) for r in q['responses']] for q in queries]"
    assert onlinerl("run", toy_config(tmp_path, oracle(body)))[0] == FAILED
    done = [row["iteration"] for row in summarise(run)["iterations"] if row["status"] == "promoted"]
    assert done == [0, 1]
    assert onlinerl("resume", run, "iterations=1")[0] == NOTHING_LEFT
    assert status(run) == "finished"
    assert onlinerl("resume", run)[0] == NOTHING_LEFT


# --- nothing to learn ---

CONSTANT = "return [[0.5] * len(q['responses']) for q in queries]"


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [
        ("dpo", "all 4 groups are ties"),
        ("grpo", "all 4 groups are ties"),
        ("ppo", "all responses of 4 groups got the same judgement"),
    ],
)
def test_a_run_that_never_learns_stops_and_can_go_on(toy_config, onlinerl, oracle, tmp_path, algorithm, reason):
    """Nothing is wrong with a batch of ties; several in a row are worth a look, and are no dead end."""
    few = {"prompts.per_iteration": 4, "iterations": 4, "training.max_idle_iterations": 2, "evaluation.prompts": 4}
    code, message = onlinerl("run", toy_config(tmp_path, {**oracle(CONSTANT), **few, "algorithm.name": algorithm}))
    run = tmp_path / "runs/toy"
    assert code == FAILED
    assert f"training.max_idle_iterations: 2 iterations in a row gave nothing to learn; the last one: {reason}" in message
    assert "`onlinerl resume`, which goes on with fresh prompts" in message
    assert json.loads((run / "failure.json").read_text())["boundary"] == "oracle"
    assert [row["status"] for row in summarise(run)["iterations"]] == ["promoted", "keep", "keep"]
    code, message = onlinerl("resume", run)
    assert code == FAILED
    assert "3 iterations in a row gave nothing to learn" in message
    code, message = onlinerl("resume", run, "training.max_idle_iterations=9")
    assert code == 0, message
    assert [row["status"] for row in summarise(run)["iterations"]] == ["promoted", "keep", "keep", "keep", "keep"]
    assert [r["steps"] for r in records(run, "train")] == [0] * 4
    assert values(run, "idle_iterations") == [1, 2, 3, 4]
    assert not np.load(run / "exports/0004/logits.npy").any()


@pytest.mark.parametrize(("limit", "said"), [(2, True), (48, False)])
def test_ties_of_responses_that_were_cut_say_so(toy_config, onlinerl, oracle, tmp_path, limit, said):
    few = {"prompts.per_iteration": 4, "iterations": 1, "evaluation.prompts": 4, "sampling.max_new_tokens": limit}
    assert onlinerl("run", toy_config(tmp_path, {**oracle(CONSTANT), **few}))[0] == 0
    (sample,), (train,) = (records(tmp_path / "runs/toy", phase) for phase in ("sample", "train"))
    cut, responses = sample["truncated"], sample["samples"]
    assert (cut > responses / 2) == said
    assert (f"; {cut} of {responses} responses were cut at sampling.max_new_tokens={limit}: raise it" in train["idle"]) == said


def test_a_run_may_end_with_nothing_left_to_learn(toy_config, onlinerl, oracle, tmp_path):
    """A converged policy is a success."""
    config = toy_config(tmp_path, {**oracle(CONSTANT), "iterations": 2, "training.max_idle_iterations": 2})
    assert onlinerl("run", config)[0] == 0
    assert onlinerl("resume", tmp_path / "runs/toy")[0] == 4


def test_groups_that_the_oracle_failed_on_are_said_and_counted(toy_config, onlinerl, oracle, tmp_path):
    """Where nothing is left, the reason must not be that no reason is known."""
    silent = oracle("return [None if len(q['responses']) == 4 else [len(r) for r in q['responses']] for q in queries]")
    few = {"prompts.per_iteration": 4, "iterations": 1, "evaluation.prompts": 4, "max_failed_labels": 1.0}
    assert onlinerl("run", toy_config(tmp_path, {**silent, **few}))[0] == 0
    (train,) = records(tmp_path / "runs/toy", "train")
    assert train["dropped"] == {"not_judged": 4}
    assert train["idle"] == "no training item is left of 0 judged groups (dropped: 4 not_judged)"
    assert values(tmp_path / "runs/toy", "pairs_dropped", reason="not_judged") == [4]


def test_ppo_learns_from_cut_responses_whatever_the_oracle_says(toy_config, onlinerl, oracle, tmp_path):
    """As at the start of a run on hard problems: every answer is wrong, but those that end are better than those that do not."""
    cut = {"iterations": 1, "algorithm.name": "ppo", "algorithm.missing_eos_score": -1.0, "sampling.max_new_tokens": 30}
    config = toy_config(tmp_path, {**oracle(CONSTANT), **cut})
    assert onlinerl("run", config)[0] == 0
    (sample,), (train,) = (records(tmp_path / "runs/toy", phase) for phase in ("sample", "train"))
    assert 0 < sample["truncated"] < sample["samples"]
    assert train["idle"] is None
    assert train["steps"] > 0


@pytest.fixture
def answers(monkeypatch) -> list[tuple[int, ...]]:
    """The first response of every item that a toy learner is trained on."""
    trained: list[tuple[int, ...]] = []

    def update(self, steps, rates, original=ToyLearner.update):
        trained.extend(tuple(item.sequences[0].response_ids) for step in steps for item in step)
        return original(self, steps, rates)

    monkeypatch.setattr(ToyLearner, "update", update)
    return trained


def test_an_algorithm_that_reads_no_labels_learns_whatever_the_oracle_says(toy_config, onlinerl, oracle, answers, tmp_path):
    """And the stored answers, which nobody sampled or judged, are in none of the figures about responses."""
    overrides = {**oracle(CONSTANT), "iterations": 2, "algorithm.name": "spin"}
    code, message = onlinerl("run", toy_config(tmp_path, overrides, answer="good great"))
    assert code == 0, message
    run = tmp_path / "runs/toy"
    trained = records(run, "train")
    assert [r["idle"] for r in trained] == [None, None]
    assert [r["sampled_by"] for r in trained] == [[0], [1]]
    assert [r["items"] for r in trained] == [32 - r["dropped"].get("identical", 0) for r in trained]
    assert values(run, "staleness", stat="max") == [0, 0]
    ((good, great, end),) = set(answers)
    logits = np.load(run / "exports/0002/logits.npy")
    assert end == len(logits) - 1
    assert min(logits[[good, great, end]]) > np.delete(logits, [good, great, end]).max()


def test_stored_answers_are_kept_as_tokens_whatever_becomes_of_their_file(toy_config, onlinerl, answers, tmp_path):
    config = toy_config(tmp_path, {"iterations": 1, "algorithm.name": "spin"}, answer="good great")
    assert onlinerl("run", config)[0] == 0
    before = set(answers)
    answers.clear()
    (tmp_path / "train.jsonl").write_text('{"text": "the plot was"}\n')
    code, message = onlinerl("resume", "runs/toy", "iterations=2")
    assert code == 0, message
    assert len(answers) >= 28
    assert set(answers) == before


# --- responses that were thrown away ---


@pytest.fixture
def rejecting(monkeypatch):
    """Makes the toy engine throw responses away: `keep` says how many it keeps of a group, by its number of generated groups."""

    def install(keep) -> None:
        seen = iter(range(10_000))

        def generate(self, requests, sampling, original=ToyEngine.generate) -> Iterator:
            for [group] in original(self, requests, sampling):
                left = min(keep(next(seen), len(group.rollouts)), len(group.rollouts))
                gone = len(group.rollouts) - left
                yield [
                    replace(group, rollouts=group.rollouts[:left], rejected=("logprob", "abort", "logprob", "logprob")[:gone])
                ]

        monkeypatch.setattr(ToyEngine, "generate", generate)

    return install


def test_rejected_responses_are_counted_and_left_out(toy_config, onlinerl, rejecting, tmp_path):
    """A group keeps what is usable of it; one with too few responses, and a held-out prompt without, are left out."""
    heldout = 10
    # The second held-out prompt of each evaluation; then of the first training groups all but 3, 1 and 0.
    plan = {1: 0, heldout: 3, heldout + 1: 1, heldout + 2: 0, heldout + 8 + 1: 0}
    rejecting(lambda number, k: plan.get(number, k))
    config = toy_config(tmp_path, {"iterations": 1, "engine.max_rejected": 0.3, "metrics.prometheus": False})
    code, message = onlinerl("run", config)
    assert code == 0, message
    run = tmp_path / "runs/toy"
    (sample,), (train,), (label,) = (records(run, phase) for phase in ("sample", "train", "label"))
    assert sample["rejected"] == {"logprob": 1 + 2 + 3, "abort": 1 + 1}
    assert sample["samples"] == 8 * 4 - 8
    assert values(run, "rollouts_rejected", reason="logprob") == [6]
    assert values(run, "rollouts_rejected", reason="abort") == [2]
    assert train["dropped"]["few_samples"] == 2
    assert values(run, "pairs_dropped", reason="few_samples") == [2]
    assert label["oracle_calls"] == 6, "the oracle is not asked about what cannot be used"
    assert sorted(len(row["texts"]) for row in table(run, 1, "rollouts")) == [0, 1, 3, *[4] * 5]
    (win_rate,) = [row["win_rate"] for row in summarise(run)["iterations"][1:]]
    assert win_rate["n"] == heldout - 1
    counts = {r["name"]: r["n"] for r in read_metrics(run / "metrics.jsonl") if r["iteration"] == 1 and r["set"] == "heldout"}
    assert {counts[name] for name in ("reward", "length", "truncated", "kl_ref", "kl_forward", "entropy_seq")} == {heldout - 1}


def test_too_many_rejected_responses_stop_the_run(toy_config, onlinerl, rejecting, monkeypatch, tmp_path):
    """And a repaired engine is asked again for exactly these."""
    config = toy_config(tmp_path, {"iterations": 1, "metrics.prometheus": False})
    original = ToyEngine.generate
    rejecting(lambda number, k: 1 if number >= 12 else k)
    code, message = onlinerl("run", config)
    assert code == FAILED
    assert "engine: engine.max_rejected: 6 of 32 responses had to be thrown away (2 abort, 4 logprob)" in message
    run = tmp_path / "runs/toy"
    assert len(table(run, 1, "rollouts")) == 4, "it stops as soon as it is clear"
    monkeypatch.setattr(ToyEngine, "generate", original)
    assert onlinerl("resume", run)[0] == 0
    assert records(run, "sample")[0]["rejected"] == {}
    assert [len(row["texts"]) for row in table(run, 1, "rollouts")] == [4, 4, 1, 1, *[4] * 6]
    healthy = toy_config(tmp_path, {"iterations": 1, "metrics.prometheus": False, "name": "healthy"})
    assert onlinerl("run", healthy)[0] == 0
    assert np.array_equal(*(np.load(tmp_path / f"runs/{name}/exports/0001/logits.npy") for name in ("toy", "healthy")))


# --- truncated responses ---


@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_truncated_responses_are_kept_or_dropped_and_counted_either_way(toy_config, onlinerl, monkeypatch, tmp_path, algorithm):
    """A pair is dropped if either side is truncated."""
    seen: list[list] = []

    def update(self, steps, rates, original=ToyLearner.update):
        seen.append([item for step in steps for item in step])
        return original(self, steps, rates)

    monkeypatch.setattr(ToyLearner, "update", update)
    cut: dict[str, list[bool]] = {}
    for choice in ("keep", "drop"):
        overrides = {"name": choice, "iterations": 1, "training.on_truncated": choice, "sampling.max_new_tokens": 40}
        config = toy_config(tmp_path, {**overrides, "algorithm.name": algorithm, "metrics.prometheus": False})
        code, message = onlinerl("run", config)
        assert code == 0, message
        sides = [[s.finish_reason == "length" for s in item.sequences] for item in seen.pop()]
        cut[choice] = [any(side) for side in sides]
        if choice == "keep" and algorithm == "dpo":
            assert [True, False] in sides or [False, True] in sides, "no pair has one truncated side; try another length"
    (keep,), (drop,) = (records(tmp_path / f"runs/{choice}", "train") for choice in ("keep", "drop"))
    truncated = sum(cut["keep"])
    assert 0 < truncated < len(cut["keep"])
    assert (sum(cut["drop"]), len(cut["drop"])) == (0, len(cut["keep"]) - truncated)
    assert (keep["truncated"], keep["dropped"].get("truncated", 0)) == (truncated, 0)
    assert (drop["truncated"], drop["dropped"]["truncated"]) == (truncated, truncated)
    if algorithm == "dpo":
        assert len(table(tmp_path / "runs/drop", 1, "pairs")) == len(cut["drop"])
    for choice in ("keep", "drop"):
        assert values(tmp_path / f"runs/{choice}", "items_truncated") == [truncated]
        responses = [r for row in table(tmp_path / f"runs/{choice}", 1, "rollouts") for r in row["finish_reasons"]]
        (share,) = values(tmp_path / f"runs/{choice}", "rollouts_truncated")
        assert share == pytest.approx(np.mean([r == "length" for r in responses]))


# --- every key that the loop reads ---


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, [[0.2, 0.2]] * 3),
        ({"lr_scheduler_type": "linear"}, [[0.2, 0.1]] * 3),
        ({"lr_scheduler_type": "cosine"}, [[0.2, 0.1]] * 3),
        ({"warmup_ratio": 0.5}, [[0.1, 0.2]] * 3),
        ({"iteration_decay": 0.5}, [[0.2, 0.2], [0.1, 0.1], [0.05, 0.05]]),
        ({"batch_size": 8}, [[0.2]] * 3),
        ({"epochs": 2}, [[0.2] * 4] * 3),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_learning_rates_that_the_learner_is_given(toy_config, onlinerl, monkeypatch, tmp_path, training, expected):
    given: list[list[float]] = []

    def update(self, steps, rates, original=ToyLearner.update):
        given.append(list(rates))
        return original(self, steps, rates)

    monkeypatch.setattr(ToyLearner, "update", update)
    overrides = {f"training.{key}": value for key, value in training.items()}
    assert onlinerl("run", toy_config(tmp_path, {**overrides, "metrics.prometheus": False}))[0] == 0
    assert given == [pytest.approx(rates) for rates in expected]


@pytest.mark.parametrize(("state", "resets"), [("keep", 0), ("reset", 2)])
def test_what_happens_to_the_optimizer_between_iterations(toy_config, onlinerl, monkeypatch, tmp_path, state, resets):
    """The configuration states it."""
    calls: list[int] = []

    def reset(self, original=ToyLearner.reset_optimizer):
        calls.append(1)
        original(self)

    monkeypatch.setattr(ToyLearner, "reset_optimizer", reset)
    assert onlinerl("run", toy_config(tmp_path, {"training.optimizer_state": state, "metrics.prometheus": False}))[0] == 0
    assert len(calls) == resets


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ({"schedule": "fixed"}, [0, 0, 0, 0]),
        ({"schedule": "previous"}, [0, 1, 2, 3]),
        ({"schedule": "every_n", "every": 2}, [0, 0, 2, 2]),
        ({"schedule": "every_n", "every": 3}, [0, 0, 0, 3]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_which_weights_the_reference_logprobs_come_from(toy_config, onlinerl, monkeypatch, tmp_path, reference, expected):
    """What is scored, and what is stored about it; only the last export and those still needed are kept."""
    trained: list[np.ndarray] = []

    def update(self, steps, rates, original=ToyLearner.update):
        sequence = steps[0][0].sequences[0]
        trained.append(sequence.reference_logprobs - self.logprobs([sequence])[0])
        return original(self, steps, rates)

    monkeypatch.setattr(ToyLearner, "update", update)
    overrides = {f"reference.{key}": value for key, value in reference.items()}
    more = {"iterations": 4, "checkpoints.exports": "last", "checkpoints.keep": 3, "metrics.prometheus": False}
    assert onlinerl("run", toy_config(tmp_path, {**overrides, **more}))[0] == 0
    run = tmp_path / "runs/toy"
    assert [r["reference"] for r in records(run, "train")] == expected
    # The learner holds iterate t - 1 when iteration t starts: the two differ unless the reference is that one.
    assert [not gap.any() for gap in trained] == [iterate == t - 1 for t, iterate in enumerate(expected, start=1)]
    kept = {int(p.name) for p in (run / "exports").iterdir()}
    assert kept == {3, 4, expected[-1]} - {0}
    assert {int(p.name) for p in (run / "checkpoints").iterdir()} == {2, 3, 4}


@pytest.mark.parametrize("exports", ["all", "last", "best"])
def test_a_finished_run_keeps_its_model_alone_if_it_is_asked_to(toy_config, onlinerl, tmp_path, exports):
    run, asked = tmp_path / "runs/toy", {"checkpoints.when_finished": "remove", "checkpoints.exports": exports}
    assert onlinerl("run", toy_config(tmp_path, {**asked, "iterations": 3, "metrics.prometheus": False}))[0] == 0
    best = records(run, "commit")[-1]["best"]
    assert numbers(run / "exports") == {"all": {1, 2, 3}, "last": {3}, "best": {best, 3} - {0}}[exports]
    assert numbers(run / "checkpoints") == set()
    assert onlinerl("resume", run)[0] == NOTHING_LEFT
    before = sorted(path for path in run.rglob("*"))
    code, message = onlinerl("resume", run, "iterations=4")
    assert code == REFUSED
    assert "iterations: the run was finished after iteration 3 and has kept no checkpoint to go on from" in message
    assert f"model={run}/exports/0003" in message
    assert sorted(path for path in run.rglob("*")) == before
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"


def test_what_a_finished_run_has_kept_can_be_removed_later(toy_config, onlinerl, tmp_path):
    run = tmp_path / "runs/toy"
    assert onlinerl("run", toy_config(tmp_path, {"iterations": 2, "metrics.prometheus": False}))[0] == 0
    assert numbers(run / "checkpoints") == {1, 2}
    assert onlinerl("resume", run, "iterations=3")[0] == 0
    assert numbers(run / "checkpoints") == {2, 3}
    assert onlinerl("resume", run, "checkpoints.when_finished=remove")[0] == NOTHING_LEFT
    assert numbers(run / "checkpoints") == set()


def test_the_garbage_collector_is_left_as_it_was(toy_config, onlinerl, tmp_path):
    """The loop keeps it from looking through all that was loaded before, and is not the only user of it."""
    onlinerl("run", toy_config(tmp_path, {"iterations": 1}))
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ({}, [0, 0, 0, 0]),
        ({"schedule": "previous"}, [0, 1, 2, 3]),
        ({"schedule": "every_n", "every": 2}, [0, 0, 2, 2]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_which_saved_model_the_policy_is_compared_with_while_it_moves(
    toy_config, onlinerl, monkeypatch, tmp_path, reference, expected
):
    """Never the policy itself, even where they begin as one: the KL is 0 at the first step and not at the last one."""
    named: list[str] = []
    kls: list[tuple[float, float]] = []

    def set_reference(self, model, original=ToyLearner.set_reference):
        named.append(model)
        original(self, model)

    def update(self, steps, rates, original=ToyLearner.update):
        def kl():
            return self._outputs(collate(steps[0])).reference_kl_BT[0, 0].item()

        before = kl()
        yield from original(self, steps, rates)
        kls.append((before, kl()))

    monkeypatch.setattr(ToyLearner, "set_reference", set_reference)
    monkeypatch.setattr(ToyLearner, "update", update)
    overrides = {f"reference.{key}": value for key, value in reference.items()}
    more = {"algorithm.name": "tdpo2", "iterations": 4, "checkpoints.exports": "last", "metrics.prometheus": False}
    code, message = onlinerl("run", toy_config(tmp_path, {**overrides, **more}))
    assert code == 0, message
    assert [int(path.rpartition("/")[2]) if "/exports/" in path else 0 for path in named] == expected
    assert [before == 0 for before, _ in kls] == [iterate == t - 1 for t, iterate in enumerate(expected, start=1)]
    assert min(after for _, after in kls) > 1e-3


@pytest.mark.parametrize(
    ("overrides", "expected", "anchored", "moving"),
    [
        ({}, [["policy"], ["policy", "base"], ["policy", "base"]], True, True),
        ({"reference.schedule": "fixed", "reference.allow_nonstandard": True}, [["policy"], ["base"], ["base"]], True, False),
        ({"algorithm.anchor_weight": 0.0}, [["policy"], ["policy"], ["policy"]], False, True),
    ],
    ids=["two anchors", "one and the same", "no base model"],
)
def test_the_anchor_is_the_base_model_and_no_model_is_asked_twice(
    toy_config, onlinerl, monkeypatch, tmp_path, overrides, expected, anchored, moving
):
    asked: list[str] = []
    by_iteration: list[list[str]] = []

    def logprobs(self, sequences, *, model, original=ToyLearner.logprobs, **options):
        asked.append(model)
        return original(self, sequences, model=model, **options)

    def arrays(it, sequences, original=annotating._arrays):
        before = len(asked)
        found = original(it, sequences)
        by_iteration.append([{it.parts.base_model: "base"}.get(model, model) for model in asked[before:]])
        return found

    monkeypatch.setattr(ToyLearner, "logprobs", logprobs)
    monkeypatch.setattr(annotating, "_arrays", arrays)
    more = {"algorithm.name": "inpo", "metrics.prometheus": False, **overrides}
    code, message = onlinerl("run", toy_config(tmp_path, more))
    assert code == 0, message
    assert by_iteration == expected
    for t in (1, 2, 3):
        rows = table(tmp_path / "runs/toy", t, "logprobs")
        reference, anchor = (
            [np.concatenate(row[name]) for row in rows if row[name] is not None]
            for name in ("reference_logprobs", "anchor_logprobs")
        )
        assert bool(anchor) == anchored
        for of_base in anchor:  # whose logits are all 0
            assert np.ptp(of_base) == 0
        assert any(np.ptp(of_reference) > 0 for of_reference in reference) == (moving and t > 1)


def test_pairs_are_weighed_by_the_policy_of_the_moment(toy_config, onlinerl, monkeypatch, tmp_path):
    """The base model of the toy is uniform, and every response is what it would say: its pairs count fully, until it has moved."""
    weights: list[float] = []

    def update(self, steps, rates, original=ToyLearner.update):
        batch = collate(steps[0])
        weights.append(closeness(self._outputs(batch), batch).mean().item())
        return original(self, steps, rates)

    monkeypatch.setattr(ToyLearner, "update", update)
    code, message = onlinerl("run", toy_config(tmp_path, {"algorithm.pair_weights": "wpo", "metrics.prometheus": False}))
    assert code == 0, message
    assert weights[0] == pytest.approx(1.0, abs=1e-6)
    assert 0 < min(weights[1:]) <= max(weights[1:]) < 1


@pytest.mark.parametrize(("kind", "clip"), [("equal", None), ("certainty", None), ("certainty", [0.5, 1.5])])
def test_responses_count_what_training_says(toy_config, onlinerl, monkeypatch, tmp_path, kind, clip):
    """`training.sample_weights` and `sample_weight_clip`: mean 1 over each iteration, by how surely a response wins or loses."""
    trained: list[list[TrainItem]] = []

    def update(self, steps, rates, original=ToyLearner.update):
        trained.append([item for items in steps for item in items])
        return original(self, steps, rates)

    monkeypatch.setattr(ToyLearner, "update", update)
    keys = {"algorithm.name": "kto", "training.sample_weights": kind, "iterations": 2, "metrics.prometheus": False}
    code, message = onlinerl(
        "run", toy_config(tmp_path, keys | ({} if clip is None else {"training.sample_weight_clip": clip}))
    )
    assert code == 0, message
    assert len(trained) == 2
    for items in trained:
        weights = np.array([item.weight for item in items])
        gaps = np.array([abs(2 * item.sequences[0].win_rate - 1) for item in items])
        expected = np.ones(len(items)) if kind == "equal" else gaps / gaps.mean()
        if clip is not None:
            expected = expected.clip(*clip) / expected.clip(*clip).mean()
        assert weights == pytest.approx(expected)
        assert np.ptp(gaps) > 0.01, "there is something to weigh by"


@pytest.mark.parametrize(
    "keys",
    [
        {"algorithm.name": "kto", "training.sample_weights": "age", "training.sample_age_decay": 0.25},
        {"algorithm.pair_weights": "source", "algorithm.source_weights": {"replay": 0.25}},
    ],
    ids=["responses", "pairs"],
)
def test_what_is_trained_once_more_counts_what_is_said(toy_config, onlinerl, monkeypatch, tmp_path, keys):
    """A quarter of what is new, with mean 1 over the iteration."""
    trained: list[list[TrainItem]] = []

    def update(self, steps, rates, original=ToyLearner.update):
        trained.append([item for items in steps for item in items])
        return original(self, steps, rates)

    monkeypatch.setattr(ToyLearner, "update", update)
    again = {"selection.name": "regenerate", "prompts.reuse": True, "prompts.per_iteration": 40, "iterations": 2}
    code, message = onlinerl("run", toy_config(tmp_path, again | keys | {"metrics.prometheus": False}))
    assert code == 0, message
    first, second = trained
    assert {item.weight for item in first} == {1.0}
    assert {item.iteration for item in second} == {1, 2}
    counts = np.array([0.25 if item.iteration == 1 else 1.0 for item in second])
    assert [item.weight for item in second] == pytest.approx((counts / counts.mean()).tolist())


def test_all_exports_are_kept_by_default(toy_config, onlinerl, tmp_path):
    assert onlinerl("run", toy_config(tmp_path, {"metrics.prometheus": False}))[0] == 0
    assert {int(p.name) for p in (tmp_path / "runs/toy/exports").iterdir()} == {1, 2, 3}
    assert {int(p.name) for p in (tmp_path / "runs/toy/checkpoints").iterdir()} == {2, 3}


def test_prompts_are_used_again_only_if_that_is_wanted(toy_config, onlinerl, tmp_path):
    overrides = {"prompts.per_iteration": 30, "iterations": 2, "metrics.prometheus": False}
    code, message = onlinerl("run", toy_config(tmp_path, overrides))
    assert code == REFUSED
    assert "2 iterations of 30 fresh prompts need 60, and there are 40" in message
    assert onlinerl("run", toy_config(tmp_path, {**overrides, "prompts.reuse": True}))[0] == 0
    used = [[row["prompt_id"] for row in table(tmp_path / "runs/toy", t, "rollouts")] for t in (1, 2)]
    assert [len(set(ids)) for ids in used] == [30, 30]
    assert len({*used[0], *used[1]}) == 40


def test_what_an_evaluation_looks_at(toy_config, onlinerl, monkeypatch, tmp_path):
    """evaluation.prompts and evaluation.mismatch_sample."""
    compared: list[int] = []

    def mismatch(groups, own, original=evaluation.mismatch):
        compared.append(len(groups))
        assert len(own) == len(groups)
        return original(groups, own)

    monkeypatch.setattr(evaluation, "mismatch", mismatch)
    sizes = {"evaluation.prompts": 7, "evaluation.mismatch_sample": 3, "iterations": 1, "metrics.prometheus": False}
    assert onlinerl("run", toy_config(tmp_path, sizes))[0] == 0
    run = tmp_path / "runs/toy"
    assert [len(table(run, t, "evaluation")) for t in (0, 1)] == [7, 7]
    assert summarise(run)["iterations"][1]["win_rate"]["n"] == 7
    assert compared == [3, 3]


def test_how_many_prompts_the_canary_has():
    """evaluation.canary; a prompt of one token has no first half."""
    prompts = [Prompt(id=str(n), text="", token_ids=tuple(range(n))) for n in (1, 2, 5, 4)]
    assert wiring.canary(prompts, 2) == [((0,), (1,)), ((0, 1), (2, 3, 4))]
    assert len(wiring.canary(prompts, 16)) == 3
    assert wiring.canary(prompts[:1] * 3, 2) == [((0,), (0,))] * 2, "no push can be proved without a canary"


def test_how_far_engine_and_learner_may_differ(toy_config, onlinerl, monkeypatch, tmp_path):
    """`evaluation.max_mismatch_k3` stops the run, and a resume may raise it."""

    def generate(self, requests, sampling, original=ToyEngine.generate):
        for [group] in original(self, requests, sampling):
            shifted = [replace(r, logprobs=tuple(p - 0.1 for p in r.logprobs)) for r in group.rollouts]
            yield [replace(group, rollouts=tuple(shifted))]

    monkeypatch.setattr(ToyEngine, "generate", generate)
    k3 = math.exp(0.1) - 1.1
    config = toy_config(tmp_path, {"iterations": 1, "evaluation.max_mismatch_k3": 0.9 * k3, "metrics.prometheus": False})
    code, message = onlinerl("run", config)
    assert code == FAILED
    assert "engine and learner differ by 0.0052 nats per token (k3)" in message
    assert onlinerl("resume", tmp_path / "runs/toy", f"evaluation.max_mismatch_k3={1.1 * k3}")[0] == 0
    assert values(tmp_path / "runs/toy", "logp_mismatch_k3") == pytest.approx([k3, k3], rel=1e-4)


# --- oracles that only compare ---


def test_an_oracle_class_that_only_compares(toy_config, onlinerl, monkeypatch, tmp_path):
    """It is asked in both orders, and never about one response alone."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "preferring.py").write_text(
        """
import math
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Verdict

class Longer(Oracle):
    @property
    def version(self):
        return "1"

    def judge(self, queries):
        return [self._one(q.responses) for q in queries]

    def _one(self, responses):
        assert len(responses) > 1, "a judge of pairs cannot say anything about one response"
        cells = [[math.nan if a is b else float(len(a) > len(b)) for b in responses] for a in responses]
        return Verdict(annotator="longer", oracle_version="1", preferences=tuple(map(tuple, cells)))
"""
    )
    config = toy_config(tmp_path, {"oracle.name": "preferring.Longer", "iterations": 1, "metrics.prometheus": False})
    code, message = onlinerl("run", config)
    assert code == 0, message
    rows = summarise(tmp_path / "runs/toy")["iterations"]
    assert [row["reward"] for row in rows] == [None, None]
    assert rows[1]["win_rate"]["n"] == 10
    code, message = onlinerl("run", config, "name=ppo", "algorithm.name=ppo", "sampling.samples_per_prompt=1")
    assert code == REFUSED
    assert "sampling.samples_per_prompt: the oracle only compares responses with each other, and there is one" in message


def test_the_base_models_answers_give_the_forward_kl(toy_config, onlinerl, tmp_path):
    """KL(base || policy) on toy parts, where log-probs are known: the mean over the base model's own answers."""
    assert onlinerl("run", toy_config(tmp_path, {"iterations": 1, "metrics.prometheus": False}))[0] == 0
    run = tmp_path / "runs/toy"
    logits = np.load(run / "exports/0001/logits.npy")
    policy = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    base = -np.log(len(logits))
    expected = np.mean([sum(base - policy[t] for t in row["token_ids"][0]) for row in table(run, 0, "evaluation")])
    assert values(run, "kl_forward") == pytest.approx([expected], rel=1e-5)
    entropies = values(run, "entropy_token")
    assert entropies[0] == pytest.approx(np.log(len(logits)), rel=1e-5)
    assert entropies[1] < entropies[0]
    assert values(run, "kl_clamped", reference="initial") == [0, 0]


# --- another phase ---


def test_a_phase_is_one_file_and_one_row(toy_config, onlinerl, tmp_path, monkeypatch):
    """That of docs/add-a-part.md: it reads what is there, and its record stands beside the others."""
    document = documents.ROOT / "docs/add-a-part.md"
    documents.write(document, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    printed: dict[str, graph.Phase] = {}
    [block] = [block for block in documents.scripts(document) if "Phase(" in block.text]
    documents.execute(document, block, printed)
    row = printed["row"]

    def phases(original=graph.phases, **schedule):
        *others, commit = original(**schedule)
        return (*others, row, replace(commit, waits_for=(*commit.waits_for, ("lengths", 0))))

    monkeypatch.setattr(graph, "phases", phases)
    config = toy_config(tmp_path, {"schedule.stream": None, "schedule.evaluate_beside": None})
    code, message = onlinerl("run", config)
    assert code == 0, message
    assert all(record["words"] > 0 for record in records(tmp_path / "runs/toy", "lengths"))
    assert [set(r["phases"]) for r in summarise(tmp_path / "runs/toy")["iterations"][1:]] == [{*graph.NAMES, "lengths"}] * 3


# --- runs of earlier versions ---


def as_format_2(run: Path) -> None:
    """As an earlier version left a run that was killed between the training and the checkpoint of iteration 2."""
    as_format_3(run)
    for folder in sorted((run / "iterations").iterdir()):
        stored = _files.read_json(folder / "manifest.json")
        phases = {name: record for name, record in stored["phases"].items() if name not in ("annotate", "answer")}
        phases = {"evaluate" if name == "measure" else name: record for name, record in phases.items()}
        if folder.name == "0002":
            phases = {name: phases[name] for name in ("sample", "label", "train")}
            for table in ("evaluation", "evaluation_verdicts"):
                (folder / f"{table}.parquet").unlink()
                del stored["tables"][table]
        (folder / "logprobs.parquet").unlink(missing_ok=True)
        stored["tables"].pop("logprobs", None)
        _files.replace_json(folder / "manifest.json", {**stored, "phases": phases, "format": 2})
    for kind in ("checkpoints", "exports"):
        shutil.rmtree(run / kind / "0002")
    manifest = _files.read_json(run / "manifest.json")
    fingerprint = {key: value for key, value in manifest["fingerprint"].items() if not key.startswith("schedule.")}
    changes = {"fingerprint": fingerprint, "status": "running", "format": 2}
    _files.replace_json(run / "manifest.json", {**manifest, **changes})


@pytest.mark.parametrize(
    ("rewritten", "phase", "algorithm", "part_bytes"),
    [
        pytest.param(as_format_3, "label", "dpo", _tables.PART_BYTES, id="3-label"),
        pytest.param(as_format_3, "annotate", "ppo", _tables.PART_BYTES, id="3-annotate"),
        pytest.param(as_format_3, "train", "dpo", _tables.PART_BYTES, id="3-train"),
        pytest.param(as_format_5, "annotate", "ppo", _tables.PART_BYTES, id="5-annotate-journal"),
        pytest.param(as_format_5, "annotate", "ppo", 1, id="5-annotate-parts"),
        pytest.param(as_format_5, "train", "dpo", _tables.PART_BYTES, id="5-train"),
    ],
)
def test_a_run_of_an_earlier_format_is_resumed(
    toy_config, onlinerl, monkeypatch, tmp_path, rewritten, phase, algorithm, part_bytes
):
    """Up to format 3 a table was one file, up to format 5 columns had other names: what was complete is read, what was begun goes on."""
    monkeypatch.setattr(_tables, "PART_BYTES", part_bytes)
    config = toy_config(tmp_path, {"algorithm.name": algorithm}, iterations=2)
    assert onlinerl("run", config)[0] == 0
    expected, run = summarise(tmp_path / "runs/toy", extras=True), tmp_path / "runs/toy"
    weights = np.load(run / "exports/0002/logits.npy")
    shutil.rmtree(run)
    with monkeypatch.context() as patch:
        _fail_in_the_middle(patch, phase)
        assert onlinerl("run", config)[0] != 0
    rewritten(run)
    before = summarise(run)["iterations"]
    code, message = onlinerl("resume", run)
    assert code == 0, message
    assert np.array_equal(np.load(run / "exports/0002/logits.npy"), weights)
    found = summarise(run, extras=True)
    for row in (*expected["iterations"], *found["iterations"]):
        row.pop("phases"), row["sync"].pop("seconds")
    assert found == expected
    assert before[0]["reward"] == found["iterations"][0]["reward"]


def _fail_in_the_middle(patch, phase: str) -> None:
    """The phase of iteration 2 stops when some of its rows are stored."""
    from onlinerl.stores.tables import StoredTable

    table = {"label": "verdicts", "annotate": "logprobs", "train": "pairs"}[phase]
    append, seen = StoredTable.append, []

    def append_or_fail(self, values):
        if (self._files.name, self._files.folder.name) == (table, "0002"):
            seen.extend(values)
            if (phase == "label" and len(seen) > 3) or phase != "label":
                append(self, values[: len(values) // 2])
                raise StoreError("planted", field="runs", fix="none")
        append(self, values)

    patch.setattr(StoredTable, "append", append_or_fail)


def test_a_run_of_an_earlier_version_is_shown_and_resumed(toy_config, onlinerl, tmp_path):
    """Its phases had other names, and log-probs were not kept: they are taken again where the training is."""
    assert onlinerl("run", toy_config(tmp_path, iterations=2))[0] == 0
    run = tmp_path / "runs/toy"
    expected, rows = np.load(run / "exports/0002/logits.npy"), summarise(run)["iterations"]
    as_format_2(run)
    shown = summarise(run)["iterations"]
    assert [row["reward"] for row in shown] == [*(row["reward"] for row in rows[:2]), None]
    assert list(shown[1]["phases"]) == ["sample", "label", "train", "checkpoint", "sync", "measure", "commit"]
    code, message = onlinerl("resume", run)
    assert code == 0, message
    assert np.array_equal(np.load(run / "exports/0002/logits.npy"), expected)
    assert [row["reward"] for row in summarise(run)["iterations"]] == [row["reward"] for row in rows]
    with RunDirectory.open(run) as opened:
        assert opened.manifest["format"] == 6
