"""Training the reward model of a run further between two iterations, on what another oracle has said of the responses of its policy.

Each training is a directory like that of `onlinerl train-rm`, in the folder that the run keeps for its oracle: killed anywhere it goes on at
its newest checkpoint, bit for bit. Its report says whether the new weights are taken; until that is there nothing is decided.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from onlinerl import hub, preflight
from onlinerl.config import ClusterConfig, RunConfig
from onlinerl.config import reward_model as configuration
from onlinerl.config.reward_model import PreferencesConfig, RewardCheckpoints, RewardConfig, RewardTraining
from onlinerl.config.roles import build
from onlinerl.controller.statistics import Estimate, ratio
from onlinerl.errors import OnlineRLError
from onlinerl.prompts._preferences import Preferences, held_out
from onlinerl.protocols.learner import LearnerConfig
from onlinerl.protocols.refreshing import Labelled, Refreshed, Refreshing
from onlinerl.reward_training import checks, refresh, reports, running, scoring, steps
from onlinerl.reward_training.checks import Checked
from onlinerl.reward_training.starting import started
from onlinerl.stores import documents, exported
from onlinerl.stores.directory import RunDirectory
from onlinerl.types import Interval, derive_seed
from onlinerl.types.preferences import Comparison

FOLDER = "refresh"
"""In the folder of a run's oracle."""
LEAST_HELD_OUT = 2
"""Prompts: an interval over one says nothing."""
_SAME = ("config_digest", "model", "data", "in_use")
"""In the manifest of a training: what it is."""
_FIELDS = {"training.": "oracle.", "preferences.max_length": "oracle.base.max_length", "model": "oracle.base.path"}
"""Where the keys of a training stand in the configuration of a run."""


class Report(TypedDict):
    """What is kept of a training."""

    rejected: str | None
    trained: int
    heldout: int
    before: Interval
    after: Interval
    change: Interval


@dataclass(frozen=True, kw_only=True)
class Right:
    """How often a model prefers the better one of held-out pairs."""

    prompt: str
    pairs: int
    right: float
    """A tie is half."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A RewardTrainer (see the protocol).

    Args:
        plan: how it trains.
        config: of the run.
        folder: where the trainings are kept.
    """

    plan: Refreshing
    config: RunConfig
    folder: Path

    def path(self, weights: str) -> Path:
        """Where weights are that were taken.

        Raises:
            StoreError: if they are not there, or damaged.
        """
        training, _, step = weights.partition("/")
        return exported.iterate(self.folder / training, int(step))

    def keep(self, weights: Collection[str], before: int) -> None:
        """Remove what else trainings of the iterations before this one have left, but for their reports."""
        wanted = {one.partition("/")[0] for one in weights}
        for path in self.folder.glob("[0-9]*"):
            if path.name not in wanted and int(path.name) < before:
                shutil.rmtree(path / exported.FOLDER, ignore_errors=True)

    def train(
        self, iteration: int, began: str | None, since: int, labelled: Iterable[Labelled], tell: Callable[[int, int], None]
    ) -> Refreshed:
        """Train on what was said, or say why not.

        Raises:
            OnlineRLError: naming field, cause and fix.
        """
        data, new = self._chosen(iteration, since, self._comparisons(iteration, since, labelled))
        if new < self.plan.min_new_labels:
            return _none(f"{new} new labels since the last training, and oracle.min_new_labels is {self.plan.min_new_labels}")
        if len({each.prompt.id for each in data.heldout if each.prob > 0.5}) < LEAST_HELD_OUT or not data.train:
            return _none("too few of the labelled prompts are held out, or to be trained on: raise oracle.prompts")
        base = str(hub.local(self.plan.path) or self.plan.path)
        in_use = base if began is None else str(self.path(began))
        config = self.configured(iteration, in_use if self.plan.mode == "continue" else base)
        with explained():
            report, step = _trained(checks.check(config, data), in_use, tell)
        return Refreshed(
            weights=None if report["rejected"] is not None else f"{config.name}/{step}",
            reason=report["rejected"],
            trained=report["trained"],
            heldout=report["heldout"],
            before=report["before"],
            after=report["after"],
            change=report["change"],
        )

    def _comparisons(
        self, iteration: int, since: int, labelled: Iterable[Labelled]
    ) -> Iterable[tuple[Labelled, Sequence[Comparison]]]:
        """Of each group that was judged, as probable as the other oracle said."""
        for one in labelled:
            weight = self.plan.recency ** (iteration - one.iteration) if self.plan.mode == "retrain" else 1.0
            yield one, list(refresh.pairs(one.group, one.verdict, weight, "new" if one.iteration > since else "old"))

    def _chosen(
        self, iteration: int, since: int, known: Iterable[tuple[Labelled, Sequence[Comparison]]]
    ) -> tuple[Preferences, int]:
        """What is trained and measured on, and how many new comparisons there are."""
        train, heldout, new = list[Comparison](), list[Comparison](), 0
        for one, found in known:
            new += len(found) * (one.iteration > since)
            if found and held_out(found[0].prompt, self.plan.heldout_share):
                heldout += found
            elif one.iteration > since or self.plan.mode == "retrain" or self._drawn(iteration, one):
                train += found
        return Preferences(train, heldout, []), new

    def _drawn(self, iteration: int, one: Labelled) -> bool:
        """Whether an older group is trained on once more."""
        number = derive_seed(self.config.seed, "refresh", iteration, one.iteration, one.group.prompt.id)
        return number < self.plan.replay * 2**31

    def configured(self, iteration: int, model: str) -> RewardConfig:
        """Of this training, as `onlinerl train-rm` would have it."""
        limit = json.loads((Path(model) / "config.json").read_text()).get("max_position_embeddings")
        longest = min(self.plan.max_length, limit) if isinstance(limit, int) else self.plan.max_length
        return RewardConfig(
            name=f"{iteration:04d}",
            model=model,
            seed=self.config.seed,
            runs=str(self.folder),
            reward_model=build({"objective": self.plan.objective}, "reward_model"),
            preferences=PreferencesConfig(train="labels of the run", max_length=longest),
            training=RewardTraining(
                batch_size=self.plan.batch_size, epochs=self.plan.epochs, learning_rate=self.plan.learning_rate
            ),
            learner=learner(),
            checkpoints=RewardCheckpoints(min_free_gib=self.config.checkpoints.min_free_gib),
            cluster=ClusterConfig(device="cpu"),
        )


def learner() -> LearnerConfig:
    """Of a training: one rank in the controller's own process."""
    built: LearnerConfig = build({"name": "torch", "dtype": "float32"}, "learner")
    return built


def _none(reason: str) -> Refreshed:
    return Refreshed(weights=None, reason=reason)


def _trained(checked: Checked, in_use: str, tell: Callable[[int, int], None]) -> tuple[Report, int]:
    """What is left to do; the report, and the step of the weights."""
    with _opened(checked.config, running.identity(checked) | {"in_use": preflight.identity(in_use)}) as store:
        report: Any = reports.read(store.path)
        if report is None or not (report["rejected"] or store.artefact("exports", checked.steps)):
            report = _worked(checked, store, in_use, tell)
            documents.write(store.path / reports.REPORT, report)
        # Whatever is killed here finds the report and comes here again.
        store.retain("checkpoints", set())
        store.retain("exports", set() if report["rejected"] else {checked.steps})
        store.update_manifest(status="finished")
        return report, checked.steps


def _opened(config: RewardConfig, manifest: Mapping[str, Any]) -> RunDirectory:
    """The directory of a training. One that was begun with anything else, before iterations were removed from the run, is begun anew."""
    folder = config.directory
    try:
        there = documents.read(folder / "manifest.json")
    except OnlineRLError:
        there = {}
    if folder.exists() and (there is None or any(there.get(key) != manifest[key] for key in _SAME)):
        shutil.rmtree(folder)
    return RunDirectory.create(folder, config_yaml=configuration.dump(config), manifest=manifest)


def _worked(checked: Checked, store: RunDirectory, in_use: str, tell: Callable[[int, int], None]) -> Report:
    """Train, and compare the weights before and after on the same pairs."""
    if checked.config.model != in_use:  # it does not begin with those that are in use
        with started(checked.config.model_copy(update={"model": in_use})) as learner:
            before = _before(checked, store, learner)
    with started(checked.config) as learner:
        before = _before(checked, store, learner)
        steps.train(checked, store, learner, lambda step, total, _: tell(step, total))
        steps.export(store, learner, checked.steps)
        after = _rights(checked, learner)
    change = ratio([b.right - a.right for a, b in zip(before, after, strict=True)], [a.pairs for a in before])
    return {
        "rejected": _worse(change),
        "trained": len(checked.train.comparisons),
        "heldout": len(checked.heldout.comparisons),
        "before": _interval(_accuracy(before)),
        "after": _interval(_accuracy(after)),
        "change": _interval(change),
    }


def _before(checked: Checked, store: RunDirectory, learner: Any) -> list[Right]:
    """Of the weights in use, before the first step; kept, because whoever goes on from a checkpoint has others."""
    file = store.path / running.BEFORE
    if documents.read(file) is None:
        documents.write(file, {"rights": [[one.prompt, one.pairs, one.right] for one in _rights(checked, learner)]})
    kept = documents.read(file) or {}
    return [Right(prompt=prompt, pairs=pairs, right=right) for prompt, pairs, right in kept["rights"]]


def _rights(checked: Checked, learner: Any) -> list[Right]:
    """By prompt; ties by the labels, of which nobody knows the winner, are left out."""
    found: dict[str, list[float]] = {}
    for comparison, one in zip(
        checked.heldout.comparisons, scoring.scored(learner, checked.reader, checked.heldout), strict=True
    ):
        if one.label > 0.5:
            found.setdefault(comparison.prompt.id, []).append(one.right)
    return [Right(prompt=prompt, pairs=len(rights), right=sum(rights)) for prompt, rights in found.items()]


def _accuracy(rights: Sequence[Right]) -> Estimate:
    return ratio([one.right for one in rights], [one.pairs for one in rights])


def _worse(change: Estimate) -> str | None:
    """Why new weights are not taken; None where they are."""
    if not change.high < 0:
        return None
    return (
        f"on {change.n:,} held-out pairs the new weights are right less often than those in use, by {-change.value:.3f} "
        f"[{-change.high:.3f}, {-change.low:.3f}]: they are not taken"
    )


def _interval(estimate: Estimate) -> Interval:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}


@contextmanager
def explained() -> Iterator[None]:
    """Errors of a training name keys of the run's configuration."""
    try:
        yield
    except OnlineRLError as error:
        found = error.field or ""
        field = next((here + found.removeprefix(key) for key, here in _FIELDS.items() if found.startswith(key)), error.field)
        same: OnlineRLError = type(error)(error.cause, field=field, fix=error.fix)
        raise same from error.__cause__
